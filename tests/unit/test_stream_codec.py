"""The codec of the stream: packets of messages, and the parts of large packets."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.codec import (
    HEAD,
    MAX_HEARTBEAT_BYTES,
    PACKET_MARK,
    PART,
    FormatError,
    Packet,
    PartAssembler,
    pack,
    split_into_parts,
    unpack,
)

pytestmark = pytest.mark.fast

PRODUCERS = st.integers(0, 2**64 - 1)
SEQUENCES = st.integers(0, 2**64 - 1)
CHANNELS = st.text("abc:._-XYZ019", min_size=1, max_size=128)
MESSAGES = st.lists(st.tuples(CHANNELS, st.sampled_from([1, 2]), st.binary(max_size=300)))

MAX_BYTES = 1 << 20

deterministic = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def packet_of(
    messages: Sequence[tuple[str, int, bytes]],
    producer: int = 7,
    sequence: int = 0,
    heartbeat: bytes | None = None,
) -> Packet:
    channels = [channel for channel, _, _ in messages]
    kinds = bytes(kind for _, kind, _ in messages)
    payloads = [payload for _, _, payload in messages]
    return Packet(producer, sequence, channels, kinds, payloads, heartbeat)


def parts_of(
    payload: bytes, producer: int = 7, sequence: int = 0, max_bytes: int = 100
) -> list[bytes]:
    packed = pack(packet_of([("news", 2, payload)], producer, sequence))
    return list(split_into_parts(packed, max_bytes)) if len(packed) > max_bytes else [packed]


def is_packet(entry: bytes) -> bool:
    return entry[:1] == PACKET_MARK


def joined(assembler: PartAssembler, parts: Sequence[bytes]) -> list[bytes]:
    """Return the payloads of the packets that these parts make."""
    packets = [part if is_packet(part) else assembler.join(part) for part in parts]
    return [
        payload for packed in packets if packed is not None for payload in unpack(packed).payloads
    ]


@deterministic
@given(MESSAGES, PRODUCERS, SEQUENCES, st.none() | st.binary(max_size=MAX_HEARTBEAT_BYTES))
def test_packing_and_unpacking_preserve_a_packet(
    messages: list[tuple[str, int, bytes]], producer: int, sequence: int, heartbeat: bytes | None
) -> None:
    packet = packet_of(messages, producer, sequence, heartbeat)
    assert unpack(pack(packet)) == packet


@deterministic
@given(st.binary(max_size=400))
def test_any_bytes_are_a_packet_or_a_format_error(octets: bytes) -> None:
    for each in (octets, b"\x01" + octets, b"\x02" + octets):
        try:
            packed = each if is_packet(each) else PartAssembler(MAX_BYTES).join(each)
            if packed is not None:
                unpack(packed)
        except FormatError:
            pass


@deterministic
@given(MESSAGES.filter(bool), st.data())
def test_a_changed_packet_is_another_packet_or_a_format_error(
    messages: list[tuple[str, int, bytes]], data: st.DataObject
) -> None:
    packed = bytearray(pack(packet_of(messages)))
    for _ in range(3):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        packet = unpack(bytes(packed))
    except FormatError:
        return
    assert len(packet.channels) == len(packet.kinds) == len(packet.payloads)


@deterministic
@given(MESSAGES.filter(bool), st.data())
def test_a_packet_without_its_end_or_with_trailing_bytes_is_a_format_error(
    messages: list[tuple[str, int, bytes]], data: st.DataObject
) -> None:
    packed = pack(packet_of(messages))
    with pytest.raises(FormatError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(FormatError):
        unpack(packed + b"x")


def test_a_packet_that_declares_too_many_messages_is_a_format_error_at_once() -> None:
    for count in (10**6, 2**32 - 1):
        with pytest.raises(FormatError):
            unpack(HEAD.pack(1, 0, 7, 0, count, 1))
        with pytest.raises(FormatError):
            unpack(HEAD.pack(1, 0, 7, 0, count, count))


@deterministic
@given(st.binary(max_size=5000), st.integers(HEAD.size + 1, 6000))
def test_parts_of_any_size_fit_and_make_the_packet_again(payload: bytes, max_bytes: int) -> None:
    parts = parts_of(payload, max_bytes=max_bytes)
    assert max(map(len, parts)) <= max_bytes
    assert joined(PartAssembler(MAX_BYTES), parts) == [payload]


@deterministic
@given(st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=5), st.data())
def test_parts_of_several_producers_are_joined_in_any_order(
    payloads: list[bytes], data: st.DataObject
) -> None:
    pending = [parts_of(payload, producer) for producer, payload in enumerate(payloads)]
    assembler, found = PartAssembler(MAX_BYTES), []
    while any(pending):
        parts = data.draw(st.sampled_from([parts for parts in pending if parts]))
        found += joined(assembler, [parts.pop(0)])
    assert sorted(found) == sorted(payloads)
    assert assembler.bytes == 0


@deterministic
@given(st.data())
def test_a_producer_that_repeats_the_first_parts_is_understood(data: st.DataObject) -> None:
    parts = parts_of(bytes(range(256)) * 4)
    ends = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=5))
    stream = [part for end in ends for part in parts[:end]] + parts
    assert joined(PartAssembler(MAX_BYTES), stream) == [bytes(range(256)) * 4]


@deterministic
@given(st.data())
def test_late_parts_of_an_earlier_packet_are_ignored(data: st.DataObject) -> None:
    """An abandoned append can arrive between the parts of the next packet."""
    first, second = parts_of(b"first" * 100, sequence=0), parts_of(b"second" * 100, sequence=1)
    stream = list(second)
    for part in data.draw(st.lists(st.sampled_from(first), max_size=5)):
        # After the first part of the second packet, which announces it.
        stream.insert(data.draw(st.integers(1, len(stream) - 1)), part)
    assembler = PartAssembler(MAX_BYTES)
    assert joined(assembler, first) == [b"first" * 100]
    assert joined(assembler, stream) == [b"second" * 100]


@deterministic
@given(st.data())
def test_a_packet_with_a_lost_part_is_not_made(data: st.DataObject) -> None:
    parts = parts_of(b"x" * 1000)
    del parts[data.draw(st.integers(0, len(parts) - 1))]
    assembler = PartAssembler(MAX_BYTES)
    assert joined(assembler, parts) == []
    assert joined(assembler, parts_of(b"next", sequence=1)) == [b"next"]


def test_unfinished_packets_of_dead_replicas_are_dropped() -> None:
    assembler = PartAssembler(1000)
    for producer in range(200):
        joined(assembler, parts_of(b"x" * 900, producer)[:-1])
    assert assembler.bytes <= 16 * 1000
    assert assembler.dropped > 150
    assert joined(assembler, parts_of(b"alive", 1000)) == [b"alive"]


def test_a_packet_over_the_limit_is_dropped() -> None:
    assembler = PartAssembler(1000)
    with pytest.raises(FormatError, match="too long"):
        joined(assembler, parts_of(b"x" * 2000))
    assert (assembler.bytes, assembler.dropped) == (0, 1)


def test_a_part_without_the_parts_before_it_is_reported_as_an_orphan() -> None:
    assembler = PartAssembler(MAX_BYTES)
    parts = parts_of(b"x" * 1000, producer=9)
    assert assembler.join(parts[1]) is None
    assert assembler.orphan_part == (9, 0)
    assert assembler.join(parts[0]) is None
    assert assembler.orphan_part is None


def test_a_part_after_the_last_one_is_a_format_error() -> None:
    with pytest.raises(FormatError):
        PartAssembler(MAX_BYTES).join(HEAD.pack(PART, 0, 7, 0, 2, 2) + b"x")
