"""Follow a page of the docs as a reader does. Knows the form of the pages, no single page.

The language of a fenced block determines what is done with it:

- any, with `title="name"`: The text is written to a file of that name. An absolute name is a file
  of another machine, which another test has to use.
- `sh`: Each command runs in a shell of its own, and has to succeed. A command that ends with
  `# until Ctrl-C`, and `make run`, keeps running during the next blocks: to the end of the page,
  or until a command needs its port or is the same one again. `python -m webbrowser URL` opens a
  page, which also stays open. `npx TOOL` runs a tool of tests/support/npm.
- `text`: The commands of the previous block, or a command that keeps running, print these lines
  next, or an open page logs or shows them; `…` matches anything within a line.
- `python`: The text runs as a program.
- `js`: The text runs in a browser: as a module of an empty page if it has a static `import`,
  otherwise in the developer console of the relay's own page. If it contains `console.log`, it has
  to log something.
- `yaml`: The relay accepts these settings.
- `json`: The text is valid JSON.
- `console`: Not run: the commands need a daemon, a cluster, a cloud or root (`RUN_ELSEWHERE`), or
  connect to a host of the reader (`example.com`).

The ports in the text are replaced by free ones.
"""

import asyncio
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from playwright.async_api import CDPSession, Error, Page

from tests.support import browser
from tests.support.forks import FORK_SERVER
from tests.support.markdown import anchor_of
from tests.support.programs import ANY_REDIS, CURL, NATS, OPENSSL, PROMTOOL, TYPESCRIPT, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, ROOT, eventually, run_command
from tests.support.shell import user_environment
from tests.support.terminal import Output, Terminal, poll_until
from tests.support.tools import npm_command

PORTS = ("8443", "9090", "8444", "9091", "8000", "6379", "4222")
"""The ports on the pages: a relay and its metrics, a second replica and its metrics, an
application, Redis, NATS."""

RUN_ELSEWHERE = frozenset(
    {
        *("cosign", "docker", "haproxy", "helm", "journalctl", "kubectl"),
        *("nginx", "npm", "pip", "python3", "systemctl", "useradd"),
        *("/opt/websocket-relay/bin/python", "/opt/websocket-relay/bin/websocket-relay"),
    }
)
"""Commands that are not run: they need a daemon, a cluster, root, or a released package."""

READERS_HOST = "example.com"
"""A command that names a host of this domain is not run either."""

NOT_RUN = re.compile(r"^make (?=(test|bench|replicas|image)\b)")
"""Targets of make that run this very test, or run for minutes: make only prints their commands."""

PROGRAMS = {
    "curl": (CURL,),
    "nats-server": (NATS,),
    "openssl": (OPENSSL,),
    "promtool": (PROMTOOL,),
    "redis-server": ANY_REDIS,
    "tsc": (TYPESCRIPT,),
}
"""Programs that a machine may lack. The first one on the PATH may be another version."""

RELAY = re.compile(
    r"^(\w+=(\"(\\.|[^\"\\])*\"|[^\s\"])*\s+)*"
    r"(make run\b|websocket-relay( serve)?( --config-file \S+)?$)"
)
RELAY_PORT = re.compile(r"\bRELAY__SERVER__PORT=(\d+)")
CLIENT = re.compile(r"\bwebsocket-relay (listen|send|verify) ")
KEEPS_RUNNING = re.compile(r"\s+# until Ctrl-C$")
WEB_PAGE = re.compile(r"^python -m webbrowser (\S+)$")
NPM_TOOL = re.compile(r"^npx (?P<tool>\S+)")
CHANGES_THE_SHELL = re.compile(r"^(cd|export|set|source|umask|unset)\b")
URL = re.compile(r"\w+://\S+")
IS_READY = re.compile(r"(\] |\"event\": \")ready\b")
HAS_STOPPED = re.compile(r"(\] |\"event\": \")stopped\b")
IS_MODULE = re.compile(r"^import\b[^(]", re.MULTILINE)

FENCE = re.compile(r'(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?')
HEADING = re.compile(r"#+ (.+)")
EMPTY = "about:blank"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Args:
        language: the word after the fence.
        title: the name of a file, or "".
        text: the lines between the fences, without the indentation of the fence.
        line: the number of the first fence's line.
        section: the anchor of the heading before the block.
    """

    language: str
    title: str
    text: str
    line: int
    section: str


def fenced_blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order.

    Raises:
        AssertionError: a fence is malformed, or is not closed.
    """
    found: list[Block] = []
    section = ""
    fence: re.Match[str] | None = None
    first, text = 0, ""
    for number, line in enumerate(page.splitlines(), 1):
        if fence is None and line.lstrip().startswith("```"):
            fence = FENCE.fullmatch(line)
            assert fence is not None, f"line {number}: a malformed fence: {line}"
            first, text = number, ""
        elif fence is None:
            heading = HEADING.fullmatch(line)
            section = anchor_of(heading[1]) if heading else section
        elif line == f"{fence['indent']}```":
            title = fence["title"] or ""
            found.append(Block(fence["language"], title, text, first, section))
            fence = None
        else:
            text += f"{line.removeprefix(fence['indent'])}\n"
    assert fence is None, f"line {first}: the fence is not closed"
    return found


def shell_commands(text: str) -> Iterator[tuple[int, str]]:
    """Yield the commands of a block of `sh`, and the line at which each begins.

    Continued lines are joined. The fence is line 0.
    """
    first, command = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if not command and (not line.strip() or line.startswith("#")):
            continue
        first = first if command else number
        command += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield first, command
            command = ""


def _accepts(port: str) -> bool:
    """Return whether a port accepts connections; a bound port, or one in TIME_WAIT, does not."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, int(port))) == 0


@dataclass(frozen=True, slots=True)
class BackgroundCommand:
    """A command that keeps running during the next blocks.

    Args:
        command: the command line.
        ports: on which it listens.
        terminal: in which it runs.
    """

    command: str
    ports: frozenset[str]
    terminal: Terminal

    @property
    def is_relay(self) -> bool:
        return RELAY.match(self.command) is not None

    def is_ready(self) -> bool:
        """Return whether the next command can use this one.

        Raises:
            AssertionError: the command has ended.
        """
        self.assert_running()
        lines = self.terminal.output.lines
        if self.is_relay:
            return any(map(IS_READY.search, lines))
        if CLIENT.search(self.command):
            return any("connected to " in line for line in lines)
        assert self.ports, f"readiness is unknown: the command names none of the ports {PORTS}"
        return all(map(_accepts, self.ports))

    def assert_running(self) -> None:
        code = self.terminal.exit_code
        assert code is None, f"ended with status {code}: {self.terminal.output}"

    def _lacks_a_token(self) -> bool:
        """Return whether a client was refused by a later relay of the page, which has tokens."""
        return any(line.endswith("HTTP 401, token required") for line in self.terminal.output.lines)

    async def press_ctrl_c(self) -> None:
        """Interrupt the command; a relay has to stop cleanly.

        Raises:
            AssertionError: the command has failed by itself, or a relay did not stop cleanly.
        """
        is_fit = self.terminal.exit_code in (None, 0) or self._lacks_a_token()
        assert is_fit, f"failed: {self.terminal.output}"
        await self.terminal.press_ctrl_c()
        if self.is_relay:
            lines = self.terminal.output.lines
            is_clean = any(map(HAS_STOPPED.search, lines)) and "Traceback" not in "".join(lines)
            assert is_clean, f"no clean stop: {self.terminal.output}"


@dataclass(frozen=True, slots=True)
class BrowserWindow:
    """An open web page, and its log."""

    page: Page
    output: Output

    async def text(self) -> Output:
        """Return the text that the page shows now."""
        text = await self.page.inner_text("body")
        return Output(f"{self.output.source} shows", text.splitlines())


class PageReader:
    """Follows pages, in a writable directory that looks like the project.

    At the end of `async with`, all started commands are interrupted as by a reader, and killed if
    a test has failed.
    """

    def __init__(self, directory: Path, ports: Mapping[str, str]) -> None:
        self._directory = directory
        self._ports = ports
        self._running: list[BackgroundCommand] = []
        self._windows = AsyncExitStack()
        self._open: list[BrowserWindow] = []
        self._console: tuple[BrowserWindow, CDPSession] | None = None
        self._printed = Output("")
        self._place = ""
        self._actions: dict[str, Callable[[Block], Awaitable[None]]] = {
            "sh": self._run_commands,
            "text": self._expect,
            "python": self._run_python,
            "js": self._run_in_a_browser,
            "yaml": self._check_settings,
            "json": self._check_json,
            "console": self._check_that_it_runs_elsewhere,
        }
        programs = [str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)]
        if sys.platform == "linux":  # forks, because the pages start dozens of relays and clients
            programs.insert(0, str(FORK_SERVER.program().parent))
        path = os.pathsep.join(programs)
        self._env = user_environment(
            {
                "PATH": path,
                "PYTHONUNBUFFERED": "1",
                "no_proxy": "*",
                "RELAY__SERVER__PORT": ports["8443"],
                "RELAY__METRICS__PORT": ports["9090"],
            }
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._windows.__aexit__(kind, error, trace)
            while error is None and self._running:
                await self._press_ctrl_c(self._running[-1])
        finally:
            with ExitStack() as stack:
                for running in self._running:
                    stack.callback(running.terminal.kill)

    @property
    def outputs(self) -> list[Output]:
        """The outputs of the last block, of each running command, and of each open page."""
        running = (each.terminal.output for each in self._running)
        return [self._printed, *running, *(window.output for window in self._open)]

    def with_own_ports(self, text: str) -> str:
        """Return a text of a page with the ports of this reader."""
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda match: self._ports[match[0]], text)

    async def follow(self, page: Path, *sections: str) -> None:
        """Follow the blocks of a page, in order.

        Args:
            page: the file.
            sections: the anchors of the headings whose blocks are followed; none: all blocks.
        """
        self._place = "its blocks"
        try:
            for block in fenced_blocks(await asyncio.to_thread(page.read_text)):
                if not sections or block.section in sections:
                    self._place = f"line {block.line}: a block of `{block.language}`"
                    await self._follow_block(block)
        except BaseException as error:
            error.add_note(f"{page.name}, {self._place}")
            raise

    async def open_page(self, url: str) -> BrowserWindow:
        """Open a web page in a window, until the end of `async with`."""
        url = self.with_own_ports(url)
        page = await self._windows.enter_async_context(browser.open_page())
        window = BrowserWindow(page, Output(url))
        self._open.append(window)
        lines = window.output.lines
        page.on("console", lambda message: lines.extend(message.text.splitlines()))
        page.on("pageerror", lambda error: lines.append(str(error)))
        if url != EMPTY:  # a new window shows it already, and could load no module after goto
            await page.goto(url)
        return window

    async def press_ctrl_c(self, command: str) -> None:
        """Interrupt a command that keeps running, by its command line on the page."""
        (running,) = (
            each for each in self._running if each.command == self.with_own_ports(command)
        )
        await self._press_ctrl_c(running)

    async def _press_ctrl_c(self, running: BackgroundCommand) -> None:
        await running.press_ctrl_c()
        self._running.remove(running)

    async def _follow_block(self, block: Block) -> None:
        if block.title.startswith("/"):
            return
        if block.title:
            self._write(self.with_own_ports(block.title), self.with_own_ports(block.text))
            return
        assert block.language in self._actions, f"no test runs an untitled `{block.language}`"
        await self._actions[block.language](block)

    # sh

    async def _run_commands(self, block: Block) -> None:
        self._printed = Output("the commands before")
        for number, command in shell_commands(block.text):
            self._place = f"line {block.line + number}: {command}"
            await self._run_command(self.with_own_ports(command))

    async def _run_command(self, command: str) -> None:
        bare = KEEPS_RUNNING.sub("", command)
        assert not CHANGES_THE_SHELL.match(command), "each command runs in a new shell"
        if match := WEB_PAGE.match(command):
            await self.open_page(match[1])
        elif bare != command or RELAY.match(command):
            await self._start(bare)
        else:
            command = await _with_the_programs_of_tests(NOT_RUN.sub("make --dry-run ", command))
            await self._run("sh", "-c", command)

    async def _run(self, *argv: str) -> None:
        terminal = Terminal(argv, self._directory, self._env, argv[-1])
        try:
            code = await terminal.end()
        finally:
            terminal.kill()
        assert code == 0, f"status {code}: {terminal.output}"
        self._printed.lines += terminal.output.lines

    async def _start(self, command: str) -> None:
        ports = self._ports_of(command)
        for other in list(self._running):
            if other.command == command or other.ports & ports:
                await self._press_ctrl_c(other)
        argv = ["sh", "-c", await _with_the_programs_of_tests(command)]
        running = BackgroundCommand(
            command, ports, Terminal(argv, self._directory, self._env, command)
        )
        self._running.append(running)
        await poll_until(running.is_ready, lambda: f"not ready: {running.terminal.output}")

    def _ports_of(self, command: str) -> frozenset[str]:
        """Return the ports on which a command listens; those in URLs do not count."""
        if RELAY.match(command):
            named = RELAY_PORT.search(command)
            return frozenset([named[1] if named else self._ports["8443"]])
        return frozenset(self._ports.values()) & frozenset(re.findall(r"\d+", URL.sub("", command)))

    # text

    async def _expect(self, block: Block) -> None:
        expected = self.with_own_ports(block.text)

        async def find_expected() -> tuple[bool, object]:
            texts = [await window.text() for window in self._open]
            outputs = [*self.outputs, *texts]
            return any(output.shows(expected) for output in outputs), "\n".join(map(str, outputs))

        await eventually(find_expected, f"shown:\n{expected}")

    # python, js

    async def _run_python(self, block: Block) -> None:
        self._printed = Output("the script before")
        await self._run(sys.executable, "-c", self.with_own_ports(block.text))

    async def _run_in_a_browser(self, block: Block) -> None:
        script = self.with_own_ports(block.text)
        if IS_MODULE.search(script):
            window = await self._open_with_module(script)
        else:
            window = await self._paste(script)
        if "console.log" in script:
            logged = window.output.lines
            await poll_until(lambda: logged != [], lambda: "nothing is logged", limit_s=PATIENCE_S)

    async def _open_with_module(self, script: str) -> BrowserWindow:
        window = await self.open_page(EMPTY)
        await window.page.add_script_tag(content=f"{script}\nwindow.hasRun = true;", type="module")
        try:
            await window.page.wait_for_function("window.hasRun")
        except Error:
            failure = f"the module does not run to the end: {window.output}"
            raise AssertionError(failure) from None
        return window

    async def _paste(self, script: str) -> BrowserWindow:
        """Run a script in the developer console of the relay's page, which stays open."""
        if self._console is None:
            window = await self.open_page("http://localhost:8443/")
            session = await window.page.context.new_cdp_session(window.page)
            self._console = (window, session)
        window, session = self._console
        evaluation = {"expression": script, "replMode": True, "awaitPromise": True}
        result = await session.send("Runtime.evaluate", evaluation)
        if "exceptionDetails" in result:
            raise AssertionError(result["result"].get("description", result["exceptionDetails"]))
        return window

    # yaml, json, console

    async def _check_settings(self, block: Block) -> None:
        self._write("checked.yaml", self.with_own_ports(block.text))
        done = await asyncio.to_thread(
            run_command, "check", "--config-file", "checked.yaml", directory=self._directory
        )
        assert (done.exit_code, done.faults) == (0, []), block.text

    async def _check_json(self, block: Block) -> None:
        for line in block.text.splitlines() if "\n{" in block.text else [block.text]:
            json.loads(line)

    async def _check_that_it_runs_elsewhere(self, block: Block) -> None:
        lines = [line for line in block.text.splitlines() if line.startswith("$ ")]
        programs = {line.split()[1] for line in lines if READERS_HOST not in line}
        assert programs <= RUN_ELSEWHERE, f"to be run as `sh`: {programs - RUN_ELSEWHERE}"

    def _write(self, name: str, text: str) -> None:
        file = self._directory / name
        is_below = file.parent.resolve().is_relative_to(self._directory.resolve())
        assert is_below, f"{name} is not in the reader's directory"
        file.unlink(missing_ok=True)  # it may be a link to a file of the project
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


async def _with_the_programs_of_tests(command: str) -> str:
    """Return a command with the paths of programs that are not found by the PATH.

    Raises:
        Skipped: a program is not installed.
    """
    if match := NPM_TOOL.match(command):
        tool = await asyncio.to_thread(npm_command, match["tool"])
        modules = Path(tool[-1]).parents[2]
        command = f"NODE_PATH={modules} {shlex.join(tool)}{command[match.end() :]}"
    for word, programs in PROGRAMS.items():
        name = re.compile(rf"(?<![^\s(|]){word}(?!\S)")
        if name.search(command):
            command = name.sub(str(needed(*programs)), command, count=1)
    return command
