"""A broker that is cut off, talks nonsense or is replaced: the relay lives and finds it again."""

import asyncio
import json
import random
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
from websocket_relay.backplane import replicated
from websocket_relay.backplane.codec import Packet, pack, split_into_parts
from websocket_relay.backplane.interface import Position
from websocket_relay.backplane.replicated import PRODUCER_EPOCHS, RESET

from tests.support.brokers import Broker
from tests.support.logs_kept import (
    BrokerLog,
    NatsLog,
    RedisLog,
    Replica,
    Speaker,
    assert_growing,
    broker_of,
    log_of,
    until,
)
from tests.support.proxy import Connection, HeldReads, Proxy
from tests.support.relay_process import Relay, StartRelay, eventually, merged, receive

pytestmark = pytest.mark.xdist_group("outages")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declare an outage after a second instead of three."""
    monkeypatch.setattr(replicated, "OUTAGE_AFTER_S", 1.0)
    monkeypatch.setattr(replicated, "APPEND_TIMEOUT_S", 0.7)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(params=["redis", "nats"])
def kind(request: pytest.FixtureRequest) -> str:
    """One of the brokers."""
    return str(request.param)


@pytest.fixture
async def kept(kind: str, stack: AsyncExitStack, tmp_path: Path) -> BrokerLog:
    """A log that a broker keeps."""
    broker = await stack.enter_async_context(broker_of(kind, tmp_path / "broker"))
    return log_of(kind, stack, broker)


class Wire(Proxy):
    """What is between a replica and its broker. It can be made to lie; what it cuts is reset, as by
    a firewall that forgot it."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker.port)
        self.broker = broker
        self.lie: Callable[[bytes], bytes] | None = None
        self._appending: set[Connection] = set()

    def broker_url(self) -> str:
        """Return the broker's URL by this way."""
        return self.broker.url.replace(str(self.broker.port), str(self.port))

    def cut_what_appends(self) -> None:
        """Reset those by which something was appended."""
        for connection in self._appending:
            connection.abort()

    def opened(self, connection: Connection) -> None:
        client = connection.client.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def closed(self, connection: Connection) -> None:
        self._appending.discard(connection)

    def asks(self, data: bytes, connection: Connection) -> bytes:
        if b"EVAL" in data or b"PUB relay " in data:
            self._appending.add(connection)
        return data

    def answers(self, data: bytes, connection: Connection) -> bytes:
        return self.lie(data) if self.lie else data


@pytest.fixture
async def wire(kept: BrokerLog, stack: AsyncExitStack) -> Wire:
    """The way to the broker."""
    return await stack.enter_async_context(Wire(kept.broker))


async def comes_back(replica: Replica) -> None:
    """Insist that a replica is up sooner or later, and hears what it says."""
    speaker = replica.speaker

    def heard() -> bool:
        if speaker.told:  # the outage had not begun yet, or was not over
            speaker.told = 0
            replica.say(b"after")
        return b"after" in replica.payloads

    replica.say(b"after")
    await until(heard)
    await replica.is_up()


async def test_connections_that_are_reset_while_they_idle_cost_only_the_moment(
    kept: BrokerLog, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await kept.replica(url=wire.broker_url())
    said = [b"%d" % number for number in range(60)]
    for payload in said:
        wire.cut()
        await asyncio.sleep(random.choice((0, 0.001, 0.03)))
        replica.say(payload)
    await replica.heard(len(said))
    assert replica.payloads == said
    assert replica.speaker.told == replica.backplane.counters.lost == 0
    assert replica.backplane.counters.outages == 0
    complaints = [each for each in caplog.records if not each.name.startswith("websocket_relay")]
    assert [each.getMessage() for each in complaints if each.levelname == "ERROR"] == []


LIES = {
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


async def test_answers_that_make_no_sense_are_an_outage_and_not_the_end(
    kind: str, kept: BrokerLog, wire: Wire, hasty: None
) -> None:
    replicas = [await kept.replica(url=wire.broker_url()) for _ in LIES[kind]]
    wire.lie = lambda _: random.choice(LIES[kind])
    for replica in replicas:
        replica.say(b"in doubt")
    wire.cut()
    for replica in replicas:
        await replica.is_out()
        assert replica.speaker.told == 1
    wire.lie = None
    wire.cut()
    for replica in replicas:
        await comes_back(replica)


async def test_a_redis_cluster_is_named_where_it_sends_the_relay_away(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await stack.enter_async_context(broker_of("redis", tmp_path / "broker"))
    wire = await stack.enter_async_context(Wire(broker))
    await log_of("redis", stack, broker).replica(url=wire.broker_url())
    wire.lie = lambda _: b"-MOVED 1234 10.0.0.1:6379\r\n"
    said = "in this Redis Cluster the key is elsewhere: 1234 10.0.0.1:6379"
    await until(lambda: said in {record.__dict__.get("error") for record in caplog.records})


@pytest.mark.parametrize("answer", [b"NATS/1.0 4\xff8", b'"config"', b'"created":"2'])
async def test_jetstream_that_says_something_else_is_no_end_either(
    stack: AsyncExitStack, tmp_path: Path, hasty: None, answer: bytes
) -> None:
    broker = await stack.enter_async_context(broker_of("nats", tmp_path / "broker"))
    wire = await stack.enter_async_context(Wire(broker))
    replica = await log_of("nats", stack, broker).replica(url=wire.broker_url())
    wire.lie = lambda data: data.replace(answer, bytes(len(answer)))
    for _ in range(3):
        wire.cut()
        await asyncio.sleep(0.3)
    wire.lie = None
    wire.cut()
    await comes_back(replica)


async def test_a_replica_that_reads_what_was_the_primary_goes_over_to_the_new_one(
    kind: str, kept: BrokerLog, wire: Wire, stack: AsyncExitStack, tmp_path: Path, hasty: None
) -> None:
    replica = await kept.replica(url=wire.broker_url())
    replica.say(b"before")
    await replica.heard(1)
    new = await stack.enter_async_context(broker_of(kind, tmp_path / "new"))
    wire.target = new.port
    wire.cut_what_appends()
    await replica.is_out()
    await comes_back(replica)
    assert_growing(replica.positions)
    assert set((await log_of(kind, stack, new).replica()).payloads) == {b"after"}


async def test_what_was_given_up_is_not_heard_behind_what_was_said_later(kept: BrokerLog) -> None:
    replicas = await kept.replicas(2)
    said = [(0, 0, b"early"), (1, 0, b"later"), (0, 1, b"given up"), (1, 1, b"at last")]
    for life, number, payload in said:
        await kept.put(
            pack(Packet(7 * PRODUCER_EPOCHS + life, number, ["default"], b"\1", [payload]))
        )
    for replica in replicas:
        await replica.heard(3)
        assert replica.payloads == [b"early", b"later", b"at last"]
        assert replica.backplane.counters.duplicates == 1
        assert replica.backplane.counters.lost == 0


async def test_what_is_said_alone_stands_behind_what_may_be_missing(
    kept: BrokerLog, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicated, "HEARTBEAT_INTERVAL_S", 3.0)  # nothing else enters the log
    replica = await kept.replica(on_outage="local")
    known = len(replica.whole_from)
    _, last = split_into_parts(pack(Packet(7, 0, ["default"], b"\1", [bytes(100)])), 7, 0, 100)
    await kept.put(last)  # the first part is gone
    await until(lambda: len(replica.whole_from) > known)
    kept.broker.freeze()
    replica.say(b"alone")
    await replica.heard(1)
    assert replica.positions[-1] > max(replica.whole_from), "or who comes then is sent away"


async def said_and_heard(replica: Replica, *payloads: bytes) -> None:
    """Have a replica say messages, each in a packet of its own."""
    for payload in payloads:
        replica.say(payload)
        await replica.hears(payload)


def assert_told_before(replica: Replica, payload: bytes) -> None:
    """Insist that a replica was told of a loss between a message and the one before it."""
    index = replica.payloads.index(payload)
    assert replica.heard_before[-1] == index
    assert replica.whole_from[-1] < replica.positions[index]
    if index:
        assert replica.whole_from[-1] >= replica.positions[index - 1]


async def test_an_entry_deleted_before_it_was_read_is_reported_before_the_next_message(
    kept: BrokerLog, wire: Wire
) -> None:
    speaker, other = await kept.replicas(2)
    behind = await kept.replica(url=wire.broker_url())
    await said_and_heard(speaker, b"both")
    await behind.hears(b"both")
    wire.stall()
    await said_and_heard(speaker, b"kept", b"deleted")
    await kept.remove(speaker.positions[-1])
    await said_and_heard(other, b"after")
    wire.cut()
    await behind.hears(b"after")
    assert behind.payloads == [b"both", b"kept", b"after"]
    assert_told_before(behind, b"after")
    assert behind.backplane.counters.gaps == 1
    for each in (speaker, other):
        assert each.payloads == [b"both", b"kept", b"deleted", b"after"]
        assert each.backplane.counters.gaps == each.backplane.counters.lost == 0, "it had read that"


async def test_what_a_broker_lost_is_reported_by_a_replica_that_had_read_it(
    kept: BrokerLog, wire: Wire
) -> None:
    speaker, witness = await kept.replicas(2)
    behind = await kept.replica(url=wire.broker_url())
    await said_and_heard(speaker, b"both")
    await behind.hears(b"both")
    wire.stall()
    wire.target = None  # nor by another connection

    async def happens() -> None:
        await speaker.is_up()
        await said_and_heard(speaker, b"lost")
        await witness.hears(b"lost")
        await speaker.stop()  # or it would find out by itself

    await kept.forget(happens)
    await witness.is_up()
    await said_and_heard(witness, b"after")
    wire.target = kept.broker.port
    wire.cut()
    await behind.hears(b"after")
    assert behind.payloads == [b"both", b"after"]
    assert_told_before(behind, b"after")
    assert_growing(witness.positions)


async def test_a_message_whose_middle_is_lost_is_reported_before_the_next_one(
    kept: BrokerLog,
) -> None:
    replica = await kept.replica()
    await kept.put(pack(Packet(7, 0, ["default"], b"\1", [b"before"])))
    first, _, last = split_into_parts(
        pack(Packet(7, 1, ["default"], b"\1", [bytes(100)])), 7, 1, 80
    )
    await kept.put(first)
    await kept.put(last)
    replica.say(b"after")
    await replica.hears(b"after")
    assert replica.payloads == [b"before", b"after"]
    assert_told_before(replica, b"after")


@pytest.fixture
async def way(kept: BrokerLog, stack: AsyncExitStack) -> HeldReads:
    """A way to the broker on which reading can be held."""
    return await stack.enter_async_context(HeldReads(kept.broker.port))


class Waiting:
    """What those are told who wait for their messages, and when."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.told: list[Position | None] = []
        self.settled: list[int] = []  # how much had been heard by then

    def say(self, *payloads: bytes) -> None:
        """Say messages, wait for each, and for all of them."""
        for payload in payloads:
            self.replica.say(payload)
            self.replica.backplane.when_delivered(self.told.append)
        self.wait()

    def wait(self) -> None:
        """Wait for all that was said so far."""
        heard = self.replica.entries
        self.replica.backplane.when_settled(lambda: self.settled.append(len(heard)))


async def held_until_out(
    kept: BrokerLog, way: HeldReads, on_outage: str
) -> tuple[Replica, Waiting]:
    """Return a replica in an outage whose last two messages are in the log, and were not read."""
    url = kept.url.replace(str(kept.broker.port), str(way.port))
    replica, other = await kept.replica(url=url, on_outage=on_outage), await kept.replica()
    await said_and_heard(replica, b"before")
    waiting = Waiting(replica)
    way.is_held = True
    waiting.say(b"0", b"1")
    await other.hears(b"before", b"0", b"1")
    await replica.is_out()
    assert (waiting.told, waiting.settled) == ([], [])
    return replica, waiting


@pytest.mark.parametrize("on_outage", ["reject", "local"])
async def test_what_was_confirmed_before_an_outage_is_awaited_until_it_is_read(
    kept: BrokerLog, way: HeldReads, hasty: None, on_outage: str
) -> None:
    replica, waiting = await held_until_out(kept, way, on_outage)
    waiting.say(b"meanwhile")
    assert waiting.settled == [], "what was said before comes first"
    (own,) = waiting.told
    alone = replica.payloads == [b"before", b"meanwhile"]
    assert own == (replica.positions[-1] if alone else None)
    way.release()
    await replica.hears(b"0", b"1")
    heard = dict(zip(replica.payloads, replica.positions, strict=True))
    assert waiting.told == [own, heard[b"0"], heard[b"1"]]
    assert waiting.settled == [len(replica.entries)] * 2
    assert alone == (on_outage == "local")


class Leaving(Speaker):
    """A client that leaves when its message can't be relayed, and is owed what it said before."""

    def __init__(self, waiting: Waiting) -> None:
        super().__init__()
        self._waiting = waiting

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        super().fail_publish(is_unconfirmed=is_unconfirmed)
        self._waiting.wait()


async def test_who_is_refused_a_message_is_not_let_go_before_its_confirmed_ones_are_read(
    kept: BrokerLog, way: HeldReads, hasty: None
) -> None:
    url = kept.url.replace(str(kept.broker.port), str(way.port))
    replica = await kept.replica(url=url)
    await said_and_heard(replica, b"before")
    waiting = Waiting(replica)
    replica.speaker = Leaving(waiting)
    way.is_held = True
    replica.say(b"confirmed")
    await replica.backplane.flush()
    kept.broker.freeze()
    replica.say(b"in doubt")
    await replica.is_out()
    assert (replica.speaker.told, waiting.settled) == (1, [])
    kept.broker.thaw()
    way.release()
    await replica.hears(b"confirmed")
    assert waiting.settled == [2]


async def test_what_is_confirmed_and_does_not_come_back_in_time_is_in_doubt(
    kept: BrokerLog, way: HeldReads, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicated, "CONFIRMATION_TIMEOUT_S", 0.3)
    replica, waiting = await held_until_out(kept, way, "reject")
    await until(lambda: waiting.told)
    assert waiting.told == [None, None]
    assert waiting.settled == [1]
    assert replica.speaker.told == 0


async def test_what_is_confirmed_and_lost_in_an_outage_is_in_doubt(
    kept: BrokerLog, way: HeldReads, hasty: None
) -> None:
    replica, waiting = await held_until_out(kept, way, "reject")
    await kept.delete()
    way.release()
    await replica.is_up()
    assert waiting.told == [None, None]
    assert waiting.settled == [1]
    assert replica.payloads == [b"before"]


@pytest.fixture
def relay_on(kept: BrokerLog, tmp_path: Path) -> Iterator[StartRelay]:
    """Start a relay on the broker, without waiting until it is ready."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Relay:
            directory = tmp_path / "relay"
            directory.mkdir()
            backplane = {"backplane": {"url": kept.url}}
            relay = Relay(directory, merged(backplane, settings))
            stack.callback(relay.end)
            relay.start()
            return relay

        yield start


async def readiness_is(relay: Relay, status: int) -> None:
    """Wait until a relay says that it is ready, or that it is not."""

    async def look() -> tuple[bool, object]:
        answer = await relay.get_metrics("/readyz")
        return answer.status_code == status, answer.text

    await eventually(look, f"readiness {status}")


async def test_a_relay_that_may_go_on_alone_starts_without_its_broker(
    kept: BrokerLog, relay_on: StartRelay
) -> None:
    kept.broker.kill()
    relay = relay_on(backplane={"on_outage": "local"})
    await readiness_is(relay, 200)
    async with relay.client("news") as a, relay.client("news") as b:
        await a.send("alone")
        assert await receive(a) == await receive(b) == "alone"
        await kept.broker.start()
        await relay.metric_is("websocket_backplane_up", 1)
        await a.send("together")
        assert await receive(a) == await receive(b) == "together"
    assert (await kept.replica()).payloads == [b"together"]


async def test_a_relay_stops_in_time_though_its_broker_is_frozen(
    kept: BrokerLog, relay_on: StartRelay
) -> None:
    relay = relay_on(shutdown={"spread_s": 0.1, "timeout_s": 2})
    await readiness_is(relay, 200)
    async with relay.client("news") as client:
        kept.broker.freeze()
        await client.send("will not get there")
        await relay.metric_reaches("websocket_messages_total", 1)
        started = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - started < 2 + 1
    assert relay.await_log("messages not relayed")["messages"] == 1


async def test_what_waits_takes_no_more_memory_than_it_is_taken_for(kept: BrokerLog) -> None:
    replica = await kept.replica()
    kept.broker.freeze()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(50_000):
            replica.say(b"%d" % number)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < replica.pending.bytes
    kept.broker.thaw()
    await replica.heard(50_000)
    await replica.backplane.flush()
    assert replica.pending.bytes == 0


# What a user of the broker has to have, as the docs say


@pytest.mark.parametrize("kind", ["redis", "redis-6.2"])
async def test_a_user_of_redis_needs_seven_commands_and_one_key(
    stack: AsyncExitStack, tmp_path: Path, kind: str
) -> None:
    broker = await stack.enter_async_context(broker_of(kind, tmp_path / "broker"))
    log = log_of("redis", stack, broker)
    assert isinstance(log, RedisLog)
    commands = ["eval", "xadd", "xread", "xgroup", "xinfo", "time", "info"]
    rights = ["~relay", *(f"+{command}" for command in commands)]
    await log.command("ACL", "SETUSER", "relay", "on", ">pass", *rights)
    replica = await log.replica(url=broker.url_with("relay:pass"))
    replica.say(b"before")
    await replica.heard(1)
    await log.command("CLIENT", "KILL", "TYPE", "normal")
    replica.say(b"after")
    await replica.heard(2)
    await until(lambda: len(replica.lags_s) >= 3)
    assert replica.backplane.counters.outages == 0


async def test_a_user_of_nats_needs_five_subjects_and_its_inbox(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    rights = {
        "publish": [
            "relay",
            "$JS.API.STREAM.INFO.relay",
            "$JS.API.STREAM.CREATE.relay",  # only where the relay is to make the stream
            "$JS.API.CONSUMER.CREATE.relay",
            "$JS.API.CONSUMER.MSG.NEXT.relay.*",
        ],
        "subscribe": ["_INBOX.>"],
    }
    broker = broker_of("nats", tmp_path, user="relay", password="pass", rights=rights)
    await stack.enter_async_context(broker)
    wire = await stack.enter_async_context(Wire(broker))
    replica = await log_of("nats", stack, broker).replica(url=wire.broker_url())
    replica.say(b"before")
    await replica.heard(1)
    wire.cut()
    replica.say(b"after")
    await replica.heard(2)
    await until(lambda: len(replica.lags_s) >= 3)
    assert replica.backplane.counters.outages == 0


@pytest.mark.parametrize("missing", ["relay", "$JS.API.CONSUMER.MSG.NEXT.relay.*"])
async def test_a_right_that_is_missing_on_nats_is_named(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    rights = {"publish": {"deny": [missing]}}
    broker = broker_of("nats", tmp_path, user="relay", password="pass", rights=rights)
    await stack.enter_async_context(broker)
    await log_of("nats", stack, broker).replica(is_up=False)
    said = f'permissions violation for publish to "{missing.rstrip("*").lower()}'
    await until(lambda: any(said in str(each.__dict__.get("error")) for each in caplog.records))


# A stream on NATS that somebody else made


async def made_for(log: BrokerLog, **config: object) -> None:
    """Make the stream before a relay does."""
    assert isinstance(log, NatsLog)
    made = {"name": log.stream, "subjects": [log.stream]} | config
    answer = await log.ask(f"$JS.API.STREAM.CREATE.{log.stream}", json.dumps(made).encode())
    assert "error" not in answer


@pytest.mark.parametrize("kind", ["nats"])
async def test_a_large_message_passes_a_stream_that_takes_little_at_once(kept: BrokerLog) -> None:
    await made_for(kept, max_msg_size=10_000)
    replicas = await kept.replicas(2)
    replicas[0].say(bytes(300_000), b"behind")
    for replica in replicas:
        await replica.heard(2)
        assert replica.payloads == [bytes(300_000), b"behind"]
        assert replica.backplane.counters.outages == 0


@pytest.mark.parametrize("kind", ["nats"])
@pytest.mark.parametrize(
    "config", [{"no_ack": True}, {"max_msg_size": 100}, {"discard": "new"}, {"subjects": ["x"]}]
)
async def test_a_stream_that_is_no_log_is_named_for_that(
    kept: BrokerLog, caplog: pytest.LogCaptureFixture, config: dict[str, object]
) -> None:
    await made_for(kept, **config)
    await kept.replica(is_up=False)
    await until(lambda: any("must " in str(e.__dict__.get("error")) for e in caplog.records))
