"""Make messages of a client's bytes, by RFC 6455 and RFC 7692. Knows no connection.

A breach is told as soon as its bytes are there: a forbidden head before its payload, a message too
big when its head claims so, text that is not UTF-8 at the first octet that can't be, in the middle
of a frame, too. What is kept of an unfinished message is what it comes to, never more than its
bound: masks are taken off, and compressed bytes inflated, as they come.
"""

from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Generator, Iterator

from websockets.frames import apply_mask  # type: ignore[attr-defined]  # in C where it was built

from websocket_relay.outcomes import Close
from websocket_relay.wire.deflate import (
    DEFLATED_SLICE_BYTES,
    INFLATED_SLICE_BYTES,
    INFLATER_BYTES,
    Inflater,
)
from websocket_relay.wire.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    CONTROL,
    FIN,
    MAX_CONTROL_BYTES,
    OPCODE,
    PING,
    PONG,
    RESERVED,
    RSV1,
    TEXT,
    ProtocolViolationError,
)

_Utf8Decoder = getincrementaldecoder("utf-8")

ParserEvent = tuple[int, bytes]
"""The opcode and payload of a whole message, or of a control frame."""

PAUSE: ParserEvent = (CONTINUATION, b"pause")
"""This very object is yielded where so much was done that others should get a look at the loop."""

HALF: ParserEvent = (CONTINUATION, b"half")
"""The same, where a message is growing fast: it had better be whole before others begin theirs."""

PAUSE_BYTES = 2_048  # after these; of the smallest frames they hold some three hundred
INFLATE_BYTES = 1_024  # what a call of zlib costs, in bytes that are inflated in the time
DEFLATED_BYTE = INFLATED_SLICE_BYTES // DEFLATED_SLICE_BYTES  # what a byte costs at worst, the same

WHOLE = (FIN | TEXT, FIN | BINARY)  # what a message of one plain frame begins with

MASKED = 0x80
MASK_BYTES = 4

OPCODES = (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)

CLOSE_CODES = frozenset([*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)])
"""What a close frame may say (RFC 6455 section 7.4 and the IANA registry)."""


class Parser:
    """One client's frames.

    Args:
        max_message_bytes: what a message may come to.
        inflates: whether permessage-deflate was agreed on.

    Attributes:
        kept_bytes: memory that a message takes which is not whole.
    """

    __slots__ = (
        "_decoder",
        "_fin",
        "_fresh",
        "_head",
        "_inflater",
        "_inflates",
        "_left_bytes",
        "_mask",
        "_max_bytes",
        "_message",
        "_opcode",
        "_raw_bytes",
        "_restarts",
        "_slices",
        "_work_bytes",
        "kept_bytes",
    )

    def __init__(self, max_message_bytes: int, *, inflates: bool) -> None:
        self._max_bytes = max_message_bytes
        self._inflates = inflates
        self._head = b""  # of a frame that is not whole: its head, or all of a control frame
        # The data frame whose payload is coming
        self._left_bytes = 0
        self._mask = b""
        self._fin = False
        # The message that is coming; while there is none, the opcode is that of a continuation
        self._opcode = CONTINUATION
        self._message = bytearray()
        self.kept_bytes = 0
        self._raw_bytes = 0  # its payloads as they came, compressed where they are
        self._decoder: IncrementalDecoder | None = None
        self._inflater: Inflater | None = None
        self._fresh = False  # whether what is being inflated began with what was fed last
        self._slices: Generator[ParserEvent, None, None]
        self._restarts = False  # whether it was let go of, and is inflated again
        self._work_bytes = 0  # of inflating, since the last pause

    # The hot path: every call that would make it shorter is a cost for every frame.
    def feed(self, data: bytes) -> Iterator[ParserEvent]:  # noqa: C901
        """Yield what more bytes complete: opcode and payload of messages and control frames.

        Work that takes long has a PAUSE or a HALF every now and then, 0.1 to 0.5 ms apart. A close
        frame is the last that is yielded. More can be fed only after the end.

        Raises:
            BreachError: by what follows. Nothing can be fed after it.
        """
        if self._head:
            data, self._head = self._head + data, b""
        self._work_bytes = 0
        position, end, pause_at = 0, len(data), PAUSE_BYTES
        if self._left_bytes:
            position = yield from self._take(data, 0)
        while end - position >= 2:
            if position > pause_at:
                yield PAUSE
                pause_at = position + PAUSE_BYTES
            first, second = data[position], data[position + 1]
            size = second & 0x7F
            body = position + 2 + MASK_BYTES
            if size > 125:
                size, body = _long_size(data, position, size)
            is_whole = body + size <= end
            if (
                is_whole
                and first in WHOLE
                and second & MASKED
                and size <= self._max_bytes
                and self._opcode == CONTINUATION
            ):
                # The usual: a plain message in one frame that is all there.
                payload = apply_mask(data[body : body + size], data[body - MASK_BYTES : body])
                if first == FIN | TEXT and not payload.isascii():
                    _check_utf8(payload)
                position = body + size
                yield first & OPCODE, payload
                continue
            self._check_head(first, second, size)
            if body > end or (first & CONTROL and not is_whole):
                break
            mask = data[body - MASK_BYTES : body]
            if first & CONTROL:
                position = body + size
                yield _control(first & OPCODE, apply_mask(data[body:position], mask))
                if first & OPCODE == CLOSE:
                    return
            else:
                self._begin(first, size, mask)
                position = yield from self._take(data, body)
        self._head = data[position:]

    def _check_head(self, first: int, second: int, size: int) -> None:
        """Check what a frame's first two bytes and its size say, as far as the size is known."""
        opcode, reserved = first & OPCODE, first & RESERVED
        compressed = reserved == RSV1 and self._inflates and opcode in (TEXT, BINARY)
        if not second & MASKED:
            raise ProtocolViolationError(Close.PROTOCOL, "a frame without a mask")
        if reserved and not compressed:
            raise ProtocolViolationError(Close.PROTOCOL, "reserved bits")
        if opcode not in OPCODES:
            raise ProtocolViolationError(Close.PROTOCOL, "a reserved opcode")
        if opcode & CONTROL:
            if not first & FIN:
                raise ProtocolViolationError(Close.PROTOCOL, "a control frame in fragments")
            if size > MAX_CONTROL_BYTES:
                raise ProtocolViolationError(Close.PROTOCOL, "a control frame that is too long")
            return
        if opcode == CONTINUATION and self._opcode == CONTINUATION:
            raise ProtocolViolationError(Close.PROTOCOL, "a continuation of nothing")
        if opcode != CONTINUATION and self._opcode != CONTINUATION:
            raise ProtocolViolationError(Close.PROTOCOL, "a message inside a message")
        may_shrink = compressed or self._inflater is not None
        max_bytes = _max_deflated_bytes(self._max_bytes) if may_shrink else self._max_bytes
        if self._raw_bytes + size > max_bytes:
            raise ProtocolViolationError(Close.TOO_BIG)

    def _begin(self, first: int, size: int, mask: bytes) -> None:
        """Begin a data frame that is not taken in one piece."""
        opcode = first & OPCODE
        if opcode != CONTINUATION:
            self._opcode = opcode
            self._decoder = _Utf8Decoder() if opcode == TEXT else None
            self._inflater = Inflater(self._max_bytes) if first & RSV1 else None
        self._raw_bytes += size
        self._fresh = opcode != CONTINUATION
        self._left_bytes = size
        self._mask = mask
        self._fin = bool(first & FIN)

    def _take(self, data: bytes, start: int) -> Generator[ParserEvent, None, int]:
        """Take what is there of the frame's payload, and yield the message if that makes it whole.

        Returns:
            Where it ends.
        """
        payload = apply_mask(data[start : start + self._left_bytes], self._mask)
        taken = len(payload)
        self._left_bytes -= taken
        turn = taken % MASK_BYTES
        self._mask = self._mask[turn:] + self._mask[:turn]
        if self._inflater is None:
            self._add(payload)
        else:
            yield from self._inflate(payload)
        if self._fin and not self._left_bytes:
            inflated_bytes = len(self._message) if self._inflater is not None else 0
            yield self._finished()
            if inflated_bytes > INFLATED_SLICE_BYTES:
                yield PAUSE
        return start + taken

    def let_go(self) -> bool:
        """Keep nothing of the message that paused with HALF, if it can be inflated from its start.

        Returns:
            Whether it can: all of it was fed last.
        """
        if self._fresh:
            self._restarts = True
            self._slices.close()
            self._reset()
        return self._fresh

    def _reset(self) -> None:
        self._message = bytearray()
        self.kept_bytes = 0
        self._decoder = self._inflater = None

    def _inflate(self, payload: bytes) -> Iterator[ParserEvent]:
        """Inflate what came of a message, and begin again where what it had come to was let go."""
        while True:
            self._slices = self._inflate_once(payload)
            yield from self._slices
            if not self._restarts:
                break
            self._restarts = False
            self._decoder = _Utf8Decoder() if self._opcode == TEXT else None
            self._inflater = Inflater(self._max_bytes)
        self._fresh = False

    def _inflate_once(self, payload: bytes) -> Generator[ParserEvent, None, None]:
        assert self._inflater is not None
        pause = PAUSE
        for start in range(0, len(payload), DEFLATED_SLICE_BYTES):
            deflated = payload[start : start + DEFLATED_SLICE_BYTES]
            for part in self._inflater.feed(deflated):
                if self._work_bytes > INFLATED_SLICE_BYTES:
                    self._work_bytes = 0
                    yield pause
                self._add(part)
                self._work_bytes += max(INFLATE_BYTES, len(part))
                pause = HALF if len(part) == INFLATED_SLICE_BYTES else PAUSE
            self._work_bytes += len(deflated) * DEFLATED_BYTE

    def _add(self, payload: bytes, *, final: bool = False) -> None:
        if self._decoder is not None:
            try:
                self._decoder.decode(payload, final)
            except UnicodeDecodeError:
                raise ProtocolViolationError(Close.NOT_UTF8) from None
            # Python's decoder waits for a surrogate's third octet; UTF-8 has none (RFC 3629).
            waiting, _ = self._decoder.getstate()
            if waiting[:1] == b"\xed" and waiting[1:] >= b"\xa0":
                raise ProtocolViolationError(Close.NOT_UTF8)
        self._message += payload
        self.kept_bytes = len(self._message)
        if self._inflater is not None:
            self.kept_bytes += INFLATER_BYTES

    def _finished(self) -> ParserEvent:
        """Return the message that is whole now, and be ready for the next."""
        if self._inflater is not None:
            self._inflater.finish()
        self._add(b"", final=True)
        opcode, payload = self._opcode, bytes(self._message)
        self._opcode = CONTINUATION
        self._raw_bytes = 0
        self._reset()
        return opcode, payload


def _long_size(data: bytes, position: int, size: int) -> tuple[int, int]:
    """Return the size that a frame at `position` says by 16 or 64 bits, and where its body begins.

    Where not all of them are there, its body begins behind the end.
    """
    length_bytes = 2 if size == 126 else 8
    length = data[position + 2 : position + 2 + length_bytes]
    if len(length) < length_bytes:
        return size, len(data) + 1
    size = int.from_bytes(length, "big")
    if size >> 63:
        raise ProtocolViolationError(Close.PROTOCOL, "a length with its top bit set")
    if size < 126 or (length_bytes == 8 and size < 65_536):
        raise ProtocolViolationError(Close.PROTOCOL, "a length that is not in its shortest form")
    return size, position + 2 + length_bytes + MASK_BYTES


def _max_deflated_bytes(size: int) -> int:
    """Return more than any sane compressor makes of so many bytes.

    zlib's bound for its worst settings is an eighth more and some (deflateBound).
    """
    return size + (size >> 3) + 1024


def _check_utf8(text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError:
        raise ProtocolViolationError(Close.NOT_UTF8) from None


def _control(opcode: int, payload: bytes) -> ParserEvent:
    """Return a control frame, and check what it holds where it is a close (section 5.5.1)."""
    if opcode == CLOSE and payload:
        if len(payload) == 1:
            raise ProtocolViolationError(Close.PROTOCOL, "a close frame of one byte")
        if int.from_bytes(payload[:2], "big") not in CLOSE_CODES:
            raise ProtocolViolationError(Close.PROTOCOL, "a close code that must not be sent")
        _check_utf8(payload[2:])
    return opcode, payload
