"""Limits: how many clients from where, how many upgrades and messages in a second."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from websocket_relay.admission.ip_counter import IpCounter, network_key
from websocket_relay.admission.policy import AdmissionPolicy, AdmissionRequest
from websocket_relay.lifecycle import Lifecycle
from websocket_relay.token_bucket import MAX_CREDIT_S, TokenBucket
from websocket_relay.wire.publish_policy import PublishPolicy
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response

from tests.support.admission import bearing, refused
from tests.support.issuer import KeyServer, key_set, signer
from tests.support.raw_client import CONTINUATION, PING, TEXT, frame, upgrade_request
from tests.support.relay_process import (
    Relay,
    StartRelay,
    closed,
    path_of,
    receive,
    receive_many,
    run_python,
)

TRUSTING = {"trusted_proxies": ["127.0.0.0/8"]}


def coming_from(relay: Relay, host: str, channel: str, **options: Any) -> connect:
    """Connect from another address of this machine."""
    return relay.client(channel, local_addr=(host, 0), **options)


def forwarded(relay: Relay, channel: str, *addresses: str) -> connect:
    """Connect as a proxy does that says for whom; each address is a header line."""
    lines = [("X-Forwarded-For", address) for address in addresses]
    return relay.client(channel, additional_headers=lines)


def assert_too_many(answer: Response, text: str) -> None:
    """Insist on the documented answer at a limit."""
    assert answer.status_code == 503
    assert bytes(answer.body or b"").decode() == f"{text}\n"
    assert 1 <= int(answer.headers["Retry-After"]) <= 5


FROM_HERE = "too many connections from this address"


async def count_let_in(stack: AsyncExitStack, attempts: list[connect]) -> int:
    """Make all attempts at the same time; keep those who get in until the stack is closed."""

    async def come_in(attempt: connect) -> int:
        try:
            await stack.enter_async_context(attempt)
        except InvalidStatus as refusal:
            return refusal.response.status_code
        return 101

    answers = await asyncio.gather(*map(come_in, attempts))
    assert set(answers) <= {101, 503}
    return answers.count(101)


# Connections from one address


async def test_an_address_has_so_many_clients_and_another_its_own(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 2})
    async with AsyncExitStack() as stack:
        for host in ("127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"):
            await stack.enter_async_context(coming_from(relay, host, channel))
        for host in ("127.0.0.2", "127.0.0.3"):
            assert_too_many(await refused(coming_from(relay, host, channel)), FROM_HERE)
        await stack.enter_async_context(coming_from(relay, "127.0.0.4", channel))
        await relay.metric_is("websocket_refusals_total", 2, reason="connections_per_ip")


async def test_a_place_is_free_again_once_the_connection_has_ended_however_it_did(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1, "handshake_timeout_s": 1})

    async def polite() -> None:
        async with relay.client(channel) as client:
            await client.close()

    async def vanishing() -> None:
        async with relay.raw_client(channel) as raw:
            raw.vanish()

    async def rude() -> None:
        async with relay.raw_client(channel) as raw:
            await raw.send(frame(TEXT, b"x", mask=False))
            await raw.ended()

    async def silent() -> None:
        async with relay.raw_client(channel) as raw:
            raw.finish()
            await raw.ended()

    for leave in (polite, vanishing, rude, silent) * 3:
        await leave()
        await relay.metric_is("websocket_connected_clients", 0)
    async with relay.client(channel):
        assert_too_many(await refused(relay.client(channel)), FROM_HERE)


async def test_refused_clients_take_no_place(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(
        limits={"max_connections_per_ip": 1}, server={"allowed_origins": ["https://app.example"]}
    )
    for _ in range(5):
        await refused(relay.client("not%20a%20name"))
        await refused(relay.client(channel, origin="https://other.example"))
        async with await relay.tcp() as raw:
            await raw.send(upgrade_request(path_of(channel), drop="Sec-WebSocket-Key"))
            await raw.ended()
        async with await relay.tcp() as raw:
            await raw.send(upgrade_request(path_of(channel)))
            raw.vanish()
        await relay.metric_is("websocket_connected_clients", 0)
    async with relay.client(channel):
        for _ in range(5):
            await refused(relay.client(channel))
    await relay.metric_is("websocket_connected_clients", 0)
    async with relay.client(channel):
        pass


async def test_the_limits_hold_however_many_come_at_once(
    relay_with: StartRelay, channel: str
) -> None:
    limits = {"max_connections_per_ip": 10, "max_connections": 15}
    relay = relay_with(limits=limits)
    async with AsyncExitStack() as stack:
        here = [coming_from(relay, "127.0.0.2", channel) for _ in range(50)]
        assert await count_let_in(stack, here) == 10
        there = [coming_from(relay, "127.0.0.3", channel) for _ in range(50)]
        assert await count_let_in(stack, there) == 5
        assert await relay.metric("websocket_connected_clients") == 15


async def test_the_limits_hold_though_all_waited_for_the_same_key(
    relay_with: StartRelay, channel: str
) -> None:
    """They are looked at after the last wait, in one go with the upgrade."""
    known, new = signer("ES256", "known"), signer("ES256", "new", 1)
    for limits, channels in (
        ({"max_connections_per_ip": 4}, 99),
        ({"max_connections": 4}, 99),
        ({}, 4),
    ):
        with KeyServer(key_set(known)) as server:
            relay = relay_with(
                auth={"mode": "jwt", "jwt": {"jwks_url": server.url, "algorithms": ["ES256"]}},
                limits=limits,
                channels={"max_channels": channels},
            )
            server.body = key_set(new)
            server.go_on.clear()
            async with AsyncExitStack() as stack:
                names = [f"{channel}-{number}" for number in range(30)]
                attempts = [bearing(relay, name, new.token()) for name in names]
                let_in = asyncio.create_task(count_let_in(stack, attempts))
                await asyncio.to_thread(server.await_requests, 2)
                server.go_on.set()
                assert await let_in == 4


async def test_a_limit_of_zero_is_none(relay: Relay, channel: str) -> None:
    async with AsyncExitStack() as stack:
        assert await count_let_in(stack, [relay.client(channel) for _ in range(60)]) == 60


# Behind proxies


async def test_nobody_is_believed_who_is_no_trusted_proxy(
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
                assert_too_many(await refused(forwarded(relay, channel, claimed)), FROM_HERE)
            async with coming_from(relay, "127.0.0.2", channel):
                pass


async def test_behind_a_trusted_proxy_the_client_counts_and_not_the_proxy(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1}, server=TRUSTING)
    async with (
        forwarded(relay, channel, "203.0.113.1"),
        forwarded(relay, channel, "203.0.113.2"),
    ):
        for address in ("203.0.113.1", "203.0.113.2", "203.0.113.1:4711", " 203.0.113.2 "):
            assert_too_many(await refused(forwarded(relay, channel, address)), FROM_HERE)
        async with relay.client(channel):  # the proxy itself
            assert_too_many(await refused(relay.client(channel)), FROM_HERE)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["198.51.100.{}, 203.0.113.1"], id="in front"),
        pytest.param(["198.51.100.{}", "203.0.113.1"], id="in a line of its own"),
        pytest.param(["198.51.100.{}, 203.0.113.1, 127.0.0.5"], id="two proxies"),
        pytest.param(["198.51.100.{}, 203.0.113.1, ::ffff:127.0.0.5"], id="a proxy on IPv6"),
        pytest.param(["198.51.100.{}, 203.0.113.1", "127.0.0.5", "127.0.0.6"], id="three"),
        pytest.param(["127.0.0.{}, 203.0.113.1"], id="a proxy's address in front"),
        pytest.param(["nonsense-{}, 203.0.113.1:99"], id="nonsense in front"),
        pytest.param(["{}, , 203.0.113.1"], id="nothing in front"),
        pytest.param(["::ffff:203.0.113.{}, ::ffff:203.0.113.1"], id="IPv4 in IPv6"),
    ],
)
async def test_a_client_behind_a_trusted_proxy_can_not_claim_another_address(
    relay_with: StartRelay, channel: str, lines: list[str]
) -> None:
    """The proxy writes the address it sees behind whatever the client had said."""
    relay = relay_with(limits={"max_connections_per_ip": 2}, server=TRUSTING)

    def spoofing(number: int) -> connect:
        return forwarded(relay, channel, *(line.format(number) for line in lines))

    async with spoofing(11), spoofing(12):
        for number in (13, 14):
            assert_too_many(await refused(spoofing(number)), FROM_HERE)
        assert_too_many(await refused(forwarded(relay, channel, "203.0.113.1")), FROM_HERE)


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (["2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "[2001:db8:1:2::3]:443"], "2001:db8:1:3::1"),
        (["203.0.113.1", "::ffff:203.0.113.1", "::ffff:cb00:7101"], "::ffff:203.0.113.2"),
        (["unknown", "_hidden", "x" * 5000, "1.2.3.4.5"], "203.0.113.1"),
    ],
)
async def test_addresses_that_one_client_may_have_count_as_one(
    relay_with: StartRelay, channel: str, same: list[str], other: str
) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1}, server=TRUSTING)
    async with forwarded(relay, channel, same[0]):
        for address in same:
            assert_too_many(await refused(forwarded(relay, channel, address)), FROM_HERE)
        async with forwarded(relay, channel, other):
            pass
    await relay.metric_is("websocket_connected_clients", 0)
    async with forwarded(relay, channel, same[-1]):
        pass


async def test_an_ipv6_client_counts(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(limits={"max_connections_per_ip": 1}, server={"host": "::1"})
    url = relay.ws_url(path_of(channel), host="[::1]")
    async with connect(url, proxy=None):
        assert_too_many(await refused(connect(url, proxy=None)), FROM_HERE)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:0db8:0001:0002::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("203.0.113.07", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
        ("localhost", "unknown"),
    ],
)
def test_an_address_stands_for_its_network(host: str | None, network: str) -> None:
    assert network_key(host) == network


@pytest.mark.fast
def test_nothing_is_kept_of_an_address_once_its_clients_have_left() -> None:
    addresses = IpCounter(3)
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


async def test_upgrades_past_so_many_in_a_second_are_refused(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_handshakes_per_s": 5})
    started = time.monotonic()
    let_in, refusals = 0, []
    for _ in range(40):
        try:
            async with relay.client(channel):
                let_in += 1
        except InvalidStatus as refusal:
            refusals.append(refusal.response)
    elapsed_s = time.monotonic() - started
    assert 5 <= let_in <= 5 + 5 * elapsed_s
    assert refusals, f"forty upgrades took {elapsed_s} s"
    for answer in refusals:
        assert_too_many(answer, "too many handshakes")
    await relay.metric_is("websocket_refusals_total", len(refusals), reason="handshakes")


async def test_one_upgrade_a_second_is_let_in_again_after_a_while(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_handshakes_per_s": 1})
    started = time.monotonic()
    let_in = 0
    while let_in < 3:
        try:
            async with relay.client(channel):
                let_in += 1
        except InvalidStatus:
            await asyncio.sleep(0.05)
    assert time.monotonic() - started >= 1.9


async def test_only_upgrades_that_could_be_let_in_count_as_handshakes(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(
        limits={"max_handshakes_per_s": 1}, server={"allowed_origins": ["https://app.example"]}
    )
    for _ in range(10):
        assert (await relay.get("/healthz")).status_code == 200
        assert (await relay.get("/channels/news")).status_code == 426
        assert (await refused(relay.client("not%20a%20name"))).status_code == 404
        other = relay.client(channel, origin="https://other.example")
        assert (await refused(other)).status_code == 403
    async with relay.client(channel):
        pass


async def test_refused_clients_are_told_different_times_to_come_back(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client(channel):
        answers = [await refused(relay.client(channel)) for _ in range(40)]
    assert len({answer.headers["Retry-After"] for answer in answers}) > 1


# Messages


async def test_a_client_that_sends_too_fast_is_closed_after_its_burst(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    async with relay.client(channel) as listener, relay.client(channel) as flooder:
        for number in range(10):  # twice as many as a second's
            await flooder.send(str(number))
        assert await receive_many(listener, 10) == [str(number) for number in range(10)]
        started = time.monotonic()
        with suppress(ConnectionClosed):
            for _ in range(1000):
                await flooder.send("too much")
        assert await closed(flooder) == (1008, "rate limit")
        elapsed_s = time.monotonic() - started
        await relay.metric_is("websocket_closes_total", 1, reason="rate_limit")
        assert await relay.metric("websocket_messages_total") <= 10 + 10 + 5 * elapsed_s
        await listener.send("still here")
        heard = await receive(listener)
        while heard != "still here":
            assert heard == "too much"
            heard = await receive(listener)


async def test_a_flood_in_one_piece_is_cut_after_the_burst(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(TEXT, b"x") * 1000)
        heard = 0
        while (received := await raw.frame()).opcode == TEXT:
            heard += 1
        assert received.payload[2:] == b"rate limit"
        assert 10 <= heard < 20


async def test_who_sends_no_faster_than_the_limit_stays(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 50})
    async with relay.client(channel) as client:
        started = time.monotonic()
        for number in range(150):
            await asyncio.sleep(max(0.0, started + number / 45 - time.monotonic()))
            await client.send(str(number))
            assert await receive(client) == str(number)


async def test_only_whole_messages_of_its_own_count(relay_with: StartRelay, channel: str) -> None:
    """Neither what a client hears, nor fragments, nor pings."""
    relay = relay_with(limits={"max_messages_per_s": 1})
    async with AsyncExitStack() as stack:
        raw = await stack.enter_async_context(relay.raw_client(channel))
        await raw.send(frame(TEXT, b"a", fin=False))
        for _ in range(50):
            await raw.send(frame(CONTINUATION, b"b", fin=False) + frame(PING, b"c"))
        await raw.send(frame(CONTINUATION, b"!"))
        assert await raw.message() == "a" + "b" * 50 + "!"
        for _ in range(10):
            speaker = await stack.enter_async_context(relay.client(channel))
            await speaker.send("hello")
            assert await raw.message() == "hello"
        await raw.send(frame(TEXT, b"mine"))
        assert await raw.message() == "mine"


@pytest.mark.parametrize(("rate", "burst"), [(1, 1), (5, 10), (1000, 2000), (0.1, 5)])
@pytest.mark.fast
def test_a_rate_lets_a_burst_pass_and_then_so_much_a_second(rate: float, burst: float) -> None:
    now = 1e6
    bucket = TokenBucket(rate, burst)
    assert sum(bucket.take(now) for _ in range(5000)) == burst
    seconds = 20
    taken = sum(bucket.take(now + seconds * step / 100_000) for step in range(1, 100_001))
    assert abs(taken - rate * seconds) <= 1
    assert sum(bucket.take(now + 1e5) for _ in range(5000)) == burst, "a rest fills it, no more"


@pytest.mark.fast
def test_a_rate_makes_good_for_time_in_which_nothing_could_happen() -> None:
    now = 1e6
    bucket = TokenBucket(100, 200)
    assert sum(bucket.take(now) for _ in range(5_000)) == 200
    bucket.credit_paused_time(3)
    assert sum(bucket.take(now + 3) for _ in range(5_000)) == 300, "what came meanwhile, no more"
    assert sum(bucket.take(now + 4) for _ in range(5_000)) == 100, "and the same rate from then on"


@pytest.mark.fast
def test_a_rate_makes_good_once_and_not_for_an_age() -> None:
    now = 1e6
    bucket = TokenBucket(100, 200)
    bucket.credit_paused_time(3)
    assert sum(bucket.take(now) for _ in range(5_000)) == 500
    assert sum(bucket.take(now + 1e3) for _ in range(5_000)) == 200
    bucket.credit_paused_time(1e3)
    assert sum(bucket.take(now + 1e4) for _ in range(5_000)) == 200 + 100 * MAX_CREDIT_S


# What costs nothing where it is not asked for


class Guest:
    """Stands for a connection, and notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def set_publish_policy(self, policy: PublishPolicy) -> None:
        self.asked.append("allow")

    def start_expiry_timer(self, seconds: float) -> None:
        self.asked.append("expire")

    def when_lost(self, act: Callable[[], None]) -> None:
        self.asked.append("lost")


@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        ({}, []),
        ({"max_connections": 1, "max_handshakes_per_s": 1}, []),
        ({"max_messages_per_s": 1}, ["allow"]),
        ({"max_connections_per_ip": 1}, ["lost"]),
    ],
)
@pytest.mark.fast
async def test_nothing_watches_a_client_for_a_limit_that_is_off(
    limits: dict[str, int], asked: list[str]
) -> None:
    """Every message passes an allowance where there is one."""
    off = {
        "max_connections": 0,
        "max_connections_per_ip": 0,
        "max_handshakes_per_s": 0,
        "max_messages_per_s": 0,
    }
    admission = AdmissionPolicy(
        allowed_origins=["*"],
        **(off | limits),
        tokens=None,
        connections=lambda: 0,
        has_descriptor=lambda: True,
        has_room=lambda channel: True,
        health=Lifecycle(),
    )
    guest = Guest()
    admission.enforce_grant(
        guest, await admission.admit(AdmissionRequest("news", {}, b"", [], "127.0.0.1"))
    )
    assert guest.asked == asked


def test_a_relay_without_tokens_loads_no_code_for_them() -> None:
    script = """
import sys
from websocket_relay import app
from websocket_relay.server import run
from websocket_relay.config.model import Settings
app.build(Settings(), None, run.load_tokens(Settings()))
print([name for name in ("jwt", "httpx2") if name in sys.modules])
"""
    done = run_python("-c", script)
    assert (done.exit_code, done.stdout) == (0, "[]\n"), done.stderr
