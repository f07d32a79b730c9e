"""RFC 6455 section 4: the opening handshake, which requests are accepted and how."""

import base64
import hashlib
import time
from contextlib import AsyncExitStack

import pytest

from tests.support.raw_client import KEY, TEXT, RawClient, Response, frame, upgrade_request
from tests.support.relay_process import RelayProcess, path_of
from tests.support.rfc_cases import await_descriptors

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


async def response_to(raw: RawClient, request: bytes) -> Response:
    await raw.send(request)
    return await raw.read_response()


async def accepted(relay: RelayProcess, request: bytes) -> Response:
    """Assert that a request is answered with 101 and that messages are relayed after it."""
    async with await relay.connect_tcp() as raw:
        response = await response_to(raw, request)
        assert response.status == 101, (request, response)
        await raw.send(frame(TEXT, b"hello"))
        assert await raw.read_message() == "hello", request
    return response


async def refused(relay: RelayProcess, request: bytes, *statuses: int) -> Response:
    """Assert that a request is answered with one of these, and that the connection then ends."""
    async with await relay.connect_tcp() as raw:
        response = await response_to(raw, request)
        assert response.status in statuses, (request, response)
        body = await raw.read_to_end()
        assert len(body) == int(response.headers["content-length"]), request
    return response


def upgrade(channel: str, *lines: str, drop: str = "", **headers: str) -> bytes:
    """Build an upgrade request; `lines` are repeated or malformed headers."""
    return upgrade_request(path_of(channel), drop=drop, lines=lines, **headers)


# The response


async def test_the_response_has_the_required_headers_and_none_that_was_not_requested(
    relay: RelayProcess, channel: str
) -> None:
    response = await accepted(relay, upgrade(channel))
    assert response.headers["upgrade"].lower() == "websocket"
    assert response.headers["connection"].lower() == "upgrade"
    assert response.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    for name in ("protocol", "extensions", "version", "key"):
        assert f"sec-websocket-{name}" not in response.headers
    assert "content-length" not in response.headers  # RFC 9110 section 8.6
    assert "transfer-encoding" not in response.headers


async def test_the_accept_header_is_computed_from_the_key(
    relay: RelayProcess, channel: str
) -> None:
    for octets in (bytes(16), bytes(range(16)), b"\xff" * 16, b"\xfb\xef" * 8):
        key = base64.b64encode(octets).decode()
        response = await accepted(relay, upgrade(channel, **{"Sec-WebSocket-Key": key}))
        digest = hashlib.sha1((key + GUID).encode(), usedforsecurity=False).digest()
        assert response.headers["sec-websocket-accept"] == base64.b64encode(digest).decode()


# Accepted requests

VALUES = {
    "Upgrade": ["WebSocket", "WEBSOCKET", " websocket "],
    "Connection": [
        "upgrade",
        "UPGRADE",
        "keep-alive, Upgrade",
        "Upgrade, keep-alive",
        "Upgrade,keep-alive",
        "keep-alive ,\tUpgrade ,x",
        ",, Upgrade ,",
    ],
    "Host": [
        "localhost:8443",
        "[::1]",
        "[::1]:8443",
        "192.0.2.1:80",
        "xn--bcher-kva.example",
    ],
    "Sec-WebSocket-Version": [" 13 ", "13\t"],
    "Sec-WebSocket-Key": [f"  {KEY}  ", f"{KEY}\t"],
    "Content-Length": ["0"],
    "Origin": ["https://anywhere.example"],
    "Cookie": ["a=b; c=d"],
    "Sec-WebSocket-Extensions": ["unknown", 'unknown; a; b=1; c="2", another;d'],
    "X-Binary": ["\xe9\xff"],
}


@pytest.mark.parametrize("name", VALUES)
async def test_a_header_is_accepted_in_every_form_that_the_rfc_allows(
    relay: RelayProcess, channel: str, name: str
) -> None:
    for value in VALUES[name]:
        response = await accepted(relay, upgrade(channel, **{name: value}))
        assert "sec-websocket-extensions" not in response.headers


async def test_header_names_are_case_insensitive(relay: RelayProcess, channel: str) -> None:
    head, _, headers = upgrade(channel).decode().partition("\r\n")
    for change_case in (str.lower, str.upper, str.swapcase):
        lines = [line.partition(":") for line in headers.split("\r\n")]
        changed = "\r\n".join(change_case(name) + colon + value for name, colon, value in lines)
        await accepted(relay, f"{head}\r\n{changed}".encode())


async def test_a_connection_header_in_several_lines_is_accepted(
    relay: RelayProcess, channel: str
) -> None:
    for lines in (
        ["Connection: keep-alive", "Connection: Upgrade"],
        ["Connection: keep-alive, x", "Connection: y", "Connection: z, Upgrade"],
    ):
        for order in (lines, lines[::-1]):
            await accepted(relay, upgrade(channel, *order, drop="Connection"))


async def test_whitespace_around_a_header_value_is_ignored(
    relay: RelayProcess, channel: str
) -> None:
    await accepted(relay, upgrade(channel).replace(b": ", b":"))
    await accepted(relay, upgrade(channel).replace(b": ", b": \t  "))


async def test_an_absolute_request_target_names_the_same_channel(
    relay: RelayProcess, channel: str
) -> None:
    target = f"http://localhost{path_of(channel)}"
    async with relay.raw_client(channel) as other:
        await accepted(relay, upgrade_request(target))
        assert await other.read_message() == "hello"


async def test_a_request_that_arrives_byte_by_byte_is_accepted(
    relay: RelayProcess, channel: str
) -> None:
    async with await relay.connect_tcp() as raw:
        await raw.send_one_byte_at_a_time(upgrade(channel))
        assert (await raw.read_response()).status == 101
        await raw.send(frame(TEXT, b"hello"))
        assert await raw.read_message() == "hello"


async def test_an_empty_line_before_the_request_is_ignored(
    relay: RelayProcess, channel: str
) -> None:
    await accepted(relay, b"\r\n" + upgrade(channel))


# Refused requests


async def test_a_request_without_a_required_header_is_refused_and_counted(
    relay: RelayProcess, channel: str
) -> None:
    for name, reason in (("Host", "invalid_request"), ("Sec-WebSocket-Key", "invalid_handshake")):
        before = await relay.metric("websocket_refusals_total", reason=reason)
        await refused(relay, upgrade(channel, drop=name), 400)
        await relay.await_metric("websocket_refusals_total", before + 1, reason=reason)


async def test_a_repeated_header_that_must_be_unique_is_refused(
    relay: RelayProcess, channel: str
) -> None:
    for line in (
        "Host: localhost",
        "Host: other.example",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ):
        await refused(relay, upgrade(channel, line), 400)


async def test_a_key_that_is_not_16_bytes_in_base64_is_refused(
    relay: RelayProcess, channel: str
) -> None:
    for key in (
        "",
        "short",
        base64.b64encode(bytes(15)).decode(),
        base64.b64encode(bytes(17)).decode(),
        base64.b64encode(bytes(32)).decode(),
        KEY.rstrip("="),
        KEY[:-1],
        KEY + "=",
        KEY.replace("=", "A"),
        KEY[:10] + " " + KEY[10:],
        KEY[:10] + "!" + KEY[11:],
        KEY[:10] + "-" + KEY[11:],
        KEY[:10] + "\xe9" + KEY[11:],
        f"{KEY}, {KEY}",
        f'"{KEY}"',
    ):
        await refused(relay, upgrade(channel, **{"Sec-WebSocket-Key": key}), 400)


async def test_an_unsupported_version_is_refused_with_the_supported_one(
    relay: RelayProcess, channel: str
) -> None:
    versions = ["0", "7", "8", "12", "14", "255", "013", "13.0", "13, 8", "8, 13", "+13", "x", ""]
    for version in versions:
        headers = {"Sec-WebSocket-Version": version}
        response = await refused(relay, upgrade(channel, **headers), 426)
        assert response.headers["sec-websocket-version"] == "13"


async def test_a_missing_or_repeated_version_is_refused_with_the_supported_one(
    relay: RelayProcess, channel: str
) -> None:
    for request in (
        upgrade(channel, drop="Sec-WebSocket-Version"),
        upgrade(channel, "Sec-WebSocket-Version: 13"),
        upgrade(channel, "Sec-WebSocket-Version: 8"),
    ):
        response = await refused(relay, request, 400, 426)
        assert response.headers.get("sec-websocket-version", "13") == "13"


async def test_an_invalid_host_is_refused(relay: RelayProcess, channel: str) -> None:
    hosts = ["a b", "a/b", "user@localhost", "localhost:port", "[::1", "a\\b", "é", "a?b"]
    for host in hosts:
        await refused(relay, upgrade(channel, Host=host), 400)


async def test_a_method_other_than_get_is_refused(relay: RelayProcess, channel: str) -> None:
    for method in ("POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH"):
        start = f"{method} {{path}} HTTP/1.1"
        response = await refused(relay, upgrade_request(path_of(channel), start=start), 405)
        assert response.headers["allow"] == "GET"


async def test_an_http_version_other_than_1_1_is_refused(relay: RelayProcess, channel: str) -> None:
    for version in ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/9.9"):
        start = f"GET {{path}} {version}"
        await refused(relay, upgrade_request(path_of(channel), start=start), 400, 505)


async def test_a_malformed_request_line_is_refused(relay: RelayProcess, channel: str) -> None:
    for start in (
        "GET  {path} HTTP/1.1",
        "GET {path}  HTTP/1.1",
        "GET\t{path} HTTP/1.1",
        "GET {path}\tHTTP/1.1",
        " GET {path} HTTP/1.1",
        "GET {path} HTTP/1.1 ",
        "\nGET {path} HTTP/1.1",
        "\rGET {path} HTTP/1.1",
        "GET {path} RTSP/1.0",
    ):
        await refused(relay, upgrade_request(path_of(channel), start=start), 400)


async def test_an_upgrade_request_with_a_body_is_refused(relay: RelayProcess, channel: str) -> None:
    await refused(relay, upgrade(channel, **{"Content-Length": "5"}) + b"hello", 400)
    chunks = b"5\r\nhello\r\n0\r\n\r\n"
    await refused(relay, upgrade(channel, **{"Transfer-Encoding": "chunked"}) + chunks, 400)


async def test_a_malformed_header_line_is_refused(relay: RelayProcess, channel: str) -> None:
    for line in (
        "No colon",
        ": no name",
        "Space before : the colon",
        "B\xe4d: name",
        "Bad(name): x",
        "X-Nul: \x00",
        "X-Return: a\rb",
        " folded: line",
    ):
        await refused(relay, upgrade(channel, line), 400)


@pytest.mark.parametrize("path", ["/nowhere", "/channels/news"], ids=["path", "handshake"])
async def test_a_refused_connection_with_trailing_bytes_is_freed_when_its_client_disconnects(
    relay: RelayProcess, path: str
) -> None:
    drop = "Sec-WebSocket-Key" if path != "/nowhere" else ""
    before = relay.descriptors()
    async with AsyncExitStack() as stack:
        for _ in range(20):
            raw = await stack.enter_async_context(await relay.connect_tcp())
            await raw.send(upgrade_request(path, drop=drop) + frame(TEXT, b"trailing"))
            assert (await raw.read_response()).status in (400, 404)
    started_at = time.monotonic()
    await await_descriptors(relay, before)
    assert time.monotonic() - started_at < 5  # long before limits.handshake_timeout_s


# Requests for something other than a WebSocket


async def test_a_request_for_no_websocket_is_refused(relay: RelayProcess, channel: str) -> None:
    requests = [
        *(upgrade(channel, drop=name) for name in ("Upgrade", "Connection")),
        *(
            upgrade(channel, Connection=value)
            for value in (
                "keep-alive",
                "close",
                "UpgradeX",
                "x-upgrade",
                "Upgrade keep-alive",
                '"Upgrade"',
            )
        ),
        *(
            upgrade(channel, Upgrade=name)
            for name in ("h2c", "websocketx", "web socket", "TLS/1.0")
        ),
    ]
    for request in requests:
        async with await relay.connect_tcp() as raw:
            response = await response_to(raw, request)
            assert response.status in (400, 426), request
            if response.status == 426:
                assert response.headers["upgrade"].lower() == "websocket", request


# Subprotocols and extensions


async def test_the_first_offered_subprotocol_is_selected_in_every_valid_form(
    relay: RelayProcess, channel: str
) -> None:
    for lines, selected in (
        (["chat"], "chat"),
        (["chat, superchat"], "chat"),
        (["superchat,chat"], "superchat"),
        (["chat", "superchat"], "chat"),
        ([",chat ,, superchat,"], "chat"),
        (["v1.chat!#$%&'*+-^_`|~"], "v1.chat!#$%&'*+-^_`|~"),
        (["Chat, chat"], "Chat"),
    ):
        offers = [f"Sec-WebSocket-Protocol: {line}" for line in lines]
        response = await accepted(relay, upgrade(channel, *offers))
        assert response.headers["sec-websocket-protocol"] == selected


async def test_invalid_and_repeated_subprotocols_are_refused(
    relay: RelayProcess, channel: str
) -> None:
    names = ["a b", "a;b", "a/b", '"a"', "a, b c", "a, (b)", "a=b", "a, b\xe9", "a, a", "a, b, a"]
    for value in names:
        await refused(relay, upgrade(channel, **{"Sec-WebSocket-Protocol": value}), 400)


@pytest.mark.parametrize("field", ["Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol"])
async def test_more_than_64_offers_are_refused(
    relay: RelayProcess, channel: str, field: str
) -> None:
    names = [f"x{number}" for number in range(64)]
    async with await relay.connect_tcp() as raw:
        await raw.send(upgrade(channel, **{field: ", ".join(names)}))
        assert (await raw.read_response()).status == 101
    await refused(relay, upgrade(channel, **{field: ", ".join([*names, "one-more"])}), 400)
    lines = [f"{field}: {name}" for name in (*names, "one-more")]
    await refused(relay, upgrade(channel, *lines), 400)


MALFORMED_EXTENSIONS = [
    "permessage-deflate;",
    "permessage-deflate; ;",
    "; server_max_window_bits=10",
    "permessage-deflate server_max_window_bits=10",
    "permessage-deflate; server_max_window_bits=",
    "permessage-deflate; =10",
    'permessage-deflate; server_max_window_bits="10',
    'permessage-deflate; server_max_window_bits="1 0"',
    'permessage-deflate; server_max_window_bits=""',
    "permessage-deflate; server_max_window_bits=10 11",
    "permessage-deflate; server_max_window_bits=10; (x)",
    "a/b",
    "permessage-deflate, a b",
    "unknown, ;",
    "\xe9",
]


async def test_malformed_extensions_are_refused_alone_and_after_a_valid_line(
    relay: RelayProcess, channel: str
) -> None:
    for value in MALFORMED_EXTENSIONS:
        line = f"Sec-WebSocket-Extensions: {value}"
        await refused(relay, upgrade(channel, line), 400)
        valid = "Sec-WebSocket-Extensions: permessage-deflate"
        await refused(relay, upgrade(channel, valid, line), 400)
