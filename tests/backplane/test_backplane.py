"""What every backplane promises: memory, Redis and NATS. Real brokers, each test its own."""

import asyncio
import logging
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from websocket_relay.backplane import replicated
from websocket_relay.backplane.factory import open_backplane
from websocket_relay.backplane.interface import Position
from websocket_relay.outcomes import UnusableSettingError

from tests.support.certificates import make_pair
from tests.support.logs_kept import (
    BrokerLog,
    Log,
    Pending,
    Replica,
    assert_growing,
    broker_of,
    log_of,
    until,
)
from tests.support.proxy import Connection, Proxy

BROKERS = ["redis", "redis-6.2", "nats"]
SECRET = "s3cret-%2F-pass"
PLAIN_SECRET = "s3cret-/-pass"


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(params=["memory", *BROKERS])
async def log(request: pytest.FixtureRequest, stack: AsyncExitStack, tmp_path: Path) -> Log:
    if request.param == "memory":
        return Log(stack, None, "memory://")
    broker = await stack.enter_async_context(broker_of(request.param, tmp_path / "broker"))
    return log_of(request.param, stack, broker)


@pytest.fixture(params=BROKERS)
async def kept(request: pytest.FixtureRequest, stack: AsyncExitStack, tmp_path: Path) -> BrokerLog:
    """A log that a broker keeps."""
    broker = await stack.enter_async_context(broker_of(request.param, tmp_path / "broker"))
    return log_of(request.param, stack, broker)


@pytest.fixture(params=["redis", "nats"])
def kind(request: pytest.FixtureRequest) -> str:
    """One of the brokers."""
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_goes_unnoticed(caplog: pytest.LogCaptureFixture) -> object:
    """No task ends in an exception that nobody sees, and no library complains by itself."""
    caplog.set_level(logging.DEBUG)
    yield
    assert [
        record.getMessage()
        for record in caplog.records
        if not record.name.startswith("websocket_relay") and record.levelno > logging.WARNING
    ] == []


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declare an outage after a second instead of three."""
    monkeypatch.setattr(replicated, "OUTAGE_AFTER_S", 1.0)
    monkeypatch.setattr(replicated, "APPEND_TIMEOUT_S", 0.7)


def numbered(name: str, count: int) -> list[bytes]:
    return [f"{name} {number}".encode() for number in range(count)]


async def said_in_turns(replicas: list[Replica], count: int, pause_s: float = 0) -> list[bytes]:
    """Let several clients of each replica speak, each in its own rhythm; return what they said."""
    said = []

    async def speak(replica: Replica, name: str) -> None:
        for payload in numbered(name, count):
            replica.say(payload)
            said.append(payload)
            if random.random() < 0.3 or pause_s:
                await asyncio.sleep(random.uniform(0, pause_s))

    names = [(each, f"{index}/{one}") for index, each in enumerate(replicas) for one in range(5)]
    await asyncio.gather(*(speak(*each) for each in names))
    return said


def assert_each_in_its_order(heard: list[bytes], said: list[bytes]) -> None:
    """All was heard once, and what one client said in the order in which it said it."""
    assert len(heard) == len(said)
    by_client: dict[bytes, list[int]] = {}
    for payload in heard:
        client, _, number = payload.rpartition(b" ")
        by_client.setdefault(client, []).append(int(number))
    assert sum(map(len, by_client.values())) == len(set(said))
    assert all(numbers == list(range(len(numbers))) for numbers in by_client.values())


# One order


async def test_all_replicas_hear_all_clients_in_one_order(log: Log) -> None:
    replicas = list(await log.replicas(3))
    said = await said_in_turns(replicas, 200)
    for replica in replicas:
        await replica.heard(len(said))
        assert replica.entries == replicas[0].entries
    assert_each_in_its_order(replicas[0].payloads, said)
    assert_growing(replicas[0].positions)


async def test_messages_come_as_they_were_said(log: Log) -> None:
    replica = (await log.replicas(2))[-1]
    said = [
        ("a", 1, "grüße".encode()),
        ("a" * 128, 2, bytes(range(256))),
        ("A.b_c:d-e", 2, b""),
        ("a", 1, b""),
    ]
    for channel, opcode, payload in said:
        replica.say(payload, channel=channel, opcode=opcode)
    await replica.heard(len(said))
    assert [entry[1:] for entry in replica.entries] == said


async def test_positions_grow_over_the_life_of_a_replica(log: Log) -> None:
    before = await log.replica()
    before.say(*numbered("before", 10))
    await before.heard(10)
    await before.stop()
    await asyncio.sleep(0.002)  # the log in the process counts lives by the millisecond
    after = await log.replica()
    after.say(*numbered("after", 10))
    await after.hears(*numbered("after", 10))
    assert after.positions[-10] > before.positions[-1]
    assert_growing(after.positions)


async def test_positions_grow_over_the_life_of_a_broker(kept: BrokerLog) -> None:
    replica = await kept.replica()
    for number in range(3):
        replica.say(b"%d" % number)
        await replica.heard(number + 1)
        await kept.broker.restart()
    assert_growing(replica.positions)


async def test_a_replica_that_starts_has_heard_what_is_kept_before_it_is_up(
    kept: BrokerLog,
) -> None:
    first = await kept.replica()
    first.say(*numbered("early", 100))
    first.say(b"x" * 2_000_000)
    await first.heard(101)
    second = await kept.replica()
    assert second.entries == first.entries


async def test_a_replica_says_from_where_on_it_knows_all(log: Log) -> None:
    first = await log.replica()
    first.say(b"first")
    await first.heard(1)
    assert len(first.whole_from) == 1
    assert Position(0, 0, 0) < first.whole_from[0] < first.positions[0]


async def test_large_messages_keep_their_place_among_small_ones(log: Log) -> None:
    replicas = await log.replicas(2)
    random_bytes = random.Random(4).randbytes
    said = [
        payload
        for size in (1 << 20, 3 << 20, 1, (1 << 20) - 30, (1 << 20) + 1)
        for payload in (b"small", random_bytes(size))
    ]
    for number, payload in enumerate(said):
        replicas[number % len(replicas)].say(payload, opcode=2)
        await replicas[0].heard(number + 1)
    for replica in replicas:
        await replica.heard(len(said))
        assert replica.payloads == said


async def test_nothing_depends_on_where_a_batch_ends(log: Log) -> None:
    replicas = await log.replicas(2)
    sizes = [replicated.PACKET_BYTES + more for more in (-8, -7, -6, 0, 1)]
    said = [bytes([index]) * size for index, size in enumerate(sizes * 3)]
    said += [b""] * 20_000  # more than are taken at once
    replicas[0].say(*said, opcode=2)
    for replica in replicas:
        await replica.heard(len(said))
        assert replica.payloads == said
        assert_growing(replica.positions)


async def test_streams_of_one_broker_never_mix(kept: BrokerLog) -> None:
    ours, theirs = await kept.replica(), await kept.replica(stream="theirs")
    ours.say(*numbered("ours", 50))
    theirs.say(*numbered("theirs", 50))
    await ours.hears(*numbered("ours", 50))
    await theirs.hears(*numbered("theirs", 50))
    assert ours.payloads == numbered("ours", 50)
    assert theirs.payloads == numbered("theirs", 50)


async def test_what_was_appended_does_not_wait_any_more(log: Log) -> None:
    replica = await log.replica()
    replica.say(*numbered("said", 5000))
    async with asyncio.timeout(5):
        await replica.backplane.flush()
    assert replica.pending.bytes == 0
    await replica.heard(5000)


async def test_a_replica_that_reads_slowly_misses_nothing_and_sees_no_outage(
    kept: BrokerLog, hasty: None
) -> None:
    replicas = await kept.replicas(2)
    slow = replicas[1]
    slow.backplane.pause_reading()
    replicas[0].say(*numbered("said", 1000))
    await replicas[0].heard(1000)
    await asyncio.sleep(2)  # for nothing to happen
    assert len(slow.entries) <= 1000
    slow.backplane.resume_reading()
    await slow.heard(1000)
    assert slow.entries == replicas[0].entries
    assert slow.backplane.counters.outages == 0
    assert slow.backplane.counters.gaps == 0


async def test_a_canary_says_how_long_a_message_takes(kept: BrokerLog) -> None:
    replica = await kept.replica()
    await until(lambda: len(replica.lags_s) >= 2)
    assert 0 < min(replica.lags_s) < 0.5


# A broker that goes and comes back


async def test_a_broker_killed_amid_traffic_loses_nothing_and_says_nothing_twice(
    kept: BrokerLog,
) -> None:
    replicas = list(await kept.replicas(2))
    speaking = asyncio.create_task(said_in_turns(replicas, 150, pause_s=0.02))
    for _ in range(2):
        await replicas[0].heard(len(replicas[0].entries) + 100)
        await kept.broker.restart()
    said = await speaking
    for replica in replicas:
        await replica.heard(len(said))
        await replica.backplane.flush()
        assert replica.entries == replicas[0].entries
        assert replica.speaker.told == 0
        assert replica.backplane.counters.lost == replica.backplane.counters.gaps == 0
    assert_each_in_its_order(replicas[0].payloads, said)


async def test_a_slow_broker_loses_nothing_and_is_no_outage(kept: BrokerLog) -> None:
    replicas = list(await kept.replicas(2))

    async def slow_down() -> None:
        while True:
            kept.broker.freeze()
            await asyncio.sleep(0.2)  # most of the time
            kept.broker.thaw()
            await asyncio.sleep(0.05)

    slow = asyncio.create_task(slow_down())
    said = await said_in_turns(replicas, 100, pause_s=0.02)
    for replica in replicas:
        await replica.heard(len(said))
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
    kept.broker.thaw()
    for replica in replicas:
        assert replica.entries == replicas[0].entries
        assert replica.speaker.told == replica.backplane.counters.outages == 0
    assert_each_in_its_order(replicas[0].payloads, said)


async def test_a_broker_that_is_stopped_and_started_is_found_again(kept: BrokerLog) -> None:
    replica = await kept.replica()
    kept.broker.stop()
    replica.say(b"meanwhile")
    await kept.broker.start()
    await replica.hears(b"meanwhile")
    assert replica.payloads == [b"meanwhile"]


async def test_a_relay_that_starts_before_its_broker_waits_for_it(
    stack: AsyncExitStack,
    kind: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    hasty: None,
) -> None:
    broker = broker_of(kind, tmp_path)
    log = log_of(kind, stack, broker)
    replica = await log.replica(is_up=False)
    await replica.is_out()
    assert not replica.backplane.up.is_set()
    failed = [each for each in caplog.records if each.getMessage() == "backplane failed"]
    assert 1 <= len(failed) <= 4  # and not at every try
    await stack.enter_async_context(broker)
    await replica.is_up()
    replica.say(b"now")
    await replica.heard(1)


async def test_a_frozen_broker_is_an_outage_that_publishers_are_told_of(
    kept: BrokerLog, hasty: None
) -> None:
    replicas = await kept.replicas(2)
    replicas[0].say(b"before")
    await replicas[1].heard(1)
    kept.broker.freeze()
    replicas[0].say(*numbered("in doubt", 100))
    for replica in replicas:
        await replica.is_out()
        assert not replica.backplane.up.is_set()
    assert replicas[0].speaker.told == 1
    assert replicas[0].pending.bytes == 0
    replicas[0].say(b"refused", b"refused")
    assert replicas[0].speaker.told == 3
    assert replicas[0].backplane.counters.unavailable == 102
    kept.broker.thaw()
    for replica in replicas:
        await replica.is_up()
    replicas[0].say(b"after")
    for replica in replicas:
        await replica.hears(b"after")
        assert replica.backplane.counters.lost == 0
    assert replicas[0].entries == replicas[1].entries
    # What was on its way when it froze may have got there.
    assert replicas[0].payloads in (
        [b"before", b"after"],
        [b"before", *numbered("in doubt", 100), b"after"],
    )


async def test_a_frozen_broker_is_an_outage_in_which_a_replica_goes_on_alone(
    kept: BrokerLog, hasty: None
) -> None:
    replicas = [await kept.replica(on_outage="local") for _ in range(2)]
    replicas[0].say(b"before")
    for replica in replicas:
        await replica.heard(1)
    kept.broker.freeze()
    replicas[0].say(*numbered("in doubt", 10))
    await replicas[0].heard(11)
    replicas[0].say(b"alone")
    assert replicas[0].payloads == [b"before", *numbered("in doubt", 10), b"alone"]
    assert replicas[0].backplane.counters.local == 11
    await replicas[1].is_out()
    kept.broker.thaw()
    for replica in replicas:
        await replica.is_up()
    replicas[1].say(b"after")
    for replica in replicas:
        await replica.hears(b"after")
        assert replica.backplane.counters.lost == replica.speaker.told == 0
        assert_growing(replica.positions)
    assert replicas[0].payloads == [b"before", *numbered("in doubt", 10), b"alone", b"after"]
    assert b"alone" not in replicas[1].payloads


async def test_a_long_outage_leaves_nothing_behind(kept: BrokerLog, hasty: None) -> None:
    replica = await kept.replica()
    kept.broker.freeze()
    replica.say(b"x" * 1_000_000)
    await replica.is_out()
    await asyncio.sleep(2)  # for some tries
    ours = connections_to(kept.broker.port)
    assert len([state for state, _ in ours if state not in FORGOTTEN]) <= 4
    assert sum(unsent for _, unsent in ours) < 3_000_000
    await replica.stop()
    assert replica.pending.bytes == 0


FORGOTTEN = {"05", "06"}  # FIN-WAIT-2, TIME-WAIT: closed and empty, the kernel's to let go of


def connections_to(port: int) -> list[tuple[str, int]]:
    """Return the connections to a port of this machine: each one's state, and its unsent bytes."""
    listed = "".join(Path(f"/proc/net/{each}").read_text() for each in ("tcp", "tcp6"))
    fields = [line.split() for line in listed.splitlines()]
    ours = [each for each in fields if each[2].endswith(f":{port:04X}")]
    return [(state, int(queues.split(":")[0], 16)) for _, _, _, state, queues, *_ in ours]


class LossyProxy(Proxy):
    """Loses an answer when it is told to."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.marker = b""
        self.cuts = 0
        self._marked: Connection | None = None

    def asks(self, data: bytes, connection: Connection) -> bytes:
        if self.marker and self.marker in data:
            self.marker, self._marked = b"", connection
        return data

    def answers(self, data: bytes, connection: Connection) -> bytes | None:
        if connection is self._marked and not data.startswith(b"PING"):
            self.cuts += 1
            return None
        return data


@pytest.mark.parametrize("size", [10, 2_000_000])
async def test_an_append_whose_answer_was_lost_is_there_once(
    kept: BrokerLog, stack: AsyncExitStack, size: int
) -> None:
    proxy = await stack.enter_async_context(LossyProxy(kept.broker.port))
    other = await kept.replica()
    url = kept.url.replace(str(kept.broker.port), str(proxy.port))
    replica = await kept.replica(url=url)
    proxy.marker = b"marked"
    said = [b"marked" + bytes(size), *numbered("behind", 10)]
    replica.say(*said)
    for each in (replica, other):
        await each.heard(11)
        await each.backplane.flush()
        assert each.payloads == said
    assert proxy.cuts == 1
    assert replica.speaker.told == replica.backplane.counters.lost == 0
    if size == 10:
        for each in (replica, other):
            await each.has_left_out(1)
            assert each.payloads == said


# What is kept


async def test_a_stream_keeps_no_more_bytes_than_it_should(
    kept: BrokerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("websocket_relay.backplane.factory.MIN_RETENTION_BYTES", 2_000_000)
    replica = await kept.replica()
    said = [b"%d " % number + bytes(50_000) for number in range(200)]
    for number, payload in enumerate(said):
        replica.say(payload)
        await replica.heard(number + 1)
    assert 1_500_000 < await kept.size_bytes() < 4_000_000
    assert replica.payloads == said
    late = await kept.replica()
    assert 30 <= len(late.entries) <= 80
    assert late.entries == replica.entries[-len(late.entries) :]
    assert replica.positions[-len(late.entries) - 1] < late.whole_from[0] < late.positions[0]


async def test_a_stream_keeps_nothing_much_longer_than_it_should(
    kept: BrokerLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("websocket_relay.backplane.factory.MIN_RETENTION_AGE_S", 1.0)
    replica = await kept.replica()
    for number in range(10):
        replica.say(bytes(10_000))
        await replica.heard(number + 1)
    await until(lambda: len(replica.lags_s) >= 5)  # four seconds
    replica.say(b"young")
    await replica.heard(11)
    assert (await kept.replica()).payloads == [b"young"]
    assert replica.backplane.counters.gaps == 0


# A stream that others touch


@pytest.mark.parametrize("how", [BrokerLog.delete, BrokerLog.empty])
async def test_a_stream_that_loses_what_was_not_read_yet_is_noticed(
    kept: BrokerLog, how: Callable[[BrokerLog], object]
) -> None:
    first, slow = await kept.replicas(2)
    first.say(b"both")
    await slow.heard(1)
    slow.backplane.pause_reading()
    await until(lambda: len(first.lags_s) >= 3)  # it has stopped by now
    first.say(b"lost")
    await first.heard(2)
    await getattr(kept, how.__name__)()
    await asyncio.sleep(0.6)  # the broker may have sent some ahead: those are not lost
    first.say(b"after")
    slow.backplane.resume_reading()
    for replica in (first, slow):
        await replica.hears(b"after")
        assert_growing(replica.positions)
    if b"lost" not in slow.payloads:
        assert slow.backplane.counters.gaps + slow.backplane.counters.lost > 0
        assert slow.whole_from[-1] > slow.positions[0]


async def test_a_stream_that_was_deleted_goes_on(kept: BrokerLog) -> None:
    replicas = await kept.replicas(2)
    replicas[0].say(b"before")
    await replicas[1].heard(1)
    await kept.delete()
    replicas[0].say(b"after")
    for replica in replicas:
        await replica.hears(b"after")
        assert replica.payloads == [b"before", b"after"]
        assert_growing(replica.positions)
    new = await kept.replica()
    assert new.payloads == [b"after"]
    assert new.whole_from[-1] > replicas[0].positions[0]


async def test_a_stream_that_went_back_goes_on_behind_what_was_read(kept: BrokerLog) -> None:
    replica = await kept.replica()
    replica.say(b"before")
    await replica.heard(1)
    await kept.go_back(replica)
    await until(lambda: replica.backplane.counters.gaps > 0)
    await replica.is_up()
    replica.say(b"after")
    await replica.hears(b"after")
    assert_growing(replica.positions)


async def test_garbage_in_the_stream_is_counted_and_passed_by(kept: BrokerLog) -> None:
    replicas = await kept.replicas(2)
    garbage = [b"", b"\x01", b"\x02" + bytes(40), b"garbage", bytes(1000)]
    for data in garbage:
        await kept.put(data)
    replicas[0].say(b"message")
    for replica in replicas:
        await replica.heard(1)
        assert replica.backplane.counters.unreadable == len(garbage)
    third = await kept.replica()
    assert third.payloads == [b"message"]


# Who may, and what is shown


async def test_a_broker_with_a_password_and_tls_serves_and_no_secret_is_logged(
    stack: AsyncExitStack, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"user": "relay"} if kind == "nats" else {}
    broker = broker_of(kind, tmp_path, pair=make_pair(), password=PLAIN_SECRET, **options)
    await stack.enter_async_context(broker)
    url = broker.url_with(f"{broker.user}:{SECRET}")
    log = log_of(kind, stack, broker)
    replica = await log.replica(url=url)
    replica.say(b"message")
    await replica.heard(1)
    await broker.restart()
    replica.say(b"again")
    await replica.heard(2)
    assert_no_secret(caplog)


@pytest.mark.parametrize("wrong", ["user:wrong-s3cret-%2F-pass", "wrong-s3cret-%2F-pass", ""])
async def test_a_wrong_password_is_said_and_not_shown(
    stack: AsyncExitStack,
    kind: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    hasty: None,
    wrong: str,
) -> None:
    options = {"user": "relay"} if kind == "nats" else {}
    broker = broker_of(kind, tmp_path, password=PLAIN_SECRET, **options)
    await stack.enter_async_context(broker)
    log = log_of(kind, stack, broker)
    replica = await log.replica(url=broker.url_with(wrong), is_up=False)
    await replica.is_out()
    (failed,) = {
        record.__dict__["error"]
        for record in caplog.records
        if record.getMessage() == "backplane failed"
    }
    expected = "authorization violation" if kind == "nats" else "(invalid|authentication required)"
    assert any(word in failed.lower() for word in expected.strip("()").split("|"))
    assert_no_secret(caplog)


async def test_a_token_is_taken_and_not_shown(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = broker_of("nats", tmp_path, token="t0ken-of-mine")
    await stack.enter_async_context(broker)
    replica = await log_of("nats", stack, broker).replica()
    replica.say(b"message")
    await replica.heard(1)
    assert "t0ken-of-mine" not in everything_in(caplog)


class LeavesTlsOut:
    """Somebody between a relay and its NATS who takes the word of TLS out of what that says."""

    def __init__(self) -> None:
        self.heard = b""

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"version": "2.12.0", "max_payload": 1048576, "auth_required": true}\r\n'
        )
        self.heard += await reader.read()
        writer.close()


@pytest.mark.fast
async def test_nothing_is_said_to_a_nats_that_leaves_tls_out(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    between = LeavesTlsOut()
    server = await asyncio.start_server(between.talk, "127.0.0.1")
    await stack.enter_async_context(server)
    url = f"tls://relay:{SECRET}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    replica = await Log(stack, None, url).replica(is_up=False)
    await until(lambda: "the server does not speak TLS" in everything_in(caplog))
    await replica.stop()
    assert between.heard == b""


async def test_a_nats_without_jetstream_is_named_for_that(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await stack.enter_async_context(broker_of("nats", tmp_path, jetstream=False))
    await log_of("nats", stack, broker).replica(is_up=False)
    await until(lambda: "JetStream is not enabled" in everything_in(caplog))


async def test_a_message_passes_a_nats_that_takes_little_at_once(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    broker = await stack.enter_async_context(broker_of("nats", tmp_path, max_payload=65_536))
    replica = await log_of("nats", stack, broker).replica()
    replica.say(bytes(1_000_000), b"behind")
    await replica.heard(2)
    assert replica.payloads == [bytes(1_000_000), b"behind"]


async def test_the_second_server_is_tried_where_the_first_is_gone(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    broker = await stack.enter_async_context(broker_of("nats", tmp_path))
    for servers in (f"localhost:1,localhost:{broker.port}", f"localhost:{broker.port},[::1]:1"):
        await log_of("nats", stack, broker).replica(url=f"nats://{servers}")


async def test_a_frozen_broker_does_not_keep_a_relay_from_stopping(kept: BrokerLog) -> None:
    replica = await kept.replica()
    kept.broker.freeze()
    replica.say(b"x" * 3_000_000)
    await asyncio.sleep(0.1)  # it is being sent
    await replica.stop()


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
def test_a_url_that_is_of_no_use_is_a_clear_error_without_its_secrets(url: str) -> None:
    with pytest.raises(UnusableSettingError) as caught:
        opened(url)
    problem = str(caught.value)
    assert problem.startswith("backplane.url: ")
    assert "\n" not in problem
    assert "s3cret" not in problem


def test_no_library_is_loaded_that_is_not_asked_for() -> None:
    code = (
        "import sys; import websocket_relay.backplane.factory; "
        "sys.exit(any(name in sys.modules for name in ('redis', 'nats')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def opened(url: str) -> object:
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


def everything_in(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(str(record.__dict__) for record in caplog.records)


def assert_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    logged = everything_in(caplog)
    assert "s3cret" not in logged
