"""What the console shows of several channels, of clients and of replicas, in a real browser."""

import asyncio
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

from playwright.async_api import Locator, Page, WebSocketRoute, expect

from tests.support import browser
from tests.support.admission import jwt_settings, refusal_answer
from tests.support.brokers import RedisBroker
from tests.support.console_page import (
    await_connected,
    console_of,
    enter_token,
    notes,
    rows,
    send,
    show,
)
from tests.support.issuer import ALL_CHANNELS, sign_token
from tests.support.programs import ANY_REDIS, CURL, needed
from tests.support.relay_process import (
    RelayProcess,
    StartRelay,
    await_close,
    receive,
    receive_many,
)
from tests.support.server_api import KEY, WITH_KEY, WITH_USERS, bearer_of

pytestmark = browser.SHARED

HERE = re.compile("^Who is here")


def shown(page: Page) -> Locator:
    """Return the texts of the messages that a search has found."""
    return page.locator("#messages li:not(.note):not([hidden]) .text")


def channel_names(page: Page) -> Locator:
    """Return the names of channels beside the messages."""
    return page.locator("#messages li:not(.note) .of")


def clients_in(panel: Locator) -> Locator:
    return panel.get_by_role("listitem")


async def enter_key(page: Page, key: str = KEY) -> None:
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Use key").click()


# Several channels


async def test_messages_of_several_channels_are_shown_and_sent(relay: RelayProcess) -> None:
    async with (
        relay.client("one") as one,
        relay.client("two") as two,
        console_of(relay, "/?channel=one&channel=two&history=0") as page,
    ):
        await expect(notes(page, "connected to one, two")).to_have_count(1)
        assert page.url == relay.http_url("/?channel=one&channel=two&history=0")
        await one.send("first")
        await expect(rows(page)).to_have_text(["first"])
        await two.send("second")
        await expect(rows(page)).to_have_text(["first", "second"])
        await expect(channel_names(page)).to_have_text(["one", "two"])
        await page.get_by_label("Send to").select_option("two")
        await send(page, "typed")
        assert await receive_many(two, 2) == ["second", "typed"]
        await expect(page.locator("#messages .mine .of")).to_have_text("two")

        await page.get_by_role("textbox", name="Channels").fill("two, three")
        await page.get_by_role("button", name="Change").click()
        await expect(rows(page)).to_have_text(["second", "typed"])
        await expect(page.locator("#state")).to_have_text("connected")
        assert page.url == relay.http_url("/?channel=two&channel=three&history=0")
        async with relay.client("three") as three:
            await three.send("third")
            await expect(rows(page).last).to_have_text("third")
        await one.send("not shown")
        await two.send("fourth")
        await expect(rows(page)).to_have_text(["second", "typed", "third", "fourth"])
        await expect(notes(page, "connected")).to_have_count(1)

        await page.get_by_role("button", name="Disconnect").click()
        await two.send("in the meantime")
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(rows(page).last).to_have_text("in the meantime")
        await expect(rows(page)).to_have_count(5)


async def test_the_console_is_connected_once_it_has_joined_each_channel(
    relay: RelayProcess,
) -> None:
    async with console_of(relay) as page:
        is_open = asyncio.Event()

        def hold_one(route: WebSocketRoute) -> None:
            """Pass all commands on at once, except the one that subscribes to "two"."""
            server = route.connect_to_server()

            async def pass_on(command: str | bytes) -> None:
                if '"two"' in str(command):
                    await is_open.wait()
                server.send(command)

            route.on_message(pass_on)

        await page.route_web_socket("**/*", hold_one)
        await page.goto(relay.http_url("/?channel=one&channel=two&history=0"))
        await expect(page.locator("#state")).to_have_text("joining")
        await send(page, "to one")  # after the subscription to it
        await expect(rows(page)).to_have_text(["to one"])
        await expect(notes(page, "connected")).to_have_count(0)
        is_open.set()
        await expect(page.locator("#state")).to_have_text("connected")
        await expect(notes(page, "connected to one, two")).to_have_count(1)


async def test_a_channel_that_is_refused_does_not_disturb_the_others(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(auth=jwt_settings())
    token = sign_token(relay={"subscribe": ["open"], "publish": ["open"]})
    async with console_of(relay, "/?channel=secret&channel=open", requests_fail=True) as page:
        await enter_token(page, token)
        await expect(notes(page, "secret refused: 403 ")).to_have_count(1)
        await page.keyboard.press("Escape")  # of the dialog for another token
        await await_connected(page)
        await send(page, "typed")
        await expect(rows(page)).to_have_text(["typed"])


# Who is here

HOSTILE = "<img src=x onerror=alert(1)>"


async def test_who_is_here_is_shown_as_it_changes(relay_with: StartRelay) -> None:
    relay = relay_with(auth=jwt_settings(), presence={"channels": ["team"], "grace_s": 0})
    permissions = {**ALL_CHANNELS, "info": {"name": HOSTILE}}
    headers = {"Authorization": f"Bearer {sign_token(sub=HOSTILE, relay=permissions)}"}
    async with console_of(relay, "/?channel=team&channel=lobby", requests_fail=True) as page:
        await enter_token(page, sign_token(sub="ada", relay=ALL_CHANNELS | {"stats": True}))
        await expect(page.get_by_role("tab", name="Who is here (1)")).to_be_visible()
        panel = await show(page, HERE)
        await expect(clients_in(panel)).to_contain_text(["ada"])
        await expect(panel).to_contain_text("this channel has no presence")
        async with relay.client("team", additional_headers=headers):
            await expect(clients_in(panel)).to_have_count(2)
            await expect(clients_in(panel).last).to_contain_text(HOSTILE)
            await expect(clients_in(panel).last).to_contain_text(json.dumps({"name": HOSTILE})[1:9])
            assert await panel.locator("img").count() == 0
            await expect(page.get_by_role("tab", name="Who is here (2)")).to_be_visible()
        await expect(clients_in(panel)).to_have_count(1)
        await expect(panel.get_by_role("button")).to_have_count(0)


async def test_of_a_channel_with_too_many_clients_only_their_number_is_shown(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["*"], "max_clients": 1})
    async with console_of(relay, "/?channel=team") as page, relay.client("team"):
        panel = await show(page, HERE)
        await expect(panel).to_contain_text("2 are not listed: too many")
        await expect(clients_in(panel)).to_have_count(0)


# The server API


async def test_channels_and_clients_of_all_replicas_are_listed(
    relay_with: StartRelay, tmp_path: Path
) -> None:
    async with RedisBroker(needed(*ANY_REDIS), tmp_path / "broker") as broker:
        settings = {**WITH_USERS, "backplane": {"url": broker.url}}
        await list_all(relay_with(**settings), relay_with(**settings))


async def list_all(one: RelayProcess, two: RelayProcess) -> None:
    admin = sign_token(sub="root", relay=ALL_CHANNELS | {"stats": True, "admin": True})
    ada, eve = bearer_of("ada"), bearer_of("eve")
    async with (
        one.client("news", additional_headers=ada) as client,
        two.client("news", additional_headers=eve),
        two.client("chat", additional_headers=ada),
        console_of(one, "/?channel=hall", requests_fail=True) as page,
    ):
        await enter_token(page, admin)
        await await_connected(page)
        await expect(page.get_by_role("table", name="Replicas").locator("tbody tr")).to_have_count(
            2
        )
        await client.send("hello")
        await receive(client)
        panel = await show(page, "Channels")
        listed = panel.get_by_role("table", name="Busiest channels").locator("tbody tr")
        await expect(listed).to_have_text(
            [re.compile(r"^\s*news\s*2\s*1$"), re.compile("chat"), re.compile("hall")]
        )
        await panel.get_by_label("begin with").fill("ch")
        await expect(listed).to_have_text([re.compile("chat")])
        await panel.get_by_role("button", name="chat", exact=True).click()
        await expect(page.get_by_role("textbox", name="Channels")).to_have_value("hall chat")
        await expect(notes(page, "joining chat")).to_have_count(1)
        await panel.get_by_label("begin with").fill("")
        await panel.get_by_role("button", name="Clients of news").click()

        panel = page.get_by_role("tabpanel", name="Clients")
        await expect(clients_in(panel)).to_have_count(2)
        facts = clients_in(panel).filter(has_text="eve")
        await expect(facts).to_contain_text(f"news · {socket.gethostname()}")
        await panel.get_by_label("Clients of the user").fill("ada")
        await expect(clients_in(panel)).to_have_count(1)
        await panel.get_by_label("Clients of the channel").fill("")
        await expect(clients_in(panel)).to_have_count(2)
        await panel.get_by_label("Clients of the user").fill("no such user")
        await expect(panel).to_contain_text("No client.")

        two.signal(SIGSTOP)
        try:
            await panel.get_by_label("Clients of the user").fill("ada")
            await expect(page.locator("#incomplete")).to_have_text(
                f"no answer from {socket.gethostname()}"
            )
            await expect(clients_in(panel)).to_have_count(1)
        finally:
            two.signal(SIGCONT)


async def test_an_admin_disconnects_a_client_or_refuses_its_user_after_a_confirmation(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(**WITH_USERS, presence={"channels": ["*"], "grace_s": 0})
    async with (
        relay.client("news", additional_headers=bearer_of("ada")) as one,
        relay.client("chat", additional_headers=bearer_of("ada")) as other,
        console_of(relay, "/?channel=news", requests_fail=True) as page,
    ):
        await enter_token(page, sign_token(sub="bob", relay=ALL_CHANNELS))
        await await_connected(page)
        panel = await show(page, "Clients")
        unavailable = page.locator("#api-unavailable")
        await expect(unavailable).to_contain_text(
            'a token with the claim "relay": {"admin": true}. Reason: 403'
        )
        await expect(panel.get_by_role("button")).to_have_count(0)
        await enter_key(page, "another key")
        await expect(unavailable).to_contain_text("Reason: 401 invalid token")
        await enter_key(page)
        await expect(unavailable).to_be_hidden()

        await panel.get_by_label("Clients of the user").fill("ada")
        await expect(clients_in(panel)).to_have_count(2)
        await panel.get_by_role("button", name="Disconnect ada").first.click()
        dialog = page.get_by_role("dialog", name="Disconnect")
        await dialog.get_by_role("button", name="Cancel").click()
        await expect(dialog).to_be_hidden()
        await one.send("still here")
        assert await receive(one) == "still here"

        panel = await show(page, HERE)
        await panel.get_by_role("button", name="Disconnect ada").click()
        await expect(dialog).to_contain_text("reconnect by themselves will be back at once")
        await dialog.get_by_label("Reason").fill("ü" * 100)
        await dialog.get_by_role("button", name="Disconnect").click()
        await expect(dialog.get_by_role("alert")).to_contain_text("Not disconnected: 400 ")
        await dialog.get_by_label("Reason").fill("please sign in again")
        await dialog.get_by_role("button", name="Disconnect").click()
        assert await await_close(one) == (4000, "please sign in again")
        await expect(page.locator("#disconnected")).to_have_text("1 client disconnected")
        await expect(clients_in(panel)).to_have_count(1)

        panel = await show(page, "Clients")
        await expect(clients_in(panel)).to_have_count(1)
        await panel.get_by_role("button", name="Disconnect ada").click()
        await dialog.get_by_label("all clients of ada").check()
        await dialog.get_by_label("Refuse the user").select_option("for ten minutes")
        await dialog.get_by_role("button", name="Disconnect").click()
        assert (await await_close(other))[0] == 4000
        refused = relay.client("news", additional_headers=bearer_of("ada"))
        assert (await refusal_answer(refused)).status_code == 403

        storage = "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state])"
        for text in (await page.evaluate(storage), await page.content(), page.url):
            assert KEY not in text
        assert await page.get_by_label("API key").input_value() == ""


async def test_the_right_to_disconnect_is_that_of_the_latest_key_or_token(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(**WITH_USERS, presence={"channels": ["*"]})
    user = sign_token(sub="bob", relay=ALL_CHANNELS)
    admin = sign_token(sub="bob", relay=ALL_CHANNELS | {"admin": True})
    async with console_of(relay, "/?channel=news", requests_fail=True) as page:
        await enter_token(page, user)
        await await_connected(page)
        await show(page, "Clients")
        await enter_key(page, "another key")
        unavailable = page.locator("#api-unavailable")
        await expect(unavailable).to_contain_text("Reason: 401 invalid token")
        await unavailable.get_by_role("button", name="Token…").click()
        await enter_token(page, admin)
        await expect(unavailable).to_be_hidden()
        panel = await show(page, HERE)
        await expect(panel.get_by_role("button", name="Disconnect bob")).to_be_visible()
        await page.locator("#key").click()
        await enter_token(page, user)
        await expect(panel.get_by_role("button")).to_have_count(0)
        await expect(clients_in(panel)).to_have_count(1)


async def test_a_relay_without_a_server_api_names_the_settings_that_it_needs(
    relay: RelayProcess,
) -> None:
    async with console_of(relay, requests_fail=True) as page:
        await show(page, "Channels")
        await expect(page.locator("#api-unavailable")).to_have_text(
            re.compile(r"^\s*This relay has no server API: set api\.key")
        )
        await expect(page.get_by_label("API key")).to_be_hidden()
        await page.keyboard.press("ArrowLeft")
        await page.keyboard.press("ArrowLeft")
        await expect(page.get_by_role("tabpanel", name="Stats")).to_be_visible()
        await expect(page.locator("#api-unavailable")).to_be_hidden()


async def test_lists_that_are_not_current_are_marked(relay_with: StartRelay) -> None:
    relay = relay_with(**WITH_KEY)
    async with console_of(relay, "/?channel=news", requests_fail=True) as page:
        panel = await show(page, "Channels")
        await enter_key(page)
        await expect(panel.get_by_role("button", name="news", exact=True)).to_be_visible()
        await page.context.set_offline(True)
        await panel.get_by_label("Busiest by").select_option("messages")
        await expect(page.locator("#operations-failure")).to_have_text("not reachable")
        await expect(panel).to_have_class(re.compile("stale"))
        await page.context.set_offline(False)
        await panel.get_by_label("Busiest by").select_option("clients")
        await expect(page.locator("#operations-failure")).to_be_hidden()
        await expect(panel).not_to_have_class(re.compile("stale"))


# Searching, and what becomes of messages


async def test_a_search_shows_what_it_finds_and_keeps_it(relay: RelayProcess, channel: str) -> None:
    async with (
        relay.client(channel, max_queue=None) as client,
        relay.client("other") as other,
        console_of(relay, f"/?channel={channel}&channel=other") as page,
    ):
        await await_connected(page)
        await client.send("Order (4711) shipped")
        await client.send('{"order": 4711}')
        await client.send(b"\x47\x11")
        await other.send("order 5000")
        await expect(rows(page)).to_have_count(4)
        await send(page, "ORDER 4711 again")
        await expect(rows(page)).to_have_count(5)

        find = page.get_by_label("Find in messages")
        await find.fill("order")
        await expect(shown(page)).to_have_count(4)
        await expect(page.locator("#count")).to_contain_text("5 messages, 4 match")
        await find.fill("(4711)")
        await expect(shown(page)).to_have_text(["Order (4711) shipped"])
        await find.fill("47 11")
        await expect(shown(page)).to_have_text(["47 11"])
        await find.fill("")
        await page.get_by_label("Kind of messages").select_option("sent here")
        await expect(shown(page)).to_have_text(["ORDER 4711 again"])
        await page.get_by_label("Kind of messages").select_option("JSON")
        await expect(shown(page)).to_have_text(['{"order": 4711}'])
        await page.get_by_label("Kind of messages").select_option("all kinds")
        await page.get_by_label("Messages of").select_option("other")
        await expect(shown(page)).to_have_text(["order 5000"])
        await page.get_by_label("Messages of").select_option("all channels")
        await find.fill("not there")
        await expect(page.locator("#empty")).to_have_text("No message matches.")

        await find.fill("4711")
        await expect(shown(page)).to_have_count(3)
        for number in range(600):
            await client.send(f"message {number}")
        await expect(page.locator("#count")).to_contain_text("605 messages")
        await expect(shown(page)).to_have_count(3)
        await find.press("Tab")  # to the choice of a channel
        await page.locator("#messages").focus()
        await page.keyboard.press("End")
        await page.keyboard.press("ArrowUp")
        await expect(page.locator("#messages .line:focus .text")).to_have_text('{"order": 4711}')
        await page.keyboard.press("Escape")
        await find.fill("")
        await expect(rows(page)).to_have_count(500 - await page.locator("#messages .note").count())


PUBLISHED: tuple[str | bytes, ...] = (
    'it\'s "quoted" $HOME `date` \\ and\nin two lines ü',
    "@/etc/hostname",
    '{"a": [1, "\'"]}',
    b"\x00\xff'",
    "with\x00zero",
    "\x1b[201~\x03\nexit 1 # ends the paste of a terminal",
)


async def test_a_message_is_copied_as_the_command_that_publishes_it(
    relay: RelayProcess, channel: str
) -> None:
    needed(CURL)
    async with relay.client(channel) as client, console_of(relay, f"/?channel={channel}") as page:
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await await_connected(page)
        for number, message in enumerate(PUBLISHED):
            await client.send(message)
            assert await receive(client) == message
            await expect(rows(page)).to_have_count(2 * number + 1)
            await page.locator("#messages").focus()
            await page.keyboard.press("End")
            await page.keyboard.press("Enter")
            await page.get_by_role("button", name="Copy as curl").click()
            await expect(page.get_by_role("button", name="Copied")).to_be_visible()
            command = await page.evaluate("navigator.clipboard.readText()")
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", command)
            process = await asyncio.create_subprocess_exec("sh", "-c", f"{command} --fail --silent")
            assert await process.wait() == 0, command
            assert await receive(client) == message, command
            await page.keyboard.press("Escape")  # collapses the message
            await page.keyboard.press("Escape")  # shows new ones
            await expect(rows(page)).to_have_count(2 * number + 2)


async def test_a_copied_command_has_no_token(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(auth=jwt_settings())
    token = sign_token()
    async with console_of(relay, f"/?channel={channel}", requests_fail=True) as page:
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await enter_token(page, token)
        await await_connected(page)
        await send(page, "x" * 100_000)
        await rows(page).click()
        await page.get_by_role("button", name="Copy as curl").click()
        await expect(page.get_by_role("button", name="Copied")).to_be_visible()
        command = await page.evaluate("navigator.clipboard.readText()")
        assert token not in command
        assert '-H "Authorization: Bearer $TOKEN"' in command
        assert re.search(rf"--data-binary @{re.escape(channel)}-[0-9-]+\.txt$", command)


async def test_what_is_shown_is_exported_as_lines_of_json(
    relay: RelayProcess, channel: str, tmp_path: Path
) -> None:
    async with relay.client(channel) as client, console_of(relay, f"/?channel={channel}") as page:
        await await_connected(page)
        for message in PUBLISHED:
            await client.send(message)
        await expect(rows(page)).to_have_count(len(PUBLISHED))
        everything = await exported(page, tmp_path)
        contents = [each.get("text", each.get("base64")) for each in everything]
        assert contents == [*PUBLISHED[:3], "AP8n", *PUBLISHED[4:]]
        assert {each["channel"] for each in everything} == {channel}
        assert len({each["position"] for each in everything}) == len(PUBLISHED)
        await page.get_by_label("Kind of messages").select_option("binary")
        assert [each["base64"] for each in await exported(page, tmp_path)] == ["AP8n"]


async def exported(page: Page, directory: Path) -> list[Mapping[str, Any]]:
    """Export the messages; return the lines of the file."""
    async with page.expect_download() as started:
        await page.get_by_role("button", name="Export").click()
    download = await started.value
    assert re.fullmatch(r"messages-[0-9T-]+\.ndjson", download.suggested_filename)
    await download.save_as(directory / "exported")
    return [json.loads(line) for line in (directory / "exported").read_text().splitlines()]
