"""Use the console in a real browser."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Locator, Page, expect

from tests.support import browser
from tests.support.relay_process import RelayProcess

FAILED_REQUESTS = ("Failed to load resource", "WebSocket connection to")
"""The first words of the browser's messages about refused or unanswered requests."""


@asynccontextmanager
async def console_of(
    relay: RelayProcess, path: str = "/", *, requests_fail: bool = False
) -> AsyncIterator[Page]:
    """Open the console; fail at the end if the browser has logged an error or a warning.

    A violation of the content security policy, for example, is an error.

    Args:
        path: of the page.
        requests_fail: whether errors about refused and unanswered requests are expected.
    """
    async with browser.open_page() as page:
        errors = browser_errors(page)
        await page.goto(relay.http_url(path))
        yield page
    expected = FAILED_REQUESTS if requests_fail else ()
    assert [line for line in errors if not line.startswith(expected)] == []


def browser_errors(page: Page) -> list[str]:
    """Return a list that receives the errors and warnings of the browser."""
    errors: list[str] = []
    page.on(
        "console",
        lambda line: errors.append(line.text) if line.type in {"error", "warning"} else None,
    )
    return errors


async def connect(page: Page, channel: str, history: str = "none") -> None:
    """Fill in the form, and connect."""
    await page.get_by_role("textbox", name="Channels").fill(channel)
    await page.get_by_label("History").select_option(history)
    await page.get_by_role("button", name="Connect", exact=True).click()


RECONNECT_MS = 30_000
"""The client's pauses grow to several seconds while a relay restarts: each attempt that comes
before the relay is ready fails."""


async def await_connected(page: Page) -> None:
    """Wait until the page is connected."""
    await expect(page.locator("#state")).to_have_text("connected", timeout=RECONNECT_MS)


async def show(page: Page, tab: str | re.Pattern[str]) -> Locator:
    """Open a tab; return its panel."""
    await page.get_by_role("tab", name=tab).click()
    return page.get_by_role("tabpanel", name=tab)


async def send(page: Page, text: str) -> None:
    """Type a message, and send it."""
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def enter_token(page: Page, token: str) -> None:
    """Enter a token in the dialog."""
    await page.get_by_label("JSON Web Token").fill(token)
    await page.get_by_role("button", name="Use it").click()


def rows(page: Page) -> Locator:
    """Return the texts of the messages, without the notes between them."""
    return page.locator("#messages li:not(.note) .text")


def notes(page: Page, text: str) -> Locator:
    """Return the notes between the messages that contain a text."""
    return page.locator("#messages .note .text", has_text=text)


def tile(page: Page, title: str) -> Locator:
    """Return the value of a tile of the stats."""
    return page.locator(".tile", has=page.get_by_text(title, exact=True)).locator("dd")
