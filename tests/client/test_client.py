"""The Python client: receives every message once, publishes exactly once, reconnects by itself."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from sys import getsizeof
from typing import Any

import pytest
from websocket_relay.client import (
    Connected,
    Counted,
    Disconnected,
    InvalidUrlError,
    Joined,
    Left,
    Message,
    RejectedError,
    Relay,
    Subscription,
    UnavailableError,
    UnconfirmedError,
)
from websocket_relay.client import connection as client_connection
from websocket_relay.client.relay import FIRST_WAIT_S, LONGEST_WAIT_S
from websocket_relay.client.tokens import expiry_of
from websocket_relay.client.url import RelayUrl
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from tests.support.addresses import INVALID_URLS
from tests.support.certificates import make_pair
from tests.support.issuer import SECRET, sign_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import RelayProcess, StartRelay, receive
from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

JWT = {"mode": "jwt", "jwt": {"secret": SECRET}}
RELAY_V1 = Subprotocol("relay.v1")
Event = Connected | Disconnected


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


async def next_messages(subscription: Subscription, number: int) -> list[Message]:
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(subscription) for _ in range(number)]


async def next_payloads(subscription: Subscription, number: int) -> list[str | bytes]:
    return [message.data for message in await next_messages(subscription, number)]


class EventLog:
    """The events that a client reports of its connection: `Relay(url, on_event=log.append)`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def append(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    async def wait_for(self, kind: type[Event], *, number: int = 1) -> Event:
        """Wait until `number` events of a kind were reported; return the last of them."""
        async with asyncio.timeout(PATIENCE_S):
            while len(found := [each for each in self.events if isinstance(each, kind)]) < number:
                self._changed.clear()
                await self._changed.wait()
        return found[number - 1]


# Receiving


async def test_a_subscriber_receives_text_and_binary_messages_with_their_positions(
    relay: RelayProcess, channel: str
) -> None:
    published: list[str | bytes] = ["text\nof two lines", b"\x00\n\xff", "", b"", b"x" * 1_048_576]
    async with (
        Relay(relay.ws_url()) as client,
        client.subscribe(channel) as subscription,
        relay.client(channel) as publisher,
    ):
        for data in published:
            await publisher.send(data)
        received = await next_messages(subscription, 5)
    assert [message.data for message in received] == published
    assert {message.channel for message in received} == {channel}
    assert len({message.position for message in received}) == 5
    assert not any(message.after_gap for message in received)


async def test_one_connection_receives_many_channels(relay: RelayProcess, channel: str) -> None:
    names = [f"{channel}-{number}" for number in range(5)]
    before = await relay.metric("websocket_connections_total")
    async with Relay(relay.ws_url()) as client:
        subscriptions = [client.subscribe(name) for name in names]
        await asyncio.gather(*(client.publish(name, name) for name in names))
        for name, subscription in zip(names, subscriptions, strict=True):
            assert await next_payloads(subscription, 1) == [name]
        assert await relay.metric("websocket_connections_total") == before + 1


async def test_a_subscription_starts_after_a_position_or_with_the_last_messages(
    relay: RelayProcess, channel: str
) -> None:
    async with Relay(relay.ws_url()) as client:
        positions = [await client.publish(channel, str(number)) for number in range(5)]
        async with client.subscribe(channel, since=positions[2]) as subscription:
            assert await next_payloads(subscription, 2) == ["3", "4"]
        async with client.subscribe(channel, history=3) as subscription:
            received = await next_messages(subscription, 3)
        assert [message.data for message in received] == ["2", "3", "4"]
        assert [message.position for message in received] == positions[2:]


async def test_a_subscription_that_does_not_follow_ends_after_the_replay(
    relay: RelayProcess, channel: str
) -> None:
    async with Relay(relay.ws_url()) as client:
        for number in range(5):
            await client.publish(channel, str(number))
        async with asyncio.timeout(PATIENCE_S):
            replay = client.subscribe(channel, history=3, follow=False)
            assert [message.data async for message in replay] == ["2", "3", "4"]


async def test_a_client_need_not_receive_its_own_messages(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        Relay(relay.ws_url()) as client,
        relay.client(channel) as other,
        client.subscribe(channel, echo=False) as subscription,
    ):
        await other.send("first")  # a replay, which ends before the next message, has all messages
        assert await next_payloads(subscription, 1) == ["first"]
        await client.publish(channel, "own")
        await other.send("of another client")
        assert await next_payloads(subscription, 1) == ["of another client"]


async def test_a_replay_has_no_own_messages_either_where_there_is_no_echo(
    relay: RelayProcess, channel: str
) -> None:
    log = EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        Relay(relay.ws_url()) as other,
        Relay(proxy.url(), on_event=log.append) as client,
    ):
        for number in range(0, 40, 2):
            await client.publish(channel, f"own {number}")
            await other.publish(channel, str(number + 1))
        async with client.subscribe(channel, echo=False, history=40) as subscription:
            received = await next_payloads(subscription, 20)
            await client.publish(channel, "own")
            proxy.cut()
            await log.wait_for(Connected, number=2)
            await other.publish(channel, "last")
            received += await next_payloads(subscription, 1)
    assert received == [*(str(number) for number in range(1, 40, 2)), "last"]


async def test_each_subscription_resumes_after_its_last_message(
    relay: RelayProcess, channel: str
) -> None:
    names = [f"{channel}-one", f"{channel}-two"]
    log = EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        Relay(proxy.url(), on_event=log.append) as client,
        Relay(relay.ws_url()) as publisher,
        client.subscribe(names[0]) as one,
        client.subscribe(names[1]) as two,
    ):
        for number in range(40):
            await publisher.publish(names[number % 2], str(number))
            if number % 20 == 10:
                await log.wait_for(Connected, number=1 + number // 20)
                proxy.cut()
                await log.wait_for(Disconnected, number=1 + number // 20)
        assert await next_payloads(one, 20) == [str(number) for number in range(0, 40, 2)]
        received = await next_messages(two, 20)
    assert [message.data for message in received] == [str(number) for number in range(1, 40, 2)]
    assert not any(message.after_gap for message in received)


async def test_the_next_message_has_after_gap_when_the_relay_no_longer_has_the_missing_ones(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(history={"max_messages": 2})
    log = EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        Relay(proxy.url(), on_event=log.append) as client,
        Relay(relay.ws_url()) as publisher,
        client.subscribe(channel) as subscription,
    ):
        await publisher.publish(channel, "before")
        assert [each.after_gap for each in await next_messages(subscription, 1)] == [False]
        proxy.cut()
        await log.wait_for(Disconnected)
        for number in range(5):
            await publisher.publish(channel, str(number))
        received = await next_messages(subscription, 2)
    assert [(each.data, each.after_gap) for each in received] == [("3", True), ("4", False)]


async def test_a_client_of_a_draining_relay_reconnects_to_another(
    redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    old, new = redis_replicas
    log = EventLog()
    urls = [old.ws_url(), new.ws_url()]
    async with (
        Relay(urls, on_event=log.append) as client,
        client.subscribe(channel) as subscription,
    ):
        await client.publish(channel, "to the old relay")
        assert await old.stop() == 0
        await client.publish(channel, "to the new relay")
        assert await next_payloads(subscription, 2) == ["to the old relay", "to the new relay"]
    disconnected, connected = log.events[1], log.events[-1]
    assert isinstance(disconnected, Disconnected)
    assert disconnected.reason.startswith("closed by the relay: draining; retry_ms=")
    assert connected == Connected(is_resumed=True)


async def test_unread_messages_are_bounded_and_delay_neither_publishes_nor_other_channels(
    relay: RelayProcess, channel: str
) -> None:
    texts = [f"{number:0100}" for number in range(300)]
    async with (
        Relay(relay.ws_url(), max_unread_bytes=2_000) as client,
        client.subscribe(channel) as slow,
        client.subscribe(f"{channel}-other") as other,
    ):
        for text in texts:
            await client.publish(channel, text)
        await client.publish(f"{channel}-other", "passes")
        assert await next_payloads(other, 1) == ["passes"]
        assert slow.unread <= 2_000 // getsizeof(texts[0]) + 1
        assert await next_payloads(slow, 300) == texts


async def test_a_bounded_subscription_receives_a_long_replay_and_a_reconnection_once(
    relay: RelayProcess, channel: str
) -> None:
    texts = [f"{number:0100}" for number in range(300)]
    log = EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        Relay(relay.ws_url()) as publisher,
        Relay(proxy.url(), max_unread_bytes=2_000, on_event=log.append) as client,
    ):
        for text in texts:
            await publisher.publish(channel, text)
        async with client.subscribe(channel, history=300) as subscription:
            received = await next_payloads(subscription, 100)
            proxy.cut()
            await log.wait_for(Connected, number=2)
            received += await next_payloads(subscription, 200)
        async with asyncio.timeout(PATIENCE_S):
            replay = client.subscribe(channel, history=300, follow=False)
            assert [message.data async for message in replay] == texts
    assert received == texts


async def test_a_loop_may_publish_each_message_that_it_receives(
    relay: RelayProcess, channel: str
) -> None:
    """The answers arrive on the connection that has the unread messages."""
    results = f"{channel}-results"
    async with (
        Relay(relay.ws_url(), max_unread_bytes=2_000) as client,
        Relay(relay.ws_url()) as other,
        other.subscribe(results) as published,
        client.subscribe(channel) as subscription,
    ):
        await asyncio.gather(*(other.publish(channel, str(number)) for number in range(200)))
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(200):
                message = await anext(subscription)
                await client.publish(results, message.data)
        assert await next_payloads(published, 200) == [str(number) for number in range(200)]


# Ends of a subscription


async def test_a_loop_that_is_left_unsubscribes(relay: RelayProcess, channel: str) -> None:
    async with Relay(relay.ws_url()) as client:
        for number in range(3):
            await client.publish(channel, str(number))
        async with asyncio.timeout(PATIENCE_S):
            async for message in client.subscribe(channel, history=3):
                if message.data == "1":
                    break
        await relay.await_metric("websocket_channels", 0)
        again = client.subscribe(channel, history=1)
        assert await next_payloads(again, 1) == ["2"]


async def test_a_channel_can_be_subscribed_to_again_as_soon_as_its_loop_is_left(
    relay: RelayProcess, channel: str
) -> None:
    async with Relay(relay.ws_url()) as client:
        await client.publish(channel, "hello")

        async def latest() -> str | bytes:
            async for message in client.subscribe(channel, history=1):
                return message.data
            raise AssertionError

        async with asyncio.timeout(PATIENCE_S):
            assert [await latest() for _ in range(3)] == ["hello"] * 3


async def test_a_block_keeps_its_subscription_over_several_loops(
    relay: RelayProcess, channel: str
) -> None:
    received = []
    async with Relay(relay.ws_url()) as client:
        async with client.subscribe(channel) as subscription:
            for number in range(3):
                await client.publish(channel, str(number))
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(3):
                    async for message in subscription:
                        received.append(message.data)
                        break
        assert [message async for message in subscription] == []
        await relay.await_metric("websocket_channels", 0)
    assert received == ["0", "1", "2"]


async def test_unsubscribe_and_close_end_the_loops_of_other_tasks(
    relay: RelayProcess, channel: str
) -> None:
    async def receive_all(subscription: Subscription) -> list[Message]:
        return [message async for message in subscription]

    async with asyncio.timeout(PATIENCE_S), Relay(relay.ws_url()) as client:
        first, second = client.subscribe(channel), client.subscribe(f"{channel}-other")
        loops = [asyncio.create_task(receive_all(each)) for each in (first, second)]
        await client.publish(channel, "read")
        first.unsubscribe()
        await loops[0]
        await client.close()
        assert await loops[1] == []


async def test_a_refused_subscription_raises_in_its_own_iterator(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    token = sign_token(relay={"subscribe": [channel], "publish": ["*"]})
    async with Relay(relay.ws_url(), token=token) as client:
        subscription = client.subscribe(channel)
        with pytest.raises(RejectedError, match="secret: not authorized for this channel"):
            async for _ in client.subscribe("secret"):
                pass
        with pytest.raises(RejectedError, match="no such channel"):
            async with client.subscribe("not a name"):
                pass
        with pytest.raises(RejectedError, match="since must be a position"):
            await anext(client.subscribe(f"{channel}-other", since="yesterday"))
        await client.publish(channel, "hello")
        assert await next_payloads(subscription, 1) == ["hello"]


async def test_a_subscription_that_is_refused_temporarily_is_retried(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(channels={"max_channels": 1})
    async with Relay(relay.ws_url()) as client, Relay(relay.ws_url()) as other:
        first = await client.subscribe(channel).__aenter__()
        waiting = asyncio.create_task(other.subscribe(f"{channel}-other").__aenter__())
        await relay.await_metric_at_least("websocket_refusals_total", 1, reason="channels")
        assert not waiting.done()
        first.unsubscribe()
        async with asyncio.timeout(PATIENCE_S), await waiting as second:
            await other.publish(f"{channel}-other", "second")
            assert await next_payloads(second, 1) == ["second"]


async def test_a_channel_has_one_subscription_at_a_time(relay: RelayProcess, channel: str) -> None:
    async with Relay(relay.ws_url()) as client:
        first = client.subscribe(channel)
        with pytest.raises(RuntimeError, match="already subscribed to"):
            client.subscribe(channel)
        first.unsubscribe()
        client.subscribe(channel)


# Presence

TEAM = "team.1"


class PresenceLog:
    """What a subscription reports of presence: `subscribe(…, on_presence=log.append)`."""

    def __init__(self) -> None:
        self.events: list[Joined | Left | Counted] = []
        self._changed = asyncio.Event()

    def append(self, event: Joined | Left | Counted) -> None:
        self.events.append(event)
        self._changed.set()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, which depends on the events."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def changes(self) -> list[tuple[type, str]]:
        """Return which clients have joined and left."""
        found = (each for each in self.events if not isinstance(each, Counted))
        return [(type(each), each.member.client) for each in found]


@asynccontextmanager
async def subscribe_with_presence(
    client: Relay,
) -> AsyncIterator[tuple[Subscription, PresenceLog]]:
    """Subscribe, and wait until the members are known."""
    log = PresenceLog()
    subscription = client.subscribe(TEAM, presence=True, on_presence=log.append)
    async with subscription:
        await log.wait_for(lambda: subscription.count is not None)
        yield subscription, log


async def test_a_subscription_with_presence_has_the_members_and_what_changes(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["team.*"], "grace_s": 0}, auth=JWT)
    permissions = {"subscribe": ["*"], "publish": ["*"], "info": {"name": "Ada"}}
    token = sign_token(sub="ada", relay=permissions)
    async with (
        Relay(relay.ws_url(), token=token) as client,
        subscribe_with_presence(client) as (subscription, log),
    ):
        assert subscription.members is not None
        (own,) = subscription.members.values()
        assert (own.user, own.info) == ("ada", {"name": "Ada"})
        assert log.events == [Counted(1)]
        async with Relay(relay.ws_url(), token=token) as other, other.subscribe(TEAM):
            await log.wait_for(lambda: subscription.count == 2)
            name = next(each for each in subscription.members if each != own.client)
            await other.publish(TEAM, "here")
            assert await next_payloads(subscription, 1) == ["here"]
        await log.wait_for(lambda: subscription.count == 1)
        assert list(subscription.members) == [own.client]
        assert log.changes() == [(Joined, name), (Left, name)]


async def test_after_a_reconnection_the_new_members_replace_the_old_ones(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["team.*"], "grace_s": 60})
    async with (
        TcpProxy(relay.port) as proxy,
        Relay(proxy.url()) as client,
        Relay(relay.ws_url()) as other,
        other.subscribe(TEAM) as first,
        subscribe_with_presence(client) as (subscription, log),
    ):
        assert subscription.count == 2
        target, proxy.target = proxy.target, None
        proxy.cut()
        first.unsubscribe()
        async with relay.client(TEAM):
            await other.publish(TEAM, "so that the other commands are done")
            proxy.target = target
            await log.wait_for(lambda: log.events.count(Counted(2)) == 2)
            assert [kind for kind, _ in log.changes()] == [Left, Joined]
            assert subscription.members is not None
            assert len(subscription.members) == subscription.count == 2


async def test_of_too_many_members_only_the_count_is_known(relay_with: StartRelay) -> None:
    relay = relay_with(presence={"channels": ["*"], "max_clients": 1})
    async with (
        Relay(relay.ws_url()) as client,
        subscribe_with_presence(client) as (subscription, log),
    ):
        async with relay.client(TEAM):
            await log.wait_for(lambda: subscription.count == 2)
            assert subscription.members is None
        await log.wait_for(lambda: subscription.members is not None)
        assert subscription.count == 1
        assert log.changes() == []


async def test_presence_in_a_channel_without_it_is_rejected(relay: RelayProcess) -> None:
    async with Relay(relay.ws_url()) as client:
        with pytest.raises(RejectedError, match="no presence in this channel"):
            async with client.subscribe(TEAM, presence=True):
                pass


# Publishing


async def test_publish_returns_the_position_at_which_subscribers_receive_the_message(
    relay: RelayProcess, channel: str
) -> None:
    async with Relay(relay.ws_url()) as client, client.subscribe(channel) as subscription:
        positions = [await client.publish(channel, data) for data in ("text", b"\x00\xff")]
        received = await next_messages(subscription, 2)
    assert [message.position for message in received] == positions
    assert [message.data for message in received] == ["text", b"\x00\xff"]


async def test_several_tasks_publish_each_in_its_own_order(
    relay: RelayProcess, channel: str
) -> None:
    async with Relay(relay.ws_url()) as client, client.subscribe(channel) as subscription:

        async def publish_all(name: str) -> None:
            for number in range(50):
                await client.publish(channel, f"{name} {number}")

        async with asyncio.TaskGroup() as group:
            for name in ("a", "b", "c"):
                group.create_task(publish_all(name))
        received = [str(data) for data in await next_payloads(subscription, 150)]
    for name in ("a", "b", "c"):
        of_task = [text for text in received if text.startswith(name)]
        assert of_task == [f"{name} {number}" for number in range(50)]


async def test_unanswered_messages_are_published_in_order_after_an_outage(
    relay: RelayProcess, channel: str
) -> None:
    log = EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        relay.client(channel) as subscriber,
        Relay(proxy.url(), on_event=log.append) as client,
    ):
        proxy.target = None
        proxy.cut()
        await log.wait_for(Disconnected)
        publishing = [asyncio.create_task(client.publish(channel, text)) for text in "0123"]
        await log.wait_for(Disconnected, number=2)
        assert not any(task.done() for task in publishing)
        proxy.target = relay.port
        await asyncio.gather(*publishing)
        assert [await receive(subscriber) for _ in range(4)] == ["0", "1", "2", "3"]


async def test_a_call_that_is_cancelled_before_its_message_is_sent_publishes_nothing(
    relay: RelayProcess, channel: str
) -> None:
    log = EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        relay.client(channel) as subscriber,
        Relay(proxy.url(), on_event=log.append) as client,
    ):
        proxy.target = None
        proxy.cut()
        await log.wait_for(Disconnected)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.publish(channel, "cancelled")
        proxy.target = relay.port
        await client.publish(channel, "published")
        assert await receive(subscriber) == "published"


@pytest.mark.parametrize("loses", ["client", "server"])
async def test_a_message_in_flight_on_a_broken_connection_is_published_once(
    relay: RelayProcess, channel: str, loses: str
) -> None:
    log = EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        relay.client(channel) as subscriber,
        Relay(proxy.url(), on_event=log.append) as client,
    ):
        if loses == "client":
            proxy.lose_client_bytes()
        else:
            proxy.lose_server_bytes()
        publishing = asyncio.create_task(client.publish(channel, "in flight"))
        await proxy.await_lost_bytes()
        proxy.cut()
        assert await publishing
        assert await log.wait_for(Connected, number=2) == Connected(is_resumed=True)
        await client.publish(channel, "afterwards")
        assert [await receive(subscriber) for _ in range(2)] == ["in flight", "afterwards"]


async def test_messages_in_flight_to_a_killed_replica_are_published_once_by_another(
    redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    killed, other = redis_replicas
    log = EventLog()
    texts = [str(number) for number in range(1_000)]
    urls = [killed.ws_url(), other.ws_url()]
    async with (
        Relay(other.ws_url()) as subscriber,
        subscriber.subscribe(channel) as subscription,
        Relay(urls, on_event=log.append) as client,
    ):
        publishing = [asyncio.create_task(client.publish(channel, text)) for text in texts]
        await publishing[100]
        assert await killed.stop(signal.SIGKILL) != 0
        positions = await asyncio.gather(*publishing)
        await client.publish(channel, "the end")
        received = await next_messages(subscription, 1_001)
    assert [message.data for message in received] == [*texts, "the end"]
    assert [message.position for message in received[:-1]] == positions
    assert log.events[-1] == Connected(is_resumed=True)


async def test_a_drain_during_a_stream_of_messages_loses_none_and_doubles_none(
    redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    old, new = redis_replicas
    texts = [str(number) for number in range(2_000)]
    async with (
        Relay([old.ws_url(), new.ws_url()]) as client,
        Relay(new.ws_url()) as subscriber,
        subscriber.subscribe(channel) as subscription,
    ):
        publishing = [asyncio.create_task(client.publish(channel, text)) for text in texts]
        await publishing[500]
        old.signal()
        await asyncio.gather(*publishing)
        assert await next_payloads(subscription, len(texts)) == texts
    assert await old.exit_code() == 0


async def test_a_message_in_flight_is_unconfirmed_if_the_relay_does_not_know_the_session(
    relay_with: StartRelay, channel: str
) -> None:
    """Without a broker, the log of a relay ends with it."""
    old, new = relay_with(), relay_with()
    log = EventLog()
    async with TcpProxy(old.port) as proxy, Relay(proxy.url(), on_event=log.append) as client:
        proxy.lose_server_bytes()
        in_flight = asyncio.create_task(client.publish(channel, "in flight"))
        await old.await_metric("websocket_messages_total", 1)
        assert await old.stop(signal.SIGKILL) != 0
        proxy.cut()
        await log.wait_for(Disconnected)
        not_sent = asyncio.create_task(client.publish(channel, "not sent before"))
        proxy.target = new.port
        with pytest.raises(UnconfirmedError, match="the relay no longer knows the session"):
            await in_flight
        assert await not_sent
        assert await log.wait_for(Connected, number=2) == Connected(is_resumed=False)


async def test_the_relay_refuses_single_messages_and_the_others_pass(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT, limits={"max_message_bytes": 1_000})
    token = sign_token(relay={"subscribe": ["*"], "publish": [channel]})
    async with Relay(relay.ws_url(), token=token) as client:
        results = await asyncio.gather(
            client.publish(channel, "x" * 1_000),
            client.publish(channel, "x" * 1_001),  # refused by an answer
            client.publish("secret", "x"),
            client.publish(channel, "x" * 100_000),  # refused by a close
            client.publish(channel, "last"),
            return_exceptions=True,
        )
        async with client.subscribe(channel, history=10) as subscription:
            assert await next_payloads(subscription, 2) == ["x" * 1_000, "last"]
    errors = [str(each) for each in results if isinstance(each, RejectedError)]
    assert errors == [
        "message too big",
        "not authorized for this channel",
        "closed by the relay: message too big (1009)",
    ]


async def test_invalid_data_is_refused_by_publish(relay: RelayProcess, channel: str) -> None:
    invalid: list[tuple[Any, type[Exception]]] = [
        ("unpaired surrogate \ud800", UnicodeEncodeError),
        (None, TypeError),
        (["a"], TypeError),
    ]
    async with Relay(relay.ws_url()) as client:
        for data, error in invalid:
            with pytest.raises(error):
                await client.publish(channel, data)
        assert await client.publish(channel, "valid")


async def test_a_call_outside_the_block_of_the_client_is_an_error(
    relay: RelayProcess, channel: str
) -> None:
    client = Relay(relay.ws_url())
    with pytest.raises(RuntimeError, match="use it in `async with`"):
        await client.publish(channel, "lost")
    with pytest.raises(RuntimeError, match="use it in `async with`"):
        client.subscribe(channel)
    async with client:
        pass
    with pytest.raises(RuntimeError, match="the client was closed"):
        await client.publish(channel, "lost")
    with pytest.raises(RuntimeError, match="the client was closed"):
        client.subscribe(channel)
    with pytest.raises(RuntimeError, match="make a new one"):
        await client.__aenter__()


# Closing


async def test_close_waits_for_the_answers_to_all_messages(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as subscriber:
        async with Relay(relay.ws_url()) as client:
            publishing = [
                asyncio.create_task(client.publish(channel, str(number))) for number in range(100)
            ]
            await asyncio.sleep(0)
        assert all([await task for task in publishing])
        assert [await receive(subscriber) for _ in range(100)] == [str(each) for each in range(100)]


async def test_close_ends_at_its_deadline(relay: RelayProcess, channel: str) -> None:
    async with TcpProxy(relay.port) as proxy, Relay(proxy.url()) as client:
        proxy.stall()
        publishing = asyncio.create_task(client.publish(channel, "unanswered"))
        await proxy.await_lost_bytes()
        started_at = time.monotonic()
        await client.close(timeout_s=0.1)
        assert time.monotonic() - started_at < PATIENCE_S / 2
        with pytest.raises(UnconfirmedError, match="the client was closed"):
            await publishing


# Connecting


async def test_a_permanent_refusal_is_raised_at_once(relay_with: StartRelay) -> None:
    relay = relay_with(auth=JWT)
    cases: list[tuple[str, str, str]] = [
        ("/", "", "HTTP 401, token required"),
        ("/", "a.b.c", "HTTP 401, invalid token: malformed"),
        ("/", sign_token(exp=1), "HTTP 401, invalid token: expired"),
        ("/nowhere", sign_token(exp=None), "HTTP 404, no such channel"),
    ]
    for path, token, text in cases:
        started_at = time.monotonic()
        with pytest.raises(RejectedError) as raised:
            async with Relay(relay.ws_url(path), token=token, start_patience_s=PATIENCE_S):
                pass
        assert str(raised.value).startswith(text)
        assert time.monotonic() - started_at < PATIENCE_S / 2


async def test_a_client_waits_for_a_relay_that_is_started_later_than_itself(
    relay: RelayProcess, channel: str
) -> None:
    with pytest.raises(UnavailableError, match="connection refused"):
        async with Relay("ws://127.0.0.1:1/", start_patience_s=0):
            pass
    async with TcpProxy(None) as proxy:
        log = EventLog()

        async def make_reachable() -> None:
            await log.wait_for(Disconnected)
            proxy.target = relay.port

        reachable = asyncio.create_task(make_reachable())
        async with Relay(proxy.url(), on_event=log.append) as client:
            assert await client.publish(channel, "connected")
        await reachable


async def test_a_client_that_was_connected_gives_up_when_its_patience_ends(
    relay: RelayProcess, channel: str
) -> None:
    async with TcpProxy(relay.port) as proxy, Relay(proxy.url(), patience_s=0) as client:
        subscription = client.subscribe(channel)
        proxy.lose_client_bytes()
        in_flight = asyncio.create_task(client.publish(channel, "in flight"))
        await proxy.await_lost_bytes()
        proxy.target = None
        proxy.cut()
        with pytest.raises(UnavailableError):
            await next_messages(subscription, 1)
        with pytest.raises(UnconfirmedError):
            await in_flight
        with pytest.raises(UnavailableError):
            await client.publish(channel, "unavailable")
        with pytest.raises(UnavailableError):
            await client.wait_closed()


async def test_a_temporary_refusal_is_retried_after_the_time_in_retry_after(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client(channel):
        log = EventLog()
        client = Relay(relay.ws_url(), start_patience_s=PATIENCE_S, on_event=log.append)
        connecting = asyncio.create_task(client.__aenter__())
        event = await log.wait_for(Disconnected)
        connecting.cancel()
        await asyncio.wait([connecting])
    assert isinstance(event, Disconnected)
    assert event.reason == "HTTP 503, too many connections"
    assert 1 <= event.retry_s <= 6


async def test_a_copy_of_a_client_is_rejected_instead_of_taking_turns_with_it(
    relay: RelayProcess, channel: str
) -> None:
    async with Relay(relay.ws_url()) as client, Relay(relay.ws_url()) as copy:
        copy._session = client._session  # as after a fork
        assert copy._connection is not None
        await copy._connection.close()
        with pytest.raises(RejectedError, match="session resumed elsewhere"):
            async with asyncio.timeout(PATIENCE_S):
                await client.wait_closed()
        assert await copy.publish(channel, "still connected")


@asynccontextmanager
async def websocket_server(
    serve_client: Callable[[ServerConnection], Coroutine[Any, Any, None]],
    subprotocol: Subprotocol | None = RELAY_V1,
) -> AsyncIterator[str]:
    """Run a WebSocket server that is not a relay; yield its URL."""
    subprotocols = None if subprotocol is None else [subprotocol]
    async with serve(serve_client, "127.0.0.1", 0, subprotocols=subprotocols) as server:
        (port,) = {listening.getsockname()[1] for listening in server.sockets}
        yield f"ws://127.0.0.1:{port}/"


def welcome(heartbeat_ms: int = 20_000) -> str:
    return json.dumps(
        {
            "type": "welcome",
            "client": "a",
            "session": "s",
            "resumed": False,
            "position": "1-0-0",
            "heartbeat_ms": heartbeat_ms,
        }
    )


@asynccontextmanager
async def server_that_closes(code: int, reason: str) -> AsyncIterator[str]:
    """Run a server that sends a welcome and closes."""

    async def close(websocket: ServerConnection) -> None:
        await websocket.send(welcome())
        await websocket.close(code, reason)

    async with websocket_server(close) as url:
        yield url


@pytest.mark.fast
async def test_a_connection_without_heartbeats_is_dead() -> None:
    async def send_nothing(websocket: ServerConnection) -> None:
        await websocket.send(welcome(heartbeat_ms=20))
        await websocket.wait_closed()

    log = EventLog()
    async with websocket_server(send_nothing) as url, Relay(url, on_event=log.append):
        event = await log.wait_for(Disconnected)
    assert isinstance(event, Disconnected)
    assert event.reason == "connection lost"


@pytest.mark.fast
async def test_a_server_that_sends_no_welcome_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_connection, "OPEN_TIMEOUT_S", 0.1)

    async def send_nothing(websocket: ServerConnection) -> None:
        await websocket.wait_closed()

    async with websocket_server(send_nothing) as url:
        with pytest.raises(UnavailableError, match="timed out"):
            async with Relay(url, start_patience_s=0):
                pass


@pytest.mark.fast
async def test_a_client_reconnects_after_the_time_in_the_close_of_a_draining_relay() -> None:
    log = EventLog()
    draining = server_that_closes(1001, "draining; retry_ms=1234")
    async with draining as url, Relay(url, on_event=log.append):
        event = await log.wait_for(Disconnected)
    assert event == Disconnected("closed by the relay: draining; retry_ms=1234 (1001)", 1.234)


@pytest.mark.fast
@pytest.mark.parametrize("reason", ["draining; retry_ms=86400000", "draining"])
async def test_no_close_makes_a_client_wait_longer_than_half_a_minute(reason: str) -> None:
    log = EventLog()
    async with server_that_closes(1001, reason) as url, Relay(url, on_event=log.append):
        event = await log.wait_for(Disconnected)
    assert isinstance(event, Disconnected)
    longest_s = LONGEST_WAIT_S if "retry_ms" in reason else FIRST_WAIT_S
    assert longest_s / 2 <= event.retry_s <= longest_s


@pytest.mark.fast
async def test_a_close_that_would_happen_again_is_raised_at_once() -> None:
    for code, reason in (
        (1008, "session resumed elsewhere"),
        (1007, "x"),
        (1002, "protocol error"),
    ):
        async with server_that_closes(code, reason) as url, Relay(url) as client:
            with pytest.raises(RejectedError, match=rf"closed by the relay: {reason} \({code}\)"):
                async with asyncio.timeout(PATIENCE_S):
                    await client.wait_closed()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1008, "rate limit"),
        (1013, "slow consumer"),
        (1000, ""),
        (1011, "x"),
        (3000, "token expired"),  # of a client without a token: its session decides
    ],
)
@pytest.mark.fast
async def test_a_client_reconnects_after_any_other_close(code: int, reason: str) -> None:
    log = EventLog()
    async with server_that_closes(code, reason) as url, Relay(url, on_event=log.append):
        await log.wait_for(Connected, number=2)


async def test_a_client_does_not_accept_a_message_above_its_own_limit(
    relay: RelayProcess, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection, "MAX_MESSAGE_BYTES", 1_000)
    async with (
        Relay(relay.ws_url()) as client,
        client.subscribe(channel) as subscription,
        relay.client(channel) as publisher,
    ):
        await publisher.send("x" * 100_000)
        with pytest.raises(RejectedError, match="over the client's size limit"):
            await next_messages(subscription, 1)


# Tokens


async def test_a_token_is_renewed_before_it_expires_without_a_reconnection(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    calls = count(1)
    first_expiry = int(time.time()) + 3

    async def new_token() -> str:
        return sign_token(exp=first_expiry if next(calls) == 1 else first_expiry + 600)

    log = EventLog()
    async with (
        Relay(relay.ws_url(), token=new_token, on_event=log.append) as client,
        client.subscribe(channel) as subscription,
    ):
        while time.time() < first_expiry + 0.5:
            await client.publish(channel, "with either token")
            assert await next_payloads(subscription, 1) == ["with either token"]
            await asyncio.sleep(0.05)
    assert log.events == [Connected(is_resumed=False)]
    assert next(calls) == 3


async def test_renew_token_changes_permissions_at_once(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    tokens = iter(
        [
            sign_token(exp=None),
            sign_token(exp=None, relay={"subscribe": [], "publish": [channel]}),
            sign_token("another secret that is as long as it should be", exp=None),
        ]
    )
    async with Relay(relay.ws_url(), token=lambda: next(tokens)) as client:
        subscription = client.subscribe(channel)
        await client.publish(channel, "permitted")
        assert await next_payloads(subscription, 1) == ["permitted"]
        await client.renew_token()
        with pytest.raises(RejectedError, match="not authorized for this channel"):
            await next_messages(subscription, 1)
        with pytest.raises(RejectedError, match="invalid token: signature"):
            await client.renew_token()
        assert await client.publish(channel, "with the token before")


async def test_a_token_that_is_renewed_without_a_connection_counts_on_the_next_one(
    relay_with: StartRelay, channel: str
) -> None:
    """The attempt to connect has fetched the token before."""
    relay = relay_with(auth=JWT)
    old, new = ({"subscribe": [], "publish": [name]} for name in ("other", channel))
    permissions, log = old, EventLog()
    async with (
        TcpProxy(relay.port) as proxy,
        Relay(
            proxy.url(), token=lambda: sign_token(exp=None, relay=permissions), on_event=log.append
        ) as client,
    ):
        with pytest.raises(RejectedError, match="not authorized"):
            await client.publish(channel, "too early")
        proxy.target = None
        proxy.cut()
        await log.wait_for(Disconnected)
        permissions = new
        renewing = asyncio.create_task(client.renew_token())
        await asyncio.sleep(0)
        permissions = old
        assert not renewing.done()
        proxy.target = relay.port
        async with asyncio.timeout(PATIENCE_S):
            await renewing
        assert await client.publish(channel, "permitted")


@pytest.mark.parametrize("renewal", ["fails", "returns the same token"])
async def test_a_client_reconnects_with_a_new_token_when_one_expires(
    relay_with: StartRelay, channel: str, renewal: str
) -> None:
    relay = relay_with(auth=JWT)
    expiry = int(time.time()) + 3
    first, calls = sign_token(exp=expiry), count()

    def new_token() -> str:
        if time.time() >= expiry:
            return sign_token(exp=expiry + 600)
        if next(calls) and renewal == "fails":
            raise OSError("the issuer is unavailable")
        return first

    log = EventLog()
    async with Relay(relay.ws_url(), token=new_token, on_event=log.append) as client:
        event = await log.wait_for(Disconnected)
        assert isinstance(event, Disconnected)
        assert event.reason == "closed by the relay: token expired (3000)"
        assert await client.publish(channel, "admitted again")
    assert log.events[-1] == Connected(is_resumed=True)


async def test_a_client_with_a_text_as_its_token_is_rejected_when_the_token_expires(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(auth=JWT)
    token = sign_token(exp=int(time.time()) + 2)
    async with Relay(relay.ws_url(), token=token) as client:
        with pytest.raises(RejectedError, match="HTTP 401, invalid token: expired"):
            async with asyncio.timeout(PATIENCE_S):
                await client.wait_closed()


@pytest.mark.fast
def test_only_json_web_tokens_with_exp_have_a_known_expiry() -> None:
    assert expiry_of(sign_token(exp=1_795_441_056)) == 1_795_441_056
    for token in ("", "opaque", "a.b.c", "a.e30.c", "a.W10.c", sign_token(exp=None)):
        assert expiry_of(token) is None


# TLS


async def test_an_untrusted_certificate_or_another_host_name_is_rejected(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    url = relay.ws_url()
    async with Relay(url, ssl=relay.tls_context) as client:
        assert await client.publish(channel, "encrypted")
    for context in (None, make_pair().client_context()):
        with pytest.raises(RejectedError, match="certificate not trusted: self"):
            async with Relay(url, ssl=context, start_patience_s=PATIENCE_S):
                pass
    other_host_name = relay.ws_url(host="127.1")
    with pytest.raises(RejectedError, match="certificate is for another host name"):
        async with Relay(other_host_name, ssl=relay.tls_context, start_patience_s=PATIENCE_S):
            pass


# Servers that are not a relay


async def test_a_server_that_is_not_a_relay_is_rejected(relay: RelayProcess) -> None:
    async def echo(websocket: ServerConnection) -> None:
        async for message in websocket:
            await websocket.send(message)

    async with websocket_server(echo, subprotocol=None) as url:
        with pytest.raises(RejectedError, match="not a relay: subprotocol"):
            async with Relay(url, start_patience_s=PATIENCE_S):
                pass
    with pytest.raises(RejectedError, match="HTTP 404"):
        async with Relay(relay.metrics_url("/").replace("http", "ws")):
            pass
    with pytest.raises(UnavailableError, match="server does not speak TLS; try ws://"):
        async with Relay(relay.ws_url().replace("ws:", "wss:"), start_patience_s=0):
            pass


@asynccontextmanager
async def server_that_answers(answer: bytes) -> AsyncIterator[str]:
    """Run a server that answers every request with the same bytes."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.fast
async def test_an_invalid_answer_to_the_upgrade_is_an_error() -> None:
    long_retry = b"HTTP/1.1 503 No\r\nRetry-After: " + b"9" * 5_000 + b"\r\n\r\n"
    answers: list[tuple[bytes, type[Exception], str]] = [
        (b"", UnavailableError, "closed during the opening handshake; try wss://"),
        (b"220 mail.example.com\r\n\r\n", RejectedError, "not a relay"),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", RejectedError, "not a relay"),
        (long_retry, UnavailableError, "HTTP 503, No"),
    ]
    for answer, kind, text in answers:
        async with server_that_answers(answer) as url:
            with pytest.raises(kind, match=text):
                async with Relay(url, start_patience_s=0):
                    pass


@pytest.mark.fast
@pytest.mark.parametrize("invalid", ["[" * 10_000, "\nhello", "[]", "{}", '{"type":"welcome"}'])
async def test_an_invalid_welcome_is_rejected(invalid: str) -> None:
    async def send_invalid_welcome(websocket: ServerConnection) -> None:
        await websocket.send(invalid)
        await websocket.wait_closed()

    async with websocket_server(send_invalid_welcome) as url:
        with pytest.raises(RejectedError, match="not a relay: invalid"):
            async with Relay(url):
                pass


# URLs, proxies, tokens


class ConnectProxy(TcpProxy):
    """An HTTP proxy that connects every client to one server.

    Attributes:
        tunnels: the number of connections that it made.
    """

    tunnels = 0

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes:
        if not data.startswith(b"CONNECT "):
            return data
        self.tunnels += 1
        connection.client.write(b"HTTP/1.1 200 OK\r\n\r\n")
        return b""


@pytest.mark.parametrize(
    ("no_proxy", "uses_proxy", "tunnels"),
    [
        ("localhost,10.0.0.0/8", True, 1),
        ("localhost,127.0.0.1", True, 0),
        ("", False, 0),
    ],
)
async def test_a_client_connects_through_the_proxy_unless_no_proxy_has_the_relay(
    relay: RelayProcess,
    channel: str,
    monkeypatch: pytest.MonkeyPatch,
    no_proxy: str,
    uses_proxy: bool,
    tunnels: int,
) -> None:
    async with ConnectProxy(relay.port) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", no_proxy)
        async with Relay(relay.ws_url(), uses_proxy=uses_proxy) as client:
            assert await client.publish(channel, "hello")
        assert proxy.tunnels == tunnels


async def test_the_error_of_a_connection_through_a_proxy_names_it_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", "http://me:secret@127.0.0.1:1")
    with pytest.raises(UnavailableError) as raised:
        async with Relay("ws://relay.example/", start_patience_s=0):
            pass
    assert str(raised.value) == "connection refused (via proxy http://***@127.0.0.1:1)"


async def test_an_unusable_proxy_is_rejected_without_its_password(
    relay: RelayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy")
    for proxy, text in (
        ("me:secret@proxy", "invalid proxy URL in the environment"),
        ("socks5://127.0.0.1:1", "requires python-socks"),
    ):
        monkeypatch.setenv("socks_proxy", proxy)
        with pytest.raises(RejectedError, match=text) as raised:
            async with Relay(relay.ws_url()):
                pass
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [*INVALID_URLS, "ws://one..two/?access_token=secret", "ws://localhost/?since=secret"],
)
@pytest.mark.fast
def test_an_invalid_url_is_refused_by_an_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(InvalidUrlError) as raised:
        Relay(url)
    assert str(raised.value).startswith("not a relay URL such as ws://")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "relay_url", "channel"),
    [
        ("ws://relay", "ws://relay", "default"),
        ("ws://relay/", "ws://relay/", "default"),
        ("ws://relay/channels/news", "ws://relay/", "news"),
        ("wss://relay/base/channels/a.b?x=1", "wss://relay/base/?x=1", "a.b"),
        ("ws://relay/nowhere", "ws://relay/nowhere", "default"),
    ],
)
@pytest.mark.fast
def test_a_url_may_have_the_path_of_a_channel(url: str, relay_url: str, channel: str) -> None:
    assert RelayUrl.parse(url) == (relay_url, channel, url.startswith("wss:"))
    assert Relay(url).channel == channel


@pytest.mark.fast
async def test_an_invalid_token_is_refused_by_an_error_that_does_not_repeat_it() -> None:
    with pytest.raises(InvalidUrlError) as raised:
        async with Relay("ws://127.0.0.1:1/", token="se\r\ncret"):
            pass
    assert "cret" not in str(raised.value).replace("secret", "")
