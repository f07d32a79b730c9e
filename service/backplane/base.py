"""Define the log that every replica tails: what it is given, what it gives, what it promises."""

from collections.abc import Callable
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """A message in the log.

    Attributes:
        position: where it stands; grows from entry to entry, and over restarts.
        channel: where it goes.
        opcode: text or binary, as RFC 6455 numbers them.
        payload: as it came.
    """

    position: int
    channel: str
    opcode: int
    payload: bytes


Deliver = Callable[[Entry], None]


class Backplane(Protocol):
    """One order for all.

    Every entry that was appended is delivered to every replica once, this one included, in the
    order of the positions. There is no other way for a message: what the log does not say was
    not said.
    """

    def tail(self, deliver: Deliver) -> None:
        """Give every entry from now on to `deliver`, in order, in the event loop's thread."""

    def append(self, channel: str, opcode: int, payload: bytes) -> None:
        """Add a message at the end. Never blocks."""
