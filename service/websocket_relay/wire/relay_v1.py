"""Encode and parse the messages of the subprotocol relay.v1. Knows no connection and no channel.

A message is a header, one line of JSON, and a payload: docs/reference/relay-v1.md.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from websocket_relay.messages import TEXT, Message
from websocket_relay.outcomes import Close
from websocket_relay.strict_json import scan
from websocket_relay.wire.frames import ProtocolViolationError, header

SUBPROTOCOL = "relay.v1"

MAX_COMMAND_BYTES = 32_768
"""Maximum size of the header of a command: a token of the maximum size, and some more."""

MAX_ID = 2**53 - 1
"""The greatest integer that a number of JavaScript holds exactly."""


JSON_SPACE = " \t\r"


class Command(NamedTuple):
    """A command of a client.

    Attributes:
        type: what to do.
        id: of the command.
        fields: all fields of the header.
        payload: what follows the header.
    """

    type: str
    id: int
    fields: Mapping[str, Any]
    payload: bytes


new_command: Callable[[tuple[str, int, Mapping[str, Any], bytes]], Command]
new_command = partial(tuple.__new__, Command)  # a C call; the class itself is a Python call


def parse_command(message: bytes) -> Command:
    """Parse a message of a client.

    Raises:
        ProtocolViolationError: the header is not that of a command.
    """
    line, _, payload = message.partition(b"\n")
    if len(line) > MAX_COMMAND_BYTES:
        raise ProtocolViolationError(Close.PROTOCOL_ERROR, "header too long")
    try:
        text = line.decode().strip(JSON_SPACE)
        fields, end = scan(text, 0)
    except (ValueError, RecursionError, StopIteration):
        raise ProtocolViolationError(Close.PROTOCOL_ERROR, "header is not JSON") from None
    if type(fields) is not dict or end != len(text):
        raise ProtocolViolationError(Close.PROTOCOL_ERROR, "header is not a JSON object")
    kind, number = fields.get("type"), fields.get("id")
    if type(kind) is not str:
        raise ProtocolViolationError(Close.PROTOCOL_ERROR, "header has no type")
    if type(number) is not int or not 0 < number <= MAX_ID:
        raise ProtocolViolationError(Close.PROTOCOL_ERROR, "header has no valid id")
    return new_command((kind, number, fields, payload))


def encode_notice(fields: Mapping[str, object], members: str = "") -> bytes:
    """Return the frame of a message of the relay itself.

    Args:
        fields: at least one.
        members: further ones, as JSON without braces.
    """
    text = json.dumps(fields, separators=(",", ":"))
    payload = (f"{text[:-1]},{members}}}\n" if members else f"{text}\n").encode()
    return header(TEXT, len(payload)) + payload


def encode_published(number: int, position: object) -> bytes:
    """Return the frame that acknowledges a publish.

    Args:
        number: id of the publish.
        position: of the message.
    """
    text = f'{{"type":"published","id":{number},"position":"{position}"}}\n'.encode()
    return header(TEXT, len(text)) + text


def prefix_headers(
    entries: Iterable[tuple[tuple[int, int, int], str, int, bytes]],
) -> Iterator[Message]:
    """Yield messages as the subscribers of relay.v1 receive them.

    Args:
        entries: position, channel, kind and payload of each.
    """
    for (epoch, offset, index), channel, kind, payload in entries:
        # Names need no escapes.
        head = f'{{"channel":"{channel}","position":"{epoch}-{offset}-{index}"}}\n'
        yield kind, head.encode() + payload
