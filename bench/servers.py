"""The servers: how each is started on one core, watched from outside, and stopped.

Knows no load.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import prepare

START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 5
SETTLE_TIMEOUT_S = 5
QUIET_S = 0.1
ROOT = prepare.HERE.parent


class FailedError(Exception):
    """A server that did not start or died; the message says which and how."""


@dataclass(frozen=True, slots=True)
class Server:
    """One competitor: how it is made and started. `{port}` in the command is the port."""

    name: str
    title: str
    command: tuple[str, ...]
    prepare: Callable[[], None]
    reference: bool = False  # the targets refer to it: it is measured in every round
    environment: tuple[tuple[str, str], ...] = ()


def _nothing() -> None:
    """Nothing to build: what the relay itself needs is there."""


def _script(name: str) -> tuple[str, ...]:
    return (sys.executable, str(prepare.RIVALS / name), "{port}")


SERVERS = (
    Server(
        "relay",
        "websocket-relay",
        (sys.executable, "-m", "service", "--config-file", str(prepare.HERE / "relay.yaml")),
        _nothing,
        reference=True,
        environment=(
            ("RELAY__SERVER__PORT", "{port}"),
            ("RELAY__METRICS__PORT", "{metrics_port}"),
        ),
    ),
    Server("textbook", "textbook FastAPI", _script("textbook.py"), _nothing, reference=True),
    Server("websockets", "websockets.broadcast", _script("websockets_broadcast.py"), _nothing),
    Server(
        "ws",
        "Node ws",
        ("node", str(prepare.RIVALS / "ws_node" / "server.js"), "{port}"),
        prepare.ws_node,
    ),
    Server("gorilla", "Go gorilla hub", (str(prepare.GORILLA), "{port}"), prepare.gorilla),
    Server(
        "uwebsockets",
        "uWebSockets (C++)",
        _script("uwebsockets.py"),
        prepare.uwebsockets,
        reference=True,
    ),
    Server(
        "floor",
        "floor (bare C send)",
        (str(prepare.FLOOR), "{port}"),
        prepare.floor,
        reference=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Running:
    """A started server: where it listens and which process it is."""

    server: Server
    process: subprocess.Popen[bytes]
    port: int
    metrics_port: int

    @property
    def pid(self) -> int:
        """Give the process's id; `taskset` has become the server under the same one."""
        return self.process.pid

    def settle(self) -> None:
        """Wait until it has dealt with the clients that left: the next one needs the core."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        before = self._cpu_ticks()
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise FailedError(f"died with exit status {self.process.returncode}")
            time.sleep(QUIET_S)
            now = self._cpu_ticks()
            if now == before:
                return
            before = now

    def _cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # utime and stime, of all threads

    def private_bytes(self) -> int:
        """Memory that only this process has; the kernel's socket buffers are not in it."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
        names = ("Private_Clean", "Private_Dirty")
        return sum(int(fields[name].split()[0]) * 1024 for name in names)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has. A new one for each start: closed connections linger on the old."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise FailedError(f"exit status {process.returncode}: {' '.join(last)}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise FailedError(f"does not listen after {START_TIMEOUT_S} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def started(server: Server, core: int) -> Iterator[Running]:
    """Run a server pinned to a core, from its first accepted connection on."""
    port, metrics_port = _free_ports(2)
    ports = {"port": port, "metrics_port": metrics_port}
    log = prepare.BUILD / f"{server.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *(part.format(**ports) for part in server.command)],
            env=os.environ | {name: value.format(**ports) for name, value in server.environment},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_for(process, port, log)
        yield Running(server, process, port, metrics_port)
    finally:
        _stop(process)
