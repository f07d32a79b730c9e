"""What a client is told: messages, and what happens to its connection."""

from dataclasses import dataclass

from websocket_relay.client.connection import Data


@dataclass(frozen=True, slots=True)
class Message:
    """What a channel relayed.

    Attributes:
        data: text or bytes, as it was sent.
        position: where it stands; `Relay(since=…)` goes on behind it.
        after_gap: the relay no longer had all that came before it.
    """

    data: Data
    position: str
    after_gap: bool = False


@dataclass(frozen=True, slots=True)
class Connected:
    """The relay was reached.

    Attributes:
        is_recovered: whether nothing was missed.
    """

    is_recovered: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The relay is not reached.

    Attributes:
        reason: why.
        retry_s: when it is tried again.
    """

    reason: str
    retry_s: float


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """Nobody knows whether messages were relayed, and they are not sent again.

    Attributes:
        count: how many.
        reason: what happened.
    """

    count: int
    reason: str


Event = Connected | Disconnected | Unconfirmed
