"""The examples, with a real relay and in a real browser."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Literal

import jwt
import pytest
from playwright.async_api import Locator, Page, expect
from websocket_relay.config.model import Settings
from websockets.asyncio.server import ServerConnection, serve

from tests.support import browser
from tests.support.addresses import INVALID_URLS
from tests.support.issuer import channel_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    ROOT,
    CommandResult,
    RelayProcess,
    StartRelay,
    environment,
    receive,
)

pytestmark = browser.SHARED

CLIENT_PY = ROOT / "examples" / "client.py"
CLIENT_HTML = ROOT / "examples" / "client.html"
MAKE_TOKEN_PY = ROOT / "examples" / "make_token.py"


@contextmanager
def client_py(*arguments: str, token: str = "") -> Iterator["subprocess.Popen[str]"]:
    """Run examples/client.py with an open standard input."""
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


def run_client_py(text: str, *arguments: str, token: str = "") -> CommandResult:
    """Run examples/client.py on an input that ends; return the result."""
    with client_py(*arguments, token=token) as process:
        stdout, stderr = process.communicate(text, timeout=PATIENCE_S)
        return CommandResult(process.returncode, stdout, stderr)


def make_token_py(*arguments: str) -> CommandResult:
    """Run examples/make_token.py."""
    done = subprocess.run(
        [sys.executable, str(MAKE_TOKEN_PY), *arguments],
        env=environment({"PYTHONWARNINGS": "error"}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


@asynccontextmanager
async def serve_response(head: str, body: str = "") -> AsyncIterator[str]:
    """Answer requests as a proxy without a relay does; yield the URL."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        lines = [*head.splitlines(), f"Content-Length: {len(body)}", "", body]
        writer.write("\r\n".join(lines).encode())
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


def assert_kept_secret(relay: RelayProcess, token: str) -> None:
    """See to it that no part of a token stands in the log: signatures are what matters."""
    log = "\n".join(relay.log_lines)
    assert all(part not in log for part in token.split("."))


@pytest.mark.fast
def test_both_examples_have_the_default_url_of_the_relay() -> None:
    url = f"ws://localhost:{Settings().server.port}/"
    assert f'DEFAULT_URL = "{url}"' in CLIENT_PY.read_text()
    assert f'DEFAULT_URL = "{url}"' in CLIENT_HTML.read_text()


async def test_client_py_sends_what_it_reads_and_prints_what_arrives(
    relay: RelayProcess, channel: str
) -> None:
    with client_py(relay.ws_url(f"/channels/{channel}")) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await relay.await_metric("websocket_connected_clients", 1)
        async with relay.client(channel) as other:
            print("typed", file=process.stdin, flush=True)
            assert await receive(other) == "typed"
            assert process.stdout.readline() == "typed\n"
            await other.send("from elsewhere")
            assert process.stdout.readline() == "from elsewhere\n"


def test_client_py_prints_all_its_messages_before_it_ends(
    relay: RelayProcess, channel: str
) -> None:
    text = "".join(f"line {number}\n" for number in range(3000))
    done = run_client_py(text, relay.ws_url(f"/channels/{channel}"))
    assert (done.exit_code, done.stdout, done.stderr) == (0, text, "closed: 1000\n")


async def test_client_py_prints_why_the_relay_closed_the_connection(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    with client_py(relay.ws_url()) as process:
        await relay.await_metric("websocket_connected_clients", 1)
        relay.signal(signal.SIGTERM)
        # The end must not wait for a line of the standard input.
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr is not None
        assert re.fullmatch(r"closed: 1001 draining; retry_ms=\d+\n", process.stderr.read())


def test_client_py_prints_one_line_without_a_relay() -> None:
    done = run_client_py("", "ws://127.0.0.1:1/")
    assert done.exit_code == 1
    assert done.error_lines == ["ws://127.0.0.1:1/: [Errno 111] Connection refused"]


def test_client_py_prints_the_reason_of_a_refusal_in_one_line(
    jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    address = jwt_relay.ws_url(f"/channels/{channel}")
    expired = channel_token(secret, channel, lasts_s=-600)
    done = run_client_py("", f"{address}?access_token={expired}")
    assert done.exit_code == 1
    assert done.error_lines == [f"{address}: HTTP 401, invalid token: expired"]


def test_client_py_prints_after_which_delay_to_retry(relay_with: StartRelay) -> None:
    url = relay_with(limits={"max_connections": 1}).ws_url()
    with client_py(url) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        print("typed", file=first.stdin, flush=True)
        assert first.stdout.readline() == "typed\n"
        done = run_client_py("", url)
    assert done.exit_code == 1
    (line,) = done.error_lines
    start = re.escape(f"{url}: HTTP 503, too many connections; retry after ")
    assert re.fullmatch(rf"{start}\d+ s", line)


async def test_client_py_prints_the_response_of_a_proxy_in_one_line() -> None:
    when = "Fri, 31 Dec 1999 23:59:59 GMT"
    head = f"HTTP/1.1 502 Bad Gateway\nContent-Type: text/html\nRetry-After: {when}"
    async with serve_response(head, "<html>\n<h1>It is the gateway</h1>\n") as url:
        done = await asyncio.to_thread(run_client_py, "", url)
    assert done.exit_code == 1
    assert done.error_lines == [f"{url}: HTTP 502, Bad Gateway; retry after {when}"]


async def test_client_py_prints_no_token_of_the_url_of_a_redirect() -> None:
    head = "HTTP/1.1 301 Moved Permanently\nLocation: https://localhost/?access_token=se.cr.et"
    async with serve_response(head) as url:
        done = await asyncio.to_thread(run_client_py, "", f"{url}?access_token=se.cr.et")
    assert done.exit_code == 1
    assert done.error_lines == [f"{url}: HTTP 301, Moved Permanently"]


def test_client_py_prints_neither_query_nor_password_of_a_url() -> None:
    done = run_client_py("", "ws://me:pass@127.0.0.1:1/channels/news?access_token=se.cr.et")
    assert done.exit_code == 1
    assert done.error_lines == ["ws://127.0.0.1:1/channels/news: [Errno 111] Connection refused"]


@pytest.mark.parametrize("url", [*INVALID_URLS, "ws://secret@localhost/"])
def test_client_py_reports_an_invalid_url_in_one_line(url: str) -> None:
    done = run_client_py("", url)
    assert done.exit_code == 2
    assert done.error_lines == ["not a channel URL such as ws://localhost:8443/channels/news"]


@pytest.mark.parametrize("token", ["se cret", "se\ncret", "s\u20accret"])
def test_client_py_does_not_send_an_invalid_token(token: str) -> None:
    done = run_client_py("", "ws://127.0.0.1:1/", token=token)
    assert done.exit_code == 2
    assert done.error_lines == ["RELAY_TOKEN: a token has letters, digits, dots, - and _ only"]


async def test_client_py_ends_quietly_with_ctrl_c() -> None:
    codes: asyncio.Queue[int | None] = asyncio.Queue()

    async def listen(websocket: ServerConnection) -> None:
        await websocket.send("welcome")
        await websocket.wait_closed()
        codes.put_nowait(websocket.close_code)

    async with serve(listen, "127.0.0.1", 0) as server:
        (port,) = {found.getsockname()[1] for found in server.sockets}
        with client_py(f"ws://127.0.0.1:{port}/") as process:
            assert process.stdout is not None
            line = await asyncio.to_thread(process.stdout.readline)
            assert line == "welcome\n"
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(codes.get(), PATIENCE_S) == 1000
            stdout, stderr = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    assert (process.returncode, stdout, stderr) == (130, "", "")


def test_client_py_ends_quietly_with_ctrl_c_before_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        with client_py(f"ws://127.0.0.1:{silent.getsockname()[1]}/") as process:
            connection, _ = silent.accept()
            with connection:
                connection.settimeout(PATIENCE_S)
                assert connection.recv(1)
                process.send_signal(signal.SIGINT)
                stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stdout, stderr) == (130, "", "")


def test_client_py_reports_that_it_is_not_allowed_to_publish(
    jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel, may_publish=False)
    url = jwt_relay.ws_url(f"/channels/{channel}")
    done = run_client_py("typed\n", url, token=token)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.error_lines == ["closed: 1008 not allowed to publish"]


async def test_client_py_sends_the_token_of_its_environment(
    jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel)
    url = jwt_relay.ws_url(f"/channels/{channel}")
    done = run_client_py("typed\n", url, token=token)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "typed\n", "closed: 1000\n")
    assert_kept_secret(jwt_relay, token)


def test_client_py_does_not_print_a_refused_token(jwt_relay: RelayProcess, channel: str) -> None:
    token = channel_token("another secret that is as long as it should be", channel)
    done = run_client_py("", jwt_relay.ws_url(f"/channels/{channel}"), token=token)
    assert done.exit_code == 1
    (line,) = done.error_lines
    assert "HTTP 401" in line
    assert all(part not in line for part in token.split("."))
    assert_kept_secret(jwt_relay, token)


def test_make_token_py_prints_a_token_that_the_relay_accepts(
    jwt_relay: RelayProcess, secret: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret.txt"
    file.write_text(f"{secret}\n")
    made = make_token_py(str(file), "news", "chat.*")
    assert (made.exit_code, made.stderr) == (0, "")
    for channel in ("news", "chat.lobby"):
        url = jwt_relay.ws_url(f"/channels/{channel}")
        done = run_client_py("typed\n", url, token=made.stdout)
        assert (done.exit_code, done.stdout) == (0, "typed\n")
    elsewhere = run_client_py("", jwt_relay.ws_url("/channels/newsroom"), token=made.stdout)
    assert "HTTP 403" in elsewhere.stderr


def test_make_token_py_prints_its_usage(tmp_path: Path) -> None:
    for arguments in ((), (str(tmp_path / "secret.txt"),)):
        done = make_token_py(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        usage, problem = done.error_lines
        assert usage.startswith("usage: make_token.py ")
        assert "required" in problem


def test_make_token_py_shows_commands_that_keep_the_files_secret(tmp_path: Path) -> None:
    asked = make_token_py("--help")
    assert (asked.exit_code, asked.stderr) == (0, "")
    _, _, example = asked.stdout.partition("example (")
    _, *commands = example.replace("python ", f"{sys.executable} ").splitlines()
    commands = [line.replace("examples/", f"{MAKE_TOKEN_PY.parent}/") for line in commands]
    subprocess.run(
        ["sh", "-ec", "\n".join(commands)],
        cwd=tmp_path,
        env=environment({"PYTHONWARNINGS": "error"}),
        timeout=PATIENCE_S,
        check=True,
    )
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"secret.txt": 0o600, "token.txt": 0o600}
    secret = (tmp_path / "secret.txt").read_text().strip()
    token = (tmp_path / "token.txt").read_text().strip()
    claims = jwt.decode(token, secret, algorithms=["HS256"])
    assert claims["relay"] == {"subscribe": ["news", "chat.*"], "publish": ["news", "chat.*"]}


def test_make_token_py_reports_an_unreadable_file_in_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "secret.txt"
    for file, why in ((missing, "No such file or directory"), (tmp_path, "Is a directory")):
        done = make_token_py(str(file), "news")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.error_lines == [f"{file}: {why}"]


@pytest.mark.parametrize(
    "content", [b"\n", b"\xff\xfe", b"-----BEGIN PUBLIC KEY-----\nYWJj\n-----END PUBLIC KEY-----\n"]
)
def test_make_token_py_reports_a_file_without_a_secret_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "secret.txt"
    file.write_bytes(content)
    done = make_token_py(str(file), "news")
    assert (done.exit_code, done.stdout) == (1, "")
    why = "not a secret: empty, not UTF-8 text, or a key of another type"
    assert done.error_lines == [f"{file}: {why}"]


async def open_client(page: Page, url: str) -> None:
    await page.goto(f"{CLIENT_HTML.as_uri()}?url={url}")
    await expect(page.locator("#state")).to_have_text("connected")


async def send(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.get_by_role("button", name="Send").click()


def note(page: Page, text: str) -> Locator:
    return page.locator("#log .note .text", has_text=text)


async def shown_text(page: Page) -> str:
    """Return the text of the page and of its fields, except password fields."""
    fields = await page.locator("input:not([type=password])").all()
    return "\n".join([await page.content(), *[await field.input_value() for field in fields]])


async def test_client_html_sends_and_shows_what_arrives(relay: RelayProcess, channel: str) -> None:
    async with browser.open_page() as page, relay.client(channel) as other:
        await open_client(page, relay.ws_url(f"/channels/{channel}"))
        await send(page, "typed <b>here</b>")
        await expect(page.locator("#log .mine .text")).to_have_text("typed <b>here</b>")
        assert await receive(other) == "typed <b>here</b>"

        await other.send("from elsewhere")
        await expect(page.locator("#log li:last-child .text")).to_have_text("from elsewhere")
        await other.send(b"\x00\xff")
        await expect(page.locator("#log li:last-child .text")).to_have_text("00 ff")

        await page.get_by_role("button", name="Disconnect").click()
        await relay.await_metric("websocket_connected_clients", 1)


async def test_client_html_reconnects_after_a_restart_of_the_relay(
    relay_with: StartRelay,
) -> None:
    async with browser.open_page() as page:
        relay = relay_with(shutdown={"spread_s": 0})
        await open_client(page, relay.ws_url())
        await relay.stop()
        lost = page.locator("#log .note", has_text="connection lost: 1001 draining; retry_ms=")
        await expect(lost).to_have_count(1)

        again = relay_with(server={"port": relay.port})
        await expect(page.locator("#state")).to_have_text("connected")
        await again.await_metric("websocket_connected_clients", 1)


async def test_client_html_waits_for_the_delay_in_the_close_reason() -> None:
    async with browser.open_page() as page:
        await page.goto(CLIENT_HTML.as_uri())
        wait = "reason => waitBefore({code: 1001, reason})"
        assert await page.evaluate(wait, "draining; retry_ms=4321") == 4321
        assert 250 <= await page.evaluate(wait, "no delay") <= 30_000


async def test_client_html_sends_a_token_and_shows_it_nowhere(
    jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel)
    async with browser.open_page() as page:
        await page.goto(f"{CLIENT_HTML.as_uri()}?url={jwt_relay.ws_url(f'/channels/{channel}')}")
        await expect(note(page, "could not connect")).to_contain_text("a token is needed")
        await page.get_by_label("Token").fill(token)
        await expect(page.locator("#state")).to_have_text("closed")
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.locator("#state")).to_have_text("connected")
        await send(page, "typed")
        await expect(page.locator("#log .mine .text")).to_have_text("typed")

        assert token not in page.url
        assert token not in await page.locator("body").inner_text()
        assert await page.get_by_label("Token").get_attribute("type") == "password"
    assert_kept_secret(jwt_relay, token)


async def test_client_html_does_not_reconnect_with_an_expired_token(
    jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    async with browser.open_page() as page:
        await page.goto(f"{CLIENT_HTML.as_uri()}?url={jwt_relay.ws_url(f'/channels/{channel}')}")
        await page.get_by_label("Token").fill(channel_token(secret, channel, lasts_s=6))
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.locator("#state")).to_have_text("connected")
        lost = page.locator("#log .bad", has_text="connection lost: 3000 token expired")
        await expect(lost).to_have_count(1)
        await expect(page.locator("#state")).to_have_text("closed")


async def test_client_html_does_not_show_an_invalid_token() -> None:
    async with browser.open_page() as page:
        await page.goto(CLIENT_HTML.as_uri())
        await page.get_by_label("Token").fill("se cret")
        await page.get_by_role("button", name="Connect", exact=True).click()
        shown = page.locator("#log li:last-child .text")
        await expect(shown).to_have_text("a token has letters, digits, dots, - and _ only")
        assert "se cret" not in await page.locator("body").inner_text()


async def test_client_html_shows_the_likely_reasons_of_a_failed_connection() -> None:
    async with browser.open_page() as page:
        await page.goto(f"{CLIENT_HTML.as_uri()}?url=ws://127.0.0.1:9/?access_token=se.cr.et")
        await expect(note(page, "could not connect")).to_have_text(
            "could not connect to ws://127.0.0.1:9/ (likely reasons: no relay there;"
            " the token is not accepted; this page's origin is not allowed)"
        )
        await expect(note(page, "connection lost")).to_have_count(0)


async def test_client_html_distinguishes_a_lost_connection_from_a_failed_one(
    relay_with: StartRelay,
) -> None:
    async with browser.open_page() as page:
        relay = relay_with(shutdown={"spread_s": 0})
        await open_client(page, relay.ws_url())
        relay.signal(signal.SIGKILL)
        # The first reconnection fails too, and has a line of its own.
        lines = page.locator("#log .bad .text")
        await expect(lines).to_have_text(["connection lost: 1006", re.compile("could not connect")])


async def test_client_html_shows_no_query_of_a_url(
    jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel)
    address = jwt_relay.ws_url(f"/channels/{channel}")
    async with browser.open_page() as page:
        await open_client(page, f"{address}?access_token={token}")
        await expect(note(page, "connected to")).to_have_text(f"connected to {address}")
        await expect(page.locator("#url")).to_have_value(f"{address}?…")
        assert token not in await shown_text(page)

        # The query that the field hides is still sent, and a query that is typed is hidden too.
        await page.get_by_role("button", name="Disconnect").click()
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.locator("#state")).to_have_text("connected")
        await page.get_by_role("button", name="Disconnect").click()
        another = channel_token(secret, channel, may_publish=False)
        await page.locator("#url").fill(f"{address}?access_token={another}")
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.locator("#state")).to_have_text("connected")
        assert another not in await shown_text(page)
        await send(page, "typed")
        await expect(note(page, "not allowed to publish")).to_have_count(1)
        await expect(page.locator("#state")).to_have_text("connected")

        # And the mark goes with what it stands for.
        await page.get_by_role("button", name="Disconnect").click()
        await page.locator("#url").fill(address)
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(note(page, "could not connect")).to_contain_text("a token is needed")


async def test_client_html_hides_the_query_of_an_address_as_soon_as_it_is_pasted() -> None:
    async with browser.open_page() as page:
        await page.goto(CLIENT_HTML.as_uri())
        pasted = "ws://127.0.0.1:9/?access_token=se.cr.et"
        await page.locator("#url").evaluate(
            """(field, pasted) => {
                field.value = pasted;
                field.dispatchEvent(new InputEvent("input", {inputType: "insertFromPaste"}));
            }""",
            pasted,
        )
        await expect(page.locator("#url")).to_have_value("ws://127.0.0.1:9/?…")


@pytest.mark.parametrize("url", ["what?access_token=se.cr.et", "ws://[?access_token=se.cr.et"])
async def test_client_html_does_not_repeat_what_is_no_address(url: str) -> None:
    async with browser.open_page() as page:
        await page.goto(f"{CLIENT_HTML.as_uri()}?url={url}")
        shown = page.locator("#log .bad .text")
        await expect(shown).to_have_text(
            "not a channel URL such as ws://localhost:8443/channels/news"
        )
        await expect(page.locator("#state")).to_have_text("closed")
        assert "se.cr.et" not in await shown_text(page)


async def test_client_html_shows_why_messages_were_not_relayed(
    jwt_relay: RelayProcess, secret: str, channel: str
) -> None:
    token = channel_token(secret, channel, may_publish=False)
    address = jwt_relay.ws_url(f"/channels/{channel}")
    async with browser.open_page() as page:
        await open_client(page, f"{address}?access_token={token}")
        await send(page, "typed")
        await expect(page.locator("#log .bad .text")).to_have_text(
            "closed by the relay; 1 message was not relayed: not allowed to publish (1008)"
        )
        await expect(note(page, "connected to")).to_have_count(2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_client_html_fits_a_narrow_screen_in_light_and_dark_colours(
    relay: RelayProcess, channel: str, scheme: Literal["light", "dark"]
) -> None:
    async with browser.open_page() as page:
        await page.set_viewport_size({"width": 320, "height": 480})
        await page.emulate_media(color_scheme=scheme)
        await open_client(page, relay.ws_url(f"/channels/{channel}"))
        await send(page, "a word that is longer than the screen is wide: " + "x" * 200)
        await expect(page.locator("#log .mine")).to_have_count(1)
        assert await page.get_by_label("Token").get_attribute("placeholder")
        sizes = "({scrollWidth, scrollHeight}) => [scrollWidth, scrollHeight]"
        assert await page.locator("html").evaluate(sizes) == [320, 480]
        assert await page.locator("#log").evaluate("log => log.scrollWidth - log.clientWidth") == 0
        colours = "body => [getComputedStyle(body).color, getComputedStyle(body).backgroundColor]"
        text, background = (
            sum(map(int, re.findall(r"\d+", colour)))
            for colour in await page.locator("body").evaluate(colours)
        )
        assert (text < background) is (scheme == "light")


@pytest.mark.fast
def test_client_html_names_no_outside_resource() -> None:
    assert re.findall(r"(?:src|href)=|https?://|@import|url\(", CLIENT_HTML.read_text()) == []
