"""Publishing by HTTP to relays that are one, while their broker is away, or while a relay stops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx2
import pytest

from tests.support.brokers import Broker
from tests.support.http_requests import BATCH, TEXT, post, posting
from tests.support.proxy import Connection, HeldReads, Proxy
from tests.support.raw_client import CLOSE, PATIENCE_S, close_payload, frame
from tests.support.raw_client import TEXT as TEXT_FRAME
from tests.support.relay_process import (
    PLAIN,
    Relay,
    StartRelay,
    StartReplicas,
    receive,
    receive_many,
)
from tests.support.relay_v1 import numbers, resuming, wanting

MIB = 1_048_576


class Hush(Proxy):
    """A way to the broker on which nothing comes back any more once a text was sent to it.

    Attributes:
        mark: that text.
        is_ping_overdue: whether it came by.
    """

    def __init__(self, broker: Broker, mark: bytes) -> None:
        super().__init__(broker.port)
        self._broker = broker
        self.mark = mark
        self.is_ping_overdue = asyncio.Event()

    def broker_url(self) -> str:
        """Return the broker's URL by this way."""
        return self._broker.url.replace(str(self._broker.port), str(self.port))

    def speak(self) -> None:
        """Begin anew."""
        self.mark = b""
        self.is_ping_overdue.clear()
        self.cut()

    def asks(self, data: bytes, connection: Connection) -> bytes:
        if self.mark and self.mark in data:
            self.is_ping_overdue.set()
        return data

    def answers(self, data: bytes, connection: Connection) -> bytes:
        return b"" if self.is_ping_overdue.is_set() else data


@asynccontextmanager
async def away(broker: Broker, relay: Relay) -> AsyncIterator[None]:
    """Have the broker answer nobody, once the relay knows."""
    broker.freeze()
    try:
        await relay.metric_is("websocket_backplane_up", 0)
        yield
    finally:
        broker.thaw()
    await relay.metric_is("websocket_backplane_up", 1)


def assert_come_back(answer: httpx2.Response, reason: str) -> None:
    assert (answer.status_code, answer.text) == (503, f"{reason}\n")
    assert 1 <= int(answer.headers["retry-after"]) <= 5


async def test_the_position_that_is_told_is_where_others_hear_it_and_go_on(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    async with resuming(two, "news") as listener:
        told = []
        for number in range(20):
            answer = await post(one, "news", str(number).encode(), TEXT)
            assert answer.status_code == 202
            told.append(answer.json()["position"])
        for number in range(20):
            assert await listener.message() == str(number)
            assert listener.position == told[number]
    for relay in (one, two):
        async with resuming(relay, "news", since=told[9]) as again:
            assert again.welcome["recovered"] is True
            assert await again.messages(10) == numbers(10, 20)
        async with resuming(relay, "news", since=told[-1]) as again:
            assert (await post(two, "news", b"next", TEXT)).status_code == 202
            assert await again.message() == "next"


async def test_a_batch_stays_together_however_much_others_say(
    replicas_with: StartReplicas,
) -> None:
    """Larger than what a packet holds as a rule; and its position is that of its last line."""
    one, two = replicas_with(2)
    lines = [f'"{number} {"x" * 80}"' for number in range(8_000)]
    is_over = asyncio.Event()

    async def talk(relay: Relay) -> None:
        async with relay.client("news", max_queue=None) as client:
            while not is_over.is_set():
                await client.send("between")
                await asyncio.sleep(0)

    async with resuming(two, "news") as listener, asyncio.TaskGroup() as group:
        talking = [group.create_task(talk(relay)) for relay in (one, two)]
        answers = [await post(one, "news", "\n".join(lines).encode(), BATCH) for _ in range(3)]
        is_over.set()
        await asyncio.gather(*talking)
        for answer in answers:
            assert answer.json()["messages"] == 8_000
            while (first := await listener.message()) == "between":
                pass
            assert [first, *await listener.messages(7_999)] == lines
            assert listener.position == answer.json()["position"]


async def test_in_an_outage_what_is_posted_is_refused(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1)
    async with relay.client("news") as listener:
        async with away(broker, relay):
            assert_come_back(await post(relay, "news", b"void", TEXT), "backplane unavailable")
            assert_come_back(await post(relay, "news", b"1\n2", BATCH), "backplane unavailable")
            await relay.metric_is("websocket_refusals_total", 2, reason="unavailable")
        assert (await post(relay, "news", b"after", TEXT)).status_code == 202
        assert await receive(listener) == "after"


async def test_what_was_on_its_way_is_in_doubt_and_what_waited_is_not(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    async with AsyncExitStack() as stack:
        hush = await stack.enter_async_context(Hush(broker, b"in doubt"))
        (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": hush.broker_url()})
        listener = await stack.enter_async_context(relay.client("news"))
        async with asyncio.TaskGroup() as group:
            doubtful = group.create_task(post(relay, "news", b'"in doubt"\n"too"', BATCH))
            async with asyncio.timeout(PATIENCE_S):
                await hush.is_ping_overdue.wait()
            waiting = [group.create_task(post(relay, "news", b"waited", TEXT)) for _ in range(3)]
        assert doubtful.result().status_code == 504
        assert doubtful.result().text == "publish unconfirmed\n"
        assert "retry-after" not in doubtful.result().headers
        for answer in waiting:
            assert_come_back(answer.result(), "backplane unavailable")
        await relay.metric_is("websocket_refusals_total", 1, reason="unconfirmed")
        await relay.metric_is("websocket_refusals_total", 3, reason="unavailable")
        hush.speak()
        await relay.metric_is("websocket_backplane_up", 1)
        assert (await post(relay, "news", b"after", TEXT)).status_code == 202
        heard = [await receive(listener)]
        while heard[-1] != "after":
            heard.append(await receive(listener))
        assert heard in (['"in doubt"', '"too"', "after"], ["after"]), "all of it or nothing"


async def test_what_the_broker_confirmed_before_an_outage_is_told_its_own_position(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    """And a close that waits for its sender's last message is not answered before that."""
    async with AsyncExitStack() as stack:
        way = await stack.enter_async_context(HeldReads(broker.port))
        url = broker.url.replace(str(broker.port), str(way.port))
        (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": url})
        listener = await stack.enter_async_context(resuming(relay, "news"))
        assert (await post(relay, "news", b"before", TEXT)).status_code == 202
        assert await listener.message() == "before"
        leaving = await stack.enter_async_context(await relay.tcp())
        await leaving.upgrade(wanting("other"))
        way.is_held = True
        async with asyncio.TaskGroup() as group:
            posting = [group.create_task(post(relay, "news", b"%d" % n, TEXT)) for n in range(2)]
            await leaving.send(
                frame(TEXT_FRAME, b"last") + frame(CLOSE, close_payload(4000)),
            )
            await relay.metric_is("websocket_backplane_up", 0)
            way.release()
        told = {each.result().json()["position"]: f"{n}" for n, each in enumerate(posting)}
        assert [each.result().status_code for each in posting] == [202, 202]
        for _ in range(2):
            message = await listener.message()
            assert told[listener.position] == message
        assert await leaving.message() == "last"
        assert (await leaving.close_frame())[0] == 4000
        await relay.metric_is("websocket_backplane_up", 1)


async def test_a_relay_that_stops_answers_a_post_whose_message_is_not_read_back_yet(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    async with HeldReads(broker.port) as way, asyncio.TaskGroup() as group:
        url = broker.url.replace(str(broker.port), str(way.port))
        (relay,) = await asyncio.to_thread(replicas_with, 1, backplane={"url": url})
        way.is_held = True
        posting = group.create_task(post(relay, "news", b"last", TEXT))
        await relay.metric_is("websocket_messages_total", 1)
        await relay.metric_is("websocket_backplane_pending_bytes", 0)
        relay.signal()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):  # it takes a fifth of that with nothing to wait for
                await relay.exit_code()
        way.release()
        assert await relay.exit_code() == 0
        assert (await posting).status_code == 202


async def test_a_relay_whose_stop_takes_too_long_cuts_off_requests_and_logs_how_many(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    async with HeldReads(broker.port) as way, asyncio.TaskGroup() as group:
        url = broker.url.replace(str(broker.port), str(way.port))
        settings = {"backplane": {"url": url}, "shutdown": {"timeout_s": 1}}
        (relay,) = await asyncio.to_thread(replicas_with, 1, **settings)
        way.is_held = True
        posting = group.create_task(assert_cut_off(relay))
        await relay.metric_is("websocket_messages_total", 1)
        await relay.metric_is("websocket_backplane_pending_bytes", 0)
        assert await relay.stop() == 0
        await posting
        assert relay.await_log("requests aborted")["requests"] == 1


async def assert_cut_off(relay: Relay) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        await post(relay, "news", b"last", TEXT)


async def test_the_position_of_an_empty_batch_is_one_to_come_back_with(
    replicas_with: StartReplicas,
) -> None:
    (relay,) = replicas_with(1)
    answer = await post(relay, "news", b"", BATCH)
    assert answer.json()["messages"] == 0
    async with resuming(relay, "news", since=answer.json()["position"]) as client:
        assert client.welcome["recovered"] is True


@asynccontextmanager
async def jammed(
    broker: Broker, relay: Relay, first: bytes
) -> AsyncIterator[asyncio.Task[httpx2.Response]]:
    """Let as much wait for a broker that stands still as there may, before that is an outage."""
    async with asyncio.TaskGroup() as group:
        broker.freeze()
        try:
            posting = group.create_task(post(relay, "news", first, TEXT))
            await relay.metric_reaches("websocket_backplane_pending_bytes", len(first))
            yield posting
        finally:
            broker.thaw()


async def test_what_finds_no_room_waits_for_it_and_is_relayed(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, limits={"total_backlog_bytes": MIB})
    async with relay.client("news") as listener, asyncio.TaskGroup() as group:
        async with jammed(broker, relay, b"x" * (MIB // 8)) as first:
            second = group.create_task(post(relay, "news", b"second", TEXT))
            await relay.metric_is("websocket_partial_message_bytes", len(b"second"))
        assert [await receive(listener) for _ in range(2)] == ["x" * (MIB // 8), "second"]
    assert (first.result().status_code, second.result().status_code) == (202, 202)
    assert await relay.metric("websocket_partial_message_bytes") == 0


async def test_who_gives_up_while_it_waits_for_room_has_said_nothing(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, limits={"total_backlog_bytes": MIB})
    async with relay.client("news") as listener:
        async with jammed(broker, relay, b"x" * (MIB // 8)), await relay.tcp() as impatient:
            await impatient.send(posting("news", b"given up"))
            await relay.metric_is("websocket_partial_message_bytes", len(b"given up"))
            impatient.vanish()
            assert await relay.metric("websocket_partial_message_bytes")  # and it knows by now
        assert (await post(relay, "news", b"after", TEXT)).status_code == 202
        assert [await receive(listener) for _ in range(2)] == ["x" * (MIB // 8), "after"]
    assert await relay.metric("websocket_partial_message_bytes") == 0


async def test_in_an_outage_a_relay_on_its_own_takes_what_is_posted(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, backplane={"on_outage": "local"})
    async with resuming(relay, "news") as listener, away(broker, relay):
        for number in range(3):
            answer = await post(relay, "news", str(number).encode(), TEXT)
            assert answer.status_code == 202
            assert await listener.message() == str(number)
            assert answer.json() == {"position": listener.position}


async def test_what_waited_when_the_outage_began_is_told_its_own_position(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1, backplane={"on_outage": "local"})
    async with resuming(relay, "news") as listener:
        broker.freeze()
        posted = (post(relay, "news", str(number).encode(), TEXT) for number in range(5))
        answers = await asyncio.gather(*posted)
        where = {answer.json()["position"]: str(number) for number, answer in enumerate(answers)}
        assert len(where) == 5
        for _ in range(5):
            message = await listener.message()
            assert where[listener.position] == message
        broker.thaw()
        await relay.metric_is("websocket_backplane_up", 1)


async def test_a_relay_that_stops_takes_nothing_more(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 1})
    async with (
        httpx2.AsyncClient(verify=PLAIN, trust_env=False) as http,
        relay.raw_client("news") as last,
        relay.client("news") as listener,
    ):
        url = relay.http_url("/channels/news")
        assert (await http.post(url, content=b"before")).status_code == 202
        relay.signal()
        await relay.wait_for_log("draining")
        await relay.metric_is("websocket_draining", 1)
        assert_come_back(await http.post(url, content=b"late"), "draining")
        await relay.metric_is("websocket_refusals_total", 1, reason="draining")
        assert await receive_many(listener, 1) == [b"before"]
        await last.answer_close()


@pytest.mark.parametrize("delay_s", [0.5])
async def test_while_only_readiness_has_ended_messages_are_taken(
    relay_with: StartRelay, delay_s: float
) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": delay_s, "spread_s": 0.1})
    async with relay.client("news") as listener:
        relay.signal()
        await relay.wait_for_log("draining")
        assert (await post(relay, "news", b"in time", TEXT)).status_code == 202
        assert await receive(listener) == "in time"
