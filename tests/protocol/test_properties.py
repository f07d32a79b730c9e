"""Properties of any client input, checked by hypothesis on the parser and over connections.

The examples are the same in every run. A failure shows the shortest example that was found.
"""

import itertools
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    RSV1,
    TEXT,
    Frame,
    RawClient,
    close_payload,
    deflated,
    frame,
    raw_websocket,
    upgrade_request,
)
from tests.support.reference import Reference
from tests.support.relay_process import HOST, RelayProcess, path_of
from tests.support.rfc_cases import (
    CLOSED_BY_CLIENT,
    await_descriptors,
    decompressed,
    parse_pieces,
    read_frame_except_pings,
    read_until_close,
)

MAX_MESSAGE_BYTES = 2_000  # small, so that oversized messages are cheap to send
DEFLATE = "permessage-deflate"

deterministic = settings(
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def small_message_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay for small messages, with compression."""
    options = {
        "limits": {"max_message_bytes": MAX_MESSAGE_BYTES},
        "compression": {"enabled": True, "min_message_bytes": 20},
    }
    with RelayProcess(tmp_path_factory.mktemp("small"), options) as relay:
        yield relay


@pytest.fixture
async def checked_relay(small_message_relay: RelayProcess) -> AsyncIterator[RelayProcess]:
    """A relay that is checked after the test for leaks and for errors in its log."""
    relay = small_message_relay
    await relay.await_metric("websocket_connected_clients", 0)
    before = relay.descriptors()
    yield relay
    await relay.await_metric("websocket_connected_clients", 0)
    await await_descriptors(relay, before)
    assert relay.unexpected_lines == []


# Valid input


@dataclass(frozen=True, slots=True)
class FrameSequence:
    """Valid frames, and the messages and pongs that follow from them."""

    octets: bytes
    messages: tuple[tuple[int, bytes], ...] = ()
    pongs: tuple[bytes, ...] = ()

    def __add__(self, other: "FrameSequence") -> "FrameSequence":
        return FrameSequence(
            self.octets + other.octets,
            self.messages + other.messages,
            self.pongs + other.pongs,
        )


mask_keys = st.binary(min_size=4, max_size=4)
payloads = st.one_of(
    st.tuples(st.just(TEXT), st.text(max_size=60).map(str.encode)),
    st.tuples(st.just(BINARY), st.binary(max_size=200)),
    # Around the limits of the length field, and of the message
    st.tuples(
        st.sampled_from([TEXT, BINARY]),
        st.sampled_from([124, 125, 126, 127, 300, 1_999, 2_000]).map(lambda size: b"*" * size),
    ),
)


@st.composite
def pings_and_pongs(draw: st.DrawFn) -> FrameSequence:
    payload = draw(st.binary(max_size=20) | st.just(bytes(125)))
    opcode = draw(st.sampled_from([PING, PONG]))
    octets = frame(opcode, payload, key=draw(mask_keys))
    return FrameSequence(octets, (), (payload,) * (opcode == PING))


def joined(sequences: Sequence[FrameSequence]) -> FrameSequence:
    return sum(sequences, FrameSequence(b""))


few_pings_and_pongs = st.lists(pings_and_pongs(), max_size=2).map(joined)


def split_at(octets: bytes, places: Sequence[int]) -> list[bytes]:
    """Split at these places, into one piece more than there are places."""
    cuts = sorted(place % (len(octets) + 1) for place in places)
    return [octets[start:end] for start, end in itertools.pairwise([0, *cuts, len(octets)])]


split_places = st.lists(st.integers(0, 1 << 16), max_size=5)


@st.composite
def fragmented_messages(draw: st.DrawFn, *, compressed: bool) -> FrameSequence:
    """One message in any number of fragments, with pings between them."""
    opcode, payload = draw(payloads)
    is_deflated = compressed and draw(st.booleans())
    octets = deflated(payload, level=draw(st.integers(0, 9))) if is_deflated else payload
    parts = split_at(octets, draw(split_places))
    sequence = FrameSequence(b"")
    for number, part in enumerate(parts):
        fin = number == len(parts) - 1
        reserved = RSV1 if is_deflated and number == 0 else 0
        frame_opcode = CONTINUATION if number else opcode
        sequence += FrameSequence(
            frame(frame_opcode, part, fin=fin, reserved=reserved, key=draw(mask_keys))
        )
        if not fin:
            sequence += draw(few_pings_and_pongs)
    return sequence + FrameSequence(b"", ((opcode, payload),))


def valid_frames(*, compressed: bool) -> st.SearchStrategy[FrameSequence]:
    elements = fragmented_messages(compressed=compressed) | pings_and_pongs()
    return st.lists(elements, min_size=1, max_size=6).map(joined)


def unique_path() -> str:
    return path_of(f"property-{uuid.uuid4().hex}")


async def send_split(raw: RawClient, octets: bytes, places: Sequence[int]) -> None:
    for piece in split_at(octets, places):
        await raw.send(piece)


def messages_of(frames: Sequence[Frame]) -> list[tuple[int, bytes]]:
    return [(each.opcode, each.payload) for each in frames if each.opcode in (TEXT, BINARY)]


def pongs_of(frames: Sequence[Frame]) -> list[bytes]:
    return [each.payload for each in frames if each.opcode == PONG]


async def assert_relayed(
    relay: RelayProcess,
    sequence: FrameSequence,
    places: Sequence[int],
    *,
    sender_offers: Sequence[str] = (),
    other_offers: Sequence[str] = (),
    early: int = 0,
) -> None:
    """Assert that a sender and another client receive the messages of valid frames.

    Args:
        places: where the frames are split.
        early: how many octets are sent with the upgrade request.
    """
    path = unique_path()
    octets = sequence.octets + CLOSED_BY_CLIENT
    first, octets = octets[:early], octets[early:]
    async with (
        raw_websocket(HOST, relay.port, path, offers=other_offers) as other,
        raw_websocket(HOST, relay.port, path, offers=sender_offers, trailing=first) as sender,
    ):
        await send_split(sender, octets, places)
        frames, code = await read_until_close(sender)
        assert (messages_of(frames), pongs_of(frames), code) == (
            list(sequence.messages),
            list(sequence.pongs),
            1000,
        )
        await other.send(CLOSED_BY_CLIENT)
        frames, code = await read_until_close(other)
        assert (messages_of(frames), pongs_of(frames), code) == (list(sequence.messages), [], 1000)


@given(
    sequence=valid_frames(compressed=False),
    places=split_places,
    compresses=st.booleans(),
    early=st.just(0) | st.integers(0, 1 << 12),
)
@settings(deterministic, max_examples=25)
async def test_valid_frames_split_anywhere_make_the_same_messages_for_all_subscribers(
    checked_relay: RelayProcess,
    sequence: FrameSequence,
    places: list[int],
    compresses: bool,
    early: int,
) -> None:
    offers = [DEFLATE] if compresses else []
    await assert_relayed(checked_relay, sequence, places, other_offers=offers, early=early)


@given(sequence=valid_frames(compressed=True), places=split_places, compresses=st.booleans())
@settings(deterministic, max_examples=25)
async def test_valid_compressed_frames_make_the_same_messages_for_all_subscribers(
    checked_relay: RelayProcess, sequence: FrameSequence, places: list[int], compresses: bool
) -> None:
    offers = [f"{DEFLATE}; server_max_window_bits=9"] if compresses else []
    await assert_relayed(
        checked_relay, sequence, places, sender_offers=[DEFLATE], other_offers=offers
    )


# Invalid input


@dataclass(frozen=True, slots=True)
class Mutation:
    """A change of some bytes."""

    kind: str
    place: int
    size: int
    octets: bytes

    def applied_to(self, octets: bytes) -> bytes:
        place = self.place % (len(octets) + 1)
        before, after = octets[:place], octets[place:]
        match self.kind:
            case "flip" if after:
                return before + bytes([after[0] ^ 1 << self.size % 8]) + after[1:]
            case "drop":
                return before + after[self.size :]
            case "double":
                return before + after[: self.size] + after
            case "insert":
                return before + self.octets + after
            case "truncate":
                return before
        return octets


mutations = st.lists(
    st.builds(
        Mutation,
        st.sampled_from(["flip", "flip", "drop", "double", "insert", "truncate"]),
        st.integers(0, 1 << 12),
        st.integers(0, 12),
        st.binary(max_size=4),
    ),
    max_size=3,
)


def mutated(octets: bytes, changes: Sequence[Mutation]) -> bytes:
    for change in changes:
        octets = change.applied_to(octets)
    return octets


oversized = st.one_of(
    st.just(b""),
    st.just(b""),
    st.integers(MAX_MESSAGE_BYTES - 3, MAX_MESSAGE_BYTES + 3).map(bytes),
    st.just(bytes(70_000)),
).map(lambda payload: frame(BINARY, payload) if payload else b"")
close_frames = st.one_of(
    st.just(b""),
    st.builds(
        lambda code, reason: frame(CLOSE, close_payload(code, reason)),
        st.sampled_from([1000, 1001, 1005, 1011, 1015, 2999, 3000, 4999, 5000]),
        st.binary(max_size=8) | st.text(max_size=8).map(str.encode),
    ),
    st.binary(max_size=3).map(lambda payload: frame(CLOSE, payload)),
)


@st.composite
def any_octets(draw: st.DrawFn, *, compressed: bool = False) -> bytes:
    """Frames with some faults, or octets that were never frames."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=100))
    octets = draw(valid_frames(compressed=compressed)).octets + draw(oversized) + draw(close_frames)
    octets = mutated(octets, draw(mutations))
    return octets + draw(valid_frames(compressed=False)).octets


@pytest.mark.fast
@given(data=st.data(), inflates=st.booleans(), places=split_places)
@settings(deterministic, max_examples=150)
def test_any_octets_are_parsed_as_the_reference_parses_them(
    data: st.DataObject, inflates: bool, places: list[int]
) -> None:
    octets = data.draw(any_octets(compressed=inflates))
    expected = Reference(MAX_MESSAGE_BYTES, inflates=inflates)
    expected.feed(octets)
    if expected.close_code is None and expected.between_frames:
        octets += CLOSED_BY_CLIENT
    pieces = split_at(octets, places)
    frames, code = parse_pieces(pieces, inflates=inflates, max_bytes=MAX_MESSAGE_BYTES)
    assert messages_of(frames) == expected.messages
    assert code == (expected.close_code or (1000 if expected.between_frames else None)) or (
        inflates and {code, expected.close_code} == {1007, 1009}
    )
    if code is not None:
        assert pongs_of(frames) == expected.pongs


@given(octets=any_octets(), places=split_places)
@example(octets=frame(TEXT, b"\xed\xa0", fin=False), places=[])
@settings(deterministic, max_examples=30)
async def test_any_octets_have_the_outcome_that_the_rfc_requires(
    checked_relay: RelayProcess, octets: bytes, places: list[int]
) -> None:
    async with connected(checked_relay) as raw:
        await assert_outcome(raw, Reference(MAX_MESSAGE_BYTES), octets, places)


@given(octets=any_octets(compressed=True), places=split_places)
@settings(deterministic, max_examples=30)
async def test_any_octets_of_a_client_with_compression_have_the_outcome_that_the_rfc_requires(
    checked_relay: RelayProcess, octets: bytes, places: list[int]
) -> None:
    async with connected(checked_relay, DEFLATE) as raw:
        await assert_outcome(raw, Reference(MAX_MESSAGE_BYTES, inflates=True), octets, places)


def connected(relay: RelayProcess, *offers: str) -> AbstractAsyncContextManager[RawClient]:
    return raw_websocket(HOST, relay.port, unique_path(), offers=offers)


async def assert_outcome(
    raw: RawClient, expected: Reference, octets: bytes, places: Sequence[int]
) -> None:
    """Send octets, and assert what the reference requires."""
    expected.feed(octets)
    await send_split(raw, octets, places)
    if expected.close_code is None and not expected.between_frames:
        await assert_unfinished(raw, expected)
        return
    if expected.close_code is None:
        await raw.send(CLOSED_BY_CLIENT)
    frames, code = await read_until_close(raw)
    assert (messages_of(frames), pongs_of(frames)) == (expected.messages, expected.pongs)
    assert code == (expected.close_code or 1000) or (
        # The octets of one read may inflate to too many and also have a fault: either is reported.
        raw.compresses and {code, expected.close_code} == {1007, 1009}
    )


async def assert_unfinished(raw: RawClient, expected: Reference) -> None:
    """Assert that a client in the middle of a frame is not closed for what it has sent."""
    raw.end_stream()
    frames = []
    try:
        while True:
            frames.append(decompressed(await read_frame_except_pings(raw)))
    except EOFError:
        pass
    # A client that disconnects without a close frame does not receive all expected deliveries.
    assert messages_of(frames) == expected.messages[: len(messages_of(frames))]
    assert pongs_of(frames) == expected.pongs
    assert {each.opcode for each in frames} <= {TEXT, BINARY, PONG}


# Before the upgrade

PATH = path_of("property")
REQUESTS = [
    upgrade_request(PATH),
    upgrade_request(PATH, Sec_WebSocket_Protocol="chat, superchat"),
    upgrade_request(PATH, Sec_WebSocket_Extensions=f'{DEFLATE}; server_max_window_bits="10"'),
    upgrade_request(f"http://localhost:80{PATH}?access_token=x&since=%20"),
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /readyz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n0\r\n\r\n"
    ),
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n",
]
PROBE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
STATUSES = {100, 101, 200, 202, 400, 404, 405, 408, 413, 421, 426, 429, 431, 501, 505}


@given(
    requests=st.lists(st.sampled_from(REQUESTS) | st.binary(max_size=20), min_size=1, max_size=3),
    changes=mutations,
    trailing=valid_frames(compressed=False),
    places=split_places,
)
@settings(deterministic, max_examples=50)
async def test_any_octets_before_an_upgrade_have_an_http_response_or_a_clean_end(
    checked_relay: RelayProcess,
    requests: list[bytes],
    changes: list[Mutation],
    trailing: FrameSequence,
    places: list[int],
) -> None:
    octets = mutated(b"".join(requests), changes) + trailing.octets
    async with await checked_relay.connect_tcp() as raw, await checked_relay.connect_tcp() as other:
        with suppress(ConnectionError):  # the relay can close before all is sent
            await send_split(raw, octets, places)
        await other.send(PROBE)
        assert (await other.read_response()).status == 200  # the relay has read the octets by now
        with suppress(OSError):  # the connection has ended
            raw.end_stream()
        responses = await raw.read_to_end()
        assert responses == b"" or responses.startswith(b"HTTP/1.1 ")
        if responses:
            assert int(responses.split(b" ", 2)[1]) in STATUSES
