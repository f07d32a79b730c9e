"""relay.js as an npm package: packed, installed, and built into a page of React; and in Node."""

import asyncio
import functools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.async_api import Locator, expect

from tests.support import browser, programs
from tests.support.relay_js_page import RELAY_JS
from tests.support.relay_process import RelayProcess, StartRelay, receive
from tests.support.relay_v1 import publish_all
from tests.support.tools import node, npm_command, npm_modules

pytestmark = browser.SHARED

PACKAGE = RELAY_JS.parent
REACT_PAGE = Path(browser.__file__).with_name("react_page")

RUN_S = 100
"""Compilers take some seconds, and much longer on a busy machine."""


def run(*command: str, directory: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; return its output."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pack(directory: Path) -> Path:
    """Pack the package into a directory; return the archive."""
    npm = str(programs.needed(programs.NPM))
    arguments = ("pack", "--json", "--pack-destination", str(directory))
    (packed,) = json.loads(run(npm, *arguments, directory=PACKAGE))
    assert {each["path"] for each in packed["files"]} == {"package.json", "relay.js", "relay.d.ts"}
    return directory / str(packed["filename"])


def build_react_page(directory: Path) -> Path:
    """Install the packed package into the page, check its types, and build it.

    Returns:
        The folder of the built page.
    """
    page = directory / "page"
    shutil.copytree(REACT_PAGE, page)
    (directory / "node_modules").symlink_to(npm_modules())
    npm = str(programs.needed(programs.NPM))
    quiet = ("--no-save", "--offline", "--no-audit", "--no-fund", "--ignore-scripts")
    run(npm, "install", *quiet, str(pack(directory)), directory=page)
    run(*npm_command("tsc"), directory=page)
    env = os.environ | {"NODE_ENV": "development"}  # otherwise strict mode changes nothing
    run(*npm_command("vite"), "build", "--base", "./", directory=page, env=env)
    return page / "dist"


@contextmanager
def serve(directory: Path) -> Iterator[str]:
    """Serve the files of a directory; yield the URL."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def await_texts(locator: Locator, *texts: str) -> None:
    """Wait until an element, or several, have these texts."""
    await expect(locator).to_have_text(list(texts))


@pytest.mark.timeout(400)
async def test_a_page_of_react_has_one_connection_in_strict_mode(
    relay_with: StartRelay, tmp_path: Path
) -> None:
    """Strict mode mounts each component twice. Two components use the same channel."""
    relay = relay_with()
    await publish_all(relay, "news", "earlier")
    with serve(await asyncio.to_thread(build_react_page, tmp_path)) as url:
        async with browser.open_page() as page:
            await page.goto(f"{url}/?relay={relay.ws_url()}")
            items, count = page.locator("li"), page.locator("output")
            await await_texts(page.locator("p"), "open")
            await await_texts(items, "earlier")
            await page.get_by_role("button", name="Publish").click()
            await await_texts(items, "earlier", "published")
            await await_texts(count, "1")
            await page.get_by_role("button", name="Toggle").click()
            await await_texts(items)
            await page.get_by_role("button", name="Toggle").click()
            await await_texts(items, "earlier", "published")
            await await_texts(count, "1")
            await relay.await_metric("websocket_connections_total", 2)  # and the publisher's


NODE_SCRIPT = """
import {Relay} from "RELAY_JS";
IMPORT
const relay = new Relay("URL", {OPTIONS});
const channel = relay.channel("news");
const received = [];
const end = new Promise(resolve => channel.addEventListener("message", ({data}) => {
  received.push(typeof data === "string" ? data : new Uint8Array(data).join());
  if (data === "the end") resolve();
}));
await new Promise(resolve => channel.addEventListener("subscribed", resolve));
for (const data of ["ü", new Uint8Array([1, 2]), "the end"]) await channel.publish(data);
await end;
console.log(relay.transport, received.join(" "));
relay.close(); // the process ends: no timer keeps it alive
const timers = () => process.getActiveResourcesInfo().filter(type => type === "Timeout");
const count = timers().length;
channel.leave();
if (timers().length > count) throw new Error("a timer of a closed relay keeps the process running");
"""

SOCKET_WITHOUT_CLOSE_EVENT = """
const {setTimeout} = globalThis; // a connection that waits for its timeout never opens
globalThis.setTimeout = (act, ms) => setTimeout(act, ms < 10_000 ? ms : 2 ** 30);
class WebSocket {
  constructor() { queueMicrotask(() => this.onerror()); }
  close() {}
}
"""
"""As that of Node 22 when no connection can be established."""


@pytest.mark.parametrize(
    "has_websocket", ["of its own", "of the package ws", "without a close event", "none"]
)
async def test_relay_js_runs_in_node(
    relay: RelayProcess, tmp_path: Path, has_websocket: str
) -> None:
    """Node 20 has no WebSocket: it is given one, or uses an event stream."""
    imports = {
        "of the package ws": 'import WebSocket from "ws";',
        "without a close event": SOCKET_WITHOUT_CLOSE_EVENT,
    }
    if has_websocket == "of the package ws":
        (tmp_path / "node_modules").symlink_to(await asyncio.to_thread(npm_modules))
    script = (
        NODE_SCRIPT.replace("RELAY_JS", RELAY_JS.as_uri())
        .replace("URL", relay.http_url("/"))
        .replace("IMPORT", imports.get(has_websocket, ""))
        .replace("OPTIONS", "WebSocket" if has_websocket in imports else "")
    )
    (tmp_path / "client.mjs").write_text(script)
    flags = () if has_websocket == "of its own" else ("--no-experimental-websocket",)
    async with relay.client("news") as other:
        command = (node(), *flags, "client.mjs")
        output = await asyncio.to_thread(run, *command, directory=tmp_path)
        assert [await receive(other) for _ in range(3)] == ["ü", b"\x01\x02", "the end"]
    transport = "stream" if has_websocket in ("without a close event", "none") else "websocket"
    assert output == f"{transport} ü 1,2 the end\n"


def test_importing_relay_js_on_a_server_does_nothing(tmp_path: Path) -> None:
    """As in the first render of Next.js, where a relative URL has no base."""
    (tmp_path / "page.mjs").write_text(
        f'import {{Relay}} from "{RELAY_JS.as_uri()}";\nconsole.log(new Relay("./").state);\n'
    )
    assert run(node(), "page.mjs", directory=tmp_path) == "idle\n"
