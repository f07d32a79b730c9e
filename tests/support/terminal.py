"""Run a command in its own process group, record its output, and interrupt it. Knows no page.

No signal is sent to the group after the command has been reaped: its number may then belong to
another group.
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
"""The timeout for the start and for the end of a command. Several commands, each a Python, may
start at a time on a busy machine."""


@dataclass(slots=True)
class Output:
    """The lines that a command, a script or a page has printed.

    Args:
        source: the name of the command, script or page.
        lines: all lines, in order.
        shown: the number of lines that calls of `shows` have consumed.
    """

    source: str
    lines: list[str] = field(default_factory=list)
    shown: int = 0

    def __str__(self) -> str:
        return "\n".join((f"[{self.source}]", *self.lines))

    def shows(self, text: str) -> bool:
        """Return whether the lines of a text come next; other lines may be between them.

        The lines are consumed: the next call begins after them. `…` matches anything in a line.
        """
        patterns = [
            re.escape(line.strip()).replace("…", ".*") for line in text.splitlines() if line
        ]
        position = self.shown
        for pattern in patterns:
            rest = enumerate(self.lines[position:], position + 1)
            found = (end for end, line in rest if re.fullmatch(pattern, line.strip()))
            position = next(found, -1)
            if position < 0:
                return False
        self.shown = position
        return True


class Terminal:
    """A command in its own process group.

    Args:
        argv: the command line.
        directory: the working directory.
        env: the environment.
        name: of the command, for errors.
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
            with suppress(ProcessLookupError):  # usually no other process of the group is left
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.returncode if self._has_ended else None

    async def end(self) -> int:
        """Wait for the end of the command and of its output; return its exit status.

        Raises:
            AssertionError: it is still running after `COMMAND_S`.
        """
        await poll_until(lambda: self.exit_code is not None, self._still_running)
        await asyncio.to_thread(self._close)
        assert self._process.returncode is not None
        return self._process.returncode

    async def press_ctrl_c(self) -> int:
        """Interrupt all processes of the command, as a terminal does; return its exit status.

        Raises:
            AssertionError: it is still running after `COMMAND_S`.
        """
        if self.exit_code is None:
            os.killpg(self._process.pid, signal.SIGINT)
            # make may end before the command that it runs, and `exit_code` would kill that one.
            await poll_until(lambda: not self._reader.is_alive(), self._still_running)
        return await self.end()

    def kill(self) -> None:
        """Kill all processes of the command, if it is running, and close its output."""
        if self.exit_code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PATIENCE_S)
            self._has_ended = True
        self._close()

    def _still_running(self) -> str:
        return f"still running: {self.output}"

    def _close(self) -> None:
        self._reader.join(PATIENCE_S)
        # A process that has left the group may keep the pipe open; close() would wait for it.
        assert not self._reader.is_alive(), f"a process has left the group: {self.output}"
        assert self._process.stdout is not None
        self._process.stdout.close()


async def poll_until(
    condition: Callable[[], bool], failure: Callable[[], str], *, limit_s: float = COMMAND_S
) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not hold within `limit_s`. `failure` returns the text.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {limit_s:.0f} s {failure()}")
        await asyncio.sleep(POLL_S)
