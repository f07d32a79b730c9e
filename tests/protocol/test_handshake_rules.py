"""RFC 6455 section 4: what a request for a WebSocket must say, and what the answer says."""

import base64
import hashlib
import time
from contextlib import AsyncExitStack

import pytest

from tests.support.raw_client import KEY, TEXT, RawClient, Response, frame, upgrade_request
from tests.support.relay_process import Relay, path_of
from tests.support.rfc_cases import gets_its_descriptors_back

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


async def answer_to(raw: RawClient, request: bytes) -> Response:
    await raw.send(request)
    return await raw.response()


async def is_let_in(relay: Relay, request: bytes) -> Response:
    """Insist that a request is answered with 101 and that messages are relayed from then on."""
    async with await relay.tcp() as raw:
        response = await answer_to(raw, request)
        assert response.status == 101, response
        await raw.send(frame(TEXT, b"hello"))
        assert await raw.message() == "hello"
    return response


async def is_refused(relay: Relay, request: bytes, *statuses: int) -> Response:
    """Insist that a request is answered with one of these, and that the connection then ends."""
    async with await relay.tcp() as raw:
        response = await answer_to(raw, request)
        assert response.status in statuses, response
        body = await raw.ended()
        assert len(body) == int(response.headers["content-length"])
    return response


def request(channel: str, *lines: str, drop: str = "", **headers: str) -> bytes:
    """Build an upgrade request: lines for what comes twice or is malformed."""
    return upgrade_request(path_of(channel), drop=drop, lines=lines, **headers)


# The answer


async def test_the_answer_says_what_the_rfc_asks_for_and_nothing_that_was_not_offered(
    relay: Relay, channel: str
) -> None:
    response = await is_let_in(relay, request(channel))
    assert response.headers["upgrade"].lower() == "websocket"
    assert response.headers["connection"].lower() == "upgrade"
    assert response.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    for name in ("protocol", "extensions", "version", "key"):
        assert f"sec-websocket-{name}" not in response.headers
    assert "content-length" not in response.headers  # RFC 9110 section 8.6
    assert "transfer-encoding" not in response.headers


@pytest.mark.parametrize("octets", [bytes(16), bytes(range(16)), b"\xff" * 16, b"\xfb\xef" * 8])
async def test_the_answer_is_made_of_the_key(relay: Relay, channel: str, octets: bytes) -> None:
    key = base64.b64encode(octets).decode()
    response = await is_let_in(relay, request(channel, **{"Sec-WebSocket-Key": key}))
    digest = hashlib.sha1((key + GUID).encode(), usedforsecurity=False).digest()
    assert response.headers["sec-websocket-accept"] == base64.b64encode(digest).decode()


# What is let in


@pytest.mark.parametrize(
    "headers",
    [
        {"Upgrade": "WebSocket"},
        {"Upgrade": "WEBSOCKET"},
        {"Upgrade": " websocket "},
        {"Connection": "upgrade"},
        {"Connection": "UPGRADE"},
        {"Connection": "keep-alive, Upgrade"},
        {"Connection": "Upgrade, keep-alive"},
        {"Connection": "Upgrade,keep-alive"},
        {"Connection": "keep-alive ,\tUpgrade ,x"},
        {"Connection": ",, Upgrade ,"},
        {"Host": "localhost:8443"},
        {"Host": "[::1]"},
        {"Host": "[::1]:8443"},
        {"Host": "192.0.2.1:80"},
        {"Host": "xn--bcher-kva.example"},
        {"Sec-WebSocket-Version": " 13 "},
        {"Sec-WebSocket-Version": "13\t"},
        {"Sec-WebSocket-Key": f"  {KEY}  "},
        {"Sec-WebSocket-Key": f"{KEY}\t"},
        {"Content-Length": "0"},
        {"Origin": "https://anywhere.example"},
        {"Cookie": "a=b; c=d"},
        {"Sec-WebSocket-Extensions": "unheard-of"},
        {"Sec-WebSocket-Extensions": 'unheard-of; a; b=1; c="2", another;d'},
        {"X-Binary": "\xe9\xff"},
    ],
    ids=lambda headers: ", ".join(f"{name} {value!r}" for name, value in headers.items()),
)
async def test_a_header_may_say_what_it_says_in_every_form_that_the_rfc_lets_it(
    relay: Relay, channel: str, headers: dict[str, str]
) -> None:
    response = await is_let_in(relay, request(channel, **headers))
    assert "sec-websocket-extensions" not in response.headers


async def test_header_names_are_read_without_regard_to_case(relay: Relay, channel: str) -> None:
    head, _, headers = request(channel).decode().partition("\r\n")
    for names in (str.lower, str.upper, str.swapcase):
        lines = [line.partition(":") for line in headers.split("\r\n")]
        swapped = "\r\n".join(names(name) + colon + value for name, colon, value in lines)
        await is_let_in(relay, f"{head}\r\n{swapped}".encode())


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["as is", "reversed"])
@pytest.mark.parametrize(
    "lines",
    [
        ["Connection: keep-alive", "Connection: Upgrade"],
        ["Connection: keep-alive, x", "Connection: y", "Connection: z, Upgrade"],
    ],
)
async def test_connection_may_be_split_into_several_headers(
    relay: Relay, channel: str, lines: list[str], order: slice
) -> None:
    await is_let_in(relay, request(channel, *lines[order], drop="Connection"))


async def test_spaces_around_a_value_do_not_count(relay: Relay, channel: str) -> None:
    squeezed = request(channel).replace(b": ", b":")
    await is_let_in(relay, squeezed)
    await is_let_in(relay, request(channel).replace(b": ", b": \t  "))


async def test_an_absolute_target_names_the_same_channel(relay: Relay, channel: str) -> None:
    target = f"http://localhost{path_of(channel)}"
    async with relay.raw_client(channel) as other:
        await is_let_in(relay, upgrade_request(target))
        assert await other.message() == "hello"


async def test_a_head_that_comes_in_pieces_is_a_head(relay: Relay, channel: str) -> None:
    async with await relay.tcp() as raw:
        await raw.send_one_byte_at_a_time(request(channel))
        assert (await raw.response()).status == 101
        await raw.send(frame(TEXT, b"hello"))
        assert await raw.message() == "hello"


# What is not a handshake


@pytest.mark.parametrize("name", ["Host", "Sec-WebSocket-Key"])
async def test_a_request_that_lacks_a_header_is_refused(
    relay: Relay, channel: str, name: str
) -> None:
    before = await relay.metric("websocket_refusals_total", reason="handshake")
    await is_refused(relay, request(channel, drop=name), 400)
    await relay.metric_is("websocket_refusals_total", before + 1, reason="handshake")


@pytest.mark.parametrize(
    "line",
    [
        "Host: localhost",
        "Host: other.example",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ],
)
async def test_what_may_be_there_once_must_not_be_there_twice(
    relay: Relay, channel: str, line: str
) -> None:
    await is_refused(relay, request(channel, line), 400)


@pytest.mark.parametrize(
    "key",
    [
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
    ],
)
async def test_a_key_that_is_not_16_bytes_in_base64_is_refused(
    relay: Relay, channel: str, key: str
) -> None:
    await is_refused(relay, request(channel, **{"Sec-WebSocket-Key": key}), 400)


@pytest.mark.parametrize(
    "version", ["0", "7", "8", "12", "14", "255", "013", "13.0", "13, 8", "8, 13", "+13", "x", ""]
)
async def test_another_version_is_told_which_one_is_spoken(
    relay: Relay, channel: str, version: str
) -> None:
    headers = {"Sec-WebSocket-Version": version}
    response = await is_refused(relay, request(channel, **headers), 426)
    assert response.headers["sec-websocket-version"] == "13"


async def test_no_version_and_two_are_told_which_one_is_spoken(relay: Relay, channel: str) -> None:
    for one in (
        request(channel, drop="Sec-WebSocket-Version"),
        request(channel, "Sec-WebSocket-Version: 13"),
        request(channel, "Sec-WebSocket-Version: 8"),
    ):
        response = await is_refused(relay, one, 400, 426)
        assert response.headers.get("sec-websocket-version", "13") == "13"


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "user@localhost", "localhost:port", "[::1", "a\\b", "é", "a?b"]
)
async def test_a_host_that_names_none_is_refused(relay: Relay, channel: str, host: str) -> None:
    await is_refused(relay, request(channel, Host=host), 400)


@pytest.mark.parametrize("method", ["POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH"])
async def test_another_method_is_refused(relay: Relay, channel: str, method: str) -> None:
    start = f"{method} {{path}} HTTP/1.1"
    response = await is_refused(relay, upgrade_request(path_of(channel), start=start), 405)
    assert response.headers["allow"] == "GET"


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/9.9"])
async def test_another_http_is_refused(relay: Relay, channel: str, version: str) -> None:
    start = f"GET {{path}} {version}"
    await is_refused(relay, upgrade_request(path_of(channel), start=start), 400, 505)


@pytest.mark.parametrize(
    "start",
    [
        "GET  {path} HTTP/1.1",
        "GET {path}  HTTP/1.1",
        "GET\t{path} HTTP/1.1",
        "GET {path}\tHTTP/1.1",
        " GET {path} HTTP/1.1",
        "GET {path} HTTP/1.1 ",
        "\nGET {path} HTTP/1.1",
        "\rGET {path} HTTP/1.1",
        "GET {path} RTSP/1.0",
    ],
    ids=repr,
)
async def test_a_request_line_has_one_form(relay: Relay, channel: str, start: str) -> None:
    await is_refused(relay, upgrade_request(path_of(channel), start=start), 400)


async def test_an_empty_line_before_the_request_does_not_count(relay: Relay, channel: str) -> None:
    await is_let_in(relay, b"\r\n" + request(channel))


async def test_a_request_with_a_body_is_refused(relay: Relay, channel: str) -> None:
    await is_refused(relay, request(channel, **{"Content-Length": "5"}) + b"hello", 400)
    chunks = b"5\r\nhello\r\n0\r\n\r\n"
    await is_refused(relay, request(channel, **{"Transfer-Encoding": "chunked"}) + chunks, 400)


@pytest.mark.parametrize(
    "line",
    [
        "No colon",
        ": no name",
        "Space before : the colon",
        "B\xe4d: name",
        "Bad(name): x",
        "X-Nul: \x00",
        "X-Return: a\rb",
        " folded: line",
    ],
)
async def test_a_line_that_is_no_header_is_refused(relay: Relay, channel: str, line: str) -> None:
    await is_refused(relay, request(channel, line), 400)


@pytest.mark.parametrize("path", ["/nowhere", "/channels/news"], ids=["path", "handshake"])
async def test_a_refused_request_with_bytes_behind_it_is_gone_with_its_client(
    relay: Relay, path: str
) -> None:
    drop = "Sec-WebSocket-Key" if path != "/nowhere" else ""
    before = relay.descriptors()
    async with AsyncExitStack() as stack:
        for _ in range(20):
            raw = await stack.enter_async_context(await relay.tcp())
            await raw.send(upgrade_request(path, drop=drop) + frame(TEXT, b"behind"))
            assert (await raw.response()).status in (400, 404)
    started = time.monotonic()
    await gets_its_descriptors_back(relay, before)
    assert time.monotonic() - started < 5  # long before limits.handshake_timeout_s


# What is asked for, but not a WebSocket


@pytest.mark.parametrize(
    "headers",
    [
        {"Connection": "keep-alive"},
        {"Connection": "close"},
        {"Connection": "UpgradeX"},
        {"Connection": "x-upgrade"},
        {"Connection": "Upgrade keep-alive"},
        {"Connection": '"Upgrade"'},
        {"Upgrade": "h2c"},
        {"Upgrade": "websocketx"},
        {"Upgrade": "web socket"},
        {"Upgrade": "TLS/1.0"},
    ],
    ids=lambda headers: ", ".join(f"{name} {value!r}" for name, value in headers.items()),
)
async def test_a_request_that_asks_for_no_websocket_is_told_to(
    relay: Relay, channel: str, headers: dict[str, str]
) -> None:
    async with await relay.tcp() as raw:
        response = await answer_to(raw, request(channel, **headers))
        assert response.status in (400, 426)
        assert response.status == 400 or response.headers["upgrade"].lower() == "websocket"


@pytest.mark.parametrize("name", ["Upgrade", "Connection"])
async def test_a_request_that_lacks_half_of_the_question_is_told_to_ask(
    relay: Relay, channel: str, name: str
) -> None:
    async with await relay.tcp() as raw:
        assert (await answer_to(raw, request(channel, drop=name))).status in (400, 426)


# Subprotocols and extensions


@pytest.mark.parametrize(
    ("lines", "selected"),
    [
        (["chat"], "chat"),
        (["chat, superchat"], "chat"),
        (["superchat,chat"], "superchat"),
        (["chat", "superchat"], "chat"),
        ([",chat ,, superchat,"], "chat"),
        (["v1.chat!#$%&'*+-^_`|~"], "v1.chat!#$%&'*+-^_`|~"),
        (["Chat, chat"], "Chat"),
    ],
)
async def test_the_first_subprotocol_of_a_list_is_selected_however_it_is_written(
    relay: Relay, channel: str, lines: list[str], selected: str
) -> None:
    offers = [f"Sec-WebSocket-Protocol: {line}" for line in lines]
    response = await is_let_in(relay, request(channel, *offers))
    assert response.headers["sec-websocket-protocol"] == selected


@pytest.mark.parametrize(
    "line",
    ["a b", "a;b", "a/b", '"a"', "a, b c", "a, (b)", "a=b", "a, b\xe9", "a, a", "a, b, a"],
)
async def test_subprotocols_that_are_no_names_or_come_twice_are_refused(
    relay: Relay, channel: str, line: str
) -> None:
    await is_refused(relay, request(channel, **{"Sec-WebSocket-Protocol": line}), 400)


@pytest.mark.parametrize("field", ["Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol"])
async def test_offers_by_the_hundred_are_refused(relay: Relay, channel: str, field: str) -> None:
    names = [f"x{number}" for number in range(64)]
    async with await relay.tcp() as raw:
        await raw.send(request(channel, **{field: ", ".join(names)}))
        assert (await raw.response()).status == 101
    await is_refused(relay, request(channel, **{field: ", ".join([*names, "one-more"])}), 400)
    lines = [f"{field}: {name}" for name in (*names, "one-more")]
    await is_refused(relay, request(channel, *lines), 400)


@pytest.mark.parametrize(
    "line",
    [
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
        "unheard-of, ;",
        "\xe9",
    ],
)
async def test_extensions_that_are_malformed_are_refused(
    relay: Relay, channel: str, line: str
) -> None:
    await is_refused(relay, request(channel, **{"Sec-WebSocket-Extensions": line}), 400)
    twice = ["Sec-WebSocket-Extensions: permessage-deflate", f"Sec-WebSocket-Extensions: {line}"]
    await is_refused(relay, request(channel, *twice), 400)
