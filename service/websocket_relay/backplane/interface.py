"""Define the log that every replica consumes: its values, its interface and its guarantees.

Knows no broker and no client.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from typing import NamedTuple, Protocol

from websocket_relay.counters import BackplaneCounters
from websocket_relay.messages import Message, Publisher

POSITION = re.compile(r"([0-9]{1,20})-([0-9]{1,20})-([0-9]{1,10})", re.ASCII)

UPPER_BOUND = 10**10 - 1
"""Greater than any offset or index in use; the largest index that fits into the text form."""


class Position(NamedTuple):
    """The position of an entry in the log.

    Positions only grow, also over restarts of relays and of the broker.

    Attributes:
        epoch: epoch. With Redis the milliseconds of the entry id, with JetStream the creation time
            of the stream in milliseconds. Unrelated to the producer epoch.
        offset: in the epoch, as the broker counts it: the sequence of a Redis id (ms-seq), or the
            JetStream sequence.
        index: index of the message in its packet.
    """

    epoch: int
    offset: int
    index: int  # type: ignore[assignment]  # hides tuple.index

    def __str__(self) -> str:
        """Return the text form, which clients receive and send back."""
        return f"{self.epoch}-{self.offset}-{self.index}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Parse the text form, as sent by a client.

        Raises:
            ValueError: the text is not a position.
        """
        found = POSITION.fullmatch(text)
        if found is None:
            raise ValueError("not a position")
        return cls(*map(int, found.groups()))

    def before(self) -> "Position":
        """Return the greatest position before this one."""
        epoch, offset, index = self
        if index:
            return Position(epoch, offset, index - 1)
        if offset:
            return Position(epoch, offset - 1, UPPER_BOUND)
        return Position(max(0, epoch - 1), UPPER_BOUND, UPPER_BOUND)


START = Position(0, 0, 0)
"""Before all other positions."""

SESSION, IDEMPOTENCY_KEY, ORIGIN = 1, 2, 3
"""The kinds of sources, the first byte of each: a session of relay.v1, an Idempotency-Key, and a
connection that is sent no message of its own."""

SOURCE_BYTES = 17
"""Size of the key of a source: its kind, and a digest or a random number."""


class Source(NamedTuple):
    """Who publishes messages that are identified.

    Attributes:
        key: the kind, and a digest or a random number: SOURCE_BYTES.
        complete_after: the publisher's replica knew all identified messages after this position.
    """

    key: bytes
    complete_after: Position


class Identity(NamedTuple):
    """What identifies the messages of one append, so that every replica detects a repeat.

    Attributes:
        source: who publishes.
        numbers: of the messages in that source, growing; equal for the messages of a batch.
    """

    source: Source
    numbers: Sequence[int]

    def of_each(self) -> "Identities":
        """Return the same for each of the messages, which this replica appended."""
        source, numbers = self
        return Identities((source,), (1,) * len(numbers), numbers, is_own=True)


class Identities(NamedTuple):
    """The identities of entries that are next to each other in the log.

    Attributes:
        sources: of the entries. Each append has one of its own, unless it is a session's.
        indices: one for each entry: of its source, counted from 1; 0: it has no identity.
        numbers: one for each entry: see `Identity`.
        is_own: whether this replica appended the entries.
    """

    sources: Sequence[Source]
    indices: Sequence[int]
    numbers: Sequence[int]
    is_own: bool = False


class LogEntry(NamedTuple):
    """A message in the log.

    Attributes:
        position: position of the message.
        channel: name of the channel.
        kind: text or binary.
        payload: bytes of the message, unchanged.
    """

    position: Position
    channel: str
    kind: int
    payload: bytes


ENTRY_BYTES = 320
"""Memory of an entry besides its payload: its objects and a list slot."""


# Built in batches of a thousand: `_make` and the classes themselves are Python calls, these are C
# calls.
new_position: Callable[[tuple[int, int, int]], Position] = partial(tuple.__new__, Position)
new_entry: Callable[[tuple[Position, str, int, bytes]], LogEntry] = partial(tuple.__new__, LogEntry)

OnEntries = Callable[[Sequence[LogEntry], Identities | None], None]
"""Receives entries that are next to each other in the log, in their order. Their identities are
None where no entry has one."""

AppendMessages = Callable[[str, Sequence[Message], int, Publisher, Identity | None], None]
"""See `Backplane.append`."""

OnHeartbeat = Callable[[Position, bytes], None]
"""Receives the description of a replica, and the position in the log at which it was alive."""

OnGap = Callable[[Position], None]
"""Receives the position from which on the log is complete again. Messages before that position that
were not delivered may have existed. So it is called at the start, too."""


class BackplaneState(Enum):
    """Whether the log can be appended to and read."""

    STARTING = auto()  # no heartbeat has been read back yet: the existing log is being read
    UP = auto()
    OUTAGE = auto()  # messages do not enter the log, or are not read back from it


class Backplane(Protocol):
    """A log with one total order for all replicas.

    Every appended entry is delivered to every replica once, the appending one included, in the
    order of the positions. There is no other delivery path: a message that is not in the log is not
    delivered. The exception is an outage where `relays_locally` is set.

    Attributes:
        counters: counters.
        started: set once `state` has left STARTING.
        up: set while `state` is UP.
        is_local: whether entries are delivered within `append`.
        relays_locally: whether messages are relayed on this replica alone during an outage.
        on_heartbeat: called with each heartbeat of a replica that is read. A local log has none.
    """

    counters: BackplaneCounters
    started: asyncio.Event
    up: asyncio.Event
    is_local: bool
    relays_locally: bool
    on_heartbeat: OnHeartbeat

    @property
    def state(self) -> BackplaneState:
        """Whether the log can be appended to and read."""

    @property
    def is_relaying_alone(self) -> bool:
        """Whether the entries that are delivered now are in no log: no other replica reads them."""

    @property
    def position(self) -> Position:
        """The position up to which everything has been delivered here."""

    @property
    def complete_until(self) -> float:
        """Entries appended before this time (`time.monotonic`) have been delivered here."""

    def replicas(self) -> Sequence[bytes]:
        """Return the descriptions of the replicas that are alive, this one included."""

    @property
    def unconfirmed_messages(self) -> int:
        """The count of messages whose append is not confirmed."""

    def consume(self, deliver: OnEntries, lost: OnGap) -> None:
        """Pass every entry from now on to `deliver`, in order, in the event loop's thread.

        Args:
            deliver: called with one or more entries.
            lost: called where entries are missing.
        """

    def append(
        self,
        channel: str,
        messages: Sequence[Message],
        payload_bytes: int,
        publisher: Publisher,
        identity: Identity | None = None,
    ) -> None:
        """Append messages next to each other: all of them, or none. Never blocks.

        Args:
            channel: the channel of all of them.
            messages: one or more.
            payload_bytes: size of their payloads.
            publisher: notified, now or later, if the messages can't be relayed.
            identity: of the messages; None: they have none.
        """

    def when_delivered(self, callback: Callable[[Position | None], object]) -> None:
        """Call `callback` once the message that was appended last has been delivered here.

        It receives the position of that message; None if it was not relayed, or is unconfirmed.
        """

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call `callback` once each message appended so far is delivered here or abandoned."""

    def pause_reading(self) -> None:
        """Stop delivery until `resume_reading`: too many bytes are pending towards clients."""

    def resume_reading(self) -> None:
        """Resume delivery."""

    async def run(self) -> None:
        """Run the log's tasks until cancelled."""

    async def flush(self) -> None:
        """Return once no append is pending."""
