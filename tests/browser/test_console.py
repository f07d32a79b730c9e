"""The console with a real relay, in a real browser."""

import asyncio
import functools
import itertools
import json
import re
import socket
import time
from pathlib import Path
from typing import Literal
from urllib.parse import urlencode

import pytest
from playwright.async_api import FilePayload, Route, expect
from websockets.asyncio.client import ClientConnection

from tests.support import browser
from tests.support.brokers import RedisBroker
from tests.support.console_page import (
    await_connected,
    browser_errors,
    connect,
    console_of,
    enter_token,
    notes,
    rows,
    send,
    tile,
)
from tests.support.issuer import ALL_CHANNELS, SECRET, sign_token
from tests.support.programs import ANY_REDIS, needed
from tests.support.relay_process import RelayProcess, StartRelay, receive, receive_many
from tests.support.relay_v1 import connect_relay_v1
from tests.support.tcp_proxy import TcpProxy

pytestmark = browser.SHARED

KEPT = 500
"""Messages that the page keeps."""

DROP = """({name, bytes}) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([new Uint8Array(bytes)], name));
    const target = document.getElementById("messages");
    for (const type of ["dragover", "drop"]) {
        target.dispatchEvent(new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true}));
    }
}"""


async def test_the_console_sends_messages_and_shows_received_ones(
    relay: RelayProcess, channel: str
) -> None:
    async with console_of(relay) as page, relay.client(channel) as other:
        await connect(page, channel)
        await await_connected(page)
        await send(page, "typed <b>here</b>\nin two lines")
        await expect(page.locator("#messages .mine .text")).to_have_text(
            "typed <b>here</b>\nin two lines"
        )
        assert await receive(other) == "typed <b>here</b>\nin two lines"

        await other.send("from elsewhere")
        await other.send('{"a": 1}')
        await other.send(b"\x00\xff")
        await expect(rows(page)).to_have_text(
            [re.compile("typed"), "from elsewhere", '{"a": 1}', "00 ff"]
        )
        kinds = page.locator("#messages li:not(.note) .kind")
        await expect(kinds).to_have_text(["text", "text", "JSON", "binary"])
        await expect(page.locator("#count")).to_have_text(re.compile("^4 messages"))

        await page.get_by_role("button", name="Disconnect").click()
        await expect(page.locator("#state")).to_have_text("not connected")
        await relay.await_metric("websocket_connected_clients", 1)


HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "control \x00\x07\x1b[31m\x7f\x9b characters",
    "\u202egnp.exe\u2066 turned round",
    '{"__proto__": {"polluted": 1}, "<b>": "</b>"}',
    "a\u0301" * 100,
)


async def test_hostile_messages_are_shown_as_text_only(relay: RelayProcess, channel: str) -> None:
    async with console_of(relay, f"/?channel={channel}") as page, relay.client(channel) as other:
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        await await_connected(page)
        for text in HOSTILE:
            await other.send(text)
        await other.send("x" * 1_000_000)
        await other.send(bytes(1_000_000))
        await expect(rows(page)).to_have_count(len(HOSTILE) + 2)
        shown = await rows(page).evaluate_all("all => all.map(each => each.textContent)")
        assert shown[:-2] == list(HOSTILE)
        assert shown[-2:] == ["x" * 500 + "…", "00 " * 16 + "…"]
        for row, length in ((rows(page).nth(5), 200_000), (rows(page).nth(6), 10_000)):
            await row.click()
            whole = page.get_by_label("The whole message")
            assert length < len(await whole.inner_text()) < 1.5 * length + 20_000
            await expect(whole).to_contain_text("the rest is in what Save saves")
            await page.keyboard.press("Escape")
        assert dialogs == []
        assert await page.locator("#messages :is(img, script, b)").count() == 0
        height = "list => Math.max(...[...list.children].map(row => row.offsetHeight))"
        assert await page.locator("#messages").evaluate(height) < 100


INVALID_CHANNELS = (
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "../stats",
    "..",
    "a b",
    "",
)


async def test_a_url_without_a_valid_channel_does_not_connect(relay: RelayProcess) -> None:
    async with console_of(relay) as page:
        for name in INVALID_CHANNELS:
            query = urlencode({"channel": name, "history": "<b>", "access_token": "x"})
            await page.goto(relay.http_url(f"/?{query}"))
            await expect(page.get_by_label("History")).to_have_value("20")
            await expect(page.locator("#state")).to_have_text("not connected")
            assert page.url == relay.http_url("/"), name


async def test_a_url_with_a_channel_connects_to_it(relay: RelayProcess, channel: str) -> None:
    async with relay.client(channel) as other:
        await other.send("before")
        await receive(other)
        async with console_of(relay, f"/?channel={channel}&history=20&access_token=x#y") as page:
            await await_connected(page)
            await expect(rows(page)).to_have_text(["before"])
            assert page.url == relay.http_url(f"/?channel={channel}&history=20")


async def test_the_keyboard_opens_and_closes_a_whole_message(
    relay: RelayProcess, channel: str
) -> None:
    async with console_of(relay, f"/?channel={channel}") as page, relay.client(channel) as other:
        await await_connected(page)
        await other.send('{"id":12345678901234567890,"of":[],"is":[1,{"deep":"a, b: {"}]}')
        await other.send(bytes(range(20)))
        await expect(rows(page)).to_have_count(2)

        await page.locator("#messages").focus()
        await page.keyboard.press("ArrowUp")
        await page.keyboard.press("Enter")
        whole = page.get_by_label("The whole message")
        await expect(whole).to_contain_text("00000010  10 11 12 13")
        await expect(page.get_by_role("button", name="Continue")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(whole).to_have_count(0)

        await page.keyboard.press("ArrowUp")
        await page.keyboard.press("Enter")
        shown = await whole.inner_text()
        assert shown.startswith('{\n  "id": 12345678901234567890,\n  "of": [],\n  "is": [\n    1,')
        assert json.loads(shown)["is"][1] == {"deep": "a, b: {"}
        await page.keyboard.press("Escape")
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="Pause")).to_be_visible()


async def test_a_message_is_saved_unchanged(
    relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 40
    async with console_of(relay, f"/?channel={channel}") as page, relay.client(channel) as other:
        await await_connected(page)
        await other.send(content)
        await rows(page).click()
        async with page.expect_download() as started:
            await page.get_by_role("button", name="Save").click()
        download = await started.value
        await download.save_as(tmp_path / "saved")
        assert download.suggested_filename.startswith(channel)
        assert (tmp_path / "saved").read_bytes() == content


async def test_a_chosen_or_dropped_file_is_sent_as_one_binary_message(
    relay: RelayProcess, channel: str
) -> None:
    chosen, dropped = b"\x00chosen" * 10_000, b"\xffdropped"
    async with console_of(relay, f"/?channel={channel}") as page, relay.client(channel) as other:
        await await_connected(page)
        file = FilePayload(name="a.bin", mimeType="application/octet-stream", buffer=chosen)
        await page.locator("#file").set_input_files(file)
        assert await receive(other) == chosen
        await page.evaluate(DROP, {"name": "b.bin", "bytes": list(dropped)})
        assert await receive(other) == dropped
        await expect(page.locator("#messages .mine .kind")).to_have_text(["binary", "binary"])


async def test_a_message_above_the_limit_is_not_sent(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(limits={"max_message_bytes": 1000})
    async with console_of(relay, f"/?channel={channel}") as page, relay.client(channel) as other:
        await await_connected(page)
        await expect(page.locator("#status")).to_have_text("ready")
        file = FilePayload(name="a.bin", mimeType="application/octet-stream", buffer=bytes(1001))
        await page.locator("#file").set_input_files(file)
        too_large = "too large, 1,001 bytes; the relay takes 1,000 at most"
        await expect(notes(page, f"a.bin: {too_large}")).to_have_count(1)
        await expect(page.locator("#announcement")).to_contain_text("a.bin: ")
        await send(page, "ü" * 500 + "x")
        await expect(notes(page, f"not sent: {too_large}")).to_have_count(1)
        await expect(page.get_by_label("Message", exact=True)).to_have_value("ü" * 500 + "x")
        await send(page, "ü" * 500)
        assert await receive(other) == "ü" * 500


async def test_without_stats_the_relay_refuses_a_message_above_the_limit(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(
        limits={"max_message_bytes": 1000}, auth={"mode": "jwt", "jwt": {"secret": SECRET}}
    )
    async with console_of(relay, f"/?channel={channel}", requests_fail=True) as page:
        await enter_token(page, sign_token())
        await await_connected(page)
        file = FilePayload(name="a.bin", mimeType="application/octet-stream", buffer=bytes(1001))
        await page.locator("#file").set_input_files(file)
        await expect(notes(page, "a.bin: 413 message too big")).to_have_count(1)
        await expect(notes(page, "connection lost")).to_have_count(0)


async def test_two_tabs_exchange_messages(relay: RelayProcess, channel: str) -> None:
    async with console_of(relay, f"/?channel={channel}") as one:
        async with one.expect_popup() as opened:
            await one.evaluate("() => { open(location.href); }")
        other = await opened.value
        errors = browser_errors(other)
        for page in (one, other):
            await await_connected(page)
        await send(one, "from the one")
        await expect(rows(other)).to_have_text(["from the one"])
        await send(other, "from the other")
        for page in (one, other):
            await expect(rows(page)).to_have_text(["from the one", "from the other"])
            await expect(page.locator("#messages .mine")).to_have_count(1)
        assert errors == []


async def test_the_console_resumes_without_a_gap_after_a_restart_of_the_relay(
    relay_with: StartRelay, tmp_path: Path, channel: str
) -> None:
    redis = needed(*ANY_REDIS)
    async with RedisBroker(redis, tmp_path / "broker") as broker:
        settings = {"backplane": {"url": broker.url}, "shutdown": {"spread_s": 0}}
        relay, replica = relay_with(**settings), relay_with(**settings)
        async with (
            console_of(relay, f"/?channel={channel}", requests_fail=True) as page,
            replica.client(channel) as other,
        ):
            await await_connected(page)
            await expect(tile(page, "Backplane")).to_have_text("redis, up")
            expected = ["before", *(f"meanwhile {number}" for number in range(50)), "after"]
            await other.send("before")
            await expect(rows(page)).to_have_text(["before"])

            await relay.stop()
            await expect(notes(page, "connection lost: 1001 draining")).to_have_count(1)
            await expect(page.locator("#status")).to_have_text("not reachable")
            await send(page, "typed while it was stopped")
            await expect(notes(page, "1 to be sent when there is a connection")).to_have_count(1)
            for text in expected[1:-1]:
                await other.send(text)
            await receive_many(other, len(expected) - 1)

            relay_with(server={"port": relay.port}, **settings)
            await await_connected(page)
            await expect(page.locator("#messages .mine .text")).to_have_text(
                "typed while it was stopped"
            )
            await other.send("after")
            await expect(rows(page).last).to_have_text("after")
            received = page.locator("#messages li:not(.note):not(.mine) .text")
            assert await received.all_text_contents() == expected
            await expect(page.locator("#status")).to_have_text("ready")


async def test_a_click_reconnects_before_the_next_attempt_is_due(
    relay: RelayProcess, channel: str
) -> None:
    async with TcpProxy(relay.port) as proxy, browser.open_page() as page:
        await page.clock.install()
        await page.goto(f"http://127.0.0.1:{proxy.port}/?channel={channel}")
        await await_connected(page)
        reconnect = page.get_by_role("button", name="Reconnect now")
        await expect(reconnect).to_be_hidden()
        proxy.target = None
        proxy.cut()
        await expect(page.locator("#state")).to_have_text("reconnecting")
        await page.clock.pause_at(await page.evaluate("Date.now()") + 100)
        await expect(reconnect).to_be_visible()
        proxy.target = relay.port
        await reconnect.click()
        await await_connected(page)
        await expect(reconnect).to_be_hidden()


async def test_a_replayed_message_has_its_time_of_publication_or_an_upper_bound(
    relay: RelayProcess, relay_with: StartRelay, tmp_path: Path, channel: str
) -> None:
    """Positions of Redis have the time, those of a relay without a broker have not."""
    async with RedisBroker(needed(*ANY_REDIS), tmp_path / "broker") as broker:
        for each in (relay_with(backplane={"url": broker.url}), relay):
            async with connect_relay_v1(each, channel) as publisher, browser.open_page() as page:
                await publisher.publish("earlier")
                await publisher.next_message()
                published_ms = int(publisher.position.partition("-")[0])
                await page.clock.install(time=time.time() + 3_600)
                await page.goto(each.http_url(f"/?channel={channel}"))
                row = page.locator("#messages li", has_text="earlier").locator("time")
                published = time.strftime("%H:%M:%S", time.localtime(published_ms / 1000))
                expected = re.compile("^≤") if each is relay else published
                await expect(row).to_have_text(expected)
                await page.clock.run_for(1_000)
                await publisher.publish("now")
                row = page.locator("#messages li", has_text="now").locator("time")
                await expect(row).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))


async def test_a_token_is_requested_and_is_stored_and_shown_nowhere(
    jwt_relay: RelayProcess, channel: str
) -> None:
    token = sign_token(relay=ALL_CHANNELS | {"stats": True})
    async with console_of(jwt_relay, requests_fail=True) as page:
        await connect(page, channel)
        dialog = page.get_by_role("dialog", name="Token")
        await expect(dialog).to_contain_text("Reason: 401 token required")
        await page.keyboard.press("Escape")
        await expect(dialog).to_be_hidden()
        await expect(page.locator("#state")).to_have_text("not connected")

        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.get_by_label("JSON Web Token")).to_be_focused()
        assert await page.get_by_label("JSON Web Token").get_attribute("type") == "password"
        await enter_token(page, "not.the.one")
        await expect(dialog).to_contain_text("Reason: 401 invalid token")
        await enter_token(page, token)
        await await_connected(page)
        await expect(tile(page, "Up for")).not_to_be_empty()
        await send(page, "typed")
        await expect(rows(page)).to_have_text(["typed"])

        storage = "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state])"
        assert token not in await page.evaluate(storage)
        assert token not in await page.content()
        assert token not in page.url
        fields = await page.locator("input").all()
        assert token not in [await field.input_value() for field in fields]
    log = "\n".join(jwt_relay.log_lines)
    assert all(part not in log for part in token.split("."))


async def test_without_permission_for_stats_the_console_reports_it_and_exchanges_messages(
    jwt_relay: RelayProcess, channel: str
) -> None:
    async with console_of(jwt_relay, f"/?channel={channel}", requests_fail=True) as page:
        await enter_token(page, sign_token())
        await await_connected(page)
        notice = page.locator("#stats-unavailable")
        await expect(notice).to_contain_text("403 not authorized for stats")
        await expect(page.locator("#tiles")).to_be_hidden()
        await send(page, "typed")
        await expect(rows(page)).to_have_text(["typed"])

        await notice.get_by_role("button", name="Token…").click()
        await enter_token(page, sign_token(relay=ALL_CHANNELS | {"stats": True}))
        await expect(notice).to_be_hidden()
        await expect(tile(page, "Clients")).to_be_visible()
        await expect(page.locator("#status")).to_have_text("ready")
        await await_connected(page)


async def test_the_stats_are_those_of_the_relay(relay: RelayProcess, channel: str) -> None:
    async with console_of(relay, f"/?channel={channel}") as page, relay.client(channel) as other:
        await await_connected(page)
        await expect(page.locator("#status")).to_have_text("ready")
        await expect(tile(page, "Backplane")).to_have_text("memory, up")
        await expect(tile(page, "Clients")).to_have_text("2")
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(send_until_cancelled(other))
            for title in ("Messages in", "Deliveries out"):
                await expect(tile(page, title)).to_have_text(re.compile(r"^[\d.]+/s$"))
            for title in ("Delivery p50", "Delivery p99", "Loop lag p99"):
                await expect(tile(page, title)).to_have_text(re.compile(r"^[\d.]+ ms$"))
            await expect(tile(page, "Drops")).to_have_text("0/s")
            sending.cancel()


async def test_all_replicas_are_shown(relay_with: StartRelay, tmp_path: Path, channel: str) -> None:
    redis = needed(*ANY_REDIS)
    async with RedisBroker(redis, tmp_path / "broker") as broker:
        settings = {"backplane": {"url": broker.url}}
        relay, replica = relay_with(**settings), relay_with(**settings)
        async with console_of(relay) as page, replica.client(channel) as other:
            await other.send("counted")
            replicas = page.get_by_role("table", name="Replicas").locator("tbody tr")
            name = socket.gethostname()
            await expect(replicas).to_have_text([f"{name}00", f"{name}11"])


async def test_stats_are_of_one_replica_while_a_proxy_alternates_between_two(
    relay: RelayProcess, channel: str
) -> None:
    names = itertools.cycle(["one", "other"])

    async def answer(route: Route) -> None:
        response = await route.fetch()
        stats = await response.json() | {"replica": next(names)}
        await route.fulfill(response=response, json=stats)

    async with browser.open_page() as page:
        await page.route("**/stats", answer)
        await page.goto(relay.http_url("/"))
        await expect(page.locator("#replica")).to_have_text(re.compile("^replica one "))
        await expect(tile(page, "Messages in")).to_have_text("0/s")
        await expect(page.locator("#replica")).to_have_text(re.compile("^replica one "))


RESPONSES_WITHOUT_STATS = (
    (403, "text/plain", "not authorized for stats\n", "403 not authorized for stats"),
    (503, "text/plain", "draining" + "x" * 100_000, "503 draining"),
    (502, "text/html", "<h1>Bad Gateway</h1>" * 5_000, "502"),
    (200, "text/html", "<h1>Welcome</h1>", "something else"),
    (200, "application/json", "null", "something else"),
    (200, "application/json", '{"status": "ready"}', "something else"),
)


async def test_a_response_without_stats_is_reported_in_one_line(
    relay: RelayProcess, channel: str
) -> None:
    async with console_of(relay, requests_fail=True) as page:
        for status, content_type, body, shown in RESPONSES_WITHOUT_STATS:
            answer = functools.partial(
                Route.fulfill, status=status, content_type=content_type, body=body
            )
            await page.route("**/stats", answer)
            await page.goto(relay.http_url(f"/?channel={channel}"))
            notice = page.locator("#stats-unavailable")
            await expect(notice).to_contain_text(f"Reason: {shown}")
            assert len(await notice.inner_text()) < 400
            await expect(notice.get_by_role("button")).to_have_count(1 if status == 403 else 0)
            await expect(page.locator("#status")).to_have_text("unknown")
            await send(page, "typed")
            await expect(rows(page).last).to_have_text("typed")


async def send_until_cancelled(client: ClientConnection) -> None:
    while True:
        await client.send("tick")
        await asyncio.sleep(0.05)


async def test_the_list_keeps_the_latest_messages_and_can_be_paused(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        console_of(relay, f"/?channel={channel}") as page,
        relay.client(
            channel, max_queue=None
        ) as other,  # with a bound, it would not read its close frame
    ):
        await await_connected(page)
        await page.get_by_role("button", name="Clear").click()
        for number in range(KEPT + 100):
            await other.send(f"message {number}")
        await expect(rows(page).last).to_have_text(f"message {KEPT + 99}")
        await expect(page.locator("#messages li")).to_have_count(KEPT)
        await expect(rows(page).first).to_have_text("message 100")
        await expect(page.locator("#count")).to_contain_text("600 messages")

        await page.get_by_role("button", name="Pause").click()
        await other.send("later")
        resume = page.get_by_role("button", name="Continue (1 new)")
        await expect(resume).to_be_visible()
        await expect(rows(page).last).to_have_text(f"message {KEPT + 99}")
        await resume.click()
        await expect(rows(page).last).to_have_text("later")


async def test_the_list_is_paused_while_it_is_scrolled_back(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        console_of(relay, f"/?channel={channel}") as page,
        relay.client(
            channel, max_queue=None
        ) as other,  # with a bound, it would not read its close frame
    ):
        await await_connected(page)
        for number in range(100):
            await other.send(f"message {number}")
        await expect(rows(page).last).to_have_text("message 99")
        await page.locator("#messages").evaluate("list => list.scrollTop = 0")
        await expect(page.get_by_role("button", name="Continue")).to_be_visible()
        await other.send("later")
        await expect(page.get_by_role("button", name="Continue (1 new)")).to_be_visible()
        await page.locator("#messages").evaluate("list => list.scrollTop = list.scrollHeight")
        await expect(rows(page).last).to_have_text("later")


async def test_many_messages_are_one_announcement(relay: RelayProcess, channel: str) -> None:
    async with (
        console_of(relay, f"/?channel={channel}") as page,
        relay.client(
            channel, max_queue=None
        ) as other,  # with a bound, it would not read its close frame
    ):
        await await_connected(page)
        await page.evaluate(
            """() => {
                window.announced = [];
                const announcement = document.getElementById("announcement");
                new MutationObserver(() => window.announced.push(announcement.textContent))
                    .observe(announcement, {childList: true});
            }"""
        )
        for number in range(200):
            await other.send(f"message {number}")
        await expect(rows(page).last).to_have_text("message 199")
        await expect(page.locator("#announcement")).not_to_be_empty()
        assert len(await page.evaluate("announced")) <= 2


async def test_the_console_works_below_a_base_path(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(server={"base_path": "/live/relay"})
    async with console_of(relay, f"/live/relay/?channel={channel}") as page:
        await await_connected(page)
        await send(page, "typed")
        await expect(rows(page)).to_have_text(["typed"])
        await expect(page.locator("#status")).to_have_text("ready")
        assert page.url.startswith(relay.http_url("/live/relay/?"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_console_fits_a_narrow_screen_in_light_and_dark_colours(
    relay: RelayProcess, channel: str, scheme: Literal["light", "dark"]
) -> None:
    async with console_of(relay) as page:
        await page.set_viewport_size({"width": 320, "height": 640})
        await page.emulate_media(color_scheme=scheme)
        await connect(page, channel)
        await await_connected(page)
        await send(page, "a word that is longer than the screen is wide: " + "x" * 200)
        await expect(rows(page)).to_have_count(1)
        await expect(tile(page, "Up for")).not_to_be_empty()
        assert await page.locator("html").evaluate("html => html.scrollWidth") == 320
        colours = "body => [getComputedStyle(body).color, getComputedStyle(body).backgroundColor]"
        text, background = (
            sum(map(int, re.findall(r"\d+", colour)))
            for colour in await page.locator("body").evaluate(colours)
        )
        assert (text < background) is (scheme == "light")


async def test_the_tab_key_follows_the_visual_order(relay: RelayProcess, channel: str) -> None:
    async with console_of(relay, f"/?channel={channel}") as page:
        await await_connected(page)
        await page.get_by_role("textbox", name="Channels").focus()
        focused = ["names"]
        while focused[-1] != "send":
            await page.keyboard.press("Tab")
            focused.append(await page.evaluate("document.activeElement.id"))
            width = "getComputedStyle(document.activeElement).outlineWidth"
            assert await page.evaluate(width) == "2px", focused
        assert focused == [
            *("names", "history", "key", "toggle", "export", "clear", "pause"),
            *("find", "kind", "messages", "message", "attach", "send"),
        ]
