"""Encode messages as a client receives them. Knows no connection and no channel."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum, auto
from functools import cache
from typing import NamedTuple

from websocket_relay.messages import Message
from websocket_relay.wire import sse
from websocket_relay.wire.deflate import PLAIN, deflate_messages
from websocket_relay.wire.frames import encode_messages
from websocket_relay.wire.relay_v1 import encode_notice, prefix_headers

Entry = tuple[tuple[int, int, int], str, int, bytes]
"""A `LogEntry` of the backplane: position, channel, kind, payload."""


class Layout(Enum):
    """What a client is sent of a message."""

    PAYLOAD = auto()  # nothing else
    HEADER = auto()  # a header before the payload: relay.v1
    EVENT = auto()  # a server-sent event
    NAMED_EVENT = auto()  # one that names its channel


class DeliveryFormat(NamedTuple):
    """How messages are encoded for a client.

    Attributes:
        layout: what it is sent of a message.
        encoding: PLAIN, or the window bits of permessage-deflate (see `deflate`).
        echoes: whether it is sent its own messages.
    """

    layout: Layout
    encoding: int
    echoes: bool

    @classmethod
    @cache
    def of(cls, layout: Layout, encoding: int = PLAIN, *, echoes: bool = True) -> "DeliveryFormat":
        """Return the format, which all connections share."""
        return cls(layout, encoding, echoes)

    def encode_messages(self, entries: Sequence[Entry], min_bytes: int) -> Iterator[bytes]:
        """Yield frames or events, and empty bytes where the caller may check the clock.

        Args:
            entries: the messages.
            min_bytes: shorter messages are not compressed.
        """
        if self.layout in EVENT_LAYOUTS:
            return sse.encode_messages(entries, names_channels=self.layout is Layout.NAMED_EVENT)
        messages: Iterable[Message] = (entry[2:] for entry in entries)
        if self.layout is Layout.HEADER:
            messages = prefix_headers(entries)
        if self.encoding == PLAIN:
            return encode_messages(messages)
        return deflate_messages(messages, self.encoding, min_bytes)

    def encode_notice(self, fields: Mapping[str, object]) -> bytes:
        """Return a notice about a channel; empty: a plain WebSocket is sent none.

        Args:
            fields: of the notice, its `type` among them.
        """
        if self.layout is Layout.HEADER:
            return encode_notice(fields)
        if self.layout in EVENT_LAYOUTS:
            return sse.encode_event(str(fields["type"]), fields)
        return b""

    def encode_gap(self, channel: str, position: object) -> bytes:
        """Return the notice that messages up to a position may be missing; empty: there is none."""
        if self.layout is Layout.HEADER:
            return encode_notice({"type": "gap", "channel": channel, "position": str(position)})
        if self.layout in EVENT_LAYOUTS:
            return sse.encode_event("gap", {"type": "gap", "position": str(position)})
        return b""


EVENT_LAYOUTS = (Layout.EVENT, Layout.NAMED_EVENT)

PLAIN_FORMAT = DeliveryFormat.of(Layout.PAYLOAD)
