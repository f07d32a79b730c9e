"""The codec of the stream: packets of messages, and the parts of large packets."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.codec import (
    HEAD,
    IDENTITY_OVERHEAD_BYTES,
    MAX_HEARTBEAT_BYTES,
    PACKET_MARK,
    PART,
    SOURCE,
    SOURCE_COUNT,
    FormatError,
    Packet,
    PartAssembler,
    pack,
    split_into_parts,
    unpack,
)
from websocket_relay.backplane.interface import (
    IDEMPOTENCY_KEY,
    ORIGIN,
    SESSION,
    SOURCE_BYTES,
    START,
    Identities,
    Identity,
    Position,
    Source,
)
from websocket_relay.backplane.producer import OutgoingPacket

pytestmark = pytest.mark.fast

PRODUCERS = st.integers(0, 2**64 - 1)
SEQUENCES = st.integers(0, 2**64 - 1)
CHANNELS = st.text("abc:._-XYZ019", min_size=1, max_size=128)
MESSAGES = st.lists(st.tuples(CHANNELS, st.sampled_from([1, 2]), st.binary(max_size=300)))

U64 = st.integers(0, 2**64 - 1)
KEYS = st.builds(
    lambda kind, digest: bytes((kind,)) + digest,
    st.sampled_from([SESSION, IDEMPOTENCY_KEY, ORIGIN]),
    st.binary(min_size=SOURCE_BYTES - 1, max_size=SOURCE_BYTES - 1),
)
SOURCES = st.builds(Source, KEYS, st.builds(Position, U64, U64, U64))

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


@st.composite
def identified_packets(draw: st.DrawFn) -> Packet:
    """Return packets of which some messages may have an identity."""
    packet = packet_of(draw(MESSAGES), heartbeat=draw(st.none() | st.binary(max_size=20)))
    count = len(packet.payloads)
    sources = draw(st.lists(SOURCES, max_size=5))
    indices = draw(st.lists(st.integers(0, len(sources)), min_size=count, max_size=count))
    numbers = draw(st.lists(U64, min_size=count, max_size=count))
    identities = Identities(sources, tuple(indices), tuple(numbers))
    return packet._replace(identities=identities)


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


@deterministic
@given(identified_packets())
def test_packing_and_unpacking_preserve_identities(packet: Packet) -> None:
    assert unpack(pack(packet)) == packet
    assert unpack(pack(packet._replace(identities=None))).identities is None


@deterministic
@given(identified_packets(), st.data())
def test_a_changed_packet_with_identities_is_another_packet_or_a_format_error(
    packet: Packet, data: st.DataObject
) -> None:
    packed = bytearray(pack(packet))
    for _ in range(3):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = unpack(bytes(packed))
    except FormatError:
        return
    count = len(changed.payloads)
    assert len(changed.channels) == len(changed.kinds) == count
    if changed.identities is not None:
        sources, indices, numbers, is_own = changed.identities
        assert len(indices) == len(numbers) == count
        assert max(indices, default=0) <= len(sources)
        assert {len(source.key) for source in sources} <= {SOURCE_BYTES}
        assert not is_own


@deterministic
@given(identified_packets(), st.data())
def test_identities_without_their_end_or_with_trailing_bytes_are_a_format_error(
    packet: Packet, data: st.DataObject
) -> None:
    packed = pack(packet._replace(heartbeat=None))
    with pytest.raises(FormatError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(FormatError):
        unpack(packed + b"x")


def test_identities_that_declare_too_many_sources_are_a_format_error() -> None:
    source = Source(bytes((SESSION,)) + bytes(SOURCE_BYTES - 1), START)
    packet = packet_of([("news", 1, b"")])
    packed = pack(packet._replace(identities=Identities([source], [1], [1])))
    column_bytes = SOURCE.size + IDENTITY_OVERHEAD_BYTES
    at = len(packed) - SOURCE_COUNT.size - column_bytes
    for count in (0, 2, 2**16 - 1):
        with pytest.raises(FormatError):
            unpack(packed[:at] + SOURCE_COUNT.pack(count) + packed[-column_bytes:])


def test_a_message_of_an_unknown_source_is_a_format_error() -> None:
    packet = packet_of([("news", 1, b"")])
    packed = pack(packet._replace(identities=Identities([], [0], [0])))
    assert unpack(packed).identities == Identities([], (0,), (0,))
    with pytest.raises(FormatError, match="unknown source"):
        unpack(pack(packet._replace(identities=Identities([], [1], [0]))))


APPENDS = st.lists(
    st.tuples(
        st.none()
        | st.builds(
            Source,
            st.sampled_from([bytes((kind,)) * SOURCE_BYTES for kind in range(1, 4)]),
            st.sampled_from([START, Position(1, 2, 3)]),
        ),
        st.integers(1, 3),
    ),
    max_size=12,
)


@deterministic
@given(APPENDS)
def test_a_packet_of_identified_and_plain_messages_has_the_identity_of_each(
    appends: list[tuple[Source | None, int]],
) -> None:
    outgoing = OutgoingPacket()
    expected: list[tuple[Source | None, int]] = []
    for number, (source, count) in enumerate(appends, 1):
        if source is not None:
            size = outgoing.add_identity(Identity(source, [number] * count))
            assert size == SOURCE.size + IDENTITY_OVERHEAD_BYTES * count
        outgoing.payloads += [b""] * count
        expected += [(source, number if source is not None else 0)] * count
    identities = outgoing.identities()
    if identities is None:
        assert not any(source for source, _ in appends)
        return
    sources, indices, numbers, is_own = identities
    found = [sources[index - 1] if index else None for index in indices]
    assert list(zip(found, numbers, strict=True)) == expected
    assert is_own
    packet = packet_of([("news", 1, b"")] * len(expected))._replace(identities=identities)
    unpacked = unpack(pack(packet)).identities
    assert unpacked == Identities(sources, tuple(indices), tuple(numbers))


def test_each_request_with_a_key_has_a_source_of_its_own_and_a_session_one() -> None:
    for kind, count in ((SESSION, 1), (IDEMPOTENCY_KEY, 2), (ORIGIN, 1)):
        outgoing = OutgoingPacket()
        for number in (1, 2):
            source = Source(bytes((kind,)) * SOURCE_BYTES, START)
            outgoing.add_identity(Identity(source, [number]))
            outgoing.payloads.append(b"")
        identities = outgoing.identities()
        assert identities is not None
        assert identities.indices == [1, count]
        assert len(identities.sources) == count


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
