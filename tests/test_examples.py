"""The examples do what they say, against a real relay and in a real browser."""

import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jwt
import pytest
from playwright.async_api import Page, expect

from service.settings import Settings
from tests import browser
from tests.conftest import StartRelay
from tests.raw_client import PATIENCE_S
from tests.relay_process import ROOT, Finished, Relay, environment, receive

CLIENT_PY = ROOT / "examples" / "client.py"
CLIENT_HTML = ROOT / "examples" / "client.html"
MAKE_TOKEN_PY = ROOT / "examples" / "make_token.py"


@pytest.fixture
def secret() -> str:
    """What tokens are signed with."""
    return secrets.token_hex(32)


@pytest.fixture
def guarded_relay(relay_with: StartRelay, secret: str) -> Relay:
    """A relay that wants tokens."""
    return relay_with(auth={"mode": "jwt", "jwt": {"secret": secret}})


@contextmanager
def client_py(*arguments: str, token: str = "") -> Iterator["subprocess.Popen[str]"]:
    """Run examples/client.py with a keyboard that a test types on."""
    with subprocess.Popen(
        [sys.executable, str(CLIENT_PY), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment({"PYTHONWARNINGS": "error", "RELAY_TOKEN": token}),
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def client_py_reading(text: str, *arguments: str, token: str = "") -> Finished:
    """Run examples/client.py on an input that ends."""
    with client_py(*arguments, token=token) as process:
        stdout, stderr = process.communicate(text, timeout=PATIENCE_S)
        return Finished(process.returncode, stdout, stderr)


def make_token_py(*arguments: str) -> Finished:
    """Run examples/make_token.py."""
    done = subprocess.run(
        [sys.executable, str(MAKE_TOKEN_PY), *arguments],
        env=environment({"PYTHONWARNINGS": "error"}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def a_token(secret: str, channel: str, *, lasts_s: int = 600) -> str:
    """Sign a right to one channel."""
    rights = {"subscribe": [channel], "publish": [channel]}
    return jwt.encode({"exp": int(time.time()) + lasts_s, "relay": rights}, secret, "HS256")


def assert_kept_secret(relay: Relay, token: str) -> None:
    """See to it that no part of a token stands in the log: signatures are what matters."""
    log = "\n".join(relay.log_lines)
    assert all(part not in log for part in token.split("."))


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


async def test_client_py_brings_the_token_of_its_environment(
    guarded_relay: Relay, secret: str, channel: str
) -> None:
    token = a_token(secret, channel)
    url = guarded_relay.ws_url(f"/channels/{channel}")
    done = client_py_reading("typed\n", url, token=token)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "typed\n", "closed: 1000\n")
    assert_kept_secret(guarded_relay, token)


def test_client_py_does_not_show_a_token_that_was_refused(
    guarded_relay: Relay, channel: str
) -> None:
    token = a_token("another secret that is as long as it should be", channel)
    done = client_py_reading("", guarded_relay.ws_url(f"/channels/{channel}"), token=token)
    assert done.exit_code == 1
    (line,) = done.error_lines
    assert "HTTP 401" in line
    assert all(part not in line for part in token.split("."))
    assert_kept_secret(guarded_relay, token)


def test_make_token_py_prints_a_token_that_the_relay_accepts(
    guarded_relay: Relay, secret: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret.txt"
    file.write_text(f"{secret}\n")
    made = make_token_py(str(file), "news", "chat.*")
    assert (made.exit_code, made.stderr) == (0, "")
    for channel in ("news", "chat.lobby"):
        url = guarded_relay.ws_url(f"/channels/{channel}")
        done = client_py_reading("typed\n", url, token=made.stdout)
        assert (done.exit_code, done.stdout) == (0, "typed\n")
    elsewhere = client_py_reading("", guarded_relay.ws_url("/channels/newsroom"), token=made.stdout)
    assert "HTTP 403" in elsewhere.stderr


def test_make_token_py_says_in_one_line_how_it_is_used(tmp_path: Path) -> None:
    done = make_token_py(str(tmp_path / "secret.txt"))
    assert done.exit_code == 1
    assert done.error_lines == ["usage: python examples/make_token.py SECRET_FILE CHANNEL..."]


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


async def test_client_html_brings_a_token_and_shows_it_nowhere(
    guarded_relay: Relay, secret: str, channel: str
) -> None:
    token = a_token(secret, channel)
    async with browser.page() as page:
        await page.goto(
            f"{CLIENT_HTML.as_uri()}?url={guarded_relay.ws_url(f'/channels/{channel}')}"
        )
        await expect(page.locator("#log .note", has_text="connection lost")).to_have_count(1)
        await page.get_by_label("Token").fill(token)
        await expect(page.locator("#state")).to_have_text("closed")
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.locator("#state")).to_have_text("connected")
        await page.get_by_label("Message", exact=True).fill("typed")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#log .mine .text")).to_have_text("typed")

        assert token not in page.url
        assert token not in await page.locator("body").inner_text()
        assert await page.get_by_label("Token").get_attribute("type") == "password"
    assert_kept_secret(guarded_relay, token)


async def test_client_html_does_not_return_with_a_token_that_has_expired(
    guarded_relay: Relay, secret: str, channel: str
) -> None:
    async with browser.page() as page:
        await page.goto(
            f"{CLIENT_HTML.as_uri()}?url={guarded_relay.ws_url(f'/channels/{channel}')}"
        )
        await page.get_by_label("Token").fill(a_token(secret, channel, lasts_s=6))
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.locator("#state")).to_have_text("connected")
        lost = page.locator("#log .bad", has_text="connection lost: 3000 token expired")
        await expect(lost).to_have_count(1, timeout=PATIENCE_S * 1000)
        await expect(page.locator("#state")).to_have_text("closed")


async def test_client_html_does_not_repeat_what_is_no_token() -> None:
    async with browser.page() as page:
        await page.goto(CLIENT_HTML.as_uri())
        await page.get_by_label("Token").fill("se cret")
        await page.get_by_role("button", name="Connect", exact=True).click()
        said = page.locator("#log li:last-child .text")
        await expect(said).to_have_text("a token has letters, digits, dots, - and _ only")
        assert "se cret" not in await page.locator("body").inner_text()


def test_client_html_names_no_outside_resource() -> None:
    assert re.findall(r"(?:src|href)=|https?://|@import|url\(", CLIENT_HTML.read_text()) == []
