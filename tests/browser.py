"""Open pages in a real browser. Knows no relay."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Page, async_playwright

from tests.programs import CHROMIUM, needed
from tests.raw_client import PATIENCE_S

ARGUMENTS = (
    "--no-sandbox",  # CI's containers run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@asynccontextmanager
async def page() -> AsyncIterator[Page]:
    """Open an empty page; fail where a script of the page did."""
    program = needed(CHROMIUM)
    failures: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            opened = await browser.new_page()
            opened.set_default_timeout(PATIENCE_S * 1000)
            opened.on("pageerror", lambda error: failures.append(str(error)))
            yield opened
        finally:
            await browser.close()
    assert failures == []
