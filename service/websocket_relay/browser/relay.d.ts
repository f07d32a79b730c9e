/** Types of relay.js, the relay's client for browsers. */

export interface RelayOptions {
  /** A channel name, if `url` is the relay's base URL: `/channels/NAME` is appended. */
  channel?: string;
  /**
   * A JSON Web Token, or a function that returns a fresh one for each connection. It is sent as a
   * subprotocol or in a header, never in a URL. Only Relays with the same token share a stream.
   */
  token?: string | (() => string | Promise<string>);
  /** Number of the channel's last messages to receive first. Default: 0. */
  history?: number;
  /** Resume after this position: `Relay.position` of an earlier visit. */
  since?: string;
  /** Maximum number of queued messages. Default: 1,000. */
  maxOffline?: number;
  /** Maximum bytes of queued and unconfirmed messages. Default: 8 MiB. */
  maxWaitingBytes?: number;
}

export type RelayState = "connecting" | "open" | "waiting" | "closed";
export type RelayTransport = "websocket" | "stream";

/** A message of the channel, delivered once and in order; includes this client's own. */
export interface RelayMessageEvent extends MessageEvent<string | ArrayBuffer> {
  /** The position in the channel: increasing, the same for all subscribers. */
  readonly position: string;
}

/** A connection was opened while there was none. */
export interface RelayOpenEvent extends Event {
  readonly transport: RelayTransport;
}

/** A connection was closed. The client reconnects, unless "refused" follows. */
export interface RelayCloseEvent extends Event {
  /** A close code of the relay; 1006 after a network failure. */
  readonly code: number;
  readonly reason: string;
}

/** Messages between these positions may be missing: expired, or lost by the relay's log. */
export interface RelayGapEvent extends Event {
  /** The position of the last message received. */
  readonly since: string | null;
  /** The position after which nothing is missing. */
  readonly position: string;
}

/** The relay refused the connection permanently: for an invalid token, for example. */
export interface RelayRefusedEvent extends Event {
  /** 401, 403, ...: the refusals of the relay. */
  readonly status: number;
  readonly reason: string;
}

/** `Relay.state` or `Relay.transport` changed. */
export interface RelayStateEvent extends Event {
  readonly state: RelayState;
  readonly transport: RelayTransport | null;
  /** The reason why there is no connection. */
  readonly reason: string;
  /** While "waiting": milliseconds until the next attempt. */
  readonly retryInMs: number;
}

export interface RelayEvents {
  message: RelayMessageEvent;
  open: RelayOpenEvent;
  close: RelayCloseEvent;
  gap: RelayGapEvent;
  refused: RelayRefusedEvent;
  state: RelayStateEvent;
}

/** A message was not sent, or its delivery is unknown. */
export class RelayError extends Error {
  constructor(why: "full" | "closed" | "refused" | "uncertain", message: string);
  /**
   * - `full`: the send buffer is full
   * - `closed`: the page closed the connection
   * - `refused`: the relay rejected the message or the connection
   * - `uncertain`: the connection was lost, and the message was not echoed over the next one; or a
   *   POST had no definite answer
   */
  why: "full" | "closed" | "refused" | "uncertain";
}

/**
 * A connection to a channel: reconnects until it is closed or refused, and resumes after the last
 * message received. Where WebSockets are blocked, the Relays of a page with the same channel and
 * token share one event stream.
 */
export class Relay extends EventTarget {
  /**
   * Connect to a channel.
   *
   * @param url - of the channel: ws, wss, http or https, or relative to the page.
   */
  constructor(url: string | URL, options?: RelayOptions);

  /** The token of the next connection. */
  token: string | (() => string | Promise<string>) | null;
  get state(): RelayState;
  /** The transport of the active connection: "websocket", "stream", or null. */
  get transport(): RelayTransport | null;
  /** The position of the last message. Passed as `since`, it resumes without a gap. */
  get position(): string | null;
  /** The number of messages queued until there is a connection. */
  get offline(): number;

  /**
   * Reconnect after `close()` or "refused", and resume after the last position. While "waiting":
   * reconnect now.
   */
  open(): void;
  /** Close the connection. Queued messages are discarded, and their promises rejected. */
  close(): void;
  /**
   * Publish a message to the channel, at once or after the next reconnect.
   *
   * A message is never published twice. The promise may be ignored.
   *
   * @returns resolves with the position when the message is relayed. Rejects with a RelayError if
   *   it is not, or if that is unknown.
   * @throws RelayError: the send buffer is full ("full"), or the connection is closed ("closed").
   */
  send(data: string | ArrayBuffer | ArrayBufferView): Promise<string>;

  addEventListener<Type extends keyof RelayEvents>(
    type: Type,
    listener: ((this: Relay, event: RelayEvents[Type]) => unknown) | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<Type extends keyof RelayEvents>(
    type: Type,
    listener: ((this: Relay, event: RelayEvents[Type]) => unknown) | null,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | EventListenerOptions,
  ): void;
}
