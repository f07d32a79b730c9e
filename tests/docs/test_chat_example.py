"""examples/chat runs as its README describes, in two browsers."""

from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.support import browser
from tests.support.pages import PageReader
from tests.support.relay_process import ROOT

pytestmark = browser.SHARED

EXAMPLE = Path("examples", "chat")
ADDRESS = "http://localhost:8000/"


async def log_in(reader: PageReader, user: str) -> Page:
    """Open the chat in a browser of its own, and log in."""
    page = (await reader.open_page(ADDRESS)).page
    await page.get_by_label("Your name").fill(user)
    await page.get_by_role("button", name="Log in").click()
    await expect(page.locator("#people")).to_contain_text(user)
    return page


async def send(page: Page, text: str) -> None:
    """Send a message."""
    await page.get_by_label("Message").fill(text)
    await page.get_by_role("button", name="Send").click()


@pytest.mark.timeout(120)
async def test_two_users_see_each_other_join_type_chat_and_leave(
    reader: PageReader, project: Path
) -> None:
    for file in (project / EXAMPLE).iterdir():
        file.write_text(reader.with_own_ports(file.read_text()))
    async with reader:
        await reader.follow(ROOT / EXAMPLE / "README.md")
        ada = await log_in(reader, "ada")
        bob = await log_in(reader, "bob")
        await expect(ada.locator("#people")).to_have_text("ada, bob")
        await expect(bob.locator("#people")).to_have_text("ada, bob")
        await expect(ada.locator("#log li")).to_have_text(["bob joined"])

        await bob.get_by_label("Message").press_sequentially("hello")
        await expect(ada.locator("#typing")).to_have_text("bob is typing …")
        await expect(bob.locator("#typing")).to_have_text("")
        await bob.get_by_role("button", name="Send").click()
        await expect(ada.locator("#typing")).to_have_text("")
        await send(ada, "hello, bob <b>!</b>")
        lines = ["bob: hello", "ada: hello, bob <b>!</b>"]
        await expect(bob.locator("#log li")).to_have_text(lines)
        await expect(ada.locator("#log li")).to_have_text(["bob joined", *lines])

        await bob.get_by_role("button", name="Log out").click()
        await expect(bob.get_by_label("Your name")).to_be_visible()
        await expect(ada.locator("#people")).to_have_text("ada")
        await expect(ada.locator("#log li:last-child")).to_have_text("bob left")
        webhooks = ["left chat.lobby bob 1000", "joined chat.lobby bob", "joined chat.lobby ada"]
        await expect(ada.locator("#webhooks li")).to_have_text([*webhooks, "occupied chat.lobby"])
        unsigned = await ada.request.post(f"{ada.url}webhooks", data={"events": []})
        assert unsigned.status == 401
