"""Encode server-sent events (HTML, section 9.2). Knows no connection, no channel and no HTTP."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping

from websocket_relay.messages import BINARY

KEEPALIVE_COMMENT = b":\n\n"

TEXT_TYPE, BINARY_TYPE = b"message", b"binary"
"""The types of events, followed by a colon and the channel in a stream of several channels. A
browser dispatches an event without a type as `message`."""


def encode_event(name: str, fields: Mapping[str, object], members: str = "") -> bytes:
    """Return an event of the relay itself: a JSON object under a name.

    Args:
        name: of the event.
        fields: at least one. A position becomes the event's id: a client that reconnects before its
            first message resumes from there.
        members: further ones, as JSON without braces.
    """
    text = json.dumps(fields, separators=(",", ":"))
    if members:
        text = f"{text[:-1]},{members}}}"
    id_line = f"id: {fields['position']}\n" if "position" in fields else ""
    return f"{id_line}event: {name}\ndata: {text}\n\n".encode()


def encode_messages(
    entries: Iterable[tuple[tuple[int, int, int], str, int, bytes]], *, names_channels: bool
) -> Iterator[bytes]:
    """Yield one event for each message.

    Args:
        entries: position, channel, kind and payload of each. Clients send the position back in
            Last-Event-ID.
        names_channels: whether the types of the events name the channels.
    """
    for position, channel, kind, payload in entries:
        name = str(position).encode()
        event = b""
        if names_channels:
            event = b"event: %b:%b\n" % (
                BINARY_TYPE if kind == BINARY else TEXT_TYPE,
                channel.encode(),
            )
        elif kind == BINARY:
            event = b"event: %b\n" % BINARY_TYPE
        if kind == BINARY:
            data = base64.b64encode(payload)
        elif b"\n" in payload or b"\r" in payload:
            data = _data_lines(payload)
        else:
            data = payload
        yield b"id: %b\n%bdata: %b\n\n" % (name, event, data)


def _data_lines(payload: bytes) -> bytes:
    """Prefix each line with the field name. Every kind of line ending arrives as a line feed."""
    # Not a regular expression: for 1 MiB of line feeds it blocks the loop for 0.25 seconds.
    normalized = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return normalized.replace(b"\n", b"\ndata: ")


def encode_close(code: int, reason: str, retry_ms: int | None) -> bytes:
    """Return the last event of a stream.

    Args:
        code: the close code.
        reason: as a close frame has it.
        retry_ms: after which time the client should reconnect; None: unchanged.
    """
    retry_field = b"" if retry_ms is None else b"retry: %d\n" % retry_ms
    return retry_field + encode_event("close", {"code": code, "reason": reason})
