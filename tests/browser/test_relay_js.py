"""relay.js in a real browser, on a page of another origin, while relays and connections end."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page
from websockets.asyncio.server import ServerConnection, serve

from tests.support import browser
from tests.support.issuer import channel_token
from tests.support.programs import TYPESCRIPT, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_js_page import RELAY_JS, serve_relay_js_page
from tests.support.relay_process import RelayProcess, StartRelay, path_of, receive, receive_many
from tests.support.relay_v1 import RELAY_V1, number_texts, publish_all
from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

pytestmark = browser.SHARED


ANSWER = (
    b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n"
    b"Access-Control-Allow-Origin: *\r\n\r\n"
)


class UpgradeProxy(TcpProxy):
    """A proxy between a page and a relay that counts upgrades and can refuse them.

    Attributes:
        lost_echo: what the relay sends with these bytes is lost; empty: nothing.
        post_status: the status with which POSTs are answered; empty: the relay answers.
        blocks_upgrades: whether upgrades are refused, as by a proxy without WebSockets.
        upgrades: the number of requests for an upgrade.
    """

    def __init__(self, target: int | None) -> None:
        super().__init__(target)
        self.blocks_upgrades = False
        self.lost_echo = b""
        self.post_status = b""
        self.upgrades = 0
        self._upgrade_requested = asyncio.Event()

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        if self.post_status and data.startswith(b"POST "):
            connection.client.write(ANSWER % self.post_status)
            return None
        if b"upgrade: websocket" not in data.lower():
            return data
        self.upgrades += 1
        self._upgrade_requested.set()
        if not self.blocks_upgrades:
            return data
        connection.client.write(ANSWER % b"403 Forbidden")
        return None

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes:
        return b"" if self.lost_echo and self.lost_echo in data else data

    async def await_upgrades(self, count: int) -> None:
        """Wait until so many upgrades were requested."""
        async with asyncio.timeout(PATIENCE_S):
            while self.upgrades < count:
                self._upgrade_requested.clear()
                await self._upgrade_requested.wait()


@dataclass
class RelayTab:
    """A page with relay.js, which records messages, events and outcomes (relay_js_page.py)."""

    page: Page

    async def start(self, url: str, **options: Any) -> None:
        """Create a `Relay` on the page, and do not wait for its connection."""
        await self.page.evaluate("([url, options]) => start(url, options)", [url, options])

    async def open(self, url: str, **options: Any) -> None:
        """Create a `Relay` on the page, and wait until it is connected."""
        await self.start(url, **options)
        await self.wait_until("relay.state === 'open'")

    async def wait_until(self, condition: str, argument: object = None) -> None:
        """Wait until an expression of JavaScript is true."""
        await self.page.wait_for_function(
            f"argument => {condition}", arg=argument, timeout=PATIENCE_S * 1000, polling=20
        )

    async def await_messages(self, messages: Sequence[object]) -> None:
        """Wait for as many messages; assert that they are these, in this order."""
        await self.wait_until("received.length >= argument", len(messages))
        assert await self.received() == list(messages)

    async def received(self) -> list[object]:
        return list(await self.page.evaluate("received"))

    async def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind, without empty members."""
        events = await self.page.evaluate("kind => events.filter(e => e.type === kind)", kind)
        return [
            {key: value for key, value in event.items() if value is not None} for event in events
        ]

    async def send(self, *messages: str) -> None:
        await self.page.evaluate("texts => texts.forEach(text => void send(text))", messages)

    async def outcomes(self) -> dict[str, str]:
        """Return the outcome of each sent message: a position, or the reason of the error."""
        return dict(await self.page.evaluate("outcomes"))


async def load(page: Page, origin: str) -> RelayTab:
    await page.goto(origin)
    await page.wait_for_function("window.isReady")
    return RelayTab(page)


@asynccontextmanager
async def open_tab_with_clock() -> AsyncIterator[RelayTab]:
    """Open a page whose clock the test moves."""
    async with serve_relay_js_page() as site, browser.open_page() as page:
        await page.clock.install()
        yield await load(page, site.origin)


@asynccontextmanager
async def open_tab() -> AsyncIterator[RelayTab]:
    """Open a page that imports relay.js from another origin."""
    async with (
        serve_relay_js_page() as module_site,
        serve_relay_js_page() as site,
        browser.open_page() as page,
    ):
        site.module = module_site.module
        yield await load(page, site.origin)


@pytest_asyncio.fixture(loop_scope="session")
async def tab() -> AsyncIterator[RelayTab]:
    async with open_tab() as opened:
        yield opened


# Messages and history


async def test_relay_js_sends_and_receives_text_and_binary(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    await tab.open(relay.ws_url(path_of(channel)))
    async with relay.client(channel) as other:
        await tab.send("typed\nhere, ünder \U0001f600")
        assert await receive(other) == "typed\nhere, ünder \U0001f600"
        await other.send(b"\x00\n\xff")
        await other.send("")
        await tab.await_messages(["typed\nhere, ünder \U0001f600", [0, 10, 255], ""])
        await tab.page.evaluate("relay.send(new Uint8Array([9, 10, 11, 12]).subarray(1, 3))")
        assert await receive_many(other, 3) == [b"\x00\n\xff", "", b"\x0a\x0b"]
    assert await tab.page.evaluate("relay.transport") == "websocket"
    assert await tab.events("open") == [{"type": "open", "transport": "websocket"}]


async def test_send_resolves_to_the_position_of_the_message(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    await tab.open(relay.ws_url(path_of(channel)))
    # A lone surrogate is no text: the relayed message differs from the sent one, and still matches.
    await tab.page.evaluate("send('one'); send('\\ud800'); send(' '); send('one more')")
    await tab.wait_until("Object.keys(outcomes).length === 4")
    assert list((await tab.outcomes()).values()) == await tab.page.evaluate("positions")
    await tab.page.evaluate("relay.send(new Uint8Array(3)).then(at => { outcomes.bytes = at })")
    await tab.wait_until("outcomes.bytes === relay.position")


async def test_two_tabs_exchange_messages(relay: RelayProcess, channel: str) -> None:
    async with serve_relay_js_page() as site, browser.open_page() as page:
        one = await load(page, site.origin)
        async with page.expect_popup() as opening:
            await page.evaluate("origin => void open(origin)", site.origin)
        other = await load(await opening.value, site.origin)
        for tab in (one, other):
            await tab.open(relay.ws_url(), channel=channel)
        await one.send("from one")
        await other.wait_until("received.length === 1")
        await other.send("from the other")
        for tab in (one, other):
            await tab.await_messages(["from one", "from the other"])


async def test_history_is_delivered_first_and_only_once(relay: RelayProcess, channel: str) -> None:
    async with UpgradeProxy(relay.port) as proxy, open_tab() as tab, relay.client(channel) as other:
        for number in number_texts(0, 10):
            await other.send(number)
        await receive_many(other, 10)
        await tab.open(proxy.url(path_of(channel)), history=3)
        await tab.await_messages(number_texts(7, 10))
        proxy.cut()
        await tab.wait_until("events.some(event => event.type === 'close')")
        await other.send("10")
        await tab.await_messages(number_texts(7, 11))


async def test_a_later_visit_resumes_at_the_position_of_the_earlier_one(
    relay: RelayProcess, channel: str
) -> None:
    url = relay.ws_url(path_of(channel))
    async with relay.client(channel) as other:
        async with open_tab() as tab:
            await tab.open(url)
            await other.send("0")
            await tab.await_messages(["0"])
            since = await tab.page.evaluate("relay.position")
        await other.send("1")
        async with open_tab() as tab:
            await tab.open(url, since=since)
            await tab.await_messages(["1"])
            await tab.page.evaluate("relay.close()")
            assert await tab.page.evaluate("sendError('closed')") == "closed"
            await other.send("2")
            await tab.page.evaluate("relay.open()")
            await tab.await_messages(["1", "2"])


# Reconnections


async def receive_while_a_relay_ends(
    tab: RelayTab,
    proxy: UpgradeProxy,
    redis_replicas: tuple[RelayProcess, RelayProcess],
    channel: str,
    how: str,
) -> None:
    """Publish 300 messages on one relay; after 100 of them, the other one, of the page, ends."""
    one, two = redis_replicas
    count = 300
    async with two.client(channel) as publisher:
        await tab.open(proxy.url(path_of(channel)))
        for number in range(count):
            await publisher.send(str(number))
            assert await receive(publisher) == str(number)
            if number == count // 3:
                proxy.target = two.port
                if how == "cut off":
                    proxy.cut()
                else:
                    one.signal(SIGTERM if how == "stopped" else SIGKILL)
        await tab.await_messages(number_texts(0, count))


@pytest.mark.parametrize("how", ["stopped", "killed", "cut off"])
async def test_the_end_of_a_relay_or_connection_causes_no_gap_and_no_duplicate(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str, how: str
) -> None:
    async with UpgradeProxy(redis_replicas[0].port) as proxy:
        await receive_while_a_relay_ends(tab, proxy, redis_replicas, channel, how)
        assert len(await tab.events("close")) == 1
        assert len(await tab.events("gap")) == 0


@pytest.mark.parametrize(("transport", "count"), [("websocket", 400), ("stream", 100)])
async def test_messages_sent_while_a_relay_stops_are_relayed_once_and_in_order(
    tab: RelayTab,
    redis_replicas: tuple[RelayProcess, RelayProcess],
    channel: str,
    transport: str,
    count: int,
) -> None:
    one, two = redis_replicas
    async with UpgradeProxy(one.port) as proxy, two.client(channel, max_queue=None) as subscriber:
        proxy.blocks_upgrades = transport == "stream"
        await tab.open(proxy.url(path_of(channel)))
        await tab.page.evaluate(
            """count => {
                let number = 0;
                const timer = setInterval(() => {
                    for (let burst = 0; burst < 4; burst++) send(String(number++));
                    if (number >= count) clearInterval(timer);
                }, 2);
            }""",
            count,
        )
        await tab.wait_until("received.length > 20")
        proxy.target = two.port
        one.signal(SIGTERM)
        await tab.wait_until("Object.keys(outcomes).length === argument", count)
        assert await receive_many(subscriber, count) == number_texts(0, count)
        await tab.await_messages(number_texts(0, count))
        assert list((await tab.outcomes()).values()) == await tab.page.evaluate("positions")


async def test_messages_that_a_stopping_relay_did_not_read_are_sent_again(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    one, two = redis_replicas
    async with UpgradeProxy(one.port) as proxy, two.client(channel) as subscriber:
        await tab.open(proxy.url(path_of(channel)))
        proxy.lose_client_bytes()
        await tab.send(*number_texts(0, 10))
        proxy.target = two.port
        one.signal(SIGTERM)
        await tab.wait_until("events.some(event => event.type === 'close')")
        await tab.send(*number_texts(10, 20))
        assert await receive_many(subscriber, 20) == number_texts(0, 20)
        await tab.await_messages(number_texts(0, 20))
        await tab.wait_until("Object.keys(outcomes).length === 20")
        assert list((await tab.outcomes()).values()) == await tab.page.evaluate("positions")


async def test_messages_sent_while_the_connection_breaks_are_not_sent_twice(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    one, two = redis_replicas
    count = 300
    async with UpgradeProxy(one.port) as proxy, two.client(channel, max_queue=None) as subscriber:
        await tab.open(proxy.url(path_of(channel)))
        await tab.send(*number_texts(0, count))
        proxy.cut()
        await tab.wait_until("Object.keys(outcomes).length === argument", count)
        await tab.send("the end")
        received: list[object] = []
        while not received or received[-1] != "the end":
            received.append(await receive(subscriber))
        await tab.wait_until("outcomes['the end']")
    outcomes = (await tab.outcomes()).items()
    confirmed = [text for text, outcome in outcomes if outcome != "uncertain"]
    assert len(set(received)) == len(received)
    assert [text for text in received if text in confirmed] == confirmed


async def test_relay_js_reconnects_after_the_delay_in_the_close_reason(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    await tab.open(relay.ws_url())
    await relay.stop()
    await tab.wait_until("events.some(event => event.type === 'close')")
    (close,) = await tab.events("close")
    assert close["code"] == 1001
    waits = [event for event in await tab.events("state") if event["state"] == "waiting"]
    assert waits[0]["reason"] == close["reason"] == f"draining; retry_ms={waits[0]['retryInMs']}"


async def test_a_gap_event_reports_messages_that_the_relay_has_lost(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    async with UpgradeProxy(relay.port) as proxy:
        await tab.open(proxy.url(path_of(channel)))
        await tab.send("before")
        await tab.await_messages(["before"])
        relay.signal(SIGKILL)
        successor = relay_with()
        proxy.target = successor.port
        await tab.wait_until("events.some(event => event.type === 'gap')")
        await tab.send("after")
        await tab.await_messages(["before", "after"])


async def test_the_delay_before_reconnections_grows(tab: RelayTab) -> None:
    async with UpgradeProxy(None) as proxy:
        await tab.start(proxy.url())
        await tab.wait_until("events.filter(event => event.state === 'waiting').length >= 3")
    waits = [each for each in await tab.events("state") if each["state"] == "waiting"][:3]
    for most_ms, wait in zip((500, 1000, 2000), waits, strict=True):
        assert most_ms / 2 <= wait["retryInMs"] <= most_ms


async def test_messages_sent_without_a_relay_are_queued_up_to_a_bound(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(None) as proxy, relay.client(channel) as other:
        await tab.start(proxy.url(path_of(channel)), maxOffline=3, maxWaitingBytes=1000)
        assert await tab.page.evaluate("sendError('x'.repeat(1000))") == "full"
        await tab.send(*number_texts(0, 3))
        assert await tab.page.evaluate("sendError('3')") == "full"
        assert await tab.page.evaluate("relay.offline") == 3
        proxy.target = relay.port
        assert await receive_many(other, 3) == number_texts(0, 3)
        await tab.await_messages(number_texts(0, 3))
        assert await tab.page.evaluate("sendError('3')") is None, "the queue is not full any more"
        assert await receive(other) == "3"


async def test_close_rejects_queued_messages(tab: RelayTab) -> None:
    async with UpgradeProxy(None) as proxy:
        await tab.start(proxy.url())
        await tab.send("0")
        await tab.page.evaluate("relay.close()")
        await tab.wait_until("outcomes[0]")
        assert await tab.outcomes() == {"0": "closed"}
        assert await tab.page.evaluate("relay.state") == "closed"


async def test_positions_of_64_bits_are_compared_exactly(tab: RelayTab) -> None:
    """Duplicates are skipped and a gap is reported. Doubles could not hold these positions."""
    large = 2**63

    async def send_positions(connection: ServerConnection) -> None:
        await connection.send(
            f'\n{{"type":"welcome","recovered":true,"position":"{large}-{large}-0"}}'
        )
        for offset in (0, 1, 1, 2, 0):
            await connection.send(f"{large}-{large + offset}-0\n{offset}")
        await connection.send(f'\n{{"type":"gap","position":"{large}-{large + 1}-1"}}')
        await connection.send(f'\n{{"type":"gap","position":"{large}-{large + 2}-1"}}')
        await connection.send(f"{large}-{large + 2}-1\nat the gap")
        await connection.send(f"{large}-{large + 2}-2\nlast")
        await connection.wait_closed()

    async with serve(send_positions, "127.0.0.1", 0, subprotocols=[RELAY_V1]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        await tab.start(f"ws://127.0.0.1:{port}/")
        await tab.wait_until("received.includes('last')")
        assert await tab.received() == ["1", "2", "last"]
        assert await tab.events("gap") == [{"type": "gap"}]
        await tab.page.evaluate("relay.close()")


TIME_TO_REFUSAL = """text => new Promise(resolve => {
    const start = performance.now();
    relay.send(text).catch(error => resolve([error.why, error.message, performance.now() - start]));
    send("one"); send("two");
})"""


async def test_a_message_that_the_relay_refuses_is_rejected_at_once_and_the_next_ones_are_relayed(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_message_bytes": 1000})
    await tab.open(relay.ws_url(path_of(channel)))
    why, message, ms = await tab.page.evaluate(TIME_TO_REFUSAL, "x" * 1001)
    assert (why, message) == ("refused", "not relayed: 1009 message too big")
    assert ms < 1000
    await tab.await_messages(["one", "two"])


async def test_messages_without_the_permission_to_publish_are_rejected_at_once(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel, may_publish=False)
    await tab.open(jwt_relay.ws_url(path_of(channel)), token=token)
    why, message, ms = await tab.page.evaluate(TIME_TO_REFUSAL, "zero")
    assert (why, message) == ("refused", "not relayed: 1008 not allowed to publish")
    assert ms < 1000
    assert await tab.outcomes() == {"one": "refused", "two": "refused"}


async def test_messages_over_the_rate_limit_are_sent_again_and_relayed_once(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    async with relay.client(channel) as other:
        await tab.open(relay.ws_url(path_of(channel)))
        await tab.send(*number_texts(0, 15))
        assert await receive_many(other, 15) == number_texts(0, 15)
    assert {each["reason"] for each in await tab.events("close")} == {"rate limit"}
    await tab.wait_until("Object.keys(outcomes).length === 15")
    assert list((await tab.outcomes()).values()) == await tab.page.evaluate("positions")


async def test_messages_in_flight_to_a_draining_relay_are_uncertain_after_a_loss_of_the_log(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    """The relay may have relayed them: without its log a client can't find out."""
    relay, successor = relay_with(shutdown={"spread_s": 0}), relay_with()
    async with UpgradeProxy(relay.port) as proxy, relay.client(channel) as subscriber:
        await tab.open(proxy.url(path_of(channel)))
        proxy.lost_echo = b"relayed"
        await tab.send("relayed")
        assert await receive(subscriber) == "relayed"
        proxy.target = successor.port
        relay.signal(SIGTERM)
        await tab.wait_until("outcomes.relayed")
    assert await tab.outcomes() == {"relayed": "uncertain"}
    assert await tab.received() == []


async def test_relay_js_needs_no_event_target_and_no_text_decoder(
    relay: RelayProcess, channel: str
) -> None:
    """As in React Native."""
    async with serve_relay_js_page() as site, browser.open_page() as page:
        names = ("EventTarget", "Event", "MessageEvent", "TextDecoder")
        await page.add_init_script("".join(f"delete window.{name};" for name in names))
        tab = await load(page, site.origin)
        assert await page.evaluate("window.EventTarget") is None
        await tab.open(relay.ws_url(path_of(channel)))
        await tab.send("typed \U0001f600")
        async with relay.client(channel) as other:
            await other.send(b"\x00\xff")
            await tab.await_messages(["typed \U0001f600", [0, 255]])
        await tab.wait_until("outcomes['typed \U0001f600'] === positions[0]")
        assert len(await tab.events("open")) == 1


# Silent connections, sleep and wake


async def test_the_connection_to_a_frozen_relay_is_closed_within_25_s(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    async with open_tab_with_clock() as tab:
        page = tab.page
        await tab.open(relay.ws_url())
        relay.signal(SIGSTOP)
        try:
            await page.clock.run_for(19_000)
            assert await page.evaluate("relay.state") == "open"
            await page.clock.run_for(6_000)
            assert await page.evaluate("relay.state") != "open"
        finally:
            relay.signal(SIGCONT)
        (close,) = await tab.events("close")
        assert (close["code"], close["reason"]) == (1006, "connection unresponsive")
        await page.clock.resume()
        await tab.wait_until("relay.state === 'open'")


async def test_heartbeats_keep_an_idle_websocket_and_an_idle_stream(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 0.3})
    async with UpgradeProxy(relay.port) as open_proxy, UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url())
        await tab.open(open_proxy.url())
        upgrades = proxy.upgrades
        # Without heartbeats each would be replaced 4 s after the first one was due.
        await asyncio.sleep(5)
        assert (proxy.upgrades, open_proxy.upgrades) == (upgrades, 1)
        assert await tab.events("close") == []


async def test_a_dead_connection_is_replaced_after_a_sleep(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        UpgradeProxy(relay.port) as proxy,
        open_tab_with_clock() as tab,
    ):
        page = tab.page
        await tab.open(proxy.url(path_of(channel)))
        async with relay.client(channel) as other:
            proxy.stall()
            for number in number_texts(0, 5):
                await other.send(number)
            await receive_many(other, 5)
            await page.clock.pause_at(await page.evaluate("Date.now()") + 600_000)
            await page.clock.run_for(4200)  # longer than it waits for a message
            await tab.await_messages(number_texts(0, 5))
        assert len(await tab.events("open")) == 1, "the reconnection is invisible to the page"
        assert len(await tab.events("close")) == 0


async def test_a_live_connection_is_kept_after_a_sleep(relay: RelayProcess, channel: str) -> None:
    async with (
        UpgradeProxy(relay.port) as proxy,
        open_tab_with_clock() as tab,
    ):
        page = tab.page
        await tab.open(proxy.url(path_of(channel)))
        async with relay.client(channel) as other:
            await page.clock.pause_at(await page.evaluate("Date.now()") + 600_000)
            await other.send("0")
            await tab.await_messages(["0"])
            await page.clock.run_for(5000)
            assert proxy.upgrades == 1
            await page.evaluate("window.dispatchEvent(new Event('online'))")
            await page.clock.run_for(5000)
            await proxy.await_upgrades(2)  # the relay has sent nothing since the event
            await page.clock.resume()


async def test_a_frozen_page_disconnects_and_resumes_without_a_gap(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    await tab.open(relay.ws_url(path_of(channel)))
    async with relay.client(channel) as other:
        # A browser without a window never freezes a page by itself.
        await tab.page.evaluate("document.dispatchEvent(new Event('freeze'))")
        await relay.await_metric("websocket_connected_clients", 1)
        for number in number_texts(0, 100):
            await other.send(number)
        await receive_many(other, 100)
        await tab.page.evaluate("document.dispatchEvent(new Event('resume'))")
        await tab.await_messages(number_texts(0, 100))


TIME_FROM_ONLINE_TO_CONNECTING = """new Promise(resolve => {
    const start = performance.now();
    relay.addEventListener("state", () => {
        if (relay.state === "connecting") resolve(performance.now() - start);
    });
    window.dispatchEvent(new Event("online"));
})"""


async def test_relay_js_reconnects_at_once_when_the_network_returns(
    tab: RelayTab, relay: RelayProcess
) -> None:
    async with UpgradeProxy(None) as proxy:
        await tab.start(proxy.url())
        await tab.wait_until("events.some(({state, retryInMs}) => state && retryInMs > 2000)")
        proxy.target = relay.port
        waited_ms = await tab.page.evaluate(TIME_FROM_ONLINE_TO_CONNECTING)
        assert waited_ms < 2000
        await tab.wait_until("relay.state === 'open'")


async def test_an_invalid_url_is_rejected_and_an_http_url_connects(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    create = "url => { try { new Relay(url) } catch (error) { return error.name } }"
    for invalid in ("javascript:alert(1)", "data:text/plain,", "ftp://localhost/", "ws://"):
        assert await tab.page.evaluate(create, invalid) in {"TypeError", "SyntaxError"}, invalid
    await publish_all(relay, channel, *number_texts(0, 5))
    url = relay.http_url(f"{path_of(channel)}?history=2#part").replace("//", "//user:pass@")
    await tab.open(url)
    await tab.await_messages(number_texts(3, 5))


# Tokens


async def test_a_token_is_sent_and_is_part_of_no_url(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel)
    urls: list[str] = []
    tab.page.on("request", lambda request: urls.append(request.url))
    tab.page.on("websocket", lambda socket: urls.append(socket.url))
    await tab.open(jwt_relay.ws_url(path_of(channel)), token=token)
    await tab.send("0")
    await tab.await_messages(["0"])
    assert urls
    assert all(part not in url for url in urls for part in token.split("."))
    assert await tab.page.evaluate("sendError('1')") is None


async def test_an_expired_token_is_replaced_by_the_token_function(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    tokens = [channel_token(secret, channel, lasts_s=2), channel_token(secret, channel)]
    await tab.page.evaluate(
        "([url, tokens]) => start(url, {token: async () => tokens.shift()})",
        [jwt_relay.ws_url(path_of(channel)), tokens],
    )
    await tab.wait_until("events.filter(event => event.type === 'open').length === 2")
    assert [(each["code"], each["reason"]) for each in await tab.events("close")] == [
        (3000, "token expired")
    ]
    assert await tab.events("refused") == []


async def test_an_expired_token_without_a_replacement_ends_the_reconnections(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel, lasts_s=2)
    await tab.start(jwt_relay.ws_url(path_of(channel)), token=token)
    await tab.wait_until("events.some(event => event.type === 'refused')")
    assert await tab.events("refused") == [
        {"type": "refused", "status": 401, "reason": "token expired"}
    ]
    assert await tab.page.evaluate("relay.state") == "closed"
    # A new token and `open` reconnect.
    await tab.page.evaluate(
        "token => { relay.token = token; relay.open(); }", channel_token(secret, channel)
    )
    await tab.wait_until("relay.state === 'open'")


async def test_a_token_function_that_fails_is_called_again(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    await tab.page.evaluate(
        """([url, token]) => {
            const answers = [Promise.reject(new Error("not yet")), token];
            answers[0].catch(() => {});
            start(url, {token: () => answers.shift()});
        }""",
        [jwt_relay.ws_url(path_of(channel)), channel_token(secret, channel)],
    )
    await tab.wait_until("relay.state === 'open'")
    states = [(each["state"], each["reason"]) for each in await tab.events("state")]
    assert ("waiting", "the page has no token") in states


async def test_an_invalid_token_is_not_sent(tab: RelayTab, relay: RelayProcess) -> None:
    async with UpgradeProxy(relay.port) as proxy:
        await tab.start(proxy.url(), token="not a token")
        await tab.wait_until("events.some(event => event.type === 'refused')")
        assert proxy.upgrades == 0


# Refusals. A browser hides the reason of a failed upgrade: it is read from an event stream.


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [("", 401, "token required"), ("other", 403, "not authorized for this channel")],
)
async def test_a_permanent_refusal_is_reported_and_not_retried(
    tab: RelayTab,
    jwt_relay: RelayProcess,
    secret: str,
    channel: str,
    token: str,
    status: int,
    reason: str,
) -> None:
    async with UpgradeProxy(jwt_relay.port) as proxy:
        options = {"token": channel_token(secret, token)} if token else {}
        await tab.start(proxy.url(path_of(channel)), **options)
        await tab.wait_until("events.some(event => event.type === 'refused')")
        assert await tab.events("refused") == [
            {"type": "refused", "status": status, "reason": reason}
        ]
        assert proxy.upgrades == 1


async def test_a_refusal_by_a_limit_is_retried_after_its_delay(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client():
        await tab.start(relay.ws_url())
        await tab.wait_until("events.some(event => event.state === 'waiting')")
        (wait,) = [event for event in await tab.events("state") if event["state"] == "waiting"]
        assert wait["reason"] == "too many connections"
        assert wait["retryInMs"] >= 1000
    await tab.wait_until("relay.state === 'open'")


async def test_a_stream_is_used_if_websockets_are_blocked(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(relay.port) as proxy, relay.client(channel) as other:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(path_of(channel)))
        assert await tab.page.evaluate("relay.transport") == "stream"
        await other.send("two\nlines, ünder \U0001f600")
        await other.send(b"\x00\xff")
        await other.send("")
        await tab.await_messages(["two\nlines, ünder \U0001f600", [0, 255], ""])
        await tab.send("typed", "here")
        await tab.page.evaluate("relay.send(new Uint8Array([1, 2]))")
        await receive_many(other, 3)
        assert await receive_many(other, 3) == ["typed", "here", b"\x01\x02"]
        await tab.wait_until("Object.keys(outcomes).length === 2")
        assert list((await tab.outcomes()).values()) == (await tab.page.evaluate("positions"))[3:5]
        proxy.cut()
        await other.send("while it was disconnected")
        await tab.wait_until("received.length === 7")
        assert (await tab.received())[-1] == "while it was disconnected"


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_the_end_of_a_relay_causes_no_gap_and_no_duplicate_on_a_stream(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str, how: str
) -> None:
    async with UpgradeProxy(redis_replicas[0].port) as proxy:
        proxy.blocks_upgrades = True
        await receive_while_a_relay_ends(tab, proxy, redis_replicas, channel, how)
        assert len(await tab.events("gap")) == 0
        (close,) = await tab.events("close")
        assert close["code"] == (1001 if how == "stopped" else 1006)


async def test_a_stream_is_replaced_by_a_websocket_when_upgrades_succeed(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        UpgradeProxy(relay.port) as proxy,
        open_tab_with_clock() as tab,
    ):
        page = tab.page
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(path_of(channel)))
        async with relay.client(channel) as other:
            await other.send("0")
            await tab.await_messages(["0"])
            proxy.blocks_upgrades = False
            await page.clock.pause_at(await page.evaluate("Date.now()") + 61_000)
            await tab.wait_until("relay.transport === 'websocket'")
            await other.send("1")
            await tab.await_messages(["0", "1"])
            assert len(await tab.events("close")) == 0


async def test_a_message_on_a_stream_without_a_definite_answer_is_uncertain(
    tab: RelayTab, relay: RelayProcess
) -> None:
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url())
        proxy.post_status = b"504 Gateway Timeout"
        await tab.send("0")
        await tab.wait_until("outcomes[0]")
        assert await tab.outcomes() == {"0": "uncertain"}
        assert await tab.page.evaluate("relay.state") == "open"


async def test_a_refused_message_on_a_stream_is_rejected(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    async with UpgradeProxy(jwt_relay.port) as proxy:
        proxy.blocks_upgrades = True
        token = channel_token(secret, channel, may_publish=False)
        await tab.open(proxy.url(path_of(channel)), token=token)
        await tab.send("0")
        await tab.wait_until("outcomes[0] === 'refused'")
        assert await tab.page.evaluate("relay.state") == "open"


# Streams that the Relays of a page share


ADD_RELAY = """([url, options]) => {
    const added = Object.assign(new Relay(url, options), {received: [], gaps: 0});
    added.addEventListener("message", ({data}) => added.received.push(data));
    added.addEventListener("gap", () => { added.gaps += 1; });
    (window.relays ??= []).push(added);
}"""


async def add_stream(tab: RelayTab, url: str, **options: Any) -> None:
    """Create one more `Relay` on the page, and wait until all of them have a stream."""
    await tab.page.evaluate(ADD_RELAY, [url, options])
    await tab.wait_until("relays.every(({transport}) => transport === 'stream')")


async def await_each(tab: RelayTab, *messages: Sequence[str]) -> None:
    """Wait until each `Relay` of the page has as many messages; assert that they are these."""
    counts = [len(expected) for expected in messages]
    await tab.wait_until(
        "relays.every(({received}, at) => received.length >= argument[at])", counts
    )
    received = await tab.page.evaluate("relays.map(({received}) => received)")
    assert received == [list(expected) for expected in messages]


async def test_relays_of_a_page_share_a_stream_until_the_last_one_is_closed(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    """A browser opens six connections to a host: beside six streams a POST would wait."""
    relay = relay_with()
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        for _ in range(8):
            await tab.page.evaluate(ADD_RELAY, [proxy.url(), {}])
        await tab.wait_until("relays.every(({transport}) => transport === 'stream')")
        await relay.await_metric("websocket_connected_clients", 1)
        await tab.page.evaluate("Promise.all(relays.map((each, at) => each.send(String(at))))")
        await tab.wait_until("relays.every(({received}) => received.length === 8)")
        orders = await tab.page.evaluate("relays.map(({received}) => received)")
        assert sorted(orders[0]) == number_texts(0, 8)
        assert orders == [orders[0]] * 8
        await tab.page.evaluate("relays.slice(1).forEach(each => each.close())")
        await tab.page.evaluate("relays[0].send('8')")
        await tab.wait_until("relays[0].received.length === 9")
        assert await tab.page.evaluate("relays[1].received.length") == 8
        await tab.page.evaluate("relays[0].close()")
        await relay.await_metric("websocket_connected_clients", 0)


async def test_each_relay_of_a_shared_stream_receives_a_buffer_of_its_own(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(relay.port) as proxy, relay.client(channel) as other:
        proxy.blocks_upgrades = True
        for _ in range(2):
            await add_stream(tab, proxy.url(path_of(channel)))
        await tab.page.evaluate(
            "relays[0].addEventListener('message', ({data}) => new Uint8Array(data).fill(0))"
        )
        await other.send(b"\x01\x02")
        await tab.wait_until("relays[1].received.length")
        assert await tab.page.evaluate("[...new Uint8Array(relays[1].received[0])]") == [1, 2]


async def test_a_relay_that_joins_a_shared_stream_receives_the_replay_that_it_requests(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with()
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        url = proxy.url(path_of(channel))
        await add_stream(tab, url)
        await publish_all(relay, channel, *number_texts(0, 5))
        await await_each(tab, number_texts(0, 5))
        await publish_all(relay, "another", "the newest position is that of another channel")
        await add_stream(tab, url)
        await add_stream(tab, url, history=3)
        await await_each(tab, number_texts(0, 5), [], number_texts(2, 5))
        since = await tab.page.evaluate("relays[0].position")
        await publish_all(relay, channel, "5")
        await add_stream(tab, url, since=since)
        await add_stream(tab, url, history=1)
        await publish_all(relay, channel, "6")
        await await_each(
            tab, number_texts(0, 7), ["5", "6"], number_texts(2, 7), ["5", "6"], ["5", "6"]
        )
        await relay.await_metric("websocket_connected_clients", 1)
        assert await tab.page.evaluate("relays.every(({gaps}) => gaps === 0)")


async def test_only_a_relay_whose_replay_is_incomplete_reports_a_gap(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(history={"max_messages": 3})
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        url = proxy.url(path_of(channel))
        await add_stream(tab, url)
        since = await tab.page.evaluate("relays[0].position")
        await publish_all(relay, channel, *number_texts(0, 5))
        await await_each(tab, number_texts(0, 5))
        await add_stream(tab, url, since=since)
        await await_each(tab, number_texts(0, 5), number_texts(2, 5))
        assert await tab.page.evaluate("relays.map(({gaps}) => gaps)") == [0, 1]
        await relay.await_metric("websocket_connected_clients", 1)


async def test_relays_share_a_stream_again_after_it_broke_and_miss_nothing(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with()
    async with UpgradeProxy(relay.port) as proxy, relay.client(channel) as other:
        proxy.blocks_upgrades = True
        for _ in range(3):
            await add_stream(tab, proxy.url(path_of(channel)))
            await publish_all(relay, "another", "of another channel")
        await other.send("0")
        await await_each(tab, *[["0"]] * 3)
        proxy.cut()
        await other.send("1")
        await tab.wait_until("relays.every(({received}) => received.length === 2)")
        await other.send("2")
        await await_each(tab, *[number_texts(0, 3)] * 3)
        await relay.await_metric("websocket_connected_clients", 2)


async def test_relays_with_different_tokens_or_channels_share_no_stream(
    tab: RelayTab, relay_with: StartRelay, secret: str
) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": secret}})
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        tokens = [channel_token(secret, "*"), channel_token(secret, "*", may_publish=False)]
        for name, token in (("one", 0), ("one", 0), ("one", 1), ("two", 0), ("two", 0)):
            await add_stream(tab, proxy.url(path_of(name)), token=tokens[token])
        await relay.await_metric("websocket_connected_clients", 3)


async def test_a_relay_that_has_replaced_a_dead_shared_stream_does_not_join_it_again(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 300})  # no heartbeat is late on the page
    async with (
        UpgradeProxy(relay.port) as proxy,
        open_tab_with_clock() as tab,
        relay.client(channel) as other,
    ):
        page = tab.page
        proxy.blocks_upgrades = True
        for _ in range(3):
            await add_stream(tab, proxy.url(path_of(channel)))
            await publish_all(relay, "another", "of another channel")
        # The stream has the position of this one: its replay would include that of any other.
        await page.evaluate("relays.shift().close()")
        proxy.stall()
        for number in number_texts(0, 5):
            await other.send(number)
        await receive_many(other, 5)
        await page.clock.pause_at(await page.evaluate("Date.now()") / 1000 + 5)
        # The first one waits 3 s for a message, the second one 4 s.
        await page.evaluate(
            "const random = [0, 1]; Math.random = () => random.shift() ?? 0;"
            "window.dispatchEvent(new Event('online'))"
        )
        await page.clock.run_for(3000)
        await tab.wait_until("relays[0].state === 'waiting'")
        await page.clock.run_for(900)
        await await_each(tab, number_texts(0, 5), [])
        await page.clock.run_for(100)
        await tab.wait_until("relays[1].state === 'waiting'")
        await page.clock.run_for(1000)
        await await_each(tab, *[number_texts(0, 5)] * 2)


async def test_a_stalled_shared_stream_causes_no_duplicate_of_a_drained_message(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    """The replay shows that the message was relayed; the stalled stream would not."""
    one, two = redis_replicas
    url = path_of(channel)
    async with UpgradeProxy(two.port) as proxy, two.client(channel) as subscriber:
        proxy.blocks_upgrades = True
        await add_stream(tab, proxy.url(url))
        proxy.stall()
        proxy.blocks_upgrades = False
        proxy.target = one.port
        await tab.open(proxy.url(url))
        await tab.send("received")
        await tab.await_messages(["received"])
        proxy.lost_echo = b"relayed"
        await tab.send("relayed")
        assert await receive_many(subscriber, 2) == ["received", "relayed"]
        proxy.target = two.port
        proxy.blocks_upgrades = True
        one.signal(SIGTERM)
        await tab.wait_until("events.some(event => event.type === 'close')")
        proxy.lost_echo = b""
        await tab.send("last")
        assert await receive(subscriber) == "last"
        await tab.await_messages(["received", "relayed", "last"])
        await tab.wait_until("outcomes.relayed === positions[1]")


async def test_a_timeout_beside_six_streams_of_the_page_names_them(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 300})  # no heartbeat is late on the page
    async with (
        UpgradeProxy(relay.port) as proxy,
        open_tab_with_clock() as tab,
    ):
        page = tab.page
        proxy.blocks_upgrades = True
        for number in range(6):
            await add_stream(tab, proxy.url(path_of(f"{channel}-{number}")))
        async with page.expect_request(f"**{path_of(channel)}/events"):
            await tab.start(proxy.url(path_of(channel)))
        await page.clock.run_for(10_000)
        await tab.wait_until("relay.state === 'waiting'")
        (wait,) = [event for event in await tab.events("state") if event["state"] == "waiting"]
        assert wait["reason"] == "connect timeout: the page has 6 event streams open"


# The types


COMPARISON = """
import * as actual from "./actual/relay.js";
import * as declared from "./declared/relay.js";
type Same<A, B> = [A] extends [B] ? ([B] extends [A] ? true : false) : false;
export const names: [
  Same<keyof typeof actual, keyof typeof declared>,
  Same<keyof actual.Relay, keyof declared.Relay>,
  Same<keyof actual.RelayError, keyof declared.RelayError>,
] = [true, true, true];
export const checked: typeof declared = actual;
"""


def test_the_types_match_the_module(tmp_path: Path) -> None:
    script, types = tmp_path / "actual" / "relay.js", tmp_path / "declared" / "relay.d.ts"
    for file in (script, types):
        file.parent.mkdir()
    script.write_text(RELAY_JS.read_text().replace('"./relay.js"', '"../declared/relay.js"'))
    types.write_text(RELAY_JS.with_suffix(".d.ts").read_text())
    (tmp_path / "same.ts").write_text(COMPARISON)
    options = "--noEmit --strict --allowJs --checkJs --target es2022 --module nodenext"
    libraries = "--skipDefaultLibCheck --lib es2022,dom,dom.iterable"  # those of TypeScript itself
    done = subprocess.run(
        [needed(TYPESCRIPT), *options.split(), *libraries.split(), "same.ts"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
