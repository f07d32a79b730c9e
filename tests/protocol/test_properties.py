"""What holds for whatever a client sends: found by hypothesis, over real connections.

The examples are the same in every run. A relay that breaks a property is shown the shortest
example of it that was found.
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
from tests.support.relay_process import HOST, Relay, path_of
from tests.support.rfc_cases import (
    CLOSED_BY_CLIENT,
    gets_its_descriptors_back,
    heard_until_close,
    next_frame,
    parsed,
    uncompressed,
)

MAX_MESSAGE_BYTES = 2_000  # so that what is too big is found without sending much
DEFLATE = "permessage-deflate"

tried = settings(
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def tight_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay for small messages, with compression."""
    settled = {
        "limits": {"max_message_bytes": MAX_MESSAGE_BYTES},
        "compression": {"enabled": True, "min_message_bytes": 20},
    }
    with Relay(tmp_path_factory.mktemp("tight"), settled) as relay:
        yield relay


@pytest.fixture
async def sound_relay(tight_relay: Relay) -> AsyncIterator[Relay]:
    """A relay that comes out of the test as it went in: nothing leaked, nothing to complain of."""
    await tight_relay.metric_is("websocket_connected_clients", 0)
    before = tight_relay.descriptors()
    yield tight_relay
    await tight_relay.metric_is("websocket_connected_clients", 0)
    await gets_its_descriptors_back(tight_relay, before)
    assert tight_relay.complaints == []


# What clients send


@dataclass(frozen=True, slots=True)
class Talk:
    """Frames without a fault, and what they mean."""

    octets: bytes
    messages: tuple[tuple[int, bytes], ...] = ()
    pongs: tuple[bytes, ...] = ()

    def __add__(self, other: "Talk") -> "Talk":
        return Talk(
            self.octets + other.octets,
            self.messages + other.messages,
            self.pongs + other.pongs,
        )


keys = st.binary(min_size=4, max_size=4)
payloads = st.one_of(
    st.tuples(st.just(TEXT), st.text(max_size=60).map(str.encode)),
    st.tuples(st.just(BINARY), st.binary(max_size=200)),
    # Around the bounds of the length field, and of the message
    st.tuples(
        st.sampled_from([TEXT, BINARY]),
        st.sampled_from([124, 125, 126, 127, 300, 1_999, 2_000]).map(lambda size: b"*" * size),
    ),
)


@st.composite
def pings(draw: st.DrawFn) -> Talk:
    payload = draw(st.binary(max_size=20) | st.just(bytes(125)))
    opcode = draw(st.sampled_from([PING, PONG]))
    return Talk(frame(opcode, payload, key=draw(keys)), (), (payload,) * (opcode == PING))


def joined(talks: Sequence[Talk]) -> Talk:
    return sum(talks, Talk(b""))


few_pings = st.lists(pings(), max_size=2).map(joined)


def cut(octets: bytes, places: Sequence[int]) -> list[bytes]:
    """Cut at these places; there is one piece more than places."""
    inside = sorted(place % (len(octets) + 1) for place in places)
    return [octets[start:end] for start, end in itertools.pairwise([0, *inside, len(octets)])]


places = st.lists(st.integers(0, 1 << 16), max_size=5)


@st.composite
def messages(draw: st.DrawFn, *, compressed: bool) -> Talk:
    """One message in any number of fragments, with pings between them."""
    opcode, payload = draw(payloads)
    packs = compressed and draw(st.booleans())
    octets = deflated(payload, level=draw(st.integers(0, 9))) if packs else payload
    parts = cut(octets, draw(places))
    talk = Talk(b"")
    for number, part in enumerate(parts):
        fin = number == len(parts) - 1
        reserved = RSV1 if packs and number == 0 else 0
        which = CONTINUATION if number else opcode
        talk += Talk(frame(which, part, fin=fin, reserved=reserved, key=draw(keys)))
        if not fin:
            talk += draw(few_pings)
    return talk + Talk(b"", ((opcode, payload),))


def talks(*, compressed: bool) -> st.SearchStrategy[Talk]:
    several = st.lists(messages(compressed=compressed) | pings(), min_size=1, max_size=6)
    return several.map(joined)


# What the relay does


def channel_of_its_own() -> str:
    return f"property-{uuid.uuid4().hex}"


async def send_in_pieces(raw: RawClient, octets: bytes, where: Sequence[int]) -> None:
    for piece in cut(octets, where):
        await raw.send(piece)


def data_of(heard: Sequence[Frame]) -> list[tuple[int, bytes]]:
    return [(one.opcode, one.payload) for one in heard if one.opcode in (TEXT, BINARY)]


def pongs_of(heard: Sequence[Frame]) -> list[bytes]:
    return [one.payload for one in heard if one.opcode == PONG]


async def hold_valid_frames(
    relay: Relay,
    talk: Talk,
    where: Sequence[int],
    *,
    offers: Sequence[str] = (),
    others: Sequence[str],
    early: int = 0,
) -> None:
    """Send frames, the early ones with the request; insist that two clients hear what they say."""
    path = path_of(channel_of_its_own())
    octets = talk.octets + CLOSED_BY_CLIENT
    behind, octets = octets[:early], octets[early:]
    async with (
        raw_websocket(HOST, relay.port, path, offers=others) as listener,
        raw_websocket(HOST, relay.port, path, offers=offers, behind=behind) as sender,
    ):
        await send_in_pieces(sender, octets, where)
        heard, code = await heard_until_close(sender)
        assert (data_of(heard), pongs_of(heard), code) == (
            list(talk.messages),
            list(talk.pongs),
            1000,
        )
        await listener.send(CLOSED_BY_CLIENT)
        heard, code = await heard_until_close(listener)
        assert (data_of(heard), pongs_of(heard), code) == (list(talk.messages), [], 1000)


@given(
    talk=talks(compressed=False),
    where=places,
    packs=st.booleans(),
    early=st.just(0) | st.integers(0, 1 << 12),
)
@settings(tried, max_examples=80)
async def test_any_valid_frames_cut_anywhere_are_the_same_messages_to_all(
    sound_relay: Relay, talk: Talk, where: list[int], packs: bool, early: int
) -> None:
    others = [DEFLATE] if packs else []
    await hold_valid_frames(sound_relay, talk, where, others=others, early=early)


@given(talk=talks(compressed=True), where=places, packs=st.booleans())
@settings(tried, max_examples=60)
async def test_any_valid_frames_of_a_client_that_compresses_are_the_same_messages_to_all(
    sound_relay: Relay, talk: Talk, where: list[int], packs: bool
) -> None:
    others = [f"{DEFLATE}; server_max_window_bits=9"] if packs else []
    await hold_valid_frames(sound_relay, talk, where, offers=[DEFLATE], others=others)


# What clients send that is broken


@dataclass(frozen=True, slots=True)
class Damage:
    """What may happen to bytes."""

    kind: str
    place: int
    size: int
    octets: bytes

    def to(self, octets: bytes) -> bytes:
        place = self.place % (len(octets) + 1)
        before, behind = octets[:place], octets[place:]
        match self.kind:
            case "flip" if behind:
                return before + bytes([behind[0] ^ 1 << self.size % 8]) + behind[1:]
            case "drop":
                return before + behind[self.size :]
            case "double":
                return before + behind[: self.size] + behind
            case "insert":
                return before + self.octets + behind
            case "truncate":
                return before
        return octets


damages = st.lists(
    st.builds(
        Damage,
        st.sampled_from(["flip", "flip", "drop", "double", "insert", "truncate"]),
        st.integers(0, 1 << 12),
        st.integers(0, 12),
        st.binary(max_size=4),
    ),
    max_size=3,
)


def damaged(octets: bytes, what: Sequence[Damage]) -> bytes:
    for one in what:
        octets = one.to(octets)
    return octets


too_much = st.one_of(
    st.just(b""),
    st.just(b""),
    st.integers(MAX_MESSAGE_BYTES - 3, MAX_MESSAGE_BYTES + 3).map(bytes),
    st.just(bytes(70_000)),
).map(lambda payload: frame(BINARY, payload) if payload else b"")
closes = st.one_of(
    st.just(b""),
    st.builds(
        lambda code, reason: frame(CLOSE, close_payload(code, reason)),
        st.sampled_from([1000, 1001, 1005, 1011, 1015, 2999, 3000, 4999, 5000]),
        st.binary(max_size=8) | st.text(max_size=8).map(str.encode),
    ),
    st.binary(max_size=3).map(lambda payload: frame(CLOSE, payload)),
)


@st.composite
def broken(draw: st.DrawFn, *, compressed: bool = False) -> bytes:
    """Frames with a fault or some, or bytes that never were frames."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=100))
    octets = draw(talks(compressed=compressed)).octets + draw(too_much) + draw(closes)
    octets = damaged(octets, draw(damages))
    return octets + draw(talks(compressed=False)).octets


@given(data=st.data(), inflates=st.booleans(), where=places)
@settings(tried, max_examples=150)
def test_the_parser_hears_any_bytes_at_all_as_the_rfc_says(
    data: st.DataObject, inflates: bool, where: list[int]
) -> None:
    octets = data.draw(broken(compressed=inflates))
    expected = Reference(MAX_MESSAGE_BYTES, inflates=inflates)
    expected.hear(octets)
    if expected.close_code is None and expected.between_frames:
        octets += CLOSED_BY_CLIENT
    heard, code = parsed(cut(octets, where), inflates=inflates, max_bytes=MAX_MESSAGE_BYTES)
    assert data_of(heard) == expected.messages
    assert code == (expected.close_code or (1000 if expected.between_frames else None)) or (
        inflates and {code, expected.close_code} == {1007, 1009}
    )
    if code is not None:
        assert pongs_of(heard) == expected.pongs


@given(octets=broken(), where=places)
@example(octets=frame(TEXT, b"\xed\xa0", fin=False), where=[])
@settings(tried, max_examples=120)
async def test_any_bytes_at_all_end_as_the_rfc_says(
    sound_relay: Relay, octets: bytes, where: list[int]
) -> None:
    async with websocket(sound_relay) as raw:
        await hold(raw, Reference(MAX_MESSAGE_BYTES), octets, where)


@given(octets=broken(compressed=True), where=places)
@settings(tried, max_examples=120)
async def test_any_bytes_of_a_client_that_compresses_end_as_the_rfc_says(
    sound_relay: Relay, octets: bytes, where: list[int]
) -> None:
    async with websocket(sound_relay, DEFLATE) as raw:
        await hold(raw, Reference(MAX_MESSAGE_BYTES, inflates=True), octets, where)


def websocket(relay: Relay, *offers: str) -> AbstractAsyncContextManager[RawClient]:
    return raw_websocket(HOST, relay.port, path_of(channel_of_its_own()), offers=offers)


async def hold(raw: RawClient, expected: Reference, octets: bytes, where: Sequence[int]) -> None:
    """Send bytes, and insist on what the reference says."""
    expected.hear(octets)
    await send_in_pieces(raw, octets, where)
    if expected.close_code is None and not expected.between_frames:
        await hold_unfinished(raw, expected)
        return
    if expected.close_code is None:
        await raw.send(CLOSED_BY_CLIENT)
    heard, code = await heard_until_close(raw)
    assert (data_of(heard), pongs_of(heard)) == (expected.messages, expected.pongs)
    assert code == (expected.close_code or 1000) or (
        # What one read brings may inflate to too much and have a fault; either is said.
        raw.compresses and {code, expected.close_code} == {1007, 1009}
    )


async def hold_unfinished(raw: RawClient, expected: Reference) -> None:
    """Insist that a client in the middle of a frame is not closed for what it sent so far."""
    raw.finish()
    heard = []
    try:
        while True:
            heard.append(uncompressed(await next_frame(raw)))
    except EOFError:
        pass
    # Who leaves without a close does not hear all that it was owed.
    assert data_of(heard) == expected.messages[: len(data_of(heard))]
    assert pongs_of(heard) == expected.pongs
    assert {one.opcode for one in heard} <= {TEXT, BINARY, PONG}


# What comes before the upgrade

PATH = path_of("property")
HEADS = [
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
    heads=st.lists(st.sampled_from(HEADS) | st.binary(max_size=20), min_size=1, max_size=3),
    what=damages,
    behind=talks(compressed=False),
    where=places,
)
@settings(tried, max_examples=120)
async def test_any_bytes_before_the_upgrade_have_an_http_answer_or_a_clean_end(
    sound_relay: Relay, heads: list[bytes], what: list[Damage], behind: Talk, where: list[int]
) -> None:
    octets = damaged(b"".join(heads), what) + behind.octets
    async with await sound_relay.tcp() as raw, await sound_relay.tcp() as other:
        with suppress(ConnectionError):  # the end can come before all is sent
            await send_in_pieces(raw, octets, where)
        await other.send(PROBE)
        assert (await other.response()).status == 200  # so the relay has seen the others' bytes
        with suppress(OSError):  # it has ended
            raw.finish()
        answers = await raw.ended()
        assert answers == b"" or answers.startswith(b"HTTP/1.1 ")
        if answers:
            assert int(answers.split(b" ", 2)[1]) in STATUSES
