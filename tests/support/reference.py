"""Derive from RFC 6455 and 7692 how a server has to answer the bytes of a client.

It processes one octet at a time, without regard to speed: the code can be compared with the RFC
line by line, and the relay with this code. Shares nothing with the parser of the relay.
"""

import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

from tests.support.raw_client import BINARY, CLOSE, CONTINUATION, DEFLATE_TAIL, PING, PONG, TEXT

# Codes in close frames: RFC 6455 section 7.4.1, additions of IANA's registry, section 7.4.2.
REGISTERED = {1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014}
LIBRARIES_AND_APPLICATIONS = range(3000, 5000)

# RFC 3629 section 4: the octets that may follow a leading octet.
ANY_TAIL = (0x80, 0xBF)
LEADS: Mapping[int, Sequence[tuple[int, int]]] = (
    dict.fromkeys(range(0x80), ())
    | dict.fromkeys(range(0xC2, 0xE0), (ANY_TAIL,))
    | dict.fromkeys(range(0xE0, 0xF0), (ANY_TAIL,) * 2)
    | dict.fromkeys(range(0xF0, 0xF5), (ANY_TAIL,) * 3)
    | {
        0xE0: ((0xA0, 0xBF), ANY_TAIL),
        0xED: ((0x80, 0x9F), ANY_TAIL),
        0xF0: ((0x90, 0xBF), ANY_TAIL, ANY_TAIL),
        0xF4: ((0x80, 0x8F), ANY_TAIL, ANY_TAIL),
    }
)

Octets = Generator[None, int, bytes]


class ConnectionEndsError(Exception):
    """The server has to close the connection.

    Args:
        code: of its close frame.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Utf8:
    """Validates text in UTF-8, one octet at a time."""

    def __init__(self) -> None:
        self._expected: list[tuple[int, int]] = []

    def feed(self, octet: int) -> None:
        if not self._expected:
            if octet not in LEADS:
                raise ConnectionEndsError(1007)
            self._expected = list(LEADS[octet])
            return
        lowest, highest = self._expected.pop(0)
        if not lowest <= octet <= highest:
            raise ConnectionEndsError(1007)

    def end(self) -> None:
        if self._expected:
            raise ConnectionEndsError(1007)


class Deflated:
    """Inflates a compressed message, some octets at a time (RFC 7692 section 7.2.2)."""

    def __init__(self) -> None:
        self._blocks: zlib._Decompress | None = None

    @property
    def _is_between_streams(self) -> bool:
        return self._blocks is None

    def inflate(self, octets: bytes) -> Iterator[bytes]:
        """Yield the inflated octets one at a time: those before an error count."""
        try:
            while octets:
                blocks = self._blocks = self._blocks or zlib.decompressobj(-15)
                while made := blocks.decompress(octets, 1):
                    yield made
                    octets = blocks.unconsumed_tail
                octets = blocks.unused_data
                if blocks.eof:  # further blocks may follow the last one (section 7.2.3.4)
                    self._blocks = None
        except zlib.error:
            raise ConnectionEndsError(1007) from None

    def end(self) -> None:
        if self._is_between_streams:
            return
        # The length of an empty block, then an empty last block: they end a stream that is
        # between two blocks, and add no octet to it.
        for _ in self.inflate(DEFLATE_TAIL + b"\x03\x00"):
            raise ConnectionEndsError(1007)
        if not self._is_between_streams:
            raise ConnectionEndsError(1007)


class Reference:
    """The required answers of a server to the octets of one client.

    Args:
        max_message_bytes: a larger message is closed with 1009.
        inflates: whether permessage-deflate was negotiated.

    Attributes:
        messages: opcodes and payloads of the received messages.
        pongs: payloads of the pongs to send.
        close_code: of the server's close frame; None: the connection stays open.
        between_frames: whether the last octet ended a frame.
    """

    def __init__(self, max_message_bytes: int, *, inflates: bool = False) -> None:
        self.messages: list[tuple[int, bytes]] = []
        self.pongs: list[bytes] = []
        self.close_code: int | None = None
        self.between_frames = True
        self._max_message_bytes = max_message_bytes
        self._inflates = inflates
        self._deflated: Deflated | None = None
        self._opcode = CONTINUATION  # of the message that has begun
        self._fragments = bytearray()
        self._declared_bytes = 0
        self._text = Utf8()
        self._connection = self._frames()
        next(self._connection)

    def feed(self, octets: bytes) -> int:
        """Process octets of the client; return how many of them count.

        All octets count, unless one of them ends the connection.
        """
        for position, octet in enumerate(octets):
            if self.close_code is not None:
                return position
            try:
                self._connection.send(octet)
            except ConnectionEndsError as end:
                self.close_code = end.code
                self.between_frames = False
        return len(octets)

    def _frames(self) -> Generator[None, int, None]:
        while True:
            self.between_frames = True
            first = yield
            self.between_frames = False
            second = yield
            self._check_start(first, second)
            size = yield from self._size(second & 0x7F)
            if first & 0x08:
                mask = yield from _octets(4)
                yield from self._control(first & 0x0F, size, mask)
                continue
            if first & 0x40:
                self._deflated = Deflated()
            self._declared_bytes += size
            if self._declared_bytes > self._max_declared_bytes:
                raise ConnectionEndsError(1009)
            mask = yield from _octets(4)
            yield from self._data(first, size, mask)

    @property
    def _max_declared_bytes(self) -> int:
        """The largest declared size of a message; no RFC bounds it for a compressed message."""
        limit = self._max_message_bytes
        return limit if self._deflated is None else limit + limit // 8 + 1_024

    def _check_start(self, first: int, second: int) -> None:
        """Check the first two octets of a frame (sections 5.2, 5.4 and 5.5)."""
        opcode, fin, inside = first & 0x0F, first & 0x80, self._opcode != CONTINUATION
        known = opcode in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
        masked = second & 0x80
        may_be_compressed = self._inflates and opcode in (TEXT, BINARY)
        reserved = first & (0x30 if may_be_compressed else 0x70)
        if reserved or not known or not masked:
            raise ConnectionEndsError(1002)
        if opcode & 0x08 and (not fin or second & 0x7F > 125):
            raise ConnectionEndsError(1002)
        if opcode == CONTINUATION and not inside:
            raise ConnectionEndsError(1002)
        if opcode in (TEXT, BINARY) and inside:
            raise ConnectionEndsError(1002)

    def _size(self, short: int) -> Generator[None, int, int]:
        if short < 126:
            return short
        size = int.from_bytes((yield from _octets(2 if short == 126 else 8)), "big")
        least = 126 if short == 126 else 65_536  # "the minimal number of bytes MUST be used"
        if size < least or size >= 1 << 63:
            raise ConnectionEndsError(1002)
        return size

    def _control(self, opcode: int, size: int, mask: bytes) -> Generator[None, int, None]:
        payload = bytearray()
        for position in range(size):
            payload.append((yield) ^ mask[position % 4])
        if opcode == PING:
            self.pongs.append(bytes(payload))
        elif opcode == CLOSE:
            raise ConnectionEndsError(_answer_to_close(bytes(payload)))

    def _data(self, first: int, size: int, mask: bytes) -> Generator[None, int, None]:
        self._opcode = first & 0x0F or self._opcode
        for position in range(size):
            octets = bytes([(yield) ^ mask[position % 4]])
            self._append([octets] if self._deflated is None else self._deflated.inflate(octets))
        if first & 0x80:
            if self._deflated is not None:
                self._deflated.end()
            self._text.end()
            self.messages.append((self._opcode, bytes(self._fragments)))
            self._fragments.clear()
            self._declared_bytes = 0
            self._deflated = None
            self._opcode = CONTINUATION

    def _append(self, octets: Iterable[bytes]) -> None:
        for octet in octets:
            if len(self._fragments) == self._max_message_bytes:
                raise ConnectionEndsError(1009)
            if self._opcode == TEXT:
                self._text.feed(octet[0])
            self._fragments += octet


def _octets(count: int) -> Octets:
    octets = bytearray()
    for _ in range(count):
        octets.append((yield))
    return bytes(octets)


def _answer_to_close(payload: bytes) -> int:
    """Return the code of the answer to a close frame (sections 5.5.1 and 7.4)."""
    if not payload:
        return 1000
    if len(payload) == 1:
        return 1002
    code = int.from_bytes(payload[:2], "big")
    if code not in REGISTERED and code not in LIBRARIES_AND_APPLICATIONS:
        return 1002
    reason = Utf8()
    try:
        for octet in payload[2:]:
            reason.feed(octet)
        reason.end()
    except ConnectionEndsError as end:
        return end.code
    return code
