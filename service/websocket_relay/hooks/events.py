"""Define the events of webhooks, and encode them as JSON. Knows no channel and no receiver."""

import codecs
import json
from base64 import b64encode
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from websocket_relay.backplane.interface import START, Position
from websocket_relay.messages import TEXT

JOINED, LEFT, OCCUPIED, VACATED = "joined", "left", "occupied", "vacated"
PUBLISHED, DROPPED = "published", "dropped"

PIECE_BYTES = 49_152
"""Payload bytes that are encoded at a time. A multiple of 3: base64 has no padding in between."""


class EventId(NamedTuple):
    """The id of an event: the same on every replica, and greater than those of earlier events.

    Attributes:
        position: of the entry in the log that the event follows from.
        ordinal: of the event among those of the entry.
    """

    position: Position
    ordinal: int

    def __str__(self) -> str:
        """Return the text form, which receivers compare."""
        return f"{self.position}/{self.ordinal}"

    @classmethod
    def parse(cls, text: str) -> "EventId":
        """Parse the text form.

        Raises:
            ValueError: the text is not an id.
        """
        position, _, ordinal = text.partition("/")
        return cls(Position.parse(position), int(ordinal))


NO_EVENT = EventId(START, 0)
"""Before all other ids."""


class Event(NamedTuple):
    """An event.

    Attributes:
        event_id: the id.
        at: when it happened, in seconds since 1970.
        kind: of the event.
        channel: where it happened; empty: in no channel.
        facts: further fields.
        message: kind and payload of a message; None: the event is about none.
    """

    event_id: EventId
    at: float
    kind: str
    channel: str
    facts: Mapping[str, Any]
    message: tuple[int, bytes] | None = None

    @property
    def payload_bytes(self) -> int:
        """The size of the payload."""
        return len(self.message[1]) if self.message is not None else 0


def encode(event: Event) -> Iterator[bytes]:
    """Yield the JSON of an event in pieces, none of which takes more than a millisecond or so."""
    fields: dict[str, Any] = {"id": str(event.event_id), "at": event.at, "type": event.kind}
    if event.channel:
        fields["channel"] = event.channel
    # In ASCII: a name from a token may have half of a surrogate pair, which UTF-8 has not.
    head = json.dumps({**fields, **event.facts}, separators=(",", ":")).encode()
    if event.message is None:
        yield head
        return
    kind, payload = event.message
    yield head[:-1] + (b',"text":"' if kind == TEXT else b',"base64":"')
    yield from _encode_text(payload) if kind == TEXT else _encode_binary(payload)
    yield b'"}'


def _encode_text(payload: bytes) -> Iterator[bytes]:
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    for start in range(0, len(payload), PIECE_BYTES):
        part = decode(payload[start : start + PIECE_BYTES], start + PIECE_BYTES >= len(payload))
        yield json.dumps(part, ensure_ascii=False)[1:-1].encode()


def _encode_binary(payload: bytes) -> Iterator[bytes]:
    for start in range(0, len(payload), PIECE_BYTES):
        yield b64encode(payload[start : start + PIECE_BYTES])
