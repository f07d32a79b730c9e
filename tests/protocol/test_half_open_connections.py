"""Connections that never become clients: thousands of them cost little, and nobody else anything.

Memory and file descriptors are looked at from outside, in /proc.
"""

import asyncio
import itertools
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import jwt
import pytest
from websockets.asyncio.client import ClientConnection

from tests.support.half_open import HALF_A_HELLO, connections
from tests.support.raw_client import KEY, PATIENCE_S, RawClient, upgrade_request
from tests.support.relay_process import Relay, StartRelay, eventually, path_of, receive

KIB = 1_024
MIB = 1_048_576
MOST_CLIENTS = 2_000
SLOW_HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
TLS_CONNECTION_BYTES = 96 * KIB  # most of it is what OpenSSL has for the handshake


@pytest.fixture(autouse=True, scope="module")
def descriptors() -> Iterator[None]:
    """Shells start with 1,024, and here are clients by the thousand, all in one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= MOST_CLIENTS + 100, "too few descriptors"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MOST_CLIENTS + 100), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def descriptors_are_back_at(relay: Relay, most: int) -> None:
    async def now() -> tuple[bool, object]:
        count = relay.descriptors()
        return count <= most, count

    await eventually(now, f"{most} descriptors")


async def assert_at_work(client: ClientConnection) -> None:
    await client.send("still here")
    assert await receive(client) == "still here"


async def seconds_to_come_in(relay: Relay) -> float:
    """Connect a good client and have it hear itself."""
    started = time.monotonic()
    async with relay.client("good") as client:
        await assert_at_work(client)
        return time.monotonic() - started


# Unfinished handshakes


async def test_a_thousand_unfinished_heads_take_little_memory_and_are_ended(
    relay_with: StartRelay,
) -> None:
    count = 1_200  # a busy machine, too, opens so many within the time-out
    relay = relay_with(limits={"handshake_timeout_s": 6, "max_http_connections": count})
    async with relay.client("news") as client:
        started_rss, started_descriptors = relay.rss_bytes(), relay.descriptors()
        async with connections(relay, count, b"", b"GET", SLOW_HEAD) as opened:
            await assert_at_work(client)
            assert relay.descriptors() >= started_descriptors + count
            assert relay.rss_bytes() < started_rss + count * 12 * KIB
            for raw in opened:
                await raw.ended()
        await relay.metric_is("websocket_refusals_total", count, reason="handshake_timeout")
        await descriptors_are_back_at(relay, started_descriptors)
        await assert_at_work(client)


@pytest.mark.timeout(120)
async def test_with_1000_slow_headers_a_good_client_connects_within_a_second(
    relay_with: StartRelay,
) -> None:
    """They are never silent: each says one more byte again and again."""
    relay = relay_with(limits={"handshake_timeout_s": 30, "max_http_connections": 2_000})

    async def dribble(opened: Sequence[RawClient]) -> None:
        for raw in itertools.cycle(opened):
            await raw.send(b"x")
            await asyncio.sleep(0)

    async with connections(relay, 1_000, SLOW_HEAD) as opened:
        dribbling = asyncio.create_task(dribble(opened))
        waits_s = [await seconds_to_come_in(relay) for _ in range(5)]
        dribbling.cancel()
        await asyncio.gather(dribbling, return_exceptions=True)
        assert max(waits_s) < 1.0
        assert await relay.metric("websocket_refusals_total") == 0, "they were all there"


@pytest.mark.timeout(120)
async def test_with_1000_slow_tls_handshakes_a_good_client_connects_within_a_second(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 30, "max_http_connections": 2_000})
    count = 1_000
    started_rss, started_descriptors = relay.rss_bytes(), relay.descriptors()
    async with connections(relay, count, b"", HALF_A_HELLO):
        assert max([await seconds_to_come_in(relay) for _ in range(5)]) < 1.0
        assert relay.descriptors() >= started_descriptors + count
        assert relay.rss_bytes() < started_rss + count * TLS_CONNECTION_BYTES
    await descriptors_are_back_at(relay, started_descriptors)


async def test_tls_handshakes_that_never_end_are_ended_and_leave_nothing(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 2})
    async with relay.client("news") as client:
        started_descriptors = relay.descriptors()
        async with connections(relay, 500, b"", HALF_A_HELLO) as opened:
            for raw in opened:
                await raw.ended()
        await descriptors_are_back_at(relay, started_descriptors)
        await assert_at_work(client)


async def test_what_is_no_tls_handshake_leaves_nothing(tls_relay_with: StartRelay) -> None:
    relay = tls_relay_with()

    async def fail(count: int) -> None:
        for _ in range(count):
            async with await relay.tcp() as raw:
                await raw.send(upgrade_request())
                with suppress(ConnectionError):
                    await raw.ended()

    lines = len(relay.log_lines)
    await fail(500)
    started_rss, started_descriptors = relay.rss_bytes(), relay.descriptors()
    await fail(2_000)
    await descriptors_are_back_at(relay, started_descriptors)
    assert relay.rss_bytes() < started_rss + 2 * MIB
    assert len(relay.log_lines) == lines


# Refused upgrades

SECRET = "a secret of at least thirty-two bytes"
REFUSING = {
    "server": {"allowed_origins": ["https://app.example"]},
    "limits": {"max_connections": 1},
    "auth": {"mode": "jwt", "jwt": {"secret": SECRET}},
}


def token(*channels: str) -> str:
    claims = {"exp": time.time() + 3_600, "relay": {"subscribe": channels}}
    return jwt.encode(claims, SECRET, "HS256")


def refused_upgrades() -> dict[bytes, int]:
    """Return requests that `REFUSING` refuses when one client is there, and with what."""
    right, wrong = f"Bearer {token('news')}", f"Bearer {token('other')}"
    forged = f"Bearer {jwt.encode({'exp': time.time() + 9}, SECRET + '!', 'HS256')}"
    news = path_of("news")
    return {
        upgrade_request("/nowhere"): 404,
        upgrade_request("/channels/a%20b"): 404,
        upgrade_request(news, Origin="https://other.example"): 403,
        upgrade_request(news): 401,
        upgrade_request(news, Authorization="Bearer nonsense"): 401,
        upgrade_request(news, Authorization=forged): 401,
        upgrade_request(news, Authorization=wrong): 403,
        upgrade_request(news, Authorization=right): 503,
        upgrade_request(news, drop="Sec-WebSocket-Key"): 400,
        upgrade_request(news, drop="Host"): 400,
        upgrade_request(news, Sec_WebSocket_Key=KEY[:-4]): 400,
        upgrade_request(news, Sec_WebSocket_Version="8"): 426,
        upgrade_request(news).replace(b"GET", b"POST"): 405,
        upgrade_request(news).replace(b"HTTP/1.1", b"HTTP/1.0"): 505,
        upgrade_request(news, Content_Length="5") + b"hello": 400,
        upgrade_request(news, X=70_000 * "x"): 431,
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n": 400,
    }


async def refuse(relay: Relay, kinds: dict[bytes, int], count: int) -> None:
    """Be refused so often, sixteen at a time, in all ways by turns."""
    requests = list(kinds.items())
    turns = iter(range(count))

    async def be_refused() -> None:
        for turn in turns:
            wire, status = requests[turn % len(requests)]
            async with await relay.tcp() as raw:
                with suppress(ConnectionError):
                    await raw.send(wire)
                    assert (await raw.response()).status == status, wire
                await raw.ended()

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(be_refused())


@pytest.mark.timeout(180)
async def test_ten_thousand_refused_upgrades_leave_memory_and_descriptors_where_they_were(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(**REFUSING)
    kinds = refused_upgrades()
    headers = {"Authorization": f"Bearer {token('news')}"}
    async with relay.client("news", additional_headers=headers):
        await refuse(relay, kinds, 5_000)  # to be warm
        before_total = await relay.metric("websocket_refusals_total")
        started_rss, started_descriptors = relay.rss_bytes(), relay.descriptors()
        lines = len(relay.log_lines)
        await refuse(relay, kinds, 10_000)
        assert len(relay.log_lines) <= lines + 2, "one a minute says so, not every one"
        await relay.metric_is("websocket_refusals_total", before_total + 10_000)
        await descriptors_are_back_at(relay, started_descriptors)
        assert relay.rss_bytes() < started_rss + 2 * MIB
        assert await relay.metric("websocket_connections_total") == 1
        assert await relay.metric("websocket_connected_clients") == 1


async def test_upgrades_whose_clients_do_not_wait_for_the_answer_leave_nothing(
    relay: Relay, channel: str
) -> None:
    wires = (
        upgrade_request(path_of(channel)),
        upgrade_request("/nowhere"),
        upgrade_request()[:-2],
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4,
    )

    async def vanish(count: int) -> None:
        for turn in range(count):
            async with await relay.tcp() as raw:
                await raw.send(wires[turn % len(wires)])
                raw.vanish()
        await seconds_to_come_in(relay)  # behind all those that the kernel had in its queue
        await relay.metric_is("websocket_connected_clients", 0)

    await vanish(400)
    started_rss, started_descriptors = relay.rss_bytes(), relay.descriptors()
    await vanish(2_000)
    await descriptors_are_back_at(relay, started_descriptors)
    assert relay.rss_bytes() < started_rss + 2 * MIB
    await relay.metric_is("websocket_channels", 0)


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(upgrade_request("/nowhere"), id="refused by the application"),
        pytest.param(upgrade_request(drop="Sec-WebSocket-Key"), id="refused as no handshake"),
        pytest.param(upgrade_request(drop="Host"), id="refused as no request"),
    ],
)
async def test_who_goes_on_talking_after_a_refusal_is_not_listened_to_and_cut_off(
    hasty_relay: Relay, wire: bytes
) -> None:
    started_rss = hasty_relay.rss_bytes()

    async def talk(raw: RawClient) -> None:
        while True:
            await raw.send(upgrade_request() * 500)

    async with await hasty_relay.tcp() as raw:
        await raw.send(wire)
        with pytest.raises(ConnectionError):
            await talk(raw)
    assert await hasty_relay.metric("websocket_connected_clients") == 0
    assert hasty_relay.rss_bytes() < started_rss + 4 * MIB


# No descriptors left


@pytest.mark.parametrize("tls", [False, True])
async def test_where_descriptors_run_out_clients_go_on_and_others_get_in_when_there_are_some(
    tmp_path: Path, tls: bool, request: pytest.FixtureRequest
) -> None:
    settings: dict[str, object] = {"limits": {"handshake_timeout_s": 3}}
    if tls:
        directory: Path = request.getfixturevalue("certificate_directory")
        files = {"cert_file": str(directory / "cert.pem"), "key_file": str(directory / "key.pem")}
        settings["server"] = {"tls": {"enabled": True} | files}
    with Relay(tmp_path, settings, max_descriptors=128) as relay:
        if tls:
            relay.tls_context = request.getfixturevalue("pair").trusting_context()
        async with relay.client("news") as client:
            lines = len(relay.log_lines)
            async with AsyncExitStack() as stack:
                idle = [await stack.enter_async_context(await relay.tcp()) for _ in range(400)]
                for _ in range(50):
                    await assert_at_work(client)
                used = relay.cpu_seconds()
                await asyncio.sleep(1)
                assert relay.cpu_seconds() < used + 0.5, "a busy loop"
                assert relay.descriptors() <= 128
                assert len(relay.log_lines) <= lines + 10

                async def gets_in() -> tuple[bool, object]:
                    try:
                        return await seconds_to_come_in(relay) < PATIENCE_S, "in"
                    except Exception as refused:  # noqa: BLE001  # whatever a library makes of it
                        return False, repr(refused)

                await eventually(gets_in, "room for another client")
                for raw in idle:
                    await raw.ended()
            await assert_at_work(client)
            assert (await relay.get_metrics("/healthz")).status_code == 200
        assert len(relay.log_lines) <= lines + 10
        assert relay.complaints == []
