"""A site of another origin than the relay's: one page, and relay.js."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.relay_process import PACKAGE

RELAY_JS = PACKAGE / "browser" / "relay.js"


PAGE = """<!doctype html><title>a page</title><script type="module">
import {Relay, RelayError} from "MODULE";
Object.assign(window, {Relay, heard: [], positions: [], told: [], sent: {}});
window.start = (url, options) => {
  window.relay = new Relay(url, options);
  relay.addEventListener("message", ({data, position}) => {
    heard.push(typeof data === "string" ? data : [...new Uint8Array(data)]);
    positions.push(position);
  });
  for (const type of ["open", "close", "gap", "refused", "state"]) {
    relay.addEventListener(type, ({code, reason, state, retryInMs, status, transport}) =>
      told.push({type, code, reason, state, retryInMs, status, transport}));
  }
};
window.send = text => relay.send(text).then(
  position => { sent[text] = position; },
  error => { sent[text] = error.why; });
window.why = data => { try { relay.send(data); } catch (error) { return error.why; } };
window.isReady = true;
</script>"""


class Site:
    """Serves one page, and relay.js to pages from anywhere."""

    def __init__(self) -> None:
        self.origin = ""
        self.module = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readline()
        kind, body = "text/html", PAGE.replace("MODULE", self.module).encode()
        if head.startswith(b"GET /relay.js "):
            kind, body = "text/javascript", RELAY_JS.read_bytes()
        lines = (
            "HTTP/1.1 200 OK",
            f"Content-Type: {kind}; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Access-Control-Allow-Origin: *",
            "Connection: close",
        )
        writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def serve_site() -> AsyncIterator[Site]:
    made = Site()
    async with await asyncio.start_server(made.answer, "127.0.0.1", 0) as server:
        made.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        made.module = f"{made.origin}/relay.js"
        yield made
