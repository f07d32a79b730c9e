"""The headers of relay.v1: which messages are commands, and what the relay itself sends."""

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.interface import Position
from websocket_relay.messages import BINARY, TEXT
from websocket_relay.outcomes import Close
from websocket_relay.wire.frames import ProtocolViolationError
from websocket_relay.wire.relay_v1 import (
    MAX_COMMAND_BYTES,
    MAX_ID,
    Command,
    encode_notice,
    encode_published,
    parse_command,
    prefix_headers,
)

pytestmark = pytest.mark.fast

deterministic = settings(max_examples=60, deadline=None, derandomize=True, database=None)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
IDS = st.integers(1, MAX_ID)
FIELDS = st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4)
POSITIONS = st.builds(
    Position, st.integers(0, 10**20 - 1), st.integers(0, 10**20 - 1), st.integers(0, 10**10 - 1)
)
ASCII_JSON = st.text(st.sampled_from('{}[]",:\\ntypeidu0123456789.-+eE \t\r\n'), max_size=80)
"""Texts that are almost JSON."""


def encode(fields: Mapping[str, Any], *, ascii_only: bool = True) -> bytes:
    return json.dumps(fields, ensure_ascii=ascii_only).encode()


def violation(message: bytes) -> str:
    """Assert that a message violates the protocol; return the detail of the close reason."""
    with pytest.raises(ProtocolViolationError) as raised:
        parse_command(message)
    assert raised.value.close is Close.PROTOCOL_ERROR
    assert 0 < len(raised.value.detail.encode()) < 100
    return raised.value.detail


def split_frame(frame: bytes) -> tuple[bytes, bytes]:
    """Return the header and the payload of an unmasked text frame, parsed by RFC 6455 alone."""
    assert frame[0] == 0x81
    size, at = frame[1], 2
    if size == 126:
        size, at = int.from_bytes(frame[2:4], "big"), 4
    elif size == 127:
        size, at = int.from_bytes(frame[2:10], "big"), 10
    assert len(frame) == at + size
    header, line_feed, payload = frame[at:].partition(b"\n")
    assert line_feed
    return header, payload


# Commands


@deterministic
@given(FIELDS, st.text(max_size=12), IDS, st.binary(max_size=60), st.booleans())
def test_a_header_with_type_and_id_is_a_command_with_its_payload_unchanged(
    fields: dict[str, Any], kind: str, number: int, payload: bytes, ascii_only: bool
) -> None:
    header = {**fields, "type": kind, "id": number}
    encoded = encode(header, ascii_only=ascii_only)
    assert parse_command(encoded + b"\n" + payload) == Command(kind, number, header, payload)


@pytest.mark.parametrize(
    "payload", [b"", b"\n", b"\n\n{}\n", b"\r\n", b"\x00\xff", b'{"type":"x"}']
)
def test_only_the_first_line_feed_separates_the_payload(payload: bytes) -> None:
    header = b'{"type":"publish","id":1}'
    assert parse_command(header + b"\n" + payload).payload == payload


def test_the_line_feed_may_be_absent_without_a_payload() -> None:
    assert parse_command(b'{"type":"ping","id":1}') == parse_command(b'{"type":"ping","id":1}\n')


def test_spaces_around_the_object_and_a_carriage_return_are_json_whitespace() -> None:
    assert parse_command(b' {"type":"ping","id":1}\t\r\n\r\n').payload == b"\r\n"


@deterministic
@given(st.binary(max_size=200))
def test_any_bytes_are_a_command_or_a_violation(message: bytes) -> None:
    assert_command_or_violation(message)


@deterministic
@given(ASCII_JSON)
def test_any_text_that_is_almost_json_is_a_command_or_a_violation(text: str) -> None:
    assert_command_or_violation(text.encode())


@deterministic
@given(FIELDS, IDS, st.data())
def test_a_command_with_one_changed_byte_is_a_command_or_a_violation(
    fields: dict[str, Any], number: int, data: st.DataObject
) -> None:
    message = bytearray(encode({**fields, "type": "publish", "id": number}) + b"\npayload")
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    assert_command_or_violation(bytes(message))


@deterministic
@given(JSON_VALUES)
def test_any_json_value_is_a_command_or_a_violation(value: Any) -> None:
    assert_command_or_violation(json.dumps(value).encode())


def assert_command_or_violation(message: bytes) -> None:
    try:
        command = parse_command(message)
    except ProtocolViolationError:
        return
    line, _, payload = message.partition(b"\n")
    assert command.payload == payload
    assert json.loads(line) == command.fields
    assert 1 <= command.id <= MAX_ID
    assert type(command.id) is int
    assert type(command.type) is str


NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "an empty line": b"\npayload",
    "no JSON": b"publish\n",
    "half an object": b'{"type":"ping","id":1',
    "two objects": b'{"type":"ping","id":1}{}',
    "a key twice": b'{"type":"ping","id":1,"type":"ping"}',
    "the id twice": b'{"type":"ping","id":1,"id":1}',
    "the id twice, once escaped": b'{"type":"ping","id":1,"\\u0069d":2}',
    "a key twice in a field": b'{"type":"ping","id":1,"a":{"b":1,"b":2}}',
    "NaN": b'{"type":"ping","id":1,"a":NaN}',
    "NaN as the id": b'{"type":"ping","id":NaN}',
    "Infinity": b'{"type":"ping","id":1,"a":[Infinity]}',
    "negative Infinity": b'{"type":"ping","id":1,"a":-Infinity}',
    "no UTF-8": b'{"type":"ping","id":1,"a":"\xff"}',
    "an encoded surrogate": b'{"type":"ping","id":1,"a":"\xed\xa0\x80"}',
    "UTF-16": '{"type":"ping","id":1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"type":"ping","id":1}',
    "a control character in a string": b'{"type":"ping","id":1,"a":"\x00"}',
    "a comment": b'{"type":"ping","id":1}//',
    "a trailing comma": b'{"type":"ping","id":1,}',
    "a line feed in the object": b'{"type":"ping",\n"id":1}',
    "an integer of 5,000 digits": b'{"type":"ping","id":%b}' % (b"9" * 5_000),
    "10,000 open brackets": b'{"type":"ping","id":1,"a":%b' % (b"[" * 10_000),
    "10,000 nested arrays": b'{"type":"ping","id":1,"a":%b%b}' % (b"[" * 10_000, b"]" * 10_000),
    "6,000 nested objects": b'{"a":' * 6_000,
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_a_header_that_is_not_one_json_object_without_repeated_keys_is_a_violation(
    case: str,
) -> None:
    assert violation(NOT_JSON[case]) in {"header is not JSON", "header is not a JSON object"}


@pytest.mark.parametrize("value", [b"[]", b"1", b'"ping"', b"null", b"true", b'[{"type":"ping"}]'])
def test_a_header_that_is_not_an_object_is_a_violation(value: bytes) -> None:
    assert violation(value) == "header is not a JSON object"


@pytest.mark.parametrize("kind", [None, 1, True, ["ping"], {"a": "ping"}])
def test_a_header_without_a_type_is_a_violation(kind: object) -> None:
    assert violation(encode({"type": kind, "id": 1})) == "header has no type"
    assert violation(b'{"id":1}') == "header has no type"


@pytest.mark.parametrize(
    "number",
    [
        *("true", "false", "null", "1.0", "1e0", "0.5", '"1"', "[1]", "{}"),
        *("0", "-0", "-1", str(2**53), str(2**63), str(2**64), "9" * 4_000),
    ],
    ids=lambda number: number[:24],
)
def test_a_header_without_a_valid_id_is_a_violation(number: str) -> None:
    assert violation(b'{"type":"ping","id":%b}' % number.encode()) == "header has no valid id"
    assert violation(b'{"type":"ping"}') == "header has no valid id"


def test_the_smallest_and_the_greatest_id_are_valid() -> None:
    for number in (1, 2**53 - 1):
        assert parse_command(encode({"type": "ping", "id": number})).id == number


def test_a_header_of_the_maximum_length_is_a_command_and_a_longer_one_a_violation() -> None:
    empty = b'{"type":"ping","id":1,"a":""}'
    filler = b"x" * (MAX_COMMAND_BYTES - len(empty))
    longest = empty.replace(b'""', b'"%b"' % filler)
    assert len(longest) == MAX_COMMAND_BYTES == 32_768
    payload = b"p" * 100_000
    assert parse_command(longest + b"\n" + payload).payload == payload
    assert violation(longest + b" \n" + payload) == "header too long"
    assert violation(longest + b" ") == "header too long"


def test_a_message_of_a_megabyte_without_a_header_is_rejected_at_once() -> None:
    """A thousand of them would otherwise block the loop for seconds."""
    started_at = time.process_time()
    for filler in (b"[", b'{"a":', b"9", b" ", b'"', b"\\"):
        assert violation(filler * (1_048_576 // len(filler))) == "header too long"
    assert violation(b"[" * 100_000) == "header too long"
    assert time.process_time() - started_at < 0.5


def test_a_number_with_a_huge_exponent_in_an_unknown_field_is_ignored() -> None:
    command = parse_command(b'{"type":"ping","id":1,"a":1e999999,"b":-1E+400}')
    assert (command.type, command.id) == ("ping", 1)


def test_escaped_surrogates_are_json() -> None:
    assert parse_command(b'{"type":"ping","id":1,"a":"\\ud800"}').fields["a"] == "\ud800"


# What the relay sends


@deterministic
@given(FIELDS, st.text(max_size=12))
def test_a_notice_is_one_text_frame_with_one_line_of_json_and_no_payload(
    fields: dict[str, Any], kind: str
) -> None:
    notice = {"type": kind, **fields}
    header, payload = split_frame(encode_notice(notice))
    assert json.loads(header) == notice
    assert header.isascii()
    assert payload == b""


@pytest.mark.parametrize("size", [10, 113, 114, 115, 65_521, 65_522, 65_523, 100_000])
def test_a_notice_of_any_size_is_one_frame(size: int) -> None:
    header, _ = split_frame(encode_notice({"type": "x" * size}))
    assert json.loads(header) == {"type": "x" * size}


@deterministic
@given(IDS, POSITIONS)
def test_an_acknowledgement_is_what_a_notice_with_the_same_fields_is(
    number: int, position: Position
) -> None:
    fields = {"type": "published", "id": number, "position": str(position)}
    assert encode_published(number, position) == encode_notice(fields)


@deterministic
@given(
    st.lists(
        st.tuples(
            POSITIONS,
            st.text(st.sampled_from("abcXYZ019._:-"), min_size=1, max_size=128),
            st.sampled_from([TEXT, BINARY]),
            st.binary(max_size=60),
        ),
        max_size=5,
    )
)
def test_a_message_is_a_header_without_a_type_before_its_unchanged_payload(
    entries: list[tuple[Position, str, int, bytes]],
) -> None:
    prefixed = list(prefix_headers(entries))
    assert len(prefixed) == len(entries)
    for (position, channel, kind, payload), (sent_kind, sent) in zip(
        entries, prefixed, strict=True
    ):
        header, _, sent_payload = sent.partition(b"\n")
        assert json.loads(header) == {"channel": channel, "position": str(position)}
        assert (sent_kind, sent_payload) == (kind, payload)
