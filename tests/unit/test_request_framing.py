"""Request framing: the line of each request is kept as received, in all cuts of the input."""

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.wire.request_framing import CHUNKS_AT_ONCE, RequestFraming

pytestmark = pytest.mark.fast

INNER = b"\r\n\r\nGET  /inner HTTP/1.1\r\n\r\n0\r\n\r\n"
REQUESTS = {
    b"GET /plain HTTP/1.1\r\n": b"Host: a\r\n\r\n",
    b"GET /bare HTTP/1.1\r\n": b"\r\n",
    b"GET  /spaces HTTP/1.1\r\n": b"Host: a\r\n\r\n",
    b"POST /content HTTP/1.1\r\n": b"Content-Length: %d\r\n\r\n%b" % (len(INNER), INNER),
    b"POST /chunks HTTP/1.1\r\n": b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%b\r\n0\r\n\r\n"
    % (len(INNER), INNER),
    b"POST /trailers HTTP/1.1\r\n": b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\nC: d\r\n\r\n",
}


class LineRecorder:
    """A parser's callbacks: record the line of each request that the framing has kept."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self._framing = RequestFraming()
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, octets: bytes) -> None:
        start = 0
        while start < len(octets):
            end = self._framing.consume_piece(octets, start)
            assert start < end <= len(octets)
            self._parser.feed_data(octets[start:end])
            start = end

    def on_header(self, name: bytes, value: bytes) -> None:
        if name == b"Content-Length":
            self._framing.expect_content(int(value))
        elif name == b"Transfer-Encoding":
            self._framing.expect_chunks()

    def on_headers_complete(self) -> None:
        self.lines.append(self._framing.line)

    def on_message_complete(self) -> None:
        self._framing.expect_request()


@settings(deadline=None, derandomize=True, database=None)
@given(
    lines=st.lists(st.sampled_from(list(REQUESTS)), min_size=1, max_size=6),
    empty_lines=st.integers(0, 2),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=20),
)
def test_every_request_line_is_kept_as_received(
    lines: list[bytes], empty_lines: int, sizes: list[int]
) -> None:
    octets = b"".join(b"\r\n" * empty_lines + line + REQUESTS[line] for line in lines)
    recorder = LineRecorder()
    while octets:
        for size in sizes:
            recorder.feed(octets[:size])
            octets = octets[size:]
    assert recorder.lines == lines


def test_a_piece_has_a_bounded_number_of_chunks() -> None:
    framing = RequestFraming()
    framing.expect_chunks()
    chunk = b"1\r\na\r\n"
    octets = chunk * 10 * CHUNKS_AT_ONCE
    start = pieces = 0
    while start < len(octets):
        end = framing.consume_piece(octets, start)
        assert start < end <= start + CHUNKS_AT_ONCE * len(chunk)
        start, pieces = end, pieces + 1
    assert pieces >= 10
