"""relay.js in a real browser, on a page of another origin, through whatever happens to a relay."""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page
from websockets.asyncio.server import ServerConnection, serve

from tests.support import browser
from tests.support.issuer import channel_token
from tests.support.programs import TYPESCRIPT, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import RelayProcess, StartRelay, path_of, receive, receive_many
from tests.support.relay_v1 import RELAY_V1, number_texts, publish_all
from tests.support.site import RELAY_JS, serve_site
from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

pytestmark = browser.SHARED


NO_UPGRADES = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Way(TcpProxy):
    """What is between a page and a relay.

    Attributes:
        blocks_upgrades: who asks for a WebSocket is refused, as by a proxy that knows none.
        upgrades: how many asked for one.
    """

    def __init__(self, target: int | None) -> None:
        super().__init__(target)
        self.blocks_upgrades = False
        self.upgrades = 0
        self._asked = asyncio.Event()

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        if b"upgrade: websocket" not in data.lower():
            return data
        self.upgrades += 1
        self._asked.set()
        if not self.blocks_upgrades:
            return data
        connection.client.write(NO_UPGRADES)
        return None

    async def upgrades_reach(self, count: int) -> None:
        """Wait until so many asked for a WebSocket."""
        async with asyncio.timeout(PATIENCE_S):
            while self.upgrades < count:
                self._asked.clear()
                await self._asked.wait()


@dataclass
class Tab:
    """A page that has relay.js, and what it noted of what it was told."""

    page: Page

    async def start(self, url: str, **options: Any) -> None:
        await self.page.evaluate("([url, options]) => start(url, options)", [url, options])

    async def opened(self, url: str, **options: Any) -> None:
        await self.start(url, **options)
        await self.until("relay.state === 'open'")

    async def until(self, condition: str, argument: object = None) -> None:
        await self.page.wait_for_function(
            f"argument => {condition}", arg=argument, timeout=PATIENCE_S * 1000, polling=20
        )

    async def hears(self, messages: Sequence[object]) -> None:
        """Wait for so many messages; they are these, and in this order."""
        await self.until("heard.length >= argument", len(messages))
        assert await self.heard() == list(messages)

    async def heard(self) -> list[object]:
        return list(await self.page.evaluate("heard"))

    async def told(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind."""
        events = await self.page.evaluate("kind => told.filter(e => e.type === kind)", kind)
        return [{key: fact for key, fact in event.items() if fact is not None} for event in events]

    async def send(self, *messages: str) -> None:
        await self.page.evaluate("texts => texts.forEach(text => void send(text))", messages)

    async def sent(self) -> dict[str, str]:
        """Return what became of the messages sent: a position, or why not."""
        return dict(await self.page.evaluate("sent"))


async def load(page: Page, origin: str) -> Tab:
    await page.goto(origin)
    await page.wait_for_function("window.isReady")
    return Tab(page)


@asynccontextmanager
async def a_tab() -> AsyncIterator[Tab]:
    """Open a page that has relay.js from another origin."""
    async with serve_site() as elsewhere, serve_site() as here, browser.open_page() as page:
        here.module = elsewhere.module
        yield await load(page, here.origin)


@pytest_asyncio.fixture(loop_scope="session")
async def tab() -> AsyncIterator[Tab]:
    async with a_tab() as opened:
        yield opened


# What it is for


async def test_it_sends_and_hears_text_and_binary(
    tab: Tab, relay: RelayProcess, channel: str
) -> None:
    await tab.opened(relay.ws_url(path_of(channel)))
    async with relay.client(channel) as other:
        await tab.send("typed\nhere, ünder \U0001f600")
        assert await receive(other) == "typed\nhere, ünder \U0001f600"
        await other.send(b"\x00\n\xff")
        await other.send("")
        await tab.hears(["typed\nhere, ünder \U0001f600", [0, 10, 255], ""])
        await tab.page.evaluate("relay.send(new Uint8Array([9, 10, 11, 12]).subarray(1, 3))")
        assert await receive_many(other, 3) == [b"\x00\n\xff", "", b"\x0a\x0b"]
    assert await tab.page.evaluate("relay.transport") == "websocket"
    assert await tab.told("open") == [{"type": "open", "transport": "websocket"}]


async def test_what_is_sent_is_told_its_position(
    tab: Tab, relay: RelayProcess, channel: str
) -> None:
    await tab.opened(relay.ws_url(path_of(channel)))
    # A lone surrogate is no text; what comes back in its place is still one's own.
    await tab.page.evaluate("send('one'); send('\\ud800'); send(' '); send('one more')")
    await tab.until("Object.keys(sent).length === 4")
    assert list((await tab.sent()).values()) == await tab.page.evaluate("positions")
    await tab.page.evaluate("relay.send(new Uint8Array(3)).then(at => { sent.bytes = at })")
    await tab.until("sent.bytes === relay.position")


async def test_two_tabs_talk_to_each_other(relay: RelayProcess, channel: str) -> None:
    async with serve_site() as here, browser.open_page() as page:
        one = await load(page, here.origin)
        async with page.expect_popup() as opening:
            await page.evaluate("origin => void open(origin)", here.origin)
        other = await load(await opening.value, here.origin)
        for tab in (one, other):
            await tab.opened(relay.ws_url(), channel=channel)
        await one.send("from one")
        await other.until("heard.length === 1")
        await other.send("from the other")
        for tab in (one, other):
            await tab.hears(["from one", "from the other"])


async def test_history_comes_first_and_only_once(relay: RelayProcess, channel: str) -> None:
    async with Way(relay.port) as way, a_tab() as tab, relay.client(channel) as other:
        for number in number_texts(0, 10):
            await other.send(number)
        await receive_many(other, 10)
        await tab.opened(way.url(path_of(channel)), history=3)
        await tab.hears(number_texts(7, 10))
        way.cut()
        await tab.until("told.some(event => event.type === 'close')")
        await other.send("10")
        await tab.hears(number_texts(7, 11))


async def test_a_later_visit_goes_on_where_the_earlier_one_ended(
    relay: RelayProcess, channel: str
) -> None:
    url = relay.ws_url(path_of(channel))
    async with relay.client(channel) as other:
        async with a_tab() as tab:
            await tab.opened(url)
            await other.send("0")
            await tab.hears(["0"])
            since = await tab.page.evaluate("relay.position")
        await other.send("1")
        async with a_tab() as tab:
            await tab.opened(url, since=since)
            await tab.hears(["1"])
            await tab.page.evaluate("relay.close()")
            assert await tab.page.evaluate("why('closed')") == "closed"
            await other.send("2")
            await tab.page.evaluate("relay.open()")
            await tab.hears(["1", "2"])


# Coming back


async def hear_while_it_ends(
    tab: Tab, way: Way, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str, how: str
) -> None:
    """Say 300 messages; after a third of them the page's relay ends, and the other one is there."""
    one, two = redis_replicas
    count = 300
    async with two.client(channel) as publisher:
        await tab.opened(way.url(path_of(channel)))
        for number in range(count):
            await publisher.send(str(number))
            assert await receive(publisher) == str(number)
            if number == count // 3:
                way.target = two.port
                if how == "cut off":
                    way.cut()
                else:
                    one.signal(SIGTERM if how == "stopped" else SIGKILL)
        await tab.hears(number_texts(0, count))


@pytest.mark.parametrize("how", ["stopped", "killed", "cut off"])
async def test_a_relay_that_ends_mid_stream_leaves_no_gap_and_no_duplicate(
    tab: Tab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str, how: str
) -> None:
    async with Way(redis_replicas[0].port) as way:
        await hear_while_it_ends(tab, way, redis_replicas, channel, how)
        assert len(await tab.told("close")) == 1
        assert len(await tab.told("gap")) == 0


@pytest.mark.parametrize(("transport", "count"), [("websocket", 400), ("stream", 100)])
async def test_what_it_sends_while_relays_stop_is_relayed_once_and_in_order(
    tab: Tab,
    redis_replicas: tuple[RelayProcess, RelayProcess],
    channel: str,
    transport: str,
    count: int,
) -> None:
    one, two = redis_replicas
    async with Way(one.port) as way, two.client(channel, max_queue=None) as listener:
        way.blocks_upgrades = transport == "stream"
        await tab.opened(way.url(path_of(channel)))
        await tab.page.evaluate(
            """count => {
                let number = 0;
                const timer = setInterval(() => {
                    for (let nth = 0; nth < 4; nth++) send(String(number++));
                    if (number >= count) clearInterval(timer);
                }, 2);
            }""",
            count,
        )
        await tab.until("heard.length > 20")
        way.target = two.port
        one.signal(SIGTERM)
        await tab.until("Object.keys(sent).length === argument", count)
        assert await receive_many(listener, count) == number_texts(0, count)
        await tab.hears(number_texts(0, count))
        assert list((await tab.sent()).values()) == await tab.page.evaluate("positions")


async def test_what_a_relay_that_stops_did_not_read_is_sent_again(
    tab: Tab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    one, two = redis_replicas
    async with Way(one.port) as way, two.client(channel) as listener:
        await tab.opened(way.url(path_of(channel)))
        way.lose_client_bytes()
        await tab.send(*number_texts(0, 10))
        way.target = two.port
        one.signal(SIGTERM)
        await tab.until("told.some(event => event.type === 'close')")
        await tab.send(*number_texts(10, 20))
        assert await receive_many(listener, 20) == number_texts(0, 20)
        await tab.hears(number_texts(0, 20))
        await tab.until("Object.keys(sent).length === 20")
        assert list((await tab.sent()).values()) == await tab.page.evaluate("positions")


async def test_what_it_sends_while_the_network_breaks_is_never_sent_twice(
    tab: Tab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    one, two = redis_replicas
    count = 300
    async with Way(one.port) as way, two.client(channel, max_queue=None) as listener:
        await tab.opened(way.url(path_of(channel)))
        await tab.send(*number_texts(0, count))
        way.cut()
        await tab.until("Object.keys(sent).length === argument", count)
        await tab.send("the end")
        heard: list[object] = []
        while not heard or heard[-1] != "the end":
            heard.append(await receive(listener))
        await tab.until("sent['the end']")
    relayed = [text for text, what in (await tab.sent()).items() if what != "uncertain"]
    assert len(set(heard)) == len(heard)
    assert [text for text in heard if text in relayed] == relayed, "what it was told is so"


async def test_it_comes_back_when_the_relay_that_stops_tells_it_to(
    tab: Tab, relay_with: StartRelay
) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    await tab.opened(relay.ws_url())
    await relay.stop()
    await tab.until("told.some(event => event.type === 'close')")
    (close,) = await tab.told("close")
    assert close["code"] == 1001
    waits = [event for event in await tab.told("state") if event["state"] == "waiting"]
    assert waits[0]["reason"] == close["reason"] == f"draining; retry_ms={waits[0]['retryInMs']}"


async def test_it_tells_of_a_gap_where_the_relay_has_forgotten(
    tab: Tab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    async with Way(relay.port) as way:
        await tab.opened(way.url(path_of(channel)))
        await tab.send("before")
        await tab.hears(["before"])
        relay.signal(SIGKILL)
        again = relay_with()
        way.target = again.port
        await tab.until("told.some(event => event.type === 'gap')")
        await tab.send("after")
        await tab.hears(["before", "after"])


async def test_it_tries_again_less_and_less_often(tab: Tab) -> None:
    async with Way(None) as way:
        await tab.start(way.url())
        await tab.until("told.filter(event => event.state === 'waiting').length >= 3")
    waits = [each for each in await tab.told("state") if each["state"] == "waiting"][:3]
    for most, wait in zip((500, 1000, 2000), waits, strict=True):
        assert most / 2 <= wait["retryInMs"] <= most


async def test_what_is_sent_while_there_is_no_relay_waits_and_is_bounded(
    tab: Tab, relay: RelayProcess, channel: str
) -> None:
    async with Way(None) as way, relay.client(channel) as other:
        await tab.start(way.url(path_of(channel)), maxOffline=3, maxWaitingBytes=1000)
        assert await tab.page.evaluate("why('x'.repeat(1000))") == "full"
        await tab.send(*number_texts(0, 3))
        assert await tab.page.evaluate("why('3')") == "full"
        assert await tab.page.evaluate("relay.offline") == 3
        way.target = relay.port
        assert await receive_many(other, 3) == number_texts(0, 3)
        await tab.hears(number_texts(0, 3))
        assert await tab.page.evaluate("why('3')") is None, "there is room again"
        assert await receive(other) == "3"


async def test_what_waits_when_the_page_closes_it_is_told_so(tab: Tab) -> None:
    async with Way(None) as way:
        await tab.start(way.url())
        await tab.send("0")
        await tab.page.evaluate("relay.close()")
        await tab.until("sent[0]")
        assert await tab.sent() == {"0": "closed"}
        assert await tab.page.evaluate("relay.state") == "closed"


async def test_positions_of_64_bits_are_told_apart_heard_once_and_told_where_some_are_lost(
    tab: Tab,
) -> None:
    near = 2**63

    async def relayed_twice(connection: ServerConnection) -> None:
        await connection.send(
            f'\n{{"type":"welcome","recovered":true,"position":"{near}-{near}-0"}}'
        )
        for minor in (0, 1, 1, 2, 0):
            await connection.send(f"{near}-{near + minor}-0\n{minor}")
        await connection.send(f'\n{{"type":"gap","position":"{near}-{near + 2}-1"}}')
        await connection.send(f"{near}-{near + 2}-1\nbefore that")
        await connection.send(f"{near}-{near + 2}-2\nlast")
        await connection.wait_closed()

    async with serve(relayed_twice, "127.0.0.1", 0, subprotocols=[RELAY_V1]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        await tab.start(f"ws://127.0.0.1:{port}/")
        await tab.until("heard.includes('last')")
        assert await tab.heard() == ["1", "2", "last"]
        assert await tab.told("gap") == [{"type": "gap"}]
        await tab.page.evaluate("relay.close()")


# Sleep and wake


async def test_after_a_sleep_a_connection_that_died_is_replaced(
    relay: RelayProcess, channel: str
) -> None:
    async with Way(relay.port) as way, serve_site() as here, browser.open_page() as page:
        await page.clock.install()
        tab = await load(page, here.origin)
        await tab.opened(way.url(path_of(channel)))
        async with relay.client(channel) as other:
            way.stall()
            for number in number_texts(0, 5):
                await other.send(number)
            await receive_many(other, 5)
            await page.clock.fast_forward("10:00")
            await page.clock.run_for(5000)
            await tab.hears(number_texts(0, 5))
        assert len(await tab.told("open")) == 1, "the page did not notice"
        assert len(await tab.told("close")) == 0


async def test_after_a_sleep_a_connection_that_is_heard_stays(
    relay: RelayProcess, channel: str
) -> None:
    async with Way(relay.port) as way, serve_site() as here, browser.open_page() as page:
        await page.clock.install()
        tab = await load(page, here.origin)
        await tab.opened(way.url(path_of(channel)))
        async with relay.client(channel) as other:
            await page.clock.pause_at(await page.evaluate("Date.now()") + 600_000)
            await other.send("0")
            await tab.hears(["0"])
            await page.clock.run_for(5000)
            assert way.upgrades == 1
            await page.evaluate("window.dispatchEvent(new Event('online'))")
            await page.clock.run_for(5000)
            await way.upgrades_reach(2)  # nothing was heard this time
            await page.clock.resume()


async def test_a_frozen_page_holds_no_connection_and_misses_nothing(
    tab: Tab, relay: RelayProcess, channel: str
) -> None:
    await tab.opened(relay.ws_url(path_of(channel)))
    async with relay.client(channel) as other:
        # A browser without a window never freezes a page itself.
        await tab.page.evaluate("document.dispatchEvent(new Event('freeze'))")
        await relay.await_metric("websocket_connected_clients", 1)
        for number in number_texts(0, 100):
            await other.send(number)
        await receive_many(other, 100)
        await tab.page.evaluate("document.dispatchEvent(new Event('resume'))")
        await tab.hears(number_texts(0, 100))


async def test_it_comes_back_at_once_when_the_network_does(tab: Tab, relay: RelayProcess) -> None:
    async with Way(None) as way:
        await tab.start(way.url())
        await tab.until("told.some(({state, retryInMs}) => state && retryInMs > 2000)")
        way.target = relay.port
        before = time.monotonic()
        await tab.page.evaluate("window.dispatchEvent(new Event('online'))")
        await tab.until("relay.state === 'open'")
        assert time.monotonic() - before < 2


async def test_an_address_is_a_relay_s_or_refused_at_once(
    tab: Tab, relay: RelayProcess, channel: str
) -> None:
    for wrong in ("javascript:alert(1)", "data:text/plain,", "ftp://localhost/", "ws://"):
        said = "url => { try { new Relay(url) } catch (error) { return error.name } }"
        assert await tab.page.evaluate(said, wrong) in {"TypeError", "SyntaxError"}, wrong
    await publish_all(relay, channel, *number_texts(0, 5))
    url = relay.http_url(f"{path_of(channel)}?history=2#part").replace("//", "//user:pass@")
    await tab.opened(url)
    await tab.hears(number_texts(3, 5))


# Tokens


async def test_a_token_is_brought_and_kept_out_of_the_address(
    tab: Tab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.on("websocket", lambda socket: asked.append(socket.url))
    await tab.opened(jwt_relay.ws_url(path_of(channel)), token=token)
    await tab.send("0")
    await tab.hears(["0"])
    assert asked
    assert all(part not in url for url in asked for part in token.split("."))
    assert await tab.page.evaluate("why('1')") is None


async def test_a_token_that_expires_is_replaced_where_the_page_can(
    tab: Tab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    tokens = [channel_token(secret, channel, lasts_s=2), channel_token(secret, channel)]
    await tab.page.evaluate(
        "([url, tokens]) => start(url, {token: async () => tokens.shift()})",
        [jwt_relay.ws_url(path_of(channel)), tokens],
    )
    await tab.until("told.filter(event => event.type === 'open').length === 2")
    assert [(each["code"], each["reason"]) for each in await tab.told("close")] == [
        (3000, "token expired")
    ]
    assert await tab.told("refused") == []


async def test_a_token_that_expires_and_cannot_be_replaced_is_the_end(
    tab: Tab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel, lasts_s=2)
    await tab.start(jwt_relay.ws_url(path_of(channel)), token=token)
    await tab.until("told.some(event => event.type === 'refused')")
    assert await tab.told("refused") == [
        {"type": "refused", "status": 401, "reason": "token expired"}
    ]
    assert await tab.page.evaluate("relay.state") == "closed"
    # Until the page has another one.
    await tab.page.evaluate(
        "token => { relay.token = token; relay.open(); }", channel_token(secret, channel)
    )
    await tab.until("relay.state === 'open'")


async def test_a_page_that_has_no_token_yet_is_asked_again(
    tab: Tab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    await tab.page.evaluate(
        """([url, token]) => {
            const answers = [Promise.reject(new Error("not yet")), token];
            answers[0].catch(() => {});
            start(url, {token: () => answers.shift()});
        }""",
        [jwt_relay.ws_url(path_of(channel)), channel_token(secret, channel)],
    )
    await tab.until("relay.state === 'open'")
    states = [(each["state"], each["reason"]) for each in await tab.told("state")]
    assert ("waiting", "the page has no token") in states


async def test_what_is_no_token_is_not_sent(tab: Tab, relay: RelayProcess) -> None:
    async with Way(relay.port) as way:
        await tab.start(way.url(), token="not a token")
        await tab.until("told.some(event => event.type === 'refused')")
        assert way.upgrades == 0


# Refusals, whose reason server-sent events tell


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [("", 401, "token required"), ("other", 403, "not authorized for this channel")],
)
async def test_a_refusal_is_told_and_not_asked_for_again(
    tab: Tab,
    jwt_relay: RelayProcess,
    secret: str,
    channel: str,
    token: str,
    status: int,
    reason: str,
) -> None:
    async with Way(jwt_relay.port) as way:
        bring = {"token": channel_token(secret, token)} if token else {}
        await tab.start(way.url(path_of(channel)), **bring)
        await tab.until("told.some(event => event.type === 'refused')")
        assert await tab.told("refused") == [
            {"type": "refused", "status": status, "reason": reason}
        ]
        assert way.upgrades == 1


async def test_it_comes_back_when_a_limit_that_refused_it_says(
    tab: Tab, relay_with: StartRelay
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client():
        await tab.start(relay.ws_url())
        await tab.until("told.some(event => event.state === 'waiting')")
        (wait,) = [event for event in await tab.told("state") if event["state"] == "waiting"]
        assert wait["reason"] == "too many connections"
        assert wait["retryInMs"] >= 1000
    await tab.until("relay.state === 'open'")


async def test_where_websockets_are_blocked_it_hears_and_sends_without_them(
    tab: Tab, relay: RelayProcess, channel: str
) -> None:
    async with Way(relay.port) as way, relay.client(channel) as other:
        way.blocks_upgrades = True
        await tab.opened(way.url(path_of(channel)))
        assert await tab.page.evaluate("relay.transport") == "stream"
        await other.send("two\nlines, ünder \U0001f600")
        await other.send(b"\x00\xff")
        await other.send("")
        await tab.hears(["two\nlines, ünder \U0001f600", [0, 255], ""])
        await tab.send("typed", "here")
        await tab.page.evaluate("relay.send(new Uint8Array([1, 2]))")
        await receive_many(other, 3)
        assert await receive_many(other, 3) == ["typed", "here", b"\x01\x02"]
        await tab.until("Object.keys(sent).length === 2")
        assert list((await tab.sent()).values()) == (await tab.page.evaluate("positions"))[3:5]
        way.cut()
        await other.send("while it was away")
        await tab.until("heard.length === 7")
        assert (await tab.heard())[-1] == "while it was away"


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_stream_s_relay_that_ends_leaves_no_gap_and_no_duplicate(
    tab: Tab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str, how: str
) -> None:
    async with Way(redis_replicas[0].port) as way:
        way.blocks_upgrades = True
        await hear_while_it_ends(tab, way, redis_replicas, channel, how)
        assert len(await tab.told("gap")) == 0
        (close,) = await tab.told("close")
        assert close["code"] == (1001 if how == "stopped" else 1006)


async def test_a_stream_gives_way_to_a_websocket_when_there_can_be_one(
    relay: RelayProcess, channel: str
) -> None:
    async with Way(relay.port) as way, serve_site() as here, browser.open_page() as page:
        await page.clock.install()
        tab = await load(page, here.origin)
        way.blocks_upgrades = True
        await tab.opened(way.url(path_of(channel)))
        async with relay.client(channel) as other:
            await other.send("0")
            await tab.hears(["0"])
            way.blocks_upgrades = False
            await page.clock.run_for(61_000)
            await tab.until("relay.transport === 'websocket'")
            await other.send("1")
            await tab.hears(["0", "1"])
            assert len(await tab.told("close")) == 0


async def test_what_a_stream_s_relay_refuses_is_told(
    tab: Tab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    async with Way(jwt_relay.port) as way:
        way.blocks_upgrades = True
        token = channel_token(secret, channel, may_publish=False)
        await tab.opened(way.url(path_of(channel)), token=token)
        await tab.send("0")
        await tab.until("sent[0] === 'refused'")
        assert await tab.page.evaluate("relay.state") == "open"


# The file


SAME = """
import * as made from "./made/relay.js";
import * as told from "./told/relay.js";
type Same<A, B> = [A] extends [B] ? ([B] extends [A] ? true : false) : false;
export const names: [
  Same<keyof typeof made, keyof typeof told>,
  Same<keyof made.Relay, keyof told.Relay>,
  Same<keyof made.RelayError, keyof told.RelayError>,
] = [true, true, true];
export const types: typeof told = made;
"""


def test_the_types_are_those_of_the_module(tmp_path: Path) -> None:
    script, types = tmp_path / "made" / "relay.js", tmp_path / "told" / "relay.d.ts"
    for file in (script, types):
        file.parent.mkdir()
    script.write_text(RELAY_JS.read_text().replace('"./relay.js"', '"../told/relay.js"'))
    types.write_text(RELAY_JS.with_suffix(".d.ts").read_text())
    (tmp_path / "same.ts").write_text(SAME)
    options = "--noEmit --strict --allowJs --checkJs --target es2022 --module nodenext"
    done = subprocess.run(
        [needed(TYPESCRIPT), *options.split(), "--lib", "es2022,dom,dom.iterable", "same.ts"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
