"""Clients that resume on a replica that lags, or where the broker lost something."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from websocket_relay.backplane.interface import Position
from websocket_relay.client import Relay as Client
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.brokers import Broker, NatsBroker
from tests.support.http_requests import TEXT, post
from tests.support.logs_kept import BrokerLog, NatsLog, RedisLog
from tests.support.proxy import HeldReads
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import Relay, StartReplicas
from tests.support.relay_v1 import Heard, resuming, say, wanting

pytestmark = pytest.mark.xdist_group("recovery")

PAUSE_S = 2.1
"""Shorter than what makes an outage, longer than any wait of the relay's for another replica."""


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def log(broker: Broker, stack: AsyncExitStack) -> BrokerLog:
    """The log that the relays keep there."""
    return NatsLog(stack, broker) if isinstance(broker, NatsBroker) else RedisLog(stack, broker)


@pytest.fixture
async def way(broker: Broker, stack: AsyncExitStack) -> HeldReads:
    """A way to the broker on which reading can be held."""
    return await stack.enter_async_context(HeldReads(broker.port))


@pytest.fixture
async def pair_of_relays(
    broker: Broker, way: HeldReads, replicas_with: StartReplicas
) -> tuple[Relay, Relay]:
    """Two relays, the second one by that way."""
    (first,) = await asyncio.to_thread(replicas_with, 1)
    url = broker.url.replace(str(broker.port), str(way.port))
    (second,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": url})
    return first, second


async def said(relay: Relay, message: str) -> str:
    """Publish a message; return its position."""
    answer = await post(relay, "news", message.encode(), TEXT)
    assert answer.status_code == 202
    return str(answer.json()["position"])


@asynccontextmanager
async def resuming_at_last(relay: Relay, since: str) -> AsyncIterator[Heard]:
    """Resume, and come again when turned away because of an outage, as clients do."""
    async with AsyncExitStack() as stack:
        yield await _resumed(stack, relay, since)


async def _resumed(stack: AsyncExitStack, relay: Relay, since: str) -> Heard:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(ConnectionClosed, InvalidStatus):
                return await stack.enter_async_context(resuming(relay, "news", since=since))
            await asyncio.sleep(0.1)


async def test_who_is_ahead_of_a_replica_is_recovered_when_that_gets_there(
    pair_of_relays: tuple[Relay, Relay], way: HeldReads
) -> None:
    first, second = pair_of_relays
    await said(first, "both")
    way.is_held = True
    since = await said(first, "only the first replica has this")

    async def pause() -> None:
        await asyncio.sleep(PAUSE_S)  # shorter, and it would be no pause
        way.release()

    pausing = asyncio.create_task(pause())
    async with resuming_at_last(second, since) as client:
        assert client.welcome == {"type": "welcome", "recovered": True, "position": since}
        await said(first, "next")
        assert await client.message() == "next"
    await pausing


async def test_a_broker_that_pauses_for_two_seconds_costs_no_recovery(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    first, second = await asyncio.to_thread(replicas_with, 2)
    since = await said(first, "before")
    broker.freeze()
    try:
        resumed = [asyncio.create_task(_welcome(each, since)) for each in (first, second)]
        await asyncio.sleep(PAUSE_S)  # for the broker to pause
    finally:
        broker.thaw()
    for welcome in await asyncio.gather(*resumed):
        assert welcome == {"type": "welcome", "recovered": True, "position": since}
    for relay in (first, second):
        position = await said(first, "after")
        async with resuming_at_last(relay, since) as client:
            assert client.welcome["recovered"] is True
            assert await client.message() == "after"
        async with resuming_at_last(relay, position) as client:
            assert client.welcome == {"type": "welcome", "recovered": True, "position": position}
        since = position


async def _welcome(relay: Relay, since: str) -> object:
    async with resuming_at_last(relay, since) as client:
        return client.welcome


async def test_who_is_ahead_of_a_replica_in_an_outage_is_sent_away_unanswered(
    pair_of_relays: tuple[Relay, Relay], way: HeldReads
) -> None:
    first, second = pair_of_relays
    await said(first, "both")
    way.is_held = True
    since = await said(first, "only the first replica has this")
    with pytest.raises(ConnectionClosed) as closed:
        async with resuming(second, "news", since=since):
            pass
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1013, "backplane unavailable")
    way.release()
    async with resuming_at_last(second, since) as client:
        assert client.welcome == {"type": "welcome", "recovered": True, "position": since}


async def test_what_only_another_replica_calls_newest_is_recovered(
    log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (first,) = await asyncio.to_thread(replicas_with, 1)
    await said(first, "before")
    await log.empty()
    (second,) = await asyncio.to_thread(replicas_with, 1)
    async with resuming(second, "news") as client:
        assert client.welcome["recovered"] is True
    async with resuming(first, "news", since=client.position) as client:
        assert client.welcome["recovered"] is True


async def test_a_position_that_the_log_does_not_hold_is_not_recovered(
    replicas_with: StartReplicas,
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    async with resuming(relay, "news", since="99999999999999-0-0") as client:
        assert client.welcome["recovered"] is False
        await said(relay, "next")
        assert await client.message() == "next"


async def test_only_a_replica_that_had_read_a_lost_message_has_recovered_it(
    pair_of_relays: tuple[Relay, Relay], way: HeldReads, log: BrokerLog
) -> None:
    first, second = pair_of_relays
    async with resuming(second, "news") as member:
        before = await said(first, "before")  # so both have read it
        assert await member.message() == "before"
        way.is_held = True
        async with resuming(first, "news") as client:
            await said(first, "lost")
            assert await client.message() == "lost"
            await log.remove(Position.parse(client.position))
        await said(first, "after")
        way.release()
        assert await member.message() == "after"
        assert {each["type"] for each in member.told} == {"gap"}, "told before the message"
    for relay, is_recovered in ((first, True), (second, False)):
        async with resuming(relay, "news", since=before) as client:
            assert client.welcome["recovered"] is is_recovered
            if is_recovered:
                assert await client.message() == "lost"
            assert await client.message() == "after"


async def test_a_python_client_is_told_of_a_gap_with_the_next_message(
    log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    async with asyncio.timeout(PATIENCE_S), Client(relay.ws_url("/channels/news")) as client:
        await said(relay, "before")
        assert not (await anext(client)).after_gap
        await log.put(b"no packet")
        await relay.metric_is("websocket_backplane_unreadable_total", 1)
        await said(relay, "after")
        assert (await anext(client)).after_gap


async def test_who_is_amid_its_history_is_told_of_a_gap_and_stays(
    log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    await say(relay, "news", *(f"{number} ".ljust(10_000, "x") for number in range(1_000)))
    async with await relay.tcp(receive_buffer_bytes=4096) as raw:
        await raw.upgrade(wanting("news", history=1_000), Sec_WebSocket_Protocol="relay.v1")
        await relay.metric_is("websocket_slow_clients", 1)
        await log.put(b"no packet")
        await relay.metric_is("websocket_backplane_unreadable_total", 1)
        await said(relay, "after")
        heard: list[str] = []
        while not heard or not heard[-1].endswith("\nafter"):
            heard.append(str(await raw.message()))
        assert '"type":"gap"' in heard[-2], "nothing stands between it and what follows"
        assert 1 < len(heard) < 1_000


async def test_a_plain_client_amid_its_history_is_sent_all_of_it_whatever_the_log_loses(
    log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    await say(relay, "news", *(f"{number} ".ljust(10_000, "x") for number in range(1_000)))
    async with await relay.tcp(receive_buffer_bytes=4096) as raw:
        await raw.upgrade(wanting("news", history=1_000))
        await relay.metric_is("websocket_slow_clients", 1)
        await log.put(b"no packet")
        await relay.metric_is("websocket_backplane_unreadable_total", 1)
        await said(relay, "after")
        heard = [str(await raw.message()) for _ in range(1_001)]
        assert [each.partition(" ")[0] for each in heard] == [*map(str, range(1_000)), "after"]
