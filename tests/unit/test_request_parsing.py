"""HTTP/1.1 requests: heads and bodies in all cuts of the input, and beside h11."""

from collections.abc import Iterator, Sequence

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.outcomes import RefusedError
from websocket_relay.wire.request_body import CHUNKS_AT_ONCE, RequestBody
from websocket_relay.wire.request_head import (
    HEAD_END,
    RequestHead,
    check_partial_head,
    parse_head,
)

pytestmark = pytest.mark.fast

FIELDS = b"Host: a\r\n"
INNER = b"\r\n\r\nGET  /inner HTTP/1.1\r\n\r\n0\r\n\r\n"

Parsed = tuple[bytes, bytes, bytes]
"""Method, target and body of a request."""


def request(line: bytes, *fields: bytes, body: bytes = b"") -> bytes:
    return b"%b\r\n%b%b\r\n%b" % (line, FIELDS, b"".join(each + b"\r\n" for each in fields), body)


def parse_all(wire: bytes) -> list[Parsed]:
    """Parse requests from their bytes, all of which have arrived.

    Raises:
        RefusedError: one is malformed, or bytes are left that could not become a request.
    """
    parsed, start = [], 0
    while start < len(wire):
        end = wire.find(HEAD_END, start)
        if end < 0:
            check_partial_head(wire[start:], 0)
            break
        end += len(HEAD_END)
        head = parse_head(wire[start:end])
        body, start = RequestBody(head), end
        content = b""
        while not body.is_complete and start < len(wire):
            part, start = body.decode(wire, start)
            content += part
        if not body.is_complete:
            break
        target = head.path + (b"?" + head.query if head.query else b"")
        parsed.append((head.method.encode(), target, content))
    return parsed


def h11_parses(wire: bytes) -> list[Parsed]:
    """Parse the same bytes with h11.

    Raises:
        h11.RemoteProtocolError: a request is malformed.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(wire)
    parsed: list[Parsed] = []
    head, content = None, b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            head, content = event, b""
        elif isinstance(event, h11.Data):
            content += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            parsed.append((head.method, head.target, content))
            connection.send(h11.Response(status_code=200, headers=[]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return parsed  # the connection does not go on
            connection.start_next_cycle()
        else:  # NEED_DATA, PAUSED
            return parsed


def outcome(wire: bytes) -> list[Parsed] | str:
    try:
        return parse_all(wire)
    except RefusedError as error:
        return f"refused: {error.status.value}"


def h11_outcome(wire: bytes) -> list[Parsed] | str:
    try:
        return h11_parses(wire)
    except h11.RemoteProtocolError:
        return "refused"


CHUNKED = b"Transfer-Encoding: chunked"

AGREED: Sequence[bytes] = [
    request(b"GET / HTTP/1.1"),
    request(b"GET /a?b=c&d HTTP/1.1", b"X-Empty:", b"X:  \t padded \t", b"X: again"),
    request(b"HEAD / HTTP/1.1", b"Connection: keep-alive, x"),
    request(b"POST / HTTP/1.1", b"Content-Length: 5", body=b"hello"),
    request(b"POST / HTTP/1.1", b"Content-Length: 0"),
    request(b"POST / HTTP/1.1", b"content-length: 005", body=b"hello"),
    request(b"PUT / HTTP/1.1", CHUNKED, body=b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"),
    request(b"PUT / HTTP/1.1", b"TRANSFER-ENCODING: Chunked", body=b"0\r\n\r\n"),
    request(b"POST / HTTP/1.1", CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)),
    request(b"POST / HTTP/1.1", CHUNKED, body=b"0003;a=b\r\nabc\r\n00\r\nTrailer: x\r\n\r\n"),
    request(b"POST / HTTP/1.1", b"Content-Length: %d" % len(INNER), body=INNER),
    request(b"GET / HTTP/1.1", b"X: \xe9\xff"),
    request(b"GET / HTTP/1.1") * 3,
    # Both refuse
    b"GET / HTTP/1.1\r\n\r\n",
    b"nonsense\r\n\r\n",
    request(b"GET  / HTTP/1.1"),
    request(b"GET / HTTP/1.1 "),
    request(b"GET / HTTP/11"),
    request(b"GET /\x00 HTTP/1.1"),
    request(b"GET / HTTP/1.1", b"Host: b"),
    request(b"GET / HTTP/1.1", b"X : a"),
    request(b"GET / HTTP/1.1", b": a"),
    request(b"GET / HTTP/1.1", b"no colon"),
    request(b"GET / HTTP/1.1", b"X: a\x00b"),
    request(b"GET / HTTP/1.1", b"X(Y): b"),
    request(b"POST / HTTP/1.1", b"Content-Length: 5", b"Content-Length: 6", body=b"hello!"),
    request(b"POST / HTTP/1.1", b"Content-Length: -5", body=b"hello"),
    request(b"POST / HTTP/1.1", b"Content-Length: 0x5", body=b"hello"),
    request(b"POST / HTTP/1.1", b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    request(b"POST / HTTP/1.1", CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    request(b"POST / HTTP/1.1", CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n"),
    request(b"POST / HTTP/1.1", CHUNKED, body=b"-3\r\nabc\r\n0\r\n\r\n"),
    request(b"POST / HTTP/1.1", CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
]
"""Requests that this parser and h11 read alike, or both refuse."""

DIFFERENCES: dict[str, Sequence[tuple[bytes, str]]] = {
    "h11 accepts a line that ends with LF alone (RFC 9112 section 2.2 allows it)": [
        (request(b"GET / HTTP/1.1").replace(b"\r\n", b"\n"), "refused: 400"),
        (request(b"GET / HTTP/1.1", b"X: a\nY: b"), "refused: 400"),
    ],
    "h11 accepts obsolete line folding, which a server must refuse or replace (section 5.2)": [
        (request(b"GET / HTTP/1.1", b"X: a\r\n b"), "refused: 400"),
    ],
    "h11 accepts control characters in values, which are of no use": [
        (request(b"GET / HTTP/1.1", b"X: a\x01b"), "refused: 400"),
    ],
    "h11 does not check the value of Host (section 3.2)": [
        (request(b"GET / HTTP/1.1").replace(b"Host: a", b"Host: a b"), "refused: 400"),
    ],
    "h11 passes on every target; this is no proxy, and a fragment belongs to the client": [
        (request(b"GET a HTTP/1.1"), "refused: 400"),
        (request(b"GET /#a HTTP/1.1"), "refused: 400"),
        (request(b"OPTIONS * HTTP/1.1"), "refused: 400"),
    ],
    "h11 passes on every method; metrics have a series for each": [
        (request(b"FLY / HTTP/1.1"), "refused: 501"),
    ],
    "h11 takes lower case for a method": [
        (request(b"get / HTTP/1.1"), "refused: 400"),
    ],
    "h11 lets chunks override a length; a proxy may read the other of the two (section 6.3)": [
        (
            request(b"POST / HTTP/1.1", b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
            "refused: 400",
        ),
    ],
    "h11 merges equal lengths": [
        (
            request(b"POST / HTTP/1.1", b"Content-Length: 5", b"Content-Length: 5", body=b"hello"),
            "refused: 400",
        ),
        (request(b"POST / HTTP/1.1", b"Content-Length: 5, 5", body=b"hello"), "refused: 400"),
    ],
    "h11 accepts spaces after the size of a chunk": [
        (
            request(b"POST / HTTP/1.1", CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"),
            "refused: 400",
        ),
    ],
    "h11 takes anything for an extension of a chunk": [
        (
            request(b"POST / HTTP/1.1", CHUNKED, body=b"3;\r\nabc\r\n0\r\n\r\n"),
            "refused: 400",
        ),
    ],
    "h11 accepts trailers that belong into the head": [
        (
            request(b"POST / HTTP/1.1", CHUNKED, body=b"0\r\nContent-Length: 5\r\n\r\n"),
            "refused: 400",
        ),
    ],
    "h11 passes on versions that do not exist, and HTTP/2's with one line": [
        (request(b"GET / HTTP/1.2"), "refused: 400"),
        (request(b"GET / HTTP/2.0"), "refused: 505"),
    ],
}
"""Requests that h11 reads in another way: how, why, and what this parser makes of them."""


@pytest.mark.parametrize("wire", AGREED)
def test_h11_reads_the_same_requests(wire: bytes) -> None:
    ours, theirs = outcome(wire), h11_outcome(wire)
    assert (theirs == "refused") if isinstance(ours, str) else (ours == theirs)


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_each_difference_from_h11_is_known(difference: str) -> None:
    for wire, expected in DIFFERENCES[difference]:
        assert outcome(wire) == expected, wire
        assert h11_outcome(wire) != "refused", wire


PIECES = st.lists(
    st.sampled_from(
        [
            b"GET / HTTP/1.1\r\n",
            b"POST /a?b HTTP/1.1\r\n",
            b"Host: a\r\n",
            b"X-Y: z\r\n",
            b"Content-Length: 3\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"\r\n",
            b"abc",
            b"3\r\nabc\r\n",
            b"0\r\n\r\n",
            b" ",
            b"\t",
            b":",
            b"\n",
            b"\r",
            b"\x00",
            b"\xff",
        ]
    ),
    max_size=14,
)


@settings(max_examples=1_000, deadline=None, derandomize=True, database=None)
@given(PIECES)
def test_what_is_accepted_is_read_by_h11_in_the_same_way(pieces: list[bytes]) -> None:
    """The other way round h11 is more lenient: see DIFFERENCES."""
    wire = b"".join(pieces)
    ours = outcome(wire)
    if not isinstance(ours, str):
        theirs = h11_outcome(wire)
        if theirs != "refused":
            assert ours == theirs
        else:
            assert not ours, "accepted, and h11 refuses it"


# Cuts


def segments(wire: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    start = 0
    while start < len(wire):
        for size in sizes:
            if start < len(wire):
                yield wire[start : start + size]
                start += size


BODIES = [
    (b"Content-Length: %d" % len(INNER), INNER, INNER),
    (CHUNKED, b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER), INNER),
    (CHUNKED, b"1\r\nx\r\n2\r\n\r\n\r\n000\r\nA: b\r\nC: d\r\n\r\n", b"x\r\n"),
    (CHUNKED, b"1\r\nx\r\n" * 200 + b"0\r\n\r\n", b"x" * 200),
]


def head_with(field: bytes) -> RequestHead:
    return parse_head(request(b"POST / HTTP/1.1", field))


@settings(deadline=None, derandomize=True, database=None)
@given(st.sampled_from(BODIES), st.lists(st.integers(1, 90), min_size=1, max_size=20))
def test_a_body_is_decoded_in_all_cuts(case: tuple[bytes, bytes, bytes], sizes: list[int]) -> None:
    field, wire, content = case
    body, decoded = RequestBody(head_with(field)), b""
    for data in segments(wire, sizes):
        start = 0
        while start < len(data):
            assert not body.is_complete
            part, end = body.decode(data, start)
            assert start < end <= len(data)
            decoded, start = decoded + part, end
    assert body.is_complete
    assert decoded == content


def test_the_end_of_a_body_is_the_start_of_the_next_request() -> None:
    for field, wire, _ in BODIES:
        body, start = RequestBody(head_with(field)), 0
        while not body.is_complete:
            _, start = body.decode(wire + b"GET", start)
        assert start == len(wire)


def test_many_chunks_are_decoded_in_steps() -> None:
    body = RequestBody(head_with(CHUNKED))
    content, end = body.decode(b"1\r\nx\r\n" * 1_000, 0)
    assert len(content) <= CHUNKS_AT_ONCE
    assert end < 6 * 1_000


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"0" * 65_000 + b"g", id="zeros"),
        pytest.param(b"0" * 65_000 + b";", id="zeros, then half an extension"),
        pytest.param(b"1" + b";a" * 32_000 + b" ", id="extensions"),
        pytest.param(b"1" + b";a=b" * 16_000 + b"\x00", id="extensions with values"),
        pytest.param(b'1;a="' + b"\\a" * 32_000, id="a value in quotes"),
    ],
)
def test_a_long_line_before_a_chunk_is_refused_after_one_look(line: bytes) -> None:
    """Trying all ways of an expression with many takes most of a minute for 65,000 zeros."""
    with pytest.raises(RefusedError):
        RequestBody(head_with(CHUNKED)).decode(line + b"\r\n", 0)


def test_numbers_of_thousands_of_digits_are_no_error_of_the_relay() -> None:
    """CPython converts up to 4,300 digits."""
    padded = b"Content-Length: %b5" % (b"0" * 5_000)
    wire = request(b"POST / HTTP/1.1", padded, body=b"hello")
    assert outcome(wire) == [(b"POST", b"/", b"hello")]
    for line in (
        b"GET http://a:%b/ HTTP/1.1" % (b"1" * 5_000),
        b"GET http://a:%b1/ HTTP/1.1" % (b"0" * 5_000),
    ):
        assert outcome(request(line)) == "refused: 400"
    for field in (b"Host: a:%b" % (b"1" * 5_000), b"Content-Length: %b" % (b"1" * 5_000)):
        assert outcome(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % field) == "refused: 400"


@pytest.mark.parametrize(
    "wire",
    [
        b"\x16\x03\x01\x02\x00",  # TLS
        b"get / HTTP/1.1\r\n",
        b"GET  /",
        b"GET /\n",
        b"GET / HTTP/1.1\r\nX: a\nY",
        b"er than four",
    ],
)
def test_what_can_not_become_a_request_is_refused_before_its_end(wire: bytes) -> None:
    with pytest.raises(RefusedError):
        check_partial_head(wire, 0)


@pytest.mark.parametrize("cut", range(1, 40))
def test_every_beginning_of_a_head_may_become_one(cut: int) -> None:
    wire = request(b"GET /a?b=c HTTP/1.1", b"X: \xff\t")[:-2]
    check_partial_head(wire[:cut], 0)
    for checked in range(1, cut):
        check_partial_head(wire[:cut], checked)
