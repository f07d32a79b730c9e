"""The contract of all backplanes: memory, Redis and NATS. Each test has its own real broker."""

import asyncio
import logging
import random
import subprocess
import sys
import time
from asyncio import StreamWriter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from websocket_relay.backplane import nats
from websocket_relay.backplane.factory import MIN_RETENTION, open_backplane
from websocket_relay.backplane.interface import Position
from websocket_relay.backplane.producer import PACKET_BYTES
from websocket_relay.backplane.timings import Timings
from websocket_relay.cancellation import cancel_until_done
from websocket_relay.messages import BINARY, TEXT
from websocket_relay.outcomes import UnusableSettingError

from tests.support.broker_logs import (
    QUICK_OUTAGES,
    BackplaneLog,
    BackplaneReplica,
    BrokerLog,
    Pending,
    assert_increasing,
    make_broker,
    make_log,
    wait_until,
)
from tests.support.certificates import make_pair
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, eventually
from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

SECRET = "s3cret-%2F-pass"
PLAIN_SECRET = "s3cret-/-pass"

EACH_REDIS = ["redis", "redis-6.2", "nats"]
"""Redis 6.2 is the oldest that is supported. It runs the same commands, and the same script."""


@pytest.fixture(params=["memory", "redis", "nats"])
async def log(
    request: pytest.FixtureRequest, stack: AsyncExitStack, tmp_path: Path
) -> BackplaneLog:
    if request.param == "memory":
        return BackplaneLog(stack, None, "memory://")
    broker = await stack.enter_async_context(make_broker(request.param, tmp_path / "broker"))
    return make_log(request.param, stack, broker)


@pytest.fixture(autouse=True)
def no_errors_of_libraries(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Assert that no task ends in an unhandled exception, and no library logs an error."""
    caplog.set_level(logging.DEBUG)
    yield
    assert [
        record.getMessage()
        for record in caplog.records
        if not record.name.startswith("websocket_relay") and record.levelno > logging.WARNING
    ] == []


def numbered(name: str, count: int) -> list[bytes]:
    return [f"{name} {number}".encode() for number in range(count)]


async def append_concurrently(
    replicas: Sequence[BackplaneReplica], count: int, pause_s: float = 0
) -> list[bytes]:
    """Append messages of five clients of each replica at random times; return all of them."""
    appended = []

    async def append(replica: BackplaneReplica, name: str) -> None:
        for payload in numbered(name, count):
            replica.publish(payload)
            appended.append(payload)
            if random.random() < 0.3 or pause_s:
                await asyncio.sleep(random.uniform(0, pause_s))

    names = [(each, f"{index}/{one}") for index, each in enumerate(replicas) for one in range(5)]
    await asyncio.gather(*(append(*each) for each in names))
    return appended


def assert_order_of_each_client(delivered: list[bytes], appended: list[bytes]) -> None:
    """Assert that all messages were delivered once, those of one client in their order."""
    assert len(delivered) == len(appended)
    by_client: dict[bytes, list[int]] = {}
    for payload in delivered:
        client, _, number = payload.rpartition(b" ")
        by_client.setdefault(client, []).append(int(number))
    assert sum(map(len, by_client.values())) == len(set(appended))
    assert all(numbers == list(range(len(numbers))) for numbers in by_client.values())


async def read_heartbeats(replica: BackplaneReplica, count: int) -> None:
    """Wait until a replica has read back some more of its heartbeats."""
    target = len(replica.lags_s) + count
    await wait_until(lambda: len(replica.lags_s) >= target)


# The order


@pytest.mark.parametrize("log", ["memory", *EACH_REDIS], indirect=True)
async def test_all_replicas_deliver_the_messages_of_all_clients_in_one_order(
    log: BackplaneLog,
) -> None:
    replicas = await log.start_replicas(3)
    appended = await append_concurrently(replicas, 100)
    for replica in replicas:
        await replica.await_count(len(appended))
        assert replica.entries == replicas[0].entries
    assert_order_of_each_client(replicas[0].payloads, appended)
    assert_increasing(replicas[0].positions)


async def test_messages_are_delivered_unchanged(log: BackplaneLog) -> None:
    replica = (await log.start_replicas(2))[-1]
    messages = [
        ("a", TEXT, "grüße".encode()),
        ("a" * 128, BINARY, bytes(range(256))),
        ("A.b_c:d-e", BINARY, b""),
        ("a", TEXT, b""),
    ]
    for channel, kind, payload in messages:
        replica.publish(payload, channel=channel, kind=kind)
    await replica.await_count(len(messages))
    assert [entry[1:] for entry in replica.entries] == messages


async def test_positions_grow_when_a_replica_restarts(log: BackplaneLog) -> None:
    before = await log.start_replica()
    before.publish(*numbered("before", 10))
    await before.await_count(10)
    await before.stop()
    await asyncio.sleep(0.002)  # the epoch of the log in memory is its start time in milliseconds
    after = await log.start_replica()
    after.publish(*numbered("after", 10))
    await after.await_payloads(*numbered("after", 10))
    assert after.positions[-10] > before.positions[-1]
    assert_increasing(after.positions)


async def test_positions_grow_and_no_message_is_lost_when_a_broker_restarts(
    broker_log: BrokerLog,
) -> None:
    replica = await broker_log.start_replica()
    replica.publish(b"before")
    await replica.await_count(1)
    broker_log.broker.stop()
    replica.publish(b"while it was stopped")
    await broker_log.broker.start()
    await replica.await_count(2)
    await broker_log.broker.restart()
    replica.publish(b"after it was killed")
    await replica.await_count(3)
    assert replica.payloads == [b"before", b"while it was stopped", b"after it was killed"]
    assert_increasing(replica.positions)


async def test_a_replica_that_starts_reads_the_retained_log_before_it_is_up(
    broker_log: BrokerLog,
) -> None:
    first = await broker_log.start_replica()
    first.publish(*numbered("early", 100))
    first.publish(b"x" * 2_000_000)
    await first.await_count(101)
    second = await broker_log.start_replica()
    assert second.entries == first.entries


async def test_a_replica_reports_the_position_after_which_its_log_is_complete(
    log: BackplaneLog,
) -> None:
    first = await log.start_replica()
    first.publish(b"first")
    await first.await_count(1)
    assert len(first.gap_positions) == 1
    assert Position(0, 0, 0) < first.gap_positions[0] < first.positions[0]


async def test_large_messages_keep_their_order_among_small_ones(log: BackplaneLog) -> None:
    replicas = await log.start_replicas(2)
    random_bytes = random.Random(4).randbytes
    messages = [
        payload
        for size in (1 << 20, 3 << 20, 1, (1 << 20) - 30, (1 << 20) + 1)
        for payload in (b"small", random_bytes(size))
    ]
    for number, payload in enumerate(messages):
        replicas[number % len(replicas)].publish(payload, kind=BINARY)
        await replicas[0].await_count(number + 1)
    for replica in replicas:
        await replica.await_count(len(messages))
        assert replica.payloads == messages


async def test_messages_around_the_size_of_a_packet_are_delivered_in_order(
    log: BackplaneLog,
) -> None:
    replicas = await log.start_replicas(2)
    sizes = [PACKET_BYTES + more for more in (-8, -7, -6, 0, 1)]
    messages = [bytes([index]) * size for index, size in enumerate(sizes * 3)]
    messages += [b""] * 20_000  # more than fit into one packet
    replicas[0].publish(*messages, kind=BINARY)
    for replica in replicas:
        await replica.await_count(len(messages))
        assert replica.payloads == messages
        assert_increasing(replica.positions)


async def test_streams_of_one_broker_are_separate(broker_log: BrokerLog) -> None:
    one, other = (
        await broker_log.start_replica(),
        await broker_log.start_replica(stream="{other}:1"),
    )
    one.publish(*numbered("one", 50))
    other.publish(*numbered("other", 50))
    await one.await_payloads(*numbered("one", 50))
    await other.await_payloads(*numbered("other", 50))
    assert one.payloads == numbered("one", 50)
    assert other.payloads == numbered("other", 50)


async def test_no_bytes_are_pending_after_a_flush(log: BackplaneLog) -> None:
    replica = await log.start_replica()
    replica.publish(*numbered("message", 5000))
    async with asyncio.timeout(5):
        await replica.backplane.flush()
    assert replica.pending.bytes == 0
    await replica.await_count(5000)


async def test_a_replica_that_pauses_reading_loses_no_message_and_has_no_outage(
    broker_log: BrokerLog, short_outage_timeout: None
) -> None:
    publisher, paused = await broker_log.start_replicas(2)
    paused.backplane.pause_reading()
    publisher.publish(*numbered("message", 1000))
    await publisher.await_count(1000)
    await read_heartbeats(publisher, 6)  # longer than what makes an outage
    assert len(paused.entries) <= 1000
    paused.backplane.resume_reading()
    await paused.await_count(1000)
    assert paused.entries == publisher.entries
    assert paused.backplane.counters.outages == 0
    assert paused.backplane.counters.gaps == 0


async def test_a_heartbeat_measures_the_lag(
    broker_log: BrokerLog, frequent_heartbeats: None
) -> None:
    started_at = time.monotonic()
    replica = await broker_log.start_replica()
    await read_heartbeats(replica, 2)
    assert 0 < min(replica.lags_s) < time.monotonic() - started_at


# A broker that is killed, slow, frozen or absent


async def test_a_broker_killed_amid_traffic_loses_no_message_and_repeats_none(
    broker_log: BrokerLog,
) -> None:
    replicas = await broker_log.start_replicas(2)
    appending = asyncio.create_task(append_concurrently(replicas, 100, pause_s=0.02))
    for _ in range(2):
        await replicas[0].await_count(len(replicas[0].entries) + 100)
        await broker_log.broker.restart()
    appended = await appending
    for replica in replicas:
        await replica.await_count(len(appended))
        await replica.backplane.flush()
        assert replica.entries == replicas[0].entries
        assert replica.publisher.failures == 0
        assert replica.backplane.counters.lost == replica.backplane.counters.gaps == 0
    assert_order_of_each_client(replicas[0].payloads, appended)


async def test_a_slow_broker_loses_no_message_and_causes_no_outage(broker_log: BrokerLog) -> None:
    replicas = await broker_log.start_replicas(2)

    async def slow_down() -> None:
        while True:
            broker_log.broker.freeze()
            await asyncio.sleep(0.2)  # most of the time
            broker_log.broker.thaw()
            await asyncio.sleep(0.05)

    slowing = asyncio.create_task(slow_down())
    appended = await append_concurrently(replicas, 100, pause_s=0.02)
    for replica in replicas:
        await replica.await_count(len(appended))
    slowing.cancel()
    await asyncio.gather(slowing, return_exceptions=True)
    broker_log.broker.thaw()
    for replica in replicas:
        assert replica.entries == replicas[0].entries
        assert replica.publisher.failures == replica.backplane.counters.outages == 0
    assert_order_of_each_client(replicas[0].payloads, appended)


async def test_a_replica_that_starts_before_its_broker_waits_for_it(
    stack: AsyncExitStack,
    kind: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = make_broker(kind, tmp_path)
    log = make_log(kind, stack, broker)
    log.timings = QUICK_OUTAGES
    replica = await log.start_replica(await_up=False)
    await replica.await_outage()
    assert not replica.backplane.up.is_set()
    failed = [each for each in caplog.records if each.getMessage() == "backplane failed"]
    assert 1 <= len(failed) <= 4, "a line for every attempt"
    await stack.enter_async_context(broker)
    await replica.await_up()
    replica.publish(b"now")
    await replica.await_count(1)


async def test_a_frozen_broker_is_an_outage_in_which_messages_are_rejected(
    broker_log: BrokerLog, short_outage_timeout: None
) -> None:
    replicas = await broker_log.start_replicas(2)
    replicas[0].publish(b"before")
    await replicas[1].await_count(1)
    await replicas[0].await_up()  # a busy machine may have delayed the broker by a second
    broker_log.broker.freeze()
    replicas[0].publish(*numbered("unconfirmed", 100))
    for replica in replicas:
        await replica.await_outage()
        assert not replica.backplane.up.is_set()
    assert replicas[0].publisher.failures == 1
    assert replicas[0].pending.bytes == 0
    replicas[0].publish(b"rejected", b"rejected")
    assert replicas[0].publisher.failures == 3
    assert replicas[0].backplane.counters.unavailable == 102
    broker_log.broker.thaw()
    for replica in replicas:
        await replica.await_up()
    replicas[0].publish(b"after")
    for replica in replicas:
        await replica.await_payloads(b"after")
        assert replica.backplane.counters.lost == 0
    assert replicas[0].entries == replicas[1].entries
    # The append in flight when the broker froze may be in the log.
    assert replicas[0].payloads in (
        [b"before", b"after"],
        [b"before", *numbered("unconfirmed", 100), b"after"],
    )


async def test_a_frozen_broker_is_an_outage_in_which_messages_are_relayed_locally(
    broker_log: BrokerLog, short_outage_timeout: None
) -> None:
    replicas = [await broker_log.start_replica(on_outage="local") for _ in range(2)]
    replicas[0].publish(b"before")
    for replica in replicas:
        await replica.await_count(1)
    await replicas[0].await_up()  # a busy machine may have delayed the broker by a second
    broker_log.broker.freeze()
    replicas[0].publish(*numbered("unconfirmed", 10))
    await replicas[0].await_count(11)
    replicas[0].publish(b"local")
    assert replicas[0].payloads == [b"before", *numbered("unconfirmed", 10), b"local"]
    assert replicas[0].backplane.counters.local == 11
    await replicas[1].await_outage()
    broker_log.broker.thaw()
    for replica in replicas:
        await replica.await_up()
    replicas[1].publish(b"after")
    for replica in replicas:
        await replica.await_payloads(b"after")
        assert replica.backplane.counters.lost == replica.publisher.failures == 0
        assert_increasing(replica.positions)
    assert replicas[0].payloads == [b"before", *numbered("unconfirmed", 10), b"local", b"after"]
    assert b"local" not in replicas[1].payloads


class BrokerConnection(NamedTuple):
    """A connection of this machine to a broker, as /proc/net/tcp describes it."""

    local_address: str
    state: str
    unsent_bytes: int


RELEASED_STATES = {"05", "06"}
"""FIN-WAIT-2 and TIME-WAIT: closed, without unsent bytes; the kernel keeps them for a while."""


def connections_to(port: int) -> list[BrokerConnection]:
    """Return the connections to a port of this machine that are not released."""
    tables = "".join(Path(f"/proc/net/{each}").read_text() for each in ("tcp", "tcp6"))
    rows = [line.split() for line in tables.splitlines()]
    return [
        BrokerConnection(local, state, int(queues.partition(":")[0], 16))
        for _, local, remote, state, queues, *_ in rows
        if remote.endswith(f":{port:04X}") and state not in RELEASED_STATES
    ]


async def test_a_long_outage_leaves_no_connections_and_no_pending_bytes(
    broker_log: BrokerLog,
) -> None:
    broker_log.timings = replace(QUICK_OUTAGES, append_timeout_s=0.3)
    replica = await broker_log.start_replica()
    broker_log.broker.freeze()
    replica.publish(b"x" * 1_000_000)
    await replica.await_outage()
    local_addresses: set[str] = set()

    async def reconnections() -> tuple[bool, object]:
        current = connections_to(broker_log.broker.port)
        local_addresses.update(each.local_address for each in current)
        return len(local_addresses) >= 4, local_addresses

    await eventually(reconnections, "some reconnections")
    current = connections_to(broker_log.broker.port)
    assert len(current) <= 4
    assert sum(each.unsent_bytes for each in current) < 3_000_000
    await replica.stop()
    assert replica.pending.bytes == 0


async def test_a_frozen_broker_does_not_delay_the_stop_of_a_replica(broker_log: BrokerLog) -> None:
    replica = await broker_log.start_replica()
    broker_log.broker.freeze()
    replica.publish(b"x" * 3_000_000)
    await wait_until(
        lambda: any(each.unsent_bytes for each in connections_to(broker_log.broker.port))
    )
    await replica.stop()


class ResponseLosingProxy(TcpProxy):
    """Ends the connection that a marker was sent on, instead of the response to it.

    Attributes:
        marker: bytes of a request; empty: no connection ends.
        lost_responses: the count of those that were not passed on.
    """

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.marker = b""
        self.lost_responses = 0
        self._marked: ProxiedConnection | None = None

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes:
        if self.marker and self.marker in data:
            self.marker, self._marked = b"", connection
        return data

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        if connection is self._marked and not data.startswith(b"PING"):
            self.lost_responses += 1
            return None
        return data


@pytest.mark.parametrize("size", [10, 2_000_000])
async def test_an_append_whose_response_is_lost_is_delivered_once(
    broker_log: BrokerLog, stack: AsyncExitStack, size: int
) -> None:
    proxy = await stack.enter_async_context(ResponseLosingProxy(broker_log.broker.port))
    other = await broker_log.start_replica()
    url = broker_log.url.replace(str(broker_log.broker.port), str(proxy.port))
    replica = await broker_log.start_replica(url=url)
    proxy.marker = b"marked"
    messages = [b"marked" + bytes(size), *numbered("after", 10)]
    replica.publish(*messages)
    for each in (replica, other):
        await each.await_count(11)
        await each.backplane.flush()
        assert each.payloads == messages
    assert proxy.lost_responses == 1
    assert replica.publisher.failures == replica.backplane.counters.lost == 0
    if size == 10:
        for each in (replica, other):
            await each.await_duplicates(1)
            assert each.payloads == messages


# Retention


@pytest.mark.parametrize("kind", EACH_REDIS)
async def test_a_stream_retains_about_as_many_bytes_as_its_limit(
    broker_log: BrokerLog,
) -> None:
    retention = MIN_RETENTION._replace(max_bytes=2_000_000)
    replica = await broker_log.start_replica(min_retention=retention)
    messages = [b"%d " % number + bytes(50_000) for number in range(100)]
    for number, payload in enumerate(messages):
        replica.publish(payload)
        await replica.await_count(number + 1)
    assert 1_500_000 < await broker_log.size_bytes() < 4_000_000
    assert replica.payloads == messages
    late = await broker_log.start_replica(min_retention=retention)
    assert 30 <= len(late.entries) <= 80
    assert late.entries == replica.entries[-len(late.entries) :]
    assert replica.positions[-len(late.entries) - 1] < late.gap_positions[0] < late.positions[0]


async def test_a_stream_retains_no_entries_above_its_age_limit(
    broker_log: BrokerLog, frequent_heartbeats: None
) -> None:
    retention = MIN_RETENTION._replace(max_age_s=1.0)
    replica = await broker_log.start_replica(min_retention=retention)
    for number in range(10):
        replica.publish(bytes(10_000))
        await replica.await_count(number + 1)

    async def size() -> tuple[bool, object]:
        size_bytes = await broker_log.size_bytes()
        return size_bytes < 10_000, size_bytes

    await eventually(size, "only heartbeats are retained")  # Redis trims at each append
    replica.publish(b"young")
    await replica.await_count(11)
    late = await broker_log.start_replica(min_retention=retention)
    assert late.payloads == [b"young"]
    assert replica.backplane.counters.gaps == 0


# A stream that is modified by other programs


@pytest.mark.parametrize("kind", EACH_REDIS)
async def test_replicas_continue_after_their_stream_is_deleted(broker_log: BrokerLog) -> None:
    replicas = await broker_log.start_replicas(2)
    replicas[0].publish(b"before")
    await replicas[1].await_count(1)
    await broker_log.delete_stream()
    replicas[0].publish(b"after")
    for replica in replicas:
        await replica.await_payloads(b"after")
        assert replica.payloads == [b"before", b"after"]
        assert_increasing(replica.positions)
    new = await broker_log.start_replica()
    assert new.payloads == [b"after"]
    assert new.gap_positions[-1] > replicas[0].positions[0]


@pytest.mark.parametrize("kind", EACH_REDIS)
async def test_positions_grow_after_a_stream_goes_back_to_an_earlier_state(
    broker_log: BrokerLog,
) -> None:
    replica = await broker_log.start_replica()
    replica.publish(b"before")
    await replica.await_count(1)
    await broker_log.rewind(replica)
    await wait_until(lambda: replica.backplane.counters.gaps > 0)
    await replica.await_up()
    replica.publish(b"after")
    await replica.await_payloads(b"after")
    assert_increasing(replica.positions)


async def test_invalid_entries_of_a_stream_are_counted_and_skipped(broker_log: BrokerLog) -> None:
    replicas = await broker_log.start_replicas(2)
    invalid = [b"", b"\x01", b"\x02" + bytes(40), b"garbage", bytes(1000)]
    for data in invalid:
        await broker_log.append_raw(data)
    replicas[0].publish(b"message")
    for replica in replicas:
        await replica.await_count(1)
        assert replica.backplane.counters.unreadable == len(invalid)
    third = await broker_log.start_replica()
    assert third.payloads == [b"message"]


# Credentials, TLS and addresses


def everything_in(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(str(record.__dict__) for record in caplog.records)


def assert_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    logged = everything_in(caplog)
    assert "s3cret" not in logged


async def test_a_broker_with_password_and_tls_is_used_and_no_secret_is_logged(
    stack: AsyncExitStack, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"user": "relay"} if kind == "nats" else {}
    broker = make_broker(kind, tmp_path, pair=make_pair(), password=PLAIN_SECRET, **options)
    await stack.enter_async_context(broker)
    url = broker.url_with(f"{broker.user}:{SECRET}")
    log = make_log(kind, stack, broker)
    replica = await log.start_replica(url=url)
    replica.publish(b"message")
    await replica.await_count(1)
    await broker.restart()
    replica.publish(b"again")
    await replica.await_count(2)
    assert_no_secret(caplog)


async def test_a_wrong_password_is_logged_as_the_cause_and_not_shown(
    stack: AsyncExitStack,
    kind: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"user": "relay"} if kind == "nats" else {}
    broker = make_broker(kind, tmp_path, password=PLAIN_SECRET, **options)
    await stack.enter_async_context(broker)
    log = make_log(kind, stack, broker)
    log.timings = QUICK_OUTAGES
    wrong = ["user:wrong-s3cret-%2F-pass", "wrong-s3cret-%2F-pass", ""]
    replicas = [
        await log.start_replica(url=broker.url_with(each), await_up=False) for each in wrong
    ]
    for replica in replicas:
        await replica.await_outage()
    errors = [
        record.__dict__["error"].lower()
        for record in caplog.records
        if record.getMessage() == "backplane failed"
    ]
    expected = ["authorization violation"]
    if kind == "redis":
        expected = ["invalid", "authentication required"]
    assert len(errors) >= len(wrong)
    assert [each for each in errors if not any(text in each for text in expected)] == []
    assert_no_secret(caplog)


async def test_a_token_is_accepted_and_not_logged(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = make_broker("nats", tmp_path, token="t0ken-of-nats")
    await stack.enter_async_context(broker)
    replica = await make_log("nats", stack, broker).start_replica()
    replica.publish(b"message")
    await replica.await_count(1)
    assert "t0ken-of-nats" not in everything_in(caplog)


class TlsStrippingServer:
    """A man in the middle: the INFO that it sends to a NATS client does not mention TLS."""

    def __init__(self) -> None:
        self.received = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"version": "2.12.0", "max_payload": 1048576, "auth_required": true}\r\n'
        )
        self.received += await reader.read()
        writer.close()


@pytest.mark.fast
async def test_a_nats_that_does_not_offer_tls_receives_no_bytes(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    stripping = TlsStrippingServer()
    server = await asyncio.start_server(stripping.serve, "127.0.0.1")
    await stack.enter_async_context(server)
    url = f"tls://relay:{SECRET}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    replica = await BackplaneLog(stack, None, url).start_replica(await_up=False)
    await wait_until(lambda: "the server does not speak TLS" in everything_in(caplog))
    await replica.stop()
    assert stripping.received == b""


async def test_a_nats_without_jetstream_is_logged_as_the_cause(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await stack.enter_async_context(make_broker("nats", tmp_path, jetstream=False))
    await make_log("nats", stack, broker).start_replica(await_up=False)
    await wait_until(lambda: "JetStream is not enabled" in everything_in(caplog))


async def test_a_message_above_max_payload_of_nats_is_delivered(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    broker = await stack.enter_async_context(make_broker("nats", tmp_path, max_payload=65_536))
    replica = await make_log("nats", stack, broker).start_replica()
    replica.publish(bytes(1_000_000), b"after")
    await replica.await_count(2)
    assert replica.payloads == [bytes(1_000_000), b"after"]


async def test_the_next_server_of_a_url_is_tried_if_one_is_unavailable(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    broker = await stack.enter_async_context(make_broker("nats", tmp_path))
    for servers in (f"localhost:1,localhost:{broker.port}", f"localhost:{broker.port},[::1]:1"):
        await make_log("nats", stack, broker).start_replica(url=f"nats://{servers}")


def open_url(url: str) -> object:
    return open_backplane(
        url,
        "relay",
        relays_locally=False,
        max_message_bytes=1,
        history_bytes=0,
        history_age_s=0,
        pending=Pending(),
        describe=lambda: b"",
        observe_append=lambda _: None,
        observe_lag=lambda _: None,
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret-pass@host",
        "s3cret-pass",
        "redis://user:s3cret-pass@host:port/0",
        "redis://host:6379?nonsense=s3cret-pass",
        "rediss://host:6379?ssl_cert_reqs=s3cret-pass",
        "nats://user:s3cret-pass@host:port",
        "nats://user:s3cret-pass@",
        "nats://host?password=s3cret-pass",
        "nats://user:s3cret-pass@host?replicas=2",
        "tls://user:s3cret-pass@host?ssl_ca_certs=/nowhere",
        "nats://[user:s3cret-pass@host",
    ],
)
@pytest.mark.fast
def test_an_invalid_url_is_an_error_of_one_line_without_its_secrets(url: str) -> None:
    with pytest.raises(UnusableSettingError) as caught:
        open_url(url)
    problem = str(caught.value)
    assert problem.startswith("backplane.url: ")
    assert "\n" not in problem
    assert "s3cret" not in problem


def test_libraries_of_brokers_are_not_imported_unless_a_url_needs_them() -> None:
    code = (
        "import sys; import websocket_relay.backplane.factory; "
        "sys.exit(any(name in sys.modules for name in ('redis', 'nats')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


async def test_an_abort_closes_a_nats_connection_whose_open_was_cancelled() -> None:
    """nats-py closes it only if its own `close` is given the time."""
    accepted, closed = asyncio.Event(), asyncio.Event()

    async def accept_and_send_nothing(reader: asyncio.StreamReader, writer: StreamWriter) -> None:
        accepted.set()
        with suppress(ConnectionError):
            await reader.read()
        closed.set()
        writer.close()

    server = await asyncio.start_server(accept_and_send_nothing, HOST, 0)
    try:
        async with asyncio.timeout(PATIENCE_S):
            address = nats.parse_nats_url(f"nats://{HOST}:{server.sockets[0].getsockname()[1]}")
            connection = nats.NatsConnection(address, nats.SignIn({}), Timings(close_timeout_s=0))
            opening = asyncio.create_task(connection.open(address.servers[0]))
            await accepted.wait()
            await cancel_until_done(opening)
            await connection.abort()
            await closed.wait()
    finally:
        server.close()
