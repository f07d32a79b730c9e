"""The HTTP side: what is said to whom, and that no request is read in two ways."""

import asyncio
from contextlib import suppress

import pytest

from tests.support.http_requests import get
from tests.support.raw_client import TEXT, RawClient, Response, frame, upgrade_request
from tests.support.relay_process import HOST, Relay, path_of

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post(*fields: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    lines = b"".join(field + b"\r\n" for field in (b"Host: localhost", *fields))
    return b"POST /healthz HTTP/" + version + b"\r\n" + lines + b"\r\n" + body


async def answer_to(relay: Relay, *pieces: bytes, port: int | None = None) -> Response:
    """Send a request that ends the connection; return the one answer there is."""
    async with await RawClient.to(HOST, port or relay.port) as raw:
        for piece in pieces:
            await raw.send(piece)
        answer = await raw.response()
        rest = await raw.ended()
        assert len(rest) == int(answer.headers["content-length"]), rest
        return answer


async def assert_refused_as_malformed(relay: Relay, wire: bytes) -> None:
    """Insist on 400, nothing after it, and one more in the books."""
    before = await relay.metric("websocket_refusals_total", reason="handshake")
    assert (await answer_to(relay, wire)).status == 400
    await relay.metric_is("websocket_refusals_total", before + 1, reason="handshake")


# Headers on every answer

SAFE = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
UPGRADE_WITHOUT_VERSION = upgrade_request(drop="Sec-WebSocket-Version")
ANSWERS = [
    pytest.param(get("/healthz"), 200, id="probe"),
    pytest.param(get("/readyz"), 200, id="readiness"),
    pytest.param(get("/channels/news"), 426, id="no upgrade"),
    pytest.param(get("/nowhere"), 404, id="no such page"),
    pytest.param(post(b"Content-Length: 0"), 405, id="no such method"),
    pytest.param(upgrade_request("/nowhere"), 404, id="no such path"),
    pytest.param(upgrade_request("/channels/a%20b"), 404, id="no such channel"),
    pytest.param(upgrade_request(drop="Host"), 400, id="no host"),
    pytest.param(upgrade_request(drop="Sec-WebSocket-Key"), 400, id="no key"),
    pytest.param(UPGRADE_WITHOUT_VERSION, 426, id="no version"),
    pytest.param(b"nonsense\r\n\r\n", 400, id="no request"),
    pytest.param(get("/" + "x" * 100_000), 431, id="too large"),
]


def assert_safe(answer: Response) -> None:
    assert {name: answer.headers.get(name) for name in SAFE} == SAFE
    assert "server" not in answer.headers
    assert "x-powered-by" not in answer.headers


@pytest.mark.parametrize(("wire", "status"), ANSWERS)
async def test_every_answer_tells_browsers_to_do_nothing_with_it(
    relay: Relay, wire: bytes, status: int
) -> None:
    async with await relay.tcp() as raw:
        await raw.send(wire)
        answer = await raw.response()
        assert answer.status == status
        assert_safe(answer)


@pytest.mark.parametrize(
    ("path", "status"), [("/metrics", 200), ("/healthz", 200), ("/readyz", 200), ("/", 404)]
)
async def test_so_does_every_answer_of_the_metrics_port(
    relay: Relay, path: str, status: int
) -> None:
    async with await RawClient.to(HOST, relay.metrics_port) as raw:
        await raw.send(get(path))
        answer = await raw.response()
        assert answer.status == status
        assert_safe(answer)


# Host (RFC 9112 section 3.2)

HOSTS = [
    "localhost",
    "localhost:8443",
    "relay.example.com",
    "EXAMPLE.com:",
    "relay_1.default.svc",
    "127.0.0.1:1",
    "[::1]:8443",
    "[fe80::1]",
    "xn--bcher-kva.example",
    "a%20b",
    "",
]
NO_HOSTS = [
    "a b",
    "a/b",
    "http://a",
    "a?b",
    "a#b",
    "user@a",
    "a,b:c",
    "a:80:80",
    "a:port",
    "[::1",
    "::1",
    "[g::]",
    "[::1]x",
    "a%2",
    "a\\b",
    "a<b>",
    "caf\xe9",
    "a\tb",
]


@pytest.mark.parametrize("host", HOSTS)
async def test_any_host_that_is_one_is_let_in(relay: Relay, host: str) -> None:
    async with await relay.tcp() as raw:
        await raw.send(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = await raw.response()
        assert answer.status == 200
        await raw.exactly(int(answer.headers["content-length"]))
        await raw.upgrade(Host=host)


@pytest.mark.parametrize("host", NO_HOSTS)
async def test_a_host_that_is_none_is_refused(relay: Relay, host: str) -> None:
    plain = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
    await assert_refused_as_malformed(relay, plain)
    await assert_refused_as_malformed(relay, upgrade_request(Host=host))


async def test_a_request_without_a_host_is_refused(relay: Relay) -> None:
    await assert_refused_as_malformed(relay, b"GET /healthz HTTP/1.1\r\n\r\n")
    await assert_refused_as_malformed(relay, upgrade_request(drop="Host"))


@pytest.mark.parametrize("second", ["localhost", "other.example", ""])
async def test_a_request_with_two_hosts_is_refused(relay: Relay, second: str) -> None:
    more = f"hOST: {second}\r\n\r\n".encode()
    for wire in (GET, upgrade_request(), GET.replace(b"/1.1", b"/1.0")):
        await assert_refused_as_malformed(relay, wire[:-2] + more)


# Versions


@pytest.mark.parametrize("more", [b"", b"Host: localhost\r\n", b"Connection: keep-alive\r\n"])
async def test_a_client_of_http_1_0_gets_its_answer_and_the_end(relay: Relay, more: bytes) -> None:
    answer = await answer_to(relay, b"GET /healthz HTTP/1.0\r\n" + more + b"\r\n")
    assert answer.status == 200
    assert answer.headers["connection"] == "close"


async def test_an_upgrade_from_http_1_0_is_refused(relay: Relay) -> None:
    before = await relay.metric("websocket_refusals_total", reason="handshake")
    wire = upgrade_request().replace(b"HTTP/1.1", b"HTTP/1.0")
    assert (await answer_to(relay, wire)).status == 505
    await relay.metric_is("websocket_refusals_total", before + 1, reason="handshake")


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(GET.replace(b"/1.1", b"/2.0"), id="2.0"),
        pytest.param(b"GET /healthz\r\n\r\n", id="0.9"),
        pytest.param(upgrade_request().replace(b"HTTP/1.1", b"HTTP/2.0"), id="upgrade"),
    ],
)
async def test_another_version_of_http_is_refused(relay: Relay, wire: bytes) -> None:
    assert (await answer_to(relay, wire)).status == 505


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(GET.replace(b"/1.1", b"/1.2"), id="1.2"),
        pytest.param(GET.replace(b"/1.1", b"/11"), id="no dot"),
        pytest.param(GET.replace(b"HTTP", b"http"), id="lower case"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="the preface of HTTP/2"),
    ],
)
async def test_a_version_that_there_is_not_is_malformed(relay: Relay, wire: bytes) -> None:
    await assert_refused_as_malformed(relay, wire)


# Requests that two parsers could read in two ways. Behind each stands another one, which a proxy
# might not have seen: it must never be answered.

CHUNKED = b"Transfer-Encoding: chunked"
ONE_CHUNK = b"3\r\nabc\r\n0\r\n\r\n"
OFFER = (b"Upgrade: h2c", b"Connection: upgrade")
AMBIGUOUS = {
    "two spaces before the target": GET.replace(b"GET ", b"GET  "),
    "two spaces before the version": GET.replace(b" HTTP", b"  HTTP"),
    "a tab before the target": GET.replace(b"GET ", b"GET\t"),
    "a tab before the version": GET.replace(b" HTTP", b"\tHTTP"),
    "a space before the method": b" " + GET,
    "a tab before the method": b"\t" + GET,
    "a space behind the version": GET.replace(b"/1.1", b"/1.1 "),
    "a tab behind the version": GET.replace(b"/1.1", b"/1.1\t"),
    "a form feed before the target": GET.replace(b"GET ", b"GET\x0c"),
    "a LF before the request line": b"\n" + GET,
    "a CR before the request line": b"\r" + GET,
    "a CR and a CRLF before the request line": b"\r\r\n" + GET,
    "a request line that ends with LF": GET.replace(b"/1.1\r\n", b"/1.1\n"),
    "a request line that ends with CR": GET.replace(b"/1.1\r\n", b"/1.1\r"),
    "a request line that ends with two CR": GET.replace(b"/1.1\r\n", b"/1.1\r\r\n"),
    "another protocol": GET.replace(b"HTTP/1.1", b"RTSP/1.0"),
    "another protocol's method": b"SOURCE /healthz ICE/1.0\r\nHost: localhost\r\n\r\n",
    "a method in lower case": GET.replace(b"GET", b"get"),
    "a version of two digits": GET.replace(b"/1.1", b"/1.10"),
    "chunks from HTTP/1.0": post(CHUNKED, body=ONE_CHUNK, version=b"1.0"),
    "chunked behind nothing": post(b"Transfer-Encoding: ,chunked", body=ONE_CHUNK),
    "chunked before nothing": post(b"Transfer-Encoding: chunked,", body=ONE_CHUNK),
    "chunked in one list twice": post(b"Transfer-Encoding: chunked, chunked", body=ONE_CHUNK),
    "chunked with a parameter": post(CHUNKED + b";a=b", body=ONE_CHUNK),
    "chunked in quotes": post(b'Transfer-Encoding: "chunked"', body=ONE_CHUNK),
    "no coding": post(b"Transfer-Encoding:", body=ONE_CHUNK),
    "a coding and no chunks": post(b"Transfer-Encoding: gzip", body=ONE_CHUNK),
    "a chunk extension without a name": post(CHUNKED, body=b"3;\r\nabc\r\n0\r\n\r\n"),
    "a chunk extension with CR": post(CHUNKED, body=b"3;a\rb\r\nabc\r\n0\r\n\r\n"),
    "a chunk that ends with LF": post(CHUNKED, body=b"3\r\nabc\n0\r\n\r\n"),
    "a length in the trailers": post(CHUNKED, body=b"0\r\nContent-Length: 5\r\n\r\n"),
    "a coding in the trailers": post(CHUNKED, body=b"0\r\n" + CHUNKED + b"\r\n\r\n"),
    "a folded trailer": post(CHUNKED, body=b"0\r\nA: b\r\n c\r\n\r\n"),
    "length and chunks": post(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
    "chunks and length": post(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n"),
    "two lengths": post(b"Content-Length: 5", b"Content-Length: 0", body=b"hello"),
    "the same length twice": post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"),
    "a list of lengths": post(b"Content-Length: 5, 5", body=b"hello"),
    "a negative length": post(b"Content-Length: -5", body=b"hello"),
    "a signed length": post(b"Content-Length: +5", body=b"hello"),
    "a hexadecimal length": post(b"Content-Length: 0x5", body=b"hello"),
    "no length after all": post(b"Content-Length:", body=b"hello"),
    "a length past all bounds": post(b"Content-Length: 18446744073709551621", body=b"hello"),
    "no known coding": post(b"Transfer-Encoding: xchunked", body=ONE_CHUNK),
    "chunked in capitals and more": post(b"Transfer-Encoding: CHUNKED, x", body=ONE_CHUNK),
    "chunked before another coding": post(CHUNKED + b", identity", body=ONE_CHUNK),
    "chunked twice": post(CHUNKED, CHUNKED, body=ONE_CHUNK),
    "chunked and identity": post(CHUNKED, b"Transfer-Encoding: identity", body=ONE_CHUNK),
    "a coding on a GET": GET[:-2] + b"Transfer-Encoding: identity\r\n\r\n",
    "a chunk of no size": post(CHUNKED, body=b"\r\nabc\r\n0\r\n\r\n"),
    "a chunk of no number": post(CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n"),
    "a chunk of negative size": post(CHUNKED, body=b"-3\r\nabc\r\n0\r\n\r\n"),
    "a chunk past all bounds": post(CHUNKED, body=b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
    "a chunk with a prefix": post(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
    "a chunk with a space": post(CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"),
    "a chunk that is longer than it says": post(CHUNKED, body=b"3\r\nabcd\r\n0\r\n\r\n"),
    "chunks that end lines with LF": post(CHUNKED, body=b"3\nabc\n0\n\n"),
    "a chunk extension with LF": post(CHUNKED, body=b"3;a\nabc\r\n0\r\n\r\n"),
    "trailers with LF": post(CHUNKED, body=b"0\r\na: b\n\r\n"),
    "a folded field": GET[:-2] + b"X: a\r\n b\r\n\r\n",
    "a folded length": post(b"Content-Length:\r\n 5", body=b"hello"),
    "a space before the colon": post(b"Content-Length : 5", body=b"hello"),
    "a tab before the colon": post(b"Transfer-Encoding\t: chunked", body=ONE_CHUNK),
    "a space before the first field": GET.replace(b"Host", b" Host"),
    "a field without a colon": GET[:-2] + b"Xab\r\n\r\n",
    "a field without a name": GET[:-2] + b": b\r\n\r\n",
    "a name that is none": GET[:-2] + b"X(Y): b\r\n\r\n",
    "a name beyond ASCII": GET[:-2] + b"X\xff: b\r\n\r\n",
    "lines that end with LF": GET.replace(b"\r\n", b"\n"),
    "a line that ends with LF": GET[:-2] + b"X: a\nY: b\r\n\r\n",
    "lines that end with CR": GET.replace(b"\r\n", b"\r"),
    "a CR within a value": GET[:-2] + b"X: a\rContent-Length: 5\r\n\r\n",
    "a NUL within a value": GET[:-2] + b"X: a\x00b\r\n\r\n",
    "a NUL within a name": GET[:-2] + b"X\x00: b\r\n\r\n",
    "a NUL within the path": GET.replace(b"/healthz", b"/health\x00z"),
    "a control character within a value": GET[:-2] + b"X: a\x01b\r\n\r\n",
    "a DEL within a value": GET[:-2] + b"X: a\x7fb\r\n\r\n",
    "a body where an upgrade is offered": post(*OFFER, b"Content-Length: 5", body=b"hello"),
    "chunks where an upgrade is offered": post(*OFFER, CHUNKED, body=ONE_CHUNK),
    "a body on an upgrade": upgrade_request(**{"Content-Length": "5"}) + b"hello",
    "chunks on an upgrade": upgrade_request(**{"Transfer-Encoding": "chunked"}) + ONE_CHUNK,
    "an upgrade in two ways": post(*OFFER, CHUNKED, b"Content-Length: 5", body=ONE_CHUNK),
}


@pytest.mark.parametrize("wire", [pytest.param(wire, id=name) for name, wire in AMBIGUOUS.items()])
async def test_a_request_that_could_be_read_in_two_ways_is_refused(
    relay: Relay, wire: bytes
) -> None:
    await assert_refused_as_malformed(relay, wire + SMUGGLED)


@pytest.mark.parametrize("wire", [pytest.param(wire, id=name) for name, wire in AMBIGUOUS.items()])
async def test_so_it_is_when_it_comes_in_pieces(relay: Relay, wire: bytes) -> None:
    """The answer may be out before the body is seen to be broken; a second there never is."""
    async with await relay.tcp() as raw:
        with suppress(ConnectionError):
            await raw.send_one_byte_at_a_time(wire + SMUGGLED)
        received = await raw.ended()
    assert received.count(b"HTTP/1.1 ") <= 1, received
    assert b"HTTP/1.1 404" not in received


async def test_a_request_behind_an_offer_that_is_not_taken_up_is_answered(relay: Relay) -> None:
    """RFC 9110 section 7.8: a server may ignore an Upgrade, and HTTP goes on."""
    offering = GET[:-2] + b"".join(line + b"\r\n" for line in OFFER) + b"\r\n"
    for port in (relay.port, relay.metrics_port):
        async with await RawClient.to(HOST, port) as raw:
            await raw.send(offering * 3 + SMUGGLED)
            for status in (200, 200, 200, 404):
                answer = await raw.response()
                assert answer.status == status
                await raw.exactly(int(answer.headers["content-length"]))


async def test_an_upgrade_on_the_metrics_port_is_a_plain_request(relay: Relay) -> None:
    async with await RawClient.to(HOST, relay.metrics_port) as raw:
        await raw.send(upgrade_request("/healthz") + SMUGGLED)
        for status in (200, 404):
            answer = await raw.response()
            assert answer.status == status
            await raw.exactly(int(answer.headers["content-length"]))


async def test_what_is_lenient_is_harmless(relay: Relay) -> None:
    """Where llhttp lets something in, it ends where it says, and the next request is the next."""
    lenient = (
        post(CHUNKED, body=b"3;ext=1\r\nabc\r\n0\r\nTrailer: x\r\n\r\n"),
        post(CHUNKED, body=b"000003\r\nabc\r\n00\r\n\r\n"),
        post(b"Transfer-Encoding: CHUNKED", body=b"4\r\n\r\n\r\n\r\n0\r\n\r\n"),
        post(b"Content-Length: 005", body=b"hello"),
        post(b"Expect: 100-continue", b"Content-Length: 5", body=b"hello"),
        post(b"Expect: nonsense", b"Content-Length: 5", body=b"hello"),
        b"\r\n\r\n" + post(b"Content-Length: 0"),
        post(b"X: \xff\xfe", b"Content-Length: 0"),
    )
    async with await relay.tcp() as raw:
        for wire in lenient:
            for sent, status in ((wire, 405), (SMUGGLED, 404)):
                await raw.send(sent)
                answer = await raw.response()
                assert answer.status == status
                await raw.exactly(int(answer.headers["content-length"]))


@pytest.mark.parametrize(
    "fields",
    [
        (b"Transfer-Encoding: gzip, chunked",),
        (b"Transfer-Encoding: gzip", CHUNKED),
        (b"Transfer-Encoding: identity,,chunked",),
    ],
    ids=str,
)
async def test_a_transfer_coding_that_is_not_known_is_not_implemented(
    relay: Relay, fields: tuple[bytes, ...]
) -> None:
    """RFC 9112 section 6.1. The chunks could be told apart, what is in them could not."""
    before = await relay.metric("websocket_refusals_total", reason="handshake")
    assert (await answer_to(relay, post(*fields, body=ONE_CHUNK) + SMUGGLED)).status == 501
    await relay.metric_is("websocket_refusals_total", before + 1, reason="handshake")


INNER = b"\r\n\r\nGET  /healthz HTTP/1.1\r\n\r\n0\r\n\r\n"
REQUESTS = (
    GET,
    post(b"Content-Length: 5", body=b"hello"),
    b"\r\n" + post(b"Content-Length: %d" % len(INNER), body=INNER),
    post(CHUNKED, body=b"%x;a=b\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (len(INNER), INNER)),
    post(CHUNKED, body=b"1\r\nx\r\n2\r\n\r\n\r\n000\r\n\r\n"),
    GET[:-2] + b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\n",
)


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 5, 7, 64, 100_000])
async def test_requests_behind_one_another_are_told_apart_wherever_they_are_cut(
    relay: Relay, read_bytes: int
) -> None:
    wire = b"".join(REQUESTS) * 2
    async with await relay.tcp() as raw:
        for start in range(0, len(wire), read_bytes):
            await raw.send(wire[start : start + read_bytes])
            await asyncio.sleep(0)
        for status in (200, 405, 405, 405, 405, 200) * 2:
            answer = await raw.response()
            assert answer.status == status
            await raw.exactly(int(answer.headers["content-length"]))
        await raw.send(GET.replace(b"GET ", b"GET  "))
        assert (await raw.response()).status == 400


@pytest.mark.parametrize("first", REQUESTS, ids=range(len(REQUESTS)))
async def test_a_malformed_request_line_is_seen_behind_any_other_request(
    relay: Relay, first: bytes
) -> None:
    async with await relay.tcp() as raw:
        await raw.send(first + GET.replace(b"GET ", b"GET  ") + SMUGGLED)
        received = await raw.ended()
    assert b"HTTP/1.1 400" in received
    assert b"HTTP/1.1 404" not in received


# Bodies that are not finished, answers that are not read


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(post(b"Content-Length: 50", body=b"hello"), id="length"),
        pytest.param(post(CHUNKED, body=b"5\r\nhello\r\n"), id="chunks"),
        pytest.param(post(CHUNKED, body=b"5\r\nhel"), id="within a chunk"),
        pytest.param(post(CHUNKED, body=b"0\r\nX: a"), id="within trailers"),
        pytest.param(post(b"Expect: 100-continue", b"Content-Length: 5"), id="expecting"),
    ],
)
async def test_a_body_that_never_ends_ends_the_connection_and_has_one_answer(
    hasty_relay: Relay, wire: bytes
) -> None:
    async with await hasty_relay.tcp() as raw:
        await raw.send(wire)
        received = await raw.ended()
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 405 ")


async def test_a_body_that_comes_slowly_is_cut_off(hasty_relay: Relay) -> None:
    before = await hasty_relay.metric("websocket_refusals_total", reason="handshake_timeout")

    async def dribble(raw: RawClient) -> None:
        with suppress(ConnectionError):
            while True:
                await raw.send(b"x")
                await asyncio.sleep(0.1)

    async with await hasty_relay.tcp() as raw:
        await raw.send(post(b"Content-Length: 1000000"))
        dribbling = asyncio.create_task(dribble(raw))
        assert (await raw.ended()).count(b"HTTP/1.1 ") == 1
        await dribbling
    await hasty_relay.metric_is("websocket_refusals_total", before + 1, reason="handshake_timeout")


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param(b"3;" + b"a" * 200_000, id="the extension of a chunk"),
        pytest.param(b"0" * 200_000, id="the size of a chunk"),
        pytest.param(b"0\r\nX: " + b"a" * 200_000, id="a trailer"),
    ],
)
async def test_what_surrounds_chunks_is_bounded(relay: Relay, endless: bytes) -> None:
    before = await relay.metric("websocket_refusals_total", reason="handshake")
    async with await relay.tcp() as raw:
        with suppress(ConnectionError):
            await raw.send(post(CHUNKED, body=endless))
        assert (await raw.ended()).count(b"HTTP/1.1 ") <= 1
    await relay.metric_is("websocket_refusals_total", before + 1, reason="handshake")


async def test_a_body_that_turns_out_broken_after_its_answer_has_no_second_one(
    relay: Relay,
) -> None:
    """A proxy would take it for the answer to the next request that it sends here."""
    async with await relay.tcp() as raw:
        await raw.send(post(CHUNKED, body=b"3\r\nabc\r\n"))
        answer = await raw.response()
        assert answer.status == 405
        await raw.exactly(int(answer.headers["content-length"]))
        await raw.send(b"zz\r\n")
        assert await raw.ended() == b""


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        pytest.param(GET, b"200", id="plain"),
        pytest.param(upgrade_request("/nowhere"), b"404", id="refused upgrade"),
        pytest.param(upgrade_request(), b"101", id="upgrade"),
        pytest.param(GET[:-2], b"", id="unfinished"),
    ],
)
async def test_a_client_that_sends_no_more_still_gets_its_answer(
    relay: Relay, wire: bytes, status: bytes
) -> None:
    async with await relay.tcp() as raw:
        await raw.send(wire)
        raw.finish()
        assert (await raw.ended())[9:12] == status
    await relay.metric_is("websocket_connected_clients", 0)


async def test_requests_of_all_kinds_add_no_series_to_the_metrics(relay: Relay) -> None:
    methods = ("GET", "POST", "PROPFIND", "M-SEARCH")
    targets = ("/nowhere-{}", "/channels/name-{}", "/channels/%20{}", "/?x={}")

    async def ask(first: int, count: int) -> None:
        async with await relay.tcp() as raw:
            for number in range(first, first + count):
                target = targets[number // 4 % 4].format(number)
                fields = f"Host: host-{number}\r\nX-{number}: x\r\nContent-Length: 0\r\n"
                await raw.send(f"{methods[number % 4]} {target} HTTP/1.1\r\n{fields}\r\n".encode())
                answer = await raw.response()
                await raw.exactly(int(answer.headers["content-length"]))

    await ask(0, 16)
    series = {(sample.name, *sample.labels.items()) for sample in (await relay.metrics()).samples}
    await ask(16, 800)
    after = {(sample.name, *sample.labels.items()) for sample in (await relay.metrics()).samples}
    assert after == series


async def test_pipelined_requests_are_answered_in_order(relay: Relay) -> None:
    async with await relay.tcp() as raw:
        await raw.send((GET + SMUGGLED) * 8)
        for status in (200, 404) * 8:
            answer = await raw.response()
            assert answer.status == status
            await raw.exactly(int(answer.headers["content-length"]))


async def test_a_client_that_never_reads_its_answers_is_cut_off(hasty_relay: Relay) -> None:
    """Each answer is a page of metrics; the next is not made before this one has left."""
    started_rss = hasty_relay.rss_bytes()
    async with await RawClient.to(HOST, hasty_relay.metrics_port, receive_buffer_bytes=4096) as raw:
        with suppress(ConnectionError):
            while True:
                await raw.send(get("/metrics") * 16)
        await raw.ended()
    assert hasty_relay.rss_bytes() < started_rss + 16 * 1_048_576


# Paths

NO_CHANNELS = [
    "/channels/..",
    "/channels/.",
    "/channels/%2e%2e",
    "/channels/%2E",
    "/channels/a/../b",
    "/channels/../healthz",
    "/channels/..%2fhealthz",
    "/channels//a",
    "//channels/a",
    "/channels/a/",
    "/channels/a//",
    "/channels/a%2fb",
    "/channels/%2f",
    "/channels/a%5cb",
    "/channels/a\\b",
    "/channels/%00",
    "/channels/a%00",
    "/channels/a%0d%0ab",
    "/channels/a%0a",
    "/channels/%zz",
    "/channels/%",
    "/channels/a%",
    "/channels/a%2",
    "/channels/a%u0041",
    "/channels/%2561",
    "/channels/%252e%252e",
    "/channels/a%20",
    "/channels/a+b",
    "/channels/a;b",
    "/channels/a|b",
    "/channels/{channel}",
    "/channels/%ff",
    "/channels/%c0%ae",
    "/channels/%C3%A9",
    "/channels/%EF%BC%8E",
    "/channels/" + "a" * 129,
    "/channels/" + "%61" * 129,
    "/channels/" + "a" * 60_000,
    "/CHANNELS/a",
    "/channels",
    "/channels/",
    "/./",
    "/../",
    "/..",
    "/%2e%2e/channels/a",
    "//",
    "//x/channels/a",
    "http://localhost//channels/a",
    "http://localhost/channels/..",
    "https://localhost/nowhere",
]
NO_TARGETS = [
    "*",
    "a",
    "?a",
    "channels/a",
    "%2fchannels/a",
    "/channels/a#b",
    "/#",
    "http:///channels/a",
    "http://localhost:99999/channels/a",
    "http://[::1/channels/a",
    "localhost:80",
    "/channels/a b",
    "/channels/a\x7f",
    "/channels/caf\xe9",
    "/channels/a\tb",
]


@pytest.mark.parametrize("path", NO_CHANNELS)
async def test_a_path_that_names_no_channel_is_not_found(relay: Relay, path: str) -> None:
    before = await relay.metrics()
    assert (await answer_to(relay, upgrade_request(path))).status == 404
    async with await relay.tcp() as raw:
        await raw.send(get(path))
        assert (await raw.response()).status == 404
    after = await relay.metrics()
    for name in ("websocket_connections_total", "websocket_channels"):
        assert after.value(name) == before.value(name)
    refused = [page.value("websocket_refusals_total", reason="path") for page in (before, after)]
    assert refused[1] == refused[0] + 1


@pytest.mark.parametrize("target", NO_TARGETS)
async def test_a_target_that_is_no_path_is_malformed(relay: Relay, target: str) -> None:
    await assert_refused_as_malformed(relay, upgrade_request(target))
    await assert_refused_as_malformed(relay, get(target))


@pytest.mark.parametrize("target", ["/", "/healthz", "localhost:443", "http://localhost/"])
async def test_the_relay_is_no_proxy(relay: Relay, target: str) -> None:
    wire = f"CONNECT {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    await assert_refused_as_malformed(relay, wire + SMUGGLED)


async def test_a_channel_has_one_name_however_it_is_written(relay: Relay, channel: str) -> None:
    escaped = "".join(f"%{ord(letter):02x}" for letter in channel)
    async with relay.client(channel) as usual:
        for path in (
            f"/channels/{escaped}",
            f"/channels/{channel}?x=%zz&y=%00",
            f"http://other.example:1/channels/{channel}",
            f"/%63hannels/{channel}",
        ):
            async with await relay.tcp() as raw:
                await raw.upgrade(path)
                await raw.send(frame(TEXT, path.encode()))
                async with asyncio.timeout(20):
                    assert await usual.recv() == path
        assert await relay.metric("websocket_channels") == 1


async def test_a_request_target_past_all_bounds_is_refused(relay: Relay) -> None:
    """Also when the whole of it comes at once."""
    for path in ("/" + "a" * 66_000, f"{path_of('a')}?access_token=" + "a" * 200_000):
        for wire in (get(path), upgrade_request(path)):
            async with await relay.tcp() as raw:
                await raw.send(wire)
                with suppress(ConnectionError, EOFError):  # a reset may come before the answer
                    assert (await raw.response()).status == 431
                await raw.ended()
