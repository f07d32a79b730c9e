"""The tutorial can be followed, and its page works in a real browser as described."""

import pytest
from playwright.async_api import Page, expect

from tests.support import browser
from tests.support.pages import PageReader, fenced_blocks
from tests.support.relay_process import ROOT
from tests.support.terminal import COMMAND_S

pytestmark = browser.SHARED

TUTORIAL = ROOT / "docs" / "tutorial.md"
SECTIONS = (
    "start",
    "write-the-page",
    "publish-from-a-backend",
    "without-a-framework",
    "with-fastapi",
    "restart-the-relay",
)
GAP = "(messages may be missing here)"


async def send(window: Page, text: str) -> None:
    await window.locator("input").fill(text)
    await window.locator("input").press("Enter")


async def all_show(windows: tuple[Page, ...], *texts: str) -> None:
    """Wait until the lists of all windows are these messages, the newest first."""
    for window in windows:
        await expect(window.locator("li")).to_have_text(texts)


async def all_are(windows: tuple[Page, ...], state: str) -> None:
    for window in windows:
        await expect(window.locator("output")).to_have_text(state, timeout=COMMAND_S * 1000)


@pytest.mark.timeout(240)
async def test_messages_of_a_window_and_of_a_backend_arrive_in_both_windows(
    reader: PageReader,
) -> None:
    start, page, with_curl, without_framework, with_fastapi, restart = SECTIONS
    async with reader:
        await reader.follow(TUTORIAL, start, page)
        windows = tuple([(await reader.open_page("http://localhost:8000/")).page for _ in range(2)])
        first, second = windows
        await all_are(windows, "open")
        messages = ["hello from a window"]
        await send(first, "hello from a window")
        await all_show(windows, *messages)
        await second.reload()
        await all_show(windows, *messages)

        for section, message in (
            (with_curl, "hello from curl"),
            (without_framework, "hello from Python"),
            (with_fastapi, "order 17 is shipped"),
        ):
            await reader.follow(TUTORIAL, section)
            messages.insert(0, message)
            await all_show(windows, *messages)

        await reader.press_ctrl_c("make run")
        await all_are(windows, "waiting")
        await send(first, "queued")
        await reader.follow(TUTORIAL, restart)
        await all_are(windows, "open")
        await all_show(windows, "queued", GAP, *messages)
        await first.reload()
        await all_show((first,), "queued")


def test_no_block_of_the_tutorial_is_left_out() -> None:
    assert {block.section for block in fenced_blocks(TUTORIAL.read_text())} == set(SECTIONS)
