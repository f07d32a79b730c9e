"""Several replicas on one broker: their clients share channels, also during failures."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from signal import SIGCONT, SIGSTOP

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.broker_logs import ONLY_NATS, ONLY_REDIS, BrokerLog
from tests.support.brokers import Broker
from tests.support.followers import LAST_MESSAGE, make_followers, publish_until
from tests.support.http_requests import BATCH_TYPE, TEXT_TYPE, publish_by_post
from tests.support.raw_client import CLOSE, close_payload, frame
from tests.support.raw_client import TEXT as TEXT_FRAME
from tests.support.relay_process import (
    RelayProcess,
    StartReplicas,
    await_close,
    receive,
    receive_many,
)
from tests.support.relay_v1 import Message, connect_relay_v1, number_texts


async def send_all(client: ClientConnection, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        await client.send(message)
        if number % 10 == 9:
            await asyncio.sleep(0)


async def test_all_clients_of_all_replicas_receive_all_messages_in_one_order(
    replicas_with: StartReplicas,
) -> None:
    relays = replicas_with(3)
    count = 200
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(relay.client("news", max_queue=None))
            for relay in relays
            for _ in range(2)
        ]
        total = count * len(clients)
        async with asyncio.TaskGroup() as group:
            receiving = [group.create_task(receive_many(client, total)) for client in clients]
            for number, client in enumerate(clients):
                messages = [f"{number}: {index}" for index in range(count)]
                group.create_task(send_all(client, messages))
        first = receiving[0].result()
        assert all(task.result() == first for task in receiving)
        for number in range(len(clients)):
            of_client = [text for text in first if str(text).startswith(f"{number}: ")]
            assert of_client == [f"{number}: {index}" for index in range(count)]


async def test_a_broker_that_is_killed_and_restarted_loses_no_message(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2)
    count = 1_000
    async with one.client("news", max_queue=None) as a, two.client("news", max_queue=None) as b:

        async def publish() -> None:
            for number in range(count):
                await a.send(str(number))
                if number == count // 2:
                    await broker.restart()

        async with asyncio.TaskGroup() as group:
            group.create_task(publish())
            receiving = [group.create_task(receive_many(client, count)) for client in (a, b)]
        assert receiving[0].result() == receiving[1].result() == number_texts(0, count)
    assert await one.metric("websocket_backplane_lost_total") == 0
    assert await two.metric("websocket_backplane_lost_total") == 0


@ONLY_REDIS
async def test_in_an_outage_publishers_are_closed_and_new_clients_and_posts_refused(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2)
    async with two.client("news") as subscriber, one.client("news") as publisher:
        await publisher.send("before")
        assert await receive(subscriber) == await receive(publisher) == "before"
        broker.freeze()
        await one.await_metric("websocket_backplane_up", 0)
        await two.await_metric("websocket_backplane_up", 0)
        assert (await one.get("/readyz")).status_code == 503
        assert (await one.get("/readyz")).json() == {"status": "backplane outage"}
        assert (await one.get("/healthz")).status_code == 200
        await publisher.send("not relayed")
        assert await await_close(publisher) == (1013, "backplane unavailable")
        with pytest.raises(InvalidStatus) as refused:
            async with one.client("news"):
                pass
        assert refused.value.response.status_code == 503
        assert "Retry-After" in refused.value.response.headers
        refused_before = await one.metric(
            "websocket_refusals_total", reason="backplane_unavailable"
        )
        for body, media_type in ((b"text", TEXT_TYPE), (b"1\n2", BATCH_TYPE)):
            response = await publish_by_post(one, "news", body, media_type)
            assert (response.status_code, response.text) == (503, "backplane unavailable\n")
            assert 1 <= int(response.headers["retry-after"]) <= 5
        refused_after = refused_before + 2
        await one.await_metric(
            "websocket_refusals_total", refused_after, reason="backplane_unavailable"
        )
        broker.thaw()
        for relay in (one, two):
            await relay.await_metric("websocket_backplane_up", 1)
            assert (await relay.get("/readyz")).status_code == 200
        async with one.client("news") as reconnected:
            await reconnected.send("after")
            assert await receive(subscriber) == "after"
    assert await one.metric("websocket_backplane_outages_total") == 1


@ONLY_NATS
async def test_in_an_outage_a_replica_relays_locally_if_its_settings_allow_it(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2, backplane={"on_outage": "local"})
    async with (
        one.client("news") as a,
        one.client("news") as b,
        two.client("news") as on_other_replica,
    ):
        broker.freeze()
        await one.await_metric("websocket_backplane_up", 0)
        assert (await one.get("/readyz")).status_code == 200
        await a.send("local")
        assert await receive(a) == await receive(b) == "local"
        async with one.client("news") as new:
            await new.send("of a new client")
            assert await receive(a) == await receive(b) == "of a new client"
        broker.thaw()
        for relay in (one, two):
            await relay.await_metric("websocket_backplane_up", 1)
        await a.send("replicated")
        assert await receive(a) == await receive(b) == "replicated"
        assert await receive(on_other_replica) == "replicated"


# A frozen broker under load


async def publish_under_load(
    relay: RelayProcess, name: str, is_over: asyncio.Event, ends: Counter[str]
) -> None:
    """Publish as fast as flow control allows; reconnect after each end, and count it."""
    number = 0
    while not is_over.is_set():
        try:
            async with relay.client("load", max_queue=None) as client:
                while not is_over.is_set():
                    await client.send(f"{name} {number} ".ljust(16_000, "x"))
                    number += 1
        except (ConnectionClosed, InvalidStatus, AttributeError):
            # websockets raises AttributeError if the connection ends during a write.
            ends[name] += 1
            await asyncio.sleep(0.1)


def is_in_order(received: Sequence[Message]) -> bool:
    """Return whether no message is repeated, and those of each publisher are in order."""
    latest: dict[str, int] = {}
    for message in received:
        name, number, *_ = str(message).split()
        if int(number) <= latest.get(name, -1):
            return False
        latest[name] = int(number)
    return True


@ONLY_REDIS
async def test_a_frozen_broker_under_load_does_not_fill_memory_and_repeats_no_message(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    relays = replicas_with(2, limits={"total_backlog_bytes": 8 << 20})
    is_over = asyncio.Event()
    ends = Counter({f"{side}{publisher}": 0 for side in range(2) for publisher in range(2)})
    async with relays[1].client("load", max_queue=None) as subscriber:
        async with asyncio.TaskGroup() as group:
            for name in ends:
                group.create_task(publish_under_load(relays[int(name[0])], name, is_over, ends))
            await receive_many(subscriber, 200)
            before = [relay.rss_bytes() for relay in relays]
            broker.freeze()
            # Each publisher is closed once, and refused at least once.
            while min(ends.values()) < 2:
                for relay, rss_bytes in zip(relays, before, strict=True):
                    assert await relay.metric("websocket_backplane_pending_bytes") < 1 << 20
                    assert relay.rss_bytes() < rss_bytes + (32 << 20)
                await asyncio.sleep(0.2)
            for relay in relays:
                assert await relay.metric("websocket_backplane_up") == 0
            broker.thaw()
            for relay in relays:
                await relay.await_metric("websocket_backplane_up", 1)
            is_over.set()
        async with relays[0].client("load", max_queue=None) as last:
            await last.send(f"last 0 {LAST_MESSAGE}")
        received = [await receive(subscriber)]
        while not str(received[-1]).endswith(LAST_MESSAGE):
            received.append(await receive(subscriber))
    assert is_in_order(received)


# Replicas that start, end and restart


@ONLY_REDIS
async def test_a_replica_that_starts_serves_the_history_before_its_start(
    replicas_with: StartReplicas,
) -> None:
    (one,) = replicas_with(1)
    async with connect_relay_v1(one, "news") as client:
        for number in range(100):
            await client.publish(str(number))
        assert await client.next_messages(50) == number_texts(0, 50)
    (two,) = replicas_with(1)
    async with connect_relay_v1(two, "news", since=client.position) as resumed:
        assert resumed.subscribed["recovered"] is True
        assert await resumed.next_messages(50) == number_texts(50, 100)
    async with two.client(path="/channels/news?history=3") as other:
        assert await receive_many(other, 3) == number_texts(97, 100)


@ONLY_REDIS
async def test_clients_of_a_killed_replica_resume_on_another_without_a_gap(
    replicas_with: StartReplicas,
) -> None:
    one, two = relays = list(replicas_with(2))
    followers = await make_followers(two, 6)
    count = 150

    async def publish() -> None:
        async with two.client("news", max_queue=None) as client:
            for number in range(count):
                await client.send(str(number))
                assert await receive(client) == str(number)
                if number == count // 3:
                    one.end()
                    relays.remove(one)
            await client.send(LAST_MESSAGE)

    async with asyncio.TaskGroup() as group:
        for follower in followers:
            group.create_task(follower.follow(relays))
        group.create_task(publish())
    for follower in followers:
        assert follower.received == [*number_texts(0, count), LAST_MESSAGE]
    assert any(follower.reconnections > 1 for follower in followers)


@ONLY_NATS
async def test_a_rolling_restart_under_load_loses_no_message_and_repeats_none(
    replicas_with: StartReplicas,
) -> None:
    relays = list(replicas_with(2, shutdown={"spread_s": 0.5}))
    followers = await make_followers(relays[0], 8)
    is_over = asyncio.Event()

    async def restart_all() -> None:
        for old in list(relays):
            relays.extend(await asyncio.to_thread(replicas_with, 1, shutdown={"spread_s": 0.5}))
            relays.remove(old)
            assert await old.stop() == 0
        is_over.set()

    async with asyncio.TaskGroup() as group:
        following = [group.create_task(follower.follow(relays)) for follower in followers]
        publishing = [group.create_task(publish_until(relays, name, is_over)) for name in "abc"]
        await restart_all()
        published = [message for task in publishing for message in await task]
        async with relays[0].client("news") as last:
            await last.send(LAST_MESSAGE)
        await asyncio.gather(*following)
    assert sum(follower.reconnections for follower in followers) > len(followers)
    received = followers[0].received
    assert all(follower.received == received for follower in followers)
    assert len(received) == len(published) + 1
    for name in "abc":
        in_order = [message for message in published if str(message).startswith(name)]
        assert [message for message in received if str(message).startswith(name)] == in_order


# Gaps


@ONLY_NATS
async def test_a_gap_of_the_stream_is_reported_to_subscribers_and_to_clients_that_resume(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2)
    async with connect_relay_v1(one, "news") as client, two.client("news") as publisher:
        await publisher.send("before")
        assert await client.next_message() == await receive(publisher) == "before"
        one.signal(SIGSTOP)
        for number in range(100):  # more than the broker sends ahead
            await publisher.send(str(number))
            assert await receive(publisher) == str(number)
        await broker_log.delete_stream()
        await publisher.send("after")
        assert await receive(publisher) == "after"
        one.signal(SIGCONT)
        before = client.position
        received = []
        while "after" not in received:
            received.append(await client.next_message())
        assert len(received) < 101
        assert {notice["type"] for notice in client.notices} == {"gap"}
        async with connect_relay_v1(one, "news", since=before) as resumed:
            assert resumed.subscribed["recovered"] is False
        async with connect_relay_v1(one, "news", since=client.position) as resumed:
            assert resumed.subscribed["recovered"] is True
    counts = [await one.metric(f"websocket_backplane_{name}_total") for name in ("gaps", "lost")]
    assert any(counts)


@ONLY_REDIS
async def test_a_request_for_history_is_answered_with_the_messages_after_a_gap(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1)
    async with relay.client("news") as client:
        await client.send("before")
        assert await receive(client) == "before"
        await broker_log.delete_stream()
        await broker_log.broker.restart()
        await relay.await_metric_at_least("websocket_backplane_gaps_total", 1)
        await client.send("after")
        assert await receive(client) == "after"
    async with relay.client(path="/channels/news?history=100") as other:
        assert await receive(other) == "after"
        await other.send("live")
        assert await receive(other) == "live"


@ONLY_NATS
async def test_a_client_that_publishes_and_closes_receives_its_messages_before_the_close_frame(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    messages = [f"{number} ".ljust(500, "x") for number in range(1_000)]
    wire = b"".join(frame(TEXT_FRAME, text.encode()) for text in messages)
    async with (
        two.client("news", max_queue=None) as on_other_replica,
        one.raw_client("news") as raw,
    ):
        await raw.send(wire + frame(CLOSE, close_payload(1000)))
        for text in messages:
            assert await raw.read_message() == text
        assert (await raw.read_close_frame())[0] == 1000
        assert await receive_many(on_other_replica, len(messages)) == messages
