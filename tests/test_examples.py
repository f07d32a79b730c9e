"""The examples do what they say, against a real relay and in a real browser."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.async_api import Page, expect

from service.settings import Settings
from tests import browser
from tests.conftest import StartRelay
from tests.raw_client import PATIENCE_S
from tests.relay_process import ROOT, Finished, Relay, environment, receive

CLIENT_PY = ROOT / "examples" / "client.py"
CLIENT_HTML = ROOT / "examples" / "client.html"


@contextmanager
def client_py(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run examples/client.py with a keyboard that a test types on."""
    with subprocess.Popen(
        [sys.executable, str(CLIENT_PY), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment({"PYTHONWARNINGS": "error"}),
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def client_py_reading(text: str, *arguments: str) -> Finished:
    """Run examples/client.py on an input that ends."""
    with client_py(*arguments) as process:
        stdout, stderr = process.communicate(text, timeout=PATIENCE_S)
        return Finished(process.returncode, stdout, stderr)


def test_both_examples_know_the_relay_s_default_address() -> None:
    url = f"ws://localhost:{Settings().server.port}/"
    assert f'DEFAULT_URL = "{url}"' in CLIENT_PY.read_text()
    assert f'DEFAULT_URL = "{url}"' in CLIENT_HTML.read_text()


async def test_client_py_sends_what_it_reads_and_prints_what_arrives(
    relay: Relay, channel: str
) -> None:
    with client_py(relay.ws_url(f"/channels/{channel}")) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await relay.metric_is("websocket_connected_clients", 1)
        async with relay.client(channel) as other:
            print("typed", file=process.stdin, flush=True)
            assert await receive(other) == "typed"
            assert process.stdout.readline() == "typed\n"
            await other.send("from elsewhere")
            assert process.stdout.readline() == "from elsewhere\n"


def test_client_py_prints_everything_it_sent_before_it_ends(relay: Relay, channel: str) -> None:
    text = "".join(f"line {number}\n" for number in range(3000))
    done = client_py_reading(text, relay.ws_url(f"/channels/{channel}"))
    assert (done.exit_code, done.stdout, done.stderr) == (0, text, "closed: 1000\n")


async def test_client_py_says_why_the_relay_closed_it(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    with client_py(relay.ws_url()) as process:
        await relay.metric_is("websocket_connected_clients", 1)
        relay.signal(signal.SIGTERM)
        # Nobody presses a key: its end must not wait for the keyboard.
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr is not None
        assert re.fullmatch(r"closed: 1001 draining; retry_ms=\d+\n", process.stderr.read())


def test_client_py_says_in_one_line_that_there_is_no_relay() -> None:
    done = client_py_reading("", "ws://127.0.0.1:1/")
    assert done.exit_code == 1
    assert done.error_lines == ["ws://127.0.0.1:1/: [Errno 111] Connection refused"]


def test_client_py_says_in_one_line_that_it_was_refused(relay: Relay) -> None:
    done = client_py_reading("", relay.ws_url("/no/such/path"))
    assert done.exit_code == 1
    (line,) = done.error_lines
    assert "HTTP 404" in line


async def opened(page: Page, url: str) -> None:
    await page.goto(f"{CLIENT_HTML.as_uri()}?url={url}")
    await expect(page.locator("#state")).to_have_text("connected")


async def test_client_html_sends_and_shows_what_arrives(relay: Relay, channel: str) -> None:
    async with browser.page() as page, relay.client(channel) as other:
        await opened(page, relay.ws_url(f"/channels/{channel}"))
        await page.get_by_label("Message", exact=True).fill("typed <b>here</b>")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#log .mine .text")).to_have_text("typed <b>here</b>")
        assert await receive(other) == "typed <b>here</b>"

        await other.send("from elsewhere")
        await expect(page.locator("#log li:last-child .text")).to_have_text("from elsewhere")
        await other.send(b"\x00\xff")
        await expect(page.locator("#log li:last-child .text")).to_have_text("00 ff")

        await page.get_by_role("button", name="Disconnect").click()
        await relay.metric_is("websocket_connected_clients", 1)


async def test_client_html_returns_when_the_relay_that_stopped_is_back(
    relay_with: StartRelay,
) -> None:
    async with browser.page() as page:
        relay = relay_with(shutdown={"spread_s": 0})
        await opened(page, relay.ws_url())
        await relay.stop()
        lost = page.locator("#log .note", has_text="connection lost: 1001 draining; retry_ms=")
        await expect(lost).to_have_count(1)

        again = relay_with(server={"port": relay.port})
        await expect(page.locator("#state")).to_have_text("connected")
        await again.metric_is("websocket_connected_clients", 1)


async def test_client_html_waits_as_long_as_the_relay_told_it() -> None:
    async with browser.page() as page:
        await page.goto(CLIENT_HTML.as_uri())
        wait = "reason => waitBefore({code: 1001, reason})"
        assert await page.evaluate(wait, "draining; retry_ms=4321") == 4321
        assert 250 <= await page.evaluate(wait, "no word of it") <= 30_000


def test_client_html_names_no_outside_resource() -> None:
    assert re.findall(r"(?:src|href)=|https?://|@import|url\(", CLIENT_HTML.read_text()) == []
