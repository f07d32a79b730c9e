"""Attack the relay's memory: clients that read all but the end, publishers that inflate.

usage: python -m bench.memory [--help]    prints a table; a minute for each attack at most
"""

import argparse
import json
import os
import resource
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from bench.report import table
from bench.servers import RELAY, FailedError, Running, started, with_tls

MIB = 1_048_576
UNREAD_BYTES = 160 * 1024
RECEIVE_BUFFER_BYTES = 4096
TIMEOUT_S = 60.0
CORES = "0,1"
GAUGES = ("backlog_bytes", "partial_message_bytes", "slow_clients", "messages", "closes")

Connect = Callable[[str, str], socket.socket]


def _frame(payload: bytes, first: int = 0x82) -> bytes:
    """Encode a client's frame, masked with zeros."""
    size = len(payload)
    if size < 65_536:
        return bytes((first, 0x80 | 126)) + size.to_bytes(2, "big") + bytes(4) + payload
    return bytes((first, 0x80 | 127)) + size.to_bytes(8, "big") + bytes(4) + payload


def _bomb() -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflater.compress(bytes(MIB)) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def _connect(port: int, context: ssl.SSLContext | None, path: str, more: str) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    client.settimeout(TIMEOUT_S)
    client.connect(("127.0.0.1", port))
    if context is not None:
        client = context.wrap_socket(client)
    request = (
        f"GET {path} HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )
    client.sendall(request.encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    if not head.startswith(b"HTTP/1.1 101"):
        raise FailedError(f"answered {head[:12]!r}")
    return client


def _read(client: socket.socket, size: int) -> None:
    while size > 0:
        got = len(client.recv(min(size, 65_536)))
        if not got:
            return
        size -= got


def unread(connect: Connect, count: int, channels: int) -> Iterator[socket.socket]:
    """Publish 1 MiB to a channel of each client, and read all of it but the last 160 KB."""
    wire = _frame(bytes(MIB))
    for number in range(count):
        client = connect(f"/channels/c{number % channels}", "")
        client.sendall(wire)
        _read(client, MIB - UNREAD_BYTES)
        yield client


def inflate(connect: Connect, count: int, channels: int) -> Iterator[socket.socket]:
    """Send 1 KB that inflates to 1 MiB, all at the same time."""
    wire = _frame(_bomb(), 0xC2)
    offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
    clients = [connect(f"/channels/c{number % channels}", offer) for number in range(count)]
    for client in clients:
        client.sendall(wire)
        yield client


ATTACKS = {"unread": unread, "inflate": inflate}


def _rss(running: Running, field: str = "VmRSS") -> int:
    status = Path(f"/proc/{running.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _counted(running: Running) -> dict[str, int]:
    url = f"http://127.0.0.1:{running.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as page:
        lines = page.read().decode().splitlines()
    found = dict.fromkeys(GAUGES, 0)
    for line in lines:
        name, _, value = line.rpartition(" ")
        name = name.partition("{")[0].removeprefix("websocket_").removesuffix("_total")
        if name in found:
            found[name] += int(float(value))
    return found


def _row(when: str, rss_bytes: int, counted: dict[str, int] | None) -> list[str]:
    cells = [str(counted[name]) for name in GAUGES] if counted else ["" for _ in GAUGES]
    return [when, f"{rss_bytes / MIB:,.0f} MiB", *cells]


def _settled(running: Running, expected: int) -> None:
    """Wait until all messages are relayed, or the relay is idle."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until and _counted(running)["messages"] < expected:
        time.sleep(0.1)
    running.settle()


def measure(running: Running, attack: str, count: int, channels: int, connect: Connect) -> None:
    """Run one attack; print the memory of the relay before, at most, and at the end."""
    rows = [["", "RSS", *GAUGES], _row("before", _rss(running), _counted(running))]
    Path(f"/proc/{running.pid}/clear_refs").write_text("5")
    clients = list(ATTACKS[attack](connect, count, channels))
    _settled(running, count)
    rows.append(_row("at most", _rss(running, "VmHWM"), None))
    rows.append(_row("at the end", _rss(running), _counted(running)))
    for client in clients:
        client.close()
    running.settle()
    rows.append(_row("when all have gone", _rss(running), _counted(running)))
    print("\n".join(table(rows)))


def main() -> None:
    """Start a relay with its defaults, attack it, and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("--clients", type=int, default=1500, metavar="N")
    parser.add_argument("--channels", type=int, metavar="N", help="default: one for each client")
    parser.add_argument("--total", type=int, metavar="BYTES", help="limits.total_backlog_bytes")
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with with_tls(RELAY) if options.tls else nullcontext((RELAY, None)) as (server, context):
        settings = [("RELAY__COMPRESSION__ENABLED", json.dumps(options.attack == "inflate"))]
        if options.total:
            settings.append(("RELAY__LIMITS__TOTAL_BACKLOG_BYTES", str(options.total)))
        environment = (*server.environment, *settings)
        with started(replace(server, environment=environment), CORES) as running:
            channels = options.channels or options.clients

            def connect(path: str, more: str) -> socket.socket:
                return _connect(running.port, context, path, more)

            measure(running, options.attack, options.clients, channels, connect)


if __name__ == "__main__":
    os.sched_setaffinity(0, {0, 1})
    main()
