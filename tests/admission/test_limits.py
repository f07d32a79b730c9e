"""Limits: connections per address, upgrades and messages per second."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from websocket_relay.admission.client_counter import ClientCounter, network_key
from websocket_relay.admission.policy import AdmissionLimits, AdmissionPolicy, AdmissionRequest
from websocket_relay.cluster.blocks import Blocks
from websocket_relay.lifecycle import Lifecycle
from websocket_relay.origins import AllowedOrigins
from websocket_relay.token_bucket import MAX_CREDIT_S, TokenBucket
from websocket_relay.wire.publish_policy import PublishPolicy
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response

from tests.support.admission import connect_with_token, refusal_answer
from tests.support.issuer import KeyServer, key_set, make_signer
from tests.support.raw_client import CONTINUATION, PING, TEXT, frame, upgrade_request
from tests.support.relay_process import (
    RelayProcess,
    StartRelay,
    await_close,
    eventually,
    path_of,
    receive,
    receive_many,
    run_python,
)

TRUSTED_PROXY = {"trusted_proxies": ["127.0.0.0/8"]}
TOO_MANY_FROM_ADDRESS = "too many connections from this address"


def connect_from(relay: RelayProcess, host: str, channel: str, **options: Any) -> connect:
    """Connect from another address of this machine."""
    return relay.client(channel, local_addr=(host, 0), **options)


def forwarded(relay: RelayProcess, channel: str, *addresses: str) -> connect:
    """Connect as a proxy that forwards for a client; each value is one header line."""
    lines = [("X-Forwarded-For", address) for address in addresses]
    return relay.client(channel, additional_headers=lines)


def assert_limit_refusal(answer: Response, text: str) -> None:
    """Assert that the answer is the documented one at a limit."""
    assert answer.status_code == 503
    assert bytes(answer.body or b"").decode() == f"{text}\n"
    assert 1 <= int(answer.headers["Retry-After"]) <= 5


async def count_admitted(stack: AsyncExitStack, attempts: list[connect]) -> int:
    """Make all attempts at once; keep admitted clients connected until the stack is closed."""

    async def status_of(attempt: connect) -> int:
        try:
            await stack.enter_async_context(attempt)
        except InvalidStatus as refusal:
            return refusal.response.status_code
        return 101

    statuses = await asyncio.gather(*map(status_of, attempts))
    assert set(statuses) <= {101, 503}
    return statuses.count(101)


# Connections from one address


async def test_each_address_has_its_own_connection_limit(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 2})
    async with AsyncExitStack() as stack:
        for host in ("127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"):
            await stack.enter_async_context(connect_from(relay, host, channel))
        for host in ("127.0.0.2", "127.0.0.3"):
            answer = await refusal_answer(connect_from(relay, host, channel))
            assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)
        await stack.enter_async_context(connect_from(relay, "127.0.0.4", channel))
        await relay.await_metric("websocket_refusals_total", 2, reason="connections_per_ip")


async def test_a_connection_that_ended_in_any_way_no_longer_counts_for_its_address(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1, "handshake_timeout_s": 1})

    async def close_with_handshake() -> None:
        async with relay.client(channel) as client:
            await client.close()

    async def reset() -> None:
        async with relay.raw_client(channel) as raw:
            raw.reset()

    async def violate_protocol() -> None:
        async with relay.raw_client(channel) as raw:
            await raw.send(frame(TEXT, b"x", mask=False))
            await raw.read_to_end()

    async def end_stream() -> None:
        async with relay.raw_client(channel) as raw:
            raw.end_stream()
            await raw.read_to_end()

    for end_connection in (close_with_handshake, reset, violate_protocol, end_stream) * 2:
        await end_connection()
        await relay.await_metric("websocket_connected_clients", 0)
    async with relay.client(channel):
        answer = await refusal_answer(relay.client(channel))
        assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)


async def test_refused_and_aborted_upgrades_do_not_count_for_their_address(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(
        limits={"max_connections_per_ip": 1}, server={"allowed_origins": ["https://app.example"]}
    )
    for _ in range(2):
        await refusal_answer(relay.client("not%20a%20name"))
        await refusal_answer(relay.client(channel, origin="https://other.example"))
        async with await relay.connect_tcp() as raw:
            await raw.send(upgrade_request(path_of(channel), drop="Sec-WebSocket-Key"))
            await raw.read_to_end()
        async with await relay.connect_tcp() as raw:
            await raw.send(upgrade_request(path_of(channel)))
            raw.reset()
        await relay.await_metric("websocket_connected_clients", 0)
    async with relay.client(channel):
        for _ in range(2):
            await refusal_answer(relay.client(channel))
    await relay.await_metric("websocket_connected_clients", 0)
    async with relay.client(channel):
        pass


async def test_clients_that_connect_at_once_do_not_exceed_the_limits(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 10, "max_connections": 15})
    async with AsyncExitStack() as stack:
        for host, admitted in (("127.0.0.2", 10), ("127.0.0.3", 5)):
            attempts = [connect_from(relay, host, channel) for _ in range(25)]
            assert await count_admitted(stack, attempts) == admitted
        assert await relay.metric("websocket_connected_clients") == 15


async def test_clients_that_wait_for_the_same_key_do_not_exceed_the_limits(
    relay_with: StartRelay, channel: str
) -> None:
    """The limits are checked after the last await, without a suspension before the upgrade."""
    known, new = make_signer("ES256", "known"), make_signer("ES256", "new", 1)
    for limits, max_channels in (
        ({"max_connections_per_ip": 4}, 99),
        ({"max_connections": 4}, 99),
        ({}, 4),
    ):
        with KeyServer(key_set(known)) as server:
            relay = relay_with(
                auth={"mode": "jwt", "jwt": {"jwks_url": server.url, "algorithms": ["ES256"]}},
                limits=limits,
                channels={"max_channels": max_channels},
            )
            server.body = key_set(new)
            server.may_answer.clear()
            async with AsyncExitStack() as stack:
                names = [f"{channel}-{number}" for number in range(12)]
                attempts = [connect_with_token(relay, name, new.token()) for name in names]
                admitted = asyncio.create_task(count_admitted(stack, attempts))
                await asyncio.to_thread(server.block_until_requested, 2)
                server.may_answer.set()
                assert await admitted == 4


async def test_a_limit_of_zero_is_no_limit(relay: RelayProcess, channel: str) -> None:
    async with AsyncExitStack() as stack:
        assert await count_admitted(stack, [relay.client(channel) for _ in range(30)]) == 30


# Forwarded addresses


async def test_a_forwarded_address_is_ignored_unless_a_trusted_proxy_sends_it(
    relay_with: StartRelay, channel: str
) -> None:
    for server in ({}, {"trusted_proxies": ["10.0.0.0/8", "192.0.2.7"]}):
        relay = relay_with(
            {"FORWARDED_ALLOW_IPS": "*"}, limits={"max_connections_per_ip": 2}, server=server
        )
        async with (
            forwarded(relay, channel, "203.0.113.1"),
            forwarded(relay, channel, "203.0.113.2"),
        ):
            for claimed in ("203.0.113.3", "127.0.0.9", ""):
                answer = await refusal_answer(forwarded(relay, channel, claimed))
                assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)
            async with connect_from(relay, "127.0.0.2", channel):
                pass


async def test_a_client_of_a_trusted_proxy_counts_by_its_own_address(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1}, server=TRUSTED_PROXY)
    async with (
        forwarded(relay, channel, "203.0.113.1"),
        forwarded(relay, channel, "203.0.113.2"),
    ):
        for address in ("203.0.113.1", "203.0.113.2", "203.0.113.1:4711", " 203.0.113.2 "):
            answer = await refusal_answer(forwarded(relay, channel, address))
            assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)
        async with relay.client(channel):  # the proxy itself
            answer = await refusal_answer(relay.client(channel))
            assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)


CLAIMED_ADDRESSES = {
    "before the address": ["198.51.100.{}, 203.0.113.1"],
    "in a line of its own": ["198.51.100.{}", "203.0.113.1"],
    "before two proxies": ["198.51.100.{}, 203.0.113.1, 127.0.0.5"],
    "before a proxy on IPv6": ["198.51.100.{}, 203.0.113.1, ::ffff:127.0.0.5"],
    "before three proxies": ["198.51.100.{}, 203.0.113.1", "127.0.0.5", "127.0.0.6"],
    "the address of a proxy": ["127.0.0.{}, 203.0.113.1"],
    "invalid": ["nonsense-{}, 203.0.113.1:99"],
    "empty": ["{}, , 203.0.113.1"],
    "IPv4 in IPv6": ["::ffff:203.0.113.{}, ::ffff:203.0.113.1"],
}
"""Values of X-Forwarded-For. The client claims the address with the number, and has 203.0.113.1."""


async def test_a_client_of_a_trusted_proxy_can_not_claim_another_address(
    relay_with: StartRelay, channel: str
) -> None:
    """The proxy appends the address of its peer to the addresses that the client sent."""
    relay = relay_with(limits={"max_connections_per_ip": 2}, server=TRUSTED_PROXY)

    def claim(lines: list[str], number: int) -> connect:
        return forwarded(relay, channel, *(line.format(number) for line in lines))

    async with forwarded(relay, channel, "203.0.113.1"):
        for case, lines in CLAIMED_ADDRESSES.items():
            async with claim(lines, 11):
                for attempt in (
                    claim(lines, 12),
                    claim(lines, 13),
                    forwarded(relay, channel, "203.0.113.1"),
                ):
                    answer = await refusal_answer(attempt)
                    assert answer.status_code == 503, case
                    assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)
            await relay.await_metric("websocket_connected_clients", 1)


async def test_addresses_that_one_client_may_have_count_as_one(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1}, server=TRUSTED_PROXY)
    for same, other in (
        (
            ["2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "[2001:db8:1:2::3]:443"],
            "2001:db8:1:3::1",
        ),
        (["203.0.113.1", "::ffff:203.0.113.1", "::ffff:cb00:7101"], "::ffff:203.0.113.2"),
        (["unknown", "_hidden", "x" * 5000, "1.2.3.4.5"], "203.0.113.1"),
    ):
        async with forwarded(relay, channel, same[0]):
            for address in same:
                answer = await refusal_answer(forwarded(relay, channel, address))
                assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)
            async with forwarded(relay, channel, other):
                pass
        await relay.await_metric("websocket_connected_clients", 0)
        async with forwarded(relay, channel, same[-1]):
            pass
        await relay.await_metric("websocket_connected_clients", 0)


async def test_an_ipv6_client_counts(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1}, server={"host": "::1"})
    url = relay.ws_url(path_of(channel), host="[::1]")
    async with connect(url, proxy=None):
        answer = await refusal_answer(connect(url, proxy=None))
        assert_limit_refusal(answer, TOO_MANY_FROM_ADDRESS)


NETWORK_KEYS = {
    "203.0.113.7": "203.0.113.7",
    "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
    "2001:0db8:0001:0002::": "2001:db8:1:2::/64",
    "::1": "::/64",
    "::ffff:203.0.113.7": "203.0.113.7",
    "fe80::1%eth0": "fe80::/64",
    "203.0.113.07": "unknown",
    "": "unknown",
    None: "unknown",
    "localhost": "unknown",
}


@pytest.mark.fast
def test_the_key_of_an_address_is_its_ipv4_address_or_ipv6_network() -> None:
    assert {host: network_key(host) for host in NETWORK_KEYS} == NETWORK_KEYS


@pytest.mark.fast
def test_the_counter_forgets_an_address_when_its_last_client_has_disconnected() -> None:
    addresses = ClientCounter(3)
    hosts = [network_key(f"2001:db8:{number:x}::1") for number in range(1000)]
    for host in hosts * 3:
        assert addresses.is_below_limit(host)
        addresses.add_client(host)
    assert len(addresses) == 1000
    assert not any(addresses.is_below_limit(host) for host in hosts)
    for host in hosts * 3:
        addresses.remove_client(host)
    assert len(addresses) == 0


# Handshakes


async def test_upgrades_above_max_handshakes_per_s_are_refused(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_handshakes_per_s": 5})
    started_at = time.monotonic()
    admitted, refusals = 0, []
    for _ in range(40):
        try:
            async with relay.client(channel):
                admitted += 1
        except InvalidStatus as refusal:
            refusals.append(refusal.response)
    elapsed_s = time.monotonic() - started_at
    assert 5 <= admitted <= 5 + 5 * elapsed_s
    assert refusals, f"forty upgrades took {elapsed_s} s"
    for answer in refusals:
        assert_limit_refusal(answer, "too many handshakes")
    await relay.await_metric("websocket_refusals_total", len(refusals), reason="handshakes")


async def test_at_one_handshake_per_second_the_next_client_is_admitted_after_a_second(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_handshakes_per_s": 1})
    started_at = time.monotonic()
    async with relay.client(channel):
        pass

    async def is_admitted() -> tuple[bool, object]:
        try:
            async with relay.client(channel):
                return True, 101
        except InvalidStatus as refusal:
            return False, refusal.response.status_code

    await eventually(is_admitted, "admitted again")
    assert time.monotonic() - started_at >= 0.9


async def test_only_upgrades_that_pass_the_other_checks_count_as_handshakes(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(
        limits={"max_handshakes_per_s": 1}, server={"allowed_origins": ["https://app.example"]}
    )
    for _ in range(5):
        assert (await relay.get("/healthz")).status_code == 200
        assert (await relay.get("/channels/news")).status_code == 426
        assert (await refusal_answer(relay.client("not%20a%20name"))).status_code == 404
        other = relay.client(channel, origin="https://other.example")
        assert (await refusal_answer(other)).status_code == 403
    async with relay.client(channel):
        pass


async def test_refused_clients_receive_different_values_of_retry_after(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client(channel):
        answers = [await refusal_answer(relay.client(channel)) for _ in range(20)]
    assert len({answer.headers["Retry-After"] for answer in answers}) > 1


# Messages


async def test_a_client_that_sends_too_fast_is_closed_after_its_burst(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    async with relay.client(channel) as subscriber, relay.client(channel) as publisher:
        for number in range(10):  # the burst: the messages of two seconds
            await publisher.send(str(number))
        assert await receive_many(subscriber, 10) == [str(number) for number in range(10)]
        started_at = time.monotonic()
        with suppress(ConnectionClosed):
            for _ in range(1000):
                await publisher.send("above the limit")
        assert await await_close(publisher) == (1008, "rate limit")
        elapsed_s = time.monotonic() - started_at
        await relay.await_metric("websocket_closes_total", 1, reason="rate_limit")
        assert await relay.metric("websocket_messages_total") <= 10 + 10 + 5 * elapsed_s
        await subscriber.send("still connected")
        received = await receive(subscriber)
        while received != "still connected":
            assert received == "above the limit"
            received = await receive(subscriber)


async def test_messages_after_the_burst_are_not_relayed_though_they_arrive_in_one_read(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(TEXT, b"x") * 1000)
        messages = 0
        while (received := await raw.read_frame()).opcode == TEXT:
            messages += 1
        assert received.payload[2:] == b"rate limit"
        assert 10 <= messages < 20


async def test_a_client_that_stays_below_the_limit_after_its_burst_is_not_closed(
    relay_with: StartRelay, channel: str
) -> None:
    """Without new credit it would be closed at its 101st message."""
    relay = relay_with(limits={"max_messages_per_s": 50})
    async with relay.client(channel) as client:
        for number in range(90):
            await client.send(str(number))
        await receive_many(client, 90)
        started_at = time.monotonic()
        for number in range(30):
            await asyncio.sleep(max(0.0, started_at + number / 45 - time.monotonic()))
            await client.send(str(number))
            assert await receive(client) == str(number)


async def test_only_whole_messages_that_a_client_sends_count(
    relay_with: StartRelay, channel: str
) -> None:
    """Received messages, fragments and pings do not count."""
    relay = relay_with(limits={"max_messages_per_s": 1})
    async with AsyncExitStack() as stack:
        raw = await stack.enter_async_context(relay.raw_client(channel))
        await raw.send(frame(TEXT, b"a", fin=False))
        for _ in range(50):
            await raw.send(frame(CONTINUATION, b"b", fin=False) + frame(PING, b"c"))
        await raw.send(frame(CONTINUATION, b"!"))
        assert await raw.read_message() == "a" + "b" * 50 + "!"
        for _ in range(5):
            publisher = await stack.enter_async_context(relay.client(channel))
            await publisher.send("hello")
            assert await raw.read_message() == "hello"
        await raw.send(frame(TEXT, b"second"))
        assert await raw.read_message() == "second"


@pytest.mark.parametrize(("rate_per_s", "burst"), [(1, 1), (5, 10), (1000, 2000), (0.1, 5)])
@pytest.mark.fast
def test_a_token_bucket_admits_a_burst_and_then_its_rate(rate_per_s: float, burst: float) -> None:
    now = 1e6
    bucket = TokenBucket(rate_per_s, burst)
    assert sum(bucket.take(now) for _ in range(5000)) == burst
    seconds = 20
    admitted = sum(bucket.take(now + seconds * step / 40_000) for step in range(1, 40_001))
    assert abs(admitted - rate_per_s * seconds) <= 1
    assert sum(bucket.take(now + 1e5) for _ in range(5000)) == burst, "a pause refills the burst"


@pytest.mark.fast
def test_a_token_bucket_credits_paused_time_once_up_to_a_maximum() -> None:
    now = 1e6
    bucket = TokenBucket(100, 200)
    assert sum(bucket.take(now) for _ in range(5_000)) == 200
    bucket.credit_paused_time(3)
    assert sum(bucket.take(now + 3) for _ in range(5_000)) == 300, "the events of the pause"
    assert sum(bucket.take(now + 4) for _ in range(5_000)) == 100, "the usual rate afterwards"

    bucket = TokenBucket(100, 200)
    bucket.credit_paused_time(3)
    assert sum(bucket.take(now) for _ in range(5_000)) == 500
    assert sum(bucket.take(now + 1e3) for _ in range(5_000)) == 200
    bucket.credit_paused_time(1e3)
    assert sum(bucket.take(now + 1e4) for _ in range(5_000)) == 200 + 100 * MAX_CREDIT_S


# Limits that are off cost nothing


class RecordingClient:
    """Record what admission sets; stands for a connection."""

    publish_policy: PublishPolicy | None = None

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start_expiry_timer(self, seconds: float | None) -> None:
        self.calls.append("start_expiry_timer")

    def when_lost(self, callback: Callable[[], None]) -> None:
        self.calls.append("when_lost")


@pytest.mark.parametrize(
    ("limits", "calls"),
    [
        ({}, []),
        ({"max_connections": 1, "max_handshakes_per_s": 1}, []),
        ({"max_messages_per_s": 1}, []),
        ({"max_connections_per_ip": 1}, ["when_lost"]),
    ],
)
@pytest.mark.fast
async def test_admission_sets_nothing_on_a_client_for_a_limit_that_is_off(
    limits: dict[str, int], calls: list[str]
) -> None:
    """A publish policy costs time for every message."""
    off = {
        "max_connections": 0,
        "max_connections_per_ip": 0,
        "max_connections_per_user": 0,
        "max_handshakes_per_s": 0,
        "max_messages_per_s": 0,
    }
    admission = AdmissionPolicy(
        AdmissionLimits(AllowedOrigins(["*"]), **(off | limits)),
        None,
        connections=lambda: 0,
        has_descriptor=lambda: True,
        has_capacity=lambda channel: True,
        health=Lifecycle(),
        blocks=Blocks(),
        api_key="",
    )
    client = RecordingClient()
    request = AdmissionRequest(["news"], None, "", b"", [], "127.0.0.1")
    grant = await admission.admit(request)
    admission.enforce_grant(client, grant, may_publish=True)
    assert client.calls == calls
    assert (client.publish_policy is not None) is ("max_messages_per_s" in limits)


def test_a_relay_without_tokens_imports_no_code_for_them() -> None:
    script = """
import sys
from websocket_relay.app import Replica
from websocket_relay.server import run
from websocket_relay.config.model import Settings
Replica(Settings())
print([name for name in ("jwt", "httpx2") if name in sys.modules])
"""
    done = run_python("-c", script)
    assert (done.exit_code, done.stdout) == (0, "[]\n"), done.stderr
