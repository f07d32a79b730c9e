"""Open pages in a real browser. Knows no relay."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

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

SHARED = pytest.mark.usefixtures("shared_browser")
"""Marks a module whose tests use one browser, each with a context of its own: to start one costs
more than most tests do."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that share a browser the event loop that it belongs to."""
    for item in items:
        if not isinstance(item, pytest.Function) or "shared_browser" not in item.fixturenames:
            continue
        if inspect.iscoroutinefunction(item.obj):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


class SharedBrowser:
    """The browser of one event loop, started when it is first needed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stack = AsyncExitStack()
        self._browser: Browser | None = None

    @asynccontextmanager
    async def keep(self) -> AsyncIterator[None]:
        """Keep the browser of this event loop until the block is left."""
        async with self._stack:
            self._loop = asyncio.get_running_loop()
            yield
            self._loop = None

    @asynccontextmanager
    async def browser(self) -> AsyncIterator[Browser]:
        """Give the browser that is kept, or else a new one."""
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
    """Keep one browser for the tests that share it."""
    async with SHARED_BROWSER.keep():
        yield


@asynccontextmanager
async def launch_browser() -> AsyncIterator[Browser]:
    """Start a browser."""
    program = needed(CHROMIUM)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def open_page() -> AsyncIterator[Page]:
    """Open an empty page; fail where a script of the page did."""
    failures: list[str] = []
    async with (
        SHARED_BROWSER.browser() as browser,
        await browser.new_context(reduced_motion="reduce") as context,
    ):
        opened = await context.new_page()
        opened.set_default_timeout(PATIENCE_S * 1000)
        opened.on("pageerror", lambda error: failures.append(str(error)))
        yield opened
    assert failures == []
