/** Types of relay.js, the relay's client for browsers. */

export interface RelayOptions {
  /** A name, where `url` is the relay's own address: `/channels/NAME` is put behind it. */
  channel?: string;
  /**
   * A JSON Web Token, or a function that gives a fresh one for each connection. It travels as a
   * subprotocol or in a header, never in an address.
   */
  token?: string | (() => string | Promise<string>);
  /** So many of the channel's last messages come first. Default: 0. */
  history?: number;
  /** All that came behind this position comes first; `Relay.position` of an earlier visit. */
  since?: string;
  /** So many messages may wait to be sent. Default: 1,000. */
  maxOffline?: number;
  /** So many bytes may wait to be sent, or to come back. Default: 8 MiB. */
  maxWaitingBytes?: number;
}

export type RelayState = "connecting" | "open" | "waiting" | "closed";
export type RelayTransport = "websocket" | "stream";

/** A message of the channel, once and in order; one's own as well. */
export interface RelayMessageEvent extends MessageEvent<string | ArrayBuffer> {
  /** Where it stands in the channel: growing, the same for all. */
  readonly position: string;
}

/** There is a connection again, after none. */
export interface RelayOpenEvent extends Event {
  readonly transport: RelayTransport;
}

/** A connection is gone. Unless "refused" follows, there will be another. */
export interface RelayCloseEvent extends Event {
  /** As the relay's README lists them; 1006 where the network broke. */
  readonly code: number;
  readonly reason: string;
}

/** The relay no longer holds all that came between these positions, or its log lost some of it. */
export interface RelayGapEvent extends Event {
  /** What was heard last. */
  readonly since: string | null;
  /** Behind this one nothing is missing. */
  readonly position: string;
}

/** The relay does not let this page in, and will not: a token that it does not accept, say. */
export interface RelayRefusedEvent extends Event {
  /** 401, 403, ...: README, "Answers". */
  readonly status: number;
  readonly reason: string;
}

/** `Relay.state` or `Relay.transport` changed. */
export interface RelayStateEvent extends Event {
  readonly state: RelayState;
  readonly transport: RelayTransport | null;
  /** Why there is no connection. */
  readonly reason: string;
  /** While "waiting": until the next attempt. */
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

/** Why a message was not sent, or is not known to be relayed. */
export class RelayError extends Error {
  constructor(why: "full" | "closed" | "refused" | "uncertain", message: string);
  /**
   * - `full`: too much waits already
   * - `closed`: the page closed the connection
   * - `refused`: the relay does not take it, or does not let this page in
   * - `uncertain`: the connection broke, and the message did not come back over the next one
   */
  why: "full" | "closed" | "refused" | "uncertain";
}

/**
 * A channel of a relay, for as long as the page likes: connects, returns by itself, resumes behind
 * the last message it heard.
 */
export class Relay extends EventTarget {
  /**
   * Connect to a channel.
   *
   * @param url - of the channel: ws, wss, http or https, or relative to the page.
   */
  constructor(url: string | URL, options?: RelayOptions);

  /** For the next connection. */
  token: string | (() => string | Promise<string>) | null;
  get state(): RelayState;
  /** What carries the messages now: "websocket", "stream", or null. */
  get transport(): RelayTransport | null;
  /** The last message's position: bring it as `since`, and nothing in between is missed. */
  get position(): string | null;
  /** How many messages were not sent yet, for want of a connection. */
  get offline(): number;

  /** Connect again after `close()` or "refused"; go on behind the last position. */
  open(): void;
  /** Let go of the channel. What waits to be sent is not. */
  close(): void;
  /**
   * Send a message to everybody in the channel, now or when there is a connection again.
   *
   * It is sent once. The promise need not be looked at.
   *
   * @returns its position, once it was relayed. Rejected with a RelayError where it was not, or
   *   where that is not known.
   * @throws RelayError: too much waits already ("full"), or nothing is to come ("closed").
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
