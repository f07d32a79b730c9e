"""Define the log that every replica tails: what it is given, what it gives, what it promises."""

import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

POSITION = re.compile(r"([0-9]{1,20})-([0-9]{1,20})-([0-9]{1,10})", re.ASCII)

BEFORE_NEXT = 10**10 - 1
"""More than any there is, and the last that the text of a position has room for."""


class Position(NamedTuple):
    """Where an entry stands in the log. Positions only grow, also over restarts.

    Attributes:
        major, minor: as the log counts.
        nth: among the messages that were appended in one go.
    """

    major: int
    minor: int
    nth: int

    def __str__(self) -> str:
        """Return what clients are told, and bring back."""
        return f"{self.major}-{self.minor}-{self.nth}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Read what a client brings.

        Raises:
            ValueError: it is no position.
        """
        found = POSITION.fullmatch(text)
        if found is None:
            raise ValueError("not a position")
        return cls(*map(int, found.groups()))

    def before(self) -> "Position":
        """Return a position behind all that come before this one."""
        major, minor, nth = self
        if nth:
            return Position(major, minor, nth - 1)
        if minor:
            return Position(major, minor - 1, BEFORE_NEXT)
        return Position(max(0, major - 1), BEFORE_NEXT, BEFORE_NEXT)


START = Position(0, 0, 0)
"""Before all others."""


class Entry(NamedTuple):
    """A message in the log.

    Attributes:
        position: where it stands.
        channel: where it goes.
        opcode: text or binary, as RFC 6455 numbers them.
        payload: as it came.
    """

    position: Position
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

    def tail(self, deliver: Deliver) -> Position:
        """Give every entry from now on to `deliver`, in order, in the event loop's thread.

        Returns:
            What it is all behind.
        """

    def append(self, channel: str, opcode: int, payload: bytes) -> None:
        """Add a message at the end. Never blocks."""
