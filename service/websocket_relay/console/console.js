// @ts-check
/**
 * The console: connect to channels, publish to them, and put the parts of the page together.
 *
 * relay.js owns the connection, messages.js the list of messages, stats.js, members.js and
 * operations.js the panels beside it. The token is kept in a variable of this module only: in no
 * storage, no cookie and no URL.
 */

import {Relay} from "./relay.js";
import {byId, formatDuration, input, query, setText} from "./dom.js";
import {MembersPanel} from "./members.js";
import {MessageList} from "./messages.js";
import {OperationsPanel} from "./operations.js";
import {sizeOf} from "./payloads.js";
import {StatsPanel} from "./stats.js";
import {tabsOf} from "./tabs.js";

const MAX_SEND_BYTES = 64 * 1024 * 1024; // of a sent message, if the relay allows more
const REPLAY_MS = 1_000; // after a subscription: time for a replay, whose messages are not new

const secret = {value: ""}; // the token
const [connectForm, composeForm] = [byId("connect"), byId("compose")];
const [namesField, historyField, toField] = [input("names"), input("history"), input("to")];
const [messageField, fileField, tokenField] = [input("message"), input("file"), input("token")];
const tokenDialog = /** @type {HTMLDialogElement} */ (byId("token-dialog"));

/** @type {Relay | null} */
let relay = null;
/** @type {Map<string, import("./relay.js").Channel>} on show, by name */
const subscriptions = new Map();
/** @type {Map<string, string>} where the previous connection ended, by channel */
const positions = new Map();
/** @type {Set<string>} channels on show to which the open connection is not subscribed yet */
const joining = new Set();
let isNoted = false; // the list has the note that the open connection is there
let wasConnected = false; // and that of an earlier one, after which this one resumes
let isWanted = false; // the user has connected, and has not disconnected
let shownQuery = ""; // the query of the page's URL: channels and history

// The connection

/** Close the previous connection, and connect to the channels of the form. */
function connect() {
  closeRelay();
  isWanted = true;
  const created = new Relay("./", {token: secret.value, maxPendingBytes: 2 * MAX_SEND_BYTES});
  relay = created;
  let lastState = "idle";
  created.addEventListener("state", (event) => {
    if (created !== relay) return;
    const {state, code, reason} = event;
    if (state === "open" && lastState !== "open") {
      isNoted = false;
    } else if (lastState === "open" && state !== "open") {
      list.addNote(`connection lost: ${code} ${reason}`.trim(), "note bad");
    }
    lastState = state;
    for (const name of subscriptions.keys()) joining.add(name);
    showState(event);
  });
  created.addEventListener("refused", (refusal) => {
    if (created === relay) onRefused(refusal);
  });
  showChannels();
}

/** Leave the channels that the form no longer has, and join the new ones. */
function showChannels() {
  const names = formNames();
  const isSameHistory = new URLSearchParams(shownQuery).get("history") === historyField.value;
  const kept = isSameHistory || !shownQuery ? names : [];
  for (const [name, channel] of subscriptions) {
    if (kept.includes(name)) continue;
    channel.leave();
    subscriptions.delete(name);
    joining.delete(name);
  }
  for (const name of positions.keys()) if (!kept.includes(name)) positions.delete(name);
  list.keep(kept);
  shownQuery = formQuery();
  window.history.replaceState(null, "", `${location.pathname}${shownQuery}`);
  document.title = `${names.join(", ")} · websocket-relay`;
  const added = names.filter((name) => !subscriptions.has(name));
  for (const name of added) join(name, true);
  if (relay?.state === "open" && added.length) list.addNote(`joining ${added.join(", ")}`);
  onChannels();
  showJoined();
}

/** @param {string} name @param {boolean} presence whether to ask who is there */
function join(name, presence) {
  const since = positions.get(name);
  const joined = /** @type {Relay} */ (relay).channel(name, {
    history: Number(historyField.value),
    since,
    presence,
  });
  subscriptions.set(name, joined);
  joining.add(name);
  let [replayUntil, wasSubscribed] = [0, since !== undefined || historyField.value !== "0"];
  /** @param {any} type @param {(event: any) => void} act */
  const on = (type, act) => {
    joined.addEventListener(type, (/** @type {any} */ event) => {
      if (subscriptions.get(name) === joined) act(event);
    });
  };
  on("subscribed", () => {
    replayUntil = wasSubscribed ? performance.now() + REPLAY_MS : 0;
    wasSubscribed = true;
    joining.delete(name);
    showJoined();
  });
  on("message", ({position, data}) => {
    list.addMessage({channel: name, position, data}, performance.now() < replayUntil);
  });
  on("gap", () => {
    const where = subscriptions.size > 1 ? ` in ${name}` : "";
    const why = "messages may be missing, the relay's history does not reach back";
    list.addNote(`gap${where}: ${why}`, "note bad");
  });
  for (const type of ["presence", "joined", "left"]) {
    on(type, () => members.show(subscriptions.values()));
  }
  on("refused", (refusal) => {
    subscriptions.delete(name);
    joining.delete(name);
    if (refusal.status === 404 && presence) return join(name, false);
    if (!subscriptions.size) closeRelay();
    onRefused(refusal, subscriptions.size ? `${name} ` : "");
    onChannels();
    showJoined();
  });
}

/** Show that the page is connected, once no channel is missing. */
function showJoined() {
  if (relay?.state !== "open") return;
  showState(relay);
  if (joining.size || isNoted) return;
  const how = relay.transport === "stream" ? " by server-sent events: WebSocket blocked" : "";
  const what = wasConnected ? "again" : `to ${[...subscriptions.keys()].join(", ")}`;
  list.addNote(`connected ${what}${how}`);
  isNoted = wasConnected = true;
}

/** Close the connection, and keep its positions for a resume. */
function closeRelay() {
  const previous = relay;
  relay = null;
  previous?.close();
  for (const [name, {position}] of subscriptions) if (position) positions.set(name, position);
  subscriptions.clear();
  joining.clear();
  isNoted = wasConnected = false;
  showState({state: "closed"});
}

function disconnect() {
  isWanted = false;
  closeRelay();
  onChannels();
  list.addNote("disconnected");
}

/** Show which channels there are. */
function onChannels() {
  const names = [...subscriptions.keys()];
  members.show(subscriptions.values());
  if (!names.length) return; // those of the messages in the list stay
  list.setChannels(names);
  const chosen = toField.value;
  toField.replaceChildren(...names.map((name) => new Option(name)));
  toField.value = names.includes(chosen) ? chosen : names[0];
  byId("to-field").hidden = names.length < 2;
}

/** Return the channels of the form. */
function formNames() {
  return [...new Set(namesField.value.split(/[\s,]+/).filter(Boolean))];
}

/** Return the form's channels and history as the query of the page's URL. */
function formQuery() {
  const names = formNames().map((name) => ["channel", name]);
  return `?${new URLSearchParams([...names, ["history", historyField.value]])}`;
}

/** @param {{state: string, transport?: string | null, reason?: string, retryInMs?: number}} now */
function showState({state, reason = "", retryInMs = 0}) {
  const [content, kind] = {
    connecting: ["connecting", "wait"],
    open: joining.size ? ["joining", "wait"] : ["connected", "good"],
    waiting: ["reconnecting", "wait"],
    closed: ["not connected", "off"],
  }[state] ?? [state, "off"];
  setText(byId("state"), content);
  byId("state").dataset.kind = kind;
  const retryIn = `${reason}; retry in ${formatDuration(retryInMs / 1000)}`;
  byId("state").title = state === "waiting" ? retryIn : "";
  byId("reconnect").hidden = state !== "waiting";
  const isClosed = state === "closed";
  for (const id of ["message", "attach", "send"]) input(id).disabled = isClosed;
  updateToggle();
}

/** @param {{status: number, reason: string}} refusal @param {string} [what] */
function onRefused({status, reason}, what = "") {
  list.addNote(`${what}refused: ${status} ${reason}`, "note bad");
  if (status === 401 || (status === 403 && secret.value)) promptForToken(`${status} ${reason}`);
}

function isConnected() {
  return relay !== null && relay.state !== "closed";
}

function updateToggle() {
  const isOther = formQuery() !== shownQuery;
  setText(byId("toggle"), isConnected() ? (isOther ? "Change" : "Disconnect") : "Connect");
}

connectForm.addEventListener("submit", (event) => {
  event.preventDefault();
  if (isConnected() && formQuery() === shownQuery) return disconnect();
  if (isConnected()) showChannels();
  else connect();
  updateToggle();
  if (matchMedia("(pointer: fine)").matches) messageField.focus(); // a phone opens its keyboard
});
connectForm.addEventListener("input", updateToggle);
byId("reconnect").addEventListener("click", () => relay?.open());

/** Show a channel beside those on show. @param {string} name */
function showChannel(name) {
  const names = isConnected() ? formNames() : [];
  namesField.value = [...new Set([...names, name])].join(" ");
  if (isConnected()) showChannels();
  else connect();
  updateToggle();
}

// The token

/** @param {string} reason the relay's refusal; "": the user opened the dialog */
function promptForToken(reason) {
  setText(byId("token-reason"), reason && `Reason: ${reason}`);
  byId("token-reason").hidden = !reason;
  tokenField.value = "";
  if (!tokenDialog.open) tokenDialog.showModal();
  tokenField.focus();
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  secret.value = tokenField.value.trim();
  tokenDialog.close();
  statsPanel.retry();
  operations.retry();
  if (!isWanted) return;
  if (!relay || relay.state === "closed") return connect();
  relay.token = secret.value;
  relay.renewToken().catch(() => {}); // a failure shows when the previous token expires
});
tokenDialog.addEventListener("close", () => (tokenField.value = ""));
byId("token-cancel").addEventListener("click", () => tokenDialog.close());
for (const button of document.querySelectorAll(".ask-token")) {
  button.addEventListener("click", () => promptForToken(""));
}

// Sending

/** @param {string | ArrayBuffer} data @param {string} what the start of a note about a failure */
function send(data, what) {
  const sentAt = performance.now();
  subscriptions.get(toField.value)?.publish(data).then(
    (position) => list.markOwn(position, performance.now() - sentAt),
    (error) => list.addNote(`${what}: ${error.message}`, "note bad"),
  );
  if (relay?.queued) list.addNote(`${relay.queued} to be sent when there is a connection`);
}

/** Note and return whether a message is too large. @param {number} size @param {string} what */
function isTooLarge(size, what) {
  const maxBytes = Math.min(statsPanel.maxMessageBytes, MAX_SEND_BYTES);
  if (size <= maxBytes) return false;
  const [actual, limit] = [size, maxBytes].map((each) => each.toLocaleString("en"));
  list.addNote(`${what}: too large, ${actual} bytes; the relay takes ${limit} at most`, "note bad");
  return true;
}

/** @param {FileList | null | undefined} files */
async function sendFiles(files) {
  for (const each of files ?? []) {
    if (isTooLarge(each.size, each.name)) continue;
    try {
      send(await each.arrayBuffer(), each.name);
    } catch {
      list.addNote(`${each.name}: not readable`, "note bad"); // for example, a folder
    }
  }
}

composeForm.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!messageField.value || !isConnected()) return;
  if (isTooLarge(sizeOf(messageField.value), "not sent")) return;
  send(messageField.value, "publish failed");
  messageField.value = "";
  messageField.focus();
});
messageField.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  /** @type {HTMLFormElement} */ (composeForm).requestSubmit();
});
messageField.addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  sendFiles(event.clipboardData.files);
});
byId("attach").addEventListener("click", () => fileField.click());
fileField.addEventListener("change", async () => {
  await sendFiles(fileField.files);
  fileField.value = "";
});

// Without these handlers, a file dropped outside the channel would replace the page.
const target = query(document.body, ".channel");
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    const {dataTransfer} = /** @type {DragEvent} */ (event);
    if (!dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const isOver = event.target instanceof Element && target.contains(event.target);
    target.classList.toggle("dropping", type === "dragover" && isOver && isConnected());
    if (type === "drop" && isOver && isConnected()) sendFiles(dataTransfer.files);
  });
}

// The page

const list = new MessageList(() => Boolean(secret.value));
const statsPanel = new StatsPanel(
  () => secret.value,
  () => list.showPositionsAsTime(statsPanel.positionsHaveTime),
);
const members = new MembersPanel((client) => operations.confirm(client));
const operations = new OperationsPanel({
  token: () => secret.value,
  showChannel,
  onAdmin(isAdmin) {
    members.isAdmin = isAdmin;
    members.show(subscriptions.values());
  },
  openClients: () => showPanel("clients-panel"),
});
const showPanel = tabsOf("tabs", (panel) => {
  operations.show(panel.replace("-panel", ""));
});
showPanel("stats-panel");

const pageQuery = new URLSearchParams(location.search);
const names = pageQuery.getAll("channel");
namesField.value = names.join(" ") || namesField.value;
historyField.value = pageQuery.get("history") ?? "";
historyField.value ||= "20"; // a select rejects other values than its options
const areValid = namesField.checkValidity() && names.every((name) => name && !/[\s,]/.test(name));
if (names.length && areValid) connect();
else window.history.replaceState(null, "", location.pathname); // a token may have been put there
updateToggle();
