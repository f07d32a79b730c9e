"""Open pages in a real browser. Knows no relay."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Page, async_playwright

from tests.raw_client import PATIENCE_S

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",  # CI's containers run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def executable() -> str:
    """Return the path of the machine's Chromium; skip the test where there is none, but in CI."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is not None:
        return found
    absent = "no Chromium on this machine (Debian: apt-get install chromium)"
    if os.environ.get("CI"):
        pytest.fail(absent)
    pytest.skip(absent)


@asynccontextmanager
async def page() -> AsyncIterator[Page]:
    """Open an empty page; fail where a script of the page did."""
    failures: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable(), args=list(ARGUMENTS)
        )
        try:
            opened = await browser.new_page()
            opened.set_default_timeout(PATIENCE_S * 1000)
            opened.on("pageerror", lambda error: failures.append(str(error)))
            yield opened
        finally:
            await browser.close()
    assert failures == []
