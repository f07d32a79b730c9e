"""Several relays on one broker: one channel for the clients of all of them, whatever breaks."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from signal import SIGCONT, SIGSTOP

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.brokers import (
    Broker,
)
from tests.support.followers import THE_END, followers_of, speak
from tests.support.logs_kept import deleted
from tests.support.raw_client import CLOSE, TEXT, close_payload, frame
from tests.support.relay_process import Relay, StartReplicas, closed, receive, receive_many
from tests.support.relay_v1 import Message, numbers, resuming


async def say_steadily(client: ClientConnection, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        await client.send(message)
        if number % 10 == 9:
            await asyncio.sleep(0)


async def test_what_is_said_on_any_replica_is_heard_on_all_in_one_order(
    replicas_with: StartReplicas,
) -> None:
    relays = replicas_with(3)
    each = 1_000
    total = each * 2 * len(relays)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(relay.client("news", max_queue=None))
            for relay in relays
            for _ in range(2)
        ]
        async with asyncio.TaskGroup() as group:
            hearing = [group.create_task(receive_many(client, total)) for client in clients]
            for number, client in enumerate(clients):
                said = [f"{number}: {nth}" for nth in range(each)]
                group.create_task(say_steadily(client, said))
        first = hearing[0].result()
        assert all(heard.result() == first for heard in hearing)
        for number in range(len(clients)):
            mine = [text for text in first if str(text).startswith(f"{number}: ")]
            assert mine == [f"{number}: {nth}" for nth in range(each)], "and what one said, in turn"


async def test_a_broker_that_is_killed_and_started_again_loses_nothing(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2)
    count = 2_000
    async with one.client("news", max_queue=None) as a, two.client("news", max_queue=None) as b:

        async def talk() -> None:
            for number in range(count):
                await a.send(str(number))
                if number == count // 2:
                    await broker.restart()

        async with asyncio.TaskGroup() as group:
            group.create_task(talk())
            heard = [group.create_task(receive_many(client, count)) for client in (a, b)]
        assert heard[0].result() == heard[1].result() == numbers(0, count)
    assert await one.metric("websocket_backplane_lost_total") == 0
    assert await two.metric("websocket_backplane_lost_total") == 0


async def test_in_an_outage_publishers_are_told_and_newcomers_are_refused(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2)
    async with two.client("news") as listener, one.client("news") as publisher:
        await publisher.send("before")
        assert await receive(listener) == await receive(publisher) == "before"
        broker.freeze()
        await one.metric_is("websocket_backplane_up", 0)
        await two.metric_is("websocket_backplane_up", 0)
        assert (await one.get("/readyz")).status_code == 503
        assert (await one.get("/readyz")).json() == {"status": "backplane outage"}
        assert (await one.get("/healthz")).status_code == 200
        await publisher.send("into the void")
        assert await closed(publisher) == (1013, "backplane unavailable")
        with pytest.raises(InvalidStatus) as refused:
            async with one.client("news"):
                pass
        assert refused.value.response.status_code == 503
        assert "Retry-After" in refused.value.response.headers
        broker.thaw()
        for relay in (one, two):
            await relay.metric_is("websocket_backplane_up", 1)
            assert (await relay.get("/readyz")).status_code == 200
        async with one.client("news") as again:
            await again.send("after")
            heard = await receive(listener)
            assert heard in ("after", "into the void")  # it may have got there after all
            assert heard == "after" or await receive(listener) == "after"
    assert await one.metric("websocket_backplane_outages_total") == 1


async def flood(relay: Relay, name: str, is_over: asyncio.Event, refused: Counter[str]) -> None:
    """Publish one message after another, as fast as they are taken; count each refusal."""
    number = 0
    while not is_over.is_set():
        try:
            async with relay.client("flood", max_queue=None) as client:
                while not is_over.is_set():
                    await client.send(f"{name} {number} ".ljust(4_000, "x"))
                    number += 1
        except (ConnectionClosed, InvalidStatus, AttributeError):
            # The last is websockets', where a connection ends while it is written to.
            refused[name] += 1
            await asyncio.sleep(0.1)


def in_turn(heard: Sequence[Message]) -> bool:
    """Tell whether nothing came twice, and what one said in the order in which it was said."""
    latest: dict[str, int] = {}
    for message in heard:
        name, number, *_ = str(message).split()
        if int(number) <= latest.get(name, -1):
            return False
        latest[name] = int(number)
    return True


async def test_a_broker_that_is_frozen_fills_no_memory_and_repeats_nothing(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    relays = replicas_with(2, limits={"total_backlog_bytes": 16 << 20})
    is_over = asyncio.Event()
    refused = Counter({f"{side}{one}": 0 for side in range(2) for one in range(3)})
    async with relays[1].client("flood", max_queue=None) as listener:
        async with asyncio.TaskGroup() as group:
            for name in refused:
                group.create_task(flood(relays[int(name[0])], name, is_over, refused))
            await receive_many(listener, 1_000)
            before = [relay.rss_bytes() for relay in relays]
            broker.freeze()
            until = asyncio.get_running_loop().time() + 5
            # On a busy machine it takes a while until a client reads that it is refused.
            while asyncio.get_running_loop().time() < until or min(refused.values()) < 2:
                for relay, size in zip(relays, before, strict=True):
                    assert await relay.metric("websocket_backplane_pending_bytes") < 2 << 20
                    assert relay.rss_bytes() < size + (64 << 20)
                await asyncio.sleep(0.5)
            for relay in relays:
                assert await relay.metric("websocket_backplane_up") == 0
            broker.thaw()
            for relay in relays:
                await relay.metric_is("websocket_backplane_up", 1)
            is_over.set()
        async with relays[0].client("flood", max_queue=None) as last:
            await last.send(f"last 0 {THE_END}")
        heard = [await receive(listener)]
        while not str(heard[-1]).endswith(THE_END):
            heard.append(await receive(listener))
    assert in_turn(heard)


async def test_in_an_outage_a_replica_may_relay_by_itself(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2, backplane={"on_outage": "local"})
    async with (
        one.client("news") as a,
        one.client("news") as b,
        two.client("news") as elsewhere,
    ):
        broker.freeze()
        await one.metric_is("websocket_backplane_up", 0)
        assert (await one.get("/readyz")).status_code == 200
        await a.send("among us")
        assert await receive(a) == await receive(b) == "among us"
        async with one.client("news") as newcomer:
            await newcomer.send("welcome")
            assert await receive(b) == "welcome"
            assert await receive(a) == "welcome"
        broker.thaw()
        for relay in (one, two):
            await relay.metric_is("websocket_backplane_up", 1)
        await a.send("all together")
        assert await receive(a) == await receive(b) == "all together"
        assert await receive(elsewhere) == "all together"


async def test_a_replica_that_starts_knows_what_was_said_before(
    replicas_with: StartReplicas,
) -> None:
    (one,) = replicas_with(1)
    async with resuming(one, "news") as client:
        for number in range(100):
            await client.connection.send(str(number))
        assert await client.messages(50) == numbers(0, 50)
    (two,) = replicas_with(1)
    async with resuming(two, "news", since=client.position) as again:
        assert again.welcome["recovered"] is True
        assert await again.messages(50) == numbers(50, 100)
    async with two.client(path="/channels/news?history=3") as other:
        assert await receive_many(other, 3) == numbers(97, 100)


async def test_the_clients_of_a_relay_that_is_killed_go_on_at_another(
    replicas_with: StartReplicas,
) -> None:
    one, two = relays = list(replicas_with(2))
    followers = await followers_of(two, 6)
    count = 1_000

    async def talk() -> None:
        async with two.client("news", max_queue=None) as client:
            for number in range(count):
                await client.send(str(number))
                assert await receive(client) == str(number)
                if number == count // 3:
                    one.end()
                    relays.remove(one)
            await client.send(THE_END)

    async with asyncio.TaskGroup() as group:
        for follower in followers:
            group.create_task(follower.follow(relays))
        group.create_task(talk())
    for follower in followers:
        assert follower.heard == [*numbers(0, count), THE_END]
    assert any(follower.returns > 1 for follower in followers)


async def test_a_rolling_restart_under_load_loses_nothing_and_says_nothing_twice(
    replicas_with: StartReplicas,
) -> None:
    relays = list(replicas_with(2, shutdown={"spread_s": 0.5}))
    followers = await followers_of(relays[0], 8)
    is_over = asyncio.Event()

    async def restart_all() -> None:
        for old in list(relays):
            relays.extend(await asyncio.to_thread(replicas_with, 1, shutdown={"spread_s": 0.5}))
            relays.remove(old)
            assert await old.stop() == 0
        is_over.set()

    async with asyncio.TaskGroup() as group:
        following = [group.create_task(follower.follow(relays)) for follower in followers]
        speaking = [group.create_task(speak(relays, name, is_over)) for name in "abc"]
        await restart_all()
        said = [message for each in speaking for message in await each]
        async with relays[0].client("news") as last:
            await last.send(THE_END)
        await asyncio.gather(*following)
    assert sum(follower.returns for follower in followers) > len(followers)
    first = followers[0].heard
    assert all(follower.heard == first for follower in followers)
    assert len(first) == len(said) + 1
    for name in "abc":
        mine = [message for message in said if str(message).startswith(name)]
        assert [message for message in first if str(message).startswith(name)] == mine


async def test_clients_are_told_that_the_stream_lost_something_and_so_is_who_comes_back(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    one, two = replicas_with(2)
    async with resuming(one, "news") as client, two.client("news") as speaker:
        await speaker.send("before")
        assert await client.message() == await receive(speaker) == "before"
        one.signal(SIGSTOP)
        for number in range(100):  # more than the broker sends ahead
            await speaker.send(str(number))
            assert await receive(speaker) == str(number)
        await deleted(broker)
        await speaker.send("after")
        assert await receive(speaker) == "after"
        one.signal(SIGCONT)
        before = client.position
        heard = []
        while "after" not in heard:
            heard.append(await client.message())
        assert len(heard) < 101
        assert {told["type"] for told in client.told} == {"gap"}
        async with resuming(one, "news", since=before) as again:
            assert again.welcome["recovered"] is False
        async with resuming(one, "news", since=client.position) as again:
            assert again.welcome["recovered"] is True
    noticed = [await one.metric(f"websocket_backplane_{name}_total") for name in ("gaps", "lost")]
    assert any(noticed)


async def test_who_asks_for_the_last_messages_is_sent_those_behind_a_gap(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1)
    async with relay.client("news") as client:
        await client.send("before")
        assert await receive(client) == "before"
        await deleted(broker)
        await broker.restart()
        await relay.metric_reaches("websocket_backplane_gaps_total", 1)
        await client.send("after")
        assert await receive(client) == "after"
    async with relay.client(path="/channels/news?history=100") as other:
        assert await receive(other) == "after"
        await other.send("now")
        assert await receive(other) == "now"


async def test_a_client_that_says_something_and_leaves_hears_it_first(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    said = [f"{number} ".ljust(500, "x") for number in range(1_000)]
    wire = b"".join(frame(TEXT, text.encode()) for text in said)
    async with two.client("news", max_queue=None) as elsewhere, one.raw_client("news") as raw:
        await raw.send(wire + frame(CLOSE, close_payload(1000)))
        for text in said:
            assert await raw.message() == text
        assert (await raw.close_frame())[0] == 1000
        assert await receive_many(elsewhere, len(said)) == said
