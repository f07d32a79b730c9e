"""The servers: how each is started on one core, watched from outside, and stopped.

Knows no load.
"""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jwt

from bench import prepare

START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 5
SETTLE_TIMEOUT_S = 5
QUIET_S = 0.1
ROOT = prepare.HERE.parent
SECRET = "of no use elsewhere: for the servers of the benchmark"
TOKEN_VALID_S = 86_400
V1_SIZE = 128 + len('{"channel":"bench","position":"1796122146086-100000-0"}\n')
PLENTY = str(10**6)  # a limit that is checked and never reached


class FailedError(Exception):
    """A server did not start, or died; the message has its name and the reason."""


@dataclass(frozen=True, slots=True)
class Server:
    """One server: how it is built and started. `{port}` in the command is the port.

    A variant is another server with other settings, measured only in the loads that name it.
    """

    name: str
    title: str
    command: tuple[str, ...]
    prepare: Callable[[], None]
    reference: bool = False  # the targets refer to it: it is measured in every round
    environment: tuple[tuple[str, str], ...] = ()
    variant: bool = False
    header: str = ""  # a header that its clients have to send
    deflates: bool = False  # it negotiates permessage-deflate with clients that offer it
    tls: bool = False  # its clients speak TLS
    v1: int = 0  # 1: its clients speak relay.v1; 2: its listeners do
    size: int = 0  # payload bytes of its messages; 0: as the load has them


def _nothing() -> None:
    """Build nothing: the relay is installed."""


def _script(name: str) -> tuple[str, ...]:
    return (sys.executable, str(prepare.RIVALS / name), "{port}")


def _bearer() -> str:
    claims = {
        "exp": int(time.time()) + TOKEN_VALID_S,
        "relay": {"subscribe": ["*"], "publish": ["*"]},
    }
    return f"Authorization: Bearer {jwt.encode(claims, SECRET, algorithm='HS256')}"


RELAY = Server(
    "relay",
    "websocket-relay",
    (sys.executable, "-m", "websocket_relay", "--config-file", str(prepare.HERE / "relay.yaml")),
    _nothing,
    reference=True,
    environment=(
        ("RELAY__SERVER__PORT", "{port}"),
        ("RELAY__METRICS__PORT", "{metrics_port}"),
    ),
)

CHECKS = (
    ("RELAY__AUTH__MODE", "jwt"),
    ("RELAY__AUTH__JWT__SECRET", SECRET),
    ("RELAY__LIMITS__MAX_CONNECTIONS", PLENTY),
    ("RELAY__LIMITS__MAX_CONNECTIONS_PER_IP", PLENTY),
    ("RELAY__LIMITS__MAX_HANDSHAKES_PER_S", PLENTY),
    ("RELAY__LIMITS__MAX_MESSAGES_PER_S", PLENTY),
)

CERT_FILE, KEY_FILE = str(prepare.CERTIFICATES / "cert.pem"), str(prepare.CERTIFICATES / "key.pem")
TLS = (
    ("RELAY__SERVER__TLS__ENABLED", "true"),
    ("RELAY__SERVER__TLS__CERT_FILE", CERT_FILE),
    ("RELAY__SERVER__TLS__KEY_FILE", KEY_FILE),
)

SERVERS = (
    RELAY,
    replace(
        RELAY, name="relay_wide", title="relay, plain, bytes as v1", variant=True, size=V1_SIZE
    ),
    replace(RELAY, name="relay_v1", title="relay, relay.v1", variant=True, v1=1),
    replace(RELAY, name="relay_v1_listeners", title="relay, listeners v1", variant=True, v1=2),
    replace(
        RELAY,
        name="relay_tls",
        title="relay, TLS",
        prepare=prepare.certificate,
        environment=RELAY.environment + TLS,
        variant=True,
        tls=True,
    ),
    replace(
        RELAY,
        name="relay_tls_checks",
        title="relay, TLS, checks",
        prepare=prepare.certificate,
        environment=RELAY.environment + TLS + CHECKS,
        variant=True,
        tls=True,
        header=_bearer(),
    ),
    Server(
        "nginx_tls",
        "nginx ends TLS, relay",
        (*_script("nginx_tls.py"), "{metrics_port}", CERT_FILE, KEY_FILE),
        prepare.nginx_tls,
        variant=True,
        tls=True,
    ),
    Server(
        "gorilla_tls",
        "Go gorilla hub, TLS",
        (str(prepare.GORILLA), "{port}", CERT_FILE, KEY_FILE),
        prepare.gorilla_tls,
        reference=True,
        variant=True,
        tls=True,
    ),
    replace(
        RELAY,
        name="relay_checks",
        title="relay, all checks on",
        environment=RELAY.environment + CHECKS,
        variant=True,
        header=_bearer(),
    ),
    replace(
        RELAY,
        name="relay_deflate",
        title="relay, deflate",
        environment=(*RELAY.environment, ("RELAY__COMPRESSION__ENABLED", "true")),
        variant=True,
        deflates=True,
    ),
    Server(
        "textbook",
        "textbook FastAPI",
        _script("textbook.py"),
        _nothing,
        reference=True,
        deflates=True,
    ),
    Server("websockets", "websockets.broadcast", _script("websockets_broadcast.py"), _nothing),
    Server(
        "websockets_deflate",
        "websockets, deflate",
        (*_script("websockets_broadcast.py"), "deflate"),
        _nothing,
        reference=True,
        variant=True,
        deflates=True,
    ),
    Server(
        "ws",
        "Node ws",
        ("node", str(prepare.RIVALS / "ws_node" / "server.js"), "{port}"),
        prepare.ws_node,
    ),
    Server(
        "gorilla",
        "Go gorilla hub",
        (str(prepare.GORILLA), "{port}"),
        prepare.gorilla,
        reference=True,
    ),
    Server(
        "gorilla_deflate",
        "gorilla, deflate",
        (str(prepare.GORILLA), "{port}", "deflate"),
        prepare.gorilla,
        reference=True,
        variant=True,
        deflates=True,
    ),
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


def named_server(name: str) -> Server:
    """Return the server of a name."""
    return next(server for server in SERVERS if server.name == name)


@dataclass(frozen=True, slots=True)
class Running:
    """A running server: its process and its ports."""

    server: Server
    process: subprocess.Popen[bytes]
    port: int
    metrics_port: int

    @property
    def pid(self) -> int:
        """The process id; `taskset` has become the server under the same one."""
        return self.process.pid

    @property
    def pids(self) -> list[int]:
        """The process and all that it has started."""
        found = [self.pid]
        for pid in found:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            found += map(int, children)
        return found

    def settle(self) -> None:
        """Wait until it has processed the clients that left: the next server needs the core."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        before = self.cpu_s()
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise FailedError(f"died with exit status {self.process.returncode}")
            time.sleep(QUIET_S)
            now = self.cpu_s()
            if now == before:
                return
            before = now

    def cpu_s(self) -> float:
        """Return the CPU time so far, of all threads, in ticks of usually 10 ms."""
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime, stime
        return ticks / os.sysconf("SC_CLK_TCK")

    def private_bytes(self) -> int:
        """Return the private memory of the process, without the kernel's socket buffers."""
        total = 0
        for pid in self.pids:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
            names = ("Private_Clean", "Private_Dirty")
            total += sum(int(fields[name].split()[0]) * 1024 for name in names)
        return total


def _free_ports(count: int) -> list[int]:
    """Return unused ports. Each start gets new ones: closed connections linger on the old."""
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
def with_tls(server: Server) -> Iterator[tuple[Server, ssl.SSLContext]]:
    """Yield a relay that speaks TLS, and a context that trusts its certificate."""
    prepare.certificate()
    context = ssl.create_default_context(cafile=CERT_FILE)
    context.check_hostname = False
    yield replace(server, environment=server.environment + TLS), context


@contextmanager
def started(server: Server, core: int | str) -> Iterator[Running]:
    """Run a server; yield it once it accepts connections.

    Args:
        core: the core or the cores that it is pinned to, as for `taskset -c`.
    """
    port, metrics_port = _free_ports(2)
    ports = {"port": port, "metrics_port": metrics_port}
    log = prepare.BUILD / f"{server.name}.log"
    log.parent.mkdir(exist_ok=True)
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
