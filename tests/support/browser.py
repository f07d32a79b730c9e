"""Run a real browser and open pages in it. Knows no relay."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.programs import CHROMIUM, needed
from tests.support.raw_client import PATIENCE_S

ARGUMENTS = (
    "--no-sandbox",  # CI's containers run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

expect.set_options(timeout=PATIENCE_S * 1000)

SHARED = pytest.mark.usefixtures("shared_browser")
"""Mark of a module whose tests share one browser, each with a context of its own: the start of a
browser costs more than most tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> None:
    """Run the tests that share a browser in the event loop of that browser.

    The test needs the mark before pytest-asyncio parametrizes it with the factory of its loop:
    the parameter's scope is that of the loop, and its end closes the loop and the browser.
    """
    if not collector.funcnamefilter(name) or not inspect.iscoroutinefunction(obj):
        return
    if SHARED.mark in (*getattr(obj, "pytestmark", ()), *collector.iter_markers()):
        pytest.mark.asyncio(loop_scope="session")(obj)


class SharedBrowser:
    """The browser of one event loop. It starts at its first use."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stack = AsyncExitStack()
        self._browser: Browser | None = None

    @asynccontextmanager
    async def keep(self) -> AsyncIterator[None]:
        """Serve this event loop; close the browser at the end of the block."""
        async with self._stack:
            self._loop = asyncio.get_running_loop()
            self._browser = None  # an earlier one that could not be closed counts as connected
            yield
            self._loop = None

    @asynccontextmanager
    async def browser(self) -> AsyncIterator[Browser]:
        """Yield the shared browser, or a new one in another event loop."""
        if self._loop is not asyncio.get_running_loop():
            async with launch_browser() as browser:
                yield browser
            return
        if self._browser is None or not self._browser.is_connected():
            self._browser = await self._stack.enter_async_context(launch_browser())
        yield self._browser


SHARED_BROWSER = SharedBrowser()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_browser() -> AsyncIterator[None]:
    """Close the shared browser after the last test that uses it."""
    async with SHARED_BROWSER.keep():
        yield


@asynccontextmanager
async def launch_browser() -> AsyncIterator[Browser]:
    """Start a browser, and close it at the end of the block."""
    program = needed(CHROMIUM)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def open_page() -> AsyncIterator[Page]:
    """Open an empty page; fail at the end if a script of the page raised an error."""

    failures: list[str] = []
    async with (
        SHARED_BROWSER.browser() as browser,
        await browser.new_context(reduced_motion="reduce") as context,
    ):
        opened = await context.new_page()
        opened.set_default_timeout(PATIENCE_S * 1000)
        opened.on("pageerror", lambda error: failures.append(str(error)))
        yield opened
        # An answer to a request of a closed page raises, in whichever test is the next one.
        await opened.unroute_all(behavior="wait")
    assert failures == []
