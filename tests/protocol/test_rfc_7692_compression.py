"""RFC 7692, permessage-deflate: negotiation, compressed messages to the relay and from it."""

import asyncio
import itertools
import random
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import pytest
from websocket_relay.wire.deflate import negotiate
from websocket_relay.wire.parser import PAUSE, PAUSE_INFLATING, Parser, ParserEvent
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    DEFLATE_TAIL,
    PING,
    PONG,
    RSV1,
    TEXT,
    Frame,
    RawClient,
    close_payload,
    compressed_frame,
    deflated,
    frame,
    inflated,
    raw_websocket,
)
from tests.support.relay_process import (
    HOST,
    RelayProcess,
    StartRelay,
    path_of,
    receive,
    receive_many,
)
from tests.support.rfc_cases import (
    CASES,
    CLOSED_BY_CLIENT,
    MIB,
    Pieces,
    fragments,
    one_case_per_outcome,
    parse_pieces,
    play_case,
    read_frame_except_pings,
    read_until_close,
)

DEFLATE = "permessage-deflate"
DOES_NOT_INFLATE = 1007  # RFC 7692 fails such a connection and names no code
PROSE = " ".join(f"{number} bottles of beer on the wall, grüß dich." for number in range(2_000))
NOISE = random.Random(7692).randbytes(2 * MIB)


@pytest.fixture(scope="module")
def shared_deflating_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    settings = {"compression": {"enabled": True, "min_message_bytes": 0}}
    with RelayProcess(tmp_path_factory.mktemp("deflating"), settings) as relay:
        yield relay


@pytest.fixture
async def deflating_relay(shared_deflating_relay: RelayProcess) -> AsyncIterator[RelayProcess]:
    """A relay that compresses every message that shrinks."""
    await shared_deflating_relay.await_metric("websocket_connected_clients", 0)
    yield shared_deflating_relay
    assert shared_deflating_relay.unexpected_lines == []


def deflating(
    relay: RelayProcess, channel: str, *offers: str
) -> AbstractAsyncContextManager[RawClient]:
    """Connect a raw client that offers compression."""
    return raw_websocket(HOST, relay.port, path_of(channel), offers=offers or (DEFLATE,))


# Negotiation

REQUIRED = {"server_no_context_takeover", "client_no_context_takeover"}


def parameters_of(extension: str) -> dict[str, str]:
    """Return the parameters of a negotiated extension."""
    name, *parameters = extension.split("; ")
    assert name == DEFLATE
    pairs = [parameter.partition("=")[::2] for parameter in parameters]
    assert len(dict(pairs)) == len(pairs), "a repeated parameter"
    return dict(pairs)


def negotiated(*lines: str) -> dict[str, str] | None:
    """Negotiate header lines; return the agreed parameters, or None where the offer is declined."""
    agreed = negotiate(", ".join(lines))
    if agreed is None:
        return None
    extension, window_bits = agreed
    parameters = parameters_of(extension)
    assert window_bits == int(parameters.get("server_max_window_bits", "15"))
    return parameters


async def negotiated_by(relay: RelayProcess, channel: str, *lines: str) -> dict[str, str] | None:
    """Negotiate with a relay and send a compressed message; return the agreed parameters."""
    async with await relay.connect_tcp() as raw:
        response = await raw.upgrade(path_of(channel), offers=lines)
        agreed = response.headers.get("sec-websocket-extensions")
        if agreed is None:
            await raw.send(frame(TEXT, b"plain") + compressed_frame(TEXT, b"compressed"))
            assert await raw.read_message() == "plain"
            assert (await raw.read_close_frame())[0] == 1002
            return None
        await raw.send(compressed_frame(TEXT, b"compressed"))
        assert await raw.read_message() == "compressed"
        return parameters_of(agreed)


def expected_parameters(window_bits: int | None = None) -> dict[str, str]:
    """Return the parameters that are agreed for an offered window, or for none."""
    bits = {} if window_bits is None else {"server_max_window_bits": str(window_bits)}
    return dict.fromkeys(REQUIRED, "") | bits


TAKEOVERS = [(), ("server",), ("client",), ("server", "client"), ("client", "server")]


@pytest.mark.fast
@pytest.mark.parametrize("server_bits", [None, *range(9, 16)])
def test_every_valid_offer_is_accepted_within_its_limits(server_bits: int | None) -> None:
    bits = "" if server_bits is None else f"; server_max_window_bits={server_bits}"
    client_windows = (None, "", *map(str, range(8, 16)))
    for takeovers, most in itertools.product(TAKEOVERS, client_windows):
        no_takeover = "".join(f"; {side}_no_context_takeover" for side in takeovers)
        client_bits = "" if most is None else f"; client_max_window_bits={most}".removesuffix("=")
        allowed = [] if most is None else [str(n) for n in range(8, int(most or 15) + 1)]
        for offer in (DEFLATE + bits + client_bits + no_takeover,
                      DEFLATE + no_takeover + client_bits + bits):  # fmt: skip
            agreed = negotiated(offer)
            assert agreed is not None, offer
            answered = agreed.pop("client_max_window_bits", None)  # optional, where offered
            assert answered is None or answered in allowed, offer
            assert agreed == expected_parameters(server_bits), offer


ACCEPTED: Sequence[tuple[Sequence[str], int | None]] = [
    ([f'{DEFLATE}; server_max_window_bits="12"'], 12),
    ([f'{DEFLATE}; server_max_window_bits="9"'], 9),
    ([f"{DEFLATE};server_max_window_bits=10"], 10),
    ([f"{DEFLATE}\t;  server_max_window_bits=10 "], 10),
    ([f"x-webkit-deflate-frame, {DEFLATE}"], None),
    ([f"{DEFLATE}, x-other; a=1; b"], None),
    ([f'x; a="b", {DEFLATE}'], None),
    ([f",, {DEFLATE} ,"], None),
    ([f"{DEFLATE}; server_max_window_bits=10, {DEFLATE}; server_max_window_bits=12"], 10),
    ([f"{DEFLATE}; server_max_window_bits=8, {DEFLATE}"], None),
    ([f"{DEFLATE}; unknown, {DEFLATE}; server_max_window_bits=11, {DEFLATE}"], 11),
    (["x-other", DEFLATE], None),
    ([f"{DEFLATE}; unknown=1", DEFLATE], None),
    ([f"{DEFLATE}; server_max_window_bits=9", DEFLATE], 9),
]


async def test_the_first_valid_offer_is_accepted(
    deflating_relay: RelayProcess, channel: str
) -> None:
    for lines, window_bits in ACCEPTED:
        agreed = await negotiated_by(deflating_relay, channel, *lines)
        assert agreed == expected_parameters(window_bits), lines


INVALID_BITS = (0, 7, 16, 100, "09", "1e1", "-9", "x")
DECLINED = [
    "server_max_window_bits=8",
    *(f"server_max_window_bits={bits}" for bits in INVALID_BITS),
    "server_max_window_bits",
    *(f"client_max_window_bits={bits}" for bits in INVALID_BITS),
    "server_no_context_takeover=1",
    "client_no_context_takeover=true",
    "server_no_context_takeover; server_no_context_takeover",
    "client_no_context_takeover; client_no_context_takeover",
    "server_max_window_bits=10; server_max_window_bits=10",
    "server_max_window_bits=10; server_max_window_bits=11",
    "client_max_window_bits; client_max_window_bits",
    "client_max_window_bits; client_max_window_bits=10",
    "unknown",
    "unknown=10",
    'unknown="10"',
    "client_max_window_bits; unknown",
]
OTHER_EXTENSIONS = ["x-webkit-deflate-frame", "permessage-bzip2", "deflate"]


@pytest.mark.fast
@pytest.mark.parametrize("parameters", DECLINED)
def test_an_offer_with_invalid_or_unknown_parameters_is_declined(parameters: str) -> None:
    assert negotiated(f"{DEFLATE}; {parameters}") is None


async def test_a_client_without_an_accepted_offer_is_served_without_compression(
    deflating_relay: RelayProcess, channel: str
) -> None:
    declined = (f"{DEFLATE}; {parameters}" for parameters in DECLINED)
    assert await negotiated_by(deflating_relay, channel) is None
    for offer in (*declined, *OTHER_EXTENSIONS):
        assert await negotiated_by(deflating_relay, channel, offer) is None, offer


# RFC 6455 with compression negotiated


@pytest.mark.parametrize("group", CASES)
async def test_uncompressed_frames_are_handled_by_rfc_6455_with_compression_negotiated(
    deflating_relay: RelayProcess, channel: str, group: str
) -> None:
    """Two cases of each group: test_rfc_6455_cases runs all of them on the parser alone."""
    for case in one_case_per_outcome(CASES[group])[:2]:
        if not any(each[:1] in (b"\xc1", b"\xc2") for each in case.sent):
            async with deflating(deflating_relay, channel) as raw:
                assert raw.compresses
                await play_case(raw, case, Pieces.ONE)


@pytest.mark.fast
def test_the_compression_bit_is_allowed_on_the_first_frame_of_a_message_only() -> None:
    payload = deflated(b"Hello")
    before, frames = compressed_frame(TEXT, b"before"), [Frame(TEXT, b"before", fin=True)]
    for first, reserved in itertools.product((RSV1, 0), range(1, 8)):
        octets = (
            before
            + frame(BINARY, payload[:3], fin=False, reserved=first)
            + frame(CONTINUATION, payload[3:], reserved=reserved)
        )
        assert parse_pieces([octets], inflates=True) == (frames, 1002), (first, reserved)
    for opcode in (PING, PONG, CLOSE):
        octets = before + frame(opcode, deflated(close_payload(1000)), reserved=RSV1)
        assert parse_pieces([octets], inflates=True) == (frames, 1002), opcode


# Compressed messages to the relay


def flushed(payload: bytes, size: int, mode: int) -> bytes:
    """Compress a message, with a flush of the compressor after every so many bytes."""
    deflater = zlib.compressobj(wbits=-15)
    octets = b"".join(
        deflater.compress(payload[n : n + size]) + deflater.flush(mode)
        for n in range(0, len(payload), size)
    )
    return (octets + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(DEFLATE_TAIL)


def ended(payload: bytes) -> bytes:
    """Compress a message into blocks of which the last has the final bit."""
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(payload) + deflater.flush(zlib.Z_FINISH)


def in_fragments(opcode: int, parts: Sequence[bytes]) -> bytes:
    """Encode a compressed message in so many frames."""
    first, *others = fragments(opcode, *parts)
    return b"".join([bytes([first[0] | RSV1 << 4]) + first[1:], *others])


def split_at_random(payload: bytes) -> list[bytes]:
    cuts = [0, *sorted(random.Random(1).choices(range(len(payload) + 1), k=5)), len(payload)]
    return [payload[start:end] for start, end in itertools.pairwise(cuts)]


PROSE_BYTES = PROSE.encode()
RFC_EXAMPLES = [  # RFC 7692 section 7.2.3
    pytest.param(bytes.fromhex("f248cdc9c90700"), b"Hello", id="one block"),
    pytest.param(bytes.fromhex("000500faff48656c6c6f00"), b"Hello", id="an uncompressed block"),
    pytest.param(bytes.fromhex("f348cdc9c9070000"), b"Hello", id="a final block"),
    pytest.param(bytes.fromhex("f24805000000ffffcac9c90700"), b"Hello", id="two blocks"),
    pytest.param(b"\x00", b"", id="an empty message"),
]
COMPRESSED = [
    *RFC_EXAMPLES,
    pytest.param(
        bytes.fromhex("000000ffff" * 50 + "f248cdc9c90700"), b"Hello", id="leading empty blocks"
    ),
    pytest.param(
        bytes.fromhex("f248cdc9c907000000ffff" + "000000ffff" * 50 + "00"),
        b"Hello",
        id="trailing empty blocks",
    ),
    pytest.param(ended(b"") + b"\x00", b"", id="an empty final block"),
    *(
        pytest.param(deflated(PROSE_BYTES, level=level), PROSE_BYTES, id=f"level {level}")
        for level in (0, 1, 6, 9)
    ),
    *(
        pytest.param(deflated(PROSE_BYTES, strategy=strategy), PROSE_BYTES, id=name)
        for name, strategy in {
            "filtered": zlib.Z_FILTERED,
            "Huffman only": zlib.Z_HUFFMAN_ONLY,
            "run lengths": zlib.Z_RLE,
            "fixed codes": zlib.Z_FIXED,
        }.items()
    ),
    *(
        pytest.param(deflated(PROSE_BYTES, window_bits=bits), PROSE_BYTES, id=f"{bits} bits")
        for bits in range(9, 16)
    ),
    *(
        pytest.param(flushed(PROSE_BYTES, 100, mode), PROSE_BYTES, id=name)
        for name, mode in {
            "sync flushes": zlib.Z_SYNC_FLUSH,
            "full flushes": zlib.Z_FULL_FLUSH,
            "partial flushes": zlib.Z_PARTIAL_FLUSH,
        }.items()
    ),
]


@pytest.mark.fast
@pytest.mark.parametrize(("payload", "message"), COMPRESSED)
def test_every_kind_of_compressed_message_is_inflated_in_all_cuts(
    payload: bytes, message: bytes
) -> None:
    for opcode in (TEXT, BINARY):
        whole = frame(opcode, payload, reserved=RSV1)
        fragmented = in_fragments(opcode, split_at_random(payload))
        expected = ([Frame(opcode, message, fin=True)] * 2, 1000)
        for pieces in Pieces:
            cut = pieces.cut((whole, fragmented, CLOSED_BY_CLIENT))
            assert parse_pieces(cut, inflates=True) == expected, (opcode, pieces)


@pytest.mark.parametrize(("payload", "message"), RFC_EXAMPLES)
async def test_compressed_messages_are_delivered_to_clients_with_and_without_compression(
    deflating_relay: RelayProcess, channel: str, payload: bytes, message: bytes
) -> None:
    async with (
        deflating(deflating_relay, channel) as sender,
        deflating_relay.client(channel, compression=None) as other,
    ):
        for opcode in (TEXT, BINARY):
            expected = message.decode() if opcode == TEXT else message
            await sender.send(frame(opcode, payload, reserved=RSV1))
            await sender.send(in_fragments(opcode, split_at_random(payload)))
            for _ in range(2):
                assert await receive(other) == expected
                assert await sender.read_message() == expected


@pytest.mark.parametrize(
    "offer",
    [
        DEFLATE,
        f"{DEFLATE}; server_no_context_takeover; server_max_window_bits=9",
        f"{DEFLATE}; server_no_context_takeover; client_max_window_bits, {DEFLATE}",
    ],
)
async def test_compressed_messages_of_all_sizes_are_echoed(
    deflating_relay: RelayProcess, channel: str, offer: str
) -> None:
    async with deflating(deflating_relay, channel, offer) as raw:
        for size in (0, 1, 64, 256, 1_024, 8_192, 32_768, 131_072):
            text = (PROSE * 2)[size // 3 :][:size]
            packed = deflated(text.encode())
            for part in (size + 64, 256, 4_096):
                parts = [packed[start : start + part] for start in range(0, len(packed), part)]
                await raw.send(in_fragments(TEXT, parts) + in_fragments(BINARY, parts))
                assert await raw.read_message() == text, (size, part)
                assert await raw.read_message() == text.encode(), (size, part)


async def test_hundreds_of_compressed_messages_are_echoed_one_after_another(
    deflating_relay: RelayProcess, channel: str
) -> None:
    async with deflating(deflating_relay, channel) as raw:
        for number in range(300):
            text = PROSE[number * 50 :][:number]
            await raw.send(compressed_frame(TEXT, text.encode()))
            assert await raw.read_message() == text


async def test_compressed_messages_arrive_byte_by_byte_with_pings_between(
    deflating_relay: RelayProcess, channel: str
) -> None:
    payload = PROSE[:500].encode()
    packed = deflated(payload)
    half = len(packed) // 2
    async with deflating(deflating_relay, channel) as raw:
        await raw.send_one_byte_at_a_time(
            frame(TEXT, packed[:half], fin=False, reserved=RSV1)
            + frame(PING, b"between")
            + frame(CONTINUATION, packed[half:])
            + frame(TEXT, b"plain")
        )
        assert await read_frame_except_pings(raw) == Frame(PONG, b"between", fin=True)
        assert await raw.read_message() == payload.decode()
        assert await raw.read_message() == "plain"


async def test_compressed_and_plain_messages_alternate(
    deflating_relay: RelayProcess, channel: str
) -> None:
    async with (
        deflating(deflating_relay, channel) as raw,
        deflating_relay.client(channel, compression=None) as plain,
    ):
        texts = [f"{number} {PROSE[: number * 7]}" for number in range(200)]
        await raw.send(
            b"".join(
                (compressed_frame if number % 3 else frame)(TEXT, text.encode())
                for number, text in enumerate(texts)
            )
        )
        assert [await raw.read_message() for _ in texts] == texts
        assert await receive_many(plain, len(texts)) == texts


@pytest.mark.fast
def test_text_is_validated_as_utf_8_after_it_was_inflated() -> None:
    text = "naïve 日本 \U0001f40e κόσμε".encode()
    packed = deflated(text)
    for cut in range(len(packed) + 1):
        octets = in_fragments(TEXT, [packed[:cut], packed[cut:]]) + CLOSED_BY_CLIENT
        assert parse_pieces([octets], inflates=True) == ([Frame(TEXT, text, fin=True)], 1000), cut


@pytest.mark.fast
@pytest.mark.parametrize(
    "octets", [b"\xff", b"ok \xc3", b"ok \xed\xa0\x80 edited", b"\xf4\x90\x80\x80"]
)
def test_compressed_text_that_is_not_utf_8_is_closed_with_1007(octets: bytes) -> None:
    packed = deflated(octets)
    for parts in ([packed], [packed[:2], packed[2:]]):
        wire = in_fragments(BINARY, parts) + in_fragments(TEXT, parts)
        assert parse_pieces([wire], inflates=True) == ([Frame(BINARY, octets, fin=True)], 1007), (
            parts
        )


# Messages that do not inflate

FIRST = b"the first message, to which the second refers"


def with_kept_context() -> bytes:
    """Compress a message as a back-reference to the message before it."""
    deflater = zlib.compressobj(wbits=-15)
    deflater.compress(FIRST)
    deflater.flush(zlib.Z_SYNC_FLUSH)
    return (deflater.compress(FIRST) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(DEFLATE_TAIL)


MALFORMED = {
    "a block of an unknown type": b"\x07",
    "ones": b"\xff" * 10,
    "uncompressed text": b"Hello, world!",
    "an invalid length": bytes.fromhex("000500fafe48656c6c6f00"),
    "a reference to nothing": bytes.fromhex("f20011000000"),
    "a reference to the message before": with_kept_context(),
    "zlib's format": zlib.compress(b"Hello, world!" * 10),
    "gzip's format": zlib.compress(b"Hello, world!" * 10, wbits=31),
    "garbage after a final block": ended(b"Hello") + b"\x07",
    "an unfinished block": deflated(PROSE_BYTES)[:-10],
    "an unfinished uncompressed block": deflated(b"not compressed", level=0)[:-6],
    "an uncompressed block without its last four bytes": deflated(b"not compressed", level=0)[:-5],
}


@pytest.mark.fast
@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_a_message_that_does_not_inflate_is_closed_with_1007(payload: bytes) -> None:
    first = compressed_frame(BINARY, FIRST)
    for parts in ([payload], [payload[:3], payload[3:]]):
        wire = first + in_fragments(BINARY, parts) + CLOSED_BY_CLIENT
        expected = ([Frame(BINARY, FIRST, fin=True)], DOES_NOT_INFLATE)
        for size in (1, len(wire)):
            pieces = [wire[start : start + size] for start in range(0, len(wire), size)]
            assert parse_pieces(pieces, inflates=True) == expected, (len(parts), size)


async def test_a_message_that_does_not_inflate_affects_no_other_client(
    deflating_relay: RelayProcess, channel: str
) -> None:
    async with deflating_relay.client(channel) as other:
        async with deflating(deflating_relay, channel) as violating:
            await violating.send(compressed_frame(BINARY, FIRST))
            assert await receive(other) == FIRST
            await violating.send(in_fragments(BINARY, [MALFORMED["ones"]]))
            frames = [Frame(BINARY, FIRST, fin=True)]
            assert await read_until_close(violating) == (frames, DOES_NOT_INFLATE)
        await deflating_relay.await_metric("websocket_connected_clients", 1)
        await other.send("still here")
        assert await receive(other) == "still here"


@pytest.mark.fast
def test_a_compressed_message_without_octets_is_empty_or_a_violation() -> None:
    """By the letter of the RFC it has no block; common compressors accept it as empty."""
    wire = frame(TEXT, reserved=RSV1) + CLOSED_BY_CLIENT
    assert parse_pieces([wire], inflates=True) in (
        ([Frame(TEXT, b"", fin=True)], 1000),
        ([], DOES_NOT_INFLATE),
    )


@pytest.mark.fast
def test_octets_after_a_final_block_are_inflated_or_a_violation() -> None:
    wire = frame(TEXT, ended(b"one ") + deflated(b"and two"), reserved=RSV1) + CLOSED_BY_CLIENT
    assert parse_pieces([wire], inflates=True) in (
        ([Frame(TEXT, b"one and two", fin=True)], 1000),
        ([], DOES_NOT_INFLATE),
    )


# Limits, which count inflated bytes


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(bytes(MIB), id="zeros"),
        pytest.param(NOISE[:MIB], id="noise"),
        pytest.param((PROSE_BYTES * 20)[:MIB], id="prose"),
    ],
)
async def test_a_compressed_message_of_the_limit_is_accepted_and_one_more_byte_is_not(
    deflating_relay: RelayProcess, channel: str, payload: bytes
) -> None:
    assert len(payload) == MIB
    async with deflating(deflating_relay, channel) as raw:
        for level in (0, 1):  # compressed noise takes more bytes than plain noise
            packed = deflated(payload, level=level)
            await raw.send(in_fragments(BINARY, [packed[:99], packed[99:999], packed[999:]]))
            assert await raw.read_message() == payload
        await raw.send(compressed_frame(BINARY, payload + b"x"))
        assert await read_until_close(raw) == ([], 1009)


def bomb(size: int) -> bytes:
    """Compress zeros that inflate to so many bytes, a MiB at a time."""
    deflater = zlib.compressobj(wbits=-15)
    mebibyte = deflater.compress(bytes(MIB)) + deflater.flush(zlib.Z_FULL_FLUSH)
    return mebibyte * (size // MIB) + b"\x00"


@pytest.mark.parametrize("parts", [1, 20])
async def test_a_compression_bomb_is_closed_with_1009_before_it_fills_the_memory(
    deflating_relay: RelayProcess, channel: str, parts: int
) -> None:
    packed = bomb(1_024 * MIB)
    assert len(packed) < 1.1 * MIB  # a length that a message of the limit may have
    size = len(packed) // parts + 1
    cut = [packed[start : start + size] for start in range(0, len(packed), size)]
    before_bytes = deflating_relay.rss_bytes()
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(deflating(deflating_relay, channel)) for _ in range(20)
        ]
        for client in clients:
            await client.send(in_fragments(BINARY, cut))
        for client in clients:
            assert await read_until_close(client) == ([], 1009)
        # Two or three times the limit at a time, for one connection after another.
        assert deflating_relay.rss_bytes() < before_bytes + 32 * MIB


async def test_messages_that_inflate_a_thousandfold_are_inflated_one_after_another(
    relay_with: StartRelay,
) -> None:
    """All of them together are nearly eight times as large as the total limit."""
    total_bytes, count = 8 * MIB, 60
    relay = relay_with(
        compression={"enabled": True},
        limits={"total_backlog_bytes": total_bytes},
        history={"max_messages": 0},
    )
    message = frame(BINARY, bomb(MIB), reserved=RSV1)
    assert len(message) < 1_100
    async with AsyncExitStack() as stack:
        publishers = [
            await stack.enter_async_context(deflating(relay, f"of-{number}"))
            for number in range(count)
        ]
        before_bytes = relay.reset_peak_rss()
        await asyncio.gather(*(publisher.send(message) for publisher in publishers))
        await relay.await_metric("websocket_messages_total", count)
        for publisher in publishers:
            assert await publisher.read_message() == bytes(MIB)
        # In addition, malloc keeps memory, and the message in progress is copied.
        assert relay.peak_rss_bytes() < before_bytes + total_bytes + 24 * MIB
        assert await relay.metric("websocket_disconnections_total") == 0
        await relay.await_metric("websocket_paused_publishers", 0)
        assert await relay.metric("websocket_partial_message_bytes") == 0


def without_pauses(events: Iterable[ParserEvent]) -> list[ParserEvent]:
    return [event for event in events if event is not PAUSE_INFLATING and event is not PAUSE]


@pytest.mark.fast
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_a_discarded_message_is_inflated_again_from_its_start(opcode: int) -> None:
    parser = Parser(MIB, inflates=True)
    events = parser.feed(compressed_frame(opcode, bytes(MIB)) + frame(TEXT, b"next"))
    assert next(events) is PAUSE_INFLATING
    assert parser.buffered_bytes > 0
    assert parser.discard_inflated()
    assert parser.buffered_bytes == 0
    assert without_pauses(events) == [(opcode, bytes(MIB)), (TEXT, b"next")]


@pytest.mark.fast
def test_a_message_that_was_partly_fed_before_is_not_discarded() -> None:
    parser = Parser(MIB, inflates=True)
    payload = NOISE[:50_000] + bytes(MIB // 2)
    wire = compressed_frame(BINARY, payload)
    assert {*parser.feed(wire[:40_000])} <= {PAUSE_INFLATING, PAUSE}
    events = parser.feed(wire[40_000:])
    assert any(event is PAUSE_INFLATING for event in events)
    assert not parser.discard_inflated()
    assert without_pauses(events) == [(BINARY, payload)]


async def test_many_final_blocks_in_one_message_delay_no_other_client(
    deflating_relay: RelayProcess, channel: str
) -> None:
    """zlib starts anew after each of them, and its caller copies the rest of the input."""
    final_blocks = b"\x03\x00" * 300_000
    wire = frame(BINARY, final_blocks + b"\x00", reserved=RSV1)
    async with (
        deflating(deflating_relay, channel) as client,
        deflating_relay.client(f"not-{channel}") as other,
    ):
        sending = asyncio.create_task(client.send(wire))
        while not sending.done():
            await other.send("hello")
            assert await receive(other) == "hello"
        await sending
        assert await client.read_message() == b""


@pytest.mark.fast
def test_a_declared_size_that_the_limit_cannot_deflate_to_is_closed_with_1009() -> None:
    header = bytes([0x80 | RSV1 << 4 | BINARY, 0x80 | 127]) + (2 * MIB).to_bytes(8, "big")
    assert parse_pieces([header + bytes(4)], inflates=True) == ([], 1009)


# Compressed messages from the relay


@pytest.mark.parametrize("bits", range(9, 16))
async def test_a_message_to_a_client_with_a_small_window_inflates_within_that_window(
    deflating_relay: RelayProcess, channel: str, bits: int
) -> None:
    """The message repeats itself at distances within each window and beyond it."""
    distances = (200, 900, 3_000, 7_000, 14_000, 30_000)
    blocks = [NOISE[distance : 2 * distance] for distance in distances]
    payload = blocks[0] * 10 + b"".join(block * 2 for block in blocks)
    if bits < 15:
        with pytest.raises(zlib.error):
            within_window(deflated(payload), bits)
    offer = f"{DEFLATE}; server_max_window_bits={bits}"
    async with (
        deflating(deflating_relay, channel, offer) as small,
        deflating(deflating_relay, channel) as large,
        deflating_relay.client(channel, compression=None) as plain,
    ):
        for _ in range(2):
            await plain.send(payload)
            assert await receive(plain) == payload
            received = await read_frame_except_pings(small)
            assert (received.opcode, received.compressed) == (BINARY, True)
            assert within_window(received.payload, bits) == payload
            assert await large.read_message() == payload


def within_window(payload: bytes, bits: int) -> bytes:
    """Inflate with little more history than the window has.

    zlib accepts references as far back as the window and the bytes that one call returns together,
    so each call returns 64 bytes.

    Raises:
        zlib.error: a reference reaches farther back than that.
    """
    inflater = zlib.decompressobj(-bits)
    octets = bytearray(inflater.decompress(payload + DEFLATE_TAIL, 64))
    while inflater.unconsumed_tail:
        octets += inflater.decompress(inflater.unconsumed_tail, 64)
    while more := inflater.decompress(b"", 64):
        octets += more
    return bytes(octets)


@pytest.mark.parametrize(
    ("last", "code"),
    [
        pytest.param(frame(CLOSE, close_payload(3000)), 3000, id="a close frame"),
        pytest.param(frame(TEXT, b"bare", mask=False), 1002, id="a violation"),
        pytest.param(frame(BINARY, b"\xff", reserved=RSV1), 1007, id="invalid compression"),
        pytest.param(
            frame(TEXT, b"partial", fin=False) + CLOSED_BY_CLIENT,
            1000,
            id="a close frame inside a message",
        ),
    ],
)
async def test_messages_that_take_long_to_compress_are_sent_before_the_close_frame(
    deflating_relay: RelayProcess, channel: str, last: bytes, code: int
) -> None:
    large = (PROSE * 20)[: 900 * 1_024].encode()
    small = [Frame(TEXT, b"%d" % number, fin=True) for number in range(50)]
    async with deflating(deflating_relay, channel) as raw:
        packed = compressed_frame(TEXT, large)
        await raw.send(
            b"".join(packed + frame(TEXT, each.payload) for each in small[:3])
            + b"".join(frame(TEXT, each.payload) for each in small[3:])
            + last
        )
        echo = Frame(TEXT, large, fin=True)
        frames = [echo, small[0], echo, small[1], echo, *small[2:]]
        assert await read_until_close(raw) == (frames, code)


async def test_every_message_is_compressed_without_context(
    deflating_relay: RelayProcess, channel: str
) -> None:
    payload = PROSE[:3_000].encode()
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(compressed_frame(TEXT, payload) * 50)
        received = [await read_frame_except_pings(raw) for _ in range(50)]
    assert {each.compressed for each in received} == {True}
    assert {each.payload for each in received} == {received[0].payload}
    assert inflated(received[0].payload) == payload


async def test_messages_that_are_short_or_do_not_shrink_are_sent_uncompressed(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(compression={"enabled": True, "min_message_bytes": 100})
    async with deflating(relay, channel) as raw:
        for payload, compressed in (
            (b"", False),
            (b"x" * 99, False),
            (b"x" * 100, True),
            (b"x" * 101, True),
            (NOISE[:100], False),
            (NOISE[:100_000], False),
            (NOISE[:5_000] * 20, True),
        ):
            await raw.send(frame(BINARY, payload) + compressed_frame(BINARY, payload))
            for _ in range(2):
                received = await read_frame_except_pings(raw)
                assert (received.inflated(), received.compressed) == (payload, compressed)


async def test_clients_of_all_window_sizes_receive_the_same_messages_in_the_same_order(
    deflating_relay: RelayProcess, channel: str
) -> None:
    offers = [f"{DEFLATE}; server_max_window_bits={bits}" for bits in range(9, 16)]
    sizes = random.Random(2).choices((0, 1, 10, 100, 1_000, 10_000), k=300)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(deflating(deflating_relay, channel, offer))
            for offer in (DEFLATE, *offers)
        ]
        plain = await stack.enter_async_context(deflating_relay.raw_client(channel))
        senders = [*clients[:3], plain]
        for number, size in enumerate(sizes):
            payload = f"{number} {PROSE[:size]}".encode()
            sender = senders[number % len(senders)]
            encode = compressed_frame if sender.compresses and number % 2 else frame
            await sender.send(encode(TEXT, payload))
        messages = [await plain.read_message() for _ in sizes]
        for client in clients:
            assert [await client.read_message() for _ in sizes] == messages
        # One sender's messages keep their order; between senders there is no order.
        numbers = [int(str(message).split()[0]) for message in messages]
        for place in range(len(senders)):
            own = [number for number in numbers if number % len(senders) == place]
            assert own == list(range(place, len(sizes), len(senders)))


async def test_library_clients_compress_and_inflate(
    deflating_relay: RelayProcess, channel: str
) -> None:
    small = ClientPerMessageDeflateFactory(server_max_window_bits=9, client_max_window_bits=9)
    async with (
        deflating_relay.client(channel, compression="deflate") as first,
        deflating_relay.client(channel, compression=None, extensions=[small]) as second,
        deflating_relay.client(channel, compression=None) as plain,
    ):
        for client in (first, second):
            assert client.response is not None
            assert DEFLATE in client.response.headers["Sec-WebSocket-Extensions"]
        for sender in (first, second, plain):
            for message in (PROSE, PROSE.encode(), "", b"", "short", NOISE[:70_000]):
                await sender.send(message)
                for client in (first, second, plain):
                    assert await receive(client) == message
