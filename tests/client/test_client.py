"""The Python client: receives every message once, sends none twice, and reconnects by itself."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from websocket_relay.client import (
    Connected,
    Disconnected,
    InvalidUrlError,
    Message,
    RejectedError,
    UnavailableError,
    Unconfirmed,
    UnconfirmedError,
)
from websocket_relay.client import Relay as Client
from websocket_relay.client.outbox import Outbox, size_of
from websocket_relay.client.proxy import proxy_for
from websocket_relay.client.relay import FIRST_WAIT_S, LONGEST_WAIT_S
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from tests.support.addresses import INVALID_URLS
from tests.support.brokers import RedisBroker
from tests.support.certificates import make_pair
from tests.support.issuer import SECRET, sign_token
from tests.support.programs import ANY_REDIS, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import RelayProcess, StartRelay, path_of, receive
from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

JWT = {"mode": "jwt", "jwt": {"secret": SECRET}}
RELAY_V1 = Subprotocol("relay.v1")
Event = Connected | Disconnected | Unconfirmed


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


async def next_messages(client: Client, number: int) -> list[Message]:
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(client) for _ in range(number)]


async def next_payloads(client: Client, number: int) -> list[str | bytes]:
    return [message.data for message in await next_messages(client, number)]


class EventLog:
    """The events that a client reports of its connection: `Client(url, on_event=log.append)`."""

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


async def test_a_client_receives_text_and_binary_messages_with_their_positions(
    relay: RelayProcess, channel: str
) -> None:
    published: list[str | bytes] = ["text\nof two lines", b"\x00\n\xff", "", b"", b"x" * 1_048_576]
    async with Client(relay.ws_url(path_of(channel))) as client:
        async with relay.client(channel) as publisher:
            for data in published:
                await publisher.send(data)
        received = await next_messages(client, 5)
    assert [message.data for message in received] == published
    assert len({message.position for message in received}) == 5
    assert not any(message.after_gap for message in received)


async def test_a_client_starts_after_a_position_or_with_the_last_messages(
    relay: RelayProcess, channel: str
) -> None:
    url = relay.ws_url(path_of(channel))
    async with Client(url) as client:
        for number in range(5):
            await client.send(str(number))
        received = await next_messages(client, 5)
    async with Client(url, since=received[2].position) as client:
        assert await next_payloads(client, 2) == ["3", "4"]
    async with Client(url, history=3) as client:
        assert await next_payloads(client, 3) == ["2", "3", "4"]
    async with Client(f"{url}?history=1") as client:
        assert await next_payloads(client, 1) == ["4"]


async def test_a_client_that_loses_its_connection_receives_every_message_once(
    relay: RelayProcess, channel: str
) -> None:
    async with TcpProxy(relay.port) as proxy, relay.client(channel) as publisher:
        log = EventLog()
        async with Client(proxy.url(path_of(channel)), on_event=log.append) as client:
            for number in range(40):
                await publisher.send(str(number))
                await receive(publisher)
                if number % 20 == 10:
                    await log.wait_for(Connected, number=1 + number // 20)
                    proxy.cut()
                    await log.wait_for(Disconnected, number=1 + number // 20)
            assert await next_payloads(client, 40) == [str(number) for number in range(40)]
    assert {each.is_recovered for each in log.events if isinstance(each, Connected)} == {True}


async def test_the_next_message_has_after_gap_when_the_relay_no_longer_has_the_missing_ones(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(history={"max_messages": 2})
    async with TcpProxy(relay.port) as proxy, relay.client(channel) as publisher:
        log = EventLog()
        async with Client(proxy.url(path_of(channel)), on_event=log.append) as client:
            await publisher.send("before")
            assert [each.after_gap for each in await next_messages(client, 1)] == [False]
            proxy.cut()
            await log.wait_for(Disconnected)
            for number in range(5):
                await publisher.send(str(number))
                await receive(publisher)
            await log.wait_for(Connected, number=2)
            received = await next_messages(client, 2)
    assert [(each.data, each.after_gap) for each in received] == [("3", True), ("4", False)]


async def test_a_client_of_a_draining_relay_reconnects_to_another(
    relay_with: StartRelay, channel: str
) -> None:
    old = relay_with(shutdown={"spread_s": 0})
    async with TcpProxy(old.port) as proxy:
        log = EventLog()
        async with Client(proxy.url(path_of(channel)), on_event=log.append) as client:
            await client.send("to the old relay")
            assert await next_payloads(client, 1) == ["to the old relay"]
            new = relay_with()
            assert await old.stop() == 0
            proxy.target = new.port
            await log.wait_for(Connected, number=2)
            await client.send("to the new relay")
            assert await next_payloads(client, 1) == ["to the new relay"]
    disconnected = log.events[1]
    assert isinstance(disconnected, Disconnected)
    assert disconnected.reason.startswith("closed by the relay: draining; retry_ms=")


async def test_a_client_buffers_no_more_than_max_waiting_bytes(
    relay: RelayProcess, channel: str
) -> None:
    url = relay.ws_url(path_of(channel))
    async with Client(url, max_waiting_bytes=2_000) as client, relay.client(channel) as publisher:
        for number in range(200):
            await publisher.send(f"{number:0100}")
            await receive(publisher)
        assert client.waiting <= 2_000 // size_of("0" * 100) + 1
        assert await next_payloads(client, 200) == [f"{number:0100}" for number in range(200)]


# Sending


async def test_flush_returns_when_every_message_is_relayed(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        relay.client(channel) as subscriber,
        Client(relay.ws_url(path_of(channel)), listens=False) as client,
    ):
        for number in range(500):
            await client.send(str(number))
        await client.flush()
        assert client.unconfirmed == 0
        received = [await receive(subscriber) for _ in range(500)]
    assert received == [str(number) for number in range(500)]


async def test_leaving_the_block_sends_every_message(relay: RelayProcess, channel: str) -> None:
    async with relay.client(channel) as subscriber:
        async with Client(relay.ws_url(path_of(channel)), listens=False) as client:
            await client.send("last message")
        assert client.unconfirmed == 0
        assert await receive(subscriber) == "last message"


async def test_messages_are_queued_within_a_limit_while_the_relay_is_unavailable(
    relay: RelayProcess, channel: str
) -> None:
    async with TcpProxy(relay.port) as proxy, relay.client(channel) as subscriber:
        log = EventLog()
        limit = size_of("0") * 3
        client = Client(proxy.url(path_of(channel)), max_pending_bytes=limit, on_event=log.append)
        async with client:
            proxy.target = None
            proxy.cut()
            await log.wait_for(Disconnected)
            for number in range(3):
                await client.send(str(number))
            one_more = asyncio.create_task(client.send("3"))
            await log.wait_for(Disconnected, number=2)
            assert not one_more.done()
            proxy.target = relay.port
            await one_more
            await client.flush()
        assert [await receive(subscriber) for _ in range(4)] == ["0", "1", "2", "3"]


async def test_a_message_whose_echo_is_replayed_after_a_reconnection_is_not_sent_again(
    relay: RelayProcess, channel: str
) -> None:
    async with TcpProxy(relay.port) as proxy, relay.client(channel) as subscriber:
        log = EventLog()
        async with Client(proxy.url(path_of(channel)), on_event=log.append) as client:
            proxy.lose_server_bytes()
            await client.send("relayed, not confirmed")
            assert await receive(subscriber) == "relayed, not confirmed"
            proxy.cut()
            await log.wait_for(Disconnected)
            await client.send("afterwards")
            await client.flush()
            assert await next_payloads(client, 2) == ["relayed, not confirmed", "afterwards"]
        assert await receive(subscriber) == "afterwards"


@pytest.mark.parametrize("repeats", [False, True])
async def test_a_message_that_was_lost_with_its_connection_is_abandoned_or_with_repeats_sent_again(
    relay: RelayProcess, channel: str, repeats: bool
) -> None:
    async with TcpProxy(relay.port) as proxy, relay.client(channel) as subscriber:
        log = EventLog()
        async with Client(
            proxy.url(path_of(channel)), repeats=repeats, on_event=log.append
        ) as client:
            proxy.lose_client_bytes()
            await client.send("lost")
            await proxy.await_lost_bytes()
            proxy.cut()
            await log.wait_for(Disconnected)
            if repeats:
                await client.flush()
            else:
                with pytest.raises(UnconfirmedError, match="1 message unconfirmed"):
                    await client.flush()
            await client.send("afterwards")
            await client.flush()
        assert await receive(subscriber) == ("lost" if repeats else "afterwards")


@pytest.mark.parametrize("repeats", [False, True])
async def test_only_the_messages_in_flight_to_a_killed_relay_are_unconfirmed(
    relay_with: StartRelay, channel: str, repeats: bool
) -> None:
    old, new = relay_with(), relay_with()
    async with TcpProxy(old.port) as proxy, new.client(channel) as subscriber:
        log = EventLog()
        url = proxy.url(path_of(channel))
        async with Client(url, repeats=repeats, listens=False, on_event=log.append) as client:
            await client.send("confirmed")
            await client.flush()
            proxy.lose_server_bytes()
            await client.send("relayed, not confirmed")
            await old.await_metric("websocket_messages_total", 2)
            assert await old.stop(signal.SIGKILL) != 0
            proxy.target = new.port
            proxy.cut()
            await log.wait_for(Disconnected)
            await client.send("afterwards")
            if not repeats:
                with pytest.raises(UnconfirmedError):
                    await client.flush()
            await client.flush()
        expected = "relayed, not confirmed" if repeats else "afterwards"
        assert await receive(subscriber) == expected


@pytest.fixture
async def two_replicas(tmp_path: Path, relay_with: StartRelay) -> AsyncIterator[list[RelayProcess]]:
    """Two replicas with one broker."""
    async with RedisBroker(needed(*ANY_REDIS), tmp_path / "broker") as broker:
        backplane = {"url": broker.url}
        yield [relay_with(backplane=backplane, shutdown={"spread_s": 0}) for _ in range(2)]


async def test_a_drain_during_a_stream_of_messages_loses_none_and_duplicates_none(
    two_replicas: list[RelayProcess], channel: str
) -> None:
    old, new = two_replicas
    texts = [str(number) for number in range(2_000)]
    async with TcpProxy(old.port) as proxy, Client(new.ws_url(path_of(channel))) as subscriber:
        receiving = asyncio.create_task(next_payloads(subscriber, len(texts)))
        async with Client(proxy.url(path_of(channel)), listens=False) as client:
            for number, text in enumerate(texts):
                await client.send(text)
                if number == 500:
                    proxy.target = new.port  # of later connections
                    old.signal()
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await client.flush()
        assert await receiving == texts
    assert await old.exit_code() == 0


async def test_messages_that_a_draining_relay_accepted_are_confirmed_without_their_echoes(
    relay_with: StartRelay, channel: str
) -> None:
    """The new relay has another log, so that no echo is replayed."""
    old, new = relay_with(shutdown={"spread_s": 0}), relay_with()
    async with TcpProxy(old.port) as proxy:
        async with Client(proxy.url(path_of(channel)), listens=False) as client:
            for number in range(1_500):
                await client.send(str(number))
                if number == 500:
                    proxy.target = new.port
                    old.signal()
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await client.flush()
        assert await old.exit_code() == 0


async def test_flush_fails_instead_of_blocking_when_unread_messages_pause_the_client(
    relay: RelayProcess, channel: str
) -> None:
    async with Client(relay.ws_url(path_of(channel)), max_waiting_bytes=500) as client:
        for number in range(100):
            await client.send(str(number))
        with pytest.raises(RuntimeError, match="unread messages block the client"):
            async with asyncio.timeout(PATIENCE_S):
                await client.flush()
        assert await next_payloads(client, 100) == [str(each) for each in range(100)]


async def test_invalid_data_is_refused_by_send(relay: RelayProcess, channel: str) -> None:
    invalid: list[tuple[Any, type[Exception]]] = [
        ("unpaired surrogate \ud800", UnicodeEncodeError),
        (None, TypeError),
        (["a"], TypeError),
    ]
    async with Client(relay.ws_url(path_of(channel))) as client:
        for data, error in invalid:
            with pytest.raises(error):
                await client.send(data)
        await client.send("valid")
        assert await next_payloads(client, 1) == ["valid"]


async def test_a_message_outside_the_block_of_the_client_is_an_error(
    relay: RelayProcess, channel: str
) -> None:
    client = Client(relay.ws_url(path_of(channel)))
    for use in (client.send("lost"), anext(client)):
        with pytest.raises(RuntimeError, match="use it in `async with`"):
            await use
    async with client:
        pass
    with pytest.raises(RuntimeError, match="the client was closed"):
        await client.send("lost")
    assert client.unconfirmed == 0


@pytest.mark.fast
def test_an_outbox_accepts_an_echo_of_its_oldest_message_only() -> None:
    outbox = Outbox(1_000)
    for text in ("a", "b", "a"):
        outbox.append(text)
    for _ in range(2):
        outbox.next_to_send()
    assert [outbox.confirm_echo(text) for text in ("b", "c", b"a", "a", "a", "b")] == [
        False, False, False, True, False, True
    ]  # fmt: skip
    assert len(outbox) == 1
    assert outbox.next_to_send() == "a"


@pytest.mark.fast
def test_an_outbox_sends_unconfirmed_messages_again_in_order_before_new_ones() -> None:
    outbox = Outbox(1_000)
    for text in "abc":
        outbox.append(text)
    outbox.next_to_send(), outbox.next_to_send()
    outbox.send_again()
    assert [outbox.next_to_send() for _ in range(3)] == ["a", "b", "c"]
    assert outbox.abandon() == 3
    assert outbox.has_capacity_for(1_000)


# Connecting


async def test_a_permanent_refusal_is_raised_at_once(relay_with: StartRelay) -> None:
    relay = relay_with(auth=JWT)
    no_permission, everything = sign_token(relay={}, exp=None), sign_token(exp=None)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/channels/news", {}, "HTTP 401, token required"),
        ("/channels/news", {"token": "a.b.c"}, "HTTP 401, invalid token: malformed"),
        ("/channels/news", {"token": sign_token(exp=1)}, "HTTP 401, invalid token: expired"),
        ("/channels/news", {"token": no_permission}, "HTTP 403, not authorized for this channel"),
        ("/nowhere", {"token": everything}, "HTTP 404, no such channel"),
        (
            "/",
            {"token": everything, "since": "yesterday"},
            "HTTP 400, invalid query: since must be one position",
        ),
    ]
    for path, options, text in cases:
        started_at = time.monotonic()
        with pytest.raises(RejectedError) as raised:
            async with Client(relay.ws_url(path), start_patience_s=PATIENCE_S, **options):
                pass
        assert str(raised.value).startswith(text)
        assert time.monotonic() - started_at < PATIENCE_S / 2


async def test_a_client_waits_for_a_relay_that_is_started_later_than_itself(
    relay: RelayProcess, channel: str
) -> None:
    with pytest.raises(UnavailableError, match="connection refused"):
        async with Client("ws://127.0.0.1:1/", start_patience_s=0):
            pass
    async with TcpProxy(None) as proxy:
        log = EventLog()

        async def make_reachable() -> None:
            await log.wait_for(Disconnected)
            proxy.target = relay.port

        reachable = asyncio.create_task(make_reachable())
        url = proxy.url(path_of(channel))
        async with Client(url, on_event=log.append) as client:
            await client.send("connected")
            assert await next_payloads(client, 1) == ["connected"]
        await reachable


async def test_a_client_that_was_connected_gives_up_when_its_patience_ends(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        TcpProxy(relay.port) as proxy,
        Client(proxy.url(path_of(channel)), patience_s=0) as client,
    ):
        proxy.target = None
        proxy.cut()
        with pytest.raises(UnavailableError):
            await next_messages(client, 1)
        with pytest.raises(UnavailableError):
            await client.send("unavailable")


async def test_a_temporary_refusal_is_retried_after_the_time_in_retry_after(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client(channel):
        log = EventLog()
        url = relay.ws_url(path_of(channel))
        client = Client(url, start_patience_s=PATIENCE_S, on_event=log.append)
        connecting = asyncio.create_task(client.__aenter__())
        event = await log.wait_for(Disconnected)
        connecting.cancel()
        await asyncio.wait([connecting])
    assert isinstance(event, Disconnected)
    assert event.reason == "HTTP 503, too many connections"
    assert 1 <= event.retry_s <= 6


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


@asynccontextmanager
async def server_that_closes(code: int, reason: str) -> AsyncIterator[str]:
    """Run a server that sends a welcome and closes."""
    welcome = {"type": "welcome", "recovered": True, "position": "1-0-0"}

    async def close(websocket: ServerConnection) -> None:
        await websocket.send("\n" + json.dumps(welcome))
        await websocket.close(code, reason)

    async with websocket_server(close) as url:
        yield url


@pytest.mark.fast
async def test_a_client_reconnects_after_the_time_in_the_close_of_a_draining_relay() -> None:
    log = EventLog()
    draining = server_that_closes(1001, "draining; retry_ms=1234")
    async with draining as url, Client(url, on_event=log.append):
        event = await log.wait_for(Disconnected)
    assert event == Disconnected("closed by the relay: draining; retry_ms=1234 (1001)", 1.234)


@pytest.mark.fast
@pytest.mark.parametrize("reason", ["draining; retry_ms=86400000", "draining"])
async def test_no_close_makes_a_client_wait_longer_than_half_a_minute(reason: str) -> None:
    log = EventLog()
    async with server_that_closes(1001, reason) as url, Client(url, on_event=log.append):
        event = await log.wait_for(Disconnected)
    assert isinstance(event, Disconnected)
    longest_s = LONGEST_WAIT_S if "retry_ms" in reason else FIRST_WAIT_S
    assert longest_s / 2 <= event.retry_s <= longest_s


@pytest.mark.fast
async def test_a_close_that_would_happen_again_is_raised_at_once() -> None:
    """An expired token is one, unless a function returns a new token for each connection."""
    for code, reason in (
        (1008, "not allowed to publish"),
        (1009, "message too big"),
        (1007, "x"),
        (3000, "token expired"),
    ):
        async with server_that_closes(code, reason) as url:
            with pytest.raises(RejectedError, match=rf"closed by the relay: {reason} \({code}\)"):
                async with Client(url, token="a.b.c") as client:
                    await next_messages(client, 1)


@pytest.mark.parametrize(
    ("code", "reason"), [(1008, "rate limit"), (1013, "slow consumer"), (1000, ""), (1011, "x")]
)
@pytest.mark.fast
async def test_a_client_reconnects_after_any_other_close(code: int, reason: str) -> None:
    log = EventLog()
    async with server_that_closes(code, reason) as url, Client(url, on_event=log.append):
        await log.wait_for(Connected, number=2)


async def test_the_token_function_is_called_before_every_connection(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    calls = count(1)

    async def new_token() -> str:
        return sign_token(exp=int(time.time()) + (2 if next(calls) == 1 else 60))

    log = EventLog()
    url = relay.ws_url(path_of(channel))
    async with Client(url, token=new_token, on_event=log.append) as client:
        event = await log.wait_for(Disconnected)
        assert isinstance(event, Disconnected)
        assert event.reason == "closed by the relay: token expired (3000)"
        await client.send("admitted again")
        assert await next_payloads(client, 1) == ["admitted again"]
    assert next(calls) == 3


async def test_flush_raises_that_the_client_is_not_allowed_to_publish(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    only_subscribe = sign_token(relay={"subscribe": ["*"]})
    async with Client(relay.ws_url(path_of(channel)), token=only_subscribe) as client:
        await client.send("not allowed")
        with pytest.raises(RejectedError, match="not allowed to publish"):
            await client.flush()


async def test_flush_raises_that_a_message_is_too_big_for_the_relay(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_message_bytes": 1_000})
    async with Client(relay.ws_url(path_of(channel)), listens=False) as client:
        await client.send("x" * 1_000)
        await client.flush()
        await client.send("x" * 1_001)
        with pytest.raises(RejectedError, match="message too big"):
            await client.flush()
        assert (client.unconfirmed, client.unsent) == (1, 1)


async def test_a_client_neither_sends_nor_accepts_a_message_above_its_own_limit(
    relay: RelayProcess, channel: str
) -> None:
    url = relay.ws_url(path_of(channel))
    async with Client(url, max_message_bytes=1_000) as client, relay.client(channel) as publisher:
        with pytest.raises(ValueError, match="a message has at most 1,000 bytes"):
            await client.send("x" * 1_001)
        await client.send("x" * 1_000)
        assert await next_payloads(client, 1) == ["x" * 1_000]
        await publisher.send("x" * 2_000)
        with pytest.raises(RejectedError, match="over the client's size limit"):
            await next_messages(client, 1)


async def test_an_untrusted_certificate_or_another_host_name_is_rejected(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    url = relay.ws_url(path_of(channel))
    async with Client(url, ssl=relay.tls_context) as client:
        await client.send("encrypted")
        assert await next_payloads(client, 1) == ["encrypted"]
    for context in (None, make_pair().client_context()):
        with pytest.raises(RejectedError, match="certificate not trusted: self"):
            async with Client(url, ssl=context, start_patience_s=PATIENCE_S):
                pass
    other_host_name = relay.ws_url(path_of(channel), host="127.1")
    with pytest.raises(RejectedError, match="certificate is for another host name"):
        async with Client(other_host_name, ssl=relay.tls_context, start_patience_s=PATIENCE_S):
            pass


# Servers that are not a relay


async def test_a_server_that_is_not_a_relay_is_rejected(relay: RelayProcess) -> None:
    async def echo(websocket: ServerConnection) -> None:
        async for message in websocket:
            await websocket.send(message)

    async with websocket_server(echo, subprotocol=None) as url:
        with pytest.raises(RejectedError, match="not a relay: subprotocol"):
            async with Client(url, start_patience_s=PATIENCE_S):
                pass
    with pytest.raises(RejectedError, match="HTTP 404"):
        async with Client(relay.metrics_url("/").replace("http", "ws")):
            pass
    with pytest.raises(UnavailableError, match="server does not speak TLS; try ws://"):
        async with Client(relay.ws_url().replace("ws:", "wss:"), start_patience_s=0):
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
                async with Client(url, start_patience_s=0):
                    pass


@pytest.mark.fast
async def test_an_invalid_welcome_is_rejected() -> None:
    async def send_invalid_welcome(websocket: ServerConnection) -> None:
        await websocket.send("\n" + "[" * 500_000)
        await websocket.wait_closed()

    async with websocket_server(send_invalid_welcome) as url:
        with pytest.raises(RejectedError, match="not a relay: invalid welcome message"):
            async with Client(url):
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
        ("10.0.0.0/8, 127.0.0.0/8", True, 0),
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
        async with Client(relay.ws_url(path_of(channel)), uses_proxy=uses_proxy) as client:
            await client.send("hello")
            assert await next_payloads(client, 1) == ["hello"]
        assert proxy.tunnels == tunnels


@pytest.mark.parametrize(
    ("host", "no_proxy", "is_direct"),
    [
        ("localhost", "127.0.0.0/8", True),
        ("[::1]", "[::1]", True),
        ("[fd00::1]", "fd00::/8", True),
        ("10.1.2.3", "10.1.2.3/16", True),
        ("relay.example", ".example,10.0.0.0/8", True),
        ("relay.example", "10.0.0.0/8", False),
        ("11.1.2.3", "10.0.0.0/8", False),
    ],
)
@pytest.mark.fast
def test_no_proxy_has_names_addresses_and_networks(
    monkeypatch: pytest.MonkeyPatch, host: str, no_proxy: str, is_direct: bool
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    expected = None if is_direct else "http://proxy.example:3128"
    assert proxy_for(f"wss://{host}:8443/") == expected


async def test_the_error_of_a_connection_through_a_proxy_names_it_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", "http://me:secret@127.0.0.1:1")
    with pytest.raises(UnavailableError) as raised:
        async with Client("ws://relay.example/", start_patience_s=0):
            pass
    assert str(raised.value) == "connection refused (via proxy http://127.0.0.1:1)"


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
            async with Client(relay.ws_url()):
                pass
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [*INVALID_URLS, "ws://one..two/?access_token=secret", "ws://localhost/?history=secret"],
)
@pytest.mark.fast
def test_an_invalid_url_is_refused_by_an_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(InvalidUrlError) as raised:
        Client(url)
    assert str(raised.value).startswith("not a channel URL such as ws://")
    assert "secret" not in str(raised.value)


@pytest.mark.fast
async def test_an_invalid_token_is_refused_by_an_error_that_does_not_repeat_it() -> None:
    with pytest.raises(InvalidUrlError) as raised:
        async with Client("ws://127.0.0.1:1/", token="se\r\ncret"):
            pass
    assert "cret" not in str(raised.value).replace("secret", "")
