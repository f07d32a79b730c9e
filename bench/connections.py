"""The cost of an idle connection: memory of the process and of the kernel, and CPU time.

usage: python -m bench.connections    writes bench/results/connections.json and .md
"""

import json
import os
import resource
import signal
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from bench import machine
from bench.__main__ import RESULTS
from bench.report import table
from bench.servers import RELAY, FailedError, Running, started, with_tls

CLIENTS = 3000
WARM_CLIENTS = 300
AT_ONCE, THREADS = 100, 32
SERVER_CORE, CLIENT_CORE = 0, 1
KERNEL = ("TCP", "TCPv6", "sock_inode_cache", "dentry", "filp", "lsm_inode_cache", "lsm_file_cache")
WATCH = "eventpoll_epi"  # of the server only: these clients use no epoll
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CLOSE = bytes((0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE9))  # masked with zeros: 1001

Costs = dict[str, float | None]


def _slab() -> dict[str, int] | None:
    """Return the bytes in each of the kernel's caches; None where only root may read them."""
    try:
        lines = Path("/proc/slabinfo").read_text().splitlines()[2:]
    except OSError:
        return None
    return {line.split()[0]: int(line.split()[1]) * int(line.split()[3]) for line in lines}


def _kernel_bytes(before: dict[str, int] | None, after: dict[str, int] | None) -> float | None:
    """Return the memory of one end of a connection; on loopback there are both."""
    if before is None or after is None:
        return None
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in (*KERNEL, WATCH)}
    watch = grown.pop(WATCH)
    return (sum(grown.values()) / 2 + watch) / CLIENTS


def _request_upgrade(port: int, context: ssl.SSLContext | None) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    if context is not None:
        client = context.wrap_socket(client)
    client.sendall(REQUEST)
    return client


def _connect_all(
    server: Running, count: int, status: int = 101, context: ssl.SSLContext | None = None
) -> list[socket.socket]:
    """Connect clients in groups; all of a group send their request before an answer is read."""
    connected: list[socket.socket] = []
    with ThreadPoolExecutor(THREADS) as pool:
        while len(connected) < count:
            requested = list(
                pool.map(lambda _: _request_upgrade(server.port, context), range(AT_ONCE))
            )
            for client in requested:
                head = client.recv(4096)
                if not head.startswith(f"HTTP/1.1 {status}".encode()):
                    raise FailedError(f"answered {head[:12]!r}")
            connected += requested
    return connected


def _close_all(clients: list[socket.socket]) -> None:
    for client in clients:
        client.close()


def _cost(server: Running, context: ssl.SSLContext | None) -> Costs:
    """Measure clients that connect, stay, and are closed by a drain."""
    _close_all(_connect_all(server, WARM_CLIENTS, context=context))
    server.settle()
    memory, slab, cpu_s = server.private_bytes(), _slab(), server.cpu_s()
    clients = _connect_all(server, CLIENTS, context=context)
    server.settle()
    return {
        "handshake_cpu_s": (server.cpu_s() - cpu_s) / CLIENTS,
        "process_bytes": (server.private_bytes() - memory) / CLIENTS,
        "kernel_bytes": _kernel_bytes(slab, _slab()),
        "farewell_cpu_s": _drain_cpu_s(server, clients) / CLIENTS,
    }


def _drain_cpu_s(server: Running, clients: list[socket.socket]) -> float:
    """Stop the relay; every client answers its close frame. Return the CPU time."""
    before_s = server.cpu_s() + _ended_cpu_s()
    server.process.send_signal(signal.SIGTERM)
    for client in clients:
        client.recv(4096)
        client.sendall(CLOSE)
    server.process.wait()
    _close_all(clients)
    return _ended_cpu_s() - before_s


def _ended_cpu_s() -> float:
    """Return the CPU time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _refusal(server: Running) -> Costs:
    """Measure clients that are refused."""
    with closing(_request_upgrade(server.port, None)):
        _close_all(_connect_all(server, WARM_CLIENTS, 503))
        server.settle()
        cpu_s = server.cpu_s()
        _close_all(_connect_all(server, CLIENTS, 503))
        server.settle()
        return {"refusal_cpu_s": (server.cpu_s() - cpu_s) / CLIENTS}


def measure() -> dict[str, Costs]:
    """Measure ws and wss and refusals, one after another."""
    only_one = ("RELAY__LIMITS__MAX_CONNECTIONS", "1")
    found: dict[str, Costs] = {}
    with started(RELAY, SERVER_CORE) as server:
        found["ws"] = _cost(server, None)
    with with_tls(RELAY) as (relay, context), started(relay, SERVER_CORE) as server:
        found["wss"] = _cost(server, context)
    with started(replace(RELAY, environment=(*RELAY.environment, only_one)), SERVER_CORE) as server:
        found["ws"] |= _refusal(server)
    return found


def _page(facts: dict[str, object], found: dict[str, Costs]) -> str:
    titles = {
        "process_bytes": ("memory of the process", "KB", 1 / 1024),
        "kernel_bytes": ("memory of the kernel, its end only", "KB", 1 / 1024),
        "handshake_cpu_s": ("CPU of a handshake", "µs", 1e6),
        "farewell_cpu_s": ("CPU of a close in a drain", "µs", 1e6),
        "refusal_cpu_s": ("CPU of a refusal (503), its connection's end included", "µs", 1e6),
    }
    rows = [["of one idle connection", "ws", "wss"]]
    for name, (title, unit, factor) in titles.items():
        values = [found[scheme].get(name) for scheme in ("ws", "wss")]
        cells = ["-" if value is None else f"{value * factor:,.1f}" for value in values]
        rows.append([f"{title}, {unit}", *cells])
    head = ["# What a connection costs", "", f"{facts['when']}, commit {facts['commit']}.", ""]
    return "\n".join([*head, *table(rows), ""])


def main() -> None:
    """Measure, print and write."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    facts, found = machine.facts(), measure()
    page = _page(facts, found)
    print(page)
    (RESULTS / "connections.json").write_text(json.dumps({**facts, **found}, indent=1) + "\n")
    (RESULTS / "connections.md").write_text(page)


if __name__ == "__main__":
    main()
