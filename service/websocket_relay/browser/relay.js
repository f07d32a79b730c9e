// @ts-check
/**
 * Connect a browser to a channel: reconnect, resume without gaps, send nothing twice.
 *
 *     import {Relay} from "https://relay.example/relay.js";
 *
 *     const relay = new Relay("wss://relay.example/channels/news");
 *     relay.addEventListener("message", ({data}) => console.log(data));
 *     relay.send("hello");
 *
 * The transport is WebSocket with the subprotocol relay.v1, in which each message has a position; a
 * new connection resumes after the last received one. Where WebSockets are blocked, the client
 * reads server-sent events, in one stream for each channel and token of a page, and publishes by
 * POST. One file without dependencies; its types are in relay.d.ts. Runs in browsers released since
 * the end of 2021, in their workers, and in React Native.
 *
 * Knows no page: no DOM beyond the lifecycle events of `document`, and no storage.
 */

const SUBPROTOCOL = "relay.v1";
const TOKEN_PATTERN = /^[\w.-]+$/; // valid as a subprotocol; covers JSON Web Tokens

// Exponential backoff with jitter, so that clients do not reconnect in the same instant.
const INITIAL_BACKOFF_MS = 500;
const MAX_BACKOFF_MS = 30_000;
const MAX_RETRY_AFTER_MS = 300_000; // upper bound for a delay that the relay or a proxy requests
const STABLE_AFTER_MS = 5_000; // a connection of this age resets the backoff

const CONNECT_TIMEOUT_MS = 10_000; // from the attempt to the relay's welcome
const ECHO_TIMEOUT_MS = 2_000; // after a reconnect, for the echo of an unconfirmed message

const STREAM_AFTER_BLOCKED = 2; // times in a row that the stream worked and the WebSocket did not
const PROBE_EVERY_FAILURES = 4;
const UPGRADE_RETRY_MS = [60_000, 600_000]; // between WebSocket attempts: first, longest

const CLOCK_CHECK_MS = 5_000; // interval of the check for clock jumps
const SLEEP_GAP_MS = 15_000; // a longer clock jump means that the machine slept
const SLEEP_GAP_HIDDEN_MS = 75_000; // browsers run timers of hidden pages once a minute
const WAKE_PROBE_MS = 2_000; // after a sleep, until a silent connection is replaced

// The relay sends a heartbeat every `heartbeat_ms` of its welcome, 20 s by default.
const LATE_HEARTBEAT_MS = 500; // after that, a silent connection is verified as after a sleep,
const SILENCE_MS = 4_500; // and closed this much later, 25 s after the last heartbeat

const MAX_QUEUED_MESSAGES = 1_000;
const MAX_PENDING_BYTES = 8 * 1024 * 1024;
const MESSAGE_OVERHEAD_BYTES = 128; // memory of a message besides its payload

const HTTP1_CONNECTIONS = 6; // that a browser opens to one host, for all tabs together

const CLOSE_GOING_AWAY = 1001;
const CLOSE_TOKEN_EXPIRED = 3000;

// The relay sends these closes after the echoes of all that it relayed.
const CLOSE_REFUSES_ALL = /^1008 not allowed to publish/;
const CLOSE_REFUSES_FIRST = /^(1002|1003|1007|1009|1010) /; // the first message without an echo
const CLOSE_REFUSES_NONE = /^(1008 |3000 |1013 (backplane unavailable|too many partial messages))/;

const FINAL_STATUSES = [401, 403];
const FINAL_BEFORE_OPEN = [400, 404, 405, 426]; // later, a reloading proxy may send them

const encoder = new TextEncoder();

/** The part of an EventTarget that React Native needs, which has none. */
class SmallEventTarget {
  /** @type {Map<string, Map<any, boolean>>} by type: listeners, and whether each is called once */
  #listeners = new Map();

  /** @param {string} type @param {any} listener @param {{once?: boolean}} [options] */
  addEventListener(type, listener, options) {
    const listeners = this.#listeners.get(type) ?? new Map();
    this.#listeners.set(type, listeners.set(listener, options?.once ?? false));
  }

  /** @param {string} type @param {any} listener */
  removeEventListener(type, listener) {
    this.#listeners.get(type)?.delete(listener);
  }

  /** @param {Event} event */
  dispatchEvent(event) {
    for (const [listener, isOnce] of [...(this.#listeners.get(event.type) ?? [])]) {
      if (isOnce) this.removeEventListener(event.type, listener);
      try {
        if (typeof listener === "function") listener.call(this, event);
        else listener.handleEvent(event);
      } catch (error) {
        setTimeout(() => { throw error; }); // as in a browser: it ends no other listener
      }
    }
    return true;
  }
}

const hasEvents = Boolean(globalThis.EventTarget && globalThis.Event && globalThis.MessageEvent);
const Target = /** @type {typeof EventTarget} */ (hasEvents ? EventTarget : SmallEventTarget);

/**
 * @param {string} type
 * @param {object} fields
 * @param {MessageEventInit} [message]
 */
function eventOf(type, fields, message) {
  if (!hasEvents) return /** @type {Event} */ (Object.assign({type}, message, fields));
  return Object.assign(message ? new MessageEvent(type, message) : new Event(type), fields);
}

/** A message was not sent, or its delivery is unknown. `why` is machine-readable. */
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

/** A connection to a channel that reconnects until it is closed or refused. */
export class Relay extends Target {
  #channelUrl;
  #history;
  #maxQueued;
  #maxPendingBytes;

  /** @type {"connecting" | "open" | "waiting" | "closed"} */
  #state = "closed";
  /** @type {Link | null} the active connection: its welcome has arrived */
  #link = null;
  /** @type {Link | null} the connection being opened; both may exist */
  #candidate = null;
  #attempt = 0; // number of the attempt: one that awaited a token detects that it is stale
  #isConnecting = false;
  #wasOpen = false;
  #isFrozen = false;
  #openedAt = 0;

  #failureCount = 0; // consecutive
  #unauthorizedCount = 0; // consecutive
  #blockedCount = 0; // consecutive: the stream worked, the WebSocket did not
  #prefersStream = false;
  #upgradeMs = UPGRADE_RETRY_MS[0];

  /** @type {string | null} */
  #position = null;
  /** @type {Outgoing[]} not sent yet */
  #queue = [];
  /** @type {Outgoing[]} sent over a closed connection, echo not received yet */
  #unconfirmed = [];
  #pendingBytes = 0; // of all messages not yet known to be relayed

  /** @type {Timer} starts the next attempt */
  #retryTimer;
  #retryAt = 0;
  #hasRetryHint = false; // the relay requested the delay of the next attempt
  /** @type {Timer} */
  #echoTimer;
  /** @type {Timer} */
  #upgradeTimer;
  /** @type {Timer} */
  #wakeTimer;
  /** @type {Timer} */
  #silenceTimer;
  /** @type {Timer} */
  #clockTimer;
  #clockCheckedAt = 0;
  #wasHidden = false;
  /** @type {AbortController | null} removes the page's event listeners */
  #pageListeners = null;

  /**
   * Connect to a channel.
   *
   * @param {string | URL} url of the channel: ws, wss, http or https, or relative to the page.
   * @param {import("./relay.js").RelayOptions} [options]
   */
  constructor(url, options = {}) {
    super();
    this.#channelUrl = channelUrlOf(url, options.channel);
    this.token = options.token ?? null;
    this.#history = options.history ?? 0;
    this.#position = options.since ?? null;
    this.#maxQueued = options.maxOffline ?? MAX_QUEUED_MESSAGES;
    this.#maxPendingBytes = options.maxWaitingBytes ?? MAX_PENDING_BYTES;
    this.open();
  }

  /** "connecting", "open", "waiting" for the next attempt, or "closed". */
  get state() {
    return this.#state;
  }

  /** The transport of the active connection: "websocket", "stream", or null. */
  get transport() {
    return this.#link?.kind ?? null;
  }

  /** The position of the last message. Passed as `since`, it resumes without a gap. */
  get position() {
    return this.#position;
  }

  /** The number of messages queued until there is a connection. */
  get offline() {
    return this.#queue.length;
  }

  /**
   * Reconnect after `close()` or "refused", and resume after the last position. While "waiting":
   * reconnect now.
   */
  open() {
    if (this.#state === "waiting" && !this.#isFrozen) this.#connect();
    if (this.#state !== "closed") return;
    this.#failureCount = this.#unauthorizedCount = this.#blockedCount = 0;
    this.#wasOpen = this.#isFrozen = false;
    this.#addPageListeners();
    this.#connect();
  }

  /** Close the connection. Queued messages are discarded, and their promises rejected. */
  close() {
    if (this.#state === "closed") return;
    this.#shutDown(new RelayError("closed", "the page closed the connection"));
    this.#setState("closed", {});
  }

  /**
   * Publish a message to the channel, at once or after the next reconnect.
   *
   * A message is never published twice. The promise may be ignored.
   *
   * @param {string | ArrayBuffer | ArrayBufferView} data
   * @returns {Promise<string>} resolves with the position when the message is relayed. Rejects with
   *   a RelayError if it is not, or if that is unknown ("uncertain": the connection was lost, and
   *   the message was not echoed over the next one).
   * @throws {RelayError} the send buffer is full ("full"), or the connection is closed ("closed").
   */
  send(data) {
    if (this.#state === "closed") throw new RelayError("closed", "the connection is closed");
    const message = new Outgoing(data, (size) => (this.#pendingBytes -= size));
    if (this.#pendingBytes + message.size > this.#maxPendingBytes) {
      throw new RelayError("full", `send buffer full: limit ${this.#maxPendingBytes} bytes`);
    }
    if (this.#queue.length >= this.#maxQueued) {
      throw new RelayError("full", `send buffer full: limit ${this.#maxQueued} messages`);
    }
    this.#pendingBytes += message.size;
    this.#queue.push(message);
    this.#flush();
    return message.relayed;
  }

  // Connecting

  /** Open a new connection. An active one stays until the new one replaces it. */
  async #connect() {
    if (this.#isConnecting) return;
    clearTimeout(this.#retryTimer);
    const attempt = ++this.#attempt;
    this.#isConnecting = true;
    if (!this.#link) this.#setState("connecting", {});
    let token;
    try {
      token = await (typeof this.token === "function" ? this.token() : this.token);
    } catch {
      token = undefined; // the page's callback failed; the page knows the cause
    }
    if (attempt !== this.#attempt) return;
    if (token === undefined) return this.#onAttemptFailed({reason: "the page has no token"});
    if (token && !TOKEN_PATTERN.test(token)) {
      return this.#onRefused(401, "a token has letters, digits, dots, - and _ only");
    }
    // A WebSocket is tried first, unless the last ones failed; beside a stream it is always tried.
    this.#openLink(this.#prefersStream && !this.#link ? Stream : Socket, token ?? "");
  }

  /**
   * @param {typeof Socket | typeof Stream} Kind
   * @param {string} token
   */
  #openLink(Kind, token) {
    const channelUrl = new URL(this.#channelUrl);
    const since = this.#position;
    if (since) channelUrl.searchParams.set("since", since);
    else if (this.#history) channelUrl.searchParams.set("history", String(this.#history));
    /** @type {Link} */
    const link = new Kind(channelUrl, token, {
      welcome: (welcome) => this.#onWelcome(link, since, welcome),
      message: (position, data) => link === this.#link && this.#onMessage(position, data),
      gap: (position) => link === this.#link && this.#onGap(position),
      ready: () => this.#flush(),
      awaitsEchoes: () => this.#unconfirmed.length > 0,
      lost: (end) => (link === this.#link ? this.#onLost(end) : this.#onConnectFailed(link, end)),
    });
    this.#candidate = link;
    link.open();
  }

  /**
   * @param {Link} link
   * @param {string | null} since
   * @param {Welcome} welcome
   */
  #onWelcome(link, since, welcome) {
    if (link !== this.#candidate) return;
    if (link.kind === "websocket") {
      this.#blockedCount = 0;
      this.#prefersStream = false;
    } else if (!this.#prefersStream && ++this.#blockedCount < STREAM_AFTER_BLOCKED) {
      this.#dropCandidate();
      return this.#onAttemptFailed({reason: "WebSocket blocked"});
    } else {
      this.#prefersStream = true;
    }
    this.#activate(link);
    if (link !== this.#link) return; // the page has closed it in an event
    if (welcome.heartbeat_ms) this.#watchHeartbeats(link, welcome.heartbeat_ms);
    this.#applyWelcome(since, welcome);
  }

  /** @param {Link} link */
  #activate(link) {
    const previous = this.#dropLink();
    this.#candidate = null;
    this.#isConnecting = false;
    this.#link = link;
    this.#wasOpen = true;
    this.#unauthorizedCount = 0;
    this.#openedAt = Date.now();
    clearTimeout(this.#upgradeTimer);
    if (link.kind === "stream") this.#scheduleUpgrade();
    else this.#upgradeMs = UPGRADE_RETRY_MS[0];
    if (previous?.kind !== link.kind) this.#setState("open", {});
    if (!previous && this.#link) this.#emit("open", {transport: link.kind});
  }

  /**
   * @param {string | null} since the requested position
   * @param {Welcome} welcome
   */
  #applyWelcome(since, {recovered, position}) {
    const before = this.#position;
    // The previous connection may have advanced meanwhile. A recreated log starts lower.
    const isNewLog = !recovered && since !== null && isAfter(since, position);
    if (isNewLog || before === null || isAfter(position, before)) {
      this.#position = position;
      if (!recovered) this.#emit("gap", {since: before, position});
    }
    const echoTimeoutMs = isNewLog ? 0 : ECHO_TIMEOUT_MS; // a new log has no echoes
    if (this.#unconfirmed.length) {
      this.#echoTimer = setTimeout(() => this.#settleUnconfirmed(recovered), echoTimeoutMs);
    }
    this.#flush();
  }

  /**
   * The relay's log lost messages while the connection was open.
   *
   * @param {string} position after which nothing is missing
   */
  #onGap(position) {
    const since = this.#position;
    if (since !== null && !isAfter(position, since)) return; // received over another connection
    this.#position = position;
    this.#emit("gap", {since, position});
  }

  /**
   * @param {Link} link
   * @param {End} end
   */
  #onConnectFailed(link, end) {
    if (link !== this.#candidate) return;
    this.#candidate = null;
    if (link.kind === "websocket" && this.#shouldProbe()) return this.#openLink(Stream, link.token);
    if (link.kind === "stream") {
      if (!end.status) this.#blockedCount = 0; // unreachable, which is not blocked
      this.#prefersStream = false;
    }
    this.#onAttemptFailed(end);
  }

  /** A browser hides why an upgrade failed; the status of a stream request is visible. */
  #shouldProbe() {
    if (this.#link) return false;
    const isProbeDue = this.#failureCount % PROBE_EVERY_FAILURES === 0;
    return this.#failureCount < 2 || this.#blockedCount > 0 || isProbeDue;
  }

  /** @param {End} end */
  #onAttemptFailed(end) {
    this.#isConnecting = false;
    if (end.status && this.#isFinal(end.status)) return this.#onRefused(end.status, end.reason);
    const isUnresponsive = this.#link && this.#link.receivedAt < this.#link.suspectedAt;
    if (this.#link && !isUnresponsive) return; // the active connection is unaffected
    if (this.#dropLink()) {
      this.#emit("close", {code: 1006, reason: "connection unresponsive"});
      if (this.#state === "closed") return;
    }
    this.#scheduleRetry(end);
  }

  /** @param {number} status */
  #isFinal(status) {
    if (status === 401 && typeof this.token === "function") return ++this.#unauthorizedCount > 1;
    if (FINAL_STATUSES.includes(status)) return true;
    return !this.#wasOpen && FINAL_BEFORE_OPEN.includes(status);
  }

  /** @param {End} end */
  #onLost(end) {
    const reason = end.reason ?? "";
    if (this.#link?.kind === "websocket") this.#settleByClose(this.#link, `${end.code} ${reason}`);
    this.#dropLink();
    if (Date.now() - this.#openedAt >= STABLE_AFTER_MS) this.#failureCount = 0;
    this.#emit("close", {code: end.code ?? 1006, reason});
    if (this.#state === "closed") return; // the page closed it in that event
    const status = end.code === CLOSE_TOKEN_EXPIRED ? 401 : end.status;
    if (status && this.#isFinal(status)) return this.#onRefused(status, reason);
    if (this.#isConnecting) this.#setState("connecting", {reason});
    else this.#scheduleRetry(end);
  }

  /**
   * Settle the messages in flight, as far as the reason of the close allows.
   *
   * @param {Link} link
   * @param {string} close its code and reason
   */
  #settleByClose({inFlight}, close) {
    // A draining relay relays what it receives until the closing handshake, but a browser drops what
    // it has not sent by then. Only a complete replay shows which messages were not relayed.
    for (const message of inFlight) message.isDrained = close.startsWith("1001 draining");
    const refusesFirst = CLOSE_REFUSES_FIRST.test(close);
    const refusedCount = CLOSE_REFUSES_ALL.test(close) ? inFlight.length : Number(refusesFirst);
    for (const message of inFlight.splice(0, refusedCount)) {
      message.reject(new RelayError("refused", `not relayed: ${close}`));
    }
    if (refusesFirst || CLOSE_REFUSES_NONE.test(close)) this.#queue.unshift(...inFlight.splice(0));
  }

  /** @param {End} end */
  #scheduleRetry({code, reason = "", retryMs}) {
    const drainMs = code === CLOSE_GOING_AWAY ? /retry_ms=(\d+)/.exec(reason)?.[1] : undefined;
    const hintMs = retryMs ?? drainMs;
    const backoffMs = INITIAL_BACKOFF_MS * 2 ** Math.min(this.#failureCount, 10);
    const waitMs =
      hintMs === undefined
        ? jittered(Math.min(MAX_BACKOFF_MS, backoffMs))
        : Math.min(Number(hintMs), MAX_RETRY_AFTER_MS);
    this.#failureCount += hintMs === undefined ? 1 : 0;
    this.#hasRetryHint = hintMs !== undefined;
    this.#retryAt = Date.now() + waitMs;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = setTimeout(() => this.#connect(), waitMs);
    this.#setState("waiting", {reason, retryInMs: Math.round(waitMs)});
  }

  /**
   * @param {number} status
   * @param {string} [reason]
   */
  #onRefused(status, reason = "") {
    this.#shutDown(new RelayError("refused", `refused: ${status} ${reason}`));
    this.#setState("closed", {reason});
    this.#emit("refused", {status, reason});
  }

  #scheduleUpgrade() {
    this.#upgradeTimer = setTimeout(() => {
      this.#upgradeMs = Math.min(this.#upgradeMs * 2, UPGRADE_RETRY_MS[1]);
      this.#scheduleUpgrade();
      this.#connect();
    }, this.#upgradeMs);
  }

  /** @param {RelayError} error */
  #shutDown(error) {
    this.#attempt += 1;
    this.#dropCandidate();
    this.#dropLink();
    this.#pageListeners?.abort();
    clearInterval(this.#clockTimer);
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#echoTimer);
    clearTimeout(this.#upgradeTimer);
    clearTimeout(this.#wakeTimer);
    clearTimeout(this.#silenceTimer);
    for (const message of [...this.#unconfirmed.splice(0), ...this.#queue.splice(0)]) {
      message.reject(error);
    }
  }

  #dropCandidate() {
    this.#isConnecting = false;
    this.#candidate?.close();
    this.#candidate = null;
  }

  /** @returns {Link | null} the connection that was active */
  #dropLink() {
    const link = this.#link;
    if (!link) return null;
    this.#link = null;
    clearTimeout(this.#upgradeTimer);
    clearTimeout(this.#echoTimer);
    clearTimeout(this.#silenceTimer);
    link.close();
    this.#unconfirmed.push(...link.inFlight);
    return link;
  }

  // Messages

  /**
   * @param {string} position
   * @param {string | ArrayBuffer} data
   */
  #onMessage(position, data) {
    if (this.#position !== null && !isAfter(position, this.#position)) return; // duplicate
    this.#position = position;
    this.#matchEcho(data)?.resolve(position);
    this.dispatchEvent(eventOf("message", {position}, {data, lastEventId: position}));
  }

  /**
   * Match a message with one of this client's own: the relay echoes them unchanged and in order.
   *
   * @param {string | ArrayBuffer} data
   */
  #matchEcho(data) {
    const at = this.#unconfirmed.findIndex((message) => message.matches(data));
    if (at >= 0) {
      const [found] = this.#unconfirmed.splice(at, 1);
      this.#flush(); // it may have blocked the queue
      return found;
    }
    const inFlight = this.#link?.inFlight;
    return inFlight?.[0]?.matches(data) ? inFlight.shift() : undefined;
  }

  /**
   * Resend or reject the messages whose echo did not arrive after the reconnect.
   *
   * @param {boolean} isComplete whether all messages since the last connection were replayed
   */
  #settleUnconfirmed(isComplete) {
    const unconfirmed = this.#unconfirmed.splice(0);
    for (const message of unconfirmed) message.shouldResend ||= isComplete && message.isDrained;
    this.#queue.unshift(...unconfirmed.filter((message) => message.shouldResend));
    for (const message of unconfirmed) {
      if (message.shouldResend) message.shouldResend = message.isDrained = false;
      else message.reject(new RelayError("uncertain", "connection lost: delivery unknown"));
    }
    this.#flush();
  }

  /** Unconfirmed messages that may be resent are settled first, which keeps the order. */
  #canSend() {
    /** @param {Outgoing} message */
    const blocksQueue = ({shouldResend, isDrained, isPostPending}) =>
      shouldResend || isDrained || isPostPending;
    return this.#link !== null && !this.#unconfirmed.some(blocksQueue);
  }

  #flush() {
    while (this.#queue.length && this.#canSend() && this.#link?.send(this.#queue[0])) {
      this.#queue.shift();
    }
  }

  // Sleep and wake

  #addPageListeners() {
    this.#pageListeners = new AbortController();
    const {signal} = this.#pageListeners;
    const page = globalThis.document;
    const checkClock = () => this.#checkClock();
    globalThis.addEventListener?.("online", () => this.#onOnline(), {signal});
    globalThis.addEventListener?.("pageshow", checkClock, {signal});
    page?.addEventListener("visibilitychange", checkClock, {signal});
    page?.addEventListener("freeze", () => this.#onFreeze(), {signal});
    page?.addEventListener("resume", () => this.#onThaw(), {signal});
    this.#clockCheckedAt = Date.now();
    this.#clockTimer = setInterval(checkClock, CLOCK_CHECK_MS);
  }

  /** Detect a sleep of the machine by a clock jump: the network may have changed. */
  #checkClock() {
    const now = Date.now();
    const asleepMs = now - this.#clockCheckedAt - CLOCK_CHECK_MS;
    const slept = asleepMs > (this.#wasHidden ? SLEEP_GAP_HIDDEN_MS : SLEEP_GAP_MS);
    this.#clockCheckedAt = now;
    this.#wasHidden = globalThis.document?.visibilityState === "hidden";
    if (slept) this.#verifyLink();
    if (this.#state === "waiting" && !this.#isFrozen && now >= this.#retryAt) this.#connect();
  }

  /** The network is available again, or has changed. */
  #onOnline() {
    this.#verifyLink();
    if (this.#state !== "waiting" || this.#hasRetryHint || this.#isFrozen) return;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = setTimeout(() => this.#connect(), jittered(INITIAL_BACKOFF_MS));
  }

  /**
   * Replace the connection unless it receives a message. A page can't send a ping, and a connection
   * that died during a sleep reports nothing. The new connection resumes at the old one's position
   * and replaces it once it is open: no message is lost.
   */
  #verifyLink() {
    clearTimeout(this.#wakeTimer);
    const [link, since] = [this.#link, Date.now()];
    this.#wakeTimer = setTimeout(() => {
      if (!link || link !== this.#link || link.receivedAt >= since) return;
      link.suspectedAt = Date.now();
      this.#connect();
    }, WAKE_PROBE_MS + jittered(WAKE_PROBE_MS));
  }

  /**
   * Verify a connection whose heartbeat is late, and close it if the silence lasts: its relay is
   * frozen, or the network has lost the connection.
   *
   * @param {Link} link
   * @param {number} heartbeatMs
   */
  #watchHeartbeats(link, heartbeatMs) {
    const lateInMs = link.receivedAt + heartbeatMs + LATE_HEARTBEAT_MS - Date.now();
    clearTimeout(this.#silenceTimer);
    if (lateInMs > 0) {
      this.#silenceTimer = setTimeout(() => this.#watchHeartbeats(link, heartbeatMs), lateInMs);
      return;
    }
    const {receivedAt} = link;
    this.#verifyLink();
    this.#silenceTimer = setTimeout(() => {
      if (link.receivedAt > receivedAt) return this.#watchHeartbeats(link, heartbeatMs);
      this.#onLost({reason: "connection unresponsive"});
    }, SILENCE_MS);
  }

  /** Close the connection of a frozen page: it runs no code, and its messages would pile up. */
  #onFreeze() {
    this.#isFrozen = true;
    this.#attempt += 1;
    this.#dropCandidate();
    this.#dropLink();
    clearTimeout(this.#retryTimer);
    this.#setState("waiting", {reason: "page frozen"});
  }

  #onThaw() {
    if (!this.#isFrozen) return;
    this.#isFrozen = false;
    this.#connect();
  }

  // Events

  /**
   * @param {"connecting" | "open" | "waiting" | "closed"} state
   * @param {{reason?: string, retryInMs?: number}} fields
   */
  #setState(state, {reason = "", retryInMs = 0}) {
    this.#state = state;
    this.#emit("state", {state, transport: this.transport, reason, retryInMs});
  }

  /**
   * @param {string} type
   * @param {object} fields
   */
  #emit(type, fields) {
    this.dispatchEvent(eventOf(type, fields));
  }
}

/** A message that this client sends. */
class Outgoing {
  /** @type {(position: string) => void} */
  #resolve = () => {};
  /** @type {(error: RelayError) => void} */
  #reject = () => {};
  #isSettled = false;
  #onSettled;

  /**
   * @param {string | ArrayBuffer | ArrayBufferView} data
   * @param {(size: number) => void} onSettled
   */
  constructor(data, onSettled) {
    this.#onSettled = onSettled;
    const bytes = bytesOf(data);
    /** A well-formed copy, equal to the echo. */
    this.data = typeof data === "string" ? data.replace(/[\ud800-\udfff]/gu, "\ufffd") : bytes;
    this.size = bytes.byteLength + MESSAGE_OVERHEAD_BYTES;
    /** The message is known not to be relayed. */
    this.shouldResend = false;
    /** The relay was draining when the connection ended. */
    this.isDrained = false;
    /** A POST of the message is in flight. */
    this.isPostPending = false;
    this.relayed = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.relayed.catch(() => {}); // an ignored promise causes no unhandledrejection event
  }

  /** @param {string} position */
  resolve(position) {
    this.#settle();
    this.#resolve(position);
  }

  /** @param {RelayError} error */
  reject(error) {
    this.#settle();
    this.#reject(error);
  }

  /** @param {string | ArrayBuffer} echo */
  matches(echo) {
    if (typeof echo === "string") return echo === this.data;
    if (typeof this.data === "string" || echo.byteLength !== this.data.byteLength) return false;
    const bytes = new Uint8Array(echo);
    return this.data.every((byte, at) => byte === bytes[at]);
  }

  #settle() {
    if (!this.#isSettled) this.#onSettled(this.size);
    this.#isSettled = true;
  }
}

/** A WebSocket link. The relay echoes what it relays; `inFlight` has what is not echoed yet. */
class Socket {
  kind = /** @type {const} */ ("websocket");
  receivedAt = 0;
  suspectedAt = 0; // when it had received nothing for too long; 0: never
  /** @type {Outgoing[]} */
  inFlight = [];
  /** @type {WebSocket | null} */
  #socket = null;
  /** @type {Timer} */
  #deadline;

  /**
   * @param {URL} channelUrl
   * @param {string} token
   * @param {LinkListener} listener
   */
  constructor(channelUrl, token, listener) {
    this.channelUrl = channelUrl;
    this.token = token;
    this.listener = listener;
  }

  open() {
    const offers = this.token ? [SUBPROTOCOL, "bearer", this.token] : [SUBPROTOCOL];
    this.#deadline = setTimeout(() => this.#end({reason: "connect timeout"}), CONNECT_TIMEOUT_MS);
    try {
      this.#socket = new WebSocket(this.channelUrl.href, offers);
    } catch {
      // For example: a page loaded by https:// can't open a ws:// URL.
      return this.#end({reason: "WebSocket URL rejected by the browser"});
    }
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onmessage = ({data}) => this.#onFrame(data);
    this.#socket.onclose = ({code, reason}) => this.#end({code, reason});
  }

  /** @param {Outgoing} message */
  send(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(/** @type {string | BufferSource} */ (message.data));
    this.inFlight.push(message);
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
  #onFrame(data) {
    this.receivedAt = Date.now();
    const [position, payload] = typeof data === "string" ? splitText(data) : splitBytes(data);
    if (position) return this.listener.message(position, payload);
    const event = JSON.parse(String(payload));
    if (event.type === "gap") this.listener.gap(event.position);
    if (event.type !== "welcome") return;
    clearTimeout(this.#deadline);
    this.listener.welcome(event);
  }

  /** @param {End} end */
  #end(end) {
    this.close();
    this.listener.lost(end);
  }
}

/** A link that receives server-sent events and publishes by POST. */
class Stream {
  kind = /** @type {const} */ ("stream");
  /** @type {Outgoing[]} */
  inFlight = [];
  #isClosed = false;
  #isSending = false;
  /** @type {Timer} */
  #postTimer;

  /**
   * @param {URL} channelUrl
   * @param {string} token
   * @param {LinkListener} listener
   */
  constructor(channelUrl, token, listener) {
    this.channelUrl = new URL(channelUrl);
    this.channelUrl.protocol = channelUrl.protocol === "wss:" ? "https:" : "http:";
    this.token = token;
    this.listener = listener;
    this.reader = new EventReader(this);
  }

  get receivedAt() {
    return this.reader.receivedAt;
  }

  get suspectedAt() {
    return this.reader.suspectedAt;
  }

  set suspectedAt(time) {
    this.reader.suspectedAt = time;
  }

  open() {
    this.reader.read(this.channelUrl, this.token);
  }

  /** @param {Outgoing} message */
  send(message) {
    if (this.#isSending) return false; // one POST at a time keeps the order
    this.#isSending = true;
    this.inFlight.push(message);
    this.#post(message);
    return true;
  }

  close() {
    this.#isClosed = true;
    clearTimeout(this.#postTimer);
    this.reader.remove(this);
  }

  /** @param {End} end */
  end(end) {
    if (this.#isClosed) return;
    this.close();
    this.listener.lost(end);
  }

  /** @param {ServerEvent} event */
  onEvent({id, type, data}) {
    if (type === "message") this.listener.message(id, data);
    else if (type === "binary") this.listener.message(id, fromBase64(data));
    else if (type === "close") this.end(JSON.parse(data));
    else if (type === "gap") this.listener.gap(JSON.parse(data).position);
    else if (type === "welcome") this.listener.welcome(JSON.parse(data));
  }

  /** @param {Outgoing} message */
  async #post(message) {
    const isText = typeof message.data === "string";
    const type = isText ? "text/plain; charset=utf-8" : "application/octet-stream";
    const body = /** @type {string | BufferSource} */ (message.data);
    message.shouldResend = false;
    message.isPostPending = true;
    try {
      // The POST completes even if another connection replaces this one meanwhile.
      const init = {method: "POST", headers: {"Content-Type": type}, body};
      const response = await authorizedFetch(this.channelUrl, this.token, init);
      if (response.ok) this.#onRelayed(message, await response.json());
      else this.#onRejected(message, await refusalOf(response));
    } catch {
      message.isPostPending = false;
      this.end({reason: "connection failed"});
    }
  }

  /**
   * @param {Outgoing} message
   * @param {{position: string}} answer
   */
  #onRelayed(message, {position}) {
    message.resolve(position);
    this.#finishPost(message);
  }

  /**
   * @param {Outgoing} message
   * @param {End} end
   */
  #onRejected(message, end) {
    message.isPostPending = false;
    if (end.status === 401) {
      message.shouldResend = true; // over the next connection, which brings a fresh token
      this.end(end);
    } else if (end.status === 503) {
      message.shouldResend = true;
      if (this.#isClosed) return;
      this.#postTimer = setTimeout(() => this.#post(message), end.retryMs ?? INITIAL_BACKOFF_MS);
    } else {
      // A 504 of the relay, or an error of a proxy after it has passed the message on.
      const answer = `${end.status} ${end.reason}`;
      const isUncertain = Number(end.status) >= 500;
      if (isUncertain) message.reject(new RelayError("uncertain", `delivery unknown: ${answer}`));
      else message.reject(new RelayError("refused", `not relayed: ${answer}`));
      this.#finishPost(message);
    }
  }

  /** @param {Outgoing} message */
  #finishPost(message) {
    message.isPostPending = false;
    this.inFlight = this.inFlight.filter((each) => each !== message);
    this.#isSending = false;
    this.listener.ready();
  }
}

/**
 * One event stream, shared by the links of the page that have the same channel and token.
 *
 * Each link opens a reader, which receives the replay that this link requests. At its welcome the
 * links of two readers move to the one at the lower position: its events include all those of the
 * other. A Relay skips what it has received.
 *
 * It uses fetch instead of EventSource: the token goes into a header instead of the URL, and the
 * status of a refusal is visible.
 */
class EventReader {
  /** @type {Set<EventReader>} of the page; two of one channel only if they could not be merged */
  static #open = new Set();

  receivedAt = 0;
  suspectedAt = 0; // when it had received nothing for too long; 0: never
  #key = ""; // readers with the same key receive the same live events
  #position = "";
  #links;
  #abort = new AbortController();
  /** @type {Timer} */
  #deadline;

  /** @param {Stream} link */
  constructor(link) {
    this.#links = new Set([link]);
  }

  /**
   * @param {URL} channelUrl
   * @param {string} token
   */
  async read(channelUrl, token) {
    const url = new URL(channelUrl);
    url.pathname = url.pathname.replace(/\/?$/, "/events");
    const init = {headers: {Accept: "text/event-stream"}, signal: this.#abort.signal};
    this.#deadline = setTimeout(() => this.#onTimeout(), CONNECT_TIMEOUT_MS);
    try {
      const response = await authorizedFetch(url, token, init);
      if (response.status !== 200 || !response.body) return this.#end(await refusalOf(response));
      for (const name of ["since", "history"]) url.searchParams.delete(name);
      this.#key = `${url} ${token}`;
      await this.#readBody(response.body);
      this.#end({reason: "stream ended"});
    } catch {
      this.#end({reason: "connection failed"}); // or rejected by CORS
    }
  }

  /** @param {Stream} link the last one closes the reader */
  remove(link) {
    this.#links.delete(link);
    if (!this.#links.size) this.#close();
  }

  /** @param {NonNullable<Response["body"]>} body */
  async #readBody(body) {
    const events = new EventParser();
    const decoder = new TextDecoder();
    const reader = body.getReader();
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      this.receivedAt = Date.now();
      for (const event of events.feed(decoder.decode(value, {stream: true}))) this.#onEvent(event);
    }
  }

  /** @param {ServerEvent} event */
  #onEvent(event) {
    this.#position = event.id;
    for (const link of this.#links) link.onEvent(event);
    if (event.type === "welcome" && this.#links.size) this.#merge();
  }

  /** Take over the links of another reader of the channel, or give it those of this one. */
  #merge() {
    clearTimeout(this.#deadline);
    const awaitsEchoes = () => [...this.#links].some(({listener}) => listener.awaitsEchoes());
    for (const other of EventReader.#open) {
      if (other.#key !== this.#key) continue;
      if (!isAfter(this.#position, other.#position)) {
        other.#moveLinks(this);
      } else if (other.receivedAt >= other.suspectedAt && !awaitsEchoes()) {
        return this.#moveLinks(other); // not dead, and its lag can't hide an echo in the replay
      }
    }
    EventReader.#open.add(this);
  }

  /** @param {EventReader} target */
  #moveLinks(target) {
    for (const link of this.#links) {
      link.reader = target;
      target.#links.add(link);
    }
    this.#links.clear();
    this.#close();
  }

  #onTimeout() {
    const count = EventReader.#open.size;
    const hint = count < HTTP1_CONNECTIONS ? "" : `: the page has ${count} event streams open`;
    this.#end({reason: `connect timeout${hint}`});
  }

  /** @param {End} end */
  #end(end) {
    if (this.#abort.signal.aborted) return;
    this.#close();
    for (const link of this.#links) link.end(end);
  }

  #close() {
    clearTimeout(this.#deadline);
    EventReader.#open.delete(this);
    this.#abort.abort();
  }
}

/** Parse server-sent events (HTML standard, section 9.2.6). */
class EventParser {
  #partialLine = "";
  #id = "";
  #type = "";
  /** @type {string[]} */
  #data = [];

  /** @param {string} text */
  *feed(text) {
    const lines = (this.#partialLine + text).split(/\r?\n/);
    this.#partialLine = lines.pop() ?? "";
    for (const line of lines) {
      const event = line ? this.#parseLine(line) : this.#takeEvent();
      if (event) yield event;
    }
  }

  /** @param {string} line */
  #parseLine(line) {
    const [, field, value] = /** @type {RegExpExecArray} */ (/^([^:]*):? ?(.*)$/s.exec(line));
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#type = value;
    else if (field === "id") this.#id = value;
  }

  /** @returns {ServerEvent | undefined} */
  #takeEvent() {
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
function channelUrlOf(url, channel) {
  const channelUrl = new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href);
  channelUrl.protocol = channelUrl.protocol.replace(/^http/, "ws");
  if (!/^wss?:$/.test(channelUrl.protocol)) throw new TypeError(`invalid relay URL: ${channelUrl}`);
  channelUrl.username = channelUrl.password = channelUrl.hash = ""; // fetch rejects credentials
  if (channel !== undefined) {
    const path = `/channels/${encodeURIComponent(channel)}`;
    channelUrl.pathname = channelUrl.pathname.replace(/\/?$/, path);
  }
  return channelUrl;
}

/** @param {string | ArrayBuffer | ArrayBufferView} data */
function bytesOf(data) {
  if (typeof data === "string") return encoder.encode(data);
  if (data instanceof ArrayBuffer) return new Uint8Array(data.slice(0));
  if (ArrayBuffer.isView(data)) {
    return new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
  }
  throw new TypeError("message must be a string, an ArrayBuffer or a view of one");
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
  return [String.fromCharCode(...new Uint8Array(buffer, 0, end)), buffer.slice(end + 1)];
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
 * @param {URL} url
 * @param {string} token
 * @param {RequestInit} init
 */
function authorizedFetch(url, token, init) {
  const headers = new Headers(init.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  return fetch(url.href, {...init, headers, cache: "no-store"});
}

/**
 * @param {Response} response
 * @returns {Promise<End>}
 */
async function refusalOf(response) {
  const seconds = response.headers.get("Retry-After") ?? "";
  const retryMs = /^\d+$/.test(seconds) ? Number(seconds) * 1000 + jittered(1000) : undefined;
  const reason = (await response.text().catch(() => "")).trim().slice(0, 200);
  return {status: response.status, reason, retryMs};
}

/** @param {number} maxMs @returns {number} a random delay between half of it and all of it */
function jittered(maxMs) {
  return maxMs / 2 + (Math.random() * maxMs) / 2;
}

/**
 * @typedef {ReturnType<typeof setTimeout> | undefined} Timer
 * @typedef {Socket | Stream} Link
 * @typedef {{recovered: boolean, position: string, heartbeat_ms?: number}} Welcome
 * @typedef {{id: string, type: string, data: string}} ServerEvent
 * @typedef {{code?: number, status?: number, reason?: string, retryMs?: number}} End why a
 *   connection ended or failed to open
 *
 * @typedef {object} LinkListener the callbacks of a link
 * @property {(welcome: Welcome) => void} welcome the link is open
 * @property {(position: string, data: string | ArrayBuffer) => void} message
 * @property {(position: string) => void} gap the relay's log lost messages before this position
 * @property {() => void} ready the link can send again
 * @property {() => boolean} awaitsEchoes the link's replay decides which messages are sent again
 * @property {(end: End) => void} lost the link ended, or failed to open
 */
