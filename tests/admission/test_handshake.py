"""Who may come in: every refusal comes before the upgrade, as HTTP, and is counted."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress

import pytest
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from tests.support.admission import refused
from tests.support.raw_client import TEXT, frame, upgrade_request
from tests.support.relay_process import Relay, StartRelay, receive

# Plain requests


async def test_a_plain_request_is_told_to_upgrade(relay: Relay) -> None:
    answer = await relay.get("/channels/news")
    assert answer.status_code == 426
    assert answer.headers["Upgrade"].lower() == "websocket"


@pytest.mark.parametrize("path", ["/nowhere", "/channels/a%20b", "/channels/", "/metrics"])
async def test_a_plain_request_elsewhere_finds_nothing(relay: Relay, path: str) -> None:
    assert (await relay.get(path)).status_code == 404


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
async def test_no_pages_of_the_framework_are_served(relay: Relay, path: str) -> None:
    assert (await relay.get(path)).status_code == 404


async def test_a_connection_serves_plain_requests_and_then_an_upgrade(
    relay: Relay, channel: str
) -> None:
    async with await relay.tcp() as raw:
        await raw.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await raw.response()
        assert answer.status == 200
        await raw.exactly(int(answer.headers["content-length"]))
        await raw.upgrade(f"/channels/{channel}")
        await raw.send(frame(TEXT, b"hello"))
        assert await raw.message() == "hello"


# Subprotocols and extensions


async def test_the_first_subprotocol_offered_is_selected(relay: Relay, channel: str) -> None:
    offer = [Subprotocol("chat.v2"), Subprotocol("chat.v1")]
    async with relay.client(channel, subprotocols=offer) as client:
        assert client.subprotocol == "chat.v2"


async def test_no_subprotocol_is_selected_where_none_is_offered(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as client:
        assert client.subprotocol is None
        assert client.response is not None
        assert "Sec-WebSocket-Protocol" not in client.response.headers


async def test_clients_of_different_subprotocols_share_a_channel(
    relay: Relay, channel: str
) -> None:
    async with (
        relay.client(channel, subprotocols=[Subprotocol("a")]) as first,
        relay.client(channel, subprotocols=[Subprotocol("b")]) as second,
        relay.client(channel) as third,
    ):
        await first.send("hello")
        assert [await receive(client) for client in (first, second, third)] == ["hello"] * 3


async def test_an_offer_of_compression_is_declined_and_the_connection_works_plain(
    relay: Relay, channel: str
) -> None:
    async with relay.client(channel, compression="deflate") as client:
        assert client.response is not None
        assert "Sec-WebSocket-Extensions" not in client.response.headers
        await client.send("x" * 10_000)
        assert await receive(client) == "x" * 10_000


# Origins


@pytest.fixture(scope="module")
def choosy_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay for the pages of two sites."""
    origins = ["https://app.example", "http://localhost:3000"]
    with Relay(
        tmp_path_factory.mktemp("choosy"), {"server": {"allowed_origins": origins}}
    ) as relay:
        yield relay


@pytest.mark.parametrize("origin", ["https://anywhere.example", "null", "file://", None])
async def test_by_default_every_origin_is_let_in(
    relay: Relay, channel: str, origin: str | None
) -> None:
    async with relay.client(channel, origin=Origin(origin) if origin else None) as client:
        await client.send("hello")
        assert await receive(client) == "hello"


@pytest.mark.parametrize("origin", ["https://app.example", "http://localhost:3000", None])
async def test_an_allowed_origin_or_none_is_let_in(
    choosy_relay: Relay, channel: str, origin: str | None
) -> None:
    async with choosy_relay.client(channel, origin=Origin(origin) if origin else None) as client:
        await client.send("hello")
        assert await receive(client) == "hello"


@pytest.mark.parametrize(
    "origin",
    [
        "https://other.example",
        "http://app.example",
        "https://app.example:8443",
        "https://app.example.evil.example",
        "https://evil.example/https://app.example",
        "https://sub.app.example",
        "null",
        "*",
    ],
)
async def test_another_origin_is_refused_with_403(
    choosy_relay: Relay, channel: str, origin: str
) -> None:
    before = await choosy_relay.metric("websocket_refusals_total", reason="origin")
    answer = await refused(choosy_relay.client(channel, origin=Origin(origin)))
    assert answer.status_code == 403
    await choosy_relay.metric_is("websocket_refusals_total", before + 1, reason="origin")
    assert await choosy_relay.metric("websocket_connected_clients") == 0


# Limits


async def test_no_more_clients_than_the_limit_are_let_in_until_one_leaves(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 2})
    async with relay.client(channel), AsyncExitStack() as second:
        await second.enter_async_context(relay.client(f"{channel}-2"))
        answer = await refused(relay.client(channel))
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        await relay.metric_is("websocket_refusals_total", 1, reason="connections")
        assert (await relay.get("/healthz")).status_code == 200
        assert (await relay.get("/readyz")).status_code == 200

        await second.aclose()
        await relay.metric_is("websocket_connected_clients", 1)
        async with relay.client(channel) as third:
            await third.send("hello")
            assert await receive(third) == "hello"
        assert await relay.metric("websocket_connections_total") == 3


async def test_clients_that_come_in_the_same_moment_do_not_pass_a_limit(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 5}, channels={"max_channels": 3})

    async def come_in(stack: AsyncExitStack, name: str) -> int:
        try:
            await stack.enter_async_context(relay.client(name))
        except InvalidStatus as refusal:
            return refusal.response.status_code
        return 101

    for names, most in (([channel] * 30, 5), ([f"{channel}-{n}" for n in range(30)], 3)):
        async with AsyncExitStack() as stack:
            answers = await asyncio.gather(*(come_in(stack, name) for name in names))
            assert sorted(answers) == [101] * most + [503] * (30 - most)
        await relay.metric_is("websocket_connected_clients", 0)


async def test_refused_and_broken_upgrades_use_up_no_connection(
    relay_with: StartRelay, channel: str
) -> None:
    origins = ["https://app.example"]
    relay = relay_with(limits={"max_connections": 1}, server={"allowed_origins": origins})
    for _ in range(3):
        await refused(relay.client("not%20a%20name"))
        await refused(relay.client(channel, origin=Origin("https://other.example")))
        async with await relay.tcp() as raw:
            await raw.send(upgrade_request(f"/channels/{channel}"))
            raw.vanish()
    await relay.metric_is("websocket_connected_clients", 0)
    async with relay.client(channel) as client:
        await client.send("hello")
        assert await receive(client) == "hello"


# Deadlines


async def cut_off_after(relay: Relay, *pieces: bytes) -> float:
    """Send pieces of a request, and dribble, until the relay ends it; return the seconds."""
    async with await relay.tcp() as raw:
        started = time.monotonic()
        for piece in pieces:
            await raw.send(piece)

        async def dribble() -> None:
            while True:
                await asyncio.sleep(0.1)
                await raw.send(b"x")

        task = asyncio.create_task(dribble())
        await raw.ended()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return time.monotonic() - started


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET /", id="request line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", id="header"),
        pytest.param(upgrade_request("/")[:-2] + b"X-Slow: ", id="upgrade"),
    ],
)
async def test_a_request_head_that_never_ends_is_cut_off(hasty_relay: Relay, head: bytes) -> None:
    before = await hasty_relay.metric("websocket_refusals_total", reason="handshake_timeout")
    assert await cut_off_after(hasty_relay, head) >= 0.5
    await hasty_relay.metric_is("websocket_refusals_total", before + 1, reason="handshake_timeout")


async def test_a_connection_that_never_says_a_word_is_cut_off(hasty_relay: Relay) -> None:
    async with await hasty_relay.tcp() as silent:
        await silent.ended()


async def test_a_second_head_that_never_ends_on_a_kept_connection_is_cut_off(
    hasty_relay: Relay,
) -> None:
    async with await hasty_relay.tcp() as raw:
        await raw.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await raw.response()
        await raw.exactly(int(answer.headers["content-length"]))
        await raw.send(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        await raw.ended()


async def test_many_slow_heads_keep_nobody_out(hasty_relay: Relay, channel: str) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(100):
            raw = await stack.enter_async_context(await hasty_relay.tcp())
            await raw.send(b"GET / HTTP/1.1\r\nX-Slow: ")
        async with hasty_relay.client(channel) as client:
            await client.send("hello")
            assert await receive(client) == "hello"


async def test_a_tls_handshake_that_never_comes_is_cut_off(tls_relay_with: StartRelay) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 1})
    async with await relay.tcp() as silent:
        await silent.ended()


async def test_a_request_head_that_never_ends_over_tls_is_cut_off(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 1})
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


async def test_the_deadline_of_the_handshake_does_not_end_an_idle_client(
    hasty_relay: Relay, channel: str
) -> None:
    async with hasty_relay.client(channel) as idle:
        await cut_off_after(hasty_relay, b"GET /")
        await cut_off_after(hasty_relay, b"GET /")
        await idle.send("still here")
        assert await receive(idle) == "still here"


# The base path


@pytest.fixture(scope="module")
def prefixed_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    settings = {"server": {"base_path": "/live/relay"}}
    with Relay(tmp_path_factory.mktemp("prefixed"), settings) as relay:
        yield relay


async def test_a_base_path_goes_before_the_channels(prefixed_relay: Relay, channel: str) -> None:
    async with (
        prefixed_relay.client(path=f"/live/relay/channels/{channel}") as client,
        prefixed_relay.client(path="/live/relay/") as root,
        prefixed_relay.client(path="/live/relay/channels/default") as default,
    ):
        await client.send("named")
        assert await receive(client) == "named"
        await root.send("root")
        assert await receive(default) == "root"
        assert await receive(root) == "root"


async def test_paths_beside_the_base_path_are_not_found(prefixed_relay: Relay) -> None:
    for path in ("/live/other/channels/news", "/live/relays/channels/news", "/live/"):
        assert (await refused(prefixed_relay.client(path=path))).status_code == 404


async def test_probes_stay_where_they_are_whatever_the_base_path(prefixed_relay: Relay) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await prefixed_relay.get(path)).status_code == 200
        assert (await prefixed_relay.get_metrics(path)).status_code == 200


async def test_a_plain_request_below_the_base_path_is_told_to_upgrade(
    prefixed_relay: Relay,
) -> None:
    assert (await prefixed_relay.get("/live/relay/channels/news")).status_code == 426


@pytest.mark.parametrize("page", ["", "console.js", "relay.js", "stats", "openapi.json"])
async def test_pages_are_below_the_base_path(prefixed_relay: Relay, page: str) -> None:
    assert (await prefixed_relay.get(f"/live/relay/{page}")).status_code == 200
    assert (await prefixed_relay.get(f"/{page}")).status_code == 404


async def test_an_upgrade_pipelined_behind_another_request_is_refused(relay: Relay) -> None:
    """Its answer would end up among the frames."""
    before = await relay.metric("websocket_refusals_total", reason="handshake")
    async with await relay.tcp() as raw:
        await raw.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" + upgrade_request())
        assert (await raw.response()).status == 400
        await raw.ended()
    await relay.metric_is("websocket_refusals_total", before + 1, reason="handshake")
    assert relay.complaints == []


async def test_trailers_without_end_are_cut_off(relay: Relay) -> None:
    before = await relay.metric("websocket_refusals_total", reason="handshake")
    async with await relay.tcp() as raw:
        await raw.send(
            b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        )
        assert (await raw.response()).status == 405
        with suppress(ConnectionError):  # the end can come before all is sent
            await raw.send(b"a:b\r\n" * 100_000)
        # The request has its answer, and a second one would be taken for that of the next.
        assert b"431" not in await raw.ended()
    await relay.metric_is("websocket_refusals_total", before + 1, reason="handshake")
