/** Types of relay.js, the relay's client for browsers, workers, Node and Deno. */

export type RelayData = string | ArrayBuffer | ArrayBufferView;
/** A JSON Web Token, or a function that returns a fresh one. */
export type RelayToken = string | null | (() => string | null | Promise<string | null>);
export type RelayTransport = "websocket" | "stream";
/**
 * - `idle`: nothing uses the connection
 * - `connecting`: an attempt is in flight
 * - `open`: connected
 * - `waiting`: for the next attempt
 * - `closed`: by the page, or refused by the relay
 */
export type RelayState = "idle" | "connecting" | "open" | "waiting" | "closed";
/**
 * - `refused`: the relay refused the message, or the client: it is not published
 * - `unconfirmed`: it is unknown whether the message was published
 * - `full`: more than `maxQueuedMessages` or `maxPendingBytes`
 * - `closed`: the page closed the connection: it is not published
 */
export type RelayErrorCode = "refused" | "unconfirmed" | "full" | "closed";

export interface RelayOptions {
  /**
   * A JSON Web Token, or a function that returns a fresh one for each connection. It is sent as a
   * subprotocol or in a header, never in a URL.
   */
  token?: RelayToken;
  /** Maximum number of messages that wait for a connection. Default: 1,000. */
  maxQueuedMessages?: number;
  /** Maximum bytes of messages that are queued or not answered. Default: 8 MiB. */
  maxPendingBytes?: number;
  /** A constructor such as that of the package `ws`, for runtimes without a WebSocket. */
  WebSocket?: new (url: string, protocols: string[]) => object;
}

export interface ChannelOptions {
  /** Number of the channel's last messages to receive first. Default: 0. */
  history?: number;
  /** Resume after this position: `Channel.position` of an earlier visit. */
  since?: string | null;
  /** Receive who is in the channel, and who joins and leaves. Default: false. */
  presence?: boolean;
}

/** A client in a channel. */
export interface RelayMember {
  /** The id of the client; it stays the same when the client reconnects in time. */
  readonly client: string;
  /** The subject of its token; empty without one. */
  readonly user: string;
  /** What its token has as `info`. */
  readonly info?: any;
  /** The time at which it joined, in seconds since 1970; absent if it joined later than this one. */
  readonly since?: number;
}

/** A message of the channel, delivered once and in order; includes this client's own. */
export interface ChannelMessageEvent extends Event {
  readonly data: string | ArrayBuffer;
  /** The position in the channel: increasing, the same for all subscribers. */
  readonly position: string;
}

/** The relay has subscribed the channel: all messages after `position` follow. */
export interface ChannelSubscribedEvent extends Event {
  readonly position: string;
  /** Whether the relay still has all messages since the last connection. */
  readonly recovered: boolean;
}

/** Messages between these positions may be missing: expired, or lost by the broker. */
export interface ChannelGapEvent extends Event {
  /** The position up to which all messages were received. */
  readonly since: string | null;
  /** The position after which nothing is missing. */
  readonly position: string;
}

/** The relay does not permit the channel: the `Channel` receives nothing. */
export interface ChannelRefusedEvent extends Event {
  readonly status: number;
  readonly reason: string;
}

/** The list of members was replaced, or the number of clients has changed. */
export interface ChannelPresenceEvent extends Event {
  /** Undefined: there are too many, and only their number is known. */
  readonly clients: RelayMember[] | undefined;
  readonly count: number;
}

/** A client has joined the channel. */
export interface ChannelJoinedEvent extends Event {
  readonly client: string;
  readonly user: string;
  readonly info?: any;
}

/** A client has left the channel. */
export interface ChannelLeftEvent extends Event {
  readonly client: string;
  readonly user: string;
  readonly info?: any;
}

export interface ChannelEvents {
  message: ChannelMessageEvent;
  subscribed: ChannelSubscribedEvent;
  gap: ChannelGapEvent;
  refused: ChannelRefusedEvent;
  presence: ChannelPresenceEvent;
  joined: ChannelJoinedEvent;
  left: ChannelLeftEvent;
}

/** `Relay.state` or `Relay.transport` changed. */
export interface RelayStateEvent extends Event {
  readonly state: RelayState;
  readonly transport: RelayTransport | null;
  /** The close code of the relay, 1006 after a network failure, or undefined. */
  readonly code: number | undefined;
  /** The status of a refusal, or undefined. */
  readonly status: number | undefined;
  /** The reason why there is no connection. */
  readonly reason: string;
  /** While "waiting": milliseconds until the next attempt. */
  readonly retryInMs: number;
}

/** The relay refused the connection permanently: for an invalid token, for example. */
export interface RelayRefusedEvent extends Event {
  readonly status: number;
  readonly reason: string;
}

export interface RelayEvents {
  state: RelayStateEvent;
  refused: RelayRefusedEvent;
}

export {}; // what has no `export` is not exported

// Projects without the types of a page, for Node or for workers, lack the names of these.
type Listener = Parameters<EventTarget["addEventListener"]>[1];
type AddOptions = Parameters<EventTarget["addEventListener"]>[2];
type RemoveOptions = Parameters<EventTarget["removeEventListener"]>[2];

/** An EventTarget whose listeners are typed. */
declare class TypedEventTarget<Events> extends EventTarget {
  addEventListener<Type extends keyof Events>(
    type: Type,
    listener: ((event: Events[Type]) => unknown) | null,
    options?: AddOptions,
  ): void;
  addEventListener(type: string, listener: Listener, options?: AddOptions): void;
  removeEventListener<Type extends keyof Events>(
    type: Type,
    listener: ((event: Events[Type]) => unknown) | null,
    options?: RemoveOptions,
  ): void;
  removeEventListener(type: string, listener: Listener, options?: RemoveOptions): void;
}

/** A message was not published, or that is unknown; or a token was refused. */
export class RelayError extends Error {
  constructor(code: RelayErrorCode, message: string, status?: number);
  readonly code: RelayErrorCode;
  /** The status of the relay's refusal. */
  readonly status: number | undefined;
}

/** A subscription to a channel, from `Relay.channel`, until `leave()`. */
export interface Channel extends TypedEventTarget<ChannelEvents> {
  readonly name: string;
  /** The position up to which all messages were received; null before "subscribed". */
  readonly position: string | null;
  /** The clients in the channel, by id; null before "presence", and while only `count` is known. */
  readonly members: ReadonlyMap<string, RelayMember> | null;
  /** The number of clients in the channel; null before "presence". */
  readonly count: number | null;
  /** Publish a message to the channel: see `Relay.publish`. */
  publish(data: RelayData): Promise<string>;
  /** Receive nothing more. The subscription ends with its last `Channel`. */
  leave(): void;
}

/**
 * One connection to a relay, for all channels. It opens with the first channel or message, closes
 * some seconds after the last one, and reconnects until it is closed or refused.
 */
export class Relay extends TypedEventTarget<RelayEvents> {
  /** @param url - of the relay: ws, wss, http or https, or relative to the page. */
  constructor(url: string | URL, options?: RelayOptions);

  readonly state: RelayState;
  /** The transport of the connection: "websocket", "stream", or null. */
  readonly transport: RelayTransport | null;
  /** The number of messages that wait for a connection, or to be sent again. */
  get queued(): number;
  /** Used by the next connection; `renewToken()` replaces that of the current one. */
  token: RelayToken;

  /**
   * Subscribe to a channel. Each call returns a `Channel` of its own; those of one name share the
   * relay's messages.
   *
   * @throws TypeError: the URL or the name is invalid.
   */
  channel(name: string, options?: ChannelOptions): Channel;
  /**
   * Publish a message exactly once, now or after the next reconnect. It needs no subscription. The
   * promise may be ignored.
   *
   * @returns resolves with the position once the message is in the log. Rejects with a RelayError.
   * @throws TypeError: the URL, the name or the data is invalid.
   */
  publish(channel: string, data: RelayData): Promise<string>;
  /**
   * Replace the token of the connection by `token`, or by what that function returns, without a
   * reconnect.
   *
   * @returns rejects if the token function fails, or with a RelayError if the relay refuses the
   *   token; the previous one still counts then.
   */
  renewToken(): Promise<void>;
  /** Continue after `close()` or "refused". While "waiting": reconnect now. */
  open(): void;
  /** Close the connection, and reject the messages that are not answered. Channels remain. */
  close(): void;
}
