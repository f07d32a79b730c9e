// @ts-check
/**
 * The console: connect to a channel, publish to it, list its messages.
 *
 * relay.js owns the connection, stats.js the stats. The token is kept in a variable of this module
 * only: in no storage, no cookie and no URL.
 */

import {Relay} from "./relay.js";
import {
  byId,
  cloneTemplate,
  formatBytes,
  formatCount,
  formatDuration,
  query,
  setText,
  StatsPanel,
} from "./stats.js";

const MAX_MESSAGES = 500; // in the list, and as many pending while it is paused
const MAX_BYTES = 32 * 1024 * 1024; // of each of the two
const MAX_SEND_BYTES = 64 * 1024 * 1024; // of a sent message, if the relay allows more
const PREVIEW_LENGTH = 500; // characters of a message in its row
const PREVIEW_BYTES = 16; // of a binary message in its row
const MAX_DETAIL_LENGTH = 200_000; // characters of an expanded message
const MAX_DETAIL_BYTES = 4_096; // of an expanded binary message
const MAX_JSON_LENGTH = 100_000; // characters; longer messages are treated as text
const MAX_INDENT = 32; // levels
const SLOW_RENDER_MS = 8; // after a slower render of the list,
const RENDER_PAUSE_FACTOR = 4; // the next one waits this multiple of its duration
const COUNT_INTERVAL_MS = 500; // interval between updates of the counts
const ANNOUNCE_INTERVAL_MS = 3_000; // minimum between screen reader announcements
const REPLAY_MS = 1_000; // after a connect: time for a replay, whose messages are not new

const encoder = new TextEncoder();
const secret = {value: ""}; // the token
const [connectForm, composeForm] = [byId("connect"), byId("compose")];
const [nameField, historyField] = [input("name"), input("history")];
const [messageField, fileField, tokenField] = [input("message"), input("file"), input("token")];
const tokenDialog = /** @type {HTMLDialogElement} */ (byId("token-dialog"));

/** @type {Relay | null} */
let relay = null;
/** @type {import("./relay.js").Channel | null} */
let subscription = null;
let channel = "";
/** @type {string | undefined} the last position of the previous connection */
let position;
let connectedQuery = ""; // the query of the page's URL: channel and history

// Messages

/** The newest entries, limited by count and bytes; the last one is always kept. */
class BoundedLog {
  /** @type {Entry[]} */
  entries = [];
  #bytes = 0;

  /** @param {Entry} entry @returns {Entry[]} the evicted entries */
  append(entry) {
    this.entries.push(entry);
    this.#bytes += entry.size;
    let dropped = 0;
    while (this.entries.length - dropped > (this.#bytes > MAX_BYTES ? 1 : MAX_MESSAGES)) {
      this.#bytes -= this.entries[dropped].size;
      dropped += 1;
    }
    return this.entries.splice(0, dropped);
  }

  /** @returns {Entry[]} all entries, which are removed */
  drain() {
    this.#bytes = 0;
    return this.entries.splice(0);
  }
}

/**
 * The list of messages. New messages are rendered together, once per frame, which stays smooth at
 * any rate. The list is paused while the user reads: after scrolling back or expanding a row.
 */
class MessageList {
  #list = byId("messages");
  #visible = new BoundedLog();
  #pending = new BoundedLog();
  /** @type {Map<string, number>} positions of own messages whose echo is not here yet */
  #ownLatencies = new Map();
  /** @type {"" | "paused" | "reading"} */
  #pauseReason = "";
  #frame = 0;
  #renderAfter = 0;
  #scrollTop = 0; // at the last scroll event or render
  #messageCount = 0;
  #hasTimes = false; // whether the rows show times of positions
  #pausedCount = 0; // messages received since the pause
  #reported = {messages: 0, at: 0, announced: 0, announcedAt: 0};

  constructor() {
    this.#list.addEventListener("scroll", () => this.#onScroll(), {passive: true});
    this.#list.addEventListener("click", (event) => this.#onClick(event));
    this.#list.addEventListener("keydown", (event) => this.#onKeydown(event));
    this.#list.addEventListener("focusin", ({target}) => {
      if (target !== this.#list) this.#pauseForReading();
    });
    this.#list.addEventListener("focusout", ({relatedTarget}) => {
      this.#resumeIfIdle(relatedTarget);
    });
    byId("pause").addEventListener("click", () => {
      this.#setPauseReason(this.#pauseReason ? "" : "paused");
    });
    byId("clear").addEventListener("click", () => this.clear());
    new ResizeObserver(() => this.#scheduleRender()).observe(this.#list);
    setInterval(() => this.#updateCounts(), COUNT_INTERVAL_MS);
    this.#updatePauseButton();
  }

  /** @param {string} position @param {string | ArrayBuffer} data @param {boolean} isReplay */
  addMessage(position, data, isReplay) {
    const size = typeof data === "string" ? data.length : data.byteLength;
    const ms = this.#ownLatencies.get(position);
    this.#ownLatencies.delete(position);
    this.#messageCount += 1;
    this.#append({at: new Date(), position, data, size, ms, noteKind: "", isReplay});
  }

  /** Append a note to the list. @param {string} content @param {string} [kind] */
  addNote(content, kind = "note") {
    const [at, size] = [new Date(), content.length];
    const rest = {position: "", ms: undefined, isReplay: false};
    this.#append({at, data: content, size, noteKind: kind, ...rest});
    if (kind !== "note") setText(byId("announcement"), content);
  }

  /** Mark a message as own. @param {string} position @param {number} ms from send to echo */
  markOwn(position, ms) {
    const isMatch = (/** @type {Entry} */ entry) => entry.position === position;
    const entry =
      this.#pending.entries.findLast(isMatch) ?? this.#visible.entries.findLast(isMatch);
    if (!entry && this.#ownLatencies.size < MAX_MESSAGES) this.#ownLatencies.set(position, ms);
    if (!entry) return;
    entry.ms = ms;
    if (!entry.row) return;
    fillRow(entry.row, entry);
    this.#scheduleRender(); // the row may have grown
  }

  /** Remove all messages. */
  clear() {
    this.#visible.drain();
    this.#pending.drain();
    this.#ownLatencies.clear();
    this.#messageCount = this.#reported.messages = this.#reported.announced = this.#pausedCount = 0;
    this.#list.replaceChildren();
    this.#setPauseReason("");
  }

  /** @param {Entry} entry */
  #append(entry) {
    this.#pending.append(entry);
    if (this.#pauseReason) this.#pausedCount += 1;
    this.#scheduleRender();
  }

  #scheduleRender() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#pauseReason) return;
      const startedAt = performance.now();
      if (startedAt < this.#renderAfter) return this.#scheduleRender();
      const isLast = !this.#pending.entries.length;
      this.#render();
      if (!isLast) this.#scheduleRender(); // a row has its final height once it was in view
      const elapsedMs = performance.now() - startedAt;
      if (elapsedMs > SLOW_RENDER_MS) {
        this.#renderAfter = startedAt + RENDER_PAUSE_FACTOR * elapsedMs;
      }
    });
  }

  #render() {
    const rows = document.createDocumentFragment();
    for (const entry of this.#pending.drain()) {
      for (const old of this.#visible.append(entry)) old.row?.remove();
      entry.row = cloneTemplate("row");
      fillRow(entry.row, entry);
      rows.append(entry.row);
    }
    this.#list.append(rows);
    this.#scrollToEnd();
  }

  #scrollToEnd() {
    this.#list.scrollTop = this.#list.scrollHeight;
    this.#scrollTop = this.#list.scrollTop;
  }

  // Pausing

  /** @param {"" | "paused" | "reading"} pauseReason */
  #setPauseReason(pauseReason) {
    if (pauseReason !== this.#pauseReason) this.#pausedCount = 0;
    this.#pauseReason = pauseReason;
    this.#scheduleRender();
    this.#updatePauseButton();
  }

  #pauseForReading() {
    if (!this.#pauseReason) this.#setPauseReason("reading");
  }

  /** Resume if the user has stopped reading. @param {EventTarget | null} focused */
  #resumeIfIdle(focused) {
    const isIn = focused instanceof Element && focused.closest("#messages li") !== null;
    const isReading = isIn || !this.#isAtEnd() || this.#expandedRow() !== null;
    if (this.#pauseReason === "reading" && !isReading) this.#setPauseReason("");
  }

  #onScroll() {
    const isBack = this.#list.scrollTop < this.#scrollTop; // a growing list does not scroll back
    this.#scrollTop = this.#list.scrollTop;
    if (this.#isAtEnd()) this.#resumeIfIdle(document.activeElement);
    else if (isBack) this.#pauseForReading();
  }

  #isAtEnd() {
    return this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < 24;
  }

  // Expanding a row

  #expandedRow() {
    return this.#list.querySelector(".whole")?.parentElement ?? null;
  }

  /** @param {MouseEvent} event */
  #onClick({target, detail}) {
    const row = target instanceof Element && target.closest(".line")?.parentElement;
    if (!row) return;
    const isOpen = row === this.#expandedRow();
    this.#collapse();
    if (!isOpen) this.#expand(row);
    else if (detail) this.#list.focus({preventScroll: true}); // a pointer needs no focused row
  }

  /** @param {HTMLElement} row */
  #expand(row) {
    const entry = this.#visible.entries.find((each) => each.row === row);
    if (!entry || entry.noteKind) return;
    this.#pauseForReading();
    const detail = cloneTemplate("whole");
    setText(query(detail, "p"), `${formatBytes(sizeOf(entry.data))} · position ${entry.position}`);
    setText(query(detail, "pre"), detailOf(entry.data));
    query(detail, "button").addEventListener("click", () => save(entry));
    row.append(detail);
    query(row, ".line").setAttribute("aria-expanded", "true");
    detail.scrollIntoView({block: "nearest"});
  }

  #collapse() {
    const row = this.#expandedRow();
    if (!row) return;
    if (query(row, ".whole").contains(document.activeElement)) query(row, ".line").focus();
    query(row, ".whole").remove();
    query(row, ".line").setAttribute("aria-expanded", "false");
  }

  /** @param {KeyboardEvent} event */
  #onKeydown(event) {
    const {key, target} = event;
    if (key === "Escape") return this.#onEscape();
    if (!(target instanceof HTMLElement) || target.closest(".whole")) return;
    const row = target.closest("li");
    const rows = this.#list;
    const next = {
      ArrowUp: row ? row.previousElementSibling : rows.lastElementChild,
      ArrowDown: row ? row.nextElementSibling : rows.firstElementChild,
      Home: rows.firstElementChild,
      End: rows.lastElementChild,
    }[key];
    if (!next) return;
    event.preventDefault();
    query(next, ".line").focus();
  }

  /** Collapse the expanded row; without one, move the focus to the list and resume. */
  #onEscape() {
    if (this.#expandedRow()) return this.#collapse();
    this.#list.focus();
    this.#setPauseReason("");
  }

  // Counts and announcements

  #updateCounts() {
    const now = performance.now();
    const newMessages = this.#messageCount - this.#reported.messages;
    const perSecond = (1000 * newMessages) / (now - this.#reported.at);
    Object.assign(this.#reported, {messages: this.#messageCount, at: now});
    setText(byId("count"), this.#countText(perSecond));
    this.#updatePauseButton();
    if (this.#hasTimes !== statsPanel.positionsHaveTime) this.#updateTimes();
    if (now - this.#reported.announcedAt >= ANNOUNCE_INTERVAL_MS) this.#announce(now);
  }

  #updateTimes() {
    this.#hasTimes = statsPanel.positionsHaveTime;
    for (const {row, ...entry} of this.#visible.entries) if (row) fillRow(row, entry);
  }

  #updatePauseButton() {
    const suffix = this.#pausedCount ? ` (${formatCount(this.#pausedCount)} new)` : "";
    setText(byId("pause"), this.#pauseReason ? `Continue${suffix}` : "Pause");
    byId("pause").dataset.on = String(Boolean(this.#pauseReason));
  }

  /** @param {number} perSecond */
  #countText(perSecond) {
    const all = this.#messageCount;
    if (!all) return "no messages yet";
    const shown = all > MAX_MESSAGES ? `, last ${MAX_MESSAGES} kept` : "";
    const rate = perSecond >= 1 ? ` · ${formatCount(perSecond)}/s` : "";
    return `${all.toLocaleString("en")} message${all === 1 ? "" : "s"}${rate}${shown}`;
  }

  /** Announce the new messages to a screen reader, in one sentence. @param {number} now */
  #announce(now) {
    const newCount = this.#messageCount - this.#reported.announced;
    if (!newCount || this.#pauseReason) return;
    Object.assign(this.#reported, {announced: this.#messageCount, announcedAt: now});
    const entries = [...this.#pending.entries, ...this.#visible.entries];
    const last = entries.findLast((entry) => !entry.noteKind);
    const isSingle = newCount === 1 && last;
    const content = isSingle ? preview(last.data).slice(0, 120) : `${newCount} new messages`;
    setText(byId("announcement"), content);
  }
}

/** Fill a row. @param {HTMLElement} row @param {Entry} entry */
function fillRow(row, entry) {
  const isOwn = entry.ms !== undefined;
  row.className = entry.noteKind || (isOwn ? "mine" : "");
  const time = query(row, "time");
  setText(time, timeOf(entry));
  time.title = time.textContent?.startsWith("≤") ? "replayed: published at this time or before" : "";
  setText(query(row, ".kind"), entry.noteKind ? "" : kindOf(entry.data));
  setText(query(row, ".text"), entry.noteKind ? String(entry.data) : preview(entry.data));
  if (entry.noteKind) return query(row, ".line").removeAttribute("aria-expanded");
  const latency = isOwn ? `${formatDuration((entry.ms ?? 0) / 1000)} · ` : "";
  setText(query(row, ".facts"), `${latency}${formatBytes(sizeOf(entry.data))}`);
}

/**
 * Return the time of publication, if the position has it. Otherwise the time of arrival, which of a
 * replayed message is only an upper bound.
 *
 * @param {Entry} entry
 */
function timeOf({at, position, ms, isReplay}) {
  if (position && statsPanel.positionsHaveTime) return clockTime(new Date(parseInt(position, 10)));
  return `${isReplay && ms === undefined ? "≤" : ""}${clockTime(at)}`;
}

/** @param {Date} date */
function clockTime(date) {
  const parts = [date.getHours(), date.getMinutes(), date.getSeconds()];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

/** @param {string | ArrayBuffer} data */
function kindOf(data) {
  if (typeof data !== "string") return "binary";
  return isJson(data) ? "JSON" : "text";
}

/** Return whether the text is a JSON object or array. @param {string} content */
function isJson(content) {
  if (content.length > MAX_JSON_LENGTH || !/^\s*[[{]/.test(content)) return false;
  try {
    JSON.parse(content);
    return true;
  } catch {
    return false;
  }
}

/** @param {string | ArrayBuffer} data */
function preview(data) {
  if (typeof data !== "string") {
    const first = new Uint8Array(data, 0, Math.min(data.byteLength, PREVIEW_BYTES));
    return hexOf(first) + (data.byteLength > PREVIEW_BYTES ? " …" : "");
  }
  return data.length > PREVIEW_LENGTH ? `${data.slice(0, PREVIEW_LENGTH)}…` : data;
}

/** @param {string | ArrayBuffer} data */
function detailOf(data) {
  if (typeof data !== "string") return hexDump(data);
  const content = isJson(data) ? indentJson(data) : data;
  if (content.length <= MAX_DETAIL_LENGTH) return content;
  return `${content.slice(0, MAX_DETAIL_LENGTH)}\n… the rest is in what Save saves`;
}

/**
 * Indent JSON. Its numbers and strings stay unchanged: JSON.parse would round large numbers.
 *
 * @param {string} content valid JSON
 */
function indentJson(content) {
  const tokens = content.match(/"(?:\\.|[^"\\])*"|[[\]{},:]|[^\s"[\]{},:]+/g) ?? [];
  const [opens, closes] = [/^[[{]$/, /^[\]}]$/];
  let [result, depth, before] = ["", 0, ""];
  for (const token of tokens) {
    if (closes.test(token)) depth -= 1;
    const isNewLine = before === "," || opens.test(before) !== closes.test(token);
    if (isNewLine) result += `\n${"  ".repeat(Math.min(depth, MAX_INDENT))}`;
    result += token === ":" ? ": " : token;
    if (opens.test(token)) depth += 1;
    before = token;
  }
  return result;
}

/** @param {ArrayBuffer} data */
function hexDump(data) {
  const lines = [];
  for (let start = 0; start < Math.min(data.byteLength, MAX_DETAIL_BYTES); start += 16) {
    const part = new Uint8Array(data, start, Math.min(16, data.byteLength - start));
    const isPrintable = (/** @type {number} */ byte) => byte > 31 && byte < 127;
    const chars = Array.from(part, (b) => (isPrintable(b) ? String.fromCharCode(b) : "."));
    const offset = start.toString(16).padStart(8, "0");
    lines.push(`${offset}  ${hexOf(part).padEnd(47)}  ${chars.join("")}`);
  }
  if (data.byteLength > MAX_DETAIL_BYTES) lines.push("… the rest is in what Save saves");
  return lines.join("\n");
}

/** @param {Uint8Array} part */
function hexOf(part) {
  return Array.from(part, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
}

/** @param {string | ArrayBuffer} data */
function sizeOf(data) {
  return typeof data === "string" ? encoder.encode(data).byteLength : data.byteLength;
}

/** @param {Entry} entry */
function save({data, position}) {
  const kind = {binary: "bin", JSON: "json", text: "txt"}[kindOf(data)];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data]));
  link.download = `${channel}-${position}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// The connection

/** Close the previous connection, and connect to the channel of the form. */
function connect() {
  closeRelay();
  const since = connectedQuery === formQuery() ? position : undefined;
  position = undefined;
  channel = nameField.value;
  connectedQuery = formQuery();
  updatePageUrl();
  document.title = `${channel} · websocket-relay`;
  const created = new Relay("./", {token: secret.value, maxPendingBytes: 2 * MAX_SEND_BYTES});
  relay = created;
  /** @param {(event: any) => void} act */
  const ifCurrent = (act) => (/** @type {Event} */ event) => created === relay && act(event);
  let lastState = "idle";
  let wasConnected = false;
  let replayUntil = 0;
  created.addEventListener("state", ifCurrent((event) => {
    const {state, transport, code, reason} = event;
    if (state === "open" && lastState !== "open") {
      const how = transport === "stream" ? " by server-sent events: WebSocket blocked" : "";
      list.addNote(`connected ${wasConnected ? "again" : `to ${channel}`}${how}`);
      const isReplay = wasConnected || since !== undefined || historyField.value !== "0";
      replayUntil = isReplay ? performance.now() + REPLAY_MS : 0;
      wasConnected = true;
    } else if (lastState === "open" && state !== "open") {
      list.addNote(`connection lost: ${code} ${reason}`.trim(), "note bad");
    }
    lastState = state;
    showState(event);
  }));
  created.addEventListener("refused", ifCurrent(onRefused));
  const joined = created.channel(channel, {history: Number(historyField.value), since});
  subscription = joined;
  joined.addEventListener("message", ifCurrent(({position, data}) => {
    list.addMessage(position, data, performance.now() < replayUntil);
  }));
  joined.addEventListener("gap", ifCurrent(() => {
    list.addNote("gap: messages may be missing, the relay's history does not reach back", "note bad");
  }));
  joined.addEventListener("refused", ifCurrent((refusal) => {
    lastState = "closed"; // not lost
    created.close();
    onRefused(refusal);
  }));
}

/** Close the connection, and keep its position for a resume. */
function closeRelay() {
  const previous = relay;
  relay = null;
  previous?.close();
  position = subscription?.position ?? position;
  subscription = null;
}

function disconnect() {
  closeRelay();
  list.addNote("disconnected");
  showState({state: "closed"});
}

/** Return the form's channel and history as the query of the page's URL. */
function formQuery() {
  return `?${new URLSearchParams({channel: nameField.value, history: historyField.value})}`;
}

/** Set the page's URL to the channel's query; this removes a token that was put there. */
function updatePageUrl() {
  window.history.replaceState(null, "", `${location.pathname}${connectedQuery}`);
}

/** @param {{state: string, transport?: string | null, reason?: string, retryInMs?: number}} now */
function showState({state, reason = "", retryInMs = 0}) {
  const [content, kind] = {
    connecting: ["connecting", "wait"],
    open: ["connected", "good"],
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

/** @param {{status: number, reason: string}} refusal */
function onRefused({status, reason}) {
  list.addNote(`refused: ${status} ${reason}`, "note bad");
  if (status === 401 || (status === 403 && secret.value)) promptForToken(`${status} ${reason}`);
}

function updateToggle() {
  const isOn = relay !== null && relay.state !== "closed";
  const isOther = formQuery() !== connectedQuery;
  setText(byId("toggle"), isOn ? (isOther ? "Change" : "Disconnect") : "Connect");
}

connectForm.addEventListener("submit", (event) => {
  event.preventDefault();
  const isOn = relay !== null && relay.state !== "closed";
  if (isOn && formQuery() === connectedQuery) return disconnect();
  if (formQuery() !== connectedQuery) list.clear();
  connect();
  if (matchMedia("(pointer: fine)").matches) messageField.focus(); // a phone opens its keyboard
});
connectForm.addEventListener("input", updateToggle);
byId("reconnect").addEventListener("click", () => relay?.open());

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
  if (!relay) return;
  relay.token = secret.value;
  if (relay.state === "closed") connect();
  else relay.renewToken().catch(() => {}); // a failure shows when the previous token expires
});
tokenDialog.addEventListener("close", () => (tokenField.value = ""));
byId("token-cancel").addEventListener("click", () => tokenDialog.close());
byId("key").addEventListener("click", () => promptForToken(""));
query(byId("stats-unavailable"), "button").addEventListener("click", () => promptForToken(""));

// Sending

/** @param {string | ArrayBuffer} data @param {string} what the start of a note about a failure */
function send(data, what) {
  const sentAt = performance.now();
  subscription?.publish(data).then(
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
  if (!messageField.value || !relay || relay.state === "closed") return;
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
    const canSend = relay !== null && relay.state !== "closed";
    target.classList.toggle("dropping", type === "dragover" && isOver && canSend);
    if (type === "drop" && isOver && canSend) sendFiles(dataTransfer.files);
  });
}

/** @param {string} id @returns {HTMLInputElement} or another form control */
function input(id) {
  return /** @type {HTMLInputElement} */ (byId(id));
}

/**
 * @typedef {object} Entry a message or a note
 * @property {Date} at time of arrival
 * @property {string} position
 * @property {string | ArrayBuffer} data
 * @property {number} size approximate, in bytes
 * @property {number | undefined} ms latency of an own message, from send to echo
 * @property {boolean} isReplay the message may have been published before it arrived
 * @property {string} noteKind "" for a message; otherwise the CSS classes of the note
 * @property {HTMLElement} [row]
 */

const pageQuery = new URLSearchParams(location.search);
const list = new MessageList();
const statsPanel = new StatsPanel(() => secret.value);
nameField.value = pageQuery.get("channel") ?? nameField.value;
historyField.value = pageQuery.get("history") ?? "";
historyField.value ||= "20"; // a select rejects other values than its options
if (pageQuery.has("channel") && nameField.checkValidity()) connect();
else updatePageUrl();
