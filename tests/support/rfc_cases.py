"""Cases of RFC 6455: the frames of a client and the required answers, and functions to run them.

They are the cases that a fuzzing client tries on an echo server: the relay returns the messages of
a client that is alone in its channel. Each group contains valid cases and violations.
"""

import asyncio
import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from websocket_relay.outcomes import Close
from websocket_relay.wire.frames import ProtocolViolationError
from websocket_relay.wire.parser import Parser

from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    MASK,
    PING,
    PONG,
    TEXT,
    Frame,
    RawClient,
    close_payload,
    frame,
    masked,
)
from tests.support.relay_process import RelayProcess, eventually

FEW_OCTETS = 2_000
SMALL_PIECE = 997
MIB = 1_048_576


@dataclass(frozen=True, slots=True)
class RfcCase:
    """A whole connection of a client.

    Args:
        sent: the frames of the client, one by one.
        expected: the messages and pongs of the relay, in order.
        code: of the relay's close frame, which is its last frame.
        is_violation: whether the relay fails the connection, instead of answering a close frame.
    """

    name: str
    sent: tuple[bytes, ...]
    expected: tuple[Frame, ...]
    code: int
    is_violation: bool = False

    def __str__(self) -> str:
        return self.name


class Pieces(Enum):
    """How a client splits its bytes into writes."""

    ONE = "in one piece"
    FRAMES = "frame by frame"
    SMALL = "in small pieces"

    def cut(self, frames: tuple[bytes, ...]) -> Iterator[bytes]:
        """Yield the pieces of a connection's frames."""
        octets = b"".join(frames)
        if self is Pieces.ONE:
            yield octets
        elif self is Pieces.FRAMES:
            yield from frames
        else:
            size = 1 if len(octets) <= FEW_OCTETS else SMALL_PIECE
            for start in range(0, len(octets), size):
                yield octets[start : start + size]


CLOSED_BY_CLIENT = frame(CLOSE, close_payload(1000))


async def play_case(raw: RawClient, case: RfcCase, pieces: Pieces) -> None:
    """Send the frames of a case; assert that the relay answers as expected, and nothing else."""
    for piece in pieces.cut(case.sent):
        await raw.send(piece)
        await asyncio.sleep(0)
    received, code = await read_until_close(raw)
    assert (received, code) == (list(case.expected), case.code)


def one_case_per_outcome(cases: tuple[RfcCase, ...]) -> list[RfcCase]:
    """Return one case for each combination of close code and first expected frame."""
    by_outcome: dict[object, RfcCase] = {}
    for case in cases:
        first = [answer.opcode for answer in case.expected[:1]]
        by_outcome.setdefault((case.code, case.is_violation, *first), case)
    return list(by_outcome.values())


def parse_pieces(
    pieces: Iterable[bytes], *, inflates: bool, max_bytes: int = MIB
) -> tuple[list[Frame], int | None]:
    """Parse pieces with the relay's parser.

    Returns:
        The messages and pongs that a relay sends for them, and the code of its close frame; None:
        there is neither a close frame nor a violation.
    """
    parser = Parser(max_bytes, inflates=inflates)
    answers: list[Frame] = []
    try:
        for event in itertools.chain.from_iterable(map(parser.feed, pieces)):
            opcode, payload = event
            if opcode == CLOSE:
                return answers, int.from_bytes(payload[:2], "big") or Close.CLIENT.code
            if opcode in (TEXT, BINARY, PING):
                answers.append(Frame(PONG if opcode == PING else opcode, payload, fin=True))
    except ProtocolViolationError as violation:
        return answers, violation.close.code
    return answers, None


async def read_frame_except_pings(raw: RawClient) -> Frame:
    """Read the next frame that is no ping: the keepalive sends pings at any time."""
    while (received := await raw.read_frame()).opcode == PING:
        pass
    return received


async def read_until_close(raw: RawClient) -> tuple[list[Frame], int]:
    """Read to the end; return the messages and pongs, and the code of the close frame."""
    answers = []
    while (received := await read_frame_except_pings(raw)).opcode != CLOSE:
        answers.append(decompressed(received))
    (code,) = struct.unpack("!H", received.payload[:2])
    received.payload[2:].decode()  # a reason is UTF-8
    assert await raw.read_to_end() == b"", "bytes after the close frame"
    return answers, code


async def await_descriptors(relay: RelayProcess, most: int) -> None:
    """Wait until a relay has at most so many file descriptors open."""

    async def count_descriptors() -> tuple[bool, object]:
        count = relay.descriptors()
        return count <= most, count

    await eventually(count_descriptors, f"at most {most} descriptors")


def decompressed(received: Frame) -> Frame:
    """Return a frame with an inflated payload."""
    return replace(received, payload=received.inflated(), compressed=False)


# Parts of cases


def text_frame(payload: str | bytes) -> Frame:
    return Frame(TEXT, payload.encode() if isinstance(payload, str) else payload, fin=True)


def binary_frame(payload: bytes) -> Frame:
    return Frame(BINARY, payload, fin=True)


def pong_frame(payload: bytes) -> Frame:
    return Frame(PONG, payload, fin=True)


def valid_case(name: str, *sent: bytes, expected: tuple[Frame, ...] = ()) -> RfcCase:
    """Return the case of a client that violates no rule, and closes after its frames."""
    return RfcCase(name, (*sent, CLOSED_BY_CLIENT), expected, 1000)


def violation_case(
    name: str, *sent: bytes, expected: tuple[Frame, ...] = (), code: int = 1002
) -> RfcCase:
    """Return the case of a client whose connection the relay has to fail."""
    return RfcCase(name, sent, expected, code, is_violation=True)


def fragments(opcode: int, *payloads: bytes) -> tuple[bytes, ...]:
    """Encode one message as one frame for each payload."""
    last = len(payloads) - 1
    return tuple(
        frame(opcode if not n else CONTINUATION, payload, fin=n == last)
        for n, payload in enumerate(payloads)
    )


def octets_of(payload: bytes) -> tuple[bytes, ...]:
    """Return the single octets of a payload."""
    return tuple(payload[n : n + 1] for n in range(len(payload)))


def frame_head(opcode: int, short: int, extended: bytes) -> bytes:
    """Encode the head of a frame with any length."""
    return bytes([0x80 | opcode, 0x80 | short]) + extended + MASK


def framing() -> Iterator[RfcCase]:
    """Every form of the length field (section 5.2), and the mask (section 5.3)."""
    for size in (0, 1, 125, 126, 127, 128, 65_535, 65_536, 200_000):
        yield valid_case(
            f"text of {size}", frame(TEXT, b"*" * size), expected=(text_frame("*" * size),)
        )
        yield valid_case(
            f"binary of {size}",
            frame(BINARY, b"\xfe" * size),
            expected=(binary_frame(b"\xfe" * size),),
        )
    for key in (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x01\x02\x03\x04"):
        hello = frame(TEXT, b"Hello", key=key)
        yield valid_case(f"mask {key.hex()}", hello, expected=(text_frame("Hello"),))
    before = frame(TEXT, b"before")
    for opcode in (TEXT, BINARY, PING, PONG, CLOSE):
        unmasked = frame(opcode, close_payload(1000), mask=False)
        yield violation_case(
            f"unmasked, opcode {opcode}", before, unmasked, expected=(text_frame("before"),)
        )
    yield violation_case("unmasked and empty", frame(TEXT, mask=False))
    for size in (0, 1, 125):
        medium, long = struct.pack("!H", size), struct.pack("!Q", size)
        yield violation_case(
            f"{size} in 16 bits", frame_head(BINARY, 126, medium) + masked(bytes(size))
        )
        yield violation_case(
            f"{size} in 64 bits", frame_head(BINARY, 127, long) + masked(bytes(size))
        )
        yield violation_case(
            f"ping of {size} in 16 bits", frame_head(PING, 126, medium) + masked(bytes(size))
        )
    for size in (126, 65_535):
        yield violation_case(
            f"{size} in 64 bits",
            frame_head(BINARY, 127, struct.pack("!Q", size)) + masked(bytes(size)),
        )
    for size in (2**63, 2**63 + 5, 2**64 - 1):
        long = frame_head(BINARY, 127, struct.pack("!Q", size))
        yield violation_case(f"a length of {size}", before, long, expected=(text_frame("before"),))
    for size in (MIB + 1, 2**32, 2**62, 2**63 - 1):
        claim = frame_head(BINARY, 127, struct.pack("!Q", size))
        yield violation_case(
            f"a declared size of {size}", before, claim, expected=(text_frame("before"),), code=1009
        )


def pings() -> Iterator[RfcCase]:
    """Pings and pongs (sections 5.5.2 and 5.5.3)."""
    for name, payload in (
        ("empty", b""),
        ("text", b"Hello, world!"),
        ("no text", b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"),
        ("of 125", b"\xfe" * 125),
    ):
        yield valid_case(f"ping, {name}", frame(PING, payload), expected=(pong_frame(payload),))
        yield valid_case(f"unsolicited pong, {name}", frame(PONG, payload))
    yield valid_case(
        "unsolicited pong, then ping",
        frame(PONG, b"unsolicited"),
        frame(PING, b"ping"),
        expected=(pong_frame(b"ping"),),
    )
    numbered = [b"payload-%d" % number for number in range(10)]
    yield valid_case(
        "ten pings",
        *(frame(PING, payload) for payload in numbered),
        expected=tuple(pong_frame(payload) for payload in numbered),
    )
    for opcode in (PING, PONG):
        yield violation_case(f"opcode {opcode} of 126", frame(opcode, b"\xfe" * 126))
        yield violation_case(f"opcode {opcode} of 65536", frame(opcode, b"\xfe" * 65_536))


def reserved_bits() -> Iterator[RfcCase]:
    """Bits to which no extension gives a meaning (section 5.2)."""
    before, after = frame(TEXT, b"before"), frame(PING, b"after")
    for bits in range(1, 8):
        for opcode in (TEXT, BINARY, PING, PONG, CLOSE):
            payload = close_payload(1000) if opcode == CLOSE else b"reserved"
            yield violation_case(
                f"bits {bits}, opcode {opcode}",
                before,
                frame(opcode, payload, reserved=bits),
                after,
                expected=(text_frame("before"),),
            )
        yield violation_case(
            f"bits {bits}, continuation",
            before,
            frame(TEXT, b"begun", fin=False),
            frame(CONTINUATION, b"reserved", reserved=bits),
            after,
            expected=(text_frame("before"),),
        )
        yield violation_case(f"bits {bits}, first and empty", frame(TEXT, reserved=bits))


def reserved_opcodes() -> Iterator[RfcCase]:
    """Opcodes without a meaning (section 5.2)."""
    before, after = frame(TEXT, b"before"), frame(PING, b"after")
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield violation_case(f"opcode {opcode}, first and empty", frame(opcode))
        yield violation_case(f"opcode {opcode}, first", frame(opcode, b"reserved"))
        yield violation_case(
            f"opcode {opcode}",
            before,
            frame(opcode, b"reserved"),
            after,
            expected=(text_frame("before"),),
        )
        yield violation_case(
            f"opcode {opcode} between fragments",
            frame(TEXT, b"begun", fin=False),
            frame(opcode),
            frame(CONTINUATION, b"ended"),
        )


def fragmentation() -> Iterator[RfcCase]:
    """Messages in several frames, and control frames between them (section 5.4)."""
    two = fragments(TEXT, b"fragment1", b"fragment2")
    whole = (text_frame("fragment1fragment2"),)
    yield valid_case("text in two", *two, expected=whole)
    yield valid_case(
        "binary in two", *fragments(BINARY, b"\xff", b"\xfe"), expected=(binary_frame(b"\xff\xfe"),)
    )
    yield valid_case(
        "with empty fragments",
        *fragments(TEXT, b"", b"one ", b"", b"two", b""),
        expected=(text_frame("one two"),),
    )
    yield valid_case(
        "a ping between", two[0], frame(PING, b"p"), two[1], expected=(pong_frame(b"p"), *whole)
    )
    yield valid_case("a pong between", two[0], frame(PONG, b"p"), two[1], expected=whole)
    yield valid_case(
        "pings between five",
        frame(TEXT, b"fragment1", fin=False),
        frame(CONTINUATION, b"fragment2", fin=False),
        frame(PING, b"ping-1"),
        frame(CONTINUATION, b"fragment3", fin=False),
        frame(CONTINUATION, b"fragment4", fin=False),
        frame(PING, b"ping-2"),
        frame(CONTINUATION, b"fragment5"),
        expected=(
            pong_frame(b"ping-1"),
            pong_frame(b"ping-2"),
            text_frame("fragment1fragment2fragment3fragment4fragment5"),
        ),
    )
    yield valid_case(
        "in fragments of 1300",
        *fragments(TEXT, *(b"*" * min(1_300, 65_536 - n) for n in range(0, 65_536, 1_300))),
        expected=(text_frame("*" * 65_536),),
    )
    for opcode in (PING, PONG, CLOSE):
        payload = close_payload(1000)
        yield violation_case(
            f"opcode {opcode} in fragments",
            frame(opcode, payload, fin=False),
            frame(CONTINUATION, b""),
        )
        yield violation_case(f"opcode {opcode} in fragments, empty", frame(opcode, fin=False))
    for fin in (True, False):
        alone = frame(CONTINUATION, b"nothing to continue", fin=fin)
        yield violation_case(f"continuation of nothing, {fin=}", alone, frame(TEXT, b"after"))
        yield violation_case(
            f"continuation of nothing after a message, {fin=}",
            *two,
            alone,
            frame(TEXT, b"after"),
            expected=whole,
        )
        yield violation_case(f"continuation of nothing, twice, {fin=}", alone, *two, alone, *two)
        for opcode in (TEXT, BINARY):
            yield violation_case(
                f"opcode {opcode} inside a message, {fin=}",
                frame(TEXT, b"begun", fin=False),
                frame(opcode, b"another", fin=fin),
            )
    yield violation_case(
        "too large, in fragments",
        *fragments(BINARY, bytes(MIB - 10), bytes(10), b"x"),
        code=1009,
    )
    yield violation_case(
        "too large, in fragments without end",
        *(frame(BINARY if not n else CONTINUATION, bytes(65_536), fin=False) for n in range(20)),
        code=1009,
    )
    yield violation_case(
        "an empty frame in a message of the largest size",
        *fragments(BINARY, bytes(MIB), b""),
        frame(TEXT, b"bare", mask=False),
        expected=(binary_frame(bytes(MIB)),),
    )


KOSME = "κόσμε".encode()
MIXED = "Hello-µ@ßöäüàá-UTF-8!!".encode()
SURROGATE_INSIDE = KOSME + b"\xed\xa0\x80edited"

# Markus Kuhn's UTF-8 decoder capability and stress test, by the numbers of its sections.
WELL_FORMED: dict[str, tuple[bytes, ...]] = {
    "1 some": (b"hello$world", "hello¢world".encode(), "hello€world".encode(),
               "hello\U00024b62world".encode(), KOSME),
    "2.1 first of a length": (b"\x00", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"),
    "2.2 last of a length": (b"\x7f", b"\xdf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"),
    "2.3 boundaries": (b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xef\xbf\xbd", b"\xf4\x8f\xbf\xbf"),
    "5.3 noncharacters": tuple(
        chr(plane << 16 | last).encode() for plane in range(17) for last in (0xFFFE, 0xFFFF)
    ),
    "5.3 specials": tuple(chr(point).encode() for point in range(0xFFF9, 0x10000)),
}  # fmt: skip
MALFORMED: dict[str, tuple[bytes, ...]] = {
    "2.1 first of 5 and 6": (b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"),
    "2.2 last of 4, 5 and 6": (
        b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf"
    ),
    "2.3 beyond": (b"\xf4\x90\x80\x80",),
    "3.1 unexpected continuation": (
        b"\x80", b"\xbf", *((b"\x80\xbf" * 4)[:n] for n in range(2, 8)), bytes(range(0x80, 0xC0))
    ),
    "3.2 lonely leads": tuple(
        b"".join(bytes([lead, 0x20]) for lead in leads)
        for leads in (range(0xC0, 0xE0), range(0xE0, 0xF0), range(0xF0, 0xF8), range(0xF8, 0xFC),
                      range(0xFC, 0xFE))
    ),
    "3.3 last octet missing": (
        b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xf8\x80\x80\x80", b"\xfc\x80\x80\x80\x80",
        b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf", b"\xfb\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf"
    ),
    "3.4 incomplete in a row": (b"\xdf\xef\xbf\xf7\xbf\xbf",),
    "3.5 impossible": (b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"),
    "4.1 overlong slash": (
        b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf",
        b"\xfc\x80\x80\x80\x80\xaf"
    ),
    "4.2 longest overlong": (
        b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xf8\x87\xbf\xbf\xbf",
        b"\xfc\x83\xbf\xbf\xbf\xbf"
    ),
    "4.3 overlong NUL": (
        b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf8\x80\x80\x80\x80",
        b"\xfc\x80\x80\x80\x80\x80"
    ),
    "5.1 surrogates": tuple(
        chr(point).encode(errors="surrogatepass")
        for point in (0xD800, 0xDB7F, 0xDB80, 0xDBFF, 0xDC00, 0xDF80, 0xDFFF)
    ),
    "5.2 surrogate pairs": tuple(
        (chr(high) + chr(low)).encode(errors="surrogatepass")
        for high in (0xD800, 0xDB7F, 0xDB80, 0xDBFF)
        for low in (0xDC00, 0xDFFF)
    ),
}  # fmt: skip


def utf_8() -> Iterator[RfcCase]:
    """Text is UTF-8, also across fragments (sections 5.6 and 8.1)."""
    yield valid_case("empty in three", *fragments(TEXT, b"", b"", b""), expected=(text_frame(""),))
    yield valid_case(
        "first and last of three empty",
        *fragments(TEXT, b"", b"middle frame payload", b""),
        expected=(text_frame("middle frame payload"),),
    )
    yield valid_case("whole", frame(TEXT, MIXED), expected=(text_frame(MIXED),))
    yield valid_case(
        "cut between characters",
        *fragments(TEXT, "Hello-µ@ß".encode(), "öäüàá-UTF-8!!".encode()),
        expected=(text_frame(MIXED),),
    )
    for payload in (MIXED, KOSME, "naïve 日本 \U0001f40e".encode()):
        yield valid_case(
            f"an octet a frame, {payload.decode()}",
            *fragments(TEXT, *octets_of(payload)),
            expected=(text_frame(payload),),
        )
    for size in range(1, len(KOSME)):
        part = KOSME[:size]
        try:
            part.decode()
        except UnicodeDecodeError:
            yield violation_case(f"prefix of {size}", frame(TEXT, part), code=1007)
        else:
            yield valid_case(f"prefix of {size}", frame(TEXT, part), expected=(text_frame(part),))
    for name, payloads in WELL_FORMED.items():
        for payload in payloads:
            yield valid_case(
                f"{name}: {payload.hex()}", frame(TEXT, payload), expected=(text_frame(payload),)
            )
    for name, payloads in MALFORMED.items():
        for payload in payloads:
            yield violation_case(f"{name}: {payload.hex()}", frame(TEXT, payload), code=1007)
    yield violation_case("a surrogate inside", frame(TEXT, SURROGATE_INSIDE), code=1007)
    yield violation_case(
        "a surrogate inside, an octet a frame",
        *fragments(TEXT, *octets_of(SURROGATE_INSIDE)),
        code=1007,
    )
    for name, parts in (
        ("in the second of three", (KOSME, b"\xf4\x90\x80\x80", b"edited")),
        ("begun in the first of three", (KOSME + b"\xf4", b"\x90", b"\x80\x80edited")),
    ):
        yield violation_case(f"invalid {name}", *fragments(TEXT, *parts), code=1007)
        yield violation_case(
            f"invalid {name}, in one frame", frame(TEXT, b"".join(parts)), code=1007
        )
    yield violation_case("incomplete at the end of two", *fragments(TEXT, b"a", b"\xc3"), code=1007)
    yield violation_case("incomplete, then empty", *fragments(TEXT, b"a\xc3", b""), code=1007)
    yield violation_case(
        "invalid after a message",
        frame(TEXT, b"before"),
        frame(TEXT, b"\xff"),
        frame(PING, b"after"),
        expected=(text_frame("before"),),
        code=1007,
    )
    yield valid_case(
        "binary data is not validated",
        frame(BINARY, b"\xff\xc3"),
        expected=(binary_frame(b"\xff\xc3"),),
    )
    yield valid_case(
        "binary data in fragments is not validated",
        *fragments(BINARY, b"\xc3", b"\xff"),
        expected=(binary_frame(b"\xc3\xff"),),
    )


def closing() -> Iterator[RfcCase]:
    """The closing handshake (sections 5.5.1 and 7)."""
    close = CLOSED_BY_CLIENT
    first = frame(TEXT, b"fragment1", fin=False)
    yield valid_case("after a message", frame(TEXT, b"Hello"), expected=(text_frame("Hello"),))
    for name, later in (
        ("a close", close),
        ("another close", frame(CLOSE, close_payload(3000))),
        ("a ping", frame(PING, b"late")),
        ("a message", frame(TEXT, b"late")),
        ("a violation", frame(TEXT, b"late", mask=False)),
        ("bytes that are no frames", b"\xff" * 1_000),
    ):
        yield RfcCase(f"{name} after the close frame is ignored", (close, later), (), 1000)
    yield RfcCase("between fragments", (first, close, frame(CONTINUATION, b"late")), (), 1000)
    yield valid_case(
        "after a large message",
        frame(TEXT, b"BAsd7&jh23" * 26_214),
        frame(TEXT, b"Hello World!"),
        expected=(text_frame("BAsd7&jh23" * 26_214), text_frame("Hello World!")),
    )
    yield RfcCase("without a code", (frame(CLOSE),), (), 1000)
    yield violation_case("of one octet", frame(CLOSE, b"\x03"))
    for reason in (b"", b"Hello World!", "grüß dich".encode(), b"*" * 123):
        payload = close_payload(1000, reason)
        yield RfcCase(f"with a reason of {len(reason)}", (frame(CLOSE, payload),), (), 1000)
    yield violation_case("with a reason of 124", frame(CLOSE, close_payload(1000, b"*" * 124)))
    for reason in (SURROGATE_INSIDE, b"\xff", b"unfinished \xc3"):
        payload = close_payload(1000, reason)
        yield violation_case(f"with the reason {reason.hex()}", frame(CLOSE, payload), code=1007)
    for code in (*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999):
        yield RfcCase(f"with the code {code}", (frame(CLOSE, close_payload(code)),), (), code)
        payload = close_payload(code, b"and a reason")
        yield RfcCase(f"with the code {code} and a reason", (frame(CLOSE, payload),), (), code)
    for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535):
        yield violation_case(f"with the code {code}", frame(CLOSE, close_payload(code)))
        yield violation_case(
            f"with the code {code} and a reason", frame(CLOSE, close_payload(code, b"x"))
        )


GROUPS = (framing, pings, reserved_bits, reserved_opcodes, fragmentation, utf_8, closing)
CASES = {group.__name__: tuple(group()) for group in GROUPS}
