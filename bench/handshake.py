"""Profile a handshake inside the process: what the relay's own code costs, without the kernel.

usage: python -m bench.handshake    writes bench/results/handshake.md; half a minute
"""

import asyncio
import cProfile
import gc
import pstats
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import uvloop
from uvicorn import Config
from websocket_relay.app import Replica
from websocket_relay.config.model import Settings
from websocket_relay.lifecycle import Phase
from websocket_relay.server.listener import PortState
from websocket_relay.server.run import GC_THRESHOLDS

from bench import machine
from bench.__main__ import RESULTS
from bench.report import origin, table
from bench.servers import SECRET

HANDSHAKES = 2_000
TURNS = 12
LISTED = 25
BROWSER = (
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0"
    " Safari/537.36"
)
FIELDS = (
    "Host: 127.0.0.1:8443",
    "Connection: Upgrade",
    "Pragma: no-cache",
    "Cache-Control: no-cache",
    f"User-Agent: {BROWSER}",
    "Upgrade: websocket",
    "Origin: http://127.0.0.1:8443",
    "Sec-WebSocket-Version: 13",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Accept-Language: en-US,en;q=0.9",
    "Cookie: session=0123456789abcdef0123456789abcdef",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
)
PLENTY = 10**6
LIMITS = {
    "max_connections": PLENTY,
    "max_connections_per_ip": PLENTY,
    "max_handshakes_per_s": PLENTY,
    "max_messages_per_s": PLENTY,
}
AUTH = {"mode": "jwt", "jwt": {"secret": SECRET}}
VARIANTS: dict[str, dict[str, Any]] = {
    "no limits set": {},
    "all limits": {"limits": LIMITS},
    "a token (HS256)": {"auth": AUTH},
    "a token and all limits": {"auth": AUTH, "limits": LIMITS},
}


kept: list["NullTransport"] = []
"""Until the end: each connection has the descriptor of the one socket, which it would close."""


class NullTransport(asyncio.Transport):
    """A transport that sends nothing: what remains is the relay's own work."""

    def __init__(self, unused: socket.socket) -> None:
        super().__init__({"socket": unused})
        self.written = b""
        self.protocol: asyncio.BaseProtocol | None = None

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol


def _request(settings: dict[str, Any]) -> bytes:
    fields = list(FIELDS)
    if "auth" in settings:
        claims = {
            "exp": int(time.time()) + 3600,
            "relay": {"subscribe": ["*"], "publish": ["*"]},
        }
        fields.append(f"Authorization: Bearer {jwt.encode(claims, SECRET, algorithm='HS256')}")
    return ("GET /channels/news HTTP/1.1\r\n" + "\r\n".join(fields) + "\r\n\r\n").encode()


def _handshakes(settings: dict[str, Any]) -> Callable[[], float]:
    """Return a function that makes handshakes and returns the microseconds of each."""
    relay = Replica(Settings.model_validate(settings))
    relay.lifecycle.advance_to(Phase.READY)
    port = relay.port
    config = Config(port.app, interface="asgi3", lifespan="off", log_config=None, ws="none")
    config.load()
    state, request = PortState(), _request(settings)
    unused = socket.socket()

    def make() -> float:
        started_at = time.perf_counter()
        for _ in range(HANDSHAKES):
            transport = NullTransport(unused)
            connection = port.http(config=config, server_state=state)
            connection.peer = ("127.0.0.1", 50_000)
            connection.connection_made(transport)
            connection.data_received(request)
            kept.append(transport)
            assert transport.written.startswith(b"HTTP/1.1 101 "), transport.written
        taken_s = time.perf_counter() - started_at
        return taken_s / HANDSHAKES * 1e6

    return make


def _functions(profile: cProfile.Profile) -> Iterator[list[str]]:
    yield ["function", "calls", "own time, us", "with its callees, us"]
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    by_own_time = sorted(found.items(), key=lambda each: -each[1][2])
    for (file, line, name), (_, calls, own_s, all_s, _) in by_own_time[:LISTED]:
        where = re.sub(r".*/(?:site-packages|service|bench|python3\.\d+)/", "", file)
        title = name if file == "~" else f"{where}:{line} {name}"
        each = (f"{seconds / HANDSHAKES * 1e6:.2f}" for seconds in (own_s, all_s))
        yield [f"`{title}`", f"{calls / HANDSHAKES:.1f}", *each]


async def _measure() -> tuple[list[list[str]], list[list[str]]]:
    rows, base_us = [["handshake", "us", "ratio"]], 0.0
    for title, settings in VARIANTS.items():
        make = _handshakes(settings)
        taken_us = min(make() for _ in range(TURNS))
        base_us = base_us or taken_us
        rows.append([title, f"{taken_us:.1f}", f"{taken_us / base_us:.2f}"])
    make = _handshakes(VARIANTS["a token and all limits"])
    make()
    profile = cProfile.Profile()
    profile.runcall(make)
    return rows, list(_functions(profile))


def main() -> None:
    """Measure, print and write."""
    gc.set_threshold(*GC_THRESHOLDS)
    rows, functions = uvloop.new_event_loop().run_until_complete(_measure())
    lines = ["# What a handshake costs inside the process", ""]
    lines += [*(f"{line}  " for line in origin(machine.facts())), ""]
    lines += [
        "Accepting, reading and writing by the kernel and uvloop are not included. The least of"
    ]
    lines += [f"{TURNS} turns of {HANDSHAKES:,} handshakes with a browser's headers.", ""]
    lines += [*table(rows), "", "## A token and all limits, by function", ""]
    lines += ["The profiler itself makes each call slower.", "", *table(functions), ""]
    page = "\n".join(lines)
    print(page)
    (RESULTS / "handshake.md").write_text(page)


if __name__ == "__main__":
    main()
