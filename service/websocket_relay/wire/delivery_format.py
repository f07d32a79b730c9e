"""Encode messages as a client receives them. Knows no connection and no channel."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from websocket_relay.messages import TEXT, Message
from websocket_relay.wire import sse
from websocket_relay.wire.deflate import PLAIN, deflate_messages
from websocket_relay.wire.frames import encode_messages, header

Entry = tuple[object, str, int, bytes]
"""A `LogEntry` of the backplane: position, channel, kind, payload."""

SSE = -1
"""The encoding of an event stream."""


class DeliveryFormat(NamedTuple):
    """How messages are encoded for a client.

    Attributes:
        encoding: PLAIN, SSE, or the window bits of permessage-deflate (see `deflate`).
        sends_positions: whether each message starts with its position (the subprotocol relay.v1).
    """

    encoding: int
    sends_positions: bool

    @classmethod
    @cache
    def of(cls, encoding: int, *, sends_positions: bool) -> "DeliveryFormat":
        """Return the format, which all connections share."""
        return cls(encoding, sends_positions)

    def encode_messages(self, entries: Sequence[Entry], min_bytes: int) -> Iterator[bytes]:
        """Yield frames or events, and empty bytes where the caller may check the clock.

        Args:
            entries: the messages.
            min_bytes: shorter messages are not compressed.
        """
        if self.encoding == SSE:
            return sse.encode_messages(entries)
        messages: Iterable[Message] = (entry[2:] for entry in entries)
        if self.sends_positions:
            messages = _prefix_positions(entries)
        if self.encoding == PLAIN:
            return encode_messages(messages)
        return deflate_messages(messages, self.encoding, min_bytes)

    def encode_notice(self, notice: Mapping[str, object]) -> bytes:
        """Return the frame or event of a notice, a message of the relay itself.

        Args:
            notice: its fields; `type` names its kind.
        """
        if self.encoding == SSE:
            return sse.encode_event(str(notice["type"]), notice)
        payload = b"\n" + json.dumps(notice, separators=(",", ":")).encode()
        return header(TEXT, len(payload)) + payload


PLAIN_FORMAT = DeliveryFormat.of(PLAIN, sends_positions=False)


def _prefix_positions(entries: Iterable[Entry]) -> Iterator[Message]:
    for position, _, kind, payload in entries:
        yield kind, b"%b\n%b" % (str(position).encode(), payload)
