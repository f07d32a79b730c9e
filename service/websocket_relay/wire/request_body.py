"""Decode the body of one HTTP/1.1 request. Knows RFC 9112 sections 6.3 and 7.1, no connection."""

import re

from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.request_head import (
    FIELDS,
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    MAX_SIZE_DIGITS,
    TOKEN,
    RequestHead,
)

CHUNKS_AT_ONCE = 64
"""Maximum number of chunks in one step. The smallest 64 chunks take 0.1 ms."""

QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]++)(?:;" + TOKEN + rb"(?:=(?:" + TOKEN + rb"|" + QUOTED + rb"))?)*\r\n"
)
"""The size of a chunk and its extensions, which are ignored. Each part has one way to match: many
ways, tried one after another, would take as long as an attacker likes."""

FRAMING_FIELDS = (b"content-length", b"transfer-encoding")
"""Fields that a recipient might merge from the trailers into the head (RFC 9110 section 6.5.1)."""


class RequestBody:
    """The body of one request, while it arrives.

    Args:
        head: the head of the request.

    Attributes:
        is_complete: whether all of it has arrived.
    """

    __slots__ = ("_is_chunked", "_is_in_trailers", "_line", "_remaining_bytes", "is_complete")

    def __init__(self, head: RequestHead) -> None:
        self._is_chunked = head.is_chunked
        self._remaining_bytes = head.content_length  # of the content or of a chunk, with its CRLF
        self._is_in_trailers = False
        self._line = b""  # what is received of the line before a chunk, or of the trailers
        self.is_complete = not head.has_body

    def decode(self, data: bytes, start: int) -> tuple[bytes, int]:
        """Decode the next part of the body.

        Returns:
            Content, and the end offset of what was decoded. If that is not all of `data`, and the
            body is not complete, call again: many small chunks take a while.

        Raises:
            RefusedError: a chunk or a trailer is malformed or too large.
        """
        if not self._is_chunked:
            end = min(len(data), start + self._remaining_bytes)
            self._remaining_bytes -= end - start
            self.is_complete = not self._remaining_bytes
            return data[start:end], end
        parts: list[bytes] = []
        for _ in range(CHUNKS_AT_ONCE):
            if self._remaining_bytes:
                start = self._decode_chunk(data, start, parts)
            elif self._is_in_trailers:
                start = self._skip_trailers(data, start)
            else:
                start = self._start_chunk(data, start)
            if start == len(data) or self.is_complete:
                break
        return b"".join(parts), start

    def _start_chunk(self, data: bytes, start: int) -> int:
        end = data.find(b"\n", start) + 1 or len(data)
        self._line += data[start:end]
        if len(self._line) > MAX_HEAD_BYTES:
            raise RefusedError(Refusal.HEAD_TOO_LARGE)
        if self._line.endswith(b"\n"):
            line = CHUNK_LINE.fullmatch(self._line)
            if line is None or len(line[1].lstrip(b"0")) > MAX_SIZE_DIGITS:
                raise RefusedError(Refusal.INVALID_REQUEST)
            self._line = b""
            size = int(line[1], 16)
            self._is_in_trailers = not size
            self._remaining_bytes = size and size + len(b"\r\n")
        return end

    def _decode_chunk(self, data: bytes, start: int, parts: list[bytes]) -> int:
        remaining = self._remaining_bytes
        end = min(len(data), start + remaining)
        content_bytes = remaining - len(b"\r\n")
        if content_bytes > 0:
            parts.append(data[start : min(end, start + content_bytes)])
        # The CRLF after the content, of which this may be the second byte, or both.
        line_end = data[max(start, start + content_bytes) : end]
        if line_end != b"\r\n"[max(0, -content_bytes) :][: len(line_end)]:
            raise RefusedError(Refusal.INVALID_REQUEST)
        self._remaining_bytes = remaining - (end - start)
        return end

    def _skip_trailers(self, data: bytes, start: int) -> int:
        """Skip trailers up to the empty line after them."""
        received = len(self._line)
        self._line += data[start : start + MAX_HEAD_BYTES]
        if self._line.startswith(b"\r\n"):
            fields, end = b"", 2
        else:
            found = self._line.find(b"\r\n\r\n", max(0, received - 3))
            if found < 0:
                if len(self._line) > MAX_HEAD_BYTES:
                    raise RefusedError(Refusal.HEAD_TOO_LARGE)
                return start + len(self._line) - received
            fields, end = self._line[: found + 2], found + 4
        if not FIELDS.fullmatch(fields):
            raise RefusedError(Refusal.INVALID_REQUEST)
        names = [line.partition(b":")[0].lower() for line in fields.split(b"\r\n")]
        if len(names) > MAX_FIELDS:
            raise RefusedError(Refusal.HEAD_TOO_LARGE)
        if any(name in FRAMING_FIELDS for name in names):
            raise RefusedError(Refusal.INVALID_REQUEST)
        self._line = b""
        self.is_complete = True
        return start + end - received
