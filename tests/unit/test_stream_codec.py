"""What replicas write into a broker's stream, and read from there."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websocket_relay.backplane.codec import (
    HEAD,
    MAX_HEARTBEAT_BYTES,
    PART,
    FormatError,
    Packet,
    PartAssembler,
    pack,
    split_into_parts,
    unpack,
)

pytestmark = pytest.mark.fast

ORIGINS = st.integers(0, 2**64 - 1)
NUMBERS = st.integers(0, 2**64 - 1)
CHANNELS = st.text("abc:._-XYZ019", min_size=1, max_size=128)
MESSAGES = st.lists(st.tuples(CHANNELS, st.sampled_from([1, 2]), st.binary(max_size=300)))

ROOM = 1 << 20


def packet_of(
    messages: Sequence[tuple[str, int, bytes]],
    origin: int = 7,
    number: int = 0,
    note: bytes | None = None,
) -> Packet:
    channels = [channel for channel, _, _ in messages]
    opcodes = bytes(opcode for _, opcode, _ in messages)
    payloads = [payload for _, _, payload in messages]
    return Packet(origin, number, channels, opcodes, payloads, note)


def parts_of(payload: bytes, origin: int = 7, number: int = 0, max_bytes: int = 100) -> list[bytes]:
    data = pack(packet_of([("news", 2, payload)], origin, number))
    return list(split_into_parts(data, origin, number, max_bytes))


def joined(joiner: PartAssembler, parts: Sequence[bytes]) -> list[bytes]:
    """Return what the packets say that come of these parts."""
    whole = [joiner.join(part) for part in parts]
    return [payload for data in whole if data is not None for payload in unpack(data).payloads]


@given(MESSAGES, ORIGINS, NUMBERS, st.none() | st.binary(max_size=MAX_HEARTBEAT_BYTES))
def test_what_is_packed_is_unpacked(
    messages: list[tuple[str, int, bytes]], origin: int, number: int, note: bytes | None
) -> None:
    packet = packet_of(messages, origin, number, note)
    assert unpack(pack(packet)) == packet


@given(st.binary(max_size=400))
def test_any_bytes_are_a_packet_or_a_format_error(data: bytes) -> None:
    for each in (data, b"\x01" + data, b"\x02" + data):
        try:
            whole = PartAssembler(ROOM).join(each)
            if whole is not None:
                unpack(whole)
        except FormatError:
            pass


@given(MESSAGES.filter(bool), st.data())
def test_a_packet_with_wrong_bytes_is_another_packet_or_a_format_error(
    messages: list[tuple[str, int, bytes]], data: st.DataObject
) -> None:
    packed = bytearray(pack(packet_of(messages)))
    for _ in range(3):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        packet = unpack(bytes(packed))
    except FormatError:
        return
    assert len(packet.channels) == len(packet.opcodes) == len(packet.payloads)


@given(MESSAGES.filter(bool), st.data())
def test_a_packet_that_is_cut_off_is_a_format_error(
    messages: list[tuple[str, int, bytes]], data: st.DataObject
) -> None:
    packed = pack(packet_of(messages))
    with pytest.raises(FormatError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(FormatError):
        unpack(packed + b"x")


def test_a_packet_that_claims_to_be_long_costs_nothing() -> None:
    for count in (10**6, 2**32 - 1):
        with pytest.raises(FormatError):
            unpack(HEAD.pack(1, 0, 7, 0, count, 1))
        with pytest.raises(FormatError):
            unpack(HEAD.pack(1, 0, 7, 0, count, count))


@given(st.binary(max_size=5000), st.integers(HEAD.size + 1, 6000))
def test_parts_of_any_size_fit_and_come_together_again(payload: bytes, max_bytes: int) -> None:
    parts = parts_of(payload, max_bytes=max_bytes)
    assert max(map(len, parts)) <= max_bytes
    assert joined(PartAssembler(ROOM), parts) == [payload]


@given(st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=5), st.data())
def test_parts_of_several_origins_may_come_in_any_mixture(
    payloads: list[bytes], data: st.DataObject
) -> None:
    waiting = [parts_of(payload, origin) for origin, payload in enumerate(payloads)]
    joiner, found = PartAssembler(ROOM), []
    while any(waiting):
        parts = data.draw(st.sampled_from([parts for parts in waiting if parts]))
        found += joined(joiner, [parts.pop(0)])
    assert sorted(found) == sorted(payloads)
    assert joiner.bytes == 0


@given(st.data())
def test_a_writer_that_begins_again_is_understood(data: st.DataObject) -> None:
    parts = parts_of(bytes(range(256)) * 4)
    tries = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=5))
    sequence = [part for end in tries for part in parts[:end]] + parts
    assert joined(PartAssembler(ROOM), sequence) == [bytes(range(256)) * 4]


@given(st.data())
def test_parts_that_come_late_do_no_harm(data: st.DataObject) -> None:
    """A try that was given up may arrive amid the parts of the packet that follows."""
    first, second = parts_of(b"first" * 100, number=0), parts_of(b"second" * 100, number=1)
    sequence = list(second)
    for part in data.draw(st.lists(st.sampled_from(first), max_size=5)):
        # Behind the beginning of the second packet: before that, nobody knows of it.
        sequence.insert(data.draw(st.integers(1, len(sequence) - 1)), part)
    joiner = PartAssembler(ROOM)
    assert joined(joiner, first) == [b"first" * 100]
    assert joined(joiner, sequence) == [b"second" * 100]


@given(st.data())
def test_a_packet_of_which_a_part_was_lost_does_not_come(data: st.DataObject) -> None:
    parts = parts_of(b"x" * 1000)
    del parts[data.draw(st.integers(0, len(parts) - 1))]
    joiner = PartAssembler(ROOM)
    assert joined(joiner, parts) == []
    assert joined(joiner, parts_of(b"next", number=1)) == [b"next"]


def test_a_packet_that_a_dead_replica_left_unfinished_is_forgotten() -> None:
    joiner = PartAssembler(1000)
    for origin in range(200):
        joined(joiner, parts_of(b"x" * 900, origin)[:-1])
    assert joiner.bytes <= 16 * 1000
    assert joiner.dropped > 150
    assert joined(joiner, parts_of(b"alive", 1000)) == [b"alive"]


def test_a_packet_that_is_too_long_is_dropped() -> None:
    joiner = PartAssembler(1000)
    with pytest.raises(FormatError, match="too long"):
        joined(joiner, parts_of(b"x" * 2000))
    assert (joiner.bytes, joiner.dropped) == (0, 1)


def test_a_part_whose_first_ones_are_gone_is_known_for_that() -> None:
    joiner = PartAssembler(ROOM)
    parts = parts_of(b"x" * 1000, origin=9)
    assert joiner.join(parts[1]) is None
    assert joiner.orphan_part == (9, 0)
    assert joiner.join(parts[0]) is None
    assert joiner.orphan_part is None


def test_a_part_beyond_the_last_is_a_format_error() -> None:
    with pytest.raises(FormatError):
        PartAssembler(ROOM).join(HEAD.pack(PART, 0, 7, 0, 2, 2) + b"x")
