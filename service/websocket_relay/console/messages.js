// @ts-check
/** The list of messages: rendering, pausing, searching, and what can be done with a message. */

import {
  byId,
  clockTime,
  cloneTemplate,
  copyText,
  formatBytes,
  formatCount,
  formatDuration,
  formatNumber,
  input,
  query,
  saveFile,
  setText,
} from "./dom.js";
import {
  curlOf,
  detailOf,
  fileNameOf,
  finderOf,
  kindOf,
  ndjsonOf,
  preview,
  sizeOf,
} from "./payloads.js";

const MAX_MESSAGES = 500; // in the list, and as many pending while it is paused
const MAX_BYTES = 32 * 1024 * 1024; // of each of the two
const SLOW_RENDER_MS = 8; // after a slower render of the list,
const RENDER_PAUSE_FACTOR = 4; // the next one waits this multiple of its duration
const COUNT_INTERVAL_MS = 500; // interval between updates of the counts
const ANNOUNCE_INTERVAL_MS = 3_000; // minimum between screen reader announcements
const COPIED_MS = 2_000; // how long a button shows that it has copied

/** The newest entries, limited by count and bytes; the last one is always kept. */
class BoundedLog {
  /** @type {Entry[]} */
  entries = [];
  #bytes = 0;

  /** @param {Entry} entry @returns {Entry[]} the evicted entries: first those that are not shown */
  append(entry) {
    const evicted = [];
    this.entries.push(entry);
    this.#bytes += entry.size;
    while (this.entries.length > (this.#bytes > MAX_BYTES ? 1 : MAX_MESSAGES)) {
      const hidden = this.entries.findIndex((each) => !each.isShown);
      const [oldest] = this.entries.splice(Math.max(0, hidden), 1);
      this.#bytes -= oldest.size;
      evicted.push(oldest);
    }
    return evicted;
  }

  /** @param {(entry: Entry) => boolean} isKept @returns {Entry[]} all others, which are removed */
  removeUnless(isKept) {
    const removed = this.entries.filter((entry) => !isKept(entry));
    this.entries = this.entries.filter(isKept);
    for (const {size} of removed) this.#bytes -= size;
    return removed;
  }
}

/**
 * The list of messages. New messages are rendered together, once per frame, which stays smooth at
 * any rate. The list is paused while the user reads: after scrolling back or expanding a row. What
 * a search has not found is evicted first.
 */
export class MessageList {
  #hasToken;
  #list = byId("messages");
  #visible = new BoundedLog();
  #pending = new BoundedLog();
  /** @type {Map<string, number>} positions of own messages whose echo is not here yet */
  #ownLatencies = new Map();
  /** @type {(entry: Entry) => boolean} */
  #isFound = () => true;
  /** @type {"" | "paused" | "reading"} */
  #pauseReason = "";
  #frame = 0;
  #renderAfter = 0;
  #scrollTop = 0; // at the last scroll event or render
  #messageCount = 0;
  #positionsHaveTime = false;
  #pausedCount = 0; // messages received since the pause
  #reported = {messages: 0, at: 0, perSecond: 0, announced: 0, announcedAt: 0};

  /** @param {() => boolean} hasToken whether the relay is used with a token */
  constructor(hasToken) {
    this.#hasToken = hasToken;
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
    byId("export").addEventListener("click", () => this.#export());
    byId("search").addEventListener("submit", (event) => event.preventDefault());
    byId("search").addEventListener("input", () => this.#search());
    new ResizeObserver(() => this.#scheduleRender()).observe(this.#list);
    setInterval(() => this.#updateCounts(), COUNT_INTERVAL_MS);
    this.#search();
  }

  /** @param {PositionedPayload} message @param {boolean} isReplay */
  addMessage({channel, position, data}, isReplay) {
    const size = typeof data === "string" ? data.length : data.byteLength;
    const ms = this.#ownLatencies.get(position);
    this.#ownLatencies.delete(position);
    this.#messageCount += 1;
    this.#append({at: new Date(), channel, position, data, size, ms, noteKind: "", isReplay});
  }

  /** Append a note to the list. @param {string} content @param {string} [kind] */
  addNote(content, kind = "note") {
    const [at, size] = [new Date(), content.length];
    const rest = {channel: "", position: "", ms: undefined, isReplay: false};
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
    entry.isShown = this.#isFound(entry);
    if (entry.row) this.#fillRow(entry.row, entry);
    this.#scheduleRender(); // the row may have grown
  }

  /** Show which messages are of which channel, if there are several. @param {string[]} channels */
  setChannels(channels) {
    const choice = input("of");
    const chosen = choice.value;
    const options = channels.map((each) => new Option(each));
    choice.replaceChildren(new Option("all channels", ""), ...options);
    choice.value = channels.includes(chosen) ? chosen : "";
    choice.hidden = channels.length < 2;
    this.#list.dataset.several = String(channels.length > 1);
    this.#search();
  }

  /** Remove the messages of all channels but these. @param {string[]} channels */
  keep(channels) {
    this.#removeUnless(({channel, noteKind}) => Boolean(noteKind) || channels.includes(channel));
  }

  /** Remove all messages. */
  clear() {
    this.#removeUnless(() => false);
    this.#ownLatencies.clear();
    this.#messageCount = this.#reported.messages = this.#reported.announced = this.#pausedCount = 0;
    this.#setPauseReason("");
  }

  /** Show times of publication, which only some positions have. @param {boolean} isKnown */
  showPositionsAsTime(isKnown) {
    if (this.#positionsHaveTime === isKnown) return;
    this.#positionsHaveTime = isKnown;
    for (const {row, ...entry} of this.#visible.entries) if (row) this.#fillRow(row, entry);
  }

  /** @param {Omit<Entry, "isShown">} unseen */
  #append(unseen) {
    const entry = {...unseen, isShown: this.#isFound({...unseen, isShown: true})};
    this.#pending.append(entry);
    if (this.#pauseReason) this.#pausedCount += 1;
    this.#scheduleRender();
  }

  /** @param {(entry: Entry) => boolean} isKept */
  #removeUnless(isKept) {
    this.#pending.removeUnless(isKept);
    for (const {row} of this.#visible.removeUnless(isKept)) row?.remove();
    this.#showEmpty();
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
    for (const entry of this.#pending.removeUnless(() => false)) {
      entry.row = cloneTemplate("row");
      this.#fillRow(entry.row, entry);
      rows.append(entry.row);
      for (const old of this.#visible.append(entry)) old.row?.remove();
    }
    this.#list.append(rows);
    this.#showEmpty();
    this.#scrollToEnd();
  }

  #showEmpty() {
    const isEmpty = !this.#visible.entries.some(({isShown}) => isShown);
    byId("empty").hidden = !isEmpty;
    const isSearch = isEmpty && this.#visible.entries.length > 0;
    setText(byId("empty"), isSearch ? "No message matches." : "Messages appear here.");
  }

  #scrollToEnd() {
    this.#list.scrollTop = this.#list.scrollHeight;
    this.#scrollTop = this.#list.scrollTop;
  }

  /** Fill a row. @param {HTMLElement} row @param {Omit<Entry, "row">} entry */
  #fillRow(row, entry) {
    const {noteKind, data, channel, ms} = entry;
    const isOwn = ms !== undefined;
    row.className = noteKind || (isOwn ? "mine" : "");
    row.hidden = !entry.isShown;
    const time = query(row, "time");
    setText(time, this.#timeOf(entry));
    const isBound = time.textContent?.startsWith("≤");
    time.title = isBound ? "replayed: published at this time or before" : "";
    setText(query(row, ".kind"), noteKind ? "" : kindOf(data));
    setText(query(row, ".of"), channel);
    query(row, ".of").title = channel;
    setText(query(row, ".text"), noteKind ? String(data) : preview(data));
    if (noteKind) return query(row, ".line").removeAttribute("aria-expanded");
    const latency = isOwn ? `${formatDuration(ms / 1000)} · ` : "";
    setText(query(row, ".facts"), `${latency}${formatBytes(sizeOf(data))}`);
  }

  /**
   * Return the time of publication, if the position has it. Otherwise the time of arrival, which of
   * a replayed message is only an upper bound.
   *
   * @param {Omit<Entry, "row">} entry
   */
  #timeOf({at, position, ms, isReplay}) {
    if (position && this.#positionsHaveTime) return clockTime(new Date(parseInt(position, 10)));
    return `${isReplay && ms === undefined ? "≤" : ""}${clockTime(at)}`;
  }

  // Searching

  /** Show what the form asks for: notes only if it asks for all, unless they report trouble. */
  #search() {
    const [sought, kind, of] = ["find", "kind", "of"].map((id) => input(id).value);
    const contains = finderOf(sought);
    const isAll = !sought && !kind && !of;
    this.#isFound = ({noteKind, data, channel, ms}) => {
      if (noteKind) return isAll || noteKind !== "note";
      const isKind = !kind || (kind === "mine" ? ms !== undefined : kindOf(data) === kind);
      return isKind && (!of || channel === of) && contains(data);
    };
    for (const entry of [...this.#visible.entries, ...this.#pending.entries]) {
      entry.isShown = this.#isFound(entry);
      if (entry.row) entry.row.hidden = !entry.isShown;
    }
    this.#showEmpty();
    this.#updateCounts();
    if (!this.#pauseReason) this.#scrollToEnd();
  }

  get #shownMessages() {
    const entries = [...this.#visible.entries, ...this.#pending.entries];
    return entries.filter(({isShown, noteKind}) => isShown && !noteKind);
  }

  #export() {
    const lines = ndjsonOf(this.#shownMessages);
    const time = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
    saveFile(new Blob(lines, {type: "application/x-ndjson"}), `messages-${time}.ndjson`);
  }

  // Pausing

  /** @param {"" | "paused" | "reading"} pauseReason */
  #setPauseReason(pauseReason) {
    if (pauseReason !== this.#pauseReason) this.#pausedCount = 0;
    this.#pauseReason = pauseReason;
    this.#scheduleRender();
    this.#updateCounts();
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
    query(detail, ".save").addEventListener("click", () => {
      saveFile(new Blob([entry.data]), fileNameOf(entry));
    });
    const copy = query(detail, ".copy");
    copy.addEventListener("click", async () => {
      const base = new URL("./", location.href).href;
      const isCopied = await copyText(curlOf(entry, base, this.#hasToken()));
      setText(copy, isCopied ? "Copied" : "Not copied: the browser refuses");
      setTimeout(() => setText(copy, "Copy as curl"), COPIED_MS);
    });
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
    const rows = [...this.#list.children].filter((each) => !(/** @type {any} */ (each).hidden));
    const row = target.closest("li");
    const at = row ? rows.indexOf(row) : rows.length;
    const next = {
      ArrowUp: rows[at - 1],
      ArrowDown: row ? rows[at + 1] : rows[0],
      Home: rows[0],
      End: rows[rows.length - 1],
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
    if (now - this.#reported.at >= COUNT_INTERVAL_MS) {
      const newMessages = this.#messageCount - this.#reported.messages;
      const perSecond = (1000 * newMessages) / (now - this.#reported.at);
      Object.assign(this.#reported, {messages: this.#messageCount, at: now, perSecond});
      if (now - this.#reported.announcedAt >= ANNOUNCE_INTERVAL_MS) this.#announce(now);
    }
    setText(byId("count"), this.#countText());
    const suffix = this.#pausedCount ? ` (${formatCount(this.#pausedCount)} new)` : "";
    setText(byId("pause"), this.#pauseReason ? `Continue${suffix}` : "Pause");
    byId("pause").dataset.on = String(Boolean(this.#pauseReason));
  }

  #countText() {
    const {perSecond} = this.#reported;
    const all = this.#messageCount;
    if (!all) return "no messages yet";
    const rate = perSecond >= 1 ? ` · ${formatCount(perSecond)}/s` : "";
    const kept = all > MAX_MESSAGES ? `, last ${MAX_MESSAGES} kept` : "";
    const isSearch = ["find", "kind", "of"].some((id) => input(id).value);
    const shown = isSearch ? `, ${this.#shownMessages.length.toLocaleString("en")} match` : kept;
    return `${formatNumber(all, "message")}${rate}${shown}`;
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

/**
 * @typedef {import("./payloads.js").Payload} Payload
 * @typedef {import("./payloads.js").PositionedPayload} PositionedPayload
 *
 * @typedef {object} Entry a message or a note
 * @property {Date} at time of arrival
 * @property {string} channel "" for a note
 * @property {string} position
 * @property {Payload} data
 * @property {number} size approximate, in bytes
 * @property {number | undefined} ms latency of an own message, from send to echo
 * @property {boolean} isReplay the message may have been published before it arrived
 * @property {string} noteKind "" for a message; otherwise the CSS classes of the note
 * @property {boolean} isShown the search has found it
 * @property {HTMLElement} [row]
 */
