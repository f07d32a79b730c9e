"""HTTP/1.1: response headers, and requests that are malformed, ambiguous, slow or too large."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress

import pytest

from tests.support.http_requests import get_request
from tests.support.raw_client import TEXT, RawClient, Response, frame, upgrade_request
from tests.support.relay_process import HOST, RelayProcess, StartRelay, path_of, receive

PROBE = get_request("/healthz")
SMUGGLED = get_request("/nowhere")
"""A request after a malformed one. A proxy might not have seen it, so it must not be answered."""


def post_request(*fields: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    lines = b"".join(field + b"\r\n" for field in (b"Host: localhost", *fields))
    return b"POST /healthz HTTP/" + version + b"\r\n" + lines + b"\r\n" + body


async def read_status(raw: RawClient) -> int:
    """Read one whole response; return its status."""
    response = await raw.read_response()
    await raw.read_exactly(int(response.headers["content-length"]))
    return response.status


async def only_response(relay: RelayProcess, wire: bytes) -> Response:
    """Send bytes after which the relay closes the connection; return the only response."""
    async with await relay.connect_tcp() as raw:
        await raw.send(wire)
        response = await raw.read_response()
        rest = await raw.read_to_end()
        assert len(rest) == int(response.headers["content-length"]), rest
        return response


async def assert_rejected(relay: RelayProcess, wires: Sequence[bytes], status: int = 400) -> None:
    """Assert that each request has this response and no second one, and is counted once."""
    before = await relay.metric("websocket_refusals_total", reason="invalid_request")
    statuses = {wire: (await only_response(relay, wire)).status for wire in wires}
    assert statuses == dict.fromkeys(wires, status)
    await relay.await_metric(
        "websocket_refusals_total", before + len(statuses), reason="invalid_request"
    )


# Headers of every response

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
STATUS_OF_REQUESTS = {
    get_request("/healthz"): 200,
    get_request("/readyz"): 200,
    get_request("/channels/news"): 426,
    get_request("/nowhere"): 404,
    post_request(b"Content-Length: 0"): 405,
    upgrade_request("/nowhere"): 404,
    upgrade_request("/channels/a%20b"): 404,
    upgrade_request(drop="Host"): 400,
    upgrade_request(drop="Sec-WebSocket-Key"): 400,
    upgrade_request(drop="Sec-WebSocket-Version"): 426,
    b"nonsense\r\n\r\n": 400,
    get_request("/" + "x" * 100_000): 431,
}
STATUS_OF_METRICS_PORT = {
    get_request("/metrics"): 200,
    get_request("/healthz"): 200,
    get_request("/readyz"): 200,
    get_request("/"): 404,
}


async def test_every_response_has_security_headers_and_names_no_server(relay: RelayProcess) -> None:
    for port, expected in (
        (relay.port, STATUS_OF_REQUESTS),
        (relay.metrics_port, STATUS_OF_METRICS_PORT),
    ):
        for wire, status in expected.items():
            async with await RawClient.connect(HOST, port) as raw:
                await raw.send(wire)
                response = await raw.read_response()
            assert response.status == status, wire[:80]
            headers = {name: response.headers.get(name) for name in SECURITY_HEADERS}
            assert headers == SECURITY_HEADERS, wire[:80]
            assert not {"server", "x-powered-by"} & response.headers.keys()


# Host (RFC 9112 section 3.2)

VALID_HOSTS = [
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
INVALID_HOSTS = [
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


async def test_any_valid_host_is_accepted(relay: RelayProcess) -> None:
    for host in VALID_HOSTS:
        async with await relay.connect_tcp() as raw:
            await raw.send(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert await read_status(raw) == 200, host
            await raw.upgrade(Host=host)


async def test_an_invalid_host_is_rejected(relay: RelayProcess) -> None:
    head = "GET /healthz HTTP/1.1\r\nHost: {}\r\n\r\n"
    plain = [head.format(host).encode("latin-1") for host in INVALID_HOSTS]
    await assert_rejected(relay, plain)
    await assert_rejected(relay, [upgrade_request(Host=host) for host in INVALID_HOSTS])


async def test_a_request_without_a_host_or_with_two_is_rejected(relay: RelayProcess) -> None:
    await assert_rejected(relay, [b"GET /healthz HTTP/1.1\r\n\r\n", upgrade_request(drop="Host")])
    for second in ("localhost", "other.example", ""):
        field = f"hOST: {second}\r\n\r\n".encode()
        requests = (PROBE, upgrade_request(), PROBE.replace(b"/1.1", b"/1.0"))
        await assert_rejected(relay, [wire[:-2] + field for wire in requests])


# Versions


async def test_an_http_1_0_request_is_answered_and_its_connection_closed(
    relay: RelayProcess,
) -> None:
    for fields in (b"", b"Host: localhost\r\n", b"Connection: keep-alive\r\n"):
        wire = b"GET /healthz HTTP/1.0\r\n" + fields + b"\r\n"
        response = await only_response(relay, wire)
        assert (response.status, response.headers["connection"]) == (200, "close"), fields


async def test_a_method_that_no_server_must_know_is_not_implemented(relay: RelayProcess) -> None:
    """RFC 9110 section 9.1. Each method that is answered has series in the metrics."""
    wires = [PROBE.replace(b"GET", method) for method in (b"PROPFIND", b"M-SEARCH", b"GETX")]
    await assert_rejected(relay, wires, 501)


async def test_other_versions_of_http_are_rejected_as_not_supported(relay: RelayProcess) -> None:
    upgrade = upgrade_request()
    old_upgrade = upgrade.replace(b"HTTP/1.1", b"HTTP/1.0")
    assert (await only_response(relay, old_upgrade)).status == 505
    wires = [
        upgrade.replace(b"HTTP/1.1", b"HTTP/2.0"),
        PROBE.replace(b"/1.1", b"/2.0"),
        b"GET /healthz\r\n\r\n",  # HTTP/0.9
    ]
    await assert_rejected(relay, wires, 505)


async def test_a_version_that_does_not_exist_is_malformed(relay: RelayProcess) -> None:
    wires = [
        PROBE.replace(b"/1.1", b"/1.2"),
        PROBE.replace(b"/1.1", b"/11"),
        PROBE.replace(b"HTTP", b"http"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",  # the preface of HTTP/2
    ]
    await assert_rejected(relay, wires)


# Request smuggling: requests that two parsers may interpret in two ways. Each is sent with a second
# request after it, which must never be answered.

CHUNKED = b"Transfer-Encoding: chunked"
ONE_CHUNK = b"3\r\nabc\r\n0\r\n\r\n"
UPGRADE_OFFER = (b"Upgrade: h2c", b"Connection: upgrade")
AMBIGUOUS_REQUESTS: Mapping[str, Mapping[str, bytes]] = {
    "request line": {
        "two spaces before the target": PROBE.replace(b"GET ", b"GET  "),
        "two spaces before the version": PROBE.replace(b" HTTP", b"  HTTP"),
        "a tab before the target": PROBE.replace(b"GET ", b"GET\t"),
        "a tab before the version": PROBE.replace(b" HTTP", b"\tHTTP"),
        "a space before the method": b" " + PROBE,
        "a tab before the method": b"\t" + PROBE,
        "a space after the version": PROBE.replace(b"/1.1", b"/1.1 "),
        "a tab after the version": PROBE.replace(b"/1.1", b"/1.1\t"),
        "a form feed before the target": PROBE.replace(b"GET ", b"GET\x0c"),
        "a LF before the request line": b"\n" + PROBE,
        "a CR before the request line": b"\r" + PROBE,
        "a CR and a CRLF before the request line": b"\r\r\n" + PROBE,
        "a request line that ends with LF": PROBE.replace(b"/1.1\r\n", b"/1.1\n"),
        "a request line that ends with CR": PROBE.replace(b"/1.1\r\n", b"/1.1\r"),
        "a request line that ends with two CR": PROBE.replace(b"/1.1\r\n", b"/1.1\r\r\n"),
        "another protocol": PROBE.replace(b"HTTP/1.1", b"RTSP/1.0"),
        "another protocol's method": b"SOURCE /healthz ICE/1.0\r\nHost: localhost\r\n\r\n",
        "a method in lower case": PROBE.replace(b"GET", b"get"),
        "a version of two digits": PROBE.replace(b"/1.1", b"/1.10"),
        "a NUL within the path": PROBE.replace(b"/healthz", b"/health\x00z"),
    },
    "transfer coding": {
        "chunks from HTTP/1.0": post_request(CHUNKED, body=ONE_CHUNK, version=b"1.0"),
        "chunked after an empty member": post_request(
            b"Transfer-Encoding: ,chunked", body=ONE_CHUNK
        ),
        "chunked before an empty member": post_request(
            b"Transfer-Encoding: chunked,", body=ONE_CHUNK
        ),
        "chunked twice in one list": post_request(
            b"Transfer-Encoding: chunked, chunked", body=ONE_CHUNK
        ),
        "chunked with a parameter": post_request(CHUNKED + b";a=b", body=ONE_CHUNK),
        "chunked in quotes": post_request(b'Transfer-Encoding: "chunked"', body=ONE_CHUNK),
        "an empty list of codings": post_request(b"Transfer-Encoding:", body=ONE_CHUNK),
        "a coding without chunks": post_request(b"Transfer-Encoding: gzip", body=ONE_CHUNK),
        "length and chunks": post_request(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
        "chunks and length": post_request(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n"),
        "an unknown coding": post_request(b"Transfer-Encoding: xchunked", body=ONE_CHUNK),
        "chunked in capitals before another coding": post_request(
            b"Transfer-Encoding: CHUNKED, x", body=ONE_CHUNK
        ),
        "chunked before another coding": post_request(CHUNKED + b", identity", body=ONE_CHUNK),
        "chunked twice": post_request(CHUNKED, CHUNKED, body=ONE_CHUNK),
        "chunked and identity": post_request(
            CHUNKED, b"Transfer-Encoding: identity", body=ONE_CHUNK
        ),
        "a coding on a GET": PROBE[:-2] + b"Transfer-Encoding: identity\r\n\r\n",
    },
    "content length": {
        "two lengths": post_request(b"Content-Length: 5", b"Content-Length: 0", body=b"hello"),
        "the same length twice": post_request(
            b"Content-Length: 5", b"Content-Length: 5", body=b"hello"
        ),
        "a list of lengths": post_request(b"Content-Length: 5, 5", body=b"hello"),
        "a negative length": post_request(b"Content-Length: -5", body=b"hello"),
        "a signed length": post_request(b"Content-Length: +5", body=b"hello"),
        "a hexadecimal length": post_request(b"Content-Length: 0x5", body=b"hello"),
        "an empty length": post_request(b"Content-Length:", body=b"hello"),
        "a length above 64 bits": post_request(
            b"Content-Length: 18446744073709551621", body=b"hello"
        ),
    },
    "chunks": {
        "a chunk extension without a name": post_request(CHUNKED, body=b"3;\r\nabc\r\n0\r\n\r\n"),
        "a chunk extension with CR": post_request(CHUNKED, body=b"3;a\rb\r\nabc\r\n0\r\n\r\n"),
        "a chunk that ends with LF": post_request(CHUNKED, body=b"3\r\nabc\n0\r\n\r\n"),
        "a length in the trailers": post_request(CHUNKED, body=b"0\r\nContent-Length: 5\r\n\r\n"),
        "a coding in the trailers": post_request(CHUNKED, body=b"0\r\n" + CHUNKED + b"\r\n\r\n"),
        "a folded trailer": post_request(CHUNKED, body=b"0\r\nA: b\r\n c\r\n\r\n"),
        "a chunk with an empty size": post_request(CHUNKED, body=b"\r\nabc\r\n0\r\n\r\n"),
        "a chunk whose size is no number": post_request(CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n"),
        "a chunk of negative size": post_request(CHUNKED, body=b"-3\r\nabc\r\n0\r\n\r\n"),
        "a chunk size above 64 bits": post_request(
            CHUNKED, body=b"10000000000000003\r\nabc\r\n0\r\n\r\n"
        ),
        "a chunk size with a prefix": post_request(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
        "a space after the chunk size": post_request(CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"),
        "a chunk longer than its size": post_request(CHUNKED, body=b"3\r\nabcd\r\n0\r\n\r\n"),
        "chunks that end lines with LF": post_request(CHUNKED, body=b"3\nabc\n0\n\n"),
        "a chunk extension with LF": post_request(CHUNKED, body=b"3;a\nabc\r\n0\r\n\r\n"),
        "trailers with LF": post_request(CHUNKED, body=b"0\r\na: b\n\r\n"),
    },
    "fields": {
        "a folded field": PROBE[:-2] + b"X: a\r\n b\r\n\r\n",
        "a folded length": post_request(b"Content-Length:\r\n 5", body=b"hello"),
        "a space before the colon": post_request(b"Content-Length : 5", body=b"hello"),
        "a tab before the colon": post_request(b"Transfer-Encoding\t: chunked", body=ONE_CHUNK),
        "a space before the first field": PROBE.replace(b"Host", b" Host"),
        "a field without a colon": PROBE[:-2] + b"Xab\r\n\r\n",
        "a field without a name": PROBE[:-2] + b": b\r\n\r\n",
        "a name that is no token": PROBE[:-2] + b"X(Y): b\r\n\r\n",
        "a name beyond ASCII": PROBE[:-2] + b"X\xff: b\r\n\r\n",
        "lines that end with LF": PROBE.replace(b"\r\n", b"\n"),
        "a line that ends with LF": PROBE[:-2] + b"X: a\nY: b\r\n\r\n",
        "lines that end with CR": PROBE.replace(b"\r\n", b"\r"),
        "a CR within a value": PROBE[:-2] + b"X: a\rContent-Length: 5\r\n\r\n",
        "a NUL within a value": PROBE[:-2] + b"X: a\x00b\r\n\r\n",
        "a NUL within a name": PROBE[:-2] + b"X\x00: b\r\n\r\n",
        "a control character within a value": PROBE[:-2] + b"X: a\x01b\r\n\r\n",
        "a DEL within a value": PROBE[:-2] + b"X: a\x7fb\r\n\r\n",
    },
    "upgrade": {
        "a body on an upgrade to one of several": upgrade_request(
            Upgrade="h2c, websocket", **{"Content-Length": "5"}
        )
        + b"hello",
        "a body on an upgrade": upgrade_request(**{"Content-Length": "5"}) + b"hello",
        "chunks on an upgrade": upgrade_request(**{"Transfer-Encoding": "chunked"}) + ONE_CHUNK,
        "an upgrade offer with length and chunks": post_request(
            *UPGRADE_OFFER, CHUNKED, b"Content-Length: 5", body=ONE_CHUNK
        ),
        "an upgrade offer with two lengths": post_request(
            *UPGRADE_OFFER, b"Content-Length: 5", b"Content-Length: 0", body=b"hello"
        ),
        "an upgrade offer with a malformed chunk": post_request(
            *UPGRADE_OFFER, CHUNKED, body=b"3\r\nabcd\r\n0\r\n\r\n"
        ),
    },
}


@pytest.mark.parametrize("kind", AMBIGUOUS_REQUESTS)
async def test_an_ambiguous_request_is_rejected_and_no_request_after_it_is_answered(
    relay: RelayProcess, kind: str
) -> None:
    # A publish is answered after its body. Where the path allows no POST, the head may be answered
    # before the parser has reached the error.
    requests = {
        name: wire.replace(b"POST /healthz", b"POST /channels/news")
        for name, wire in AMBIGUOUS_REQUESTS[kind].items()
    }
    before = await relay.metric("websocket_refusals_total", reason="invalid_request")
    statuses = {
        name: (await only_response(relay, wire + SMUGGLED)).status
        for name, wire in requests.items()
    }
    assert statuses == dict.fromkeys(requests, 400)
    await relay.await_metric(
        "websocket_refusals_total", before + len(requests), reason="invalid_request"
    )


async def test_an_ambiguous_request_that_arrives_byte_by_byte_has_one_response_at_most(
    relay: RelayProcess,
) -> None:
    """The response may be sent before the rest of the body turns out to be malformed."""
    for requests in AMBIGUOUS_REQUESTS.values():
        for name, wire in requests.items():
            async with await relay.connect_tcp() as raw:
                with suppress(ConnectionError):
                    await raw.send_one_byte_at_a_time(wire + SMUGGLED)
                received = await raw.read_to_end()
            assert received.count(b"HTTP/1.1 ") <= 1, (name, received)
            assert b"HTTP/1.1 404" not in received, (name, received)


async def test_a_request_after_an_ignored_upgrade_offer_is_answered(relay: RelayProcess) -> None:
    """RFC 9110 section 7.8: a server may ignore an Upgrade, and continue with HTTP."""
    offer = PROBE[:-2] + b"".join(line + b"\r\n" for line in UPGRADE_OFFER) + b"\r\n"
    for port in (relay.port, relay.metrics_port):
        async with await RawClient.connect(HOST, port) as raw:
            await raw.send(offer * 3 + SMUGGLED)
            assert [await read_status(raw) for _ in range(4)] == [200, 200, 200, 404]
    last = offer.replace(b"Connection: upgrade", b"Connection: close, upgrade")
    assert (await only_response(relay, last)).status == 200


@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(
            (
                b"Connection: Upgrade, HTTP2-Settings",
                b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAABgAGAAA",
                b"Upgrade: h2c",
            ),
            id="the JDK",
        ),
        pytest.param((b"Upgrade: TLS/1.2", b"Connection: Upgrade"), id="Apache HttpClient"),
        pytest.param((b"Upgrade: websocket",), id="a WebSocket without a connection option"),
    ],
)
async def test_an_upgrade_offer_that_is_ignored_changes_nothing_of_a_publish(
    relay: RelayProcess, channel: str, offer: Sequence[bytes]
) -> None:
    bodies = (((b"Content-Length: 3",), b"abc"), ((CHUNKED,), ONE_CHUNK))
    async with relay.client(channel) as subscriber, await relay.connect_tcp() as raw:
        for framing, body in bodies:
            wire = post_request(b"Content-Type: text/plain", *framing, *offer, body=body)
            await raw.send(wire.replace(b"/healthz", path_of(channel).encode()) + SMUGGLED)
            assert [await read_status(raw) for _ in range(2)] == [202, 404]
            assert await receive(subscriber) == "abc"


async def test_the_metrics_port_ignores_an_upgrade(relay: RelayProcess) -> None:
    async with await RawClient.connect(HOST, relay.metrics_port) as raw:
        await raw.send(upgrade_request("/healthz") + SMUGGLED)
        assert [await read_status(raw) for _ in range(2)] == [200, 404]


async def test_deviations_that_the_parser_accepts_end_where_the_request_ends(
    relay: RelayProcess,
) -> None:
    """What llhttp accepts has an unambiguous end; the next request is parsed as the next one."""
    accepted = (
        post_request(CHUNKED, body=b"3;ext=1\r\nabc\r\n0\r\nTrailer: x\r\n\r\n"),
        post_request(CHUNKED, body=b"000003\r\nabc\r\n00\r\n\r\n"),
        post_request(b"Transfer-Encoding: CHUNKED", body=b"4\r\n\r\n\r\n\r\n0\r\n\r\n"),
        post_request(b"Content-Length: 005", body=b"hello"),
        post_request(b"Expect: 100-continue", b"Content-Length: 5", body=b"hello"),
        post_request(b"Expect: nonsense", b"Content-Length: 5", body=b"hello"),
        b"\r\n\r\n" + post_request(b"Content-Length: 0"),
        post_request(b"X: \xff\xfe", b"Content-Length: 0"),
        post_request(*UPGRADE_OFFER, b"X: \xff\t\xfe \t", b"Y:", b"Content-Length: 0"),
    )
    async with await relay.connect_tcp() as raw:
        for wire in accepted:
            for sent, status in ((wire, 405), (SMUGGLED, 404)):
                await raw.send(sent)
                assert await read_status(raw) == status, wire


async def test_an_unknown_transfer_coding_is_not_implemented(relay: RelayProcess) -> None:
    """RFC 9112 section 6.1. The chunks are delimited, but their content can't be decoded."""
    codings = [
        (b"Transfer-Encoding: gzip, chunked",),
        (b"Transfer-Encoding: gzip", CHUNKED),
        (b"Transfer-Encoding: identity,,chunked",),
    ]
    wires = [post_request(*fields, body=ONE_CHUNK) + SMUGGLED for fields in codings]
    await assert_rejected(relay, wires, 501)


INNER = b"\r\n\r\nGET  /healthz HTTP/1.1\r\n\r\n0\r\n\r\n"
REQUESTS = (
    PROBE,
    post_request(b"Content-Length: 5", body=b"hello"),
    b"\r\n" + post_request(b"Content-Length: %d" % len(INNER), body=INNER),
    post_request(CHUNKED, body=b"%x;a=b\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (len(INNER), INNER)),
    post_request(CHUNKED, body=b"1\r\nx\r\n2\r\n\r\n\r\n000\r\n\r\n"),
    PROBE[:-2] + b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    post_request(*UPGRADE_OFFER, b"Content-Length: %d" % len(INNER), body=INNER),
    post_request(
        *UPGRADE_OFFER, CHUNKED, body=b"%x\r\n%b\r\n0\r\nA: b\r\n\r\n" % (len(INNER), INNER)
    ),
)
MALFORMED_LINE = PROBE.replace(b"GET ", b"GET  ")


@pytest.mark.parametrize("read_bytes", [1, 3, 7, 64, 100_000])
async def test_pipelined_requests_are_separated_however_the_stream_is_segmented(
    relay: RelayProcess, read_bytes: int
) -> None:
    wire = b"".join(REQUESTS) * 2
    async with await relay.connect_tcp() as raw:
        for start in range(0, len(wire), read_bytes):
            await raw.send(wire[start : start + read_bytes])
            await asyncio.sleep(0)
        statuses = [await read_status(raw) for _ in range(2 * len(REQUESTS))]
        assert statuses == [200, 405, 405, 405, 405, 200, 405, 405] * 2
        await raw.send(MALFORMED_LINE)
        assert (await raw.read_response()).status == 400


async def test_a_malformed_request_line_is_detected_after_any_other_request(
    relay: RelayProcess,
) -> None:
    for first in REQUESTS:
        async with await relay.connect_tcp() as raw:
            await raw.send(first + MALFORMED_LINE + SMUGGLED)
            received = await raw.read_to_end()
        assert b"HTTP/1.1 400" in received, first
        assert b"HTTP/1.1 404" not in received, first


# Unfinished bodies, and clients that read no responses


async def test_an_unfinished_body_ends_the_connection_after_one_response(
    short_deadline_relay: RelayProcess,
) -> None:
    unfinished = {
        "content": post_request(b"Content-Length: 50", body=b"hello"),
        "chunks": post_request(CHUNKED, body=b"5\r\nhello\r\n"),
        "within a chunk": post_request(CHUNKED, body=b"5\r\nhel"),
        "within trailers": post_request(CHUNKED, body=b"0\r\nX: a"),
        "expectation": post_request(b"Expect: 100-continue", b"Content-Length: 5"),
    }

    async def statuses_until_end(wire: bytes) -> list[bytes]:
        async with await short_deadline_relay.connect_tcp() as raw:
            await raw.send(wire)
            received = await raw.read_to_end()
        assert received.startswith(b"HTTP/1.1 ")
        return [each[:3] for each in received.split(b"HTTP/1.1 ")[1:]]

    statuses = await asyncio.gather(*map(statuses_until_end, unfinished.values()))
    expected = {kind: [b"405"] for kind in unfinished}
    assert dict(zip(unfinished, statuses, strict=True)) == expected


async def test_a_large_body_that_no_route_reads_is_discarded(relay: RelayProcess) -> None:
    """The response does not wait for it, and the next request does not wait for long."""
    body = bytes(2_000_000)
    async with await relay.connect_tcp() as raw:
        for _ in range(2):
            await raw.send(post_request(b"Content-Length: %d" % len(body), body=body))
            assert await read_status(raw) == 405
        await raw.send(PROBE)
        assert await read_status(raw) == 200


async def test_an_early_response_that_ends_the_connection_arrives_whole(
    relay: RelayProcess,
) -> None:
    """A close with unread bytes would reset the connection (RFC 9112 section 9.6)."""
    body = bytes(2_000_000)
    fields = (b"Connection: close", b"Content-Length: %d" % len(body))
    async with await relay.connect_tcp() as raw:
        await raw.send(post_request(*fields))
        assert await read_status(raw) == 405
        for start in range(0, len(body), 100_000):
            await raw.send(body[start : start + 100_000])
        assert await raw.read_to_end() == b""


async def test_a_refused_expectation_closes_the_connection(relay: RelayProcess) -> None:
    """Whether the body follows is open (RFC 9110 section 10.1.1)."""
    wire = post_request(b"Expect: 100-continue", b"Content-Length: 5")
    response = await only_response(relay, wire)
    assert (response.status, response.headers["connection"]) == (405, "close")


async def test_bytes_after_the_last_request_are_ignored(relay: RelayProcess) -> None:
    wire = PROBE[:-2] + b"Connection: close\r\n\r\nno request"
    assert (await only_response(relay, wire)).status == 200


async def test_a_body_that_arrives_too_slowly_ends_the_connection(
    short_deadline_relay: RelayProcess,
) -> None:
    before = await short_deadline_relay.metric(
        "websocket_refusals_total", reason="handshake_timeout"
    )

    async def send_slowly(raw: RawClient) -> None:
        with suppress(ConnectionError):
            while True:
                await raw.send(b"x")
                await asyncio.sleep(0.1)

    async with await short_deadline_relay.connect_tcp() as raw:
        await raw.send(post_request(b"Content-Length: 1000000"))
        sending = asyncio.create_task(send_slowly(raw))
        assert (await raw.read_to_end()).count(b"HTTP/1.1 ") == 1
        await sending
    await short_deadline_relay.await_metric(
        "websocket_refusals_total", before + 1, reason="handshake_timeout"
    )


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param(b"3;" + b"a" * 200_000, id="chunk extension"),
        pytest.param(b"0" * 200_000, id="chunk size"),
        pytest.param(b"0\r\nX: " + b"a" * 200_000, id="trailer"),
    ],
)
async def test_chunk_extensions_chunk_sizes_and_trailers_are_bounded(
    relay: RelayProcess, endless: bytes
) -> None:
    before = await relay.metric("websocket_refusals_total", reason="head_too_large")
    async with await relay.connect_tcp() as raw:
        with suppress(ConnectionError):
            await raw.send(post_request(CHUNKED, body=endless))
        assert (await raw.read_to_end()).count(b"HTTP/1.1 ") <= 1
    await relay.await_metric("websocket_refusals_total", before + 1, reason="head_too_large")


async def test_a_body_that_turns_out_malformed_after_its_response_has_no_second_one(
    relay: RelayProcess,
) -> None:
    """A proxy would take the second response for that of the next request on the connection."""
    async with await relay.connect_tcp() as raw:
        await raw.send(post_request(CHUNKED, body=b"3\r\nabc\r\n"))
        assert await read_status(raw) == 405
        await raw.send(b"zz\r\n")
        assert await raw.read_to_end() == b""


async def test_a_client_that_has_closed_its_sending_side_receives_its_response(
    relay: RelayProcess,
) -> None:
    statuses = {PROBE: b"200", upgrade_request("/nowhere"): b"404", upgrade_request(): b"101"}
    unfinished = {PROBE[:-2]: b""}
    for wire, status in (statuses | unfinished).items():
        async with await relay.connect_tcp() as raw:
            await raw.send(wire)
            raw.end_stream()
            assert (await raw.read_to_end())[9:12] == status
    await relay.await_metric("websocket_connected_clients", 0)


async def test_requests_of_all_kinds_add_no_series_to_the_metrics(relay: RelayProcess) -> None:
    methods = ("GET", "POST", "OPTIONS", "TRACE")
    targets = ("/nowhere-{}", "/channels/name-{}", "/channels/%20{}", "/?x={}")

    async def send_requests(first: int, count: int) -> None:
        async with await relay.connect_tcp() as raw:
            for number in range(first, first + count):
                target = targets[number // 4 % 4].format(number)
                fields = f"Host: host-{number}\r\nX-{number}: x\r\nContent-Length: 0\r\n"
                await raw.send(f"{methods[number % 4]} {target} HTTP/1.1\r\n{fields}\r\n".encode())
                await read_status(raw)

    async def series() -> set[tuple[object, ...]]:
        samples = (await relay.metrics()).samples
        return {(sample.name, *sample.labels.items()) for sample in samples}

    await send_requests(0, 16)
    before = await series()
    await send_requests(16, 160)
    assert await series() == before


async def test_pipelined_requests_are_answered_in_order(relay: RelayProcess) -> None:
    async with await relay.connect_tcp() as raw:
        await raw.send((PROBE + SMUGGLED) * 8)
        assert [await read_status(raw) for _ in range(16)] == [200, 404] * 8


async def test_a_client_that_reads_no_responses_is_disconnected(
    short_deadline_relay: RelayProcess,
) -> None:
    """Each response is a page of metrics. The next is rendered after the previous one is sent."""
    rss_before = short_deadline_relay.rss_bytes()
    async with await RawClient.connect(
        HOST, short_deadline_relay.metrics_port, receive_buffer_bytes=4096
    ) as raw:
        with suppress(ConnectionError):
            while True:
                await raw.send(get_request("/metrics") * 16)
        await raw.read_to_end()
    assert short_deadline_relay.rss_bytes() < rss_before + 16 * 1_048_576


# Paths

PATHS_WITHOUT_A_CHANNEL = [
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
MALFORMED_TARGETS = [
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


async def test_a_path_without_a_valid_channel_is_not_found(relay: RelayProcess) -> None:
    before = await relay.metrics()
    for path in PATHS_WITHOUT_A_CHANNEL:
        assert (await only_response(relay, upgrade_request(path))).status == 404, path
        async with await relay.connect_tcp() as raw:
            await raw.send(get_request(path))
            assert (await raw.read_response()).status == 404, path
    after = await relay.metrics()
    for name in ("websocket_connections_total", "websocket_channels"):
        assert after.value(name) == before.value(name)
    refused = [
        page.value("websocket_refusals_total", reason="no_such_channel") for page in (before, after)
    ]
    assert refused[1] == refused[0] + len(PATHS_WITHOUT_A_CHANNEL)


async def test_the_refusal_of_a_path_names_the_right_ones(relay_with: StartRelay) -> None:
    relay = relay_with(server={"base_path": "/live"})
    right = "/live/channels/NAME, without a slash at the end, and /live/\n"
    for path in ("/live", "//live/channels/news", "/live/channels/news/", "/channels/news"):
        for wire in (
            get_request(path),
            upgrade_request(path),
            post_request(b"Content-Length: 1", body=b"x").replace(b"/healthz", path.encode()),
        ):
            async with await relay.connect_tcp() as raw:
                await raw.send(wire)
                response = await raw.read_response()
                text = await raw.read_exactly(int(response.headers["content-length"]))
            assert response.status == 404, wire
            assert text.decode() == f"no such channel: the paths are {right}", wire


async def test_a_request_target_that_is_no_path_is_malformed(relay: RelayProcess) -> None:
    await assert_rejected(relay, [upgrade_request(target) for target in MALFORMED_TARGETS])
    await assert_rejected(relay, [get_request(target) for target in MALFORMED_TARGETS])


async def test_the_relay_is_no_proxy_and_rejects_connect(relay: RelayProcess) -> None:
    head = "CONNECT {} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    targets = ("/", "/healthz", "localhost:443", "http://localhost/")
    wires = [head.format(target).encode() + SMUGGLED for target in targets]
    await assert_rejected(relay, wires)


async def test_all_spellings_of_a_path_name_the_same_channel(
    relay: RelayProcess, channel: str
) -> None:
    escaped = "".join(f"%{ord(letter):02x}" for letter in channel)
    async with relay.client(channel) as subscriber:
        for path in (
            f"/channels/{escaped}",
            f"/channels/{channel}?x=%zz&y=%00",
            f"http://other.example:1/channels/{channel}",
            f"/%63hannels/{channel}",
        ):
            async with await relay.connect_tcp() as raw:
                await raw.upgrade(path)
                await raw.send(frame(TEXT, path.encode()))
                assert await receive(subscriber) == path
        assert await relay.metric("websocket_channels") == 1


async def test_a_request_target_above_the_size_limit_is_refused(relay: RelayProcess) -> None:
    """Also if all of it arrives in one read."""
    for path in ("/" + "a" * 66_000, f"{path_of('a')}?access_token=" + "a" * 200_000):
        for wire in (get_request(path), upgrade_request(path)):
            async with await relay.connect_tcp() as raw:
                await raw.send(wire)
                with suppress(ConnectionError, EOFError):  # a reset may precede the response
                    assert (await raw.read_response()).status == 431
                await raw.read_to_end()
