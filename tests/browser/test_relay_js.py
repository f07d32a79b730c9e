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
from tests.support.hook_backend import ANN, HookBackend, hook_settings
from tests.support.issuer import channel_token
from tests.support.programs import TYPESCRIPT, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_js_page import RELAY_JS, serve_relay_js_page
from tests.support.relay_process import (
    RelayProcess,
    StartRelay,
    path_of,
    receive,
    receive_many,
)
from tests.support.relay_v1 import RELAY_V1, number_texts, open_relay_v1, publish_all
from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

pytestmark = browser.SHARED

ANSWER = (
    b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n"
    b"Access-Control-Allow-Origin: *\r\n\r\n"
)


class UpgradeProxy(TcpProxy):
    """A proxy between a page and a relay that counts upgrades and can refuse requests.

    Attributes:
        blocks_upgrades: whether upgrades are refused, as by a proxy without WebSockets.
        loses_post_answers: whether the answers to POSTs are lost, and their connections stay open.
        post_status: the status with which POSTs are answered once the relay has answered; empty:
            the relay's answer is passed on.
        streams: the number of requests for an event stream.
        upgrades: the number of requests for an upgrade.
    """

    def __init__(self, target: int | None) -> None:
        super().__init__(target)
        self.blocks_upgrades = False
        self.loses_post_answers = False
        self.post_status = b""
        self.streams = 0
        self.upgrades = 0
        self._posts = set[ProxiedConnection]()

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        self.streams += data.startswith(b"GET ") and b"/events" in data.split(b"\r\n", 1)[0]
        if data.startswith(b"POST "):
            self._posts.add(connection)
            connection.loses_server_bytes = self.loses_post_answers
        if b"upgrade: websocket" not in data.lower():
            return data
        self.upgrades += 1
        if not self.blocks_upgrades:
            return data
        connection.client.write(ANSWER % b"403 Forbidden")
        return None

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        if not self.post_status or connection not in self._posts:
            return data
        connection.client.write(ANSWER % self.post_status)
        return None


@dataclass
class RelayTab:
    """A page with relay.js: see relay_js_page.py."""

    page: Page

    async def start(self, url: str, channel: str | None, **options: Any) -> None:
        """Create a `Relay` on the page, and do not wait for its connection."""
        await self.page.evaluate(
            "([url, channel, options]) => start(url, channel, options)", [url, channel, options]
        )

    async def open(self, url: str, channel: str, **options: Any) -> None:
        """Create a `Relay` on the page, and wait until it is subscribed to a channel."""
        await self.start(url, channel, **options)
        await self.wait_until("relay.state === 'open' && channel.position !== null")

    async def wait_until(self, condition: str, argument: object = None) -> None:
        """Wait until an expression of JavaScript is true."""
        await self.page.wait_for_function(
            f"argument => {condition}", arg=argument, timeout=PATIENCE_S * 1000, polling=20
        )

    async def await_state(self, state: str) -> None:
        """Wait until the connection has had a state."""
        await self.wait_until("relay.events.some(({state}) => state === argument)", state)

    async def await_messages(self, messages: Sequence[object], channel: str = "channel") -> None:
        """Wait for as many messages; assert that they are these, in this order."""
        await self.wait_until(f"{channel}.received.length >= argument", len(messages))
        assert await self.page.evaluate(f"{channel}.received") == list(messages)

    async def events(self, kind: str, target: str = "relay") -> list[dict[str, Any]]:
        """Return the events of a kind, without empty members."""
        events = await self.page.evaluate(f"{target}.events")
        return [
            {key: value for key, value in event.items() if value is not None}
            for event in events
            if event["type"] == kind
        ]

    async def states(self, state: str) -> list[dict[str, Any]]:
        """Return the events by which the connection entered a state."""
        return [event for event in await self.events("state") if event["state"] == state]

    async def publish(self, *messages: str) -> None:
        await self.page.evaluate("texts => texts.forEach(text => publish(text))", messages)

    async def outcomes(self, count: int) -> dict[str, str]:
        """Wait for the outcomes of as many texts; return them: positions, or codes of errors."""
        await self.wait_until("areSettled(argument)", count)
        return dict(await self.page.evaluate("outcomes"))

    async def assert_published_once(self, count: int) -> None:
        """Assert that each text was published at the position at which it was received."""
        outcomes = await self.outcomes(count)
        assert list(outcomes) == await self.page.evaluate("channel.received")
        assert list(outcomes.values()) == await self.page.evaluate("channel.positions")


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


async def test_relay_js_publishes_and_receives_text_and_binary(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    await tab.open(relay.ws_url(), channel)
    async with relay.client(channel) as other:
        await tab.publish("typed\nhere, ünder \U0001f600")
        assert await receive(other) == "typed\nhere, ünder \U0001f600"
        await other.send(b"\x00\n\xff")
        await other.send("")
        await tab.await_messages(["typed\nhere, ünder \U0001f600", [0, 10, 255], ""])
        await tab.page.evaluate("channel.publish(new Uint8Array([9, 10, 11, 12]).subarray(1, 3))")
        assert await receive_many(other, 3) == [b"\x00\n\xff", "", b"\x0a\x0b"]
    assert await tab.page.evaluate("[relay.transport, channel.name]") == ["websocket", channel]
    assert [each["state"] for each in await tab.events("state")] == ["connecting", "open"]


async def test_publish_resolves_to_the_position_of_the_message(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    await tab.open(relay.ws_url(), channel)
    await tab.publish("one", " ", "one more")
    await tab.assert_published_once(3)
    await tab.page.evaluate(
        "channel.publish(new Uint8Array(3)).then(at => { outcomes.bytes = at })"
    )
    await tab.wait_until("outcomes.bytes === channel.position && outcomes.bytes")


async def test_a_message_is_published_without_a_subscription(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    await tab.start(relay.ws_url(), None)
    assert await tab.page.evaluate("relay.state") == "idle"
    async with relay.client(channel) as other:
        await tab.page.evaluate("name => publish('typed', name)", channel)
        assert await receive(other) == "typed"
    assert "-" in (await tab.outcomes(1))["typed"]


async def test_two_tabs_exchange_messages(relay: RelayProcess, channel: str) -> None:
    async with serve_relay_js_page() as site, browser.open_page() as page:
        one = await load(page, site.origin)
        async with page.expect_popup() as opening:
            await page.evaluate("origin => void open(origin)", site.origin)
        other = await load(await opening.value, site.origin)
        for tab in (one, other):
            await tab.open(relay.ws_url(), channel)
        await one.publish("from one")
        await other.wait_until("channel.received.length === 1")
        await other.publish("from the other")
        for tab in (one, other):
            await tab.await_messages(["from one", "from the other"])


async def test_history_is_delivered_first_and_only_once(relay: RelayProcess, channel: str) -> None:
    async with UpgradeProxy(relay.port) as proxy, open_tab() as tab:
        await publish_all(relay, channel, *number_texts(0, 10))
        await tab.open(proxy.url(), channel, history=3)
        await tab.await_messages(number_texts(7, 10))
        proxy.cut()
        await tab.await_state("waiting")
        await publish_all(relay, channel, "10")
        await tab.await_messages(number_texts(7, 11))
        assert [each["recovered"] for each in await tab.events("subscribed", "channel")] == [
            True,
            True,
        ]


async def test_a_later_visit_resumes_at_the_position_of_the_earlier_one(
    relay: RelayProcess, channel: str
) -> None:
    async with open_tab() as tab:
        await tab.open(relay.ws_url(), channel)
        await publish_all(relay, channel, "0")
        await tab.await_messages(["0"])
        since = await tab.page.evaluate("channel.position")
    await publish_all(relay, channel, "1")
    async with open_tab() as tab:
        await tab.open(relay.ws_url(), channel, since=since)
        await tab.await_messages(["1"])
        await tab.page.evaluate("relay.close()")
        await tab.publish("closed")
        assert await tab.outcomes(1) == {"closed": "closed"}
        await publish_all(relay, channel, "2")
        await tab.page.evaluate("relay.open()")
        await tab.await_messages(["1", "2"])


async def test_an_invalid_url_or_channel_is_rejected_and_an_http_url_connects(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    join = "([url, name]) => { try { new Relay(url).channel(name) } catch (e) { return e.name } }"
    for url in ("javascript:alert(1)", "data:text/plain,", "ftp://localhost/", "ws://"):
        assert await tab.page.evaluate(join, [url, channel]) == "TypeError", url
    for name in ("", "a b", "ü", "x" * 129, "../x"):
        assert await tab.page.evaluate(join, [relay.ws_url(), name]) == "TypeError", name
    await publish_all(relay, channel, *number_texts(0, 5))
    url = relay.http_url("/#part").replace("//", "//user:pass@", 1)
    await tab.open(url, channel, history=2)
    await tab.await_messages(number_texts(3, 5))


# Presence

PRESENCE = {"channels": ["team.*"], "grace_s": 0.3}
TEAM = "team.1"
MEMBERS = "channel.members && [...channel.members.keys()].sort().join()"
IS_MEMBER = f"({MEMBERS}) === argument && channel.count === channel.members.size"


async def await_members(tab: RelayTab, *clients: str) -> None:
    """Wait until the channel has these members besides the page."""
    own = await tab.page.evaluate("window.own ??= [...channel.members.keys()][0]")
    await tab.wait_until(IS_MEMBER, ",".join(sorted([own, *clients])))


async def changes(tab: RelayTab, target: str = "channel") -> list[tuple[str, str]]:
    """Return which clients have joined and left, in the order of the events."""
    events = await tab.page.evaluate(f"{target}.events")
    found = [each for each in events if each["type"] in ("joined", "left")]
    return [(each["type"], each["client"]) for each in found]


@pytest.mark.parametrize("blocks_upgrades", [False, True])
async def test_a_channel_with_presence_has_its_members_and_what_changes(
    tab: RelayTab, relay_with: StartRelay, blocks_upgrades: bool
) -> None:
    relay = relay_with(presence=PRESENCE)
    async with UpgradeProxy(relay.port) as proxy, open_relay_v1(relay) as other:
        name = other.welcome["client"]
        proxy.blocks_upgrades = blocks_upgrades
        await tab.open(proxy.url(), TEAM, presence=True)
        await tab.wait_until("channel.count === 1 && channel.members.size === 1")
        await await_members(tab)
        await other.subscribe(TEAM)
        await await_members(tab, name)
        await other.publish("here", channel=TEAM)
        await tab.await_messages(["here"])
        await other.send("unsubscribe", channel=TEAM)
        await await_members(tab)
        assert await changes(tab) == [("joined", name), ("left", name)]
        (listed,) = await tab.events("presence", "channel")
        assert (listed["count"], len(listed["clients"])) == (1, 1)
        expected = "stream" if blocks_upgrades else "websocket"
        assert await tab.page.evaluate("relay.transport") == expected


@pytest.mark.parametrize("blocks_upgrades", [False, True])
async def test_after_a_reconnection_the_new_list_replaces_the_old_one(
    tab: RelayTab, relay_with: StartRelay, blocks_upgrades: bool
) -> None:
    relay = relay_with(presence={**PRESENCE, "grace_s": 60})
    async with (
        UpgradeProxy(relay.port) as proxy,
        open_relay_v1(relay) as first,
        open_relay_v1(relay) as second,
    ):
        proxy.blocks_upgrades = blocks_upgrades
        await first.subscribe(TEAM)
        await tab.open(proxy.url(), TEAM, presence=True)
        await tab.wait_until("channel.count === 2")
        target, proxy.target = proxy.target, None
        proxy.cut()
        await tab.await_state("waiting")
        await first.send("unsubscribe", channel=TEAM)
        await first.next_notice("unsubscribed")
        await second.subscribe(TEAM)
        proxy.target = target
        await tab.wait_until("channel.events.filter(({type}) => type === 'presence').length === 2")
        found = await changes(tab)
        assert ("left", first.welcome["client"]) in found
        assert ("joined", second.welcome["client"]) in found
        # A session keeps the id of the client; each stream is another client.
        assert len(found) == (4 if blocks_upgrades else 2)
        assert await tab.page.evaluate("[channel.count, channel.members.size]") == [2, 2]


async def test_a_later_member_of_a_channel_has_the_list_without_another_join(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(presence=PRESENCE)
    async with open_relay_v1(relay) as other:
        await tab.open(relay.ws_url(), TEAM, presence=True)
        await tab.wait_until("channel.count === 1")
        await tab.page.evaluate("name => { window.plain = join(name) }", TEAM)
        await tab.page.evaluate("name => { window.second = join(name, {presence: true}) }", TEAM)
        await tab.wait_until("second.count === 1 && second.members !== channel.members")
        await other.subscribe(TEAM)
        await tab.wait_until("second.count === 2 && channel.count === 2")
        joined = [("joined", other.welcome["client"])]
        assert [await changes(tab, each) for each in ("channel", "second")] == [joined, joined]
        assert await changes(tab, "plain") == []
        assert await tab.events("presence", "plain") == []


async def test_a_later_member_with_other_options_is_no_leave_and_no_join_of_the_page(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(presence=PRESENCE)
    async with open_relay_v1(relay) as other:
        await tab.open(relay.ws_url(), TEAM)
        await other.send("subscribe", channel=TEAM, presence=True)
        await other.next_notice("subscribed")
        await other.next_notice("presence")
        await tab.publish("0")
        assert (await other.receive())[1] == "0"
        await tab.page.evaluate("name => { window.second = join(name, {history: 1}) }", TEAM)
        await tab.await_messages(["0"], "second")
        await tab.page.evaluate("name => { window.third = join(name, {presence: true}) }", TEAM)
        await tab.wait_until("third.count === 2")
        await tab.publish("1")
        assert (await other.receive())[1] == "1"


async def test_of_a_full_channel_only_the_count_is_known(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(presence={**PRESENCE, "max_clients": 1})
    await tab.open(relay.ws_url(), TEAM, presence=True)
    await tab.wait_until("channel.members?.size === 1")
    async with relay.client(TEAM):
        await tab.wait_until("channel.members === null && channel.count === 2")
    await tab.wait_until("channel.members?.size === 1 && channel.count === 1")
    assert await changes(tab) == []


@pytest.mark.parametrize("blocks_upgrades", [False, True])
async def test_a_channel_without_presence_refuses_a_member_that_requests_it(
    tab: RelayTab, relay_with: StartRelay, blocks_upgrades: bool
) -> None:
    relay = relay_with(presence=PRESENCE)
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = blocks_upgrades
        await tab.start(proxy.url(), "lobby", presence=True)
        await tab.page.evaluate("window.other = join('hall')")
        await tab.wait_until("other.position !== null && channel.events.length")
        assert await tab.events("refused", "channel") == [
            {"type": "refused", "status": 404, "reason": "no presence in this channel"}
        ]


@pytest.mark.parametrize("blocks_upgrades", [False, True])
async def test_a_page_joins_a_refused_channel_again_as_soon_as_it_is_refused(
    tab: RelayTab, relay_with: StartRelay, blocks_upgrades: bool
) -> None:
    relay = relay_with(presence=PRESENCE)
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = blocks_upgrades
        await tab.start(proxy.url(), "lobby", presence=True)
        await tab.page.evaluate(
            "channel.addEventListener('refused', () => { window.again = join('lobby'); })"
        )
        await tab.wait_until("window.again?.position")
        await publish_all(relay, "lobby", "there")
        await tab.await_messages(["there"], "again")
        assert await tab.events("refused", "relay") == []


# Many channels on one connection


async def test_all_channels_of_a_page_share_one_connection(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with()
    for name in ("one", "two", "three"):
        await publish_all(relay, name, f"{name} 0", f"{name} 1")
    await tab.open(relay.ws_url(), "one", history=1)
    await tab.page.evaluate("window.two = join('two', {history: 2}); window.three = join('three')")
    await tab.wait_until("two.position && three.position")
    await relay.await_metric("websocket_connected_clients", 1)
    for name in ("one", "two", "three"):
        await publish_all(relay, name, f"{name} 2")
    await tab.await_messages(["one 1", "one 2"])
    await tab.await_messages(["two 0", "two 1", "two 2"], "two")
    await tab.await_messages(["three 2"], "three")


@pytest.mark.parametrize("blocks_upgrades", [False, True])
async def test_each_member_of_a_channel_has_its_own_history_and_leaves_alone(
    tab: RelayTab, relay_with: StartRelay, channel: str, blocks_upgrades: bool
) -> None:
    """As the components of a page, which are mounted one after another."""
    relay = relay_with()
    await publish_all(relay, channel, *number_texts(0, 5))
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = blocks_upgrades
        await tab.open(proxy.url(), channel, history=1)
        await tab.await_messages(["4"])
        await tab.page.evaluate(
            "name => { window.second = join(name); window.third = join(name, {history: 3}); }",
            channel,
        )
        await tab.await_messages(["2", "3", "4"], "third")
        await publish_all(relay, channel, "5")
        await tab.await_messages(["4", "5"])
        await tab.await_messages(["5"], "second")
        await tab.await_messages(["2", "3", "4", "5"], "third")
        await tab.page.evaluate("channel.leave(); channel.leave()")
        await publish_all(relay, channel, "6")
        await tab.await_messages(["5", "6"], "second")
        await tab.await_messages(["2", "3", "4", "5", "6"], "third")
        assert await tab.page.evaluate("channel.received") == ["4", "5"]
        await relay.await_metric("websocket_connected_clients", 1)


async def test_each_member_of_a_channel_receives_a_buffer_of_its_own(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    await tab.open(relay.ws_url(), channel)
    await tab.page.evaluate("name => { window.second = join(name); }", channel)
    await tab.page.evaluate(
        "channel.addEventListener('message', ({data}) => new Uint8Array(data).fill(0))"
    )
    await publish_all(relay, channel, b"\x01\x02")
    await tab.await_messages([[1, 2]], "second")


async def test_a_channel_is_left_and_joined_again(tab: RelayTab, relay_with: StartRelay) -> None:
    relay = relay_with()
    await tab.open(relay.ws_url(), "one")
    await publish_all(relay, "one", "0")
    await tab.await_messages(["0"])
    await tab.page.evaluate("channel.leave(); window.channel = join('one', {history: 1})")
    await tab.await_messages(["0"])
    await publish_all(relay, "one", "1")
    await tab.await_messages(["0", "1"])
    await relay.await_metric("websocket_connections_total", 3)  # of the page, and of two publishers
    await tab.page.evaluate("channel.leave()")
    await tab.await_state("idle")
    await relay.await_metric("websocket_connected_clients", 0)
    await tab.page.evaluate("window.channel = join('one', {history: 1})")
    await tab.await_messages(["1"])
    assert await tab.events("refused") == []


async def test_a_refused_channel_does_not_affect_the_others(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str
) -> None:
    token = channel_token(secret, "one")
    async with UpgradeProxy(jwt_relay.port) as proxy:
        await tab.open(proxy.url(), "one", token=token)
        await tab.page.evaluate("window.two = join('two')")
        await tab.wait_until("two.events.length")
        assert await tab.events("refused", "two") == [
            {"type": "refused", "status": 403, "reason": "not authorized for this channel"}
        ]
        await tab.page.evaluate("publish('of one'); publish('of two', 'two')")
        assert (await tab.outcomes(2))["of two"] == "refused"
        await tab.await_messages(["of one"])
        assert (proxy.upgrades, await tab.events("refused")) == (1, [])


async def test_a_channel_above_the_limit_of_the_connection_is_refused(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(limits={"max_channels_per_connection": 1})
    await tab.open(relay.ws_url(), "one")
    await tab.page.evaluate("window.two = join('two')")
    await tab.wait_until("two.events.length")
    (refusal,) = await tab.events("refused", "two")
    assert refusal["status"] == 400
    await tab.publish("0")
    await tab.await_messages(["0"])


async def test_a_channel_for_which_the_relay_has_no_capacity_is_subscribed_later(
    tab: RelayTab, relay_with: StartRelay
) -> None:
    relay = relay_with(channels={"max_channels": 1})
    await tab.open(relay.ws_url(), "one")
    await tab.page.evaluate("window.two = join('two')")
    await relay.await_metric_at_least("websocket_refusals_total", 1, reason="channels")
    assert await tab.page.evaluate("two.events") == []
    await tab.page.evaluate("channel.leave()")
    await tab.wait_until("two.position !== null")
    assert len(await tab.states("open")) == 1


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
        await tab.open(proxy.url(), channel)
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
    assert await tab.events("gap", "channel") == []
    assert all(each["recovered"] for each in await tab.events("subscribed", "channel"))


@pytest.mark.parametrize("how", ["stopped", "killed", "cut off"])
async def test_the_end_of_a_relay_or_connection_causes_no_gap_and_no_duplicate(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str, how: str
) -> None:
    async with UpgradeProxy(redis_replicas[0].port) as proxy:
        await receive_while_a_relay_ends(tab, proxy, redis_replicas, channel, how)
        assert len(await tab.states("waiting")) == 1


PUBLISH_IN_BURSTS = """count => {
    let number = 0;
    const timer = setInterval(() => {
        for (let burst = 0; burst < 4; burst++) publish(String(number++));
        if (number >= count) clearInterval(timer);
    }, 2);
}"""


@pytest.mark.parametrize("how", ["stopped", "killed", "cut off"])
@pytest.mark.parametrize(("transport", "count"), [("websocket", 400), ("stream", 100)])
async def test_messages_published_while_a_relay_ends_are_published_once_and_in_order(
    tab: RelayTab,
    redis_replicas: tuple[RelayProcess, RelayProcess],
    channel: str,
    transport: str,
    count: int,
    how: str,
) -> None:
    one, two = redis_replicas
    async with UpgradeProxy(one.port) as proxy, two.client(channel, max_queue=None) as subscriber:
        proxy.blocks_upgrades = transport == "stream"
        await tab.open(proxy.url(), channel)
        await tab.page.evaluate(PUBLISH_IN_BURSTS, count)
        await tab.wait_until("channel.received.length > 20")
        proxy.target = two.port
        if how == "cut off":
            proxy.cut()
        else:
            one.signal(SIGTERM if how == "stopped" else SIGKILL)
        await tab.assert_published_once(count)
        assert await receive_many(subscriber, count) == number_texts(0, count)


async def test_a_message_whose_acknowledgement_is_lost_is_published_once(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    one, two = redis_replicas
    async with UpgradeProxy(one.port) as proxy, two.client(channel) as subscriber:
        await tab.open(proxy.url(), channel)
        proxy.lose_server_bytes()
        await tab.publish("relayed by one")
        assert await receive(subscriber) == "relayed by one"
        proxy.target = two.port
        one.signal(SIGKILL)
        await tab.publish("sent to two")
        await tab.assert_published_once(2)
        assert await receive(subscriber) == "sent to two"
        await two.await_metric("websocket_publish_repeats_total", 1)


async def test_a_message_that_did_not_arrive_at_a_killed_relay_is_sent_again(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str
) -> None:
    one, two = redis_replicas
    async with UpgradeProxy(one.port) as proxy, two.client(channel) as subscriber:
        await tab.open(proxy.url(), channel)
        proxy.lose_client_bytes()
        await tab.publish(*number_texts(0, 10))
        proxy.target = two.port
        one.signal(SIGKILL)
        await tab.await_state("waiting")
        await tab.publish(*number_texts(10, 20))
        assert await receive_many(subscriber, 20) == number_texts(0, 20)
        await tab.assert_published_once(20)


async def test_a_message_of_a_session_that_the_relay_does_not_know_is_unconfirmed(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay, successor = relay_with(), relay_with()
    async with UpgradeProxy(relay.port) as proxy, relay.client(channel) as subscriber:
        await tab.open(proxy.url(), channel)
        proxy.lose_server_bytes()
        await tab.publish("in flight")
        assert await receive(subscriber) == "in flight"
        proxy.target = successor.port
        relay.signal(SIGKILL)
        await tab.await_state("waiting")
        await tab.publish("queued")
        outcomes = await tab.outcomes(2)
        assert outcomes["in flight"] == "unconfirmed"
        await tab.await_messages(["queued"])
        assert await tab.page.evaluate("channel.positions") == [outcomes["queued"]]
        assert len(await tab.events("gap", "channel")) == 1


async def test_relay_js_reconnects_after_the_delay_in_the_close_reason(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    await tab.open(relay.ws_url(), channel)
    await relay.stop()
    await tab.await_state("waiting")
    wait = (await tab.states("waiting"))[0]
    assert wait["code"] == 1001
    assert wait["reason"] == f"draining; retry_ms={wait['retryInMs']}"


async def test_a_gap_event_reports_messages_that_the_relay_has_lost(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    async with UpgradeProxy(relay.port) as proxy:
        await tab.open(proxy.url(), channel)
        await tab.publish("before")
        await tab.await_messages(["before"])
        relay.signal(SIGKILL)
        proxy.target = relay_with().port
        await tab.wait_until("channel.events.some(({type}) => type === 'gap')")
        await tab.publish("after")
        await tab.await_messages(["before", "after"])
        assert (await tab.events("subscribed", "channel"))[-1]["recovered"] is False


async def test_the_delay_before_reconnections_grows(tab: RelayTab, channel: str) -> None:
    async with UpgradeProxy(None) as proxy:
        await tab.start(proxy.url(), channel)
        await tab.wait_until("relay.events.filter(({state}) => state === 'waiting').length >= 3")
    for most_ms, wait in zip((500, 1000, 2000), await tab.states("waiting"), strict=False):
        assert most_ms / 2 <= wait["retryInMs"] <= most_ms


async def test_positions_of_64_bits_are_compared_exactly(tab: RelayTab, channel: str) -> None:
    """Duplicates are skipped and a gap is reported. Doubles could not hold these positions."""
    large = 2**63

    async def send_positions(connection: ServerConnection) -> None:
        async def send(fields: str, offset: int, index: int = 0, payload: str = "") -> None:
            position = f'"position":"{large}-{large + offset}-{index}"'
            await connection.send(f"{{{fields},{position}}}\n{payload}")

        name = f'"channel":"{channel}"'
        await send('"type":"welcome","session":"one","resumed":false,"heartbeat_ms":20000', 0)
        await connection.recv()
        await send(f'"type":"subscribed","id":1,"recovered":true,{name}', 0)
        for offset in (0, 1, 1, 2, 0):
            await send(name, offset, payload=str(offset))
        await send(f'"type":"gap",{name}', 1, 1)
        await send(f'"type":"gap",{name}', 2, 1)
        await send(name, 2, 1, "at the gap")
        await send(name, 2, 2, "last")
        await connection.wait_closed()

    async with serve(send_positions, "127.0.0.1", 0, subprotocols=[RELAY_V1]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        await tab.start(f"ws://127.0.0.1:{port}/", channel)
        await tab.wait_until("channel.received.includes('last')")
        assert await tab.page.evaluate("channel.received") == ["1", "2", "last"]
        assert len(await tab.events("gap", "channel")) == 1
        await tab.page.evaluate("relay.close()")


# Limits


async def test_messages_published_without_a_relay_are_queued_up_to_a_bound(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(None) as proxy, relay.client(channel) as other:
        await tab.start(proxy.url(), channel, maxQueuedMessages=3, maxPendingBytes=1000)
        await tab.publish("x" * 1000)
        assert set((await tab.outcomes(1)).values()) == {"full"}
        await tab.publish(*number_texts(0, 3), "too many")
        await tab.wait_until("outcomes['too many'] === 'full'")
        assert await tab.page.evaluate("relay.queued") == 3
        proxy.target = relay.port
        assert await receive_many(other, 3) == number_texts(0, 3)
        await tab.publish("3")
        assert await receive(other) == "3"
        await tab.await_messages(number_texts(0, 4))


async def test_close_rejects_queued_messages(tab: RelayTab, channel: str) -> None:
    async with UpgradeProxy(None) as proxy:
        await tab.start(proxy.url(), channel)
        await tab.publish("0")
        await tab.page.evaluate("relay.close()")
        assert await tab.outcomes(1) == {"0": "closed"}
        assert await tab.page.evaluate("relay.state") == "closed"


@pytest.mark.parametrize("size", [1001, 100_000])
async def test_a_message_that_is_too_big_is_refused_and_the_next_ones_are_published(
    tab: RelayTab, relay_with: StartRelay, channel: str, size: int
) -> None:
    """The relay answers the smaller one, and closes the connection of the larger one."""
    relay = relay_with(limits={"max_message_bytes": 1000})
    await tab.open(relay.ws_url(), channel)
    refused = "x" * size
    await tab.publish("one", refused, "two", "three")
    outcomes = await tab.outcomes(4)
    assert outcomes.pop(refused) == "refused"
    await tab.await_messages(["one", "two", "three"])
    assert list(outcomes.values()) == await tab.page.evaluate("channel.positions")


async def test_messages_without_the_permission_to_publish_are_refused(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel, may_publish=False)
    await tab.open(jwt_relay.ws_url(), channel, token=token)
    await tab.publish("one", "two")
    assert await tab.outcomes(2) == {"one": "refused", "two": "refused"}
    assert await tab.page.evaluate("relay.state") == "open"


async def test_messages_over_the_rate_limit_are_sent_again_and_published_once(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 5})
    async with relay.client(channel) as other:
        await tab.open(relay.ws_url(), channel)
        await tab.publish(*number_texts(0, 15))
        assert await receive_many(other, 15) == number_texts(0, 15)
    assert {each["reason"] for each in await tab.states("waiting")} == {"rate limit"}
    await tab.assert_published_once(15)


async def test_relay_js_needs_no_message_event_and_no_text_decoder(
    relay: RelayProcess, channel: str
) -> None:
    """As in React Native with polyfills for EventTarget and URL."""
    async with serve_relay_js_page() as site, browser.open_page() as page:
        names = ("MessageEvent", "TextDecoder")
        await page.add_init_script("".join(f"delete window.{name};" for name in names))
        tab = await load(page, site.origin)
        assert await page.evaluate("window.TextDecoder") is None
        await tab.open(relay.ws_url(), channel)
        await tab.publish("typed \U0001f600")
        await tab.await_messages(["typed \U0001f600"])
        await publish_all(relay, channel, b"\x00\xff")
        await tab.await_messages(["typed \U0001f600", [0, 255]])
        await tab.wait_until("outcomes['typed \U0001f600'] === channel.positions[0]")


# Silent connections, sleep and wake


async def test_the_connection_to_a_frozen_relay_is_closed_within_25_s(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with()
    async with open_tab_with_clock() as tab:
        page = tab.page
        await tab.open(relay.ws_url(), channel)
        relay.signal(SIGSTOP)
        try:
            await page.clock.run_for(19_000)
            assert await page.evaluate("relay.state") == "open"
            await page.clock.run_for(6_000)
            assert await page.evaluate("relay.state") != "open"
        finally:
            relay.signal(SIGCONT)
        wait = (await tab.states("waiting"))[0]
        assert (wait["code"], wait["reason"]) == (1006, "connection unresponsive")
        await page.clock.resume()
        await tab.wait_until("relay.state === 'open'")


async def test_heartbeats_keep_an_idle_websocket_and_an_idle_stream(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 0.3})
    async with UpgradeProxy(relay.port) as open_proxy, UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), channel)
        await tab.page.evaluate("window.stream = relay")
        await tab.open(open_proxy.url(), channel)
        # Without heartbeats each would be closed 5 s after the first one was due.
        await asyncio.sleep(6)
        last = await tab.page.evaluate("[stream, relay].map(({events}) => events.at(-1).state)")
        assert last == ["open", "open"]
        assert open_proxy.upgrades == 1


async def test_a_dead_connection_is_replaced_after_a_sleep(
    relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(relay.port) as proxy, open_tab_with_clock() as tab:
        clock = tab.page.clock
        await tab.open(proxy.url(), channel)
        proxy.stall()
        await publish_all(relay, channel, *number_texts(0, 5))
        await clock.pause_at(await tab.page.evaluate("Date.now() / 1000") + 600)
        await clock.run_for(5000)  # longer than it waits for an answer
        await tab.await_state("waiting")
        await clock.run_for(500)
        await tab.await_messages(number_texts(0, 5))


COUNT_PONGS = """() => {
    window.pongs = 0;
    window.WebSocket = class extends WebSocket {
        constructor(...args) {
            super(...args);
            this.addEventListener("message", ({data}) => { pongs += data.includes('"pong"'); });
        }
    };
}"""


async def test_a_live_connection_is_kept_after_a_sleep(relay: RelayProcess, channel: str) -> None:
    async with UpgradeProxy(relay.port) as proxy, open_tab_with_clock() as tab:
        page = tab.page
        await page.evaluate(COUNT_PONGS)
        await tab.open(proxy.url(), channel)
        await page.clock.pause_at(await page.evaluate("Date.now() / 1000") + 600)
        await tab.wait_until("pongs === 1")
        await page.clock.run_for(5000)
        await page.evaluate("window.dispatchEvent(new Event('online'))")
        await tab.wait_until("pongs === 2")
        await page.clock.run_for(5000)
        await page.clock.resume()
        await tab.publish("over the same connection")
        await tab.await_messages(["over the same connection"])
        assert proxy.upgrades == 1


async def test_a_frozen_page_disconnects_and_resumes_without_a_gap(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with()
    async with open_tab_with_clock() as tab:
        clock = tab.page.clock
        await tab.open(relay.ws_url(), channel)
        # A browser without a window never freezes a page by itself. Freezing stops the timers.
        await clock.pause_at(await tab.page.evaluate("Date.now() / 1000") + 60)
        await tab.page.evaluate("document.dispatchEvent(new Event('freeze'))")
        await relay.await_metric("websocket_connected_clients", 0)
        await publish_all(relay, channel, *number_texts(0, 100))
        await clock.resume()
        await tab.await_messages(number_texts(0, 100))


async def test_a_frozen_page_that_resumes_in_time_was_not_away_and_a_closed_one_was(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={**PRESENCE, "grace_s": 60})
    async with open_tab_with_clock() as tab, open_relay_v1(relay) as other:
        clock = tab.page.clock
        await tab.open(relay.ws_url(), TEAM)
        await other.send("subscribe", channel=TEAM, presence=True)
        await other.next_notice("subscribed")
        await other.next_notice("presence")
        await clock.pause_at(await tab.page.evaluate("Date.now() / 1000") + 60)
        await tab.page.evaluate("document.dispatchEvent(new Event('freeze'))")
        await relay.await_metric("websocket_connected_clients", 1)
        await clock.resume()
        await tab.wait_until("relay.state === 'open'")
        await tab.publish("here")
        await tab.outcomes(1)
        assert (await other.receive())[1] == "here"
        await tab.page.evaluate("relay.close()")
        assert (await other.next_notice())["type"] == "left"


TIME_FROM_ONLINE_TO_CONNECTING = """new Promise(resolve => {
    const start = performance.now();
    relay.addEventListener("state", () => {
        if (relay.state === "connecting") resolve(performance.now() - start);
    });
    window.dispatchEvent(new Event("online"));
})"""


async def test_relay_js_reconnects_at_once_when_the_network_returns(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(None) as proxy:
        await tab.start(proxy.url(), channel)
        await tab.wait_until("relay.events.some(({retryInMs}) => retryInMs > 2000)")
        proxy.target = relay.port
        waited_ms = await tab.page.evaluate(TIME_FROM_ONLINE_TO_CONNECTING)
        assert waited_ms < 2000
        await tab.wait_until("relay.state === 'open'")


# Tokens


async def test_a_token_is_sent_and_is_part_of_no_url(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel)
    urls: list[str] = []
    tab.page.on("request", lambda request: urls.append(request.url))
    tab.page.on("websocket", lambda socket: urls.append(socket.url))
    await tab.open(jwt_relay.ws_url(), channel, token=token)
    await tab.publish("0")
    await tab.await_messages(["0"])
    assert urls
    assert all(part not in url for url in urls for part in token.split("."))


START_WITH_TOKENS = """([url, channel, tokens]) => {
    start(url, channel, {token: async () => tokens.length > 1 ? tokens.shift() : tokens[0]});
}"""


@pytest.mark.parametrize("blocks_upgrades", [False, True])
async def test_a_token_is_renewed_without_a_break(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str, blocks_upgrades: bool
) -> None:
    first = channel_token(secret, channel, lasts_s=30)
    async with UpgradeProxy(jwt_relay.port) as proxy:
        proxy.blocks_upgrades = blocks_upgrades
        # Each attempt takes one: where WebSockets are blocked, the second one opens the stream.
        tokens = [first, first, channel_token(secret, channel, "two")][not blocks_upgrades :]
        await tab.page.evaluate(START_WITH_TOKENS, [proxy.url(), channel, tokens])
        await tab.wait_until("relay.state === 'open' && channel.position !== null")
        upgrades = proxy.upgrades
        await tab.page.evaluate("relay.renewToken()")
        await tab.page.evaluate("window.two = join('two')")  # of the new token only
        await tab.wait_until("two.position !== null")
        await tab.publish("0")
        await tab.await_messages(["0"])
        assert proxy.upgrades == upgrades
        assert len(await tab.states("open")) == 1


async def test_a_new_token_ends_the_subscriptions_that_it_does_not_permit(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str
) -> None:
    token = channel_token(secret, "one", "two")
    await tab.open(jwt_relay.ws_url(), "one", token=token)
    await tab.page.evaluate("window.two = join('two')")
    await tab.wait_until("two.position !== null")
    await tab.page.evaluate(
        "token => { relay.token = token; relay.renewToken(); }", channel_token(secret, "two")
    )
    await tab.wait_until("channel.events.some(({type}) => type === 'refused')")
    await tab.page.evaluate("publish('to two', 'two')")
    await tab.await_messages(["to two"], "two")
    assert len(await tab.states("open")) == 1


async def test_a_refused_renewal_is_reported_and_the_previous_token_still_counts(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    tokens = [channel_token(secret, channel), "invalid"]
    await tab.page.evaluate(START_WITH_TOKENS, [jwt_relay.ws_url(), channel, tokens])
    await tab.wait_until("relay.state === 'open'")
    code, status = await tab.page.evaluate(
        "relay.renewToken().catch(({code, status}) => [code, status])"
    )
    assert (code, status) == ("refused", 401)
    await tab.publish("0")
    await tab.await_messages(["0"])


async def test_an_expired_token_is_replaced_by_the_token_function(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    tokens = [channel_token(secret, channel, lasts_s=2), channel_token(secret, channel)]
    await tab.page.evaluate(START_WITH_TOKENS, [jwt_relay.ws_url(), channel, tokens])
    await tab.wait_until("relay.events.filter(({state}) => state === 'open').length === 2")
    (wait,) = await tab.states("waiting")
    assert (wait["code"], wait["reason"]) == (3000, "token expired")
    assert await tab.events("refused") == []


async def test_a_client_with_a_session_reconnects_when_its_permissions_expire(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    async with HookBackend() as backend:
        backend.permit(**ANN, expires_in_s=2)
        relay = relay_with(**hook_settings(backend))
        await tab.start(relay.ws_url(), channel)
        await tab.wait_until("relay.events.some(({state}) => state === 'waiting')")
        backend.permit(**ANN)
        await tab.wait_until("relay.events.filter(({state}) => state === 'open').length >= 2")
        await tab.publish("0")
        await tab.await_messages(["0"])
        assert await tab.events("refused") == []
        waits = await tab.states("waiting")
        assert {(wait["code"], wait["reason"]) for wait in waits} == {(3000, "token expired")}


async def test_an_expired_token_without_a_replacement_ends_the_reconnections(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel, lasts_s=2)
    await tab.start(jwt_relay.ws_url(), channel, token=token)
    await tab.wait_until("relay.events.some(({type}) => type === 'refused')")
    assert await tab.events("refused") == [
        {"type": "refused", "status": 401, "reason": "token expired"}
    ]
    assert await tab.page.evaluate("relay.state") == "closed"
    # A new token and `open` reconnect.
    await tab.page.evaluate(
        "token => { relay.token = token; relay.open(); }", channel_token(secret, channel)
    )
    await tab.wait_until("relay.state === 'open'")
    await tab.publish("0")
    await tab.await_messages(["0"])


async def test_a_token_function_that_fails_is_called_again(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    await tab.page.evaluate(
        """([url, channel, token]) => {
            const answers = [Promise.reject(new Error("not yet")), token];
            answers[0].catch(() => {});
            start(url, channel, {token: () => answers.shift()});
        }""",
        [jwt_relay.ws_url(), channel, channel_token(secret, channel)],
    )
    await tab.wait_until("relay.state === 'open'")
    assert [each["reason"] for each in await tab.states("waiting")] == ["the page has no token"]


async def test_a_token_that_is_set_during_an_attempt_is_that_of_the_connection(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    await tab.page.evaluate(
        """([url, channel, token]) => {
            start(url, channel, {token: () => new Promise(() => {})});
            relay.token = token;
            relay.renewToken();
        }""",
        [jwt_relay.ws_url(), channel, channel_token(secret, channel)],
    )
    await tab.wait_until("relay.state === 'open'")


async def test_an_invalid_token_is_not_sent(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(relay.port) as proxy:
        await tab.start(proxy.url(), channel, token="not a token")
        await tab.wait_until("relay.events.some(({type}) => type === 'refused')")
        assert proxy.upgrades == 0


# Refusals. A browser hides the reason of a failed upgrade: it is read from an event stream.


async def test_a_permanent_refusal_is_reported_and_not_retried(
    tab: RelayTab, jwt_relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(jwt_relay.port) as proxy:
        await tab.start(proxy.url(), channel)
        await tab.publish("0")
        await tab.wait_until("relay.events.some(({type}) => type === 'refused')")
        assert await tab.events("refused") == [
            {"type": "refused", "status": 401, "reason": "token required"}
        ]
        assert await tab.outcomes(1) == {"0": "refused"}
        assert proxy.upgrades == 1


async def test_a_refusal_by_a_limit_is_retried_after_its_delay(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client():
        await tab.start(relay.ws_url(), channel)
        await tab.await_state("waiting")
        (wait,) = await tab.states("waiting")
        assert wait["reason"] == "too many connections"
        assert wait["retryInMs"] >= 1000
    await tab.wait_until("relay.state === 'open'")


async def test_the_network_s_return_does_not_shorten_the_delay_of_a_limit(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_connections": 1})
    async with relay.client(), open_tab_with_clock() as tab:
        clock = tab.page.clock
        await clock.pause_at(await tab.page.evaluate("Date.now() / 1000 + 0.1"))
        await tab.start(relay.ws_url(), channel)
        await tab.await_state("waiting")
        (wait,) = await tab.states("waiting")
        assert wait["retryInMs"] >= 1000
        await tab.page.evaluate("window.dispatchEvent(new Event('online'))")
        await clock.run_for(500)  # longer than the delay after a return without a limit
        assert await tab.page.evaluate("relay.state") == "waiting"


# Blocked WebSockets: one event stream, and POST


async def test_a_stream_is_used_if_websockets_are_blocked(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(relay.port) as proxy, relay.client(channel) as other:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), channel)
        assert await tab.page.evaluate("relay.transport") == "stream"
        await other.send("two\nlines, ünder \u2028 \U0001f600")
        await other.send(b"\x00\xff")
        await other.send("")
        await tab.await_messages(["two\nlines, ünder \u2028 \U0001f600", [0, 255], ""])
        await tab.publish("typed", "here")
        await tab.page.evaluate("channel.publish(new Uint8Array([1, 2]))")
        await receive_many(other, 3)
        assert await receive_many(other, 3) == ["typed", "here", b"\x01\x02"]
        outcomes = await tab.outcomes(2)
        await tab.wait_until("channel.received.length === 6")
        assert list(outcomes.values()) == (await tab.page.evaluate("channel.positions"))[3:5]
        proxy.cut()
        await other.send("while it was disconnected")
        await tab.wait_until("channel.received.length === 7")
        assert (await tab.page.evaluate("channel.received"))[-1] == "while it was disconnected"


async def test_all_channels_share_one_stream(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with()
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), "one:1")
        await publish_all(relay, "one:1", "0")
        await tab.await_messages(["0"])
        await publish_all(relay, "two", "earlier", "0")
        await tab.page.evaluate("window.two = join('two', {history: 1})")
        await tab.await_messages(["0"], "two")
        for name, message in (("one:1", "1"), ("two", b"\x01"), ("one:1", "2")):
            await publish_all(relay, name, message)
        await tab.await_messages(["0", "1", "2"])
        await tab.await_messages(["0", [1]], "two")
        await relay.await_metric("websocket_connected_clients", 1)
        proxy.cut()
        await publish_all(relay, "two", "2")
        await tab.await_messages(["0", [1], "2"], "two")
        await tab.await_messages(["0", "1", "2"])
        await tab.page.evaluate("channel.leave(); two.leave()")
        await tab.await_state("idle")
        await relay.await_metric("websocket_connected_clients", 0)
        assert await tab.events("gap", "two") == []


async def test_a_refused_channel_does_not_affect_the_others_of_a_stream(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str
) -> None:
    async with UpgradeProxy(jwt_relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.start(proxy.url(), "one", token=channel_token(secret, "one"))
        await tab.page.evaluate("window.two = join('two')")
        await tab.wait_until("two.events.some(({type}) => type === 'refused')")
        await tab.wait_until("relay.transport === 'stream' && channel.position !== null")
        await tab.page.evaluate("publish('of one'); publish('of two', 'two')")
        assert (await tab.outcomes(2))["of two"] == "refused"
        await tab.await_messages(["of one"])
        assert await tab.events("refused") == []


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_the_end_of_a_relay_causes_no_gap_and_no_duplicate_on_a_stream(
    tab: RelayTab, redis_replicas: tuple[RelayProcess, RelayProcess], channel: str, how: str
) -> None:
    async with UpgradeProxy(redis_replicas[0].port) as proxy:
        proxy.blocks_upgrades = True
        await receive_while_a_relay_ends(tab, proxy, redis_replicas, channel, how)
        wait = (await tab.states("waiting"))[-1]
        assert wait["code"] == (1001 if how == "stopped" else 1006)


@pytest.mark.parametrize("status", [b"504 Gateway Timeout", b"503 Service Unavailable"])
async def test_a_post_whose_answer_is_lost_is_repeated_and_published_once(
    tab: RelayTab, relay: RelayProcess, channel: str, status: bytes
) -> None:
    async with UpgradeProxy(relay.port) as proxy, relay.client(channel) as subscriber:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), channel)
        proxy.post_status = status
        await tab.publish("0", "1")
        assert await receive(subscriber) == "0"
        await tab.await_messages(["0"])
        proxy.post_status = b""
        await tab.assert_published_once(2)
        assert await receive(subscriber) == "1"


async def test_a_post_without_an_answer_for_two_minutes_is_unconfirmed(
    relay: RelayProcess, channel: str
) -> None:
    """Later, the relay might not recognize the repeat any more."""
    async with UpgradeProxy(relay.port) as proxy, open_tab_with_clock() as tab:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), channel)
        proxy.post_status = b"504 Gateway Timeout"
        await tab.publish("0")
        await tab.await_messages(["0"])
        await tab.page.clock.fast_forward(121_000)
        assert await tab.outcomes(1) == {"0": "unconfirmed"}
        await tab.await_messages(["0"])


async def test_a_post_without_an_answer_is_unconfirmed_when_the_page_closes(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), channel)
        proxy.loses_post_answers = True
        await tab.publish("0", "1")
        await tab.await_messages(["0"])
        await tab.page.evaluate("relay.close()")
        assert await tab.outcomes(2) == {"0": "unconfirmed", "1": "closed"}


async def test_messages_are_posted_without_a_subscription(
    tab: RelayTab, relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(server={"base_path": "/live"})
    path = f"/live{path_of(channel)}"
    async with UpgradeProxy(relay.port) as proxy, relay.client(path=path) as subscriber:
        proxy.blocks_upgrades = True
        await tab.start(proxy.url("/live"), None)
        await tab.page.evaluate("name => publish('typed', name)", channel)
        assert "-" in (await tab.outcomes(1))["typed"]
        assert await receive(subscriber) == "typed"
        assert proxy.streams == 0


async def test_a_refused_message_on_a_stream_is_rejected(
    tab: RelayTab, jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    async with UpgradeProxy(jwt_relay.port) as proxy:
        proxy.blocks_upgrades = True
        token = channel_token(secret, channel, may_publish=False)
        await tab.open(proxy.url(), channel, token=token)
        await tab.publish("0")
        assert await tab.outcomes(1) == {"0": "refused"}
        assert await tab.page.evaluate("relay.state") == "open"


async def test_a_stream_that_ends_is_replaced_by_a_websocket_when_upgrades_succeed(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    """A message that was posted and not answered is posted again, before later ones are sent."""
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), channel)
        proxy.post_status = b"504 Gateway Timeout"
        await tab.publish("0", "1")
        await tab.await_messages(["0"])
        proxy.blocks_upgrades = False
        await tab.await_state("waiting")
        await publish_all(relay, channel, "of another client")
        await tab.wait_until("relay.transport === 'websocket'")
        await tab.publish("2")
        proxy.post_status = b""
        await tab.await_messages(["0", "of another client", "1", "2"])
        outcomes, positions = await tab.outcomes(3), await tab.page.evaluate("channel.positions")
        assert list(outcomes.values()) == [positions[0], *positions[2:]]


async def test_a_post_ends_with_its_stream_and_is_repeated(
    tab: RelayTab, relay: RelayProcess, channel: str
) -> None:
    """A network that fails leaves a POST without an answer. Later messages do not wait for it."""
    async with UpgradeProxy(relay.port) as proxy:
        proxy.blocks_upgrades = True
        await tab.open(proxy.url(), channel)
        proxy.loses_post_answers = True
        await tab.publish("0", "1")
        await tab.await_messages(["0"])
        proxy.loses_post_answers = False
        proxy.stall()
        await tab.page.evaluate("window.dispatchEvent(new Event('online'))")
        await tab.await_messages(["0", "1"])
        await tab.assert_published_once(2)


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
