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
 * 2021, in workers, Node and Deno.
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

const TICK_MS = 1_000; // browsers run timers of hidden pages once a minute
const SLEEP_GAP_MS = 15_000; // a longer time between ticks means that the machine slept
const LATE_HEARTBEAT_MS = 500; // after a heartbeat was due, 20 s by default,
const PROBE_MS = 3_000; // a silent connection is probed, and closed within 25 s

const RESUMING = 4900; // the code of a close after which the session is resumed
const MESSAGE_OVERHEAD_BYTES = 128; // memory of a message besides its payload
const FINAL_BEFORE_OPEN = [400, 404, 405, 426]; // later, a reloading proxy may send them
const NOT_FINAL_OF_POST = [401, 408, 429]; // and all from 500
/** @type {(string | undefined)[]} */
const PRESENCE = ["presence", "joined", "left"]; // types of notices
const NO_PRESENCE = "no presence in this channel"; // the reason of a refusal
const LOST = {type: "lost", position: ""}; // in place of an answer: the connection has ended

/** @param {EventTarget} target @param {string} type @param {object} fields */
function emit(target, type, fields) {
  target.dispatchEvent(Object.assign(new Event(type), fields));
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

/** What `Relay.channel` returns. The Relay uses the members which relay.d.ts omits. */
class Channel extends EventTarget {
  #hasLeft = false;

  /** @param {Relay} relay @param {string} name @param {ChannelOptions} options @param {any} left */
  constructor(relay, name, {history = 0, since = null, presence = false}, left) {
    super();
    this.name = name;
    this.history = history;
    this.position = since;
    this.presence = presence;
    /** @type {Map<string, Member> | null} by client */
    this.members = null;
    /** @type {number | null} */
    this.count = null;
    this.publish = (/** @type {Data} */ data) => relay.publish(name, data);
    this.leave = () => {
      this.#hasLeft = true;
      left();
    };
  }

  /** @param {string} type @param {object} fields */
  emit(type, fields) {
    if (!this.#hasLeft) emit(this, type, fields); // a listener of another member may have ended it
  }

  /** @param {Header} header of a message or notice @param {string | Uint8Array} payload */
  receive(header, payload) {
    const {type, position} = header;
    const since = this.position;
    if (PRESENCE.includes(type)) return this.#onPresence(header);
    if (!isAfter(position, since)) return; // a duplicate
    if (since === null && type !== "live") return; // the replay is that of other members
    if (type && type !== "live" && type !== "gap") return; // of a later version
    this.position = position;
    const data = typeof payload === "string" ? payload : payload.slice().buffer;
    if (type === "gap") this.emit("gap", {since, position});
    else if (type === undefined) this.emit("message", {data, position});
    else if (since === null) this.emit("subscribed", {recovered: true, position});
  }

  /** @param {string} position of an active subscription @param {Channel} [other] with presence */
  receiveFirst(position, other) {
    this.receive({type: "live", position}, "");
    if (typeof other?.count !== "number") return; // it is yet to be received
    const clients = other.members ? [...other.members.values()] : undefined;
    this.receive({type: "presence", position, clients, count: other.count}, "");
  }

  /** @param {Header} notice */
  #onPresence({type, clients, count, client = "", user = "", info}) {
    if (!this.presence) return;
    if (type === "presence") return this.#replaceMembers(clients, count);
    if (type === "joined") this.members?.set(client, {client, user, info});
    else this.members?.delete(client);
    this.count = this.members?.size ?? this.count;
    this.emit(/** @type {string} */ (type), {client, user, info});
  }

  /** @param {Member[] | undefined} clients undefined: too many @param {number} [count] */
  #replaceMembers(clients, count = 0) {
    const before = this.members;
    const after = clients && new Map(clients.map((each) => [each.client, each]));
    this.members = after ?? null;
    this.count = count;
    if (before && after) { // a reconnection: what happened in the meantime
      for (const [client, each] of before) if (!after.has(client)) this.emit("left", each);
      for (const [client, each] of after) if (!before.has(client)) this.emit("joined", each);
    }
    this.emit("presence", {clients, count});
  }
}

/** One connection to a relay. It opens when it is used, and reconnects until it is refused. */
export class Relay extends EventTarget {
  #url;
  #options;
  /** @type {Link | null} */
  #link = null;
  #attempt = 0; // number of the attempt: one that awaited a token detects that it is stale
  #wasUnauthorized = false; // since the last open connection
  #failureCount = 0; // consecutive
  #blockedCount = 0; // consecutive: the stream worked, the WebSocket did not
  #isRetryFixed = false; // the relay requested the delay
  #usedAt = 0; // when a channel or a message last needed the connection
  #tickedAt = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} ends an attempt, or starts the next one */
  #timer;
  /** @type {AbortController | null} ends the ticks, and removes the page's event listeners */
  #watch = null;

  /** @type {Map<string, Subscription>} by channel */
  #subscriptions = new Map();
  #session = "";
  #seen = ""; // the last position received; "": no connection was open yet
  #lastId = 0; // of a command or message: they grow over all connections
  /** @type {Map<number, OnAnswer>} by id: commands and messages in flight on the WebSocket */
  #inFlight = new Map();
  /** @type {Message[]} not in flight; of the first one a POST may be */
  #queue = [];
  #pendingBytes = 0; // of all messages
  #isPosting = false;
  #postKey = "";

  /** @param {string | URL} url @param {import("./relay.js").RelayOptions} [options] */
  constructor(url, options = {}) {
    super();
    this.#url = url;
    this.#options = {maxQueuedMessages: 1_000, maxPendingBytes: 8 * 1024 * 1024, ...options};
    this.token = options.token ?? null;
    /** @type {RelayState} */
    this.state = "idle";
    /** @type {Link["kind"] | null} of the open connection */
    this.transport = null;
  }

  get queued() {
    return this.#queue.length;
  }

  /** @param {string} name @param {ChannelOptions} [options] */
  channel(name, options = {}) {
    this.#urlOf(name);
    const added = {name, members: [], replay: null, isActive: false};
    /** @type {Subscription} */
    const subscription = this.#subscriptions.get(name) ?? added;
    /** @type {Channel} */
    const channel = new Channel(this, name, options, () => this.#leave(subscription, channel));
    const position = subscription.isActive ? subscription.members[0].position : null;
    const other = subscription.members.find(({presence}) => presence);
    const isReplayed = channel.history > 0 || channel.position !== null;
    const isNew = isReplayed || (channel.presence && !other);
    subscription.members = [...subscription.members, channel];
    this.#subscriptions.set(name, subscription);
    if (!position || isNew) this.#resubscribe(subscription);
    else queueMicrotask(() => channel.receiveFirst(position, other));
    if (this.state === "idle") this.#start();
    return channel;
  }

  /** @param {string} channel @param {Data} data */
  publish(channel, data) {
    this.#urlOf(channel);
    const bytes = bytesOf(data);
    const payload = typeof data === "string" ? data : bytes;
    const size = bytes.length + MESSAGE_OVERHEAD_BYTES;
    /** @type {Promise<string>} */
    const published = new Promise((resolve, reject) => {
      const {maxPendingBytes, maxQueuedMessages} = this.#options;
      const areTooMany = this.#queue.length >= maxQueuedMessages;
      const isFull = areTooMany || this.#pendingBytes + size > maxPendingBytes;
      if (this.state === "closed") throw new RelayError("closed", "the connection is closed");
      if (isFull) throw new RelayError("full", "too many messages are pending");
      const id = ++this.#lastId;
      this.#pendingBytes += size;
      this.#queue.push({id, channel, payload, size, seen: "", postedAt: 0, resolve, reject});
      if (this.state === "idle") this.#start();
      else this.#flush();
    });
    published.catch(() => {}); // an ignored promise causes no unhandledrejection event
    return published;
  }

  async renewToken() {
    const attempt = this.#attempt;
    const token = await this.#fetchToken();
    const isUsed = this.state === "connecting" || this.state === "open";
    if (attempt !== this.#attempt || !isUsed) return; // the next connection brings it
    const link = this.#link;
    if (!link?.isOpen || link.kind === "stream") return this.#connect(this.transport ?? undefined);
    const {type, status, reason} = await new Promise((resolve) => {
      this.#request(link, {type: "token", token}, resolve);
    });
    if (type === "error") throw new RelayError("refused", `${status} ${reason}`, status);
  }

  open() {
    if (this.state === "waiting") this.#connect();
    else if (this.state === "closed") this.#start();
  }

  close() {
    if (this.state !== "closed") this.#shutDown("closed");
  }

  // Connecting

  #start() {
    this.#failureCount = this.#blockedCount = 0;
    this.#wasUnauthorized = false;
    this.#watchPage();
    this.#connect();
  }

  /** Open a connection. It replaces an open one, and resumes where that one ends. */
  async #connect(/** @type {Link["kind"]} */ kind = "websocket") {
    this.#dropLink();
    const attempt = this.#attempt;
    if (this.state !== "open") this.#setState("connecting");
    const token = await this.#fetchToken().catch(() => undefined); // the page knows the cause
    if (attempt !== this.#attempt) return;
    if (token === undefined) return this.#retry({reason: "the page has no token"});
    if (TOKEN_PATTERN.test(token)) return this.#openLink(kind, token);
    this.#onRefused({status: 401, reason: "a token has letters, digits, dots, - and _ only"});
  }

  async #fetchToken() {
    return (await (typeof this.token === "function" ? this.token() : this.token)) ?? "";
  }

  /** @param {string} kind @param {string} token */
  #openLink(kind, token) {
    /** @type {LinkListener} */
    const listener = {
      received: (header, payload) => link === this.#link && this.#onReceived(link, header, payload),
      ended: (end) => link === this.#link && this.#onEnded(link, end),
    };
    const opened = kind === "websocket"
      ? openSocket(this.#socketUrl(), token, this.#options.WebSocket, listener)
      : openStream(this.#urlOf(), token, this.#requestStream(), listener);
    const times = {openedAt: 0, heartbeatMs: Infinity, receivedAt: 0, probedAt: 0};
    /** @type {Link} */
    const link = {...opened, token, isOpen: false, ...times};
    this.#link = link;
    this.#setTimer(CONNECT_TIMEOUT_MS, () => listener.ended({reason: "connect timeout"}));
  }

  /** @param {number} delayMs @param {() => void} act */
  #setTimer(delayMs, act) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(act, delayMs);
  }

  #socketUrl() {
    const url = this.#urlOf();
    url.protocol = url.protocol.replace("http", "ws");
    if (this.#session) url.searchParams.set("session", this.#session);
    if (this.#queue[0]?.seen) url.searchParams.set("seen", this.#queue[0].seen);
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
    // Messages that were sent by WebSocket would be unconfirmed: they are worth more attempts.
    const isEarly = this.#blockedCount < STREAM_AFTER_BLOCKED * (this.#queue[0]?.seen ? 2 : 1);
    if (link.kind === "stream" && isEarly) return this.#retry({reason: "WebSocket blocked"});
    clearTimeout(this.#timer);
    this.#wasUnauthorized = false;
    Object.assign(link, {isOpen: true, openedAt: Date.now()});
    link.heartbeatMs = welcome.heartbeat_ms ?? Infinity;
    if (this.transport !== link.kind) this.#setState("open");
    if (link !== this.#link) return; // the page has closed it in that event
    if (!welcome.resumed) this.#rejectSent("the session can't be resumed");
    this.#session = welcome.session ?? this.#session; // a stream has none
    for (const each of this.#subscriptions.values()) {
      if (each.replay) this.#onSubscribed(each, each.replay, welcome); // a part of the stream
    }
    this.#subscribeAll();
    this.#flush();
  }

  /** @param {Link} link @param {End} end */
  #onEnded(link, end) {
    const hasRefusedChannels = end.status === 403 || end.reason === NO_PRESENCE;
    if (link.kind === "stream" && hasRefusedChannels) return this.#refuseChannels(link, end);
    if (link.isOpen || link.kind === "stream") return this.#retry(end);
    link.close();
    this.#openLink("stream", link.token); // a browser hides why an upgrade failed, and shows this
  }

  /** @param {Link} link a stream that is refused for some of its channels @param {End} end */
  async #refuseChannels(link, end) {
    const all = [...this.#subscriptions.values()];
    const responses = await Promise.all(all.map(({name, members}) => {
      const url = this.#urlOf(name);
      url.pathname += "/events";
      if (replayFor(members).presence) url.searchParams.set("presence", "true");
      return authorizedFetch(url, link.token, {method: "HEAD"});
    })).catch(() => []);
    if (link !== this.#link) return;
    const refused = all.filter((_, at) => responses[at]?.status === end.status);
    for (const each of refused) this.#refuse(each, end); // a listener may add a channel
    if (!refused.length) this.#retry(end);
    else this.#connect(this.transport ?? undefined);
  }

  /** @param {End} end after which the client connects again, unless it is final */
  #retry(end) {
    const {code = this.transport ? 1006 : undefined, reason = ""} = end;
    // Without a token a backend decides, by the cookie that the next connection brings.
    const status = code === 3000 && this.token ? 401 : end.status ?? 0;
    this.#dropLink();
    if (code === 1009) this.#refuseLargest(reason);
    const hasFreshToken = typeof this.token === "function" && !this.#wasUnauthorized;
    const isFinal = !this.#seen && FINAL_BEFORE_OPEN.includes(status);
    if (isFinal || (status === 401 && !hasFreshToken)) return this.#onRefused({...end, status});
    if (status === 401) this.#wasUnauthorized = true;
    const hintMs = end.retryMs ?? /retry_ms=(\d+)/.exec(reason)?.[1]; // of a drain
    this.#isRetryFixed = hintMs !== undefined;
    const delayMs = Number(hintMs ?? backoffAfter(this.#failureCount++));
    const waitMs = Math.round(Math.min(delayMs, MAX_RETRY_AFTER_MS));
    this.#setTimer(waitMs, () => this.#connect());
    this.#setState("waiting", {...end, code}, waitMs);
  }

  #onRefused(/** @type {End} */ end) {
    const {status, reason = ""} = end;
    this.#shutDown("closed", end, new RelayError("refused", `${status} ${reason}`, status));
    emit(this, "refused", {status, reason});
  }

  /** @param {RelayState} state @param {End} [end] @param {RelayError} error of queued messages */
  #shutDown(state, end, error = new RelayError("closed", "the page closed the connection")) {
    this.#dropLink(1000);
    this.#watch?.abort();
    for (const message of this.#queue.splice(0)) {
      const isUnknown = message.seen || message.postedAt;
      this.#settle(message, isUnknown ? new RelayError("unconfirmed", error.message) : error);
    }
    this.#setState(state, end);
  }

  #dropLink(code = RESUMING) {
    clearTimeout(this.#timer);
    this.#attempt += 1;
    this.#link?.close(code);
    this.#link = null;
    for (const each of this.#subscriptions.values()) this.#unsubscribe(each);
    const later = this.#queue.splice(0);
    for (const onAnswer of this.#inFlight.values()) onAnswer(LOST); // a message is queued again
    this.#inFlight.clear();
    this.#queue = this.#queue.concat(later);
  }

  /** @param {RelayState} state @param {End} [end] @param {number} [retryInMs] */
  #setState(state, end = {}, retryInMs = 0) {
    const {code, status, reason = ""} = end;
    const transport = state === "open" ? this.#link?.kind ?? null : null;
    this.state = state;
    this.transport = transport;
    emit(this, "state", {state, transport, code, status, reason, retryInMs});
  }

  // Receiving

  /** @param {Link} link @param {Header} header @param {string | Uint8Array} payload */
  #onReceived(link, header, payload) {
    const {type, id, channel = "", position} = header;
    link.receivedAt = Date.now();
    link.probedAt = 0;
    const isNew = position && (type === "welcome" || isAfter(position, this.#seen));
    if (isNew) this.#seen = position;
    if (type === "welcome") return this.#onWelcome(link, header);
    if (id && type !== "presence") { // that one has the id of "subscribe", and follows its answer
      const onAnswer = this.#inFlight.get(id);
      this.#inFlight.delete(id);
      return onAnswer?.(header);
    }
    const subscription = this.#subscriptions.get(channel);
    if (!subscription?.isActive) return; // of an earlier subscription: it will be replayed
    if (type === "unsubscribed") return this.#refuse(subscription, header);
    for (const member of subscription.members) member.receive(header, payload);
    if (link.kind === "websocket" || type !== undefined) return;
    for (const {isActive, members} of this.#subscriptions.values()) { // a stream has one order
      if (isActive) for (const each of members) each.receive({type: "live", position}, "");
    }
  }

  // Subscribing

  /** Subscribe to the channels that the open connection does not have. */
  #subscribeAll() {
    const link = this.#link;
    if (!link?.isOpen) return;
    const added = [...this.#subscriptions.values()].filter(({replay}) => !replay);
    if (link.kind === "websocket") for (const each of added) this.#subscribe(link, each);
    else if (added.length) this.#connect("stream");
  }

  /** @param {Link} link @param {Subscription} subscription */
  #subscribe(link, subscription) {
    const replay = (subscription.replay = replayFor(subscription.members));
    const command = {type: "subscribe", channel: subscription.name, ...replay};
    this.#request(link, command, (answer) => {
      if (replay !== subscription.replay) return; // it ended, or was repeated
      if (answer.type === "subscribed") return this.#onSubscribed(subscription, replay, answer);
      if (answer.status !== 503) return this.#refuse(subscription, answer);
      subscription.replay = null;
      const timer = setTimeout(() => this.#subscribeAll(), retryMsOf(answer.retry_after_s));
      /** @type {any} */ (timer).unref?.(); // it keeps no process of Node running
    });
  }

  /** Return what a stream has to deliver. */
  #requestStream() {
    const all = [...this.#subscriptions.values()];
    const replay = replayFor(all.flatMap(({members}) => members));
    for (const each of all) each.replay = replay;
    return {channels: all.map(({name}) => name), replay};
  }

  /**
   * A replay by `history` may begin after the position of some members: it only shows where the
   * new ones begin, and the subscription is repeated with `since`.
   *
   * @param {Subscription} subscription @param {Replay} replay @param {Header} answer
   */
  #onSubscribed(subscription, {since, history}, {recovered, position}) {
    const {members} = subscription;
    const isComplete = since !== undefined || members.every((each) => each.position === null);
    if (isComplete) subscription.isActive = true;
    else this.#resubscribe(subscription);
    const isLive = this.#link?.kind === "stream" || !(since || history);
    for (const member of members) {
      const before = member.position;
      if (before === null && !member.history && !isLive) continue; // until the notice "live"
      // A log that was created anew begins before `since`.
      const isOther = isAfter(position, before) || isAfter(since ?? "", position);
      const isGap = before !== null && since !== undefined && !recovered && isOther;
      if (before === null || isGap) member.position = position;
      if (isGap) member.emit("gap", {since: before, position});
      if (isComplete) member.emit("subscribed", {recovered, position});
    }
  }

  /** Begin a subscription, or begin it anew: once for all that do so in one task. */
  #resubscribe(/** @type {Subscription} */ subscription) {
    this.#unsubscribe(subscription);
    queueMicrotask(() => this.#subscribeAll());
  }

  #unsubscribe(/** @type {Subscription} */ subscription) {
    const link = this.#link;
    if (link && subscription.replay) {
      this.#request(link, {type: "unsubscribe", channel: subscription.name});
    }
    subscription.replay = null;
    subscription.isActive = false;
  }

  /** @param {Subscription} subscription @param {End} refusal */
  #refuse(subscription, {status, reason}) {
    subscription.replay = null;
    this.#subscriptions.delete(subscription.name);
    for (const member of subscription.members) member.emit("refused", {status, reason});
  }

  /** @param {Subscription} subscription @param {Channel} channel */
  #leave(subscription, channel) {
    const {name} = subscription;
    subscription.members = subscription.members.filter((each) => each !== channel);
    if (subscription.members.length || this.#subscriptions.get(name) !== subscription) return;
    this.#unsubscribe(subscription);
    this.#subscriptions.delete(name);
  }

  // Publishing

  /** @param {Link} link @param {object} command @param {OnAnswer} [onAnswer] */
  #request(link, command, onAnswer) {
    const id = ++this.#lastId;
    if (onAnswer) this.#inFlight.set(id, onAnswer);
    link.send({...command, id});
  }

  /** Send what is queued: by WebSocket all at once, and by POST one at a time. */
  #flush() {
    const link = this.#link;
    if (!link?.isOpen) return;
    if (link.kind === "stream" || this.#queue[0]?.postedAt) return void this.#postFirst(link);
    for (const message of this.#queue.splice(0)) {
      const {channel, id, payload} = message;
      message.seen ||= this.#seen;
      this.#inFlight.set(id, (answer) => this.#onPublished(message, answer));
      link.send({type: "publish", channel, id}, payload);
    }
  }

  /** @param {Message} message @param {Header} answer */
  #onPublished(message, {type, position, status, reason}) {
    if (type === "lost") return void this.#queue.push(message);
    const code = status === 504 ? "unconfirmed" : "refused";
    const error = new RelayError(code, `${status} ${reason}`, status);
    this.#settle(message, type === "error" ? error : position);
  }

  /**
   * Publish the first message by POST, and then the next one: this keeps their order.
   *
   * @param {Link} link @returns {Promise<void>}
   */
  async #postFirst(link) {
    const [message] = this.#queue;
    if (!message || this.#isPosting) return;
    message.postedAt ||= Date.now();
    if (Date.now() - message.postedAt > REPEAT_POST_MS) {
      this.#queue.shift();
      this.#settle(message, new RelayError("unconfirmed", "no answer to a POST"));
      return this.#flush();
    }
    this.#isPosting = true;
    this.#postKey ||= crypto.getRandomValues(new Uint32Array(4)).join("-");
    const url = this.#urlOf(message.channel);
    const answer = await post(url, link, `${this.#postKey}-${message.id}`, message.payload);
    this.#isPosting = false;
    if (this.#queue[0] === message) this.#onPosted(link, message, answer); // or it was rejected
    this.#flush();
  }

  /** @param {Link} link @param {Message} message @param {End & {position?: string}} answer */
  #onPosted(link, message, {position, ...end}) {
    const {status = 0, reason} = end;
    const isRefused = status >= 400 && status < 500 && !NOT_FINAL_OF_POST.includes(status);
    if (status === 503) message.postedAt = Date.now(); // it was not published
    if (position !== undefined || isRefused) {
      this.#queue.shift();
      this.#settle(message, position ?? new RelayError("refused", `${status} ${reason}`, status));
    } else if (link === this.#link) {
      this.#retry(end); // over the next connection, it is posted again
    }
  }

  /** @param {Message} message @param {string | RelayError} outcome */
  #settle(message, outcome) {
    this.#usedAt = Date.now();
    this.#pendingBytes -= message.size;
    if (outcome instanceof RelayError) message.reject(outcome);
    else message.resolve(outcome);
  }

  /** @param {string} reason why it is unknown what became of the messages sent by WebSocket */
  #rejectSent(reason) {
    const sent = this.#queue.filter(({seen}) => seen);
    this.#queue = this.#queue.filter(({seen}) => !seen);
    for (const message of sent) this.#settle(message, new RelayError("unconfirmed", reason));
  }

  /** Reject the message for which the relay has closed: sent again, it would have the same end. */
  #refuseLargest(/** @type {string} */ reason) {
    const sent = this.#queue.filter(({seen}) => seen);
    const [largest] = sent.sort((one, other) => other.size - one.size);
    this.#queue = this.#queue.filter((message) => message !== largest);
    if (largest) this.#settle(largest, new RelayError("refused", reason, 413));
  }

  // Sleep and wake

  #watchPage() {
    this.#watch = new AbortController();
    const {signal} = this.#watch;
    this.#tickedAt = this.#usedAt = Date.now();
    const ticks = setInterval(() => this.#tick(), TICK_MS);
    signal.addEventListener("abort", () => clearInterval(ticks));
    globalThis.addEventListener?.("online", () => this.#onOnline(), {signal});
    // The messages of a frozen page would pile up. Its timers are frozen: it reconnects later.
    const onFreeze = () => this.#retry({reason: "page frozen"});
    globalThis.document?.addEventListener("freeze", onFreeze, {signal});
  }

  #tick() {
    const now = Date.now();
    const hasSlept = now - this.#tickedAt > SLEEP_GAP_MS; // the network may have changed
    this.#tickedAt = now;
    if (this.#subscriptions.size + this.#queue.length + this.#inFlight.size) this.#usedAt = now;
    if (now - this.#usedAt >= LINGER_MS) return this.#shutDown("idle");
    const link = this.#link;
    if (!link?.isOpen) return;
    if (now - link.openedAt >= STABLE_AFTER_MS) this.#failureCount = 0;
    const isLate = now - link.receivedAt > link.heartbeatMs + LATE_HEARTBEAT_MS;
    const isDead = link.probedAt && now - link.probedAt >= PROBE_MS;
    if (isDead) this.#retry({reason: "connection unresponsive"});
    else if (hasSlept || isLate) this.#probe(link);
  }

  /** Expect a sign of life. A stream can't be asked for one: it is replaced if it stays silent. */
  #probe(/** @type {Link} */ link) {
    link.probedAt ||= Date.now();
    this.#request(link, {type: "ping"});
  }

  /** The network is available again, or has changed. */
  #onOnline() {
    if (this.#link?.isOpen) this.#probe(this.#link);
    if (this.state !== "waiting" || this.#isRetryFixed) return;
    this.#setTimer(jittered(INITIAL_BACKOFF_MS), () => this.#connect());
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
    socket.onerror = () => socket.onclose?.({code: 1006}); // in Node 22 no close event follows
  } catch {
    // For example: a page loaded by https:// can't open a ws:// URL; Node 20 has no WebSocket.
    queueMicrotask(() => ended({reason: "no WebSocket can be created"}));
  }
  return {
    kind: /** @type {const} */ ("websocket"),
    /** @param {object} header @param {string | Uint8Array} payload */
    send: (header, payload = "") => socket.send(frameOf(header, payload)),
    close: (code = 1000) => socket?.close(code),
  };
}

/**
 * Open a connection by server-sent events, one stream for all channels. Its events are passed on as
 * messages of relay.v1. Without a channel there is no stream, and only POSTs are made.
 *
 * It uses fetch instead of EventSource: the token goes into a header instead of the URL, and the
 * status of a refusal is visible.
 *
 * @param {URL} url @param {string} token @param {{channels: string[], replay: Replay}} request
 * @param {LinkListener} listener
 */
function openStream(url, token, {channels, replay}, {received, ended}) {
  const abort = new AbortController();
  const {signal} = abort;
  const method = channels.length ? "GET" : "HEAD";
  url.pathname += channels.length ? "events" : "relay.js"; // or only: is it a relay?
  for (const name of channels) url.searchParams.append("channel", name);
  for (const [name, value] of Object.entries(replay)) url.searchParams.set(name, String(value));

  async function read() {
    const response = await authorizedFetch(url, token, {method, signal});
    if (!response.ok) return refusalOf(response);
    if (!channels.length) return void received({type: "welcome", position: ""}, "");
    const decoder = new TextDecoder();
    const reader = /** @type {NonNullable<Response["body"]>} */ (response.body).getReader();
    for (let pending = ""; ; ) {
      const {done, value} = await reader.read();
      if (done) return {reason: "stream ended"};
      received({type: "heartbeat", position: ""}, ""); // or a comment
      const events = (pending + decoder.decode(value, {stream: true})).split("\n\n");
      pending = events.pop() ?? "";
      events.forEach(onEvent);
    }
  }

  const codeOf = (/** @type {string} */ char) => char.charCodeAt(0);
  function onEvent(/** @type {string} */ text) {
    const {id: position = "", event = "message", data} = parseEvent(text);
    const [type, channel = channels[0]] = event.split(/:(.*)/); // one channel is not named
    if (data === undefined) return;
    if (type === "message") received({channel, position}, data);
    else if (type === "binary") received({channel, position}, Uint8Array.from(atob(data), codeOf));
    else if (type === "close") ended(JSON.parse(data));
    else if (type === "welcome" || PRESENCE.includes(type)) received(JSON.parse(data), "");
    if (type === "gap") for (const name of channels) received({type, channel: name, position}, "");
  }

  const lost = {reason: "connection failed"}; // or rejected by CORS
  read().then((end) => end && ended(end), () => ended(lost));
  const kind = /** @type {const} */ ("stream");
  return {kind, signal, send: () => {}, close: () => abort.abort()};
}

/** @param {string} text a server-sent event (HTML standard, section 9.2.6) */
function parseEvent(text) {
  /** @type {Record<string, string | undefined>} */
  const fields = {};
  for (const line of text.split("\n")) {
    const [name, value] = line.split(/: ?(.*)/s);
    fields[name] = name in fields ? `${fields[name]}\n${value}` : value;
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

/** @param {object} header @param {string | Uint8Array} payload */
function frameOf(header, payload) {
  const line = `${JSON.stringify(header)}\n`;
  if (typeof payload === "string") return line + payload;
  const head = new TextEncoder().encode(line);
  const frame = new Uint8Array(head.length + payload.length);
  frame.set(head);
  frame.set(payload, head.length);
  return frame;
}

/** @param {Channel[]} members @returns what the relay has to replay for them */
function replayFor(members) {
  const positions = members.flatMap(({position}) => position ?? []);
  const history = Math.max(0, ...members.map((each) => (each.position ? 0 : each.history)));
  /** @type {Replay} */
  const replay = {};
  if (history) replay.history = history;
  else if (positions.length) replay.since = positions.reduce((a, b) => (isAfter(a, b) ? b : a));
  if (members.some(({presence}) => presence)) replay.presence = true;
  return replay;
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

/**
 * @param {URL} url @param {Link} link @param {string} key @param {string | Uint8Array} payload
 * @returns {Promise<End & {position?: string}>}
 */
async function post(url, {token, signal}, key, payload) {
  const isText = typeof payload === "string";
  const type = isText ? "text/plain; charset=utf-8" : "application/octet-stream";
  const headers = {"Content-Type": type, "Idempotency-Key": key};
  const body = /** @type {string | BufferSource} */ (payload);
  try {
    const response = await authorizedFetch(url, token, {method: "POST", headers, body, signal});
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
 * @typedef {import("./relay.js").RelayMember} Member
 * @typedef {{since?: string, history?: number, presence?: true}} Replay
 * @typedef {{code?: number, status?: number, reason?: string, retryMs?: number}} End why a
 *   connection ended or failed to open
 * @typedef {{type?: string, id?: number, channel?: string, position: string, session?: string,
 *   resumed?: boolean, recovered?: boolean, heartbeat_ms?: number, status?: number,
 *   reason?: string, retry_after_s?: number, clients?: Member[], count?: number, client?: string,
 *   user?: string, info?: unknown}} Header of a message of the relay
 * @typedef {(answer: Header) => void} OnAnswer
 *
 * @typedef {object} Subscription to a channel, shared by its members
 * @property {string} name
 * @property {Channel[]} members
 * @property {Replay | null} replay that this connection was asked for; null: not subscribed
 * @property {boolean} isActive answered: until then a message is of an earlier subscription
 *
 * @typedef {object} Message to publish
 * @property {number} id
 * @property {string} channel
 * @property {string | Uint8Array} payload
 * @property {number} size
 * @property {string} seen the last position received before it was first sent by WebSocket
 * @property {number} postedAt the time of the first POST that may have published it
 * @property {(position: string) => void} resolve
 * @property {(error: RelayError) => void} reject
 *
 * @typedef {object} Link one attempt at a connection, and the connection that it becomes
 * @property {"websocket" | "stream"} kind
 * @property {(header: object, payload?: string | Uint8Array) => void} send a stream ignores it
 * @property {(code?: number) => void} close with a code; a stream has none
 * @property {AbortSignal} [signal] of a stream: aborted when it is closed
 * @property {string} token
 * @property {boolean} isOpen the welcome has arrived
 * @property {number} openedAt
 * @property {number} heartbeatMs
 * @property {number} receivedAt
 * @property {number} probedAt 0: not probed since it last received
 *
 * @typedef {object} LinkListener is notified of what a link receives, and of its end
 * @property {(header: Header, payload: string | Uint8Array) => void} received
 * @property {(end: End) => void} ended
 */
