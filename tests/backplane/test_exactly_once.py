"""Publishes of relay.v1 that are sent again: relayed once, and answered with one position."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from signal import SIGCONT, SIGSTOP

import pytest
from websockets.exceptions import ConnectionClosed

from tests.support.broker_logs import ONLY_NATS, ONLY_REDIS, BrokerLog
from tests.support.brokers import Broker
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.raw_client import TEXT, frame
from tests.support.relay_process import (
    RelayProcess,
    StartRelay,
    StartReplicas,
    await_close,
    eventually,
)
from tests.support.relay_v1 import (
    Notice,
    RelayV1Client,
    connect_relay_v1,
    decode,
    encode_command,
    number_texts,
    open_relay_v1,
    parse_position,
    publish_all,
)
from tests.support.tcp_proxy import BlockedReadsProxy

OUTAGE = (1013, "backplane unavailable")


class PublisherSession:
    """The client's side of a session: it keeps each message until it is answered.

    Attributes:
        name: of the session; empty: it is not opened yet.
        seen: the latest position when the oldest unanswered message was sent; empty: unknown.
        resumed: what the last welcome reported.
        unanswered: the messages that are not answered, by id.
        positions: of those that are, by id.
    """

    def __init__(self, channel: str = "news") -> None:
        self.channel = channel
        self.name = self.seen = ""
        self.resumed: object = None
        self.unanswered: dict[int, str] = {}
        self.positions: dict[int, str] = {}
        self._last = 0

    @asynccontextmanager
    async def connect(self, relay: RelayProcess) -> AsyncIterator[RelayV1Client]:
        """Connect, and send again what is not answered."""
        query = f"?session={self.name}" if self.name else ""
        query += f"&seen={self.seen}" if self.name and self.seen else ""
        async with open_relay_v1(relay, f"/{query}") as client:
            self.resumed = client.welcome["resumed"]
            self.name = client.welcome["session"]
            for number, text in self.unanswered.items():
                await client.publish(text, channel=self.channel, id=number)
            yield client

    async def publish(self, client: RelayV1Client, *texts: str) -> None:
        """Send messages with the next ids."""
        for text in texts:
            self._last += 1
            self.unanswered[self._last] = text
            await client.publish(text, channel=self.channel, id=self._last)

    async def await_answers(self, client: RelayV1Client, count: int = 0) -> None:
        """Read answers until so many, or else all, are read; assert that they are in order."""
        left = count or len(self.unanswered)
        for _ in range(left):
            answer = await client.next_notice("published")
            assert answer["id"] == next(iter(self.unanswered))
            del self.unanswered[answer["id"]]
            self.positions[answer["id"]] = answer["position"]

    def forget_answers(self) -> None:
        """Regard all messages as unanswered, as if the answers had been lost."""
        first_texts = number_texts(1, self._last + 1)
        self.unanswered = {number: first_texts[number - 1] for number in range(1, self._last + 1)}


def raw_publish(number: int, channel: str = "news") -> bytes:
    command = encode_command("publish", str(number), channel=channel, id=number)
    assert isinstance(command, str)
    return frame(TEXT, command.encode())


async def total(relays: Iterable[RelayProcess], name: str) -> float:
    """Return the sum of a metric over replicas."""
    return sum([await relay.metric(f"websocket_{name}_total") for relay in relays])


async def assert_counted(relays: Sequence[RelayProcess], *, messages: int, repeats: int) -> None:
    """Assert how many messages and repeats all replicas together have counted."""

    async def check() -> tuple[bool, object]:
        counts = await total(relays, "messages"), await total(relays, "publish_repeats")
        return counts == (messages, repeats), counts

    await eventually(check, f"{messages} messages and {repeats} repeats")
    for relay in relays:
        assert await relay.metric("websocket_refusals_total", reason="unconfirmed") == 0


async def assert_received_once(
    subscribers: Sequence[RelayV1Client], texts: Sequence[str], publish_last: RelayProcess
) -> None:
    """Assert that all subscribers receive these messages, and then the next one."""
    response = await publish_by_post(publish_last, "news", b"the last one", TEXT_TYPE)
    assert response.status_code == 202
    for subscriber in subscribers:
        assert await subscriber.next_messages(len(texts) + 1) == [*texts, "the last one"]
        assert subscriber.notices == []


# Broken connections


async def test_messages_sent_again_after_a_broken_connection_are_answered_with_their_positions(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    session = PublisherSession()
    async with connect_relay_v1(one, "news") as first, connect_relay_v1(two, "news") as second:
        async with session.connect(one) as client:
            assert session.resumed is False
            await session.publish(client, *number_texts(1, 11))
            await session.await_answers(client)
            client.connection.transport.abort()
        positions = dict(session.positions)
        name = session.name
        for relay in (one, two, one):
            session.forget_answers()
            async with session.connect(relay) as client:
                assert (session.resumed, session.name) == (True, name)
                await session.await_answers(client)
                assert session.positions == positions
        async with session.connect(two) as client:
            await session.publish(client, "11")
            await session.await_answers(client)
        assert list(session.positions) == list(range(1, 12))
        assert_increasing(session.positions.values())
        await assert_received_once([first, second], number_texts(1, 12), two)
        assert first.position == second.position
    await assert_counted([one, two], messages=12, repeats=30)


def assert_increasing(positions: Iterable[str]) -> None:
    parsed = [parse_position(each) for each in positions]
    assert parsed == sorted(set(parsed))


@ONLY_REDIS
async def test_a_client_that_resets_its_connection_after_each_write_publishes_each_message_once(
    replicas_with: StartReplicas,
) -> None:
    """How much of a write is relayed before the reset varies. No message counts as unconfirmed."""
    one, two = replicas_with(2)
    count = 40
    async with connect_relay_v1(two, "news") as subscriber:
        session = ""
        for first in range(1, count + 1, 4):
            for relay in (one, two, one):
                async with await relay.connect_tcp() as raw:
                    path = f"/?session={session}" if session else "/"
                    await raw.upgrade(path, Sec_WebSocket_Protocol="relay.v1")
                    welcome = decode(await raw.read_message())[0]
                    assert welcome["resumed"] is bool(session)
                    session = welcome["session"]
                    await raw.send(b"".join(map(raw_publish, range(first, first + 4))))
                    if relay is two:
                        answers = [decode(await raw.read_message())[0] for _ in range(4)]
                        assert [each["id"] for each in answers] == [*range(first, first + 4)]
                    raw.reset()
        await assert_received_once([subscriber], number_texts(1, count + 1), one)
    for relay in (one, two):
        assert await relay.metric("websocket_refusals_total", reason="unconfirmed") == 0
    assert await total([one, two], "messages") == count + 1


async def test_answers_are_in_the_order_of_the_ids_over_all_channels(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    count = 300

    async def publish_to_channels(relay: RelayProcess) -> list[Notice]:
        async with open_relay_v1(relay) as client:
            for number in range(1, count + 1):
                await client.publish(str(number), channel=f"news.{number % 7}")
            return [await client.next_notice("published") for _ in range(count)]

    for answers in await asyncio.gather(*map(publish_to_channels, (one, two))):
        assert [answer["id"] for answer in answers] == list(range(1, count + 1))
        assert_increasing(answer["position"] for answer in answers)
    await assert_counted([one, two], messages=2 * count, repeats=0)


# Replicas that are killed or stand still


@pytest.mark.parametrize("answers", [0, 1, 20])
async def test_messages_in_flight_in_a_killed_replica_are_relayed_once(
    replicas_with: StartReplicas, answers: int
) -> None:
    """Whatever of them has reached the log."""
    one, two = replicas_with(2)
    count = 60
    session = PublisherSession()
    async with connect_relay_v1(two, "news") as subscriber:
        async with session.connect(one) as client:
            await session.publish(client, *number_texts(1, count + 1))
            if answers:
                await session.await_answers(client, answers)
            one.process.kill()
            client.connection.transport.abort()
        async with session.connect(two) as client:
            assert session.resumed is True
            await session.publish(client, str(count + 1))
            await session.await_answers(client)
        assert list(session.positions) == list(range(1, count + 2))
        assert_increasing(session.positions.values())
        await assert_received_once([subscriber], number_texts(1, count + 2), two)


async def test_a_message_in_the_log_that_the_next_replica_has_not_read_is_relayed_once(
    replicas_with: StartReplicas, reads_proxy: BlockedReadsProxy, reads_proxy_url: str
) -> None:
    (one,) = await asyncio.to_thread(replicas_with, 1)
    (two,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
    session = PublisherSession()
    async with connect_relay_v1(two, "news") as subscriber:
        async with session.connect(one) as client:
            reads_proxy.is_blocked = True
            await session.publish(client, *number_texts(1, 6))
            await session.await_answers(client)
            positions = dict(session.positions)
            one.process.kill()
        session.forget_answers()
        async with session.connect(two) as client:
            assert session.resumed is True
            await session.publish(client, "6")
            await two.await_metric("websocket_backplane_pending_bytes", 0)
            reads_proxy.release()
            await session.await_answers(client)
        assert {number: session.positions[number] for number in positions} == positions
        await assert_received_once([subscriber], number_texts(1, 7), two)
    assert await two.metric("websocket_publish_repeats_total") == 5
    assert await two.metric("websocket_messages_total") == 2


async def test_messages_that_a_frozen_replica_relays_after_they_were_sent_again_are_repeats(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    session = PublisherSession()
    async with connect_relay_v1(two, "news") as subscriber:
        async with session.connect(one) as client:
            await session.publish(client, *number_texts(1, 4))
            await session.await_answers(client)
            one.signal(SIGSTOP)
            await session.publish(client, *number_texts(4, 11))
            async with session.connect(two) as other:
                assert session.resumed is True
                await session.publish(other, "11")
                await session.await_answers(other)
            one.signal(SIGCONT)
            late = [await client.next_notice("published") for _ in range(4, 11)]
            assert [each["position"] for each in late] == [
                session.positions[number] for number in range(4, 11)
            ]
        await assert_received_once([subscriber], number_texts(1, 12), one)
    await assert_counted([one, two], messages=12, repeats=7)


@ONLY_NATS
async def test_a_frozen_replica_relays_what_of_a_dead_connection_was_not_sent_again(
    replicas_with: StartReplicas,
) -> None:
    """The client's machine failed: nothing is sent again, and what arrived is relayed once."""
    one, two = replicas_with(2)
    async with connect_relay_v1(two, "news") as subscriber:
        async with await one.connect_tcp() as raw:
            await raw.upgrade("/", Sec_WebSocket_Protocol="relay.v1")
            await raw.read_message()
            one.signal(SIGSTOP)
            await raw.send(b"".join(map(raw_publish, range(1, 6))))
            raw.end_stream()
        one.signal(SIGCONT)
        assert await subscriber.next_messages(5) == number_texts(1, 6)
    await assert_counted([one, two], messages=5, repeats=0)


async def test_a_replica_that_has_read_the_retention_decides_like_the_others(
    replicas_with: StartReplicas,
) -> None:
    (one,) = await asyncio.to_thread(replicas_with, 1)
    session = PublisherSession()
    async with connect_relay_v1(one, "news") as subscriber:
        async with session.connect(one) as client:
            await session.publish(client, *number_texts(1, 6))
            await session.await_answers(client)
        positions = dict(session.positions)
        session.forget_answers()
        async with session.connect(one) as client:  # these repeats are counted, and not in the log
            await session.await_answers(client)
        (two,) = await asyncio.to_thread(replicas_with, 1)
        session.forget_answers()
        async with session.connect(two) as client:
            assert session.resumed is True
            await session.publish(client, "6")
            await session.await_answers(client)
        assert {number: session.positions[number] for number in positions} == positions
        await assert_received_once([subscriber], number_texts(1, 7), two)
    async with connect_relay_v1(two, "news", history=100) as reader:
        assert await reader.next_messages(7) == [*number_texts(1, 7), "the last one"]
    await assert_counted([one, two], messages=7, repeats=10)


@ONLY_REDIS
async def test_repeats_in_the_log_are_not_in_the_history_of_a_replica_that_starts(
    replicas_with: StartReplicas, reads_proxy: BlockedReadsProxy, reads_proxy_url: str
) -> None:
    (one,) = await asyncio.to_thread(replicas_with, 1)
    (two,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
    session = PublisherSession()
    async with session.connect(one) as client:
        reads_proxy.is_blocked = True
        await session.publish(client, *number_texts(1, 4))
        await session.await_answers(client)
    session.forget_answers()
    async with session.connect(two) as client:
        await two.await_metric("websocket_backplane_pending_bytes", 0)
        reads_proxy.release()
        await session.await_answers(client)
    (three,) = await asyncio.to_thread(replicas_with, 1)
    for relay in (one, two, three):
        async with connect_relay_v1(relay, "news", history=100) as reader:
            assert await reader.next_messages(3) == number_texts(1, 4)
            assert reader.position == session.positions[3]
            await reader.next_notice("live")
    await assert_counted([one, two], messages=3, repeats=3)


# Two connections of one session


@ONLY_REDIS
async def test_a_session_that_is_resumed_with_messages_in_flight_answers_each_once(
    replicas_with: StartReplicas, reads_proxy: BlockedReadsProxy, reads_proxy_url: str
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
    session = PublisherSession()
    async with connect_relay_v1(relay, "news") as subscriber, session.connect(relay) as older:
        reads_proxy.is_blocked = True
        await session.publish(older, *number_texts(1, 11))
        await older.send("ping", id=99)
        await older.next_notice("pong")
        async with session.connect(relay) as newer:
            assert session.resumed is True
            assert await await_close(older.connection) == (1008, "session resumed elsewhere")
            await session.publish(newer, "11")
            await newer.send("ping", id=99)
            await newer.next_notice("pong")
            reads_proxy.release()
            await session.await_answers(newer)
            await newer.send("ping", id=100)
            assert (await newer.next_notice())["type"] == "pong"
        await assert_received_once([subscriber], number_texts(1, 12), relay)
    await relay.await_metric("websocket_closes_total", 1, reason="session_resumed")
    await assert_counted([relay], messages=12, repeats=10)


async def test_in_one_process_the_older_connection_of_a_session_is_closed(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    session = PublisherSession()
    async with connect_relay_v1(relay, "news") as subscriber:
        async with session.connect(relay) as older:
            await session.publish(older, "1", "2")
            await session.await_answers(older)
            async with session.connect(relay) as newer:
                assert await await_close(older.connection) == (1008, "session resumed elsewhere")
                await session.publish(newer, "3")
                await session.await_answers(newer)
        session.forget_answers()
        positions = dict(session.positions)
        async with session.connect(relay) as client:
            await session.await_answers(client)
            await session.publish(client, "4")
            await session.await_answers(client)
        assert session.positions | positions == session.positions
        await assert_received_once([subscriber], number_texts(1, 5), relay)
    await assert_counted([relay], messages=5, repeats=3)


# Outages


@pytest.mark.parametrize("sent_again_on", ["one", "two"])
async def test_a_publisher_in_an_outage_is_closed_without_an_answer_and_sends_again(
    broker: Broker, replicas_with: StartReplicas, sent_again_on: str
) -> None:
    one, two = replicas_with(2)
    session = PublisherSession()
    async with connect_relay_v1(two, "news") as subscriber:
        async with session.connect(one) as client:
            await session.publish(client, "1")
            await session.await_answers(client)
            broker.freeze()
            await session.publish(client, *number_texts(2, 5))
            assert await rest_of(client) == ([], OUTAGE)
        broker.thaw()
        for relay in (one, two):
            await relay.await_metric("websocket_backplane_up", 1)
        async with session.connect(one if sent_again_on == "one" else two) as client:
            assert session.resumed is True
            await session.publish(client, "5")
            await session.await_answers(client)
        await assert_received_once([subscriber], number_texts(1, 6), one)
    for relay in (one, two):
        assert await relay.metric("websocket_refusals_total", reason="unconfirmed") == 0


async def rest_of(client: RelayV1Client) -> tuple[list[Notice], tuple[int | None, str | None]]:
    """Return what the relay sends besides heartbeats, and the close code and reason."""
    rest: list[Notice] = []
    with suppress(ConnectionClosed):
        while True:
            header, _ = await client.receive()
            if header.get("type") != "heartbeat":
                rest.append(header)
    return rest, await await_close(client.connection)


async def test_a_publish_in_an_outage_closes_without_an_answer_and_a_subscription_is_refused(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (one,) = replicas_with(1)
    session = PublisherSession()
    async with connect_relay_v1(one, "news") as subscriber, session.connect(one) as client:
        broker.freeze()
        await one.await_metric("websocket_backplane_up", 0)
        await subscriber.next_notice("live")
        refused = await subscriber.subscribe("other")
        assert (refused["status"], refused["reason"]) == (503, "backplane unavailable")
        assert 1 <= refused["retry_after_s"] <= 5
        await session.publish(client, "1", "2")
        assert await rest_of(client) == ([], OUTAGE)
        broker.thaw()
        await one.await_metric("websocket_backplane_up", 1)
        async with session.connect(one) as again:
            assert session.resumed is True
            await session.await_answers(again)
        await assert_received_once([subscriber], ["1", "2"], one)
    await assert_counted([one], messages=3, repeats=0)


async def test_messages_in_the_log_that_are_not_read_before_an_outage_are_relayed_once(
    replicas_with: StartReplicas, reads_proxy: BlockedReadsProxy, reads_proxy_url: str
) -> None:
    """Some are confirmed and not read, the later ones are rejected."""
    (one,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
    (two,) = await asyncio.to_thread(replicas_with, 1)
    session = PublisherSession()
    async with connect_relay_v1(two, "news") as subscriber:
        async with session.connect(one) as client:
            reads_proxy.is_blocked = True
            await session.publish(client, *number_texts(1, 4))
            assert await subscriber.next_messages(3) == number_texts(1, 4)
            await one.await_metric("websocket_backplane_up", 0)
            await session.publish(client, *number_texts(4, 6))
            await one.await_metric_at_least("websocket_backplane_unavailable_total", 1)
            async with session.connect(two) as other:
                assert session.resumed is True
                await session.await_answers(other)
            reads_proxy.release()
            await one.await_metric("websocket_backplane_up", 1)
            rest, closed = await rest_of(client)
            assert closed == OUTAGE
            # The first three were in the log; the others are no errors, but sent again.
            assert [each["id"] for each in rest if each["type"] == "published"] == [1, 2, 3][
                : len(rest)
            ]
            assert len(rest) <= 3
        async with connect_relay_v1(one, "news", history=100) as reader:
            assert await reader.next_messages(5) == number_texts(1, 6)
        await assert_received_once([subscriber], number_texts(4, 6), one)
    assert await total([one, two], "messages") == 6
    assert await total([one, two], "publish_repeats") == 3


@ONLY_REDIS
async def test_a_message_that_the_broker_has_lost_is_answered_with_504(
    replicas_with: StartReplicas,
    reads_proxy: BlockedReadsProxy,
    reads_proxy_url: str,
    broker_log: BrokerLog,
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
    async with open_relay_v1(relay) as client:
        await client.publish("relayed", channel="news")
        await client.next_notice("published")
        reads_proxy.is_blocked = True
        await client.publish("lost", channel="news")
        await client.publish("lost, too", channel="news")
        await client.send("ping")
        await client.next_notice("pong")
        await relay.await_metric("websocket_backplane_pending_bytes", 0)
        await broker_log.purge()
        await client.publish("after", channel="news")
        await relay.await_metric("websocket_backplane_pending_bytes", 0)
        reads_proxy.release()
        for number in (2, 3):
            assert await client.next_notice() == {
                "type": "error",
                "id": number,
                "status": 504,
                "reason": "publish unconfirmed",
            }
        assert (await client.next_notice("published"))["id"] == client.last_id
    assert await relay.metric("websocket_refusals_total", reason="unconfirmed") == 2


@ONLY_NATS
async def test_where_a_replica_relays_alone_in_an_outage_its_clients_publish_once(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, backplane={"on_outage": "local"})
    session = PublisherSession()
    async with connect_relay_v1(relay, "news") as subscriber:
        async with session.connect(relay) as client:
            await session.publish(client, "1")
            await session.await_answers(client)
            broker.freeze()
            await session.publish(client, "2", "3")
            await session.await_answers(client)
            await session.publish(client, "4")
            await session.await_answers(client)
        positions = dict(session.positions)
        session.forget_answers()
        async with session.connect(relay) as client:
            assert session.resumed is True
            await session.await_answers(client)
        assert session.positions == positions
        broker.thaw()
        await relay.await_metric("websocket_backplane_up", 1)
        await assert_received_once([subscriber], number_texts(1, 5), relay)
    await assert_counted([relay], messages=5, repeats=4)


# Sessions that are known, and those that are not


async def test_after_a_restart_in_one_process_a_session_is_unknown(relay_with: StartRelay) -> None:
    session = PublisherSession()
    async with session.connect(relay_with()) as client:
        await session.publish(client, "1")
        await session.await_answers(client)
        session.seen = session.positions[1]
    name = session.name
    async with session.connect(relay_with()) as client:
        assert session.resumed is False
        assert session.name != name


@pytest.mark.parametrize("evidence", ["none", "position", "publish", "opening"])
async def test_after_a_gap_a_session_is_known_by_a_later_position_publish_or_opening_only(
    replicas_with: StartReplicas, broker_log: BrokerLog, evidence: str
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    session = PublisherSession()
    async with session.connect(relay) as client:
        await session.publish(client, "1")
        await session.await_answers(client)
        session.seen = session.positions[1]
        await broker_log.append_raw(b"no packet")
        await relay.await_metric("websocket_backplane_unreadable_total", 1)
        if evidence == "publish":
            await session.publish(client, "after the gap")
            await session.await_answers(client)
    if evidence == "position":
        response = await publish_by_post(relay, "news", b"after the gap", TEXT_TYPE)
        session.seen = response.json()["position"]
    elif evidence == "opening":
        session = PublisherSession()
        async with session.connect(relay):
            pass
    name = session.name
    async with session.connect(relay) as client:
        assert session.resumed is (evidence != "none")
        assert (session.name == name) is (evidence != "none")
        await session.publish(client, "2")
        await session.await_answers(client)


async def test_a_replica_that_starts_knows_sessions_by_what_the_retention_holds(
    replicas_with: StartReplicas, broker_log: BrokerLog
) -> None:
    (one,) = await asyncio.to_thread(replicas_with, 1)
    old, new, late = (PublisherSession() for _ in range(3))
    async with new.connect(one):
        pass
    async with old.connect(one) as client:
        await old.publish(client, "1")
        await old.await_answers(client)
    await publish_all(one, "other", "purged")
    await broker_log.purge()
    async with new.connect(one) as client:
        await new.publish(client, "1")
        await new.await_answers(client)
    (two,) = await asyncio.to_thread(replicas_with, 1)
    async with late.connect(one):
        pass
    for session, is_known in ((old, False), (new, True), (late, True)):
        name = session.name
        async with session.connect(two):
            assert session.resumed is is_known
            assert (session.name == name) is is_known


async def test_a_thousand_messages_in_flight_are_answered_when_they_are_sent_again(
    relay_with: StartRelay,
) -> None:
    """Each is in a write of its own, as over a slow network."""
    relay = relay_with()
    session = PublisherSession()
    count = 1_000
    async with connect_relay_v1(relay, "news") as subscriber:
        async with session.connect(relay) as client:
            await session.publish(client, *number_texts(1, count + 1))
            await session.await_answers(client)
        positions = dict(session.positions)
        session.forget_answers()
        async with session.connect(relay) as client:
            assert session.resumed is True
            await session.await_answers(client)
        assert session.positions == positions
        await assert_received_once([subscriber], number_texts(1, count + 1), relay)
    await assert_counted([relay], messages=count + 1, repeats=count)


@pytest.mark.parametrize(
    "query",
    [
        *("session=", "session=x", "session=1-2-3.short", "session=1-2-3.x&seen=1-1-1"),
        "session=1-2-3.abcdefghijklmnopqrstuvabcdef&session=1-2-3.abcdefghijklmnopqrstuvabcdef",
        "session=1-2-3.abcdefghijklmnopqrstuvabcdef&seen=now",
    ],
)
async def test_an_invalid_session_is_refused_and_an_empty_one_is_new(
    relay_with: StartRelay, query: str
) -> None:
    relay = relay_with()
    async with AsyncExitStack() as stack:
        raw = await stack.enter_async_context(await relay.connect_tcp())
        if query == "session=":
            await raw.upgrade(f"/?{query}", Sec_WebSocket_Protocol="relay.v1")
            assert decode(await raw.read_message())[0]["resumed"] is False
            return
        request = f"GET /?{query} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        request += "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        request += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: relay.v1\r\n\r\n"
        await raw.send(request.encode())
        assert (await raw.read_response()).status == 400


async def test_a_made_up_session_is_a_new_one(relay_with: StartRelay) -> None:
    relay = relay_with()
    async with open_relay_v1(relay) as client:
        name = client.welcome["session"]
    opened_at, _, secret = name.partition(".")
    epoch, offset, index = opened_at.split("-")
    for text in (
        f"{opened_at}.{secret[:-1]}{'a' if secret[-1] != 'a' else 'b'}",
        f"{int(epoch) - 1}-{offset}-{index}.{secret}",
    ):
        async with open_relay_v1(relay, f"/?session={text}") as client:
            assert client.welcome["resumed"] is False
            assert client.welcome["session"] not in {name, text}
