// @ts-check
/**
 * The relay's client for browsers: connects, returns, misses nothing, sends nothing twice.
 *
 *     import {Relay} from "https://relay.example/relay.js";
 *
 *     const relay = new Relay("wss://relay.example/channels/news");
 *     relay.addEventListener("message", ({data}) => console.log(data));
 *     relay.send("hello, everybody");
 *
 * It speaks WebSocket with the subprotocol relay.v1, so that it knows each message's position and
 * resumes behind the last one it heard. Where WebSockets are blocked it listens to server-sent
 * events and publishes by POST. One file, nothing else is loaded; types are in relay.d.ts. It runs
 * in browsers since the end of 2021, and in their workers.
 */

const SUBPROTOCOL = "relay.v1";
const TOKEN = /^[\w.-]+$/; // what can be a subprotocol, and is a JSON Web Token

// Twice as long each time, and by chance, so that not all come back in the same instant.
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 30_000;
const LONGEST_TOLD_MS = 300_000; // of what the relay, or a proxy, may ask for
const STEADY_MS = 5_000; // a connection that lasted so long was a good one

const CONNECT_MS = 10_000; // until the relay's welcome
const SETTLE_MS = 2_000; // after a return, until what has not come back counts as not relayed

const BLOCKED_AFTER = 2; // times in a row that a stream worked and a WebSocket did not
const PROBE_EVERY = 4; // failures
const UPGRADE_MS = [60_000, 600_000]; // on a stream, until a WebSocket is tried: first, and most

const LOOK_MS = 5_000; // how often the clock is looked at
const ASLEEP_MS = 15_000; // a jump of it by so much is a sleep
const ASLEEP_HIDDEN_MS = 75_000; // timers of hidden pages run once a minute
const WAKE_MS = 2_000; // after a sleep, until a connection that is silent is replaced

const MAX_OFFLINE = 1_000; // messages
const MAX_WAITING_BYTES = 8 * 1024 * 1024;
const ENTRY_BYTES = 128; // what a message takes besides its payload

const DRAINING = 1001;
const TOKEN_EXPIRED = 3000;
const ALWAYS_FINAL = [401, 403];
const FINAL_AT_FIRST = [400, 404, 405, 426]; // later they may come from a proxy that reloads

const encoder = new TextEncoder();
const latin1 = new TextDecoder("latin1");
const utf8 = new TextDecoder("utf-8", {ignoreBOM: true});

/** Why a message was not sent, or is not known to be relayed: `why` is for programs. */
export class RelayError extends Error {
  /**
   * @param {"full" | "closed" | "refused" | "uncertain"} why
   * @param {string} message
   */
  constructor(why, message) {
    super(message);
    this.name = "RelayError";
    this.why = why;
  }
}

/** A channel of a relay, for as long as the page likes. */
export class Relay extends EventTarget {
  #address;
  #history;
  #maxOffline;
  #maxWaitingBytes;

  /** @type {"connecting" | "open" | "waiting" | "closed"} */
  #state = "closed";
  /** @type {Link | null} the connection there is: it was welcomed */
  #link = null;
  /** @type {Link | null} the one that is being made; there may be both */
  #next = null;
  #dial = 0; // counts attempts: who waits for a token sees whether his is still wanted
  #isDialing = false;
  #wasOpen = false;
  #isFrozen = false;
  #isSuspect = false; // nothing was heard of the connection since a sleep
  #openedAt = 0;
  #heard = 0; // messages, over all connections

  #failures = 0; // in a row
  #unauthorized = 0; // in a row
  #blocked = 0; // in a row: a stream worked, a WebSocket did not
  #prefersStream = false;
  #upgradeMs = UPGRADE_MS[0];

  /** @type {string | null} */
  #position = null;
  /** @type {Outgoing[]} not sent yet */
  #queue = [];
  /** @type {Outgoing[]} sent over a connection that is gone, and not come back yet */
  #doubtful = [];
  #waitingBytes = 0; // of all that is not known to be relayed

  /** @type {Timer} of the next attempt */
  #retryTimer;
  #dueAt = 0;
  #wasTold = false; // the relay said when to come back
  /** @type {Timer} */
  #settleTimer;
  /** @type {Timer} */
  #upgradeTimer;
  /** @type {Timer} */
  #wakeTimer;
  /** @type {Timer} */
  #lookTimer;
  #lookedAt = 0;
  #wasHidden = false;
  /** @type {AbortController | null} takes the listeners off */
  #listening = null;

  /**
   * Connect to a channel.
   *
   * @param {string | URL} url of the channel: ws, wss, http or https, or relative to the page.
   * @param {import("./relay.js").RelayOptions} [options]
   */
  constructor(url, options = {}) {
    super();
    this.#address = addressOf(url, options.channel);
    this.token = options.token ?? null;
    this.#history = options.history ?? 0;
    this.#position = options.since ?? null;
    this.#maxOffline = options.maxOffline ?? MAX_OFFLINE;
    this.#maxWaitingBytes = options.maxWaitingBytes ?? MAX_WAITING_BYTES;
    this.open();
  }

  /** "connecting", "open", "waiting" for the next attempt, or "closed". */
  get state() {
    return this.#state;
  }

  /** What carries the messages now: "websocket", "stream", or null. */
  get transport() {
    return this.#link?.kind ?? null;
  }

  /** The last message's position: bring it as `since`, and nothing in between is missed. */
  get position() {
    return this.#position;
  }

  /** How many messages were not sent yet, for want of a connection. */
  get offline() {
    return this.#queue.length;
  }

  /** Connect again after `close()` or "refused"; go on behind the last position. */
  open() {
    if (this.#state !== "closed") return;
    this.#failures = this.#unauthorized = this.#blocked = 0;
    this.#wasOpen = this.#isFrozen = false;
    this.#listen();
    this.#connect();
  }

  /** Let go of the channel. What waits to be sent is not. */
  close() {
    if (this.#state === "closed") return;
    this.#stop(new RelayError("closed", "the page closed the connection"));
    this.#become("closed", {});
  }

  /**
   * Send a message to everybody in the channel, now or when there is a connection again.
   *
   * It is sent once. The promise need not be looked at.
   *
   * @param {string | ArrayBuffer | ArrayBufferView} data
   * @returns {Promise<string>} its position, once it was relayed. Rejected with a RelayError where
   *   it was not, or where that is not known ("uncertain": the connection broke, and the message
   *   did not come back over the next one).
   * @throws {RelayError} too much waits already ("full"), or nothing is to come ("closed").
   */
  send(data) {
    if (this.#state === "closed") throw new RelayError("closed", "there is no connection");
    const message = new Outgoing(data, (size) => (this.#waitingBytes -= size));
    if (this.#waitingBytes + message.size > this.#maxWaitingBytes) {
      throw new RelayError("full", `over ${this.#maxWaitingBytes} bytes wait to be relayed`);
    }
    if (this.#queue.length >= this.#maxOffline) {
      throw new RelayError("full", `${this.#maxOffline} messages wait to be sent`);
    }
    this.#waitingBytes += message.size;
    this.#queue.push(message);
    this.#flush();
    return message.relayed;
  }

  // Connecting

  /** Make a connection, beside the one there is, if there is one. */
  async #connect() {
    if (this.#isDialing) return;
    clearTimeout(this.#retryTimer);
    const dial = ++this.#dial;
    this.#isDialing = true;
    if (!this.#link) this.#become("connecting", {});
    let token;
    try {
      token = await (typeof this.token === "function" ? this.token() : this.token);
    } catch {
      token = undefined; // the page's own failure; it can tell its user more than can be said here
    }
    if (dial !== this.#dial) return;
    if (token === undefined) return this.#failed({reason: "the page has no token"});
    if (token && !TOKEN.test(token)) {
      return this.#refuse(401, "a token has letters, digits, dots, - and _ only");
    }
    // A WebSocket is tried first, but where it did not work lately; beside a stream it always is.
    this.#start(this.#prefersStream && !this.#link ? Stream : Socket, token ?? "");
  }

  /**
   * @param {typeof Socket | typeof Stream} Kind
   * @param {string} token
   */
  #start(Kind, token) {
    const address = new URL(this.#address);
    const since = this.#position;
    if (since) address.searchParams.set("since", since);
    else if (this.#history) address.searchParams.set("history", String(this.#history));
    /** @type {Link} */
    const link = new Kind(address, token, {
      welcome: (said) => this.#welcomed(link, since, said),
      message: (position, data) => link === this.#link && this.#hear(position, data),
      gap: (position) => link === this.#link && this.#miss(position),
      ready: () => this.#flush(),
      lost: (how) => (link === this.#link ? this.#lost(how) : this.#notMade(link, how)),
    });
    this.#next = link;
    link.open();
  }

  /**
   * @param {Link} link
   * @param {string | null} since
   * @param {Welcome} said
   */
  #welcomed(link, since, said) {
    if (link !== this.#next) return;
    if (link.kind === "websocket") {
      this.#blocked = 0;
      this.#prefersStream = false;
    } else if (!this.#prefersStream && ++this.#blocked < BLOCKED_AFTER) {
      this.#letGoOfNext();
      return this.#failed({reason: "no WebSocket"});
    } else {
      this.#prefersStream = true;
    }
    this.#adopt(link);
    if (link === this.#link) this.#resume(since, said); // not closed by the page meanwhile
  }

  /** @param {Link} link */
  #adopt(link) {
    const before = this.#letGoOfLink();
    this.#next = null;
    this.#isDialing = false;
    this.#link = link;
    this.#wasOpen = true;
    this.#unauthorized = 0;
    this.#openedAt = Date.now();
    clearTimeout(this.#upgradeTimer);
    if (link.kind === "stream") this.#upgradeLater();
    else this.#upgradeMs = UPGRADE_MS[0];
    if (before?.kind !== link.kind) this.#become("open", {});
    if (!before && this.#link) this.#tell("open", {transport: link.kind});
  }

  /**
   * @param {string | null} since what was asked for
   * @param {Welcome} said
   */
  #resume(since, {recovered, position}) {
    const before = this.#position;
    // Another connection may have gone on meanwhile; and a log that was begun anew begins before.
    const isNewLog = !recovered && since !== null && isAfter(since, position);
    if (isNewLog || before === null || isAfter(position, before)) {
      this.#position = position;
      if (!recovered) this.#tell("gap", {since: before, position});
    }
    const settleMs = isNewLog ? 0 : SETTLE_MS; // of a new log nothing is to come back
    if (this.#doubtful.length) this.#settleTimer = setTimeout(() => this.#settle(), settleMs);
    this.#flush();
  }

  /**
   * The log lost something, while there was a connection.
   *
   * @param {string} position behind which nothing is missing
   */
  #miss(position) {
    const since = this.#position;
    if (since === null || isAfter(position, since)) this.#position = position;
    this.#tell("gap", {since, position});
  }

  /**
   * @param {Link} link
   * @param {End} how
   */
  #notMade(link, how) {
    if (link !== this.#next) return;
    this.#next = null;
    if (link.kind === "websocket" && this.#asksWhy()) return this.#start(Stream, link.token);
    if (link.kind === "stream") {
      if (!how.status) this.#blocked = 0; // nothing works, so nothing is blocked
      this.#prefersStream = false;
    }
    this.#failed(how);
  }

  /** A browser does not say why an upgrade failed; what a stream is answered, the page can see. */
  #asksWhy() {
    if (this.#link) return false;
    return this.#failures < 2 || this.#blocked > 0 || this.#failures % PROBE_EVERY === 0;
  }

  /** @param {End} how */
  #failed(how) {
    this.#isDialing = false;
    if (how.status && this.#isFinal(how.status)) return this.#refuse(how.status, how.reason);
    if (this.#link && !this.#isSuspect) return; // it is no worse for it
    if (this.#letGoOfLink()) {
      this.#tell("close", {code: 1006, reason: "nothing was heard of it"});
      if (this.#state === "closed") return;
    }
    this.#retry(how);
  }

  /** @param {number} status */
  #isFinal(status) {
    if (status === 401 && typeof this.token === "function") return ++this.#unauthorized > 1;
    return ALWAYS_FINAL.includes(status) || (!this.#wasOpen && FINAL_AT_FIRST.includes(status));
  }

  /** @param {End} how */
  #lost(how) {
    const reason = how.reason ?? "";
    // The relay says so behind all that it relayed: what did not come back is sent again.
    if (how.code === DRAINING && reason.startsWith("draining")) {
      for (const message of this.#link?.unheard ?? []) message.isSentAgain = true;
    }
    this.#letGoOfLink();
    if (Date.now() - this.#openedAt >= STEADY_MS) this.#failures = 0;
    this.#tell("close", {code: how.code ?? 1006, reason});
    if (this.#state === "closed") return; // by the page, in that event
    const status = how.code === TOKEN_EXPIRED ? 401 : how.status;
    if (status && this.#isFinal(status)) return this.#refuse(status, reason);
    if (this.#isDialing) this.#become("connecting", {reason});
    else this.#retry(how);
  }

  /** @param {End} how */
  #retry({code, reason = "", retryMs}) {
    const told = retryMs ?? (code === DRAINING ? /retry_ms=(\d+)/.exec(reason)?.[1] : undefined);
    const most = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** Math.min(this.#failures, 10));
    const waitMs = told === undefined ? by(most) : Math.min(Number(told), LONGEST_TOLD_MS);
    this.#failures += told === undefined ? 1 : 0;
    this.#wasTold = told !== undefined;
    this.#dueAt = Date.now() + waitMs;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = setTimeout(() => this.#connect(), waitMs);
    this.#become("waiting", {reason, retryInMs: Math.round(waitMs)});
  }

  /**
   * @param {number} status
   * @param {string} [reason]
   */
  #refuse(status, reason = "") {
    this.#stop(new RelayError("refused", `refused: ${status} ${reason}`));
    this.#become("closed", {reason});
    this.#tell("refused", {status, reason});
  }

  #upgradeLater() {
    this.#upgradeTimer = setTimeout(() => {
      this.#upgradeMs = Math.min(this.#upgradeMs * 2, UPGRADE_MS[1]);
      this.#upgradeLater();
      this.#connect();
    }, this.#upgradeMs);
  }

  /** @param {RelayError} error */
  #stop(error) {
    this.#dial += 1;
    this.#letGoOfNext();
    this.#letGoOfLink();
    this.#listening?.abort();
    clearInterval(this.#lookTimer);
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#settleTimer);
    clearTimeout(this.#upgradeTimer);
    clearTimeout(this.#wakeTimer);
    for (const message of [...this.#doubtful.splice(0), ...this.#queue.splice(0)]) {
      message.reject(error);
    }
  }

  #letGoOfNext() {
    this.#isDialing = false;
    this.#next?.close();
    this.#next = null;
  }

  /** @returns {Link | null} the connection there was */
  #letGoOfLink() {
    const link = this.#link;
    if (!link) return null;
    this.#link = null;
    this.#isSuspect = false;
    clearTimeout(this.#upgradeTimer);
    clearTimeout(this.#settleTimer);
    link.close();
    this.#doubtful.push(...link.unheard);
    return link;
  }

  // Messages

  /**
   * @param {string} position
   * @param {string | ArrayBuffer} data
   */
  #hear(position, data) {
    this.#heard += 1;
    this.#isSuspect = false;
    if (this.#position !== null && !isAfter(position, this.#position)) return; // heard before
    this.#position = position;
    this.#recognize(data)?.resolve(position);
    this.dispatchEvent(
      Object.assign(new MessageEvent("message", {data, lastEventId: position}), {position}),
    );
  }

  /**
   * Find one's own message: the relay sends it back too, as it came and in order.
   *
   * @param {string | ArrayBuffer} data
   */
  #recognize(data) {
    const at = this.#doubtful.findIndex((message) => message.says(data));
    if (at >= 0) {
      const [found] = this.#doubtful.splice(at, 1);
      this.#flush(); // it may have been what the others waited for
      return found;
    }
    const unheard = this.#link?.unheard;
    return unheard?.[0]?.says(data) ? unheard.shift() : undefined;
  }

  /** Decide about what has not come back since the connection did. */
  #settle() {
    const settled = this.#doubtful.splice(0);
    this.#queue.unshift(...settled.filter((message) => message.isSentAgain));
    for (const message of settled) {
      if (message.isSentAgain) message.isSentAgain = false;
      else message.reject(new RelayError("uncertain", "the connection broke: perhaps not relayed"));
    }
    this.#flush();
  }

  /** What was sent before is decided about first, so that the order stays. */
  #canSend() {
    const isEarlier = (/** @type {Outgoing} */ message) => message.isSentAgain || message.isPosted;
    return this.#link !== null && !this.#doubtful.some(isEarlier);
  }

  #flush() {
    while (this.#queue.length && this.#canSend() && this.#link?.send(this.#queue[0])) {
      this.#queue.shift();
    }
  }

  // Sleep and wake

  #listen() {
    this.#listening = new AbortController();
    const {signal} = this.#listening;
    const page = globalThis.document;
    const look = () => this.#look();
    globalThis.addEventListener?.("online", () => this.#online(), {signal});
    globalThis.addEventListener?.("pageshow", look, {signal});
    page?.addEventListener("visibilitychange", look, {signal});
    page?.addEventListener("freeze", () => this.#freeze(), {signal});
    page?.addEventListener("resume", () => this.#thaw(), {signal});
    this.#lookedAt = Date.now();
    this.#lookTimer = setInterval(look, LOOK_MS);
  }

  /** Look at the clock: where it jumped, the machine slept, and the network may have gone. */
  #look() {
    const now = Date.now();
    const asleepMs = now - this.#lookedAt - LOOK_MS;
    const slept = asleepMs > (this.#wasHidden ? ASLEEP_HIDDEN_MS : ASLEEP_MS);
    this.#lookedAt = now;
    this.#wasHidden = globalThis.document?.visibilityState === "hidden";
    if (slept) this.#doubtLink();
    if (this.#state === "waiting" && !this.#isFrozen && now >= this.#dueAt) this.#connect();
  }

  /** The network is back, or is another. */
  #online() {
    this.#doubtLink();
    if (this.#state !== "waiting" || this.#wasTold || this.#isFrozen) return;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = setTimeout(() => this.#connect(), by(FIRST_WAIT_MS));
  }

  /**
   * Replace the connection, unless something is heard of it. A page can't send a ping, and a
   * connection that died in a sleep says nothing. The new one begins where the old one is, and
   * takes its place when it is there: nothing is missed.
   */
  #doubtLink() {
    clearTimeout(this.#wakeTimer);
    if (!this.#link) return;
    const heard = this.#heard;
    this.#wakeTimer = setTimeout(() => {
      if (!this.#link || this.#heard !== heard) return;
      this.#isSuspect = true;
      this.#connect();
    }, WAKE_MS + by(WAKE_MS));
  }

  /** Hold no connection while the page is frozen: what came would pile up, and it hears nothing. */
  #freeze() {
    this.#isFrozen = true;
    this.#dial += 1;
    this.#letGoOfNext();
    this.#letGoOfLink();
    clearTimeout(this.#retryTimer);
    this.#become("waiting", {reason: "the page is frozen"});
  }

  #thaw() {
    if (!this.#isFrozen) return;
    this.#isFrozen = false;
    this.#connect();
  }

  // What the page is told

  /**
   * @param {"connecting" | "open" | "waiting" | "closed"} state
   * @param {{reason?: string, retryInMs?: number}} facts
   */
  #become(state, {reason = "", retryInMs = 0}) {
    this.#state = state;
    this.#tell("state", {state, transport: this.transport, reason, retryInMs});
  }

  /**
   * @param {string} type
   * @param {object} facts
   */
  #tell(type, facts) {
    this.dispatchEvent(Object.assign(new Event(type), facts));
  }
}

/** A message on its way out. */
class Outgoing {
  /** @type {(position: string) => void} */
  #resolve = () => {};
  /** @type {(error: RelayError) => void} */
  #reject = () => {};
  #isDone = false;
  #whenDone;

  /**
   * @param {string | ArrayBuffer | ArrayBufferView} data
   * @param {(size: number) => void} whenDone
   */
  constructor(data, whenDone) {
    this.#whenDone = whenDone;
    const bytes = bytesOf(data);
    /** A copy, well-formed: as it will come back. */
    this.data = typeof data === "string" ? utf8.decode(bytes) : bytes;
    this.size = bytes.byteLength + ENTRY_BYTES;
    /** It was certainly not relayed yet. */
    this.isSentAgain = false;
    /** The relay's answer to a POST is awaited. */
    this.isPosted = false;
    this.relayed = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.relayed.catch(() => {}); // who does not look at the promise is not troubled by it
  }

  /** @param {string} position */
  resolve(position) {
    this.#done();
    this.#resolve(position);
  }

  /** @param {RelayError} error */
  reject(error) {
    this.#done();
    this.#reject(error);
  }

  /** @param {string | ArrayBuffer} heard */
  says(heard) {
    if (typeof heard === "string") return heard === this.data;
    if (typeof this.data === "string" || heard.byteLength !== this.data.byteLength) return false;
    const bytes = new Uint8Array(heard);
    return this.data.every((byte, at) => byte === bytes[at]);
  }

  #done() {
    if (!this.#isDone) this.#whenDone(this.size);
    this.#isDone = true;
  }
}

/** A WebSocket. What is sent comes back, if it was relayed; what has not yet is `unheard`. */
class Socket {
  kind = /** @type {const} */ ("websocket");
  /** @type {Outgoing[]} */
  unheard = [];
  /** @type {WebSocket | null} */
  #socket = null;
  /** @type {Timer} */
  #deadline;

  /**
   * @param {URL} address
   * @param {string} token
   * @param {Hears} hears
   */
  constructor(address, token, hears) {
    this.address = address;
    this.token = token;
    this.hears = hears;
  }

  open() {
    const offers = this.token ? [SUBPROTOCOL, "bearer", this.token] : [SUBPROTOCOL];
    this.#deadline = setTimeout(() => this.#end({reason: "no answer"}), CONNECT_MS);
    try {
      this.#socket = new WebSocket(this.address, offers);
    } catch {
      // ws:// is not opened from a page that came by https://, for one.
      return this.#end({reason: "the browser opens no WebSocket to there"});
    }
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onmessage = ({data}) => this.#hear(data);
    this.#socket.onclose = ({code, reason}) => this.#end({code, reason});
  }

  /** @param {Outgoing} message */
  send(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(/** @type {string | BufferSource} */ (message.data));
    this.unheard.push(message);
    return true;
  }

  close() {
    clearTimeout(this.#deadline);
    const socket = this.#socket;
    this.#socket = null;
    if (!socket) return;
    socket.onmessage = socket.onclose = null;
    socket.close();
  }

  /** @param {string | ArrayBuffer} data */
  #hear(data) {
    const [position, payload] = typeof data === "string" ? splitText(data) : splitBytes(data);
    if (position) return this.hears.message(position, payload);
    const said = JSON.parse(String(payload));
    if (said.type === "gap") this.hears.gap(said.position);
    if (said.type !== "welcome") return;
    clearTimeout(this.#deadline);
    this.hears.welcome(said);
  }

  /** @param {End} how */
  #end(how) {
    this.close();
    this.hears.lost(how);
  }
}

/**
 * Server-sent events in, POST out. By fetch and not by EventSource: so the token goes in a header
 * and not in the address, and a refusal can be seen.
 */
class Stream {
  kind = /** @type {const} */ ("stream");
  /** @type {Outgoing[]} */
  unheard = [];
  #reading = new AbortController();
  #isSending = false;
  /** @type {Timer} */
  #deadline;
  /** @type {Timer} */
  #pause;

  /**
   * @param {URL} address
   * @param {string} token
   * @param {Hears} hears
   */
  constructor(address, token, hears) {
    this.address = new URL(address);
    this.address.protocol = address.protocol === "wss:" ? "https:" : "http:";
    this.token = token;
    this.hears = hears;
  }

  async open() {
    const events = new URL(this.address);
    events.pathname = events.pathname.replace(/\/?$/, "/events");
    this.#deadline = setTimeout(() => this.#end({reason: "no answer"}), CONNECT_MS);
    try {
      const {signal} = this.#reading;
      const response = await this.#fetch(events, {headers: {Accept: "text/event-stream"}, signal});
      if (response.status !== 200 || !response.body) return this.#end(await refusalOf(response));
      await this.#read(response.body);
      this.#end({reason: "the stream ended"});
    } catch {
      this.#end({reason: "no connection"}); // or no right to look, for a page of another origin
    }
  }

  /** @param {Outgoing} message */
  send(message) {
    if (this.#isSending) return false; // one after another, so that the order stays
    this.#isSending = true;
    this.unheard.push(message);
    this.#post(message);
    return true;
  }

  close() {
    clearTimeout(this.#deadline);
    clearTimeout(this.#pause);
    this.#reading.abort();
  }

  /** @param {NonNullable<Response["body"]>} body */
  async #read(body) {
    const events = new Events();
    const decoder = new TextDecoder();
    const reader = body.getReader();
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      for (const event of events.feed(decoder.decode(value, {stream: true}))) this.#hear(event);
    }
  }

  /** @param {ServerEvent} event */
  #hear({id, type, data}) {
    if (this.#reading.signal.aborted) return;
    if (type === "message") this.hears.message(id, data);
    else if (type === "binary") this.hears.message(id, fromBase64(data));
    else if (type === "close") this.#end(JSON.parse(data));
    else if (type === "gap") this.hears.gap(JSON.parse(data).position);
    else if (type === "welcome") {
      clearTimeout(this.#deadline);
      this.hears.welcome(JSON.parse(data));
    }
  }

  /** @param {Outgoing} message */
  async #post(message) {
    const isText = typeof message.data === "string";
    const type = isText ? "text/plain; charset=utf-8" : "application/octet-stream";
    const body = /** @type {string | BufferSource} */ (message.data);
    message.isSentAgain = false;
    message.isPosted = true;
    try {
      // It goes on to its end, also where another connection takes over meanwhile.
      const init = {method: "POST", headers: {"Content-Type": type}, body};
      const response = await this.#fetch(this.address, init);
      if (response.ok) this.#relayed(message, await response.json());
      else this.#notRelayed(message, await refusalOf(response));
    } catch {
      message.isPosted = false;
      this.#end({reason: "no connection"});
    }
  }

  /**
   * @param {Outgoing} message
   * @param {{position: string}} answer
   */
  #relayed(message, {position}) {
    message.resolve(position);
    this.#done(message);
  }

  /**
   * @param {Outgoing} message
   * @param {End} how
   */
  #notRelayed(message, how) {
    message.isPosted = false;
    if (how.status === 401) {
      message.isSentAgain = true; // over the next connection, which brings a fresh token
      this.#end(how);
    } else if (how.status === 503) {
      message.isSentAgain = true;
      if (this.#reading.signal.aborted) return;
      this.#pause = setTimeout(() => this.#post(message), how.retryMs ?? FIRST_WAIT_MS);
    } else {
      message.reject(new RelayError("refused", `not relayed: ${how.status} ${how.reason}`));
      this.#done(message);
    }
  }

  /** @param {Outgoing} message */
  #done(message) {
    message.isPosted = false;
    this.unheard = this.unheard.filter((each) => each !== message);
    this.#isSending = false;
    this.hears.ready();
  }

  /**
   * @param {URL} address
   * @param {RequestInit} init
   */
  #fetch(address, init) {
    const headers = new Headers(init.headers);
    if (this.token) headers.set("Authorization", `Bearer ${this.token}`);
    return fetch(address, {...init, headers, cache: "no-store"});
  }

  /** @param {End} how */
  #end(how) {
    if (this.#reading.signal.aborted) return;
    this.close();
    this.hears.lost(how);
  }
}

/** Takes server-sent events apart, as the HTML standard says (section 9.2.6). */
class Events {
  #rest = "";
  #id = "";
  #type = "";
  /** @type {string[]} */
  #data = [];

  /** @param {string} text */
  *feed(text) {
    const lines = (this.#rest + text).split(/\r?\n/);
    this.#rest = lines.pop() ?? "";
    for (const line of lines) {
      const event = line ? this.#take(line) : this.#finish();
      if (event) yield event;
    }
  }

  /** @param {string} line */
  #take(line) {
    const [, field, value] = /** @type {RegExpExecArray} */ (/^([^:]*):? ?(.*)$/s.exec(line));
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#type = value;
    else if (field === "id") this.#id = value;
  }

  /** @returns {ServerEvent | undefined} */
  #finish() {
    const event = {id: this.#id, type: this.#type || "message", data: this.#data.join("\n")};
    const isEmpty = !this.#data.length;
    this.#type = "";
    this.#data = [];
    return isEmpty ? undefined : event;
  }
}

/**
 * @param {string | URL} url
 * @param {string} [channel]
 */
function addressOf(url, channel) {
  const address = new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href);
  address.protocol = address.protocol.replace(/^http/, "ws");
  if (!/^wss?:$/.test(address.protocol)) throw new TypeError(`no relay's address: ${address}`);
  address.username = address.password = address.hash = ""; // fetch takes none of them
  if (channel !== undefined) {
    address.pathname = address.pathname.replace(/\/?$/, `/channels/${encodeURIComponent(channel)}`);
  }
  return address;
}

/** @param {string | ArrayBuffer | ArrayBufferView} data */
function bytesOf(data) {
  if (typeof data === "string") return encoder.encode(data);
  if (data instanceof ArrayBuffer) return new Uint8Array(data.slice(0));
  if (ArrayBuffer.isView(data)) {
    return new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
  }
  throw new TypeError("a message is a string, an ArrayBuffer or a view of one");
}

/**
 * @param {string} text
 * @returns {[string, string]} position and message
 */
function splitText(text) {
  const end = text.indexOf("\n");
  return [text.slice(0, end), text.slice(end + 1)];
}

/**
 * @param {ArrayBuffer} buffer
 * @returns {[string, ArrayBuffer]} position and message
 */
function splitBytes(buffer) {
  const end = new Uint8Array(buffer).indexOf(10);
  return [latin1.decode(new Uint8Array(buffer, 0, end)), buffer.slice(end + 1)];
}

/** @param {string} text */
function fromBase64(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer;
}

/**
 * Compare two positions: three numbers each, of up to 64 bits.
 *
 * @param {string} one
 * @param {string} other
 */
function isAfter(one, other) {
  const [ours, theirs] = [one, other].map((position) => position.split("-").map(BigInt));
  const at = ours.findIndex((number, index) => number !== theirs[index]);
  return at >= 0 && ours[at] > theirs[at];
}

/**
 * @param {Response} response
 * @returns {Promise<End>}
 */
async function refusalOf(response) {
  const seconds = response.headers.get("Retry-After") ?? "";
  const retryMs = /^\d+$/.test(seconds) ? Number(seconds) * 1000 + by(1000) : undefined;
  const reason = (await response.text().catch(() => "")).trim().slice(0, 200);
  return {status: response.status, reason, retryMs};
}

/** @param {number} most @returns {number} by chance between a half of it and all of it */
function by(most) {
  return most / 2 + (Math.random() * most) / 2;
}

/**
 * @typedef {ReturnType<typeof setTimeout> | undefined} Timer
 * @typedef {Socket | Stream} Link
 * @typedef {{recovered: boolean, position: string}} Welcome
 * @typedef {{id: string, type: string, data: string}} ServerEvent
 * @typedef {{code?: number, status?: number, reason?: string, retryMs?: number}} End how a
 *   connection ended, or why it did not begin
 *
 * @typedef {object} Hears what a connection tells
 * @property {(said: Welcome) => void} welcome it is there
 * @property {(position: string, data: string | ArrayBuffer) => void} message
 * @property {(position: string) => void} gap before this position, the relay's log lost some
 * @property {() => void} ready more can be sent
 * @property {(how: End) => void} lost it is gone, or was never there
 */
