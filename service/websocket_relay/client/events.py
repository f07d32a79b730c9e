"""The values that a client receives: messages, changes of its connection, and presence."""

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


@dataclass(frozen=True, slots=True)
class Member:
    """A client in a channel with presence.

    Attributes:
        client: its id, which it keeps when it resumes its session.
        user: the subject of its token; empty: it has none.
        info: what its token has as `info`.
        since: when it joined, in seconds since 1970; None: after this subscription.
    """

    client: str
    user: str
    info: Any = None
    since: float | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """A client has joined the channel."""

    member: Member


@dataclass(frozen=True, slots=True)
class Left:
    """A client has left the channel."""

    member: Member


@dataclass(frozen=True, slots=True)
class Counted:
    """The list of members was replaced, or only the number of clients is known.

    Attributes:
        count: the number of clients.
    """

    count: int


PresenceEvent = Joined | Left | Counted
