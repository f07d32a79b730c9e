"""A command in a terminal of its own: what it prints, and its end by Ctrl-C. Knows no page.

All processes of a command are one process group, which no signal reaches once the command has been
reaped: its number may be another group's by then.
"""

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import POLL_S

COMMAND_S = 60.0
"""What a command may take to start, or to end: more than one of them may start at a time on a busy
machine, and each is a Python."""


@dataclass(slots=True)
class Output:
    """The lines that a command, a script or a page has printed.

    Args:
        source: what printed them.
        lines: all of them.
        shown: how many of them `shows` has accounted for.
    """

    source: str
    lines: list[str] = field(default_factory=list)
    shown: int = 0

    def __str__(self) -> str:
        return "\n".join((f"[{self.source}]", *self.lines))

    def shows(self, text: str) -> bool:
        """Return whether the lines of a text come next, others between them allowed.

        They do not count for the next text. `…` stands for anything in a line.
        """
        wanted = [re.escape(line.strip()).replace("…", ".*") for line in text.splitlines() if line]
        position = self.shown
        for pattern in wanted:
            rest = enumerate(self.lines[position:], position + 1)
            found = (end for end, line in rest if re.fullmatch(pattern, line.strip()))
            position = next(found, -1)
            if position < 0:
                return False
        self.shown = position
        return True


class Terminal:
    """A command that runs, or has run, in a process group of its own.

    Args:
        argv: the command.
        directory: its working directory.
        env: its environment.
        name: what to call it in failures.
    """

    def __init__(
        self, argv: Sequence[str], directory: Path, env: Mapping[str, str], name: str
    ) -> None:
        self.output = Output(name)
        self._has_ended = False
        self._process = subprocess.Popen(
            argv,
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.lines.append(line.rstrip("\n"))

    @property
    def exit_code(self) -> int | None:
        """The status of the command; None while it runs."""
        if not self._has_ended and self._process.poll() is not None:
            self._has_ended = True
            with suppress(ProcessLookupError):  # the usual case: nothing is left of the group
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.returncode if self._has_ended else None

    async def end(self) -> int:
        """Wait for the command's end and the rest of its output; return its status.

        Raises:
            AssertionError: it is still running after `COMMAND_S`.
        """
        await poll_until(lambda: self.exit_code is not None, self._still_running)
        await asyncio.to_thread(self._close)
        assert self._process.returncode is not None
        return self._process.returncode

    async def press_ctrl_c(self) -> int:
        """Interrupt all processes of the command, as a terminal does; return its status.

        Raises:
            AssertionError: it is still running after `COMMAND_S`.
        """
        if self.exit_code is None:
            os.killpg(self._process.pid, signal.SIGINT)
            # make may end before what it runs, which `exit_code` would kill.
            await poll_until(lambda: not self._reader.is_alive(), self._still_running)
        return await self.end()

    def kill(self) -> None:
        """Leave no process of the command behind, whatever state it is in."""
        if self.exit_code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PATIENCE_S)
            self._has_ended = True
        self._close()

    def _still_running(self) -> str:
        return f"still running: {self.output}"

    def _close(self) -> None:
        self._reader.join(PATIENCE_S)
        # A process that has left the group may still hold the pipe; close() would wait for it.
        assert not self._reader.is_alive(), f"a process of its own was left: {self.output}"
        assert self._process.stdout is not None
        self._process.stdout.close()


async def poll_until(
    condition: Callable[[], bool], failure: Callable[[], str], *, limit_s: float = COMMAND_S
) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not hold after `limit_s`; the text is that of `failure`.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {limit_s:.0f} s {failure()}")
        await asyncio.sleep(POLL_S)
