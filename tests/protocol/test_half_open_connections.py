"""Connections that never become clients: thousands of them cost little and affect no client.

Memory and file descriptors are read from outside, in /proc.
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

from tests.support.half_open import PARTIAL_CLIENT_HELLO, open_connections
from tests.support.raw_client import KEY, RawClient, upgrade_request
from tests.support.relay_process import (
    POLL_S,
    RelayProcess,
    StartRelay,
    eventually,
    path_of,
    receive,
)
from tests.support.rfc_cases import await_descriptors

KIB = 1_024
MIB = 1_048_576
MAX_CONNECTIONS = 2_000
SLOW_HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
TLS_CONNECTION_BYTES = 96 * KIB  # most of it is OpenSSL's memory for the handshake


@pytest.fixture(autouse=True, scope="module")
def descriptors() -> Iterator[None]:
    """Raise the usual limit of 1,024: one process opens thousands of connections here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= MAX_CONNECTIONS + 100, "too few descriptors"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MAX_CONNECTIONS + 100), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def assert_relays(client: ClientConnection) -> None:
    await client.send("still here")
    assert await receive(client) == "still here"


async def assert_connects(relay: RelayProcess) -> None:
    """Connect a client and have it receive its own message."""
    async with relay.client("other") as client:
        await assert_relays(client)


# Unfinished handshakes

PATIENT = {"handshake_timeout_s": 120, "max_http_connections": MAX_CONNECTIONS}
"""Limits that no connection reaches while a test runs, however slow the machine is."""


@pytest.mark.timeout(120)
async def test_1000_unfinished_requests_take_little_memory(relay_with: StartRelay) -> None:
    relay, count = relay_with(limits=PATIENT), 1_000
    async with relay.client("news") as client:
        rss_bytes, descriptors = relay.rss_bytes(), relay.descriptors()
        async with open_connections(relay, count, b"", b"GET", SLOW_HEAD):
            await assert_connects(relay)  # the relay accepts this connection after all the others
            assert relay.descriptors() >= descriptors + count
            assert relay.rss_bytes() < rss_bytes + count * 12 * KIB
            await assert_relays(client)
        await await_descriptors(relay, descriptors)


async def test_unfinished_requests_end_at_the_deadline_and_free_their_descriptors(
    relay_with: StartRelay,
) -> None:
    relay, count = relay_with(limits={"handshake_timeout_s": 2}), 300
    descriptors = relay.descriptors()
    async with open_connections(relay, count, b"", b"GET", SLOW_HEAD) as opened:
        for raw in opened:
            await raw.read_to_end()
        await await_descriptors(relay, descriptors)
    await relay.await_metric("websocket_refusals_total", count, reason="handshake_timeout")


@pytest.mark.timeout(120)
async def test_with_1000_slow_requests_clients_connect(
    relay_with: StartRelay,
) -> None:
    """The slow connections are never idle: each sends about ten single bytes per second."""
    relay = relay_with(limits=PATIENT)

    async def send_single_bytes(opened: Sequence[RawClient]) -> None:
        for number, raw in enumerate(itertools.cycle(opened)):
            await raw.send(b"x")
            await asyncio.sleep(0.01 if number % 100 == 0 else 0)

    async with open_connections(relay, 1_000, SLOW_HEAD) as opened:
        sending = asyncio.create_task(send_single_bytes(opened))
        for _ in range(5):
            await assert_connects(relay)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert await relay.metric("websocket_refusals_total") == 0, "a slow connection was closed"


@pytest.mark.timeout(120)
async def test_with_1000_slow_tls_handshakes_clients_connect(
    tls_relay_with: StartRelay,
) -> None:
    relay, count = tls_relay_with(limits=PATIENT), 1_000
    rss_bytes, descriptors = relay.rss_bytes(), relay.descriptors()
    async with open_connections(relay, count, b"", PARTIAL_CLIENT_HELLO):
        for _ in range(5):
            await assert_connects(relay)
        assert relay.descriptors() >= descriptors + count
        assert relay.rss_bytes() < rss_bytes + count * TLS_CONNECTION_BYTES
    await await_descriptors(relay, descriptors)


async def test_unfinished_tls_handshakes_end_at_the_deadline_and_free_their_descriptors(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 2})
    descriptors = relay.descriptors()
    async with open_connections(relay, 300, b"", PARTIAL_CLIENT_HELLO) as opened:
        for raw in opened:
            await raw.read_to_end()
        await await_descriptors(relay, descriptors)
    assert (await relay.get_metrics("/healthz")).status_code == 200


async def test_failed_tls_handshakes_leave_no_memory_no_descriptors_and_one_log_line(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with()

    async def fail_handshakes(count: int) -> None:
        for _ in range(count):
            async with await relay.connect_tcp() as raw:
                await raw.send(upgrade_request())
                with suppress(ConnectionError):
                    await raw.read_to_end()

    lines = len(relay.log_lines)
    await fail_handshakes(200)
    rss_bytes, descriptors = relay.rss_bytes(), relay.descriptors()
    await fail_handshakes(800)
    await await_descriptors(relay, descriptors)
    assert relay.rss_bytes() < rss_bytes + MIB
    assert len(relay.log_lines) == lines + 1, "one a minute for each reason"


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
    """Return requests that `REFUSING` refuses while one client is connected, and the statuses."""
    valid, other = f"Bearer {token('news')}", f"Bearer {token('other')}"
    forged = f"Bearer {jwt.encode({'exp': time.time() + 9}, SECRET + '!', 'HS256')}"
    news = path_of("news")
    return {
        upgrade_request("/nowhere"): 404,
        upgrade_request("/channels/a%20b"): 404,
        upgrade_request(news, Origin="https://other.example"): 403,
        upgrade_request(news): 401,
        upgrade_request(news, Authorization="Bearer nonsense"): 401,
        upgrade_request(news, Authorization=forged): 401,
        upgrade_request(news, Authorization=other): 403,
        upgrade_request(news, Authorization=valid): 503,
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


async def send_refused(relay: RelayProcess, refusals: dict[bytes, int], count: int) -> None:
    """Send so many requests, 16 at a time, of all kinds in turn; assert that each is refused."""
    requests = list(refusals.items())
    numbers = iter(range(count))

    async def send_next() -> None:
        for number in numbers:
            wire, status = requests[number % len(requests)]
            async with await relay.connect_tcp() as raw:
                with suppress(ConnectionError):
                    await raw.send(wire)
                    assert (await raw.read_response()).status == status, wire
                await raw.read_to_end()

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(send_next())


async def test_thousands_of_refused_upgrades_leave_no_memory_no_descriptors_and_few_log_lines(
    relay_with: StartRelay,
) -> None:
    relay, count = relay_with(**REFUSING), 2_000
    refusals = refused_upgrades()
    headers = {"Authorization": f"Bearer {token('news')}"}
    async with relay.client("news", additional_headers=headers):
        await send_refused(relay, refusals, 500)  # caches and free lists are full then
        before_total = await relay.metric("websocket_refusals_total")
        rss_bytes, descriptors = relay.rss_bytes(), relay.descriptors()
        lines = len(relay.log_lines)
        await send_refused(relay, refusals, count)
        assert len(relay.log_lines) <= lines + 2, "one line a minute, not one for each"
        await relay.await_metric("websocket_refusals_total", before_total + count)
        await await_descriptors(relay, descriptors)
        assert relay.rss_bytes() < rss_bytes + MIB
        assert await relay.metric("websocket_connections_total") == 1
        assert await relay.metric("websocket_connected_clients") == 1


async def test_requests_of_clients_that_do_not_wait_for_the_response_leave_nothing(
    relay: RelayProcess, channel: str
) -> None:
    wires = (
        upgrade_request(path_of(channel)),
        upgrade_request("/nowhere"),
        upgrade_request()[:-2],
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4,
    )

    async def send_and_reset(count: int) -> None:
        for number in range(count):
            async with await relay.connect_tcp() as raw:
                await raw.send(wires[number % len(wires)])
                raw.reset()
        await assert_connects(relay)  # the kernel queues this connection after all the others
        await relay.await_metric("websocket_connected_clients", 0)

    await send_and_reset(400)
    rss_bytes, descriptors = relay.rss_bytes(), relay.descriptors()
    await send_and_reset(1_000)
    await await_descriptors(relay, descriptors)
    assert relay.rss_bytes() < rss_bytes + MIB
    await relay.await_metric("websocket_channels", 0)


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(upgrade_request("/nowhere"), id="by the application"),
        pytest.param(upgrade_request(drop="Sec-WebSocket-Key"), id="as a handshake"),
        pytest.param(upgrade_request(drop="Host"), id="as a request"),
    ],
)
async def test_bytes_after_a_refusal_are_discarded_and_the_connection_aborted(
    short_deadline_relay: RelayProcess, wire: bytes
) -> None:
    rss_bytes = short_deadline_relay.rss_bytes()

    async def send_until_aborted(raw: RawClient) -> None:
        while True:
            await raw.send(upgrade_request() * 500)
            await asyncio.sleep(POLL_S)

    async with await short_deadline_relay.connect_tcp() as raw:
        await raw.send(wire)
        with pytest.raises(ConnectionError):
            await send_until_aborted(raw)
    assert await short_deadline_relay.metric("websocket_connected_clients") == 0
    assert short_deadline_relay.rss_bytes() < rss_bytes + 4 * MIB


# No descriptors left


async def test_without_free_descriptors_clients_stay_connected_and_others_connect_later(
    tmp_path: Path,
) -> None:
    settings = {"limits": {"handshake_timeout_s": 3}}
    with RelayProcess(tmp_path, settings, max_descriptors=128) as relay:
        async with relay.client("news") as client:
            lines = len(relay.log_lines)
            async with AsyncExitStack() as stack:
                idle = [
                    await stack.enter_async_context(await relay.connect_tcp()) for _ in range(400)
                ]
                for _ in range(50):
                    await assert_relays(client)
                cpu_s = relay.cpu_seconds()
                await asyncio.sleep(1)  # the interval of the measurement
                assert relay.cpu_seconds() < cpu_s + 0.5, "a busy loop"
                assert relay.descriptors() <= 128
                assert len(relay.log_lines) <= lines + 10

                async def can_connect() -> tuple[bool, object]:
                    try:
                        await assert_connects(relay)
                        return True, "connected"
                    except Exception as refusal:  # noqa: BLE001  # the library has many
                        return False, repr(refusal)

                await eventually(can_connect, "another client connected")
                for raw in idle:
                    await raw.read_to_end()
            await assert_relays(client)
            assert (await relay.get_metrics("/healthz")).status_code == 200
        assert len(relay.log_lines) <= lines + 10
        assert relay.unexpected_lines == []
