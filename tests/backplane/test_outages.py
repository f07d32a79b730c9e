"""A broker that is cut off, malfunctions or is replaced: the relay continues and recovers."""

import asyncio
import json
import random
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from websocket_relay.backplane.codec import PRODUCER_EPOCHS, Packet, pack, split_into_parts
from websocket_relay.backplane.interface import Position
from websocket_relay.backplane.stream import RESET

from tests.support.broker_logs import (
    FREQUENT_HEARTBEATS,
    ONLY_NATS,
    ONLY_REDIS,
    QUICK_OUTAGES,
    BackplaneReplica,
    BrokerLog,
    CountingPublisher,
    NatsLog,
    RedisLog,
    assert_increasing,
    make_broker,
    make_log,
    wait_until,
)
from tests.support.brokers import Broker
from tests.support.relay_process import RelayProcess, StartRelay, eventually, merged, receive
from tests.support.tcp_proxy import BlockedReadsProxy, ProxiedConnection, TcpProxy


class BrokerProxy(TcpProxy):
    """A proxy between a replica and its broker. It resets connections, as a firewall does that has
    lost its state.

    Attributes:
        rewrite: changes what the broker sends.
    """

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker.port)
        self.broker = broker
        self.rewrite: Callable[[bytes], bytes] | None = None
        self._appending: set[ProxiedConnection] = set()

    def broker_url(self) -> str:
        """Return the URL of the broker through this proxy."""
        return self.broker.url.replace(str(self.broker.port), str(self.port))

    def cut_appending_connections(self) -> None:
        """Reset the connections on which an entry was appended."""
        for connection in self._appending:
            connection.abort()

    def on_open(self, connection: ProxiedConnection) -> None:
        client = connection.client.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def on_close(self, connection: ProxiedConnection) -> None:
        self._appending.discard(connection)

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes:
        if b"EVAL" in data or b"PUB relay " in data:
            self._appending.add(connection)
        return data

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes:
        return self.rewrite(data) if self.rewrite else data


@pytest.fixture
async def proxy(broker: Broker, stack: AsyncExitStack) -> BrokerProxy:
    """A proxy to the broker."""
    return await stack.enter_async_context(BrokerProxy(broker))


async def assert_recovers(replica: BackplaneReplica, payload: bytes = b"after") -> None:
    """Publish a message until it is delivered; assert that the replica is up then."""
    publisher = replica.publisher

    def is_delivered() -> bool:
        if publisher.failures:  # rejected: the outage had not started yet, or was not over
            publisher.failures = 0
            replica.publish(payload)
        return payload in replica.payloads

    replica.publish(payload)
    await wait_until(is_delivered)
    await replica.await_up()


# Connections that are reset, and responses that are malformed


async def test_connections_that_are_reset_while_idle_cause_no_loss_and_no_outage(
    broker_log: BrokerLog, proxy: BrokerProxy, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await broker_log.start_replica(url=proxy.broker_url())
    messages = [b"%d" % number for number in range(30)]
    for payload in messages:
        proxy.cut()
        await asyncio.sleep(random.choice((0, 0.001, 0.03)))
        replica.publish(payload)
    await replica.await_count(len(messages))
    assert replica.payloads == messages
    assert replica.publisher.failures == replica.backplane.counters.lost == 0
    assert replica.backplane.counters.outages == 0
    of_libraries = [each for each in caplog.records if not each.name.startswith("websocket_relay")]
    assert [each.getMessage() for each in of_libraries if each.levelname == "ERROR"] == []


MALFORMED_RESPONSES = {
    "redis": [
        b":1\r\n",
        b"+OK\r\n",
        b"-\xff\r\n",
        b"-MOVED\r\n",
        b"*1\r\n*2\r\n$5\r\nrelay\r\n*1\r\n*2\r\n$3\r\nx-y\r\n*0\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
    "nats": [
        b"INFO []\r\n",
        b'INFO {"version":"one"}\r\n',
        b"-ERR '\xff'\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
}


async def test_malformed_responses_are_an_outage_from_which_replicas_recover(
    kind: str, broker_log: BrokerLog, proxy: BrokerProxy, short_outage_timeout: None
) -> None:
    responses = MALFORMED_RESPONSES[kind]
    replicas = [await broker_log.start_replica(url=proxy.broker_url()) for _ in responses]
    proxy.rewrite = lambda _: random.choice(responses)
    for replica in replicas:
        replica.publish(b"unconfirmed")
    proxy.cut()
    for replica in replicas:
        await replica.await_outage()
        assert replica.publisher.failures == 1
    proxy.rewrite = None
    proxy.cut()
    for replica in replicas:
        await assert_recovers(replica)


@ONLY_NATS
async def test_malformed_responses_of_jetstream_do_not_prevent_a_recovery(
    broker_log: BrokerLog, proxy: BrokerProxy, short_outage_timeout: None
) -> None:
    replica = await broker_log.start_replica(url=proxy.broker_url())
    for part in (b'"config"', b'"created":"2', b"NATS/1.0 4"):
        rewritten = 0

        def overwrite(data: bytes, part: bytes = part) -> bytes:
            nonlocal rewritten
            rewritten += part in data
            return data.replace(part, bytes(len(part)))

        proxy.rewrite = overwrite
        proxy.cut()
        await wait_until(lambda: rewritten >= 2)  # noqa: B023 - awaited before the next part
        proxy.rewrite = None
        proxy.cut()
        await assert_recovers(replica, b"after " + part)


@ONLY_REDIS
async def test_a_redirection_by_a_redis_cluster_is_logged_as_the_cause(
    broker_log: BrokerLog, proxy: BrokerProxy, caplog: pytest.LogCaptureFixture
) -> None:
    await broker_log.start_replica(url=proxy.broker_url())
    proxy.rewrite = lambda _: b"-MOVED 1234 10.0.0.1:6379\r\n"
    error = "in this Redis Cluster the key is elsewhere: 1234 10.0.0.1:6379; use redis+cluster://"
    await wait_until(lambda: error in {record.__dict__.get("error") for record in caplog.records})


async def test_a_replica_that_reads_from_a_former_primary_switches_to_the_new_one(
    kind: str,
    broker_log: BrokerLog,
    proxy: BrokerProxy,
    stack: AsyncExitStack,
    tmp_path: Path,
    short_outage_timeout: None,
) -> None:
    replica = await broker_log.start_replica(url=proxy.broker_url())
    replica.publish(b"before")
    await replica.await_count(1)
    new = await stack.enter_async_context(make_broker(kind, tmp_path / "new"))
    proxy.target = new.port
    proxy.cut_appending_connections()
    await replica.await_outage()
    await assert_recovers(replica)
    assert_increasing(replica.positions)
    assert set((await make_log(kind, stack, new).start_replica()).payloads) == {b"after"}


# Messages that are abandoned or lost


@ONLY_REDIS
async def test_an_abandoned_message_is_not_delivered_after_a_later_one(
    broker_log: BrokerLog,
) -> None:
    replicas = await broker_log.start_replicas(2)
    packets = [(0, 0, b"early"), (1, 0, b"later"), (0, 1, b"abandoned"), (1, 1, b"latest")]
    for producer_epoch, sequence, payload in packets:
        producer = 7 * PRODUCER_EPOCHS + producer_epoch
        await broker_log.append_raw(pack(Packet(producer, sequence, ["default"], b"\1", [payload])))
    for replica in replicas:
        await replica.await_count(3)
        assert replica.payloads == [b"early", b"later", b"latest"]
        assert replica.backplane.counters.duplicates == 1
        assert replica.backplane.counters.lost == 0


@ONLY_NATS
async def test_a_message_that_is_relayed_locally_has_a_position_after_a_reported_gap(
    broker_log: BrokerLog,
) -> None:
    broker_log.timings = replace(QUICK_OUTAGES, heartbeat_interval_s=1.0)  # no entry for so long
    replica = await broker_log.start_replica(on_outage="local")
    known = len(replica.gap_positions)
    _, last = split_into_parts(pack(Packet(7, 0, ["default"], b"\1", [bytes(100)])), 100)
    await broker_log.append_raw(last)  # without the first part
    await wait_until(lambda: len(replica.gap_positions) > known)
    broker_log.broker.freeze()
    replica.publish(b"local")
    await replica.await_count(1)
    assert replica.positions[-1] > max(replica.gap_positions), "a resume from it would fail"


async def publish_and_await(replica: BackplaneReplica, *payloads: bytes) -> None:
    """Publish messages, each in a packet of its own."""
    for payload in payloads:
        replica.publish(payload)
        await replica.await_payloads(payload)


def assert_gap_before(replica: BackplaneReplica, payload: bytes) -> None:
    """Assert that the latest gap was reported between a message and the one before it."""
    index = replica.payloads.index(payload)
    assert replica.counts_at_gaps[-1] == index
    assert replica.gap_positions[-1] < replica.positions[index]
    if index:
        assert replica.gap_positions[-1] >= replica.positions[index - 1]


async def test_an_entry_deleted_before_it_was_read_is_reported_before_the_next_message(
    broker_log: BrokerLog, proxy: BrokerProxy
) -> None:
    publisher, other = await broker_log.start_replicas(2)
    stalled = await broker_log.start_replica(url=proxy.broker_url())
    await publish_and_await(publisher, b"both")
    await stalled.await_payloads(b"both")
    proxy.stall()
    await publish_and_await(publisher, b"kept", b"deleted")
    await broker_log.delete_entry(publisher.positions[-1])
    await publish_and_await(other, b"after")
    proxy.cut()
    await stalled.await_payloads(b"after")
    assert stalled.payloads == [b"both", b"kept", b"after"]
    assert_gap_before(stalled, b"after")
    assert stalled.backplane.counters.gaps == 1
    for each in (publisher, other):
        assert each.payloads == [b"both", b"kept", b"deleted", b"after"]
        assert each.backplane.counters.gaps == each.backplane.counters.lost == 0, "it was read"


@pytest.mark.parametrize("modify", ["delete_stream", "purge"])
async def test_unread_entries_of_a_deleted_or_emptied_stream_are_reported_as_a_gap(
    broker_log: BrokerLog, proxy: BrokerProxy, modify: str
) -> None:
    publisher = await broker_log.start_replica()
    stalled = await broker_log.start_replica(url=proxy.broker_url())
    await publish_and_await(publisher, b"both")
    await stalled.await_payloads(b"both")
    proxy.stall()
    await publish_and_await(publisher, b"deleted")
    await getattr(broker_log, modify)()
    await publish_and_await(publisher, b"after")
    proxy.cut()
    await stalled.await_payloads(b"after")
    assert stalled.payloads == [b"both", b"after"]
    assert_gap_before(stalled, b"after")
    for each in (publisher, stalled):
        assert_increasing(each.positions)


async def test_an_entry_that_the_broker_lost_is_reported_by_a_replica_that_had_read_it(
    broker_log: BrokerLog, proxy: BrokerProxy
) -> None:
    publisher, witness = await broker_log.start_replicas(2)
    stalled = await broker_log.start_replica(url=proxy.broker_url())
    await publish_and_await(publisher, b"both")
    await stalled.await_payloads(b"both")
    proxy.stall()
    proxy.target = None  # also for new connections

    async def publish_what_is_lost() -> None:
        await publisher.await_up()
        await publish_and_await(publisher, b"lost")
        await witness.await_payloads(b"lost")
        await publisher.stop()  # or it would report the loss itself

    await broker_log.roll_back(publish_what_is_lost)
    await witness.await_up()
    await publish_and_await(witness, b"after")
    proxy.target = broker_log.broker.port
    proxy.cut()
    await stalled.await_payloads(b"after")
    assert stalled.payloads == [b"both", b"after"]
    assert_gap_before(stalled, b"after")
    assert_increasing(witness.positions)


@ONLY_REDIS
async def test_a_message_without_its_middle_part_is_reported_before_the_next_one(
    broker_log: BrokerLog,
) -> None:
    replica = await broker_log.start_replica()
    await broker_log.append_raw(pack(Packet(7, 0, ["default"], b"\1", [b"before"])))
    first, _, last = split_into_parts(pack(Packet(7, 1, ["default"], b"\1", [bytes(100)])), 80)
    await broker_log.append_raw(first)
    await broker_log.append_raw(last)
    replica.publish(b"after")
    await replica.await_payloads(b"after")
    assert replica.payloads == [b"before", b"after"]
    assert_gap_before(replica, b"after")


# Confirmed messages that are not read back when an outage starts


class DeliveryWaits:
    """Waits of clients for their messages.

    Attributes:
        results: the position of each message, or None; in the order of the callbacks.
        settled_counts: at each end of a wait for all messages, how many were delivered by then.
    """

    def __init__(self, replica: BackplaneReplica) -> None:
        self.replica = replica
        self.results: list[Position | None] = []
        self.settled_counts: list[int] = []

    def publish(self, *payloads: bytes) -> None:
        """Publish messages; wait for each of them, and for all."""
        for payload in payloads:
            self.replica.publish(payload)
            self.replica.backplane.when_delivered(self.results.append)
        self.await_settled()

    def await_settled(self) -> None:
        """Wait for all messages that were published so far."""
        entries = self.replica.entries
        self.replica.backplane.when_settled(lambda: self.settled_counts.append(len(entries)))


@pytest.fixture
async def confirmed_waits(
    request: pytest.FixtureRequest,
    broker_log: BrokerLog,
    reads_proxy: BlockedReadsProxy,
    reads_proxy_url: str,
    short_outage_timeout: None,
) -> DeliveryWaits:
    """Waits for two messages in an outage: they are confirmed, and are not read back yet."""
    on_outage = getattr(request, "param", "reject")
    replica = await broker_log.start_replica(url=reads_proxy_url, on_outage=on_outage)
    other = await broker_log.start_replica()
    await publish_and_await(replica, b"before")
    waits = DeliveryWaits(replica)
    reads_proxy.is_blocked = True
    waits.publish(b"0", b"1")
    await other.await_payloads(b"before", b"0", b"1")
    await replica.await_outage()
    assert (waits.results, waits.settled_counts) == ([], [])
    return waits


@pytest.mark.parametrize(
    ("kind", "confirmed_waits"),
    [("redis", "reject"), ("nats", "local")],
    indirect=["confirmed_waits"],
)
async def test_waits_for_messages_that_were_confirmed_before_an_outage_end_when_they_are_read(
    confirmed_waits: DeliveryWaits, reads_proxy: BlockedReadsProxy
) -> None:
    waits, replica = confirmed_waits, confirmed_waits.replica
    waits.publish(b"meanwhile")
    assert waits.settled_counts == [], "earlier messages are pending"
    (result,) = waits.results
    is_relayed = replica.payloads == [b"before", b"meanwhile"]
    assert is_relayed == replica.backplane.relays_locally
    assert result == (replica.positions[-1] if is_relayed else None)
    reads_proxy.release()
    await replica.await_payloads(b"0", b"1")
    positions = dict(zip(replica.payloads, replica.positions, strict=True))
    assert waits.results == [result, positions[b"0"], positions[b"1"]]
    assert waits.settled_counts == [len(replica.entries)] * 2


class ClosingPublisher(CountingPublisher):
    """A client that closes when its message is rejected, after a wait for its earlier messages."""

    def __init__(self, waits: DeliveryWaits) -> None:
        super().__init__()
        self._waits = waits

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        super().fail_publish(is_unconfirmed=is_unconfirmed)
        self._waits.await_settled()


@ONLY_NATS
async def test_a_client_whose_message_is_rejected_closes_after_its_confirmed_ones_are_read(
    broker_log: BrokerLog,
    reads_proxy: BlockedReadsProxy,
    reads_proxy_url: str,
    short_outage_timeout: None,
) -> None:
    replica = await broker_log.start_replica(url=reads_proxy_url)
    await publish_and_await(replica, b"before")
    waits = DeliveryWaits(replica)
    replica.publisher = ClosingPublisher(waits)
    reads_proxy.is_blocked = True
    replica.publish(b"confirmed")
    await replica.backplane.flush()
    broker_log.broker.freeze()
    replica.publish(b"unconfirmed")
    await replica.await_outage()
    assert (replica.publisher.failures, waits.settled_counts) == (1, [])
    broker_log.broker.thaw()
    reads_proxy.release()
    await replica.await_payloads(b"confirmed")
    assert waits.settled_counts == [2]


@pytest.fixture
def short_confirmation_timeout(broker_log: BrokerLog, short_outage_timeout: None) -> None:
    broker_log.timings = replace(QUICK_OUTAGES, confirmation_timeout_s=0.3)


@ONLY_REDIS
async def test_a_confirmed_message_that_is_not_read_in_time_is_unconfirmed_for_its_publisher(
    short_confirmation_timeout: None, confirmed_waits: DeliveryWaits
) -> None:
    waits = confirmed_waits
    await wait_until(lambda: waits.results)
    assert waits.results == [None, None]
    assert waits.settled_counts == [1]
    assert waits.replica.publisher.failures == 0


async def test_a_confirmed_message_that_is_lost_is_unconfirmed_for_its_publisher(
    broker_log: BrokerLog, reads_proxy: BlockedReadsProxy, confirmed_waits: DeliveryWaits
) -> None:
    await broker_log.delete_stream()
    reads_proxy.release()
    await confirmed_waits.replica.await_up()
    assert confirmed_waits.results == [None, None]
    assert confirmed_waits.settled_counts == [1]
    assert confirmed_waits.replica.payloads == [b"before"]


# A relay's process


@pytest.fixture
def starting_relay(broker_log: BrokerLog, tmp_path: Path) -> Iterator[StartRelay]:
    """Start a relay on the broker, without waiting until it is ready."""
    with ExitStack() as stack:

        def start(**settings: Any) -> RelayProcess:
            directory = tmp_path / "relay"
            directory.mkdir()
            backplane = {"backplane": {"url": broker_log.url}}
            relay = RelayProcess(directory, merged(backplane, settings))
            stack.callback(relay.end)
            relay.start()
            return relay

        yield start


async def await_ready(relay: RelayProcess) -> None:
    async def readiness() -> tuple[bool, object]:
        response = await relay.get_metrics("/readyz")
        return response.status_code == 200, response.text

    await eventually(readiness, "ready")


@ONLY_REDIS
async def test_a_relay_that_relays_locally_in_an_outage_starts_without_its_broker(
    broker_log: BrokerLog, starting_relay: StartRelay
) -> None:
    broker_log.broker.kill()
    relay = starting_relay(backplane={"on_outage": "local"})
    await await_ready(relay)
    async with relay.client("news") as a, relay.client("news") as b:
        await a.send("local")
        assert await receive(a) == await receive(b) == "local"
        await broker_log.broker.start()
        await relay.await_metric("websocket_backplane_up", 1)
        await a.send("replicated")
        assert await receive(a) == await receive(b) == "replicated"
    assert (await broker_log.start_replica()).payloads == [b"replicated"]


@ONLY_NATS
async def test_a_relay_stops_within_its_timeout_although_its_broker_is_frozen(
    broker_log: BrokerLog, starting_relay: StartRelay
) -> None:
    relay = starting_relay(shutdown={"spread_s": 0.1, "timeout_s": 1})
    await await_ready(relay)
    async with relay.client("news") as client:
        broker_log.broker.freeze()
        await client.send("not relayed")
        await relay.await_metric_at_least("websocket_messages_total", 1)
        started = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - started < 1 + 1
    assert relay.block_until_logged("messages unconfirmed")["messages"] == 1


@ONLY_REDIS
async def test_pending_messages_take_no_more_memory_than_is_counted(broker_log: BrokerLog) -> None:
    replica = await broker_log.start_replica()
    broker_log.broker.freeze()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(20_000):
            replica.publish(b"%d" % number)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < replica.pending.bytes
    broker_log.broker.thaw()
    await replica.await_count(20_000)
    await replica.backplane.flush()
    assert replica.pending.bytes == 0


# The permissions of a user of the broker, as the docs list them


async def assert_no_outage_in_heartbeats(replica: BackplaneReplica) -> None:
    target = len(replica.lags_s) + 3
    await wait_until(lambda: len(replica.lags_s) >= target)
    assert replica.backplane.counters.outages == 0


@pytest.mark.parametrize("kind", ["redis", "redis-6.2"])
async def test_a_user_of_redis_needs_seven_commands_and_one_key(
    broker_log: BrokerLog, frequent_heartbeats: None
) -> None:
    assert isinstance(broker_log, RedisLog)
    commands = ["eval", "xadd", "xread", "xgroup", "xinfo", "time", "info"]
    permissions = ["~relay", *(f"+{command}" for command in commands)]
    await broker_log.execute("ACL", "SETUSER", "relay", "on", ">pass", *permissions)
    replica = await broker_log.start_replica(url=broker_log.broker.url_with("relay:pass"))
    replica.publish(b"before")
    await replica.await_count(1)
    await broker_log.execute("CLIENT", "KILL", "TYPE", "normal")
    replica.publish(b"after")
    await replica.await_count(2)
    await assert_no_outage_in_heartbeats(replica)


async def test_a_user_of_nats_needs_five_subjects_and_its_inbox(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    permissions = {
        "publish": [
            "relay",
            "$JS.API.STREAM.INFO.relay",
            "$JS.API.STREAM.CREATE.relay",  # only if the relay is to create the stream
            "$JS.API.CONSUMER.CREATE.relay",
            "$JS.API.CONSUMER.MSG.NEXT.relay.*",
        ],
        "subscribe": ["_INBOX.>"],
    }
    broker = make_broker("nats", tmp_path, user="relay", password="pass", permissions=permissions)
    await stack.enter_async_context(broker)
    proxy = await stack.enter_async_context(BrokerProxy(broker))
    log = make_log("nats", stack, broker)
    log.timings = FREQUENT_HEARTBEATS
    replica = await log.start_replica(url=proxy.broker_url())
    replica.publish(b"before")
    await replica.await_count(1)
    proxy.cut()
    replica.publish(b"after")
    await replica.await_count(2)
    await assert_no_outage_in_heartbeats(replica)


@pytest.mark.parametrize("missing", ["relay", "$JS.API.CONSUMER.MSG.NEXT.relay.*"])
async def test_a_missing_permission_on_nats_is_logged_with_its_subject(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    permissions = {"publish": {"deny": [missing]}}
    broker = make_broker("nats", tmp_path, user="relay", password="pass", permissions=permissions)
    await stack.enter_async_context(broker)
    await make_log("nats", stack, broker).start_replica(await_up=False)
    error = f'permissions violation for publish to "{missing.rstrip("*").lower()}'
    await wait_until(
        lambda: any(error in str(each.__dict__.get("error")) for each in caplog.records)
    )


# A stream on NATS that was created by an operator


async def create_stream(log: BrokerLog, **config: object) -> None:
    assert isinstance(log, NatsLog)
    content = {"name": log.stream, "subjects": [log.stream]} | config
    response = await log.request(
        f"$JS.API.STREAM.CREATE.{log.stream}", json.dumps(content).encode()
    )
    assert "error" not in response


@ONLY_NATS
async def test_a_message_above_max_msg_size_of_a_stream_is_delivered(broker_log: BrokerLog) -> None:
    await create_stream(broker_log, max_msg_size=10_000)
    replicas = await broker_log.start_replicas(2)
    replicas[0].publish(bytes(300_000), b"after")
    for replica in replicas:
        await replica.await_count(2)
        assert replica.payloads == [bytes(300_000), b"after"]
        assert replica.backplane.counters.outages == 0


@ONLY_NATS
@pytest.mark.parametrize(
    "config", [{"no_ack": True}, {"max_msg_size": 100}, {"discard": "new"}, {"subjects": ["x"]}]
)
async def test_a_stream_that_is_no_log_is_logged_with_the_setting_to_change(
    broker_log: BrokerLog, caplog: pytest.LogCaptureFixture, config: dict[str, object]
) -> None:
    await create_stream(broker_log, **config)
    await broker_log.start_replica(await_up=False)
    await wait_until(lambda: any("must " in str(e.__dict__.get("error")) for e in caplog.records))
