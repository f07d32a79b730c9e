"""Track where requests begin and end in the bytes of a connection.

httptools reports neither offsets nor the request line as received. It is therefore fed piece by
piece; it remains the only component that detects malformed requests. Knows RFC 9112 sections 2.2, 6
and 7.1. Knows no meaning of any header field.
"""

from enum import Enum, auto

HEAD_END = b"\r\n\r\n"

CHUNKS_AT_ONCE = 64
"""Maximum number of chunks in one piece. The smallest 64 chunks take 0.1 ms."""


class RequestPart(Enum):
    """The part of a request that comes next."""

    LINE = auto()  # the request line, or an empty line before it
    FIELDS = auto()  # the rest of the head, or trailers
    CONTENT = auto()
    CHUNKS = auto()


class RequestFraming:
    """The position of a connection within its requests.

    Attributes:
        line: the request line as received, including its line terminator.
    """

    __slots__ = ("_part", "_remaining_bytes", "_size_line", "line")

    def __init__(self) -> None:
        self.expect_request()

    def expect_request(self) -> None:
        """Expect the start of a request."""
        self.line = b""
        self._part = RequestPart.LINE
        self._remaining_bytes = 0  # of the content, or of a chunk and its line terminator
        self._size_line = b""  # the received part of the line before a chunk

    def expect_content(self, size: int) -> None:
        """Expect `size` bytes of content after the head."""
        self._part, self._remaining_bytes = RequestPart.CONTENT, size

    def expect_chunks(self) -> None:
        """Expect a chunked body after the head."""
        self._part = RequestPart.CHUNKS

    def consume_piece(self, data: bytes, start: int) -> int:
        """Advance past the next piece. Requests start and end only at the boundaries of pieces.

        Returns:
            The end offset of the piece. Feed the piece to the parser before the next call.
        """
        match self._part:
            case RequestPart.LINE:
                return self._pass_line(data, start)
            case RequestPart.FIELDS:
                return _end_of_fields(data, start)
            case RequestPart.CONTENT:
                return self._pass_content(data, start)
            case RequestPart.CHUNKS:
                return self._pass_chunks(data, start)

    def _pass_line(self, data: bytes, start: int) -> int:
        end = _end_of_line(data, start)
        self.line += data[start:end]
        if self.line == b"\r\n":  # RFC 9112 section 2.2: robust servers ignore it
            self.line = b""
        elif self.line.endswith(b"\n"):
            self._part = RequestPart.FIELDS
        return end

    def _pass_content(self, data: bytes, start: int) -> int:
        end = min(len(data), start + self._remaining_bytes)
        self._remaining_bytes -= end - start
        return end

    def _pass_chunks(self, data: bytes, start: int) -> int:
        for _ in range(CHUNKS_AT_ONCE):
            start = self._pass_content(data, start)
            if start == len(data):
                break
            end = _end_of_line(data, start)
            self._size_line += data[start:end]
            start = end
            if self._size_line.endswith(b"\n"):
                size, self._size_line = _chunk_size(self._size_line), b""
                if not size:
                    self._part = RequestPart.FIELDS
                    break
                self._remaining_bytes = size + len(b"\r\n")
        return start


def _end_of_line(data: bytes, start: int) -> int:
    return data.find(b"\n", start) + 1 or len(data)


def _end_of_fields(data: bytes, start: int) -> int:
    if start < 3:  # an earlier read may hold the first bytes of HEAD_END: advance byte by byte
        return start + 1
    found = data.find(HEAD_END, start - 3)
    return found + len(HEAD_END) if found >= 0 else len(data)


def _chunk_size(line: bytes) -> int:
    """Return the size of a chunk in bytes; 0 for an invalid size, which the parser rejects."""
    try:
        return max(0, int(line.partition(b";")[0], 16))
    except ValueError:
        return 0
