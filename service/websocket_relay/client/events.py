"""The values that a client receives: messages, and changes of its connection."""

from dataclasses import dataclass
from typing import Any

Data = str | bytes
"""Text or binary, as published."""

Header = dict[str, Any]
"""The JSON object at the start of each message of relay.v1."""


def encoded(data: Data) -> bytes:
    """Return a payload as it is sent; raises UnicodeEncodeError for invalid text."""
    return data.encode() if isinstance(data, str) else data


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a channel.

    Attributes:
        data: text or bytes, as published.
        channel: the name of the channel.
        position: the message's position; `subscribe(since=…)` resumes after it.
        after_gap: messages before this one are lost: the relay no longer had them.
    """

    data: Data
    channel: str
    position: str
    after_gap: bool = False


@dataclass(frozen=True, slots=True)
class Connected:
    """The client is connected.

    Attributes:
        is_resumed: whether the relay continues the session of the connection before.
    """

    is_resumed: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection was lost, or an attempt to connect failed.

    Attributes:
        reason: the cause.
        retry_s: seconds until the next attempt.
    """

    reason: str
    retry_s: float


Event = Connected | Disconnected
