"""Clients that resume on a replica that lags, or after the broker lost entries."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from websocket_relay.backplane.interface import Position
from websocket_relay.client import Relay as Client
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.broker_logs import BrokerLog
from tests.support.brokers import Broker
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import RelayProcess, StartReplicas
from tests.support.relay_v1 import (
    RelayV1Client,
    connect_relay_v1,
    open_relay_v1,
    path_with_query,
    publish_all,
)
from tests.support.tcp_proxy import BlockedReadsProxy

PAUSE_S = 2.1
"""Shorter than what makes an outage, longer than any wait of the relay for another replica."""

ONLY_REDIS = pytest.mark.parametrize("kind", ["redis"])
ONLY_NATS = pytest.mark.parametrize("kind", ["nats"])


@pytest.fixture
async def pair_of_relays(
    reads_proxy_url: str, replicas_with: StartReplicas
) -> tuple[RelayProcess, RelayProcess]:
    """Two relays. The second one reads through `reads_proxy`."""
    (first,) = await asyncio.to_thread(replicas_with, 1)
    (second,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
    return first, second


async def publish(relay: RelayProcess, message: str) -> str:
    """Publish a message; return its position."""
    response = await publish_by_post(relay, "news", message.encode(), TEXT_TYPE)
    assert response.status_code == 202
    return str(response.json()["position"])


@asynccontextmanager
async def resuming_after_refusals(relay: RelayProcess, since: str) -> AsyncIterator[RelayV1Client]:
    """Resume; reconnect if refused or closed because of an outage, as clients do."""
    async with AsyncExitStack() as stack:
        yield await _resume(stack, relay, since)


async def _resume(stack: AsyncExitStack, relay: RelayProcess, since: str) -> RelayV1Client:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(ConnectionClosed, InvalidStatus):
                return await stack.enter_async_context(connect_relay_v1(relay, "news", since=since))
            await asyncio.sleep(0.1)


async def resume_and_return_recovery(relay: RelayProcess, since: str) -> object:
    async with resuming_after_refusals(relay, since) as client:
        return client.recovery


# A replica that lags


@ONLY_NATS
async def test_a_client_ahead_of_its_replica_is_recovered_when_the_replica_reaches_its_position(
    pair_of_relays: tuple[RelayProcess, RelayProcess], reads_proxy: BlockedReadsProxy
) -> None:
    first, second = pair_of_relays
    await publish(first, "on both replicas")
    reads_proxy.is_blocked = True
    since = await publish(first, "on the first replica")

    async def release_after_pause() -> None:
        await asyncio.sleep(PAUSE_S)
        reads_proxy.release()

    releasing = asyncio.create_task(release_after_pause())
    async with resuming_after_refusals(second, since) as client:
        assert client.recovery == (True, since)
        await publish(first, "next")
        assert await client.next_message() == "next"
    await releasing


@ONLY_REDIS
async def test_a_broker_that_pauses_for_two_seconds_prevents_no_recovery(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    first, second = await asyncio.to_thread(replicas_with, 2)
    since = await publish(first, "before")
    broker.freeze()
    try:
        resuming_clients = [
            asyncio.create_task(resume_and_return_recovery(each, since)) for each in (first, second)
        ]
        await asyncio.sleep(PAUSE_S)
    finally:
        broker.thaw()
    for recovery in await asyncio.gather(*resuming_clients):
        assert recovery == (True, since)
    for relay in (first, second):
        position = await publish(first, "after")
        async with resuming_after_refusals(relay, since) as client:
            assert client.subscribed["recovered"] is True
            assert await client.next_message() == "after"
        async with resuming_after_refusals(relay, position) as client:
            assert client.recovery == (True, position)
        since = position


@ONLY_REDIS
async def test_a_client_ahead_of_its_replica_is_closed_without_a_welcome_in_an_outage(
    pair_of_relays: tuple[RelayProcess, RelayProcess], reads_proxy: BlockedReadsProxy
) -> None:
    first, second = pair_of_relays
    await publish(first, "on both replicas")
    reads_proxy.is_blocked = True
    since = await publish(first, "on the first replica")
    with pytest.raises(ConnectionClosed) as closed:
        async with connect_relay_v1(second, "news", since=since):
            pass
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1013, "backplane unavailable")
    reads_proxy.release()
    async with resuming_after_refusals(second, since) as client:
        assert client.recovery == (True, since)


# Entries that are not in the log


async def test_the_latest_position_of_one_replica_is_recovered_on_another(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    """The stream was emptied: the replicas have read different entries last."""
    (first,) = await asyncio.to_thread(replicas_with, 1)
    await publish(first, "before")
    await broker_log.purge()
    (second,) = await asyncio.to_thread(replicas_with, 1)
    async with connect_relay_v1(second, "news") as client:
        assert client.subscribed["recovered"] is True
    async with connect_relay_v1(first, "news", since=client.position) as client:
        assert client.subscribed["recovered"] is True


@ONLY_NATS
async def test_a_position_after_the_end_of_the_log_is_not_recovered(
    replicas_with: StartReplicas,
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    async with connect_relay_v1(relay, "news", since="99999999999999-0-0") as client:
        assert client.subscribed["recovered"] is False
        await publish(relay, "next")
        assert await client.next_message() == "next"


async def test_a_deleted_message_is_recovered_only_by_a_replica_that_had_read_it(
    pair_of_relays: tuple[RelayProcess, RelayProcess],
    reads_proxy: BlockedReadsProxy,
    broker_log: BrokerLog,
) -> None:
    first, second = pair_of_relays
    async with connect_relay_v1(second, "news") as subscriber:
        before = await publish(first, "before")
        assert await subscriber.next_message() == "before"  # both replicas have read it
        reads_proxy.is_blocked = True
        async with connect_relay_v1(first, "news") as client:
            await publish(first, "deleted")
            assert await client.next_message() == "deleted"
            await broker_log.delete_entry(Position.parse(client.position))
        await publish(first, "after")
        reads_proxy.release()
        assert await subscriber.next_message() == "after"
        assert {notice["type"] for notice in subscriber.notices} == {"gap"}
    for relay, is_recovered in ((first, True), (second, False)):
        async with connect_relay_v1(relay, "news", since=before) as client:
            assert client.subscribed["recovered"] is is_recovered
            if is_recovered:
                assert await client.next_message() == "deleted"
            assert await client.next_message() == "after"


@ONLY_REDIS
async def test_the_python_client_marks_the_first_message_after_a_gap(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    async with (
        asyncio.timeout(PATIENCE_S),
        Client(relay.ws_url()) as client,
        client.subscribe("news") as subscription,
    ):
        await publish(relay, "before")
        assert not (await anext(subscription)).after_gap
        await broker_log.append_raw(b"no packet")
        await relay.await_metric("websocket_backplane_unreadable_total", 1)
        await publish(relay, "after")
        assert (await anext(subscription)).after_gap


@ONLY_NATS
async def test_a_gap_during_a_replay_ends_the_replay_with_a_notice_and_is_ignored_for_plain_clients(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = await asyncio.to_thread(replicas_with, 1)
    messages = [f"{number} ".ljust(10_000, "x") for number in range(1_000)]
    await publish_all(relay, "news", *messages)
    path = path_with_query("news", history=1_000)
    async with (
        await relay.connect_tcp(receive_buffer_bytes=4096) as with_notices,
        await relay.connect_tcp(receive_buffer_bytes=4096) as plain,
    ):
        await with_notices.upgrade(path, Sec_WebSocket_Protocol="relay.v1")
        await plain.upgrade(path)
        await relay.await_metric("websocket_slow_clients", 2)
        await broker_log.append_raw(b"no packet")
        await relay.await_metric("websocket_backplane_unreadable_total", 1)
        await publish(relay, "after")
        received: list[str] = []
        while not received or not received[-1].endswith("\nafter"):
            received.append(str(await with_notices.read_message()))
        assert '"type":"gap"' in received[-2], "messages between the gap and the next message"
        assert 1 < len(received) < 1_000
        assert [await plain.read_message() for _ in range(1_001)] == [*messages, "after"]


async def test_a_session_is_resumed_by_another_replica_before_the_first_message(
    replicas_with: StartReplicas,
) -> None:
    one, two = await asyncio.to_thread(replicas_with, 2)
    async with open_relay_v1(one) as client:
        session, position = client.welcome["session"], client.welcome["position"]
    async with open_relay_v1(two, f"/?session={session}&seen={position}") as client:
        assert client.welcome["resumed"] is True
