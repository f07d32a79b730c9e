"""Do what a page of the docs says, as its reader does. Knows the form of the pages, no single page.

A fenced block is done by its language:

- any, with `title="name"`: It is written to a file of that name. An absolute name is a file of
  another machine, which another test has to use.
- `sh`: Each command is run and has to succeed. One that ends with `# until Ctrl-C`, and `make run`,
  keeps running while the reader goes on, until the page ends or the same command is typed again.
- `text`: The commands or the script before it print these lines; `…` stands for anything in a line.
- `python`, `js`: It is run: as a program, or as a module of a page in a browser.
- `yaml`: These are settings that the relay accepts.
- `json`: It is JSON.
- `console`: Not run here: its commands need a daemon, a cluster or a cloud (`ELSEWHERE`).

The ports in the text are replaced by free ones.
"""

import asyncio
import fcntl
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import browser
from tests.support.programs import CURL, NATS, REDIS_7, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    HOST,
    ROOT,
    Relay,
    eventually,
    run_command,
)
from tests.support.shell import persons_environment

PORTS = ("8443", "9090", "8000", "6379", "4222")
"""The ports as the pages write them: relay, metrics, an application, Redis, NATS."""

ELSEWHERE = frozenset({"cosign", "docker", "helm", "kubectl", "pip", "python3", "systemctl"})
"""Commands that are not run: they need a daemon, a cluster, or a package that is released."""

NOT_RUN = re.compile(r"make (test|bench|replicas|image)\b")
"""They run this very test, or run for minutes; make says what they would do."""

STARTS_A_RELAY = re.compile(r"(^|\s)make run\b")
KEEPS_RUNNING = re.compile(r"\s+# until Ctrl-C$")
PROGRAMS = {"curl": CURL, "redis-server": REDIS_7, "nats-server": NATS}

FENCE = re.compile(
    r"""
    ^(?P<indent>\ *) ``` (?P<language>\w+) (?:\ title="(?P<title>[^"]+)")? \n
    (?P<text>.*?)
    ^(?P=indent) ``` $
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the title or "", its text, and where it begins."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order.

    Raises:
        AssertionError: a fence has another form than `FENCE`.
    """
    found = [
        Block(
            match["language"],
            match["title"] or "",
            textwrap.dedent(match["text"]),
            page.count("\n", 0, match.start()) + 1,
        )
        for match in FENCE.finditer(page)
    ]
    assert len(re.findall(r"^ *```", page, re.MULTILINE)) == 2 * len(found), "a malformed fence"
    return found


def commands(text: str) -> list[str]:
    """Return the commands of a block of `sh`, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@contextmanager
def free_ports() -> Iterator[Mapping[str, str]]:
    """Reserve a port for each of `PORTS`, against other tests on this machine.

    Below the ephemeral range, so that no connection takes one of them meanwhile.
    """
    directory = Path(tempfile.gettempdir())
    bases = list(range(20_000, 32_000, 10))
    random.shuffle(bases)
    for base in bases:
        with open(directory / f"websocket-relay-docs-{base}.lock", "w") as lock:
            chosen = range(base, base + len(PORTS))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if all(map(_is_free, chosen)):
                yield dict(zip(PORTS, map(str, chosen), strict=True))
                return
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


class PagesRelay(Relay):
    """A relay that a reader starts by a line for the shell."""

    def __init__(self, command: str, directory: Path, env: Mapping[str, str]) -> None:
        super().__init__(directory)
        self._command = command
        self._env = dict(env)

    def start(self) -> None:
        """Start the shell with the command in a session of its own."""
        self._process = subprocess.Popen(
            ["sh", "-c", self._command],
            cwd=self._directory,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()

    def press_ctrl_c(self) -> None:
        """Do as a terminal does: interrupt the shell, make and the relay alike."""
        os.killpg(self.process.pid, signal.SIGINT)
        self.await_log("stopped")
        self.process.wait(PATIENCE_S)
        self.end()
        assert self.complaints == []

    def end(self) -> None:
        """Leave no process of the session behind."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        super().end()


class Running:
    """A command that keeps running, and what it has printed."""

    def __init__(self, command: str, directory: Path, env: Mapping[str, str]) -> None:
        self.command = command
        self._output: list[str] = []
        self._process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._output.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self._output)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        """Press Ctrl-C, and leave no process of the session behind."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Reader:
    """Follows a page in a directory that looks like the project and may be written to."""

    def __init__(self, directory: Path, ports: Mapping[str, str]) -> None:
        self.relay: PagesRelay | None = None
        self._directory = directory
        self._ports = ports
        self._running: list[Running] = []
        self._printed = ""
        self._actions: dict[str, Callable[[str], Awaitable[None]]] = {
            "sh": self._type_all,
            "text": self._expect,
            "python": self._run_python,
            "js": self._run_in_a_browser,
            "yaml": self._check_settings,
            "json": self._check_json,
            "console": self._check_that_it_runs_elsewhere,
        }
        path = os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)))
        self._env = persons_environment(
            {
                "PATH": path,
                "PYTHONUNBUFFERED": "1",
                "no_proxy": "*",
                "RELAY__SERVER__PORT": ports["8443"],
                "RELAY__METRICS__PORT": ports["9090"],
            }
        )

    def here(self, text: str) -> str:
        """Return a text with this reader's ports in the place of those on the page."""
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda match: self._ports[match[0]], text)

    async def follow(self, page: str) -> None:
        """Do what all blocks of a page say, in order."""
        for block in blocks(page):
            try:
                await self.do(block)
            except AssertionError as error:
                raise AssertionError(f"line {block.line}: {error}") from error

    async def do(self, block: Block) -> None:
        """Do what one block says."""
        text = self.here(block.text)
        if block.title.startswith("/"):
            return
        if block.title:
            self._write(block.title, text)
            return
        assert block.language in self._actions, f"no test runs an untitled `{block.language}`"
        await self._actions[block.language](text)

    async def _type_all(self, text: str) -> None:
        for command in commands(text):
            await self.type(command)

    async def _run_python(self, program: str) -> None:
        self._printed = await self._run([sys.executable, "-c", program])

    async def _check_json(self, text: str) -> None:
        for line in text.splitlines() if "\n{" in text else [text]:
            json.loads(line)

    async def _check_that_it_runs_elsewhere(self, text: str) -> None:
        programs = {line.split()[1] for line in text.splitlines() if line.startswith("$ ")}
        assert programs <= ELSEWHERE, f"to be run as `sh`: {programs - ELSEWHERE}"

    async def type(self, command: str) -> None:
        """Run a command, or have it keep running."""
        for word in shlex.split(command, comments=True):
            if word in PROGRAMS:
                needed(PROGRAMS[word])
        if STARTS_A_RELAY.search(command):
            await self._start_a_relay(KEEPS_RUNNING.sub("", command))
        elif KEEPS_RUNNING.search(command):
            await self._start(KEEPS_RUNNING.sub("", command))
        else:
            dry = " --dry-run" if NOT_RUN.match(command) else ""
            self._printed = await self._run(["sh", "-c", command + dry])

    async def stop(self) -> None:
        """Stop what keeps running; the relay has to stop cleanly."""
        if self.relay is not None:
            relay, self.relay = self.relay, None
            await asyncio.to_thread(relay.press_ctrl_c)
        self.leave()

    def leave(self) -> None:
        """Leave no process behind."""
        with ExitStack() as stack:
            for running in self._running:
                stack.callback(running.end)
            if self.relay is not None:
                stack.callback(self.relay.end)
        self._running.clear()

    async def _start_a_relay(self, command: str) -> None:
        if self.relay is not None:
            relay, self.relay = self.relay, None
            await asyncio.to_thread(relay.press_ctrl_c)
        env = self._env | {"RELAY__LOGGING__FORMAT": "json"}
        relay = PagesRelay(command, self._directory, env)
        self.relay = relay
        await asyncio.to_thread(relay.__enter__)

    async def _start(self, command: str) -> None:
        for running in self._running:
            if running.command == command:
                running.end()
        self._running = [each for each in self._running if each.command != command]
        clients = 0.0 if self.relay is None else await self._clients()
        running = Running(command, self._directory, self._env)
        self._running.append(running)
        if " listen " in command:
            await eventually(lambda: self._has_more_clients(clients), f"{command}: connected")
            return
        (port,) = set(re.findall(r"\b[23]\d{4}\b", command)) & set(self._ports.values())

        async def accepts() -> tuple[bool, object]:
            assert not running.has_ended, f"{command}\n{running.output}"
            return not _is_free(int(port)), running.output

        await eventually(accepts, f"{command}: listens")

    async def _clients(self) -> float:
        assert self.relay is not None, "no relay is running"
        return await self.relay.metric("websocket_connected_clients")

    async def _has_more_clients(self, count: float) -> tuple[bool, object]:
        now = await self._clients()
        return now > count, now

    async def _run(self, command: Sequence[str]) -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=self._directory,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
        return str(done.stdout + done.stderr)

    async def _run_in_a_browser(self, script: str) -> None:
        printed: list[str] = []
        async with browser.page() as page, page.expect_console_message():
            page.on("console", lambda message: printed.append(message.text))
            await page.add_script_tag(content=script, type="module")
        self._printed = "\n".join(printed)

    async def _expect(self, text: str) -> None:
        async def look() -> tuple[bool, object]:
            outputs = [self._printed, *(running.output for running in self._running)]
            return any(_shows(output, text) for output in outputs), "\n---\n".join(outputs)

        await eventually(look, f"printed:\n{text}")

    def _write(self, name: str, text: str) -> None:
        file = self._directory / name
        assert file.resolve().is_relative_to(self._directory.resolve()), name
        if file.is_symlink():
            file.unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    async def _check_settings(self, text: str) -> None:
        self._write("checked.yaml", text)
        done = await asyncio.to_thread(
            run_command, "check", "--config-file", "checked.yaml", directory=self._directory
        )
        assert (done.exit_code, done.faults) == (0, []), text


def _shows(output: str, text: str) -> bool:
    """Return whether an output has these lines in this order, others between them allowed."""
    wanted = [re.escape(line.strip()).replace("…", ".*") for line in text.splitlines() if line]
    lines = iter(line.strip() for line in output.splitlines())
    return all(any(re.fullmatch(pattern, line) for line in lines) for pattern in wanted)
