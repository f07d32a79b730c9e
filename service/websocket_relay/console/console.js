// @ts-check
/**
 * The console: connect to a channel, send to it, see what it relays.
 *
 * The connection is relay.js's, the figures are figures.js's. A token is kept in a variable here and
 * nowhere else.
 */

import {at, bytes, count, duration, Figures, find, stamp, text} from "./figures.js";
import {Relay} from "./relay.js";

const KEPT = 500; // messages: shown, and as many that wait while the list is paused
const KEPT_BYTES = 32 * 1024 * 1024; // of either
const LARGEST_BYTES = 64 * 1024 * 1024; // of what is sent, whatever the relay takes
const PREVIEW = 500; // characters in a row
const FIRST_BYTES = 16; // of a binary message in a row
const WHOLE = 200_000; // characters of an opened message
const WHOLE_BYTES = 4_096; // of an opened binary message
const JSON_LENGTH = 100_000; // characters; what is longer is text
const DEEPEST = 32; // indentation
const LONG_MS = 8; // a list that takes longer to show
const RESTS = 4; // is not shown again for so many times as long
const TELL_MS = 500; // how often numbers change
const ANNOUNCE_MS = 3_000; // how often a screen reader is told

const encoder = new TextEncoder();
const hidden = {value: ""}; // the token
const [form, compose] = [at("connect"), at("compose")];
const [nameField, historyField] = [input("name"), input("history")];
const [message, file, tokenField] = [input("message"), input("file"), input("token")];
const ask = /** @type {HTMLDialogElement} */ (at("ask"));

/** @type {Relay | null} */
let relay = null;
let channel = "";
/** @type {string | undefined} the last message's, of the connection there was */
let position;
let joined = ""; // the channel and how much of its history, as they stand in the page's address

// Messages

/** The newest of what was added: so many, and so many bytes, but always the last one. */
class Newest {
  /** @type {Entry[]} */
  entries = [];
  #bytes = 0;

  /** @param {Entry} entry @returns {Entry[]} what had to go for it */
  add(entry) {
    this.entries.push(entry);
    this.#bytes += entry.size;
    let gone = 0;
    while (this.entries.length - gone > (this.#bytes > KEPT_BYTES ? 1 : KEPT)) {
      this.#bytes -= this.entries[gone].size;
      gone += 1;
    }
    return this.entries.splice(0, gone);
  }

  /** @returns {Entry[]} all of them, which are no longer kept */
  take() {
    this.#bytes = 0;
    return this.entries.splice(0);
  }
}

/**
 * The list of messages. What comes is shown once per frame, all at once, so that it stays smooth at
 * any rate. While its reader reads, by scrolling back or opening a row, it waits as if paused.
 */
class List {
  #list = at("messages");
  #shown = new Newest();
  #waiting = new Newest();
  /** @type {Map<string, number>} positions of one's own messages that are not here yet */
  #own = new Map();
  /** @type {"" | "paused" | "reading"} */
  #hold = "";
  #frame = 0;
  #restUntil = 0;
  #top = 0; // where it is scrolled to
  #messages = 0;
  #held = 0; // since the list waits
  #told = {messages: 0, at: 0, announced: 0, announcedAt: 0};

  constructor() {
    this.#list.addEventListener("scroll", () => this.#scrolled(), {passive: true});
    this.#list.addEventListener("click", (event) => this.#clicked(event));
    this.#list.addEventListener("keydown", (event) => this.#pressed(event));
    this.#list.addEventListener("focusin", ({target}) => {
      if (target !== this.#list) this.#read();
    });
    this.#list.addEventListener("focusout", ({relatedTarget}) => this.#goOn(relatedTarget));
    at("pause").addEventListener("click", () => this.#become(this.#hold ? "" : "paused"));
    at("clear").addEventListener("click", () => this.clear());
    new ResizeObserver(() => this.#showSoon()).observe(this.#list);
    setInterval(() => this.#tell(), TELL_MS);
    this.#label();
  }

  /** @param {string} position @param {string | ArrayBuffer} data */
  add(position, data) {
    const size = typeof data === "string" ? data.length : data.byteLength;
    const ms = this.#own.get(position);
    this.#own.delete(position);
    this.#messages += 1;
    this.#put({at: new Date(), position, data, size, ms, note: ""});
  }

  /** Put a line among the messages that is none. @param {string} words @param {string} [kind] */
  note(words, kind = "note") {
    this.#put({at: new Date(), position: "", data: words, size: words.length, ms: undefined, note: kind});
    if (kind !== "note") text(at("heard"), words);
  }

  /** Mark a message as one's own. @param {string} position @param {number} ms until it was back */
  mark(position, ms) {
    const is = (/** @type {Entry} */ entry) => entry.position === position;
    const entry = this.#waiting.entries.findLast(is) ?? this.#shown.entries.findLast(is);
    if (!entry && this.#own.size < KEPT) this.#own.set(position, ms);
    if (!entry) return;
    entry.ms = ms;
    if (!entry.row) return;
    dress(entry.row, entry);
    this.#showSoon(); // it may have grown
  }

  /** Forget all messages. */
  clear() {
    this.#shown.take();
    this.#waiting.take();
    this.#own.clear();
    this.#messages = this.#told.messages = this.#told.announced = this.#held = 0;
    this.#list.replaceChildren();
    this.#become("");
  }

  /** @param {Entry} entry */
  #put(entry) {
    this.#waiting.add(entry);
    if (this.#hold) this.#held += 1;
    this.#showSoon();
  }

  #showSoon() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#hold) return;
      const begunAt = performance.now();
      if (begunAt < this.#restUntil) return this.#showSoon();
      const isLast = !this.#waiting.entries.length;
      this.#show();
      if (!isLast) this.#showSoon(); // rows are as high as they are once they were in view
      const tookMs = performance.now() - begunAt;
      if (tookMs > LONG_MS) this.#restUntil = begunAt + RESTS * tookMs;
    });
  }

  #show() {
    const rows = document.createDocumentFragment();
    for (const entry of this.#waiting.take()) {
      for (const old of this.#shown.add(entry)) old.row?.remove();
      entry.row = stamp("row");
      dress(entry.row, entry);
      rows.append(entry.row);
    }
    this.#list.append(rows);
    this.#scrollToEnd();
  }

  #scrollToEnd() {
    this.#list.scrollTop = this.#list.scrollHeight;
    this.#top = this.#list.scrollTop;
  }

  // Waiting for its reader

  /** @param {"" | "paused" | "reading"} hold */
  #become(hold) {
    if (hold !== this.#hold) this.#held = 0;
    this.#hold = hold;
    this.#showSoon();
    this.#label();
  }

  #read() {
    if (!this.#hold) this.#become("reading");
  }

  /** Go on, where nothing is being read any more. @param {EventTarget | null} focused */
  #goOn(focused) {
    const isIn = focused instanceof Element && focused.closest("#messages li") !== null;
    if (this.#hold === "reading" && this.#isAtEnd() && !this.#opened() && !isIn) this.#become("");
  }

  #scrolled() {
    const isBack = this.#list.scrollTop < this.#top; // and not the list that grew
    this.#top = this.#list.scrollTop;
    if (this.#isAtEnd()) this.#goOn(document.activeElement);
    else if (isBack) this.#read();
  }

  #isAtEnd() {
    return this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < 24;
  }

  // Opening one

  #opened() {
    return this.#list.querySelector(".whole")?.parentElement ?? null;
  }

  /** @param {MouseEvent} event */
  #clicked({target, detail}) {
    const row = target instanceof Element && target.closest(".line")?.parentElement;
    if (!row) return;
    const isOpen = row === this.#opened();
    this.#close();
    if (!isOpen) this.#open(row);
    else if (detail) this.#list.focus({preventScroll: true}); // by a pointer, which needs no place
  }

  /** @param {HTMLElement} row */
  #open(row) {
    const entry = this.#shown.entries.find((each) => each.row === row);
    if (!entry || entry.note) return;
    this.#read();
    const whole = stamp("whole");
    text(find(whole, "p"), `${bytes(sizeOf(entry.data))} · position ${entry.position}`);
    text(find(whole, "pre"), wholeOf(entry.data));
    find(whole, "button").addEventListener("click", () => save(entry));
    row.append(whole);
    find(row, ".line").setAttribute("aria-expanded", "true");
    whole.scrollIntoView({block: "nearest"});
  }

  #close() {
    const row = this.#opened();
    if (!row) return;
    if (find(row, ".whole").contains(document.activeElement)) find(row, ".line").focus();
    find(row, ".whole").remove();
    find(row, ".line").setAttribute("aria-expanded", "false");
  }

  /** @param {KeyboardEvent} event */
  #pressed(event) {
    const {key, target} = event;
    if (key === "Escape") return this.#escape();
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
    find(next, ".line").focus();
  }

  /** Close what is open, or else leave the rows and go on. */
  #escape() {
    if (this.#opened()) return this.#close();
    this.#list.focus();
    this.#become("");
  }

  // Saying how much there is

  #tell() {
    const now = performance.now();
    const perSecond = (1000 * (this.#messages - this.#told.messages)) / (now - this.#told.at);
    Object.assign(this.#told, {messages: this.#messages, at: now});
    text(at("count"), this.#words(perSecond));
    this.#label();
    if (now - this.#told.announcedAt >= ANNOUNCE_MS) this.#announce(now);
  }

  #label() {
    const held = this.#held ? ` (${count(this.#held)} new)` : "";
    text(at("pause"), this.#hold ? `Continue${held}` : "Pause");
    at("pause").dataset.on = String(Boolean(this.#hold));
  }

  /** @param {number} perSecond */
  #words(perSecond) {
    const all = this.#messages;
    if (!all) return "no messages yet";
    const shown = all > KEPT ? `, the last ${KEPT} are kept` : "";
    const rate = perSecond >= 1 ? ` · ${count(perSecond)}/s` : "";
    return `${all.toLocaleString("en")} message${all === 1 ? "" : "s"}${rate}${shown}`;
  }

  /** Tell a screen reader, in one sentence for all that came meanwhile. @param {number} now */
  #announce(now) {
    const fresh = this.#messages - this.#told.announced;
    if (!fresh || this.#hold) return;
    Object.assign(this.#told, {announced: this.#messages, announcedAt: now});
    const last = [...this.#waiting.entries, ...this.#shown.entries].findLast((entry) => !entry.note);
    const words = fresh === 1 && last ? preview(last.data).slice(0, 120) : `${fresh} new messages`;
    text(at("heard"), words);
  }
}

/** Fill a row. @param {HTMLElement} row @param {Entry} entry */
function dress(row, entry) {
  const isOwn = entry.ms !== undefined;
  row.className = entry.note || (isOwn ? "mine" : "");
  const time = find(row, "time");
  text(time, clock(entry.at));
  text(find(row, ".kind"), entry.note ? "" : kindOf(entry.data));
  text(find(row, ".text"), entry.note ? String(entry.data) : preview(entry.data));
  if (entry.note) return find(row, ".line").removeAttribute("aria-expanded");
  const back = isOwn ? `${duration((entry.ms ?? 0) / 1000)} · ` : "";
  text(find(row, ".facts"), `${back}${bytes(sizeOf(entry.data))}`);
}

/** @param {Date} date */
function clock(date) {
  const parts = [date.getHours(), date.getMinutes(), date.getSeconds()];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

/** @param {string | ArrayBuffer} data */
function kindOf(data) {
  if (typeof data !== "string") return "binary";
  return isJson(data) ? "JSON" : "text";
}

/** Whether it is an object or an array. @param {string} words */
function isJson(words) {
  if (words.length > JSON_LENGTH || !/^\s*[[{]/.test(words)) return false;
  try {
    JSON.parse(words);
    return true;
  } catch {
    return false;
  }
}

/** @param {string | ArrayBuffer} data */
function preview(data) {
  if (typeof data !== "string") {
    const first = new Uint8Array(data, 0, Math.min(data.byteLength, FIRST_BYTES));
    return hexOf(first) + (data.byteLength > FIRST_BYTES ? " …" : "");
  }
  return data.length > PREVIEW ? `${data.slice(0, PREVIEW)}…` : data;
}

/** @param {string | ArrayBuffer} data */
function wholeOf(data) {
  if (typeof data !== "string") return dump(data);
  const words = isJson(data) ? indented(data) : data;
  return words.length > WHOLE ? `${words.slice(0, WHOLE)}\n… the rest is in what Save saves` : words;
}

/**
 * Indent JSON. Its numbers and strings stay as they came: a parser would round large numbers.
 *
 * @param {string} words that are JSON
 */
function indented(words) {
  const tokens = words.match(/"(?:\\.|[^"\\])*"|[[\]{},:]|[^\s"[\]{},:]+/g) ?? [];
  const [opens, closes] = [/^[[{]$/, /^[\]}]$/];
  let [result, depth, before] = ["", 0, ""];
  for (const token of tokens) {
    if (closes.test(token)) depth -= 1;
    const isNewLine = before === "," || opens.test(before) !== closes.test(token);
    if (isNewLine) result += `\n${"  ".repeat(Math.min(depth, DEEPEST))}`;
    result += token === ":" ? ": " : token;
    if (opens.test(token)) depth += 1;
    before = token;
  }
  return result;
}

/** @param {ArrayBuffer} data */
function dump(data) {
  const lines = [];
  for (let start = 0; start < Math.min(data.byteLength, WHOLE_BYTES); start += 16) {
    const part = new Uint8Array(data, start, Math.min(16, data.byteLength - start));
    const printed = Array.from(part, (byte) => (byte > 31 && byte < 127 ? String.fromCharCode(byte) : "."));
    lines.push(`${start.toString(16).padStart(8, "0")}  ${hexOf(part).padEnd(47)}  ${printed.join("")}`);
  }
  if (data.byteLength > WHOLE_BYTES) lines.push("… the rest is in what Save saves");
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

/** Connect to the channel that the form names, and to no other any more. */
function connect() {
  leave();
  const since = joined === wanted() ? position : undefined;
  position = undefined;
  channel = nameField.value;
  joined = wanted();
  remember();
  document.title = `${channel} · websocket-relay`;
  const [last, maxWaitingBytes] = [Number(historyField.value), 2 * LARGEST_BYTES];
  const own = new Relay("./", {channel, token: hidden.value, history: last, since, maxWaitingBytes});
  relay = own;
  /** @param {(event: any) => void} act */
  const ours = (act) => (/** @type {Event} */ event) => own === relay && act(event);
  let before = false;
  own.addEventListener("message", ours(({position, data}) => list.add(position, data)));
  own.addEventListener("state", ours(showState));
  own.addEventListener("gap", ours(() => {
    list.note("something was missed: the relay holds it no longer", "note bad");
  }));
  own.addEventListener("refused", ours(refused));
  own.addEventListener("close", ours(({code, reason}) => {
    list.note(`connection lost: ${code} ${reason}`.trim(), "note bad");
  }));
  own.addEventListener("open", ours(({transport}) => {
    const how = transport === "stream" ? ", by server-sent events: no WebSocket gets through" : "";
    list.note(`connected ${before ? "again" : `to ${channel}`}${how}`);
    before = true;
  }));
  showState({state: own.state});
}

/** Let go of the connection, and know where to go on. */
function leave() {
  const was = relay;
  relay = null;
  was?.close();
  position = was?.position ?? position;
}

function disconnect() {
  leave();
  list.note("disconnected");
  showState({state: "closed"});
}

/** What the form says, as it stands in the page's address. */
function wanted() {
  return `?${new URLSearchParams({channel: nameField.value, history: historyField.value})}`;
}

/** Have the page's address name the channel, and nothing else: no token that somebody put there. */
function remember() {
  window.history.replaceState(null, "", `${location.pathname}${joined}`);
}

/** @param {{state: string, transport?: string | null, reason?: string, retryInMs?: number}} now */
function showState({state, reason = "", retryInMs = 0}) {
  const [words, kind] = {
    connecting: ["connecting", "wait"],
    open: ["connected", "good"],
    waiting: ["reconnecting", "wait"],
    closed: ["not connected", "off"],
  }[state] ?? [state, "off"];
  text(at("state"), words);
  at("state").dataset.kind = kind;
  at("state").title = state === "waiting" ? `${reason}; again in ${duration(retryInMs / 1000)}` : "";
  const isClosed = state === "closed";
  for (const id of ["message", "attach", "send"]) input(id).disabled = isClosed;
  showToggle();
}

/** @param {{status: number, reason: string}} refusal */
function refused({status, reason}) {
  list.note(`refused: ${status} ${reason}`, "note bad");
  if (status === 401 || (status === 403 && hidden.value)) askForToken(`${status} ${reason}`);
}

function showToggle() {
  const isOn = relay !== null && relay.state !== "closed";
  const isOther = wanted() !== joined;
  text(at("toggle"), isOn ? (isOther ? "Change" : "Disconnect") : "Connect");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const isOn = relay !== null && relay.state !== "closed";
  if (isOn && wanted() === joined) return disconnect();
  if (wanted() !== joined) list.clear();
  connect();
  if (matchMedia("(pointer: fine)").matches) message.focus(); // a phone would open its keyboard
});
form.addEventListener("input", showToggle);

// The token

/** @param {string} why what the relay said; "": the user wants to give one */
function askForToken(why) {
  text(at("ask-why"), why && `The relay says: ${why}`);
  at("ask-why").hidden = !why;
  tokenField.value = "";
  if (!ask.open) ask.showModal();
  tokenField.focus();
}

at("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  hidden.value = tokenField.value.trim();
  ask.close();
  figures.again();
  if (!relay) return;
  relay.token = hidden.value;
  if (relay.state === "closed") connect();
});
ask.addEventListener("close", () => (tokenField.value = ""));
at("ask-cancel").addEventListener("click", () => ask.close());
at("key").addEventListener("click", () => askForToken(""));
find(at("no-figures"), "button").addEventListener("click", () => askForToken(""));

// Sending

/** @param {string | ArrayBuffer} data @param {string} what it is, for a line that says it failed */
function send(data, what) {
  const sentAt = performance.now();
  const failed = (/** @type {Error} */ error) => list.note(`${what}: ${error.message}`, "note bad");
  try {
    relay?.send(data).then((position) => list.mark(position, performance.now() - sentAt), failed);
    if (relay?.offline) list.note(`${relay.offline} to be sent when there is a connection`);
  } catch (error) {
    failed(/** @type {Error} */ (error));
  }
}

/** Say so where something is larger than the relay takes. @param {number} size @param {string} what */
function isTooLarge(size, what) {
  const most = Math.min(figures.maxMessageBytes, LARGEST_BYTES);
  if (size <= most) return false;
  const [is, may] = [size, most].map((each) => each.toLocaleString("en"));
  list.note(`${what}: too large, ${is} bytes; the relay takes ${may} at most`, "note bad");
  return true;
}

/** @param {FileList | null | undefined} files */
async function sendFiles(files) {
  for (const each of files ?? []) {
    if (isTooLarge(each.size, each.name)) continue;
    try {
      send(await each.arrayBuffer(), each.name);
    } catch {
      list.note(`${each.name}: not readable`, "note bad"); // a folder, say
    }
  }
}

compose.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!message.value || !relay || relay.state === "closed") return;
  if (isTooLarge(sizeOf(message.value), "not sent")) return;
  send(message.value, "not known to be relayed");
  message.value = "";
  message.focus();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  /** @type {HTMLFormElement} */ (compose).requestSubmit();
});
message.addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  sendFiles(event.clipboardData.files);
});
at("attach").addEventListener("click", () => file.click());
file.addEventListener("change", async () => {
  await sendFiles(file.files);
  file.value = "";
});

// A file that is dropped beside the channel would otherwise be opened in place of the page.
const target = find(document.body, ".channel");
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

/** @param {string} id @returns {HTMLInputElement} or a field of another kind */
function input(id) {
  return /** @type {HTMLInputElement} */ (at(id));
}

/**
 * @typedef {object} Entry a message, or a note among them
 * @property {Date} at when it came
 * @property {string} position
 * @property {string | ArrayBuffer} data
 * @property {number} size roughly
 * @property {number | undefined} ms how long one's own was under way
 * @property {string} note "" for a message, or the note's kind
 * @property {HTMLElement} [row]
 */

const asked = new URLSearchParams(location.search);
const list = new List();
const figures = new Figures(() => hidden.value);
nameField.value = asked.get("channel") ?? nameField.value;
historyField.value = asked.get("history") ?? "";
historyField.value ||= "20"; // it takes only what it offers
if (asked.has("channel") && nameField.checkValidity()) connect();
else remember();
