"""The values that a client receives: messages, and changes of its connection."""

from dataclasses import dataclass

from websocket_relay.client.connection import Data


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the channel.

    Attributes:
        data: text or bytes, as published.
        position: the message's position; `Relay(since=…)` resumes after it.
        after_gap: messages before this one are lost: the relay no longer had them.
    """

    data: Data
    position: str
    after_gap: bool = False


@dataclass(frozen=True, slots=True)
class Connected:
    """The client is connected.

    Attributes:
        is_recovered: whether the relay replays every message since the last connection.
    """

    is_recovered: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection was lost, or an attempt to connect failed.

    Attributes:
        reason: the cause.
        retry_s: seconds until the next attempt.
    """

    reason: str
    retry_s: float


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """Messages may or may not have been relayed, and are not sent again.

    Attributes:
        count: number of messages.
        reason: the cause.
    """

    count: int
    reason: str


Event = Connected | Disconnected | Unconfirmed
