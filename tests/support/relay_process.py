"""Run the relay as a process, and observe it as operators and clients do: by its ports and its log.

Knows the command line, the settings file, the log and the metrics page, and no code of the relay.
"""

import asyncio
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from signal import SIGTERM, Signals
from types import TracebackType
from typing import Any, Self

import httpx2
import yaml
from prometheus_client.samples import Sample
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Data

from tests.support.forks import FORK_SERVER, ForkedProcess
from tests.support.raw_client import PATIENCE_S, RawClient, raw_websocket

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "service" / "websocket_relay"
POLL_S = 0.02
PROGRAM_S = 50.0
"""The timeout of a program that only computes: a linter takes three seconds of processor time, and
much longer on a busy machine."""

HOST = "127.0.0.1"
NO_CA = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""A context without certificates: httpx2 loads those of the system otherwise, which is slow."""

MEASURES_COVERAGE = "COVERAGE_PROCESS_CONFIG" in os.environ
QUIET_SETTINGS: Mapping[str, Any] = {
    "server": {"host": HOST, "port": 0},
    "metrics": {"host": HOST, "port": 0},
    "logging": {"format": "json"},
}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tree of settings, overridden by another."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        both_are_sections = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both_are_sections and below is not None else value
    return result


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without settings of the relay, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY")}
    paths = [str(ROOT), kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | dict(extra or {})


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]

    @property
    def faults(self) -> list[str]:
        """The errors that do not depend on the machine: it may have too few file descriptors."""
        return [line for line in self.error_lines if "too few file descriptors" not in line]


def run_command(
    *arguments: str, directory: Path, env: Mapping[str, str] | None = None
) -> CommandResult:
    """Run a command of the relay to its end; as a fork if possible, because that is cheaper."""
    if not _may_fork(env):
        return run_python("-m", "websocket_relay", *arguments, directory=directory, env=env)
    return CommandResult(*FORK_SERVER.run(arguments, directory, environment(env), PATIENCE_S))


def relay_command() -> list[str]:
    """Return the first words of a command line of the relay; a fork runs it if possible."""
    interpreter = [sys.executable, "-m", "websocket_relay"]
    return [str(FORK_SERVER.program())] if sys.platform == "linux" else interpreter


def _may_fork(env: Mapping[str, str] | None) -> bool:
    """Return whether a process may be a fork (forks.py): not with variables for Python itself."""
    return sys.platform == "linux" and not any(name.startswith("PYTHON") for name in env or {})


def run_python(
    *arguments: str, directory: Path | None = None, env: Mapping[str, str] | None = None
) -> CommandResult:
    """Run a Python interpreter to its end."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


METRICS_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
FAMILY = re.compile(r"^# TYPE (\w+) ", re.MULTILINE)
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """The metrics page at one moment."""

    names: frozenset[str]
    samples: tuple[Sample, ...]

    @classmethod
    def parse(cls, page: str) -> Self:
        """Parse a page. A test of its own validates the format with the parser of a library."""
        assert "\\" not in page, "the values of labels have no escape sequences"
        samples = tuple(
            Sample(name, dict(LABEL.findall(labels)), float(value))
            for name, labels, value in SAMPLE.findall(page)
        )
        return cls(frozenset({*FAMILY.findall(page), *(each.name for each in samples)}), samples)

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with this name and these labels."""
        assert name in self.names, f"{name} is not on the metrics page"
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


class RelayProcess:
    """A process of the relay, from its start to its end."""

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        *,
        max_descriptors: int | None = None,
        module: Sequence[str] = ("websocket_relay",),
        descriptors: Sequence[int] = (),
    ) -> None:
        """Prepare a relay that listens on free ports, which the kernel chooses.

        Args:
            directory: its working directory, and the place of its settings file.
            settings: that differ from `QUIET_SETTINGS`.
            env: further environment variables.
            max_descriptors: its limit of open files (RLIMIT_NOFILE, hard).
            module: the module that `launch` runs, and arguments of its own.
            descriptors: that `launch` leaves open.
        """
        self.settings = merged(QUIET_SETTINGS, settings or {})
        self._directory = directory
        self._env = environment(env)
        self._max_descriptors = max_descriptors
        self._module = module
        self._descriptors = descriptors
        self._forks = _may_fork(env)
        self._lines: list[str] = []
        self._log_ended = False
        self._log_grew = threading.Condition()
        self._process: subprocess.Popen[str] | ForkedProcess | None = None
        self._log_reader: threading.Thread | None = None
        self.tls_context: ssl.SSLContext | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
            self.block_until_logged("ready")
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    # The process

    def start(self) -> None:
        """Start the process; as a fork if possible, because that is cheaper."""
        if not self._forks:
            self.launch()
            return
        arguments = ["--config-file", str(self._write_settings())]
        with open(os.devnull, "wb") as stdout:
            self._process = FORK_SERVER.start(
                arguments,
                self._directory,
                self._env,
                stdout.fileno(),
                max_descriptors=self._max_descriptors,
            )
        self._start_log_reader()

    def launch(self) -> None:
        """Start the process as a Python interpreter, and do not wait until it listens."""
        file = self._write_settings()
        command = [sys.executable, "-m", *self._module, "--config-file", str(file)]
        if self._max_descriptors is not None:
            limits = 'ulimit -Sn $0 && ulimit -Hn $0 && exec "$@"'
            command = ["/bin/sh", "-c", limits, str(self._max_descriptors), *command]
        self._process = subprocess.Popen(
            command,
            cwd=self._directory,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=self._descriptors,
        )
        self._start_log_reader()

    def change_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace the settings file; the relay reads it at SIGHUP."""
        self.settings = merged(QUIET_SETTINGS, settings)
        self._write_settings()

    @property
    def settings_file(self) -> Path:
        """The file that the relay reads."""
        return self._directory / "relay.yaml"

    def _write_settings(self) -> Path:
        self.settings_file.write_text(yaml.safe_dump(self.settings))
        return self.settings_file

    def _start_log_reader(self) -> None:
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()

    def end(self) -> None:
        """Kill the process if it is running, and wait for its end and the end of its log."""
        if self._process is None:
            return
        if self._process.poll() is None and MEASURES_COVERAGE:
            # A process that is killed writes no coverage data.
            self._process.send_signal(SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE_S)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE_S)
        if self._log_reader is not None:
            self._log_reader.join(PATIENCE_S)
        if self._process.stderr is not None:
            self._process.stderr.close()

    @property
    def process(self) -> "subprocess.Popen[str] | ForkedProcess":
        assert self._process is not None, "the relay was not started"
        return self._process

    def signal(self, number: Signals = SIGTERM) -> None:
        self.process.send_signal(number)

    async def exit_code(self) -> int:
        """Wait for the end of the process; return its exit status."""
        code = await asyncio.to_thread(self.process.wait, PATIENCE_S)
        if self._log_reader is not None:
            await asyncio.to_thread(self._log_reader.join, PATIENCE_S)
        return code

    async def stop(self, number: Signals = SIGTERM) -> int:
        self.signal(number)
        return await self.exit_code()

    def rss_bytes(self) -> int:
        """Return the anonymous memory of the process in RAM; libraries do not count."""
        return self._status_bytes("RssAnon")

    def peak_rss_bytes(self) -> int:
        """Return the peak of the memory of the process in RAM since `reset_peak_rss`."""
        return self._status_bytes("VmHWM")

    def reset_peak_rss(self) -> int:
        """Reset `peak_rss_bytes` to the current value (proc(5), clear_refs), and return it."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self.peak_rss_bytes()

    def _status_bytes(self, field: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024

    def descriptors(self) -> int:
        """Return how many file descriptors the process has open."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def listening_ports(self) -> set[int]:
        """Return the TCP ports on which this process listens, from /proc."""
        targets = set()
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed in the meantime
                targets.add(str(descriptor.readlink()))
        ports = set()
        for table in ("tcp", "tcp6"):
            for row in Path(f"/proc/{self.process.pid}/net/{table}").read_text().splitlines()[1:]:
                columns = row.split()
                listens = columns[3] == "0A"
                if listens and f"socket:[{columns[9]}]" in targets:
                    ports.add(int(columns[1].rpartition(":")[2], 16))
        return ports

    # The log

    def _read_log(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        for line in stream:
            with self._log_grew:
                self._lines.append(line.rstrip("\n"))
                self._log_grew.notify_all()
        with self._log_grew:
            self._log_ended = True
            self._log_grew.notify_all()

    @property
    def log_lines(self) -> list[str]:
        with self._log_grew:
            return list(self._lines)

    @property
    def log_events(self) -> list[dict[str, Any]]:
        """The events in the log; other lines are in `unexpected_lines`."""
        return [event for event in map(_event_of, self.log_lines) if event is not None]

    @property
    def unexpected_lines(self) -> list[str]:
        """The lines of the log that are no events or contain a traceback."""
        return [line for line in self.log_lines if _event_of(line) is None or "Traceback" in line]

    def block_until_logged(self, event: str, *, count: int = 1) -> dict[str, Any]:
        """Block until an event is logged `count` times; return the last of these events."""
        deadline = time.monotonic() + PATIENCE_S
        with self._log_grew:
            while True:
                parsed = [_event_of(line) for line in self._lines]
                found = [entry for entry in parsed if entry is not None and entry["event"] == event]
                if len(found) >= count:
                    return found[count - 1]
                left_s = deadline - time.monotonic()
                if self._log_ended or left_s <= 0:
                    log = "\n".join(self._lines)
                    raise AssertionError(f"no {event!r} (number {count}) in the log:\n{log}")
                self._log_grew.wait(left_s)

    async def await_log(self, event: str, *, count: int = 1) -> dict[str, Any]:
        return await asyncio.to_thread(self.block_until_logged, event, count=count)

    # The ports

    @cached_property
    def port(self) -> int:
        return int(self.block_until_logged("relay listening")["port"])

    @cached_property
    def metrics_port(self) -> int:
        return int(self.block_until_logged("metrics listening")["port"])

    @property
    def _tls(self) -> bool:
        return bool(self.settings["server"].get("tls", {}).get("enabled", False))

    def ws_url(self, path: str = "/", *, host: str = HOST) -> str:
        return f"{'wss' if self._tls else 'ws'}://{host}:{self.port}{path}"

    def http_url(self, path: str = "/") -> str:
        return f"{'https' if self._tls else 'http'}://{HOST}:{self.port}{path}"

    def metrics_url(self, path: str = "/metrics") -> str:
        return f"http://{HOST}:{self.metrics_port}{path}"

    def client(
        self, channel: str | None = None, *, path: str | None = None, **options: Any
    ) -> connect:
        """Connect a client of the library websockets.

        Args:
            channel: None: `/`, the default channel.
            path: a request target instead of a channel.
            options: of `websockets.asyncio.client.connect`.
        """
        defaults: dict[str, Any] = {"proxy": None, "open_timeout": PATIENCE_S, "max_size": None}
        if self._tls:
            defaults["ssl"] = self.tls_context
        return connect(self.ws_url(path or path_of(channel)), **(defaults | options))

    def raw_client(
        self,
        channel: str | None = None,
        *,
        receive_buffer_bytes: int | None = None,
        trailing: bytes = b"",
    ) -> AbstractAsyncContextManager[RawClient]:
        """Connect a `RawClient`, and upgrade to a WebSocket."""
        return raw_websocket(
            HOST,
            self.port,
            path_of(channel),
            receive_buffer_bytes=receive_buffer_bytes,
            trailing=trailing,
        )

    async def connect_tcp(self, *, receive_buffer_bytes: int | None = None) -> RawClient:
        """Open a TCP connection to the relay's port, without a request."""
        return await RawClient.connect(HOST, self.port, receive_buffer_bytes=receive_buffer_bytes)

    async def get(self, path: str, token: str = "") -> httpx2.Response:
        """Send a GET request to the port of the relay, with a token if one is given."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return await _get(self.http_url(path), self.tls_context or NO_CA, headers)

    async def get_metrics(self, path: str = "/metrics") -> httpx2.Response:
        """Send a GET request to the metrics port."""
        return await _get(self.metrics_url(path), NO_CA)

    # The metrics

    async def metrics(self) -> MetricsPage:
        """Request the metrics page; with less processor time than `get_metrics` takes."""
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(HOST, self.metrics_port)
            try:
                writer.write(METRICS_REQUEST)
                answer = await reader.read()
            finally:
                writer.close()
        head, _, page = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), answer
        assert b"\r\ncontent-length: %d" % len(page) in head.lower(), answer
        return MetricsPage.parse(page.decode())

    async def metric(self, name: str, **labels: str) -> float:
        return (await self.metrics()).value(name, **labels)

    async def await_metric(self, name: str, expected: float, **labels: str) -> None:
        """Wait until a metric has this value."""
        await self._await_metric(name, lambda value: value == expected, f"== {expected}", labels)

    async def await_metric_at_least(self, name: str, least: float, **labels: str) -> None:
        """Wait until a metric has at least this value."""
        await self._await_metric(name, lambda value: value >= least, f">= {least}", labels)

    async def _await_metric(
        self, name: str, fits: Callable[[float], bool], expected: str, labels: Mapping[str, str]
    ) -> None:
        async def check() -> tuple[bool, object]:
            value = await self.metric(name, **labels)
            return fits(value), value

        await eventually(check, f"{name}{dict(labels)} {expected}")


StartRelay = Callable[..., RelayProcess]
StartReplicas = Callable[..., Sequence[RelayProcess]]


@asynccontextmanager
async def open_pipe_when_read(pipe: Path) -> AsyncIterator[None]:
    """Wait until a process reads a named pipe, and keep the pipe open and empty for the block."""
    writer: list[int] = []

    async def try_to_open() -> tuple[bool, object]:
        try:
            writer.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:  # ENXIO: no process reads it yet
            return False, error
        return True, None

    await eventually(try_to_open, f"{pipe} is read")
    try:
        yield
    finally:
        os.close(writer[0])


async def eventually(check: Callable[[], Awaitable[tuple[bool, object]]], expected: str) -> None:
    """Check a condition again and again until it holds.

    Args:
        check: returns whether the condition holds, and what it depends on.
        expected: the condition, for the error.

    Raises:
        AssertionError: it does not hold within `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        holds, observed = await check()
        if holds:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"never {expected}; last observed: {observed}")
        await asyncio.sleep(POLL_S)


def path_of(channel: str | None) -> str:
    return "/" if channel is None else f"/channels/{channel}"


async def receive(client: ClientConnection) -> Data:
    """Receive one message."""
    async with asyncio.timeout(PATIENCE_S):
        return await client.recv()


async def receive_many(client: ClientConnection, count: int) -> list[Data]:
    """Receive a number of messages."""
    return [await receive(client) for _ in range(count)]


async def await_close(client: ClientConnection) -> tuple[int | None, str | None]:
    """Wait for the end of a connection; return the close code and reason of the relay."""
    async with asyncio.timeout(PATIENCE_S):
        await client.wait_closed()
    frame = client.protocol.close_rcvd
    return (frame.code, frame.reason) if frame is not None else (None, None)


def _event_of(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    is_event = isinstance(parsed, dict) and {"timestamp", "level", "event"} <= parsed.keys()
    return parsed if is_event else None


async def _get(
    url: str, context: ssl.SSLContext, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    async with httpx2.AsyncClient(verify=context, trust_env=False, timeout=PATIENCE_S) as http:
        return await http.get(url, headers=headers)
