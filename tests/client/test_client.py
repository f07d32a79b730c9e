"""The Python client: it hears everything once, sends nothing twice, and comes back by itself."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

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
from websocket_relay.client.relay import FIRST_WAIT_S, LONGEST_WAIT_S, delay_s
from websockets.asyncio.server import ServerConnection, serve

from tests.support.addresses import NO_ADDRESSES
from tests.support.brokers import RedisBroker
from tests.support.certificates import make_pair
from tests.support.issuer import SECRET, token
from tests.support.programs import ANY_REDIS, needed
from tests.support.proxy import Proxy
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import Relay, StartRelay, path_of, receive

JWT = {"mode": "jwt", "jwt": {"secret": SECRET}}
Event = Connected | Disconnected | Unconfirmed


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


async def take(client: Client, number: int) -> list[Message]:
    """Hear so many messages."""
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(client) for _ in range(number)]


async def said_by(client: Client, number: int) -> list[str | bytes]:
    return [message.data for message in await take(client, number)]


class Diary:
    """What a client told of its connection."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._grew = asyncio.Event()

    def note(self, event: Event) -> None:
        self.events.append(event)
        self._grew.set()

    async def wait_for(self, kind: type[Event], *, number: int = 1) -> Event:
        async with asyncio.timeout(PATIENCE_S):
            while len(found := [each for each in self.events if isinstance(each, kind)]) < number:
                self._grew.clear()
                await self._grew.wait()
        return found[number - 1]


# Hearing


async def test_a_client_hears_text_as_text_and_binary_as_binary_and_where_it_stands(
    relay: Relay, channel: str
) -> None:
    async with Client(relay.ws_url(f"/channels/{channel}")) as client:
        async with relay.client(channel) as other:
            for data in ("text\nof two lines", b"\x00\n\xff", "", b""):
                await other.send(data)
        heard = await take(client, 4)
    assert [each.data for each in heard] == ["text\nof two lines", b"\x00\n\xff", "", b""]
    assert len({each.position for each in heard}) == 4
    assert not any(each.after_gap for each in heard)


async def test_a_client_goes_on_behind_a_position_or_with_the_last_messages(
    relay: Relay, channel: str
) -> None:
    url = relay.ws_url(f"/channels/{channel}")
    async with Client(url) as client:
        for number in range(5):
            await client.send(str(number))
        heard = await take(client, 5)
    async with Client(url, since=heard[2].position) as client:
        assert await said_by(client, 2) == ["3", "4"]
    async with Client(url, history=3) as client:
        assert await said_by(client, 3) == ["2", "3", "4"]
    async with Client(f"{url}?history=1") as client:
        assert await said_by(client, 1) == ["4"]


async def test_a_client_hears_the_largest_message_there_is(relay: Relay, channel: str) -> None:
    async with Client(relay.ws_url(f"/channels/{channel}")) as client:
        largest = b"x" * 1_048_576
        await client.send(largest)
        assert await said_by(client, 1) == [largest]


async def test_a_client_that_loses_its_connection_misses_nothing_and_hears_nothing_twice(
    relay: Relay, channel: str
) -> None:
    async with Proxy(relay.port) as proxy, relay.client(channel) as other:
        diary = Diary()
        async with Client(proxy.url(path_of(channel)), on_event=diary.note) as client:
            for number in range(60):
                await other.send(str(number))
                await receive(other)
                if number % 20 == 10:
                    await diary.wait_for(Connected, number=1 + number // 20)
                    proxy.cut()
                    await diary.wait_for(Disconnected, number=1 + number // 20)
            assert await said_by(client, 60) == [str(number) for number in range(60)]
    assert {each.is_recovered for each in diary.events if isinstance(each, Connected)} == {True}


async def test_a_client_is_told_that_the_relay_no_longer_has_what_it_missed(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(history={"max_messages": 2})
    async with Proxy(relay.port) as proxy, relay.client(channel) as other:
        diary = Diary()
        async with Client(proxy.url(path_of(channel)), on_event=diary.note) as client:
            await other.send("before")
            assert [each.after_gap for each in await take(client, 1)] == [False]
            proxy.cut()
            await diary.wait_for(Disconnected)
            for number in range(5):
                await other.send(str(number))
                await receive(other)
            await diary.wait_for(Connected, number=2)
            heard = await take(client, 2)
    assert [(each.data, each.after_gap) for each in heard] == [("3", True), ("4", False)]


async def test_a_client_follows_a_relay_that_is_drained_and_comes_back_elsewhere(
    relay_with: StartRelay, channel: str
) -> None:
    old = relay_with(shutdown={"spread_s": 0})
    async with Proxy(old.port) as proxy:
        diary = Diary()
        async with Client(proxy.url(path_of(channel)), on_event=diary.note) as client:
            await client.send("to the old")
            assert await said_by(client, 1) == ["to the old"]
            new = relay_with()
            assert await old.stop() == 0
            proxy.target = new.port
            await diary.wait_for(Connected, number=2)
            await client.send("to the new")
            assert await said_by(client, 1) == ["to the new"]
    left = diary.events[1]
    assert isinstance(left, Disconnected)
    assert left.reason.startswith("closed by the relay: draining; retry_ms=")


async def test_a_client_takes_no_more_than_it_has_room_for(relay: Relay, channel: str) -> None:
    url = relay.ws_url(f"/channels/{channel}")
    async with Client(url, max_waiting_bytes=2_000) as client, relay.client(channel) as other:
        for number in range(200):
            await other.send(f"{number:0100}")
            await receive(other)
        assert client.waiting <= 2_000 // size_of("0" * 100) + 1
        assert await said_by(client, 200) == [f"{number:0100}" for number in range(200)]


# Sending


async def test_what_was_sent_is_relayed_when_flush_returns(relay: Relay, channel: str) -> None:
    async with (
        relay.client(channel) as other,
        Client(relay.ws_url(f"/channels/{channel}"), listens=False) as client,
    ):
        for number in range(1_000):
            await client.send(str(number))
        await client.flush()
        assert client.unconfirmed == 0
        assert [await receive(other) for _ in range(1_000)] == [str(each) for each in range(1_000)]


async def test_who_leaves_has_sent_everything(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as other:
        async with Client(relay.ws_url(f"/channels/{channel}"), listens=False) as client:
            await client.send("the last word")
        assert client.unconfirmed == 0
        assert await receive(other) == "the last word"


async def test_what_is_sent_while_the_relay_is_away_is_kept_within_bounds_and_sent_then(
    relay: Relay, channel: str
) -> None:
    async with Proxy(relay.port) as proxy, relay.client(channel) as other:
        diary = Diary()
        room = size_of("0") * 3
        client = Client(proxy.url(path_of(channel)), max_pending_bytes=room, on_event=diary.note)
        async with client:
            proxy.target = None
            proxy.cut()
            await diary.wait_for(Disconnected)
            for number in range(3):
                await client.send(str(number))
            one_more = asyncio.create_task(client.send("3"))
            await diary.wait_for(Disconnected, number=2)
            assert not one_more.done()
            proxy.target = relay.port
            await one_more
            await client.flush()
        assert [await receive(other) for _ in range(4)] == ["0", "1", "2", "3"]


async def test_what_was_relayed_before_a_connection_broke_is_not_sent_again(
    relay: Relay, channel: str
) -> None:
    async with Proxy(relay.port) as proxy, relay.client(channel) as other:
        diary = Diary()
        async with Client(proxy.url(path_of(channel)), on_event=diary.note) as client:
            proxy.deafen()
            await client.send("relayed, and nobody told")
            assert await receive(other) == "relayed, and nobody told"
            proxy.cut()
            await diary.wait_for(Disconnected)
            await client.send("afterwards")
            await client.flush()
            assert await said_by(client, 2) == ["relayed, and nobody told", "afterwards"]
        assert await receive(other) == "afterwards"


@pytest.mark.parametrize("repeats", [False, True])
async def test_what_got_lost_with_a_connection_is_given_up_or_sent_again_as_is_wished(
    relay: Relay, channel: str, repeats: bool
) -> None:
    async with Proxy(relay.port) as proxy, relay.client(channel) as other:
        diary = Diary()
        async with Client(
            proxy.url(path_of(channel)), repeats=repeats, on_event=diary.note
        ) as client:
            proxy.mute()
            await client.send("lost")
            await proxy.has_lost_something()
            proxy.cut()
            await diary.wait_for(Disconnected)
            if repeats:
                await client.flush()
            else:
                with pytest.raises(UnconfirmedError, match="1 message unconfirmed"):
                    await client.flush()
            await client.send("afterwards")
            await client.flush()
        assert await receive(other) == ("lost" if repeats else "afterwards")


@pytest.mark.parametrize("repeats", [False, True])
async def test_of_what_a_killed_relay_relayed_last_nobody_knows_and_nothing_else_is_lost(
    relay_with: StartRelay, channel: str, repeats: bool
) -> None:
    old, new = relay_with(), relay_with()
    async with Proxy(old.port) as proxy, new.client(channel) as other:
        diary = Diary()
        url = proxy.url(path_of(channel))
        async with Client(url, repeats=repeats, listens=False, on_event=diary.note) as client:
            await client.send("heard")
            await client.flush()
            proxy.deafen()
            await client.send("relayed, and nobody told")
            await old.metric_is("websocket_messages_total", 2)
            assert await old.stop(signal.SIGKILL) != 0
            proxy.target = new.port
            proxy.cut()
            await diary.wait_for(Disconnected)
            await client.send("afterwards")
            if not repeats:
                with pytest.raises(UnconfirmedError):
                    await client.flush()
            await client.flush()
        assert await receive(other) == ("relayed, and nobody told" if repeats else "afterwards")


@pytest.fixture
async def two_replicas(tmp_path: Path, relay_with: StartRelay) -> AsyncIterator[list[Relay]]:
    """Two relays that are one, by a broker."""
    async with RedisBroker(needed(*ANY_REDIS), tmp_path / "broker") as b:
        backplane = {"url": b.url}
        yield [relay_with(backplane=backplane, shutdown={"spread_s": 0}) for _ in range(2)]


async def test_a_drain_in_the_middle_of_a_stream_loses_nothing_and_doubles_nothing(
    two_replicas: list[Relay], channel: str
) -> None:
    old, new = two_replicas
    texts = [str(number) for number in range(5_000)]
    async with Proxy(old.port) as proxy, Client(new.ws_url(f"/channels/{channel}")) as witness:
        hearing = asyncio.create_task(said_by(witness, len(texts)))
        async with Client(proxy.url(path_of(channel)), listens=False) as client:
            for number, text in enumerate(texts):
                await client.send(text)
                if number == 1_000:
                    proxy.target = new.port  # for who comes from now on
                    old.signal()
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await client.flush()
        assert await hearing == texts
    assert await old.exit_code() == 0


async def test_what_a_drained_relay_took_is_not_said_again_though_it_is_forgotten(
    relay_with: StartRelay, channel: str
) -> None:
    old, new = relay_with(shutdown={"spread_s": 0}), relay_with()
    async with Proxy(old.port) as proxy:
        async with Client(proxy.url(path_of(channel)), listens=False) as client:
            for number in range(3_000):
                await client.send(str(number))
                if number == 1_000:
                    proxy.target = new.port
                    old.signal()
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await client.flush()
        assert await old.exit_code() == 0


async def test_a_client_that_is_not_listened_to_is_told_instead_of_hanging(
    relay: Relay, channel: str
) -> None:
    url = relay.ws_url(f"/channels/{channel}")
    async with Client(url, max_waiting_bytes=500) as client:
        for number in range(100):
            await client.send(str(number))
        with pytest.raises(RuntimeError, match="unread messages block the client"):
            async with asyncio.timeout(PATIENCE_S):
                await client.flush()
        assert await said_by(client, 100) == [str(each) for each in range(100)]


@pytest.mark.parametrize(
    ("data", "error"),
    [("half a \ud800", UnicodeEncodeError), (None, TypeError), (["a"], TypeError)],
)
async def test_what_is_no_message_is_refused_at_once(
    relay: Relay, channel: str, data: object, error: type[Exception]
) -> None:
    async with Client(relay.ws_url(f"/channels/{channel}")) as client:
        with pytest.raises(error):
            await client.send(data)  # type: ignore[arg-type]  # that is the test
        await client.send("sound")
        assert await said_by(client, 1) == ["sound"]


@pytest.mark.fast
def test_an_outbox_takes_an_echo_for_its_oldest_message_only() -> None:
    outbox = Outbox(1_000)
    for text in ("a", "b", "a"):
        outbox.put(text)
    for _ in range(2):
        outbox.take()
    assert [outbox.hear(text) for text in ("b", "c", b"a", "a", "a", "b")] == [
        False, False, False, True, False, True
    ]  # fmt: skip
    assert len(outbox) == 1
    assert outbox.take() == "a"


@pytest.mark.fast
def test_an_outbox_sends_again_in_order_and_before_what_is_new() -> None:
    outbox = Outbox(1_000)
    for text in "abc":
        outbox.put(text)
    outbox.take(), outbox.take()
    outbox.send_again()
    assert [outbox.take() for _ in range(3)] == ["a", "b", "c"]
    assert outbox.abandon() == 3
    assert outbox.has_room_for(1_000)


# Coming in


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("/channels/news", {}, "HTTP 401, token required"),
        ("/channels/news", {"token": "a.b.c"}, "HTTP 401, invalid token: malformed"),
        ("/channels/news", {"token": token(exp=1)}, "HTTP 401, invalid token: expired"),
        (
            "/channels/news",
            {"token": token(relay={}, exp=None)},
            "HTTP 403, not authorized for this channel",
        ),
        ("/nowhere", {"token": token(exp=None)}, "HTTP 404, no such channel"),
        (
            "/",
            {"token": token(exp=None), "since": "yesterday"},
            "HTTP 400, bad query: since must be one position",
        ),
    ],
)
async def test_a_refusal_for_good_is_told_at_once(
    relay_with: StartRelay, path: str, options: dict[str, str], words: str
) -> None:
    url = relay_with(auth=JWT).ws_url(path)
    started = time.monotonic()
    with pytest.raises(RejectedError) as raised:
        async with Client(url, start_patience_s=PATIENCE_S, **options):  # type: ignore[arg-type]
            pass
    assert str(raised.value).startswith(words)
    assert time.monotonic() - started < PATIENCE_S / 2


async def test_a_relay_that_is_not_there_is_told_or_waited_for(
    relay_with: StartRelay, channel: str
) -> None:
    with pytest.raises(UnavailableError, match="connection refused"):
        async with Client("ws://127.0.0.1:1/"):
            pass
    relay = relay_with()
    async with Proxy(None) as proxy:
        diary = Diary()

        async def let_it_in() -> None:
            await diary.wait_for(Disconnected)
            proxy.target = relay.port

        opening = asyncio.create_task(let_it_in())
        url = proxy.url(path_of(channel))
        async with Client(url, start_patience_s=PATIENCE_S, on_event=diary.note) as client:
            await client.send("here at last")
            assert await said_by(client, 1) == ["here at last"]
        await opening


async def test_who_was_let_in_once_gives_up_when_the_patience_ends(
    relay: Relay, channel: str
) -> None:
    async with (
        Proxy(relay.port) as proxy,
        Client(proxy.url(path_of(channel)), patience_s=0) as client,
    ):
        proxy.target = None
        proxy.cut()
        with pytest.raises(UnavailableError):
            await take(client, 1)
        with pytest.raises(UnavailableError):
            await client.send("anybody?")


async def test_a_refusal_for_now_is_tried_again_when_the_relay_said(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    url = relay.ws_url(f"/channels/{channel}")
    async with relay.client(channel):
        diary = Diary()
        client = Client(url, start_patience_s=PATIENCE_S, on_event=diary.note)
        waiting = asyncio.create_task(client.__aenter__())
        event = await diary.wait_for(Disconnected)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert isinstance(event, Disconnected)
    assert event.reason == "HTTP 503, too many connections"
    assert 1 <= event.retry_s <= 6


@asynccontextmanager
async def closing_with(code: int, reason: str) -> AsyncIterator[str]:
    """Be a relay that welcomes and then closes."""
    welcome = {"type": "welcome", "recovered": True, "position": "1-0-0"}

    async def close(websocket: ServerConnection) -> None:
        await websocket.send("\n" + json.dumps(welcome))
        await websocket.close(code, reason)

    async with serve(close, "127.0.0.1", 0, subprotocols=["relay.v1"]) as server:  # type: ignore[list-item]
        (port,) = {found.getsockname()[1] for found in server.sockets}
        yield f"ws://127.0.0.1:{port}/"


@pytest.mark.fast
async def test_a_client_comes_back_when_a_draining_relay_wants_it_back() -> None:
    diary = Diary()
    goodbye = closing_with(1001, "draining; retry_ms=1234")
    async with goodbye as url, Client(url, on_event=diary.note):
        event = await diary.wait_for(Disconnected)
    assert event == Disconnected("closed by the relay: draining; retry_ms=1234 (1001)", 1.234)


@pytest.mark.parametrize(
    ("code", "reason"), [(1008, "not allowed to publish"), (1009, "message too big"), (1007, "x")]
)
async def test_a_close_that_would_come_again_is_told_at_once(code: int, reason: str) -> None:
    async with closing_with(code, reason) as url:
        with pytest.raises(RejectedError, match=rf"closed by the relay: {reason} \({code}\)"):
            async with Client(url) as client:
                await take(client, 1)


@pytest.mark.parametrize(
    ("code", "reason"), [(1008, "rate limit"), (1013, "slow consumer"), (1000, ""), (1011, "x")]
)
@pytest.mark.fast
async def test_after_any_other_close_it_comes_back(code: int, reason: str) -> None:
    diary = Diary()
    async with closing_with(code, reason) as url, Client(url, on_event=diary.note):
        await diary.wait_for(Connected, number=2)


@pytest.mark.fast
async def test_waits_grow_twofold_by_chance_and_up_to_half_a_minute() -> None:
    for attempt in range(200):
        most = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
        assert most / 2 <= delay_s(attempt, None) <= most
    assert len({delay_s(0, None) for _ in range(20)}) > 1
    assert delay_s(7, 0.0) == 0.0
    assert delay_s(0, 86_400.0) == LONGEST_WAIT_S


async def test_a_token_is_asked_for_before_every_connection(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    asked = count(1)

    async def fresh() -> str:
        return token(exp=int(time.time()) + (2 if next(asked) == 1 else 60))

    diary = Diary()
    url = relay.ws_url(f"/channels/{channel}")
    async with Client(url, token=fresh, on_event=diary.note) as client:
        event = await diary.wait_for(Disconnected)
        assert isinstance(event, Disconnected)
        assert event.reason == "closed by the relay: token expired (3000)"
        await client.send("let in again")
        assert await said_by(client, 1) == ["let in again"]
    assert next(asked) == 3


async def test_a_token_that_stays_the_same_is_not_tried_again(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=JWT)
    url = relay.ws_url(f"/channels/{channel}")
    async with Client(url, token=token(exp=int(time.time()) + 2)) as client:
        with pytest.raises(RejectedError, match="token expired"):
            await take(client, 1)


async def test_who_may_not_publish_is_told(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(auth=JWT)
    only_hears = token(relay={"subscribe": ["*"]})
    async with Client(relay.ws_url(f"/channels/{channel}"), token=only_hears) as client:
        await client.send("may I?")
        with pytest.raises(RejectedError, match="not allowed to publish"):
            await client.flush()


async def test_a_message_that_is_too_big_is_told(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(limits={"max_message_bytes": 1_000})
    async with Client(relay.ws_url(f"/channels/{channel}"), listens=False) as client:
        await client.send("x" * 1_000)
        await client.flush()
        await client.send("x" * 1_001)
        with pytest.raises(RejectedError, match="message too big"):
            await client.flush()
        assert client.unconfirmed == 1


async def test_a_client_sends_and_hears_nothing_that_is_larger_than_it_may_be(
    relay: Relay, channel: str
) -> None:
    url = relay.ws_url(f"/channels/{channel}")
    async with Client(url, max_message_bytes=1_000) as client, relay.client(channel) as other:
        with pytest.raises(ValueError, match="a message has at most 1,000 bytes"):
            await client.send("x" * 1_001)
        await client.send("x" * 1_000)
        assert await said_by(client, 1) == ["x" * 1_000]
        await other.send("x" * 2_000)
        with pytest.raises(RejectedError, match="over the client's size limit"):
            await take(client, 1)


async def test_a_certificate_is_trusted_or_it_is_not(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    url = relay.ws_url(f"/channels/{channel}")
    async with Client(url, ssl=relay.tls_context) as client:
        await client.send("in private")
        assert await said_by(client, 1) == ["in private"]
    for context in (None, make_pair().trusting_context()):
        with pytest.raises(RejectedError, match="certificate not trusted: self"):
            async with Client(url, ssl=context, start_patience_s=PATIENCE_S):
                pass
    same_place = relay.ws_url(f"/channels/{channel}", host="127.1")
    with pytest.raises(RejectedError, match="certificate is for another host name"):
        async with Client(same_place, ssl=relay.tls_context, start_patience_s=PATIENCE_S):
            pass


async def test_what_is_no_relay_is_told(relay: Relay) -> None:
    async def echo(websocket: ServerConnection) -> None:
        async for message in websocket:
            await websocket.send(message)

    async with serve(echo, "127.0.0.1", 0) as server:
        (port,) = {found.getsockname()[1] for found in server.sockets}
        with pytest.raises(RejectedError, match="not a relay: subprotocol"):
            async with Client(f"ws://127.0.0.1:{port}/", start_patience_s=PATIENCE_S):
                pass
    with pytest.raises(RejectedError, match="HTTP 404"):
        async with Client(relay.metrics_url("/").replace("http", "ws")):
            pass
    with pytest.raises(UnavailableError, match="server does not speak TLS; try ws://"):
        async with Client(relay.ws_url().replace("ws:", "wss:")):
            pass


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """Be a server that answers every request with the same bytes."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"", UnavailableError, "closed during the opening handshake; try wss://"),
        (b"220 mail.example.com\r\n\r\n", RejectedError, "not a relay"),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", RejectedError, "not a relay"),
        (
            b"HTTP/1.1 503 No\r\nRetry-After: " + b"9" * 5_000 + b"\r\n\r\n",
            UnavailableError,
            "HTTP 503, No",
        ),
    ],
)
@pytest.mark.fast
async def test_an_answer_that_makes_no_sense_is_told(
    answer: bytes, kind: type[Exception], words: str
) -> None:
    async with answering(answer) as url:
        with pytest.raises(kind, match=words):
            async with Client(url):
                pass


@pytest.mark.fast
async def test_a_welcome_that_makes_no_sense_is_told() -> None:
    async def welcome(websocket: ServerConnection) -> None:
        await websocket.send("\n" + "[" * 500_000)
        await websocket.wait_closed()

    async with serve(welcome, "127.0.0.1", 0, subprotocols=["relay.v1"]) as server:  # type: ignore[list-item]
        (port,) = {found.getsockname()[1] for found in server.sockets}
        with pytest.raises(RejectedError, match="not a relay: invalid welcome message"):
            async with Client(f"ws://127.0.0.1:{port}/"):
                pass


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("me:secret@proxy", "invalid proxy URL in the environment"),
        ("socks5://127.0.0.1:1", "requires python-socks"),
    ],
)
async def test_a_proxy_that_can_t_be_used_is_told(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, proxy: str, words: str
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("socks_proxy", proxy)
    with pytest.raises(RejectedError, match=words) as raised:
        async with Client(relay.ws_url()):
            pass
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [*NO_ADDRESSES, "ws://one..two/?access_token=secret", "ws://localhost/?history=secret"],
)
@pytest.mark.fast
def test_what_is_no_address_is_told_without_repeating_it(url: str) -> None:
    with pytest.raises(InvalidUrlError) as raised:
        Client(url)
    assert str(raised.value).startswith("not a channel URL such as ws://")
    assert "secret" not in str(raised.value)


@pytest.mark.fast
async def test_what_is_no_token_is_not_sent() -> None:
    with pytest.raises(InvalidUrlError) as raised:
        async with Client("ws://127.0.0.1:1/", token="se\r\ncret"):
            pass
    assert "cret" not in str(raised.value).replace("secret", "")
