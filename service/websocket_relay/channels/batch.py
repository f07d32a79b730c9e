"""Collect messages that are written together, and their recipients. Knows no channel."""

from collections.abc import Iterable, Iterator

from websocket_relay.backplane.interface import ENTRY_BYTES, LogEntry, Position
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.delivery_format import DeliveryFormat
from websocket_relay.wire.frames import MAX_HEADER_BYTES

POINTER_BYTES = 8


class Recipients:
    """The members of a channel at one moment; shared by batches, never changed.

    Args:
        members: by delivery format.

    Attributes:
        groups: the same, as lists.
        count: number of members.
        memory_bytes: memory of the lists.
        batches: number of batches for these recipients that are not written yet.
    """

    __slots__ = ("batches", "count", "groups", "memory_bytes")

    def __init__(self, members: Iterable[tuple[DeliveryFormat, Iterable[Connection]]]) -> None:
        self.groups = [(delivery_format, list(group)) for delivery_format, group in members]
        self.count = sum(len(group) for _, group in self.groups)
        self.memory_bytes = POINTER_BYTES * self.count
        self.batches = 0


class Batch:
    """Messages that are written together, and their recipients.

    Args:
        recipients: the members when the messages were published.
        opened_at: time of the first message, by `time.perf_counter`.

    Attributes:
        entries: the messages.
        own_positions: by recipient that is sent no message of its own: the positions of these.
        frame_bytes: size of their frames without compression and headers, at most.
        memory_bytes: memory of the entries.
    """

    __slots__ = (
        "entries",
        "frame_bytes",
        "memory_bytes",
        "opened_at",
        "own_positions",
        "recipients",
    )

    def __init__(self, recipients: Recipients, opened_at: float) -> None:
        self.entries: list[LogEntry] = []
        self.own_positions: dict[Connection, set[Position]] = {}
        self.recipients = recipients
        self.opened_at = opened_at
        self.frame_bytes = 0
        self.memory_bytes = 0

    @property
    def groups(self) -> Iterable[tuple[DeliveryFormat, list[Connection], list[LogEntry]]]:
        """The recipients that are sent the same bytes, and the entries in these."""
        groups = self.recipients.groups
        if self.own_positions:
            return self._groups_without_echo()
        return [(delivery_format, clients, self.entries) for delivery_format, clients in groups]

    def _groups_without_echo(
        self,
    ) -> Iterator[tuple[DeliveryFormat, list[Connection], list[LogEntry]]]:
        """Yield the groups; each recipient that is not sent entries of its own is one."""
        own_positions = self.own_positions
        for delivery_format, clients in self.recipients.groups:
            if delivery_format.echoes:
                yield delivery_format, clients, self.entries
                continue
            others = [client for client in clients if client not in own_positions]
            if others:
                yield delivery_format, others, self.entries
            for publisher in own_positions.keys() & clients:
                own = own_positions[publisher]
                rest = [entry for entry in self.entries if entry.position not in own]
                if rest:
                    yield delivery_format, [publisher], rest

    def add(self, entry: LogEntry) -> int:
        """Add a message; return the bytes of memory that it takes."""
        self.entries.append(entry)
        size = len(entry[3])
        self.frame_bytes += size + MAX_HEADER_BYTES
        memory_bytes = size + ENTRY_BYTES
        self.memory_bytes += memory_bytes
        return memory_bytes
