// @ts-check
/**
 * Subscribe to channels of a relay and publish to them, over one connection that resumes by itself.
 *
 *     import {Relay} from "https://relay.example/relay.js";
 *
 *     const relay = new Relay("wss://relay.example");
 *     const news = relay.channel("news", {history: 20});
 *     news.addEventListener("message", ({data}) => console.log(data));
 *     await news.publish("hello");
 *
 * The transport is WebSocket with the subprotocol relay.v1. Where WebSockets are blocked, it is one
 * stream of server-sent events for all channels, and POST. One file without dependencies. Its types
 * are in relay.d.ts, with what the public names do. Runs in browsers released since the end of
 * 2021, in workers, Node, Deno and React Native.
 *
 * Knows no page: no DOM beyond the lifecycle events of `document`, and no storage.
 */

const TOKEN_PATTERN = /^[\w.-]*$/; // valid as a subprotocol; covers JSON Web Tokens
const CHANNEL_PATTERN = /^[\w.:-]{1,128}$/;

// Exponential backoff with jitter, so that clients do not reconnect in the same instant.
const INITIAL_BACKOFF_MS = 500;
const MAX_BACKOFF_MS = 30_000;
const MAX_RETRY_AFTER_MS = 300_000; // upper bound for a delay that the relay or a proxy requests
const STABLE_AFTER_MS = 5_000; // a connection of this age resets the backoff

const CONNECT_TIMEOUT_MS = 10_000; // from the attempt to the relay's welcome
const LINGER_MS = 5_000; // until a connection that nothing uses is closed
const REPEAT_POST_MS = 120_000; // the relay remembers an Idempotency-Key for longer
const STREAM_AFTER_BLOCKED = 2; // times in a row that the stream worked and the WebSocket did not
const UPGRADE_RETRY_MS = [60_000, 600_000]; // between WebSocket attempts: first, longest

const TICK_MS = 1_000; // browsers run timers of hidden pages once a minute
const SLEEP_GAP_MS = 15_000; // a longer time between ticks means that the machine slept
const LATE_HEARTBEAT_MS = 500; // after a heartbeat was due, 20 s by default,
const PROBE_MS = 3_000; // a silent connection is probed, and closed within 25 s

const MESSAGE_OVERHEAD_BYTES = 128; // memory of a message besides its payload
const FINAL_BEFORE_OPEN = [400, 404, 405, 426]; // later, a reloading proxy may send them
const NOT_FINAL_OF_POST = [401, 408, 429]; // and all from 500

/** The part of an EventTarget that React Native needs, which has none. */
class SmallEventTarget {
  /** @type {{type: string, listener: any, once: boolean}[]} */
  #entries = [];

  /** @param {string} type @param {any} listener @param {{once?: boolean}} [options] */
  addEventListener(type, listener, options) {
    this.removeEventListener(type, listener);
    this.#entries.push({type, listener, once: options?.once ?? false});
  }

  /** @param {string} type @param {any} listener */
  removeEventListener(type, listener) {
    const isOther = (/** @type {any} */ each) => each.type !== type || each.listener !== listener;
    this.#entries = this.#entries.filter(isOther);
  }

  dispatchEvent(/** @type {Event} */ event) {
    for (const {type, listener, once} of this.#entries.filter((each) => each.type === event.type)) {
      if (once) this.removeEventListener(type, listener);
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

/** @param {EventTarget} target @param {string} type @param {object} fields @param {any} [init] */
function emit(target, type, fields, init) {
  /** @type {any} */
  let event = {type, ...init};
  if (hasEvents) event = init ? new MessageEvent(type, init) : new Event(type);
  target.dispatchEvent(Object.assign(event, fields));
}

/** A message was not published, or that is unknown; or a token was refused. */
export class RelayError extends Error {
  /** @param {ErrorCode} code @param {string} message @param {number} [status] */
  constructor(code, message, status) {
    super(message);
    this.name = "RelayError";
    this.code = code;
    this.status = status;
  }
}

/** What `Relay.channel` returns. The Relay calls the methods which relay.d.ts omits. */
class Channel extends Target {
  #relay;
  #position;
  #onLeave;
  #hasLeft = false;

  /** @param {Relay} relay @param {string} name @param {ChannelOptions} options @param {any} left */
  constructor(relay, name, {history = 0, since = null}, left) {
    super();
    this.name = name;
    this.history = history;
    this.#relay = relay;
    this.#position = since;
    this.#onLeave = left;
  }

  get position() {
    return this.#position;
  }

  publish(/** @type {Data} */ data) {
    return this.#relay.publish(this.name, data);
  }

  leave() {
    this.#hasLeft = true;
    this.#onLeave();
  }

  /** @param {string} type @param {object} fields @param {MessageEventInit} [init] */
  emit(type, fields, init) {
    if (!this.#hasLeft) emit(this, type, fields, init); // another member may have ended this one
  }

  /** @param {string} position @param {string | Uint8Array} payload */
  onMessage(position, payload) {
    if (!this.onPosition(position)) return; // a duplicate
    const data = typeof payload === "string" ? payload : payload.slice().buffer;
    this.emit("message", {position}, {data, lastEventId: position});
  }

  /** @param {string} position all messages up to which were received */
  onPosition(position) {
    const isNew = isAfter(position, this.#position);
    if (isNew) this.#position = position;
    return isNew;
  }

  onLive(/** @type {string} */ position) {
    const isFirst = this.#position === null;
    this.onPosition(position);
    if (isFirst) this.emit("subscribed", {recovered: true, position});
  }

  /** @param {string} position up to which messages may be missing */
  onGap(position) {
    const since = this.#position;
    this.#position = position;
    this.emit("gap", {since, position});
  }
}

/** One connection to a relay. It opens when it is used, and reconnects until it is refused. */
export class Relay extends Target {
  #url;
  #options;
  /** @type {RelayState} */
  #state = "idle";
  /** @type {Link | null} */
  #link = null;
  #isOpen = false; // the welcome of the link has arrived
  /** @type {Link["kind"]} of the last open link */
  #kind = "websocket";
  #attempt = 0; // number of the attempt: one that awaited a token detects that it is stale
  #wasOpen = false;
  #openedAt = 0;
  #failureCount = 0; // consecutive
  #unauthorizedCount = 0; // consecutive
  #blockedCount = 0; // consecutive: the stream worked, the WebSocket did not
  #upgradeMs = UPGRADE_RETRY_MS[0];
  #retryAt = 0;
  #isRetryFixed = false; // the relay requested the delay, or the page is frozen
  #heartbeatMs = 0;
  #receivedAt = 0;
  #probedAt = 0; // 0: the connection is not probed
  #tickedAt = 0;
  /** @type {Record<string, Timer>} by name: connect, retry, upgrade, linger, tick */
  #timers = {};
  /** @type {AbortController | null} removes the page's event listeners */
  #pageListeners = null;

  /** @type {Map<string, Subscription>} by channel */
  #subscriptions = new Map();
  #session = "";
  #seen = ""; // the last position received
  #lastId = 0; // of a command: they grow over all connections
  /** @type {Map<number, OnAnswer>} by id: commands in flight, without publishes */
  #commands = new Map();
  /** @type {Outgoing[]} sent by WebSocket and not answered, in the order of their ids */
  #sent = [];
  /** @type {Outgoing[]} not sent yet; of the first one a POST may be in flight */
  #queue = [];
  #pendingBytes = 0; // of both
  #isPosting = false;

  /** @param {string | URL} url @param {import("./relay.js").RelayOptions} [options] */
  constructor(url, options = {}) {
    super();
    this.#url = url;
    const bounds = {maxQueuedMessages: 1_000, maxPendingBytes: 8 * 1024 * 1024};
    this.#options = {token: null, ...bounds, ...options};
  }

  get state() {
    return this.#state;
  }

  get transport() {
    return this.#state === "open" ? this.#kind : null;
  }

  get queued() {
    return this.#queue.length;
  }

  get token() {
    return this.#options.token;
  }

  set token(token) {
    this.#options.token = token;
    this.renewToken().catch(() => {}); // a failure shows when the previous token expires
  }

  /** @param {string} name @param {ChannelOptions} [options] */
  channel(name, options = {}) {
    this.#urlOf(name);
    const added = {name, members: [], requestId: 0, isActive: false};
    /** @type {Subscription} */
    const subscription = this.#subscriptions.get(name) ?? added;
    /** @type {Channel} */
    const channel = new Channel(this, name, options, () => this.#leave(subscription, channel));
    const [first] = subscription.isActive ? subscription.members : [];
    const isReplayed = !first || channel.history > 0 || channel.position !== null;
    const position = first?.position ?? null;
    if (!isReplayed && position) queueMicrotask(() => channel.onLive(position));
    this.#subscriptions.set(name, subscription);
    subscription.members = [...subscription.members, channel];
    if (this.#state === "idle") this.#start();
    else if (this.#isOpen && isReplayed) this.#subscribe(subscription);
    return channel;
  }

  /** @param {string} channel @param {Data} data */
  publish(channel, data) {
    const [url, bytes] = [this.#urlOf(channel), bytesOf(data)];
    const size = bytes.length + MESSAGE_OVERHEAD_BYTES;
    const content = {url, channel, data: typeof data === "string" ? data : bytes, size};
    const message = {...content, id: 0, seen: "", key: "", postedAt: 0, ...deferred()};
    const {maxPendingBytes, maxQueuedMessages} = this.#options;
    this.#pendingBytes += size;
    if (this.#state === "closed") {
      this.#settle(message, new RelayError("closed", "the connection is closed"));
    } else if (this.#pendingBytes > maxPendingBytes || this.#queue.length >= maxQueuedMessages) {
      this.#settle(message, new RelayError("full", "too many messages are pending"));
    } else {
      this.#queue.push(message);
      if (this.#state === "idle") this.#start();
      else this.#flush();
    }
    return message.published;
  }

  async renewToken() {
    const attempt = this.#attempt;
    const token = await this.#fetchToken();
    if (attempt !== this.#attempt) return; // a later one has brought it
    if (["idle", "waiting", "closed"].includes(this.#state)) return; // the next one brings it
    const link = this.#link;
    if (!this.#isOpen || link?.kind !== "websocket") return this.#connect();
    const {type, status, reason} = await new Promise((resolve) => {
      this.#request(link, {type: "token", token}, resolve);
    });
    if (type === "error") throw new RelayError("refused", `${status} ${reason}`, status);
  }

  open() {
    if (this.#state === "waiting") this.#connect();
    else if (this.#state === "closed") this.#start();
  }

  close() {
    if (this.#state === "closed") return;
    this.#shutDown(new RelayError("closed", "the page closed the connection"));
    this.#setState("closed");
  }

  // Connecting

  #start() {
    this.#failureCount = this.#unauthorizedCount = this.#blockedCount = 0;
    this.#wasOpen = false;
    this.#addPageListeners();
    this.#connect();
  }

  /** Close a connection that nothing uses, after some time: a page may leave and join at once. */
  #linger() {
    this.#setTimer("linger", LINGER_MS, () => {
      const useCount = this.#subscriptions.size + this.#queue.length + this.#sent.length;
      if (useCount || this.#state === "closed") return;
      this.#shutDown();
      this.#setState("idle");
    });
  }

  /** @param {string} name @param {number} delayMs @param {() => void} act */
  #setTimer(name, delayMs, act) {
    clearTimeout(this.#timers[name]);
    this.#timers[name] = setTimeout(act, delayMs);
  }

  /** Open a connection. It replaces an active one, and resumes where that one ends. */
  async #connect(kind = this.#isBlocked() ? "stream" : "websocket") {
    const isReplacement = this.#isOpen;
    this.#dropLink();
    const attempt = this.#attempt;
    if (!isReplacement) this.#setState("connecting");
    const token = await this.#fetchToken().catch(() => undefined); // the page knows the cause
    if (attempt !== this.#attempt) return;
    if (token === undefined) return this.#retry({reason: "the page has no token"});
    if (TOKEN_PATTERN.test(token)) return this.#openLink(kind, token);
    this.#onRefused({status: 401, reason: "a token has letters, digits, dots, - and _ only"});
  }

  /** Messages that were sent by WebSocket would be unconfirmed: they are worth more attempts. */
  #isBlocked() {
    return this.#blockedCount >= STREAM_AFTER_BLOCKED * (this.#sent.length ? 2 : 1);
  }

  async #fetchToken() {
    const {token} = this.#options;
    return (await (typeof token === "function" ? token() : token)) ?? "";
  }

  /** @param {string} kind @param {string} token */
  #openLink(kind, token) {
    /** @type {LinkListener} */
    const listener = {
      received: (header, payload) => link === this.#link && this.#onReceived(link, header, payload),
      ended: (end) => link === this.#link && this.#onEnded(link, end),
    };
    /** @type {Link} */
    const link = kind === "websocket"
      ? openSocket(this.#socketUrl(), token, this.#options.WebSocket, listener)
      : openStream(this.#urlOf(), token, [...this.#subscriptions.values()], listener);
    this.#link = link;
    const timeout = {reason: "connect timeout"};
    this.#setTimer("connect", CONNECT_TIMEOUT_MS, () => listener.ended(timeout));
  }

  #socketUrl() {
    const url = this.#urlOf();
    url.protocol = url.protocol.replace("http", "ws");
    if (this.#session) url.searchParams.set("session", this.#session);
    if (this.#session && this.#sent.length) url.searchParams.set("seen", this.#sent[0].seen);
    return url;
  }

  /** @param {string} [channel] @returns {URL} of the relay or of the channel, by HTTP */
  #urlOf(channel) {
    const url = new URL(this.#url, globalThis.document?.baseURI ?? globalThis.location?.href);
    url.protocol = url.protocol.replace(/^ws/, "http");
    if (!/^https?:$/.test(url.protocol)) throw new TypeError(`invalid relay URL: ${this.#url}`);
    url.username = url.password = url.hash = ""; // fetch rejects credentials
    const path = channel === undefined ? "/" : `/channels/${channel}`;
    url.pathname = url.pathname.replace(/\/?$/, path);
    if (channel === undefined || CHANNEL_PATTERN.test(channel)) return url;
    throw new TypeError(`invalid channel name: ${channel}`);
  }

  /** @param {Link} link @param {Header} welcome */
  #onWelcome(link, welcome) {
    this.#blockedCount = link.kind === "stream" ? this.#blockedCount + 1 : 0;
    if (link.kind === "stream" && !this.#isBlocked()) {
      return this.#retry({reason: "WebSocket blocked"});
    }
    clearTimeout(this.#timers.connect);
    this.#isOpen = this.#wasOpen = true;
    this.#unauthorizedCount = this.#probedAt = 0;
    this.#openedAt = Date.now();
    this.#heartbeatMs = welcome.heartbeat_ms ?? Infinity;
    const isReplacement = this.transport === link.kind;
    this.#kind = link.kind;
    if (!isReplacement) this.#setState("open");
    if (link !== this.#link) return; // the page has closed it in that event
    if (link.kind === "websocket") this.#resumeSession(link, welcome);
    else this.#resumeStream(link, welcome);
    this.#flush();
    this.#linger();
  }

  /** @param {SocketLink} link @param {Header} welcome */
  #resumeSession(link, {session = "", resumed, position}) {
    this.#upgradeMs = UPGRADE_RETRY_MS[0];
    if (!resumed) {
      this.#rejectSent("the session has expired");
      this.#seen = position;
    }
    this.#session = session;
    for (const {channel, id, data} of this.#sent) link.publish(channel, id, data); // once in all
    for (const subscription of this.#subscriptions.values()) this.#subscribe(subscription);
  }

  /** @param {StreamLink} link @param {Header} welcome */
  #resumeStream(link, welcome) {
    this.#scheduleUpgrade(link);
    this.#rejectSent("WebSockets are blocked"); // a POST is in no session
    let isComplete = true;
    for (const each of this.#subscriptions.values()) {
      const isIn = link.subscriptions.includes(each); // or it was joined in the meantime
      isComplete = isIn && this.#onSubscribed(each, link.replay, welcome) && isComplete;
    }
    if (!isComplete && link === this.#link) this.#connect();
  }

  /** @param {StreamLink} link to be replaced by a WebSocket, once one opens */
  #scheduleUpgrade(link) {
    this.#setTimer("upgrade", this.#upgradeMs, () => {
      this.#upgradeMs = Math.min(this.#upgradeMs * 2, UPGRADE_RETRY_MS[1]);
      this.#scheduleUpgrade(link);
      const received = () => {
        trial.close();
        if (link === this.#link) this.#connect("websocket");
      };
      const {WebSocket} = this.#options;
      const listener = {received, ended: () => {}};
      const trial = openSocket(this.#socketUrl(), link.token, WebSocket, listener);
    });
  }

  /** @param {Link} link @param {End} end */
  #onEnded(link, end) {
    if (this.#isOpen) return this.#onLost(end);
    if (link.kind === "websocket") {
      link.close();
      // A browser hides why an upgrade failed; the status of a stream request is visible.
      return this.#openLink("stream", link.token);
    }
    if (end.status === 403) return this.#refuseChannels(link, end);
    this.#blockedCount = 0; // the next attempt is a WebSocket
    this.#retry(end);
  }

  /** @param {StreamLink} link that is refused for some of its channels @param {End} end */
  async #refuseChannels(link, end) {
    const {subscriptions} = link;
    const ends = subscriptions.length > 1 ? await link.probeChannels().catch(() => []) : [end];
    if (link !== this.#link) return;
    subscriptions.forEach((each, at) => ends[at]?.status === 403 && this.#refuse(each, ends[at]));
    this.#retry({reason: end.reason});
  }

  #onLost(/** @type {End} */ end) {
    if (end.code === 1009) this.#rejectLargest(end.reason);
    if (Date.now() - this.#openedAt >= STABLE_AFTER_MS) this.#failureCount = 0;
    const status = end.code === 3000 ? 401 : end.status;
    this.#retry({...end, status, code: end.code ?? 1006});
  }

  /** @param {End} end after which the client connects again, unless it is final */
  #retry(end) {
    this.#dropLink();
    const {code, status = 0, reason = ""} = end;
    const hasFreshToken = typeof this.#options.token === "function" && !this.#unauthorizedCount;
    if (status === 401) this.#unauthorizedCount += 1;
    if (status === 401 && !hasFreshToken) return this.#onRefused(end);
    if (!this.#wasOpen && FINAL_BEFORE_OPEN.includes(status)) return this.#onRefused(end);
    const drainMs = code === 1001 ? /retry_ms=(\d+)/.exec(reason)?.[1] : undefined;
    const hintMs = end.retryMs ?? drainMs;
    this.#isRetryFixed = hintMs !== undefined;
    const delayMs = hintMs === undefined ? backoffAfter(this.#failureCount++) : Number(hintMs);
    const waitMs = Math.min(delayMs, MAX_RETRY_AFTER_MS);
    this.#retryAt = Date.now() + waitMs;
    this.#setTimer("retry", waitMs, () => this.#connect());
    this.#setState("waiting", end, Math.round(waitMs));
  }

  #onRefused(/** @type {End} */ end) {
    const {status, reason = ""} = end;
    this.#shutDown(new RelayError("refused", `${status} ${reason}`, status));
    this.#setState("closed", end);
    emit(this, "refused", {status, reason});
  }

  /** @param {RelayError} [error] of queued messages */
  #shutDown(error) {
    this.#dropLink();
    this.#pageListeners?.abort();
    if (error) this.#rejectSent(error.message);
    if (error) for (const message of this.#queue.splice(0)) this.#settle(message, error);
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
  }

  #dropLink() {
    for (const name of ["connect", "retry", "upgrade"]) clearTimeout(this.#timers[name]);
    this.#attempt += 1;
    this.#link?.close();
    this.#link = null;
    this.#isOpen = false;
    for (const each of this.#subscriptions.values()) {
      each.isActive = false;
      each.requestId = 0;
    }
    for (const onAnswer of this.#commands.values()) onAnswer({type: "lost", position: ""});
    this.#commands.clear();
  }

  /** @param {RelayState} state @param {End} [end] @param {number} [retryInMs] */
  #setState(state, end = {}, retryInMs = 0) {
    const {code, status, reason = ""} = end;
    this.#state = state;
    const {transport} = this;
    emit(this, "state", {state, transport, code, status, reason, retryInMs});
  }

  // Receiving

  /** @param {Link} link @param {Header} header @param {string | Uint8Array} payload */
  #onReceived(link, header, payload) {
    this.#receivedAt = Date.now();
    const {type, id, channel = "", position} = header;
    if (type === "welcome") return this.#onWelcome(link, header);
    if (position && isAfter(position, this.#seen)) this.#seen = position;
    if (id) return this.#onAnswer(id, header);
    const subscription = this.#subscriptions.get(channel);
    if (!subscription?.isActive) return; // of an earlier subscription: it will be replayed
    if (type === "unsubscribed") return this.#refuse(subscription, header);
    for (const member of subscription.members) {
      if (type === "live") member.onLive(position);
      else if (member.position === null) continue; // the replay is that of other members
      else if (type === undefined) member.onMessage(position, payload);
      else if (type === "gap" && isAfter(position, member.position)) member.onGap(position);
    }
    if (link.kind === "websocket" || type !== undefined) return;
    for (const {isActive, members} of this.#subscriptions.values()) { // a stream has one order
      if (isActive) for (const member of members) member.onPosition(position);
    }
  }

  /** @param {number} id @param {Header} answer */
  #onAnswer(id, answer) {
    const at = this.#sent.findIndex((message) => message.id === id);
    if (at >= 0) {
      const {type, position, status, reason} = answer;
      const code = status === 504 ? "unconfirmed" : "refused";
      const error = new RelayError(code, `${status} ${reason}`, status);
      return this.#settle(this.#sent.splice(at, 1)[0], type === "error" ? error : position);
    }
    const onAnswer = this.#commands.get(id);
    this.#commands.delete(id);
    onAnswer?.(answer);
  }

  // Subscribing

  #subscribe(/** @type {Subscription} */ subscription) {
    const link = this.#link;
    if (link?.kind !== "websocket") return void this.#connect();
    const {name, members, requestId} = subscription;
    if (requestId) this.#request(link, {type: "unsubscribe", channel: name});
    const replay = replayFor(members);
    const command = {type: "subscribe", channel: name, ...replay};
    subscription.isActive = false;
    const id = (subscription.requestId = this.#request(link, command, (answer) => {
      if (id !== subscription.requestId) return; // it was repeated or ended in the meantime
      const isError = answer.type === "error";
      if (isError && answer.status !== 503) return this.#refuse(subscription, answer);
      const repeat = () => id === subscription.requestId && this.#subscribe(subscription);
      if (isError) setTimeout(repeat, retryMsOf(answer.retry_after_s));
      else if (!this.#onSubscribed(subscription, replay, answer)) repeat();
    }));
  }

  /**
   * Return whether all members receive all messages now. A replay by `history` may begin after the
   * position of some: it only shows where the new members begin, and is repeated with `since`.
   *
   * @param {Subscription} subscription @param {Replay} replay @param {Header} answer
   */
  #onSubscribed(subscription, {since, history = 0}, {recovered, position}) {
    const {members} = subscription;
    const isComplete = since !== undefined || members.every((each) => each.position === null);
    subscription.isActive = isComplete;
    for (const member of members) {
      const before = member.position;
      const isLater = before === null && !member.history && (since || history > 0);
      if (isLater && this.#link?.kind === "websocket") continue; // until "live"
      // A log that was created anew begins before `since`.
      if (before === null) member.onPosition(position);
      else if (since && !recovered && (!isAfter(before, position) || isAfter(since, position))) {
        member.onGap(position);
      }
      if (isComplete) member.emit("subscribed", {recovered, position});
    }
    return isComplete;
  }

  /** @param {Subscription} subscription @param {End} refusal */
  #refuse(subscription, {status, reason}) {
    const {members} = subscription;
    this.#endSubscription(subscription);
    for (const member of members) member.emit("refused", {status, reason});
  }

  /** @param {Subscription} subscription @param {Channel} channel */
  #leave(subscription, channel) {
    const {name, members, requestId} = subscription;
    subscription.members = members.filter((each) => each !== channel);
    if (subscription.members.length || this.#subscriptions.get(name) !== subscription) return;
    const link = this.#link;
    if (link?.kind === "websocket" && requestId) {
      this.#request(link, {type: "unsubscribe", channel: name});
    }
    this.#endSubscription(subscription);
  }

  #endSubscription(/** @type {Subscription} */ subscription) {
    subscription.isActive = false;
    subscription.requestId = 0;
    this.#subscriptions.delete(subscription.name);
    this.#linger();
  }

  // Publishing

  /** @param {SocketLink} link @param {object} command @param {OnAnswer} [onAnswer] */
  #request(link, command, onAnswer) {
    const id = ++this.#lastId;
    if (onAnswer) this.#commands.set(id, onAnswer);
    link.send({...command, id});
    return id;
  }

  #flush() {
    const link = this.#link;
    if (!link || !this.#isOpen) return;
    if (link.kind === "stream" || this.#queue[0]?.key) return void this.#postQueue();
    for (const message of this.#queue.splice(0)) {
      message.id = ++this.#lastId;
      message.seen = this.#seen;
      this.#sent.push(message);
      link.publish(message.channel, message.id, message.data);
    }
  }

  /** Publish by POST, one message at a time, which keeps the order. */
  async #postQueue() {
    if (this.#isPosting) return;
    this.#isPosting = true;
    for (let failureCount = 0; this.#link && this.#isOpen && this.#queue.length; ) {
      const [message] = this.#queue;
      if (this.#link.kind === "websocket" && !message.key) break;
      await this.#post(message, this.#link, failureCount);
      failureCount = message === this.#queue[0] ? failureCount + 1 : 0;
    }
    this.#isPosting = false;
    if (this.#link?.kind === "websocket") this.#flush();
  }

  /** @param {Outgoing} message @param {Link} link @param {number} failureCount of this message */
  async #post(message, link, failureCount) {
    message.key ||= randomKey();
    message.postedAt ||= Date.now();
    const {position, status = 0, reason, retryMs} = await post(message, link.token);
    if (this.#queue[0] !== message) return; // it was rejected when the connection was closed
    if (status === 503) message.postedAt = 0; // it was not published
    const isOld = message.postedAt > 0 && Date.now() - message.postedAt > REPEAT_POST_MS;
    const isRefused = status >= 400 && status < 500 && !NOT_FINAL_OF_POST.includes(status);
    if (position !== undefined || isOld || isRefused) {
      const code = isRefused ? "refused" : "unconfirmed";
      this.#queue.shift();
      this.#settle(message, position ?? new RelayError(code, `${status} ${reason}`, status));
    } else if (status && status !== 401) {
      await new Promise((done) => setTimeout(done, retryMs ?? backoffAfter(failureCount)));
    } else if (link === this.#link) {
      this.#onLost({status, reason}); // the next connection has a fresh token
    }
  }

  /** @param {Outgoing} message @param {string | RelayError} outcome */
  #settle(message, outcome) {
    this.#pendingBytes -= message.size;
    if (outcome instanceof RelayError) message.reject(outcome);
    else message.resolve(outcome);
    this.#linger();
  }

  /** @param {string} reason why it is unknown what became of the messages that were sent */
  #rejectSent(reason) {
    for (const message of this.#sent.splice(0)) {
      this.#settle(message, new RelayError("unconfirmed", reason));
    }
  }

  /** Reject the message for which the relay has closed: sent again, it would have the same end. */
  #rejectLargest(reason = "") {
    const sizes = this.#sent.map(({size}) => size);
    const [message] = this.#sent.splice(sizes.indexOf(Math.max(...sizes)), 1);
    if (message) this.#settle(message, new RelayError("refused", reason, 413));
  }

  // Sleep and wake

  #addPageListeners() {
    this.#pageListeners = new AbortController();
    const {signal} = this.#pageListeners;
    const page = globalThis.document;
    const tick = () => this.#tick();
    globalThis.addEventListener?.("online", () => this.#onOnline(), {signal});
    globalThis.addEventListener?.("pageshow", tick, {signal});
    page?.addEventListener("visibilitychange", tick, {signal});
    page?.addEventListener("freeze", () => this.#onFreeze(), {signal});
    page?.addEventListener("resume", () => this.open(), {signal});
    this.#tickedAt = Date.now();
    this.#timers.tick = setInterval(tick, TICK_MS);
  }

  /** Probe a connection that is silent for too long, or whose machine slept; close a dead one. */
  #tick() {
    const now = Date.now();
    const slept = now - this.#tickedAt > SLEEP_GAP_MS; // the network may have changed
    const isLate = now - this.#receivedAt > this.#heartbeatMs + LATE_HEARTBEAT_MS;
    this.#tickedAt = now;
    if (this.#state === "waiting" && now >= this.#retryAt) this.#connect();
    if (this.#probedAt && this.#receivedAt >= this.#probedAt) this.#probedAt = 0;
    if (!this.#isOpen) return;
    if (this.#probedAt && now - this.#probedAt >= PROBE_MS) {
      this.#onLost({reason: "connection unresponsive"});
    } else if (slept || isLate) {
      this.#probe(isLate);
    }
  }

  /** @param {boolean} isLate a stream can't be probed: it is closed once its heartbeat is late */
  #probe(isLate) {
    const link = this.#link;
    if (!link || !this.#isOpen || this.#probedAt) return;
    if (link.kind === "websocket") this.#request(link, {type: "ping"});
    if (link.kind === "websocket" || isLate) this.#probedAt = Date.now();
  }

  /** The network is available again, or has changed. */
  #onOnline() {
    this.#probe(false);
    if (this.#state !== "waiting" || this.#isRetryFixed) return;
    this.#setTimer("retry", jittered(INITIAL_BACKOFF_MS), () => this.#connect());
  }

  /** Close the connection of a frozen page: it runs no code, and its messages would pile up. */
  #onFreeze() {
    this.#dropLink();
    this.#retryAt = Infinity;
    this.#isRetryFixed = true;
    this.#setState("waiting", {reason: "page frozen"});
  }
}

/**
 * Open a connection by WebSocket.
 *
 * @param {URL} url @param {string} token @param {any} WebSocket @param {LinkListener} listener
 */
function openSocket(url, token, WebSocket = globalThis.WebSocket, {received, ended}) {
  /** @type {any} */
  let socket;
  try {
    socket = new WebSocket(url.href, token ? ["relay.v1", "bearer", token] : ["relay.v1"]);
    socket.binaryType = "arraybuffer";
    socket.onmessage = (/** @type {MessageEvent} */ {data}) => received(...parseFrame(data));
    socket.onclose = (/** @type {CloseEvent} */ {code, reason}) => ended({code, reason});
    socket.onerror = () => {}; // the package `ws` throws an error that is not handled
  } catch {
    // For example: a page loaded by https:// can't open a ws:// URL; Node 20 has no WebSocket.
    queueMicrotask(() => ended({reason: "no WebSocket can be created"}));
  }
  return {
    kind: /** @type {const} */ ("websocket"),
    token,
    /** @param {object} header */
    send: (header) => socket?.send(JSON.stringify(header)),
    /** @param {string} channel @param {number} id @param {string | Uint8Array} data */
    publish(channel, id, data) {
      const line = `${JSON.stringify({type: "publish", channel, id})}\n`;
      if (typeof data === "string") return socket?.send(line + data);
      const header = Uint8Array.from(line, (char) => char.charCodeAt(0)); // it is ASCII
      const frame = new Uint8Array(header.length + data.length);
      frame.set(header);
      frame.set(data, header.length);
      socket?.send(frame);
    },
    close() {
      if (!socket) return;
      socket.onmessage = socket.onclose = null;
      socket.close();
    },
  };
}

/**
 * Open a connection by server-sent events, one stream for all channels. Its events are passed on as
 * messages of relay.v1. Without a channel there is no stream, and only POSTs are made.
 *
 * It uses fetch instead of EventSource: the token goes into a header instead of the URL, and the
 * status of a refusal is visible.
 *
 * @param {URL} url @param {string} token @param {Subscription[]} all @param {LinkListener} listener
 */
function openStream(url, token, all, {received, ended}) {
  const abort = new AbortController();
  const replay = replayFor(all.flatMap(({members}) => members));

  /** @param {Subscription[]} some @param {Replay} replay */
  function get(some, {since, history}) {
    const streamUrl = new URL(url);
    streamUrl.pathname += some.length ? "events" : "relay.js"; // is it a relay?
    for (const {name} of some) streamUrl.searchParams.append("channel", name);
    if (since) streamUrl.searchParams.set("since", since);
    if (history) streamUrl.searchParams.set("history", String(history));
    const method = some.length ? "GET" : "HEAD";
    return authorizedFetch(streamUrl, token, {method, signal: abort.signal});
  }

  async function read() {
    const response = await get(all, replay);
    if (!response.ok) return refusalOf(response);
    if (!all.length) return void received({type: "welcome", position: ""}, "");
    const decoder = new TextDecoder();
    const reader = /** @type {NonNullable<Response["body"]>} */ (response.body).getReader();
    for (let pending = ""; ; ) {
      const {done, value} = await reader.read();
      if (done) return {reason: "stream ended"};
      received({type: "heartbeat", position: ""}, ""); // or a comment
      const events = (pending + decoder.decode(value, {stream: true})).split("\n\n");
      pending = events.pop() ?? "";
      for (const event of events) onEvent(parseEvent(event));
    }
  }

  /** @param {ServerEvent} event its type has the channel where the stream has several */
  function onEvent({id: position, event, data}) {
    if (data === undefined) return;
    const [type, channel = all[0].name] = event.split(/:(.*)/);
    if (type === "message") received({channel, position}, data);
    else if (type === "binary") received({channel, position}, fromBase64(data));
    else if (type === "close") ended(JSON.parse(data));
    else if (type === "welcome") received({...JSON.parse(data), type}, "");
    else if (type === "gap") all.forEach(({name}) => received({type, channel: name, position}, ""));
  }

  const lost = {reason: "connection failed"}; // or rejected by CORS
  read().then((end) => end && ended(end), () => ended(lost));
  return {
    kind: /** @type {const} */ ("stream"),
    token,
    replay,
    subscriptions: all,
    /** Return how the relay answers for each channel alone. */
    probeChannels: () => Promise.all(all.map(async (each) => refusalOf(await get([each], {})))),
    close: () => abort.abort(),
  };
}

/** @param {string} text a server-sent event (HTML standard, section 9.2.6) */
function parseEvent(text) {
  /** @type {{id: string, event: string, data?: string}} */
  const fields = {id: "", event: "message"};
  for (const line of text.split("\n")) {
    const [, name, value] = /^(\w+): ?(.*)$/s.exec(line) ?? [];
    const before = fields.data === undefined ? "" : `${fields.data}\n`;
    if (name === "data") fields.data = before + value;
    else if (name === "id" || name === "event") fields[name] = value;
  }
  return fields;
}

/** @param {string | ArrayBuffer} frame @returns {[Header, string | Uint8Array]} and the payload */
function parseFrame(frame) {
  if (typeof frame === "string") {
    const end = frame.indexOf("\n");
    return [JSON.parse(frame.slice(0, end)), frame.slice(end + 1)];
  }
  const bytes = new Uint8Array(frame);
  const end = bytes.indexOf(10);
  return [JSON.parse(String.fromCharCode(...bytes.subarray(0, end))), bytes.subarray(end + 1)];
}

/** @param {Channel[]} members @returns what the relay has to replay for them */
function replayFor(members) {
  const positions = members.flatMap(({position}) => position ?? []);
  const newMembers = members.filter(({position}) => position === null);
  const history = Math.max(0, ...newMembers.map((each) => each.history));
  /** @type {Replay} */
  const replay = {};
  if (history) replay.history = history;
  else if (positions.length) replay.since = positions.reduce((a, b) => (isAfter(a, b) ? b : a));
  return replay;
}

/** Return the promise of a message's position, and its two functions. */
function deferred() {
  let resolve = (/** @type {string} */ _) => {};
  let reject = (/** @type {RelayError} */ _) => {};
  /** @type {Promise<string>} */
  const published = new Promise((...functions) => ([resolve, reject] = functions));
  published.catch(() => {}); // an ignored promise causes no unhandledrejection event
  return {published, resolve, reject};
}

/** @param {Data} data */
function bytesOf(data) {
  if (typeof data === "string") return new TextEncoder().encode(data);
  if (data instanceof ArrayBuffer) return new Uint8Array(data.slice(0));
  if (ArrayBuffer.isView(data)) {
    return new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
  }
  throw new TypeError("message must be a string, an ArrayBuffer or a view of one");
}

/** @param {string} text */
function fromBase64(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}

/** Return an Idempotency-Key. A page without TLS has no `crypto.randomUUID`. */
function randomKey() {
  return crypto.getRandomValues(new Uint32Array(4)).join("-");
}

/**
 * Compare two positions: three numbers each, of up to 64 bits.
 *
 * @param {string} one @param {string | null} other null: before all
 */
function isAfter(one, other) {
  const [ours, theirs] = [one, other ?? ""].map((position) => position.split("-").map(BigInt));
  const at = ours.findIndex((number, index) => number !== theirs[index]);
  return at >= 0 && ours[at] > (theirs[at] ?? -1n);
}

/** @param {Outgoing} message @param {string} token @returns {Promise<End & {position?: string}>} */
async function post({url, data, key}, token) {
  const type = typeof data === "string" ? "text/plain; charset=utf-8" : "application/octet-stream";
  const headers = {"Content-Type": type, "Idempotency-Key": key};
  const body = /** @type {string | BufferSource} */ (data);
  try {
    const response = await authorizedFetch(url, token, {method: "POST", headers, body});
    return response.ok ? await response.json() : await refusalOf(response);
  } catch {
    return {reason: "connection failed"};
  }
}

/** @param {URL} url @param {string} token @param {RequestInit} init */
function authorizedFetch(url, token, init) {
  const headers = new Headers(init.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  return fetch(url.href, {...init, headers, cache: "no-store"});
}

/** @param {Response} response @returns {Promise<End>} */
async function refusalOf(response) {
  if (response.ok) return {};
  const seconds = response.headers.get("Retry-After") ?? "";
  const retryMs = /^\d+$/.test(seconds) ? retryMsOf(Number(seconds)) : undefined;
  const reason = (await response.text().catch(() => "")).trim().slice(0, 200);
  return {status: response.status, reason, retryMs};
}

/** Return the delay that the relay requests, with jitter. */
function retryMsOf(seconds = 1) {
  return Math.min(seconds * 1000, MAX_RETRY_AFTER_MS) + jittered(1000);
}

/** @param {number} failureCount */
function backoffAfter(failureCount) {
  return jittered(Math.min(MAX_BACKOFF_MS, INITIAL_BACKOFF_MS * 2 ** Math.min(failureCount, 10)));
}

/** @param {number} maxMs @returns {number} a random delay between half of it and all of it */
function jittered(maxMs) {
  return maxMs / 2 + (Math.random() * maxMs) / 2;
}

/**
 * @typedef {import("./relay.js").ChannelOptions} ChannelOptions
 * @typedef {import("./relay.js").RelayState} RelayState
 * @typedef {import("./relay.js").RelayErrorCode} ErrorCode
 * @typedef {string | ArrayBuffer | ArrayBufferView} Data
 * @typedef {(answer: Header) => void} OnAnswer
 * @typedef {{url: URL, channel: string, data: string | Uint8Array, size: number, id: number,
 *   seen: string, key: string, postedAt: number} & ReturnType<typeof deferred>} Outgoing a message
 *   to publish. When it is sent, it is given an id and the last position received before (`seen`),
 *   or the key of its POSTs and the time of the first one that may have published it
 * @typedef {ReturnType<typeof setTimeout> | undefined} Timer
 * @typedef {ReturnType<typeof openSocket>} SocketLink
 * @typedef {ReturnType<typeof openStream>} StreamLink
 * @typedef {SocketLink | StreamLink} Link
 * @typedef {ReturnType<typeof parseEvent>} ServerEvent
 * @typedef {{since?: string, history?: number}} Replay
 * @typedef {{code?: number, status?: number, reason?: string, retryMs?: number}} End why a
 *   connection ended or failed to open
 * @typedef {{type?: string, id?: number, channel?: string, position: string, session?: string,
 *   resumed?: boolean, recovered?: boolean, heartbeat_ms?: number, status?: number,
 *   reason?: string, retry_after_s?: number}} Header of a message of the relay
 * @typedef {object} Subscription to a channel, shared by its members
 * @property {string} name
 * @property {Channel[]} members
 * @property {number} requestId of the last `subscribe` on this connection; 0: none
 * @property {boolean} isActive answered: until then a message is of an earlier subscription
 *
 * @typedef {object} LinkListener is notified of what a link receives, and of its end
 * @property {(header: Header, payload: string | Uint8Array) => void} received
 * @property {(end: End) => void} ended
 */
