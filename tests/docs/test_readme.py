"""The README tells the truth: its commands run, its links lead on.

So does the page on security: the tests that it names are there, its lines in YAML and Python work.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.async_api import ConsoleMessage
from websocket_relay.outcomes import Close, Refusal
from websockets.sync.client import connect

from tests.support import browser
from tests.support.markdown import anchors
from tests.support.programs import CURL, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import ROOT, Relay, StartRelay, receive, run_command
from tests.support.shell import persons_environment

README = (ROOT / "README.md").read_text()
SECURITY = (ROOT / "docs" / "explanation" / "security.md").read_text()
PORTS = {"server": "8443", "metrics": "9090"}  # as the README writes them

# They run this very test, or run for minutes; make says what they would do.
TOO_LONG = ("make test", "make bench")
STARTS_A_RELAY = re.compile(r"(^|\s)make run$")
CONVERSATION = "python -m websockets"


def blocks(language: str, page: str = README) -> list[str]:
    """Return a page's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Return the README's commands, in order."""
    lines = (line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines())
    return [line for line in lines if line.strip()]


class ReadersRelay(Relay):
    """The relay as a reader of the README starts it: by a line for the shell."""

    def __init__(self, command: str, directory: Path) -> None:
        anywhere = {f"RELAY__{name.upper()}__PORT": "0" for name in PORTS}
        super().__init__(directory)
        self._env = persons_environment(anywhere | {"RELAY__LOGGING__FORMAT": "json"})
        self._command = command

    def start(self) -> None:
        self.launch()

    def launch(self) -> None:
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

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        super().end()


class Reader:
    """Somebody who types the README's commands, one after another, in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._relay: ReadersRelay | None = None

    def type(self, command: str) -> None:
        if command in TOO_LONG:
            assert self._run(f"{command} --dry-run")
        elif STARTS_A_RELAY.search(command):
            self.stop_the_relay()
            self._relay = ReadersRelay(command, self._directory)
            self._relay.__enter__()
        elif CONVERSATION in command:
            self._converse(self._here(command))
        else:
            self._run(self._here(command))

    def stop_the_relay(self) -> None:
        if self._relay is not None:
            self._relay.press_ctrl_c()
            assert self._relay.complaints == []
            self._relay = None

    def leave(self) -> None:
        if self._relay is not None:
            self._relay.end()

    def _here(self, command: str) -> str:
        """Put the ports that the relay really has in the place of those in the README."""
        if self._relay is None:
            return command
        ports = {"server": self._relay.port, "metrics": self._relay.metrics_port}
        for name, port in ports.items():
            command = command.replace(f"localhost:{PORTS[name]}", f"localhost:{port}")
        return command

    def _run(self, command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self._directory,
            env=persons_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if said := re.match(r'echo "(.*?)" \|', command):
            assert said[1] in done.stdout.splitlines()
        return done.stdout

    def _converse(self, command: str) -> None:
        with subprocess.Popen(
            ["sh", "-c", command],
            cwd=self._directory,
            env=persons_environment({"PYTHONUNBUFFERED": "1"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as talk:
            assert talk.stdin is not None
            assert talk.stdout is not None
            print("hello", file=talk.stdin, flush=True)
            assert any("< hello" in line for line in talk.stdout), command
            talk.stdin.close()
            assert talk.wait(PATIENCE_S) == 0


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader in a directory that looks like the project and may be written to."""
    # Otherwise make would renew it from there, and it would run what lies there ever after.
    fresh = subprocess.run(
        ["make", "--question", ".venv/.dev"], cwd=ROOT, env=persons_environment(), check=False
    )
    assert fresh.returncode == 0, "the environment is out of date: make venv"
    for entry in ROOT.iterdir():
        if entry.suffix != ".pem":
            (tmp_path / entry.name).symlink_to(entry)
    reader = Reader(tmp_path)
    yield reader
    reader.leave()


@pytest.mark.timeout(180)
def test_every_command_does_what_it_says(reader: Reader) -> None:
    needed(CURL)
    assert {"make run", "make test"} <= set(commands())
    for command in commands():
        reader.type(command)
    reader.stop_the_relay()


@pytest.mark.parametrize("block", blocks("python"))
def test_the_lines_in_python_run(relay: Relay, block: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.replace(PORTS["server"], str(relay.port))],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello, everybody\n", "")


@pytest.mark.parametrize("block", blocks("js"))
async def test_the_lines_in_javascript_run(relay: Relay, block: str) -> None:
    def heard(message: ConsoleMessage) -> bool:
        return message.text == "hello, everybody"

    async with relay.client("news") as other:
        await other.send("hello, everybody")  # for those who hear what was said before
        await receive(other)
    async with browser.page() as page, page.expect_console_message(heard):
        script = block.replace(PORTS["server"], str(relay.port))
        await page.add_script_tag(content=script, type="module")


@pytest.mark.parametrize("block", blocks("yaml") + blocks("yaml", SECURITY))
def test_the_settings_are_settings(tmp_path: Path, block: str) -> None:
    (tmp_path / "my.yaml").write_text(block)
    done = run_command("check", "--config-file", "my.yaml", directory=tmp_path)
    assert (done.exit_code, done.faults) == (0, [])


def cells(row: str) -> tuple[str, ...]:
    return tuple(cell.strip().strip("`") for cell in row.strip("|").split("|"))


def table_rows(page: str) -> list[tuple[str, ...]]:
    """Return the rows of all tables on a page."""
    return [cells(line) for line in page.splitlines() if line.startswith("|")]


@pytest.mark.fast
def test_every_link_leads_somewhere() -> None:
    texts = {path: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))}
    links = {
        (path, link) for path, text in texts.items() for link in re.findall(r"\]\(([^)#]+)", text)
    }
    broken = {
        f"{path.name}: {link}"
        for path, link in links
        if "://" not in link and not (path.parent / link).exists()
    }
    assert broken == set()


@pytest.mark.fast
def test_every_link_to_a_heading_finds_one() -> None:
    lost = set()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
            target = page.parent / path if path else page
            if anchor not in anchors(target.read_text()):
                lost.add(f"{page.name}: {path}#{anchor}")
    assert lost == set()


def shown_by(page: str) -> list[tuple[str, str]]:
    """Return the tests that a page names: `tls: messages go over tls`."""
    return re.findall(r"`(\w+): ([a-z0-9_ ]+)`", page)


@pytest.mark.fast
def test_the_tests_that_show_what_holds_are_there() -> None:
    named = shown_by(SECURITY)
    assert named
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    absent = []
    for file, sentence in named:
        path = files.get(f"test_{file}")
        source = path.read_text() if path else ""
        if f"def test_{sentence.replace(' ', '_')}(" not in source:
            absent.append(f"{file}: {sentence}")
    assert absent == []


@pytest.mark.fast
def test_what_holds_is_shown_by_a_test() -> None:
    attacks = [row for row in table_rows(SECURITY) if len(row) == 4 and row[0].strip("-")]
    assert len(attacks) > 20
    assert [row[0] for row in attacks if not shown_by(f"`{row[3]}`")] == ["tries to", "tries to"]


@pytest.mark.fast
def test_the_reasons_of_an_attack_s_end_are_the_relay_s() -> None:
    labels = {why.label for why in (*Close, *Refusal)}
    attacks = [row for row in table_rows(SECURITY) if len(row) == 4 and row[0].strip("-")]
    named = {label for row in attacks for label in re.findall(r"[a-z0-9_]+", row[2])}
    assert named - {"reason"} <= labels


@pytest.mark.parametrize("block", blocks("python", SECURITY))
def test_the_token_made_by_hand_is_accepted(
    relay_with: StartRelay, tmp_path: Path, block: str
) -> None:
    secret = secrets.token_hex(32)
    (tmp_path / "secret.txt").write_text(f"{secret}\n")
    made = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": secret}})
    headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
    with connect(relay.ws_url("/channels/chat.lobby"), additional_headers=headers) as client:
        client.send("hello, everybody")
        assert client.recv(PATIENCE_S) == "hello, everybody"
