"""Publishing by HTTP to several replicas on one broker: positions, outages, and stops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx2
import pytest

from tests.support.brokers import Broker
from tests.support.http_requests import BATCH_TYPE, TEXT_TYPE, post_request, publish_by_post
from tests.support.raw_client import CLOSE, PATIENCE_S, close_payload, frame
from tests.support.raw_client import TEXT as TEXT_FRAME
from tests.support.relay_process import (
    NO_CA,
    RelayProcess,
    StartRelay,
    StartReplicas,
    receive,
    receive_many,
)
from tests.support.relay_v1 import connect_relay_v1, number_texts, path_with_query
from tests.support.tcp_proxy import BlockedReadsProxy, ProxiedConnection, TcpProxy

MIB = 1_048_576

ONLY_REDIS = pytest.mark.parametrize("kind", ["redis"])
ONLY_NATS = pytest.mark.parametrize("kind", ["nats"])


def assert_temporarily_refused(response: httpx2.Response, reason: str) -> None:
    assert (response.status_code, response.text) == (503, f"{reason}\n")
    assert 1 <= int(response.headers["retry-after"]) <= 5


# Positions


@ONLY_NATS
async def test_the_position_in_a_response_is_that_of_the_delivery_and_can_be_resumed_from(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    async with connect_relay_v1(two, "news") as subscriber:
        positions = []
        for number in range(20):
            response = await publish_by_post(one, "news", str(number).encode(), TEXT_TYPE)
            assert response.status_code == 202
            positions.append(response.json()["position"])
        for number in range(20):
            assert await subscriber.next_message() == str(number)
            assert subscriber.position == positions[number]
    for relay in (one, two):
        async with connect_relay_v1(relay, "news", since=positions[9]) as resumed:
            assert resumed.subscribed["recovered"] is True
            assert await resumed.next_messages(10) == number_texts(10, 20)
        async with connect_relay_v1(relay, "news", since=positions[-1]) as resumed:
            assert (await publish_by_post(two, "news", b"next", TEXT_TYPE)).status_code == 202
            assert await resumed.next_message() == "next"


@ONLY_REDIS
async def test_lines_of_a_large_batch_are_consecutive_among_messages_of_other_clients(
    replicas_with: StartReplicas,
) -> None:
    """The batch is larger than a usual packet. Its position is that of its last line."""
    one, two = replicas_with(2)
    lines = [f'"{number} {"x" * 80}"' for number in range(3_000)]
    is_over = asyncio.Event()

    async def publish(relay: RelayProcess) -> None:
        async with relay.client("news", max_queue=None) as client:
            while not is_over.is_set():
                await client.send("between")
                await asyncio.sleep(0)

    async with connect_relay_v1(two, "news") as subscriber, asyncio.TaskGroup() as group:
        publishing = [group.create_task(publish(relay)) for relay in (one, two)]
        body = "\n".join(lines).encode()
        responses = [await publish_by_post(one, "news", body, BATCH_TYPE) for _ in range(2)]
        is_over.set()
        await asyncio.gather(*publishing)
        for response in responses:
            assert response.json()["messages"] == 3_000
            while (first := await subscriber.next_message()) == "between":
                pass
            assert [first, *await subscriber.next_messages(2_999)] == lines
            assert subscriber.position == response.json()["position"]


@ONLY_REDIS
async def test_the_position_of_an_empty_batch_can_be_resumed_from(
    replicas_with: StartReplicas,
) -> None:
    (relay,) = replicas_with(1)
    response = await publish_by_post(relay, "news", b"", BATCH_TYPE)
    assert response.json()["messages"] == 0
    async with connect_relay_v1(relay, "news", since=response.json()["position"]) as client:
        assert client.subscribed["recovered"] is True


# Outages


class SilentAfterMarker(TcpProxy):
    """A proxy that passes on no response any more once a marker was sent to the broker.

    Attributes:
        marker: bytes of a request; empty: all responses are passed on.
        is_silent: whether the marker was sent.
    """

    def __init__(self, broker: Broker, marker: bytes) -> None:
        super().__init__(broker.port)
        self._broker = broker
        self.marker = marker
        self.is_silent = asyncio.Event()

    def broker_url(self) -> str:
        """Return the URL of the broker through this proxy."""
        return self._broker.url.replace(str(self._broker.port), str(self.port))

    def end_silence(self) -> None:
        """Pass on all responses on new connections."""
        self.marker = b""
        self.is_silent.clear()
        self.cut()

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes:
        if self.marker and self.marker in data:
            self.is_silent.set()
        return data

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes:
        return b"" if self.is_silent.is_set() else data


@ONLY_NATS
async def test_a_post_in_flight_when_an_outage_starts_is_unconfirmed_and_pending_ones_refused(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(SilentAfterMarker(broker, b"in flight"))
        (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": proxy.broker_url()})
        subscriber = await stack.enter_async_context(relay.client("news"))
        async with asyncio.TaskGroup() as group:
            in_flight = group.create_task(
                publish_by_post(relay, "news", b'"in flight"\n"too"', BATCH_TYPE)
            )
            async with asyncio.timeout(PATIENCE_S):
                await proxy.is_silent.wait()
            pending = [
                group.create_task(publish_by_post(relay, "news", b"pending", TEXT_TYPE))
                for _ in range(3)
            ]
        assert in_flight.result().status_code == 504
        assert in_flight.result().text == "publish unconfirmed\n"
        assert "retry-after" not in in_flight.result().headers
        for task in pending:
            assert_temporarily_refused(task.result(), "backplane unavailable")
        await relay.await_metric("websocket_refusals_total", 1, reason="unconfirmed")
        await relay.await_metric("websocket_refusals_total", 3, reason="backplane_unavailable")
        proxy.end_silence()
        await relay.await_metric("websocket_backplane_up", 1)
        assert (await publish_by_post(relay, "news", b"after", TEXT_TYPE)).status_code == 202
        received = [await receive(subscriber)]
        while received[-1] != "after":
            received.append(await receive(subscriber))
        assert received in (['"in flight"', '"too"', "after"], ["after"]), "a part of the batch"


@ONLY_REDIS
async def test_a_post_that_is_confirmed_before_an_outage_returns_its_position_after_it(
    reads_proxy: BlockedReadsProxy, reads_proxy_url: str, replicas_with: StartReplicas
) -> None:
    """A closing handshake that waits for the sender's last message ends after its delivery, too."""
    async with AsyncExitStack() as stack:
        (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
        subscriber = await stack.enter_async_context(connect_relay_v1(relay, "news"))
        assert (await publish_by_post(relay, "news", b"before", TEXT_TYPE)).status_code == 202
        assert await subscriber.next_message() == "before"
        closing = await stack.enter_async_context(await relay.connect_tcp())
        await closing.upgrade(path_with_query("other"))
        reads_proxy.is_blocked = True
        async with asyncio.TaskGroup() as group:
            publishing = [
                group.create_task(publish_by_post(relay, "news", b"%d" % n, TEXT_TYPE))
                for n in range(2)
            ]
            await closing.send(
                frame(TEXT_FRAME, b"last") + frame(CLOSE, close_payload(4000)),
            )
            await relay.await_metric("websocket_backplane_up", 0)
            reads_proxy.release()
        responses = [task.result() for task in publishing]
        assert [response.status_code for response in responses] == [202, 202]
        texts = {each.json()["position"]: str(number) for number, each in enumerate(responses)}
        for _ in range(2):
            message = await subscriber.next_message()
            assert texts[subscriber.position] == message
        assert await closing.read_message() == "last"
        assert (await closing.read_close_frame())[0] == 4000
        await relay.await_metric("websocket_backplane_up", 1)


@ONLY_REDIS
async def test_posts_before_and_in_an_outage_are_relayed_locally_and_return_positions(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, backplane={"on_outage": "local"})
    async with connect_relay_v1(relay, "news") as subscriber:
        broker.freeze()
        pending = (
            publish_by_post(relay, "news", str(number).encode(), TEXT_TYPE) for number in range(5)
        )
        responses = await asyncio.gather(*pending)
        texts = {each.json()["position"]: str(number) for number, each in enumerate(responses)}
        assert len(texts) == 5
        for _ in range(5):
            message = await subscriber.next_message()
            assert texts[subscriber.position] == message
        await relay.await_metric("websocket_backplane_up", 0)
        for number in range(3):
            response = await publish_by_post(relay, "news", str(number).encode(), TEXT_TYPE)
            assert response.status_code == 202
            assert await subscriber.next_message() == str(number)
            assert response.json() == {"position": subscriber.position}
        broker.thaw()
        await relay.await_metric("websocket_backplane_up", 1)


# Above the high-water mark of pending appends, posts wait


@asynccontextmanager
async def above_high_water_mark(
    broker: Broker, relay: RelayProcess, first: bytes
) -> AsyncIterator[asyncio.Task[httpx2.Response]]:
    """Freeze the broker for less time than makes an outage, with a large post pending."""
    async with asyncio.TaskGroup() as group:
        broker.freeze()
        try:
            publishing = group.create_task(publish_by_post(relay, "news", first, TEXT_TYPE))
            await relay.await_metric_at_least("websocket_backplane_pending_bytes", len(first))
            yield publishing
        finally:
            broker.thaw()


@ONLY_REDIS
async def test_a_post_above_the_high_water_mark_waits_and_is_relayed(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, limits={"total_backlog_bytes": MIB})
    async with relay.client("news") as subscriber, asyncio.TaskGroup() as group:
        async with above_high_water_mark(broker, relay, b"x" * (MIB // 8)) as first:
            second = group.create_task(publish_by_post(relay, "news", b"second", TEXT_TYPE))
            await relay.await_metric("websocket_partial_message_bytes", len(b"second"))
        assert await receive_many(subscriber, 2) == ["x" * (MIB // 8), "second"]
    assert (first.result().status_code, second.result().status_code) == (202, 202)
    assert await relay.metric("websocket_partial_message_bytes") == 0


@ONLY_NATS
async def test_a_post_whose_client_disconnects_above_the_high_water_mark_is_not_relayed(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, limits={"total_backlog_bytes": MIB})
    async with relay.client("news") as subscriber:
        async with (
            above_high_water_mark(broker, relay, b"x" * (MIB // 8)),
            await relay.connect_tcp() as disconnecting,
        ):
            await disconnecting.send(post_request("news", b"discarded"))
            await relay.await_metric("websocket_partial_message_bytes", len(b"discarded"))
            disconnecting.reset()
            # The next request is handled after the reset.
            assert await relay.metric("websocket_partial_message_bytes")
        assert (await publish_by_post(relay, "news", b"after", TEXT_TYPE)).status_code == 202
        assert await receive_many(subscriber, 2) == ["x" * (MIB // 8), "after"]
    assert await relay.metric("websocket_partial_message_bytes") == 0


# A relay that stops


@ONLY_NATS
async def test_a_stopping_relay_answers_a_post_whose_message_is_not_read_back_yet(
    reads_proxy: BlockedReadsProxy, reads_proxy_url: str, replicas_with: StartReplicas
) -> None:
    async with asyncio.TaskGroup() as group:
        (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": reads_proxy_url})
        reads_proxy.is_blocked = True
        publishing = group.create_task(publish_by_post(relay, "news", b"last", TEXT_TYPE))
        await relay.await_metric("websocket_messages_total", 1)
        await relay.await_metric("websocket_backplane_pending_bytes", 0)
        relay.signal()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):  # five times as long as without a pending response
                await relay.exit_code()
        reads_proxy.release()
        assert await relay.exit_code() == 0
        assert (await publishing).status_code == 202


@ONLY_REDIS
async def test_a_relay_aborts_requests_at_its_stop_timeout_and_logs_their_count(
    reads_proxy: BlockedReadsProxy, reads_proxy_url: str, replicas_with: StartReplicas
) -> None:
    settings = {"backplane": {"url": reads_proxy_url}, "shutdown": {"timeout_s": 1}}
    (relay,) = await asyncio.to_thread(replicas_with, 1, **settings)
    reads_proxy.is_blocked = True

    async def publish() -> None:
        with pytest.raises(httpx2.RemoteProtocolError):
            await publish_by_post(relay, "news", b"last", TEXT_TYPE)

    async with asyncio.TaskGroup() as group:
        group.create_task(publish())
        await relay.await_metric("websocket_messages_total", 1)
        await relay.await_metric("websocket_backplane_pending_bytes", 0)
        assert await relay.stop() == 0
    assert relay.block_until_logged("requests aborted")["requests"] == 1


async def test_a_draining_relay_refuses_posts(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 1})
    async with (
        httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http,
        relay.raw_client("news") as last,
        relay.client("news") as subscriber,
    ):
        url = relay.http_url("/channels/news")
        assert (await http.post(url, content=b"before")).status_code == 202
        relay.signal()
        await relay.await_log("draining")
        await relay.await_metric("websocket_draining", 1)
        assert_temporarily_refused(await http.post(url, content=b"late"), "draining")
        await relay.await_metric("websocket_refusals_total", 1, reason="draining")
        assert await receive_many(subscriber, 1) == [b"before"]
        await last.complete_close()


async def test_a_relay_accepts_posts_during_its_readiness_delay(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": 0.5, "spread_s": 0.1})
    async with relay.client("news") as subscriber:
        relay.signal()
        await relay.await_log("draining")
        assert (await publish_by_post(relay, "news", b"in time", TEXT_TYPE)).status_code == 202
        assert await receive(subscriber) == "in time"
