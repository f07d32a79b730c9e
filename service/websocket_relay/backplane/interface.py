"""Define the log that every replica tails: what it is given, what it gives, what it promises."""

import asyncio
import re
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple, Protocol

from websocket_relay.counters import BackplaneCounters

POSITION = re.compile(r"([0-9]{1,20})-([0-9]{1,20})-([0-9]{1,10})", re.ASCII)

BEFORE_NEXT = 10**10 - 1
"""More than any there is, and the last that the text of a position has room for."""


class Position(NamedTuple):
    """Where an entry stands in the log. Positions only grow, also over restarts of all parts.

    Attributes:
        major, minor: as the broker counts.
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


class LogEntry(NamedTuple):
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


OnEntry = Callable[[LogEntry], None]

OnGap = Callable[[Position], None]
"""Told where the log is whole again: of what stands before that position, and was not delivered,
some may have been said. So it is called at the beginning, too."""


class Rejectable(Protocol):
    """What is asked of a client whose message can't be relayed."""

    def tell_unavailable(self, *, in_doubt: bool) -> None:
        """Tell it that its message did not get into the log; or, in doubt, that it may have."""


class BackplaneState(Enum):
    """How things stand with the log."""

    STARTING = auto()  # nothing has come back yet: what the log holds is being read
    UP = auto()
    OUTAGE = auto()  # messages do not get into the log, or do not come back from there


class Backplane(Protocol):
    """One order for all.

    Every entry that was appended is delivered to every replica once, this one included, in the
    order of the positions. There is no other way for a message: what the log does not say was
    not said.

    Attributes:
        begun: set once `state` is not STARTING any more.
        up: set while it is UP.
        turns: of the event loop that a message needs on its way through the backplane's tasks.
        relays_locally: whether messages are relayed on this replica alone during an outage.
    """

    books: BackplaneCounters
    state: BackplaneState
    begun: asyncio.Event
    up: asyncio.Event
    turns: int
    relays_locally: bool

    @property
    def position(self) -> Position:
        """Up to where everything has been delivered here."""

    @property
    def complete_until(self) -> float:
        """When, by `time.monotonic`, nothing stood in the log that was not delivered here."""

    def replicas(self) -> Sequence[bytes]:
        """Return what the replicas say of themselves that are there now, this one included."""

    @property
    def waiting(self) -> int:
        """How many messages were appended and are not in the log yet, as far as is known."""

    def tail(self, deliver: OnEntry, lost: OnGap) -> None:
        """Give every entry from now on to `deliver`, in order, in the event loop's thread."""

    def append(self, channel: str, opcode: int, payload: bytes, publisher: Rejectable) -> None:
        """Add a message at the end. Never blocks.

        Args:
            publisher: who is told, now or later, if it can't be done.
        """

    def append_all(
        self, channel: str, said: Sequence[tuple[int, bytes]], publisher: Rejectable
    ) -> None:
        """Add messages at the end, opcodes and payloads: all of them next to each other, or none.

        Args:
            channel: where all of them go.
            publisher: as above.
        """

    def when_delivered(self, answer: Callable[[Position | None], object]) -> None:
        """Call `answer` once the message that was appended last has been delivered here.

        It is told the position of that message; None where it was not relayed, or nobody knows.
        """

    def when_settled(self, act: Callable[[], None]) -> None:
        """Call `act` once all that was appended so far has been delivered here, or given up."""

    def pause_reading(self) -> None:
        """Deliver no more until `resume_reading`: too much waits to be written."""

    def resume_reading(self) -> None:
        """Deliver again."""

    async def run(self) -> None:
        """Do what is to be done, until cancelled."""

    async def flush(self) -> None:
        """Return when nothing that was appended waits any more."""
