"""Admission before the upgrade: every refusal is an HTTP answer, and is counted."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress

import pytest
from websocket_relay.origins import AllowedOrigins, normalize_pattern
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from tests.support.admission import refusal_answer
from tests.support.http_requests import get_request, post_request
from tests.support.issuer import KeyServer, key_set, make_signer
from tests.support.raw_client import TEXT, RawClient, frame, upgrade_request
from tests.support.relay_process import HOST, RelayProcess, StartRelay, path_of, receive

HEALTHZ = get_request("/healthz")

# Plain requests


async def test_a_plain_request_to_a_channel_is_answered_426(relay: RelayProcess) -> None:
    answer = await relay.get("/channels/news")
    assert answer.status_code == 426
    assert answer.headers["Upgrade"].lower() == "websocket"


async def test_a_plain_request_to_an_unknown_path_is_answered_404(relay: RelayProcess) -> None:
    unknown = ("/nowhere", "/channels/a%20b", "/channels/", "/metrics")
    pages_of_the_framework = ("/docs", "/redoc", "/docs/oauth2-redirect")
    for path in unknown + pages_of_the_framework:
        assert (await relay.get(path)).status_code == 404, path


async def test_a_connection_serves_plain_requests_and_then_an_upgrade(
    relay: RelayProcess, channel: str
) -> None:
    async with await relay.connect_tcp() as raw:
        await raw.send(HEALTHZ)
        answer = await raw.read_response()
        assert answer.status == 200
        await raw.read_exactly(int(answer.headers["content-length"]))
        await raw.upgrade(f"/channels/{channel}")
        await raw.send(frame(TEXT, b"hello"))
        assert await raw.read_message() == "hello"


# Subprotocols and extensions


async def test_the_first_offered_subprotocol_is_selected(relay: RelayProcess, channel: str) -> None:
    offer = [Subprotocol("chat.v2"), Subprotocol("chat.v1")]
    async with relay.client(channel, subprotocols=offer) as client:
        assert client.subprotocol == "chat.v2"


async def test_without_an_offer_no_subprotocol_is_selected(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as client:
        assert client.subprotocol is None
        assert client.response is not None
        assert "Sec-WebSocket-Protocol" not in client.response.headers


async def test_clients_with_different_subprotocols_share_a_channel(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        relay.client(channel, subprotocols=[Subprotocol("a")]) as first,
        relay.client(channel, subprotocols=[Subprotocol("b")]) as second,
        relay.client(channel) as third,
    ):
        await first.send("hello")
        assert [await receive(client) for client in (first, second, third)] == ["hello"] * 3


async def test_an_offer_of_compression_is_declined_by_default(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel, compression="deflate") as client:
        assert client.response is not None
        assert "Sec-WebSocket-Extensions" not in client.response.headers
        await client.send("x" * 10_000)
        assert await receive(client) == "x" * 10_000


# Origins

ALLOWED_ORIGINS = ["https://app.example", "http://localhost:3000"]
PATTERNS = [
    "https://*.tenants.example",
    "http://127.0.0.1:*",
    "https://PORT.example:443",
    "https://münchen.example",
    "file://",
]
PROXY, CLIENT = "127.0.0.2", "127.0.0.3"


@pytest.fixture(scope="module")
def origin_checking_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay that accepts the origins of some sites, and trusts the proxy at `PROXY`."""
    origins = [*ALLOWED_ORIGINS, *PATTERNS]
    settings = {"server": {"allowed_origins": origins, "trusted_proxies": [PROXY]}}
    with RelayProcess(tmp_path_factory.mktemp("origins"), settings) as relay:
        yield relay


async def assert_origin_is_accepted(relay: RelayProcess, channel: str, origin: str | None) -> None:
    async with relay.client(channel, origin=Origin(origin) if origin else None) as client:
        await client.send("hello")
        assert await receive(client) == "hello"


async def test_by_default_every_origin_is_accepted(relay: RelayProcess, channel: str) -> None:
    for origin in ("https://anywhere.example", "null", "file://", None):
        await assert_origin_is_accepted(relay, channel, origin)


async def test_an_allowed_origin_and_a_request_without_an_origin_are_accepted(
    origin_checking_relay: RelayProcess, channel: str
) -> None:
    for origin in (*ALLOWED_ORIGINS, None):
        await assert_origin_is_accepted(origin_checking_relay, channel, origin)


async def test_another_origin_is_refused_with_403(
    origin_checking_relay: RelayProcess, channel: str
) -> None:
    relay = origin_checking_relay
    others = [
        "https://other.example",
        "http://app.example",
        "https://app.example:8443",
        "https://app.example.evil.example",
        "https://evil.example/https://app.example",
        "https://sub.app.example",
        "null",
        "*",
    ]
    before = await relay.metric("websocket_refusals_total", reason="origin_not_allowed")
    for origin in others:
        answer = await refusal_answer(relay.client(channel, origin=Origin(origin)))
        assert answer.status_code == 403, origin
    await relay.await_metric(
        "websocket_refusals_total", before + len(others), reason="origin_not_allowed"
    )
    assert await relay.metric("websocket_connected_clients") == 0
    logged = await relay.await_log("clients refused")
    expected = {"level": "info", "count": 1, "setting": "server.allowed_origins"}
    assert logged.items() >= expected.items()


SAME_ORIGIN: list[tuple[str, str, str, dict[str, str], int]] = [
    ("plain", CLIENT, "http://relay.example:8080", {"Host": "relay.example:8080"}, 101),
    ("explicit port", CLIENT, "http://relay.example:80", {"Host": "relay.example"}, 101),
    ("scheme of the socket", CLIENT, "ws://RELAY.example", {"Host": "relay.example"}, 101),
    ("IPv6", CLIENT, "http://[::1]:8080", {"Host": "[::1]:8080"}, 101),
    ("other port", CLIENT, "http://relay.example", {"Host": "relay.example:8080"}, 403),
    ("other host", CLIENT, "http://relay.example.evil", {"Host": "relay.example"}, 403),
    ("other scheme", CLIENT, "https://relay.example", {"Host": "relay.example"}, 403),
    (
        "TLS at the proxy",
        PROXY,
        "https://relay.example",
        {"Host": "relay.example", "X_Forwarded_Proto": "https"},
        101,
    ),
    (
        "no proxy",
        CLIENT,
        "https://relay.example",
        {"Host": "relay.example", "X_Forwarded_Proto": "https"},
        403,
    ),
]


@pytest.mark.parametrize(
    ("peer", "origin", "headers", "status"),
    [row[1:] for row in SAME_ORIGIN],
    ids=[row[0] for row in SAME_ORIGIN],
)
async def test_the_relay_s_own_origin_as_the_client_addresses_it_is_accepted(
    origin_checking_relay: RelayProcess,
    peer: str,
    origin: str,
    headers: dict[str, str],
    status: int,
) -> None:
    """React Native, and the console, send the origin of the relay itself."""
    connected = socket.create_connection((HOST, origin_checking_relay.port), 5, (peer, 0))
    connected.setblocking(False)
    async with RawClient(connected) as raw:
        await raw.send(upgrade_request("/channels/same", Origin=origin, **headers))
        assert (await raw.read_response()).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://a.tenants.example", 101),
        ("https://a.b.tenants.example", 101),
        ("https://tenants.example", 403),
        ("https://a.tenants.example:8443", 403),
        ("https://a.tenants.example.evil.example", 403),
        ("https://eviltenants.example", 403),
        ("http://127.0.0.1:5173", 101),
        ("http://127.0.0.1", 101),
        ("https://127.0.0.1", 403),
        ("http://127.0.0.1:x.example", 403),
        ("https://port.example", 101),
        ("https://xn--mnchen-3ya.example", 101),
        ("file://", 101),
    ],
)
async def test_a_pattern_accepts_the_origins_that_browsers_send_for_it(
    origin_checking_relay: RelayProcess, origin: str, status: int
) -> None:
    async with await origin_checking_relay.connect_tcp() as raw:
        await raw.send(upgrade_request("/channels/patterns", Origin=origin))
        assert (await raw.read_response()).status == status


@pytest.mark.fast
@pytest.mark.parametrize(
    ("pattern", "origin", "is_admitted"),
    [
        ("http://*", "http://[::1]", True),
        ("http://*", "http://[::1]:3000", False),
        ("http://*:*", "http://[::1]:3000", True),
        ("http://*:*", "http://app.example:3000", True),
        ("http://*:*", "http://[::1]:x", False),
        ("http://*:*", "http://[app.example]", False),
        ("http://*:*", "http://user@[::1]", False),
    ],
)
def test_any_host_includes_ipv6_addresses(pattern: str, origin: str, is_admitted: bool) -> None:
    origins = AllowedOrigins([normalize_pattern(pattern)])
    assert origins.admit(origin, "https", "relay.example") == is_admitted


# Limits


async def test_at_max_connections_clients_are_refused_until_one_disconnects(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 2})
    async with relay.client(channel), AsyncExitStack() as second:
        await second.enter_async_context(relay.client(f"{channel}-2"))
        answer = await refusal_answer(relay.client(channel))
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        await relay.await_metric("websocket_refusals_total", 1, reason="connections")
        assert (await relay.get("/healthz")).status_code == 200
        assert (await relay.get("/readyz")).status_code == 200

        await second.aclose()
        await relay.await_metric("websocket_connected_clients", 1)
        async with relay.client(channel) as third:
            await third.send("hello")
            assert await receive(third) == "hello"
        assert await relay.metric("websocket_connections_total") == 3


async def test_clients_that_connect_at_the_same_moment_do_not_exceed_a_limit(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 5}, channels={"max_channels": 3})

    async def status_of_attempt(stack: AsyncExitStack, name: str) -> int:
        try:
            await stack.enter_async_context(relay.client(name))
        except InvalidStatus as refusal:
            return refusal.response.status_code
        return 101

    for names, limit in (([channel] * 20, 5), ([f"{channel}-{n}" for n in range(20)], 3)):
        async with AsyncExitStack() as stack:
            answers = await asyncio.gather(*(status_of_attempt(stack, name) for name in names))
            assert sorted(answers) == [101] * limit + [503] * (20 - limit)
        await relay.await_metric("websocket_connected_clients", 0)


async def test_refused_and_aborted_upgrades_do_not_count_as_connections(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(
        limits={"max_connections": 1}, server={"allowed_origins": ["https://app.example"]}
    )
    for _ in range(3):
        await refusal_answer(relay.client("not%20a%20name"))
        await refusal_answer(relay.client(channel, origin=Origin("https://other.example")))
        async with await relay.connect_tcp() as raw:
            await raw.send(upgrade_request(f"/channels/{channel}"))
            raw.reset()
    await relay.await_metric("websocket_connected_clients", 0)
    async with relay.client(channel) as client:
        await client.send("hello")
        assert await receive(client) == "hello"


# Deadlines

UNFINISHED_HEADS = [
    b"GET /",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    upgrade_request("/")[:-2] + b"X-Slow: ",
]


async def send_slowly_until_the_end(raw: RawClient, head: bytes) -> float:
    """Send a head, then a byte every 0.1 s, until the relay closes; return the seconds."""
    started_at = time.monotonic()
    await raw.send(head)

    async def send_slowly() -> None:
        while True:
            await asyncio.sleep(0.1)
            await raw.send(b"x")

    sending = asyncio.create_task(send_slowly())
    await raw.read_to_end()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    return time.monotonic() - started_at


async def test_an_unfinished_request_head_is_closed_at_the_deadline(
    short_deadline_relay: RelayProcess,
) -> None:
    before = await short_deadline_relay.metric(
        "websocket_refusals_total", reason="handshake_timeout"
    )
    async with AsyncExitStack() as stack:
        raws = [
            await stack.enter_async_context(await short_deadline_relay.connect_tcp())
            for _ in UNFINISHED_HEADS
        ]
        pairs = zip(raws, UNFINISHED_HEADS, strict=True)
        elapsed_s = await asyncio.gather(*(send_slowly_until_the_end(*pair) for pair in pairs))
    assert min(elapsed_s) >= 0.5
    expected = before + len(UNFINISHED_HEADS)
    await short_deadline_relay.await_metric(
        "websocket_refusals_total", expected, reason="handshake_timeout"
    )


async def test_an_idle_connection_is_closed_at_the_deadline_and_an_idle_client_is_not(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    """The deadline also applies to the second request of a connection."""
    async with (
        short_deadline_relay.client(channel) as client,
        await short_deadline_relay.connect_tcp() as silent,
        await short_deadline_relay.connect_tcp() as kept_alive,
    ):
        await kept_alive.send(HEALTHZ)
        answer = await kept_alive.read_response()
        await kept_alive.read_exactly(int(answer.headers["content-length"]))
        await kept_alive.send(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        await silent.read_to_end()
        await kept_alive.read_to_end()
        await client.send("still connected")
        assert await receive(client) == "still connected"


async def test_a_client_is_admitted_while_many_request_heads_are_unfinished(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(100):
            raw = await stack.enter_async_context(await short_deadline_relay.connect_tcp())
            await raw.send(b"GET / HTTP/1.1\r\nX-Slow: ")
        async with short_deadline_relay.client(channel) as client:
            await client.send("hello")
            assert await receive(client) == "hello"


async def test_an_unfinished_tls_handshake_or_request_over_tls_is_closed_at_the_deadline(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 1})
    async with await relay.connect_tcp() as silent:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", relay.port, ssl=relay.tls_context, server_hostname="localhost"
        )
        try:
            writer.write(b"GET / HTTP/1.1\r\nX-Slow: ")
            async with asyncio.timeout(20):
                await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()
        await silent.read_to_end()


# The base path


@pytest.fixture(scope="module")
def base_path_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    settings = {"server": {"base_path": "/live/relay"}}
    with RelayProcess(tmp_path_factory.mktemp("base-path"), settings) as relay:
        yield relay


async def test_channels_are_served_below_the_base_path_only(
    base_path_relay: RelayProcess, channel: str
) -> None:
    async with (
        base_path_relay.client(path=f"/live/relay/channels/{channel}") as client,
        base_path_relay.client(path="/live/relay/") as root,
        base_path_relay.client(path="/live/relay/channels/default") as default,
    ):
        await client.send("named")
        assert await receive(client) == "named"
        await root.send("root")
        assert await receive(default) == "root"
        assert await receive(root) == "root"
    for path in ("/live/other/channels/news", "/live/relays/channels/news", "/live/"):
        assert (await refusal_answer(base_path_relay.client(path=path))).status_code == 404, path


async def test_pages_are_served_below_the_base_path_and_probes_at_the_root(
    base_path_relay: RelayProcess,
) -> None:
    for page in ("", "console.js", "relay.js", "stats", "openapi.json"):
        assert (await base_path_relay.get(f"/live/relay/{page}")).status_code == 200, page
        assert (await base_path_relay.get(f"/{page}")).status_code == 404, page
    assert (await base_path_relay.get("/live/relay/channels/news")).status_code == 426
    for path in ("/healthz", "/readyz"):
        assert (await base_path_relay.get(path)).status_code == 200
        assert (await base_path_relay.get_metrics(path)).status_code == 200


# Requests that are not answered twice


async def test_an_upgrade_that_is_pipelined_after_an_unanswered_request_waits_for_its_answer(
    relay_with: StartRelay, channel: str
) -> None:
    """The answer would arrive among the frames. The request waits for a key of the issuer."""
    known, unknown = make_signer("ES256", "known"), make_signer("ES256", "unknown", 1)
    with KeyServer(key_set(known)) as server:
        keys = {"jwks_url": server.url, "algorithms": ["ES256"]}
        relay = relay_with(auth={"mode": "jwt", "jwt": keys})
        server.may_answer.clear()
        async with await relay.connect_tcp() as raw:
            await raw.send(
                post_request(channel, b"hello", f"Authorization: Bearer {unknown.token()}")
            )
            await asyncio.to_thread(server.block_until_requested, 2)
            authorization = f"Bearer {known.token()}"
            await raw.send(upgrade_request(path_of(channel), Authorization=authorization))
            await raw.send(frame(TEXT, b"early"))
            server.may_answer.set()
            response = await raw.read_response()
            assert response.status == 401
            await raw.read_exactly(int(response.headers["content-length"]))
            assert (await raw.read_response()).status == 101
            assert await raw.read_message() == "early"


async def test_endless_trailers_close_the_connection(relay: RelayProcess) -> None:
    before = await relay.metric("websocket_refusals_total", reason="head_too_large")
    async with await relay.connect_tcp() as raw:
        await raw.send(
            b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        )
        assert (await raw.read_response()).status == 405
        with suppress(ConnectionError):  # the connection may end before all is sent
            await raw.send(b"a:b\r\n" * 100_000)
        # The request is answered. A second answer would be taken for that of the next request.
        assert b"431" not in await raw.read_to_end()
    await relay.await_metric("websocket_refusals_total", before + 1, reason="head_too_large")
