"""Serve a page with relay.js from another origin than the relay's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.relay_process import PACKAGE

RELAY_JS = PACKAGE / "browser" / "relay.js"

PAGE = """<!doctype html><title>a page</title><script type="module">
import {Relay, RelayError} from "MODULE";
const RECORDED = ["type", "code", "reason", "recovered", "retryInMs", "state", "status",
  "transport", "client", "clients", "count", "info", "user"];
const record = (target, types) => {
  target.events = [];
  for (const type of types) {
    target.addEventListener(type, event => {
      target.events.push(Object.fromEntries(RECORDED.map(name => [name, event[name]])));
    });
  }
};
Object.assign(window, {Relay, RelayError, outcomes: {}});
window.join = (name, options) => {
  const joined = Object.assign(relay.channel(name, options), {received: [], positions: []});
  record(joined, ["subscribed", "gap", "refused", "presence", "joined", "left"]);
  joined.addEventListener("message", ({data, position}) => {
    joined.received.push(typeof data === "string" ? data : [...new Uint8Array(data)]);
    joined.positions.push(position);
  });
  return joined;
};
window.start = (url, name, {history, since, presence, ...options} = {}) => {
  window.relay = new Relay(url, options);
  record(relay, ["state", "refused"]);
  if (name) window.channel = join(name, {history, since, presence});
};
window.publish = (text, name = channel.name) => {
  outcomes[text] = undefined;
  relay.publish(name, text).then(
    position => { outcomes[text] = position; },
    error => { outcomes[text] = error.code; });
};
window.areSettled = count => {
  const values = Object.values(outcomes);
  return values.length >= count && !values.includes(undefined);
};
window.isReady = true;
</script>"""
"""Joins channels, which record their messages, positions and events. Records the outcome of each
published text: its position or the code of the error."""


class Site:
    """An HTTP server of the page, and of relay.js for pages of any origin.

    Attributes:
        origin: of the page.
        module: the URL from which the page imports relay.js.
    """

    def __init__(self) -> None:
        self.origin = ""
        self.module = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close the connection."""
        head = await reader.readline()
        content_type, body = "text/html", PAGE.replace("MODULE", self.module).encode()
        if head.startswith(b"GET /relay.js "):
            content_type, body = "text/javascript", RELAY_JS.read_bytes()
        lines = (
            "HTTP/1.1 200 OK",
            f"Content-Type: {content_type}; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Access-Control-Allow-Origin: *",
            "Connection: close",
        )
        writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def serve_relay_js_page() -> AsyncIterator[Site]:
    """Serve the page on a free port."""
    site = Site()
    async with await asyncio.start_server(site.answer, "127.0.0.1", 0) as server:
        site.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        site.module = f"{site.origin}/relay.js"
        yield site
