"""Gather messages that leave together, and encode them for those who get them."""

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

MESSAGE_BYTES = 96  # what a message takes besides its frame: two objects and where they are listed


class DeliveryFormat(NamedTuple):
    """How a client is sent messages.

    Attributes:
        encoding: PLAIN, or the bits of the window they are compressed with (see `wire.deflate`), or
            EVENTS.
        tells_positions: whether each begins with its position (the subprotocol relay.v1).
    """

    encoding: int
    tells_positions: bool


PLAIN_FORMAT = DeliveryFormat(PLAIN, tells_positions=False)


def format_of(client: Connection) -> DeliveryFormat:
    """Return how a client is sent messages."""
    return DeliveryFormat(client.encoding, client.tells_positions)


Recipients = list[tuple[DeliveryFormat, list[Connection]]]
"""The members of a channel by how they are sent messages."""

HeadAndPayload = tuple[bytes, bytes]


def encode_entries(
    entries: Iterable[LogEntry], form: DeliveryFormat, min_bytes: int
) -> Iterator[bytes]:
    """Yield frames; see `wire.deflate.deflated`."""
    plain = ((header(e.opcode, len(e.payload)), e.payload) for e in entries)
    return _formed(plain, (e.position for e in entries), form, min_bytes)


def encode_notice(said: Mapping[str, object], form: DeliveryFormat) -> bytes:
    """Return what the relay itself says; its `type` says what it is."""
    if form.encoding == SSE:
        return sse.encode_event(str(said["type"]), said)
    payload = b"\n" + json.dumps(said, separators=(",", ":")).encode()
    return header(TEXT, len(payload)) + payload


class Batch:
    """Messages that leave together, and who gets them.

    They are encoded once for each group of the audience, in turn, whatever its size.

    Args:
        audience: who gets them; shared, never changed.
        audience_bytes: of the lists, where they are this batch's own.
        opened_at: when the first message came.
    """

    __slots__ = (
        "_audience",
        "_encoder",
        "_frames",
        "_group",
        "_parts",
        "_parts_bytes",
        "_positions",
        "_tells_positions",
        "data",
        "kept_bytes",
        "messages",
        "next",
        "opened_at",
        "owed",
        "size",
    )

    def __init__(self, audience: Recipients, audience_bytes: int, opened_at: float) -> None:
        self._audience = audience
        self._group = 0
        self.kept_bytes = audience_bytes  # what it takes in memory now
        self.opened_at = opened_at
        self.owed = sum(len(recipients) for _, recipients in audience)  # for each message
        self.messages = 0
        self.size = 0  # bytes of all frames, plain
        self.next = 0  # the first of the group that was not written to yet
        self.data = b""  # all frames, once they are encoded for the group
        self._parts: list[bytes] = []  # heads and payloads, in turn
        self._parts_bytes = 0  # what they take in memory
        self._tells_positions = any(form.tells_positions for form, _ in audience)
        self._positions: list[Position] = []  # where anybody is told
        self._frames: list[bytes] = []
        self._encoder: Iterator[bytes] | None = None

    def add(self, entry: LogEntry) -> int:
        """Add a message; return how much more memory the batch takes."""
        position, _, opcode, payload = entry
        head = header(opcode, len(payload))
        self._parts += (head, payload)
        if self._tells_positions:
            self._positions.append(position)
        size = len(head) + len(payload)
        self.size += size
        self.messages += 1
        kept = size + MESSAGE_BYTES
        self.kept_bytes += kept
        self._parts_bytes += kept
        return kept

    @property
    def is_begun(self) -> bool:
        """Whether anybody was written to."""
        return self._group > 0 or self.next > 0

    @property
    def recipients(self) -> list[Connection]:
        """The group whose turn it is."""
        return self._audience[self._group][1]

    def encode(self, min_bytes: int, until: float) -> bool:
        """Encode all frames for the group whose turn it is, for a slice of time.

        Args:
            min_bytes: shorter messages are not compressed.
            until: when to stop, by `time.perf_counter`.

        Returns:
            Whether `data` is there.
        """
        if self.data:
            return True
        form = self._audience[self._group][0]
        if form == PLAIN_FORMAT:
            self.data = b"".join(self._parts)
            self.kept_bytes += len(self.data)
        else:
            if self._encoder is None:
                messages = zip(self._parts[::2], self._parts[1::2], strict=True)
                self._encoder = _formed(messages, self._positions, form, min_bytes)
            for frame in self._encoder:
                self._frames.append(frame)
                self.kept_bytes += len(frame)
                if perf_counter() > until:
                    return False
            self.data = b"".join(self._frames)
            self._frames.clear()
        if self._group == len(self._audience) - 1:
            self._parts.clear()
            self._positions.clear()
            self.kept_bytes -= self._parts_bytes
        return True

    def next_group(self) -> bool:
        """Go on to the next group; tell whether there is one."""
        self.kept_bytes -= len(self.data)
        self._group += 1
        self.next = 0
        self.data = b""
        self._encoder = None
        return self._group < len(self._audience)


def _formed(
    messages: Iterable[HeadAndPayload],
    positions: Iterable[Position],
    form: DeliveryFormat,
    min_bytes: int,
) -> Iterator[bytes]:
    if form.encoding == SSE:
        return sse.encode_messages(messages, positions)
    if form.tells_positions:
        messages = _numbered(messages, positions)
    if form.encoding != PLAIN:
        return deflate_messages(messages, form.encoding, min_bytes)
    return (head + payload for head, payload in messages)


def _numbered(
    messages: Iterable[HeadAndPayload], positions: Iterable[Position]
) -> Iterator[HeadAndPayload]:
    for (head, payload), position in zip(messages, positions, strict=True):
        numbered = b"%b\n%b" % (str(position).encode(), payload)
        yield header(head[0] & OPCODE, len(numbered)), numbered
