"""RFC 7692, permessage-deflate: what is agreed on, what may be sent compressed, and what comes."""

import asyncio
import itertools
import random
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import pytest
from websocket_relay.wire.deflate import negotiate
from websocket_relay.wire.parser import PAUSE, PAUSE_INFLATING, Parser
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    RSV1,
    TAIL,
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
from tests.support.relay_process import HOST, Relay, StartRelay, path_of, receive, receive_many
from tests.support.rfc_cases import (
    CASES,
    MIB,
    Pieces,
    chosen,
    fragments,
    heard_until_close,
    next_frame,
    play,
)

DEFLATE = "permessage-deflate"
DOES_NOT_INFLATE = 1007  # RFC 7692 has such a connection failed and names no code
PROSE = " ".join(f"{number} bottles of beer on the wall, grüß dich." for number in range(2_000))
NOISE = random.Random(7692).randbytes(2 * MIB)


@pytest.fixture(scope="module")
def shared_deflating_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    settings = {"compression": {"enabled": True, "min_message_bytes": 0}}
    with Relay(tmp_path_factory.mktemp("deflating"), settings) as relay:
        yield relay


@pytest.fixture
async def deflating_relay(shared_deflating_relay: Relay) -> AsyncIterator[Relay]:
    """A relay that compresses whatever gets smaller by it."""
    await shared_deflating_relay.metric_is("websocket_connected_clients", 0)
    yield shared_deflating_relay
    assert shared_deflating_relay.complaints == []


def deflating(relay: Relay, channel: str, *offers: str) -> AbstractAsyncContextManager[RawClient]:
    """Connect a client made of bytes that offers compression."""
    return raw_websocket(HOST, relay.port, path_of(channel), offers=offers or (DEFLATE,))


# What is agreed on

MUST = {"server_no_context_takeover", "client_no_context_takeover"}


async def answer_to(relay: Relay, channel: str, *offers: str) -> dict[str, str] | None:
    """Offer extensions, a header line each; return the parameters that were agreed on, if any."""
    async with await relay.tcp() as raw:
        response = await raw.upgrade(path_of(channel), offers=offers)
        agreed = response.headers.get("sec-websocket-extensions")
        if agreed is None:
            await raw.send(frame(TEXT, b"plain") + compressed_frame(TEXT, b"compressed"))
            assert await raw.message() == "plain"
            assert (await raw.close_frame())[0] == 1002
            return None
        name, *parameters = agreed.split("; ")
        assert name == DEFLATE
        await raw.send(compressed_frame(TEXT, b"compressed"))
        assert await raw.message() == "compressed"
        pairs = [parameter.partition("=")[::2] for parameter in parameters]
        assert len(dict(pairs)) == len(pairs), "a parameter was answered twice"
        return dict(pairs)


def asked(window_bits: int | None = None) -> dict[str, str]:
    """What is agreed on where the client asks for so small a window, or for none."""
    bits = {} if window_bits is None else {"server_max_window_bits": str(window_bits)}
    return dict.fromkeys(MUST, "") | bits


def agreed_to(*offers: str) -> dict[str, str] | None:
    """Offer extensions; return the parameters that are agreed on, if any."""
    agreed = negotiate(", ".join(offers))
    if agreed is None:
        return None
    answer, window_bits = agreed
    name, *parameters = answer.split("; ")
    assert name == DEFLATE
    pairs = [parameter.partition("=")[::2] for parameter in parameters]
    assert len(dict(pairs)) == len(pairs), "a parameter was answered twice"
    assert window_bits == int(dict(pairs).get("server_max_window_bits", "15"))
    return dict(pairs)


@pytest.mark.fast
@pytest.mark.parametrize("server_bits", [None, *range(9, 16)])
@pytest.mark.parametrize(
    "takeovers", [(), ("server",), ("client",), ("server", "client"), ("client", "server")]
)
def test_every_sound_offer_is_taken_within_its_bounds(
    server_bits: int | None, takeovers: tuple[str, ...]
) -> None:
    bits = "" if server_bits is None else f"; server_max_window_bits={server_bits}"
    no_takeover = "".join(f"; {side}_no_context_takeover" for side in takeovers)
    for most in (None, "", *map(str, range(8, 16))):
        client_bits = "" if most is None else f"; client_max_window_bits={most}".removesuffix("=")
        wanted = [] if most is None else [str(n) for n in range(8, int(most or 15) + 1)]
        for offer in (DEFLATE + bits + client_bits + no_takeover,
                      DEFLATE + no_takeover + client_bits + bits):  # fmt: skip
            agreed = agreed_to(offer)
            assert agreed is not None
            answered = agreed.pop("client_max_window_bits", None)  # may be, where it was offered
            assert answered is None or answered in wanted
            assert agreed == asked(server_bits)


@pytest.mark.parametrize(
    ("offers", "window_bits"),
    [
        pytest.param([f'{DEFLATE}; server_max_window_bits="12"'], 12, id="quoted"),
        pytest.param([f'{DEFLATE}; server_max_window_bits="9"'], 9, id="quoted, one figure"),
        pytest.param([f"{DEFLATE};server_max_window_bits=10"], 10, id="no space"),
        pytest.param([f"{DEFLATE}\t;  server_max_window_bits=10 "], 10, id="much space"),
        pytest.param([f"x-webkit-deflate-frame, {DEFLATE}"], None, id="behind another extension"),
        pytest.param([f"{DEFLATE}, x-other; a=1; b"], None, id="before another extension"),
        pytest.param([f'x; a="b", {DEFLATE}'], None, id="behind a quoted value"),
        pytest.param([f",, {DEFLATE} ,"], None, id="among empty elements"),
        pytest.param(
            [f"{DEFLATE}; server_max_window_bits=10, {DEFLATE}; server_max_window_bits=12"],
            10,
            id="the first of two",
        ),
        pytest.param([f"{DEFLATE}; server_max_window_bits=8, {DEFLATE}"], None, id="a fallback"),
        pytest.param(
            [f"{DEFLATE}; unheard_of, {DEFLATE}; server_max_window_bits=11, {DEFLATE}"],
            11,
            id="the second of three",
        ),
        pytest.param(["x-other", DEFLATE], None, id="in the second of two lines"),
        pytest.param([f"{DEFLATE}; unheard_of=1", DEFLATE], None, id="a fallback in another line"),
        pytest.param(
            [f"{DEFLATE}; server_max_window_bits=9", DEFLATE], 9, id="in the first of two lines"
        ),
    ],
)  # fmt: skip
async def test_the_first_sound_offer_is_taken(
    deflating_relay: Relay, channel: str, offers: list[str], window_bits: int | None
) -> None:
    assert await answer_to(deflating_relay, channel, *offers) == asked(window_bits)


@pytest.mark.parametrize(
    "parameters",
    [
        "server_max_window_bits=8",
        *(f"server_max_window_bits={bits}" for bits in (0, 7, 16, 100, "09", "1e1", "-9", "x")),
        "server_max_window_bits",
        *(f"client_max_window_bits={bits}" for bits in (0, 7, 16, 100, "09", "1e1", "-9", "x")),
        "server_no_context_takeover=1",
        "client_no_context_takeover=true",
        "server_no_context_takeover; server_no_context_takeover",
        "client_no_context_takeover; client_no_context_takeover",
        "server_max_window_bits=10; server_max_window_bits=10",
        "server_max_window_bits=10; server_max_window_bits=11",
        "client_max_window_bits; client_max_window_bits",
        "client_max_window_bits; client_max_window_bits=10",
        "unheard_of",
        "unheard_of=10",
        'unheard_of="10"',
        "client_max_window_bits; unheard_of",
    ],
)
async def test_an_offer_that_cannot_be_met_is_declined_and_the_client_served_plain(
    deflating_relay: Relay, channel: str, parameters: str
) -> None:
    assert await answer_to(deflating_relay, channel, f"{DEFLATE}; {parameters}") is None


@pytest.mark.parametrize("offer", ["x-webkit-deflate-frame", "permessage-bzip2", "deflate"])
async def test_other_extensions_are_not_agreed_on(
    deflating_relay: Relay, channel: str, offer: str
) -> None:
    assert await answer_to(deflating_relay, channel, offer) is None


async def test_nothing_is_agreed_on_where_nothing_is_offered(
    deflating_relay: Relay, channel: str
) -> None:
    assert await answer_to(deflating_relay, channel) is None


# RFC 6455 holds as it does without compression


@pytest.mark.parametrize("group", CASES)
async def test_what_is_not_compressed_is_heard_as_ever(
    deflating_relay: Relay, channel: str, group: str
) -> None:
    """Two cases a group: the parser alone is asked for all of them elsewhere."""
    for case in chosen(CASES[group])[:2]:
        if not any(one[:1] in (b"\xc1", b"\xc2") for one in case.sent):
            async with deflating(deflating_relay, channel) as raw:
                assert raw.compresses
                await play(raw, case, Pieces.ONE)


@pytest.mark.parametrize("reserved", range(1, 8))
@pytest.mark.parametrize("begun", [RSV1, 0], ids=["compressed", "plain"])
async def test_only_the_first_frame_of_a_message_says_that_it_is_compressed(
    deflating_relay: Relay, channel: str, begun: int, reserved: int
) -> None:
    payload = deflated(b"Hello")
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(
            compressed_frame(TEXT, b"before")
            + frame(BINARY, payload[:3], fin=False, reserved=begun)
            + frame(CONTINUATION, payload[3:], reserved=reserved)
        )
        assert await heard_until_close(raw) == ([Frame(TEXT, b"before", fin=True)], 1002)


@pytest.mark.parametrize("opcode", [PING, PONG, CLOSE])
async def test_control_frames_are_never_compressed(
    deflating_relay: Relay, channel: str, opcode: int
) -> None:
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(frame(opcode, deflated(close_payload(1000)), reserved=RSV1))
        assert await heard_until_close(raw) == ([], 1002)


# What compressed messages may look like


def flushed(payload: bytes, size: int, mode: int) -> bytes:
    """Compress a message with a flush of the compressor after every so many bytes."""
    deflater = zlib.compressobj(wbits=-15)
    octets = b"".join(
        deflater.compress(payload[n : n + size]) + deflater.flush(mode)
        for n in range(0, len(payload), size)
    )
    return (octets + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


def ended(payload: bytes) -> bytes:
    """Compress a message into blocks of which the last says so."""
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(payload) + deflater.flush(zlib.Z_FINISH)


HELLO = [
    # The examples of RFC 7692 section 7.2.3
    pytest.param(bytes.fromhex("f248cdc9c90700"), b"Hello", id="one block"),
    pytest.param(bytes.fromhex("000500faff48656c6c6f00"), b"Hello", id="a block as it is"),
    pytest.param(bytes.fromhex("f348cdc9c9070000"), b"Hello", id="a last block"),
    pytest.param(bytes.fromhex("f24805000000ffffcac9c90700"), b"Hello", id="two blocks"),
    pytest.param(b"\x00", b"", id="an empty message"),
    # And others
    pytest.param(
        bytes.fromhex("000000ffff" * 50 + "f248cdc9c90700"), b"Hello", id="empty blocks first"
    ),
    pytest.param(
        bytes.fromhex("f248cdc9c907000000ffff" + "000000ffff" * 50 + "00"),
        b"Hello",
        id="empty blocks last",
    ),
    pytest.param(ended(b"") + b"\x00", b"", id="an empty last block"),
    *(
        pytest.param(deflated(PROSE.encode(), level=level), PROSE.encode(), id=f"level {level}")
        for level in range(10)
    ),
    *(
        pytest.param(
            deflated(PROSE.encode(), strategy=strategy), PROSE.encode(), id=f"strategy {strategy}"
        )
        for strategy in (zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED)
    ),
    *(
        pytest.param(
            deflated(PROSE.encode(), window_bits=bits),
            PROSE.encode(),
            id=f"a window of {bits} bits",
        )
        for bits in range(9, 16)
    ),
    pytest.param(
        flushed(PROSE.encode(), 100, zlib.Z_SYNC_FLUSH), PROSE.encode(), id="many sync flushes"
    ),
    pytest.param(
        flushed(PROSE.encode(), 100, zlib.Z_FULL_FLUSH), PROSE.encode(), id="many full flushes"
    ),
    pytest.param(
        flushed(PROSE.encode(), 100, zlib.Z_PARTIAL_FLUSH), PROSE.encode(), id="partial flushes"
    ),
]


@pytest.mark.parametrize(("payload", "message"), HELLO)
async def test_every_way_to_compress_a_message_is_understood(
    deflating_relay: Relay, channel: str, payload: bytes, message: bytes
) -> None:
    cuts = [0, *sorted(random.Random(1).choices(range(len(payload) + 1), k=5)), len(payload)]
    parts = [payload[start:end] for start, end in itertools.pairwise(cuts)]
    async with (
        deflating(deflating_relay, channel) as sender,
        deflating_relay.client(channel, compression=None) as other,
    ):
        for opcode in (TEXT, BINARY):
            expected = message.decode() if opcode == TEXT else message
            await sender.send(frame(opcode, payload, reserved=RSV1))
            await sender.send(in_fragments(opcode, parts))
            for _ in range(2):
                assert await receive(other) == expected
                assert await sender.message() == expected


def in_fragments(opcode: int, parts: Sequence[bytes]) -> bytes:
    """Encode a compressed message in so many frames."""
    first, *others = fragments(opcode, *parts)
    return b"".join([bytes([first[0] | RSV1 << 4]) + first[1:], *others])


@pytest.mark.parametrize(
    "offer",
    [
        DEFLATE,
        f"{DEFLATE}; server_no_context_takeover",
        f"{DEFLATE}; server_max_window_bits=9",
        f"{DEFLATE}; server_max_window_bits=15",
        f"{DEFLATE}; server_no_context_takeover; server_max_window_bits=9",
        f"{DEFLATE}; server_no_context_takeover; server_max_window_bits=15",
        f"{DEFLATE}; server_no_context_takeover; client_max_window_bits, {DEFLATE}",
    ],
)
@pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["text", "binary"])
async def test_compressed_messages_of_all_sizes_are_echoed(
    deflating_relay: Relay, channel: str, opcode: int, offer: str
) -> None:
    async with deflating(deflating_relay, channel, offer) as raw:
        for size in (0, 1, 16, 64, 256, 1_024, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072):
            for part in (size + 64, 256, 1_024, 4_096):
                text = (PROSE * 2)[size // 3 :][:size]
                packed = deflated(text.encode())
                starts = range(0, len(packed), part)
                parts = [packed[start : start + part] for start in starts]
                await raw.send(in_fragments(opcode, parts))
                assert await raw.message() == (text if opcode == TEXT else text.encode())


async def test_a_thousand_compressed_messages_are_echoed_one_after_another(
    deflating_relay: Relay, channel: str
) -> None:
    async with deflating(deflating_relay, channel) as raw:
        for number in range(1_000):
            text = PROSE[number * 50 :][: number % 300]
            await raw.send(compressed_frame(TEXT, text.encode()))
            assert await raw.message() == text


async def test_compressed_messages_may_come_an_octet_at_a_time_with_pings_between(
    deflating_relay: Relay, channel: str
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
        assert await next_frame(raw) == Frame(PONG, b"between", fin=True)
        assert await raw.message() == payload.decode()
        assert await raw.message() == "plain"


async def test_compressed_and_plain_messages_alternate_as_they_like(
    deflating_relay: Relay, channel: str
) -> None:
    async with (
        deflating(deflating_relay, channel) as raw,
        deflating_relay.client(channel, compression=None) as plain,
    ):
        texts = [f"{number} {PROSE[: number * 7]}" for number in range(200)]
        await raw.send(
            b"".join(
                compressed_frame(TEXT, one.encode()) if number % 3 else frame(TEXT, one.encode())
                for number, one in enumerate(texts)
            )
        )
        assert [await raw.message() for _ in texts] == texts
        assert await receive_many(plain, len(texts)) == texts


async def test_text_is_held_to_utf_8_after_it_was_inflated(
    deflating_relay: Relay, channel: str
) -> None:
    text = "naïve 日本 \U0001f40e κόσμε"
    packed = deflated(text.encode())
    async with deflating(deflating_relay, channel) as raw:
        for cut in range(len(packed) + 1):
            await raw.send(in_fragments(TEXT, [packed[:cut], packed[cut:]]))
            assert await raw.message() == text


@pytest.mark.parametrize(
    "octets", [b"\xff", b"ok \xc3", b"ok \xed\xa0\x80 edited", b"\xf4\x90\x80\x80"]
)
@pytest.mark.parametrize("parts", [1, 2])
async def test_compressed_text_that_is_not_utf_8_is_a_breach(
    deflating_relay: Relay, channel: str, octets: bytes, parts: int
) -> None:
    packed = deflated(octets)
    cut = [packed] if parts == 1 else [packed[:2], packed[2:]]
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(in_fragments(BINARY, cut))
        assert await raw.message() == octets
        await raw.send(in_fragments(TEXT, cut))
        assert await heard_until_close(raw) == ([], 1007)


# What does not inflate

FIRST = b"the first message, to which the second refers"


def with_context_kept() -> bytes:
    """Compress a message that repeats the one before it by reference."""
    deflater = zlib.compressobj(wbits=-15)
    deflater.compress(FIRST)
    deflater.flush(zlib.Z_SYNC_FLUSH)
    return (deflater.compress(FIRST) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\x07", id="a block of no known kind"),
        pytest.param(b"\xff" * 10, id="ones"),
        pytest.param(b"Hello, world!", id="text as it is"),
        pytest.param(bytes.fromhex("000500fafe48656c6c6f00"), id="a length that is no length"),
        pytest.param(bytes.fromhex("f20011000000"), id="a reference to nothing"),
        pytest.param(with_context_kept(), id="a reference to the message before"),
        pytest.param(zlib.compress(b"Hello, world!" * 10), id="zlib's format"),
        pytest.param(zlib.compress(b"Hello, world!" * 10, wbits=31), id="gzip's format"),
        pytest.param(ended(b"Hello") + b"\x07", id="rubbish behind a last block"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
async def test_what_does_not_inflate_is_a_breach_and_hurts_nobody_else(
    deflating_relay: Relay, channel: str, payload: bytes, parts: int
) -> None:
    cut = [payload] if parts == 1 else [payload[:3], payload[3:]]
    async with deflating_relay.client(channel) as bystander:
        async with deflating(deflating_relay, channel) as culprit:
            await culprit.send(compressed_frame(BINARY, FIRST))
            assert await receive(bystander) == FIRST
            await culprit.send(in_fragments(BINARY, cut))
            heard = [Frame(BINARY, FIRST, fin=True)]
            assert await heard_until_close(culprit) == (heard, DOES_NOT_INFLATE)
        await deflating_relay.metric_is("websocket_connected_clients", 1)
        await bystander.send("still here")
        assert await receive(bystander) == "still here"


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(deflated(PROSE.encode())[:-10], id="compressed"),
        pytest.param(deflated(b"not compressed", level=0)[:-6], id="as it is"),
        pytest.param(deflated(b"not compressed", level=0)[:-5], id="as it is, by four"),
    ],
)
async def test_a_message_that_ends_inside_a_block_is_a_breach(
    deflating_relay: Relay, channel: str, payload: bytes
) -> None:
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(frame(BINARY, payload, reserved=RSV1) + frame(CLOSE, close_payload(1000)))
        assert await heard_until_close(raw) == ([], DOES_NOT_INFLATE)


async def test_no_octets_at_all_are_an_empty_message_or_a_breach(
    deflating_relay: Relay, channel: str
) -> None:
    """By the letter they are no blocks; common compressors leave an empty message at that."""
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(frame(TEXT, reserved=RSV1) + frame(CLOSE, close_payload(1000)))
        assert await heard_until_close(raw) in (
            ([Frame(TEXT, b"", fin=True)], 1000),
            ([], DOES_NOT_INFLATE),
        )


async def test_what_comes_behind_a_last_block_is_never_lost_in_silence(
    deflating_relay: Relay, channel: str
) -> None:
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(frame(TEXT, ended(b"one ") + deflated(b"and two"), reserved=RSV1))
        received = await next_frame(raw)
        if received.opcode == TEXT:
            assert received.inflated() == b"one and two"
        else:
            assert int.from_bytes(received.payload[:2], "big") == DOES_NOT_INFLATE


# Limits count what a message comes to


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(bytes(MIB), id="zeros"),
        pytest.param(NOISE[:MIB], id="noise"),
        pytest.param((PROSE.encode() * 20)[:MIB], id="prose"),
    ],
)
async def test_a_message_of_exactly_the_limit_passes_compressed_and_one_more_byte_does_not(
    deflating_relay: Relay, channel: str, payload: bytes
) -> None:
    assert len(payload) == MIB
    async with deflating(deflating_relay, channel) as raw:
        for level in (0, 1, 9):  # noise takes more bytes compressed than as it is
            packed = deflated(payload, level=level)
            await raw.send(frame(BINARY, packed, reserved=RSV1))
            assert await raw.message() == payload
            await raw.send(in_fragments(BINARY, [packed[:99], packed[99:999], packed[999:]]))
            assert await raw.message() == payload
        await raw.send(compressed_frame(BINARY, payload + b"x"))
        assert await heard_until_close(raw) == ([], 1009)


def bomb(size: int) -> bytes:
    """Compress zeros that come to so many bytes, a MiB at a time."""
    deflater = zlib.compressobj(wbits=-15)
    mebibyte = deflater.compress(bytes(MIB)) + deflater.flush(zlib.Z_FULL_FLUSH)
    return mebibyte * (size // MIB) + b"\x00"


@pytest.mark.parametrize("parts", [1, 20])
async def test_a_compression_bomb_is_too_big_before_it_fills_memory(
    deflating_relay: Relay, channel: str, parts: int
) -> None:
    packed = bomb(1_024 * MIB)
    assert len(packed) < 1.1 * MIB  # a length that a message of the limit may have
    size = len(packed) // parts + 1
    cut = [packed[start : start + size] for start in range(0, len(packed), size)]
    before_bytes = deflating_relay.rss_bytes()
    async with AsyncExitStack() as stack:
        culprits = [
            await stack.enter_async_context(deflating(deflating_relay, channel)) for _ in range(20)
        ]
        for culprit in culprits:
            await culprit.send(in_fragments(BINARY, cut))
        for culprit in culprits:
            assert await heard_until_close(culprit) == ([], 1009)
        # Two or three times the limit at a time, for one connection after another.
        assert deflating_relay.rss_bytes() < before_bytes + 32 * MIB


async def test_many_who_send_what_inflates_a_thousandfold_wait_for_one_another(
    relay_with: StartRelay,
) -> None:
    """A hundred and fifty: nearly twenty times what all together may take."""
    total, count = 8 * MIB, 150
    relay = relay_with(
        compression={"enabled": True},
        limits={"total_backlog_bytes": total},
        history={"max_messages": 0},
    )
    one = frame(BINARY, bomb(MIB), reserved=RSV1)
    assert len(one) < 1_100
    async with AsyncExitStack() as stack:
        publishers = [
            await stack.enter_async_context(deflating(relay, f"of-{number}"))
            for number in range(count)
        ]
        before_bytes = relay.forget_peak()
        await asyncio.gather(*(publisher.send(one) for publisher in publishers))
        await relay.metric_is("websocket_messages_total", count)
        for publisher in publishers:
            assert await publisher.message() == bytes(MIB)
        # What malloc keeps, and copies of the one message that is in work, come on top.
        assert relay.peak_rss_bytes() < before_bytes + total + 24 * MIB
        assert await relay.metric("websocket_disconnections_total") == 0
        await relay.metric_is("websocket_paused_publishers", 0)
        assert await relay.metric("websocket_partial_message_bytes") == 0


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_a_message_that_was_let_go_of_is_inflated_again_from_its_start(opcode: int) -> None:
    parser = Parser(MIB, inflates=True)
    events = parser.feed(compressed_frame(opcode, bytes(MIB)) + frame(TEXT, b"next"))
    assert next(events) is PAUSE_INFLATING
    assert parser.buffered_bytes > 0
    assert parser.discard_inflated()
    assert parser.buffered_bytes == 0
    whole = [event for event in events if event is not PAUSE_INFLATING and event is not PAUSE]
    assert whole == [(opcode, bytes(MIB)), (TEXT, b"next")]


def test_a_message_of_which_a_part_was_fed_before_is_not_let_go_of() -> None:
    parser = Parser(MIB, inflates=True)
    payload = NOISE[:50_000] + bytes(MIB // 2)
    wire = compressed_frame(BINARY, payload)
    assert {*parser.feed(wire[:40_000])} <= {PAUSE_INFLATING, PAUSE}
    events = parser.feed(wire[40_000:])
    assert any(event is PAUSE_INFLATING for event in events)
    assert not parser.discard_inflated()
    whole = [event for event in events if event is not PAUSE_INFLATING and event is not PAUSE]
    assert whole == [(BINARY, payload)]


async def test_blocks_that_end_the_stream_again_and_again_delay_nobody(
    deflating_relay: Relay, channel: str
) -> None:
    """Each takes zlib a new beginning, and whoever feeds it a copy of the rest."""
    ends = b"\x03\x00" * 450_000
    async with (
        deflating(deflating_relay, channel) as culprit,
        deflating_relay.client(f"not-{channel}") as other,
    ):
        sending = asyncio.create_task(culprit.send(frame(BINARY, ends + b"\x00", reserved=RSV1)))
        while not sending.done():
            await other.send("hello")
            assert await receive(other) == "hello"
        await sending
        assert await culprit.message() == b""


async def test_a_claim_of_more_compressed_bytes_than_the_limit_can_take_is_too_big(
    deflating_relay: Relay, channel: str
) -> None:
    claim = bytes([0x80 | RSV1 << 4 | BINARY, 0x80 | 127]) + (2 * MIB).to_bytes(8, "big")
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(claim + bytes(4))
        assert await heard_until_close(raw) == ([], 1009)


# What comes back


@pytest.mark.parametrize("bits", range(9, 16))
async def test_a_client_with_a_small_window_can_inflate_what_it_gets(
    deflating_relay: Relay, channel: str, bits: int
) -> None:
    """Its message repeats itself at all distances, within its window and beyond."""
    blocks = [
        NOISE[distance : 2 * distance] for distance in (200, 900, 3_000, 7_000, 14_000, 30_000)
    ]
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
        for opcode in (BINARY, BINARY):
            await plain.send(payload)
            assert await receive(plain) == payload
            received = await next_frame(small)
            assert (received.opcode, received.compressed) == (opcode, True)
            assert within_window(received.payload, bits) == payload
            assert await large.message() == payload


def within_window(payload: bytes, bits: int) -> bytes:
    """Inflate with no more behind than the window has.

    Octet by octet: zlib lets references reach as far as what it returns at a time.

    Raises:
        zlib.error: a reference goes farther back than the window.
    """
    inflater = zlib.decompressobj(-bits)
    octets = bytearray(inflater.decompress(payload + TAIL, 1))
    while inflater.unconsumed_tail:
        octets += inflater.decompress(inflater.unconsumed_tail, 1)
    while more := inflater.decompress(b"", 1):
        octets += more
    return bytes(octets)


@pytest.mark.parametrize(
    ("last", "code"),
    [
        pytest.param(frame(CLOSE, close_payload(3000)), 3000, id="a close"),
        pytest.param(frame(CLOSE), 1000, id="a close without a code"),
        pytest.param(frame(TEXT, b"bare", mask=False), 1002, id="a breach"),
        pytest.param(frame(BINARY, b"\xff", reserved=RSV1), 1007, id="what does not inflate"),
        pytest.param(
            frame(TEXT, b"begun", fin=False) + frame(CLOSE, close_payload(1000)),
            1000,
            id="a close inside a message",
        ),
    ],
)
async def test_what_takes_long_to_compress_comes_before_the_close_frame(
    deflating_relay: Relay, channel: str, last: bytes, code: int
) -> None:
    long = (PROSE * 20)[: 900 * 1_024].encode()
    short = [Frame(TEXT, b"%d" % number, fin=True) for number in range(50)]
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(
            b"".join(compressed_frame(TEXT, long) + frame(TEXT, one.payload) for one in short[:3])
            + b"".join(frame(TEXT, one.payload) for one in short[3:])
            + last
        )
        echo = Frame(TEXT, long, fin=True)
        heard = [echo, short[0], echo, short[1], echo, *short[2:]]
        assert await heard_until_close(raw) == (heard, code)


async def test_every_message_is_compressed_by_itself(deflating_relay: Relay, channel: str) -> None:
    payload = PROSE[:3_000].encode()
    async with deflating(deflating_relay, channel) as raw:
        await raw.send(compressed_frame(TEXT, payload) * 50)
        received = [await next_frame(raw) for _ in range(50)]
    assert {one.compressed for one in received} == {True}
    assert {one.payload for one in received} == {received[0].payload}
    assert inflated(received[0].payload) == payload


async def test_short_messages_and_those_that_would_not_shrink_come_as_they_are(
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
                received = await next_frame(raw)
                assert (received.inflated(), received.compressed) == (payload, compressed)


async def test_plain_clients_and_those_of_every_window_hear_the_same_in_the_same_order(
    deflating_relay: Relay, channel: str
) -> None:
    offers = [f"{DEFLATE}; server_max_window_bits={bits}" for bits in range(9, 16)]
    sizes = random.Random(2).choices((0, 1, 10, 100, 1_000, 10_000), k=300)
    async with AsyncExitStack() as stack:
        listeners = [
            await stack.enter_async_context(deflating(deflating_relay, channel, offer))
            for offer in (DEFLATE, *offers)
        ]
        plain = await stack.enter_async_context(deflating_relay.raw_client(channel))
        senders = [*listeners[:3], plain]
        for number, size in enumerate(sizes):
            payload = f"{number} {PROSE[:size]}".encode()
            sender = senders[number % len(senders)]
            pack = compressed_frame if sender.compresses and number % 2 else frame
            await sender.send(pack(TEXT, payload))
        heard = [await plain.message() for _ in sizes]
        for listener in listeners:
            assert [await listener.message() for _ in sizes] == heard
        # One sender's messages keep their order; between senders there is none.
        for place in range(len(senders)):
            numbers = [int(str(one).split()[0]) for one in heard]
            own = [number for number in numbers if number % len(senders) == place]
            assert own == list(range(place, len(sizes), len(senders)))


async def test_a_usual_client_compresses_and_inflates(deflating_relay: Relay, channel: str) -> None:
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
