"""Collect messages that are written together, and encode them once for each delivery format.

Knows no channel, no queue and no flow control.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from time import perf_counter
from typing import NamedTuple

from websocket_relay.backplane.interface import LogEntry, Position
from websocket_relay.wire import sse
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.deflate import PLAIN, deflate_messages
from websocket_relay.wire.frames import OPCODE, TEXT, header
from websocket_relay.wire.sse import SSE

MESSAGE_BYTES = 96  # memory of a message besides its frame: two objects and their list slots


class DeliveryFormat(NamedTuple):
    """How messages are encoded for a client.

    Attributes:
        encoding: PLAIN, SSE, or the window bits of permessage-deflate (see `wire.deflate`).
        sends_positions: whether each message starts with its position (the subprotocol relay.v1).
    """

    encoding: int
    sends_positions: bool


PLAIN_FORMAT = DeliveryFormat(PLAIN, sends_positions=False)


def format_of(client: Connection) -> DeliveryFormat:
    """Return the delivery format of a client."""
    return DeliveryFormat(client.encoding, client.sends_positions)


RecipientGroups = list[tuple[DeliveryFormat, list[Connection]]]
"""The recipients of a batch, grouped by delivery format."""

HeaderAndPayload = tuple[bytes, bytes]


def encode_entries(
    entries: Iterable[LogEntry], delivery_format: DeliveryFormat, min_bytes: int
) -> Iterator[bytes]:
    """Yield frames; see `wire.deflate.deflate_messages`."""
    plain = ((header(e.opcode, len(e.payload)), e.payload) for e in entries)
    return _encode(plain, (e.position for e in entries), delivery_format, min_bytes)


def encode_notice(notice: Mapping[str, object], delivery_format: DeliveryFormat) -> bytes:
    """Return the frame or event of a notice, a message of the relay itself.

    Args:
        notice: its fields; `type` names its kind.
        delivery_format: of the recipients.
    """
    if delivery_format.encoding == SSE:
        return sse.encode_event(str(notice["type"]), notice)
    payload = b"\n" + json.dumps(notice, separators=(",", ":")).encode()
    return header(TEXT, len(payload)) + payload


class Batch:
    """Messages that are written together, and their recipients.

    The messages are encoded once for each group of recipients, whatever its size, one group after
    the other.

    Args:
        groups: the recipients; shared with other batches, never changed.
        groups_bytes: memory of the lists if this batch is the first that uses them, else 0.
        opened_at: time of the first message, by `time.perf_counter`.

    Attributes:
        memory_bytes: memory that the batch takes now.
        recipient_count: recipients of each message.
        message_count: messages in the batch.
        plain_bytes: size of all frames without compression and positions.
        next_index: the first recipient in the current group that is not written to yet.
        encoded: all frames, encoded for the current group; empty until `encode` is done.
    """

    __slots__ = (
        "_encoder",
        "_frames",
        "_group_index",
        "_groups",
        "_needs_positions",
        "_parts",
        "_parts_bytes",
        "_positions",
        "encoded",
        "memory_bytes",
        "message_count",
        "next_index",
        "opened_at",
        "plain_bytes",
        "recipient_count",
    )

    def __init__(self, groups: RecipientGroups, groups_bytes: int, opened_at: float) -> None:
        self._groups = groups
        self._group_index = 0
        self.memory_bytes = groups_bytes
        self.opened_at = opened_at
        self.recipient_count = sum(len(recipients) for _, recipients in groups)
        self.message_count = 0
        self.plain_bytes = 0
        self.next_index = 0
        self.encoded = b""
        self._parts: list[bytes] = []  # headers and payloads, alternating
        self._parts_bytes = 0  # memory of the parts
        self._needs_positions = any(each.sends_positions for each, _ in groups)
        self._positions: list[Position] = []  # empty unless a group is sent positions
        self._frames: list[bytes] = []
        self._encoder: Iterator[bytes] | None = None

    def add(self, entry: LogEntry) -> int:
        """Add a message; return the bytes of memory that it adds to the batch."""
        position, _, opcode, payload = entry
        head = header(opcode, len(payload))
        self._parts += (head, payload)
        if self._needs_positions:
            self._positions.append(position)
        size = len(head) + len(payload)
        self.plain_bytes += size
        self.message_count += 1
        added_bytes = size + MESSAGE_BYTES
        self.memory_bytes += added_bytes
        self._parts_bytes += added_bytes
        return added_bytes

    @property
    def is_started(self) -> bool:
        """Whether any recipient has been written to."""
        return self._group_index > 0 or self.next_index > 0

    @property
    def recipients(self) -> list[Connection]:
        """The recipients in the current group."""
        return self._groups[self._group_index][1]

    def encode(self, min_bytes: int, until: float) -> bool:
        """Encode all frames for the current group, for at most one time slice.

        Args:
            min_bytes: shorter messages are not compressed.
            until: end of the slice, by `time.perf_counter`.

        Returns:
            Whether `encoded` is complete.
        """
        if self.encoded:
            return True
        delivery_format = self._groups[self._group_index][0]
        if delivery_format == PLAIN_FORMAT:
            self.encoded = b"".join(self._parts)
            self.memory_bytes += len(self.encoded)
        else:
            if self._encoder is None:
                messages = zip(self._parts[::2], self._parts[1::2], strict=True)
                self._encoder = _encode(messages, self._positions, delivery_format, min_bytes)
            for frame in self._encoder:
                self._frames.append(frame)
                self.memory_bytes += len(frame)
                if perf_counter() > until:
                    return False
            self.encoded = b"".join(self._frames)
            self._frames.clear()
        if self._group_index == len(self._groups) - 1:
            self._parts.clear()
            self._positions.clear()
            self.memory_bytes -= self._parts_bytes
        return True

    def advance_group(self) -> bool:
        """Switch to the next group of recipients; return whether there is one."""
        self.memory_bytes -= len(self.encoded)
        self._group_index += 1
        self.next_index = 0
        self.encoded = b""
        self._encoder = None
        return self._group_index < len(self._groups)


def _encode(
    messages: Iterable[HeaderAndPayload],
    positions: Iterable[Position],
    delivery_format: DeliveryFormat,
    min_bytes: int,
) -> Iterator[bytes]:
    if delivery_format.encoding == SSE:
        return sse.encode_messages(messages, positions)
    if delivery_format.sends_positions:
        messages = _prefix_positions(messages, positions)
    if delivery_format.encoding != PLAIN:
        return deflate_messages(messages, delivery_format.encoding, min_bytes)
    return (head + payload for head, payload in messages)


def _prefix_positions(
    messages: Iterable[HeaderAndPayload], positions: Iterable[Position]
) -> Iterator[HeaderAndPayload]:
    for (head, payload), position in zip(messages, positions, strict=True):
        prefixed = b"%b\n%b" % (str(position).encode(), payload)
        yield header(head[0] & OPCODE, len(prefixed)), prefixed
