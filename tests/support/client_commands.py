"""Run the client commands of the command line, with pipes or a terminal. Knows no relay."""

import asyncio
import os
import pty
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    ROOT,
    CommandResult,
    environment,
    relay_command,
    run_command,
)

NO_PROXY = {"no_proxy": "*"}


class RunningCommand:
    """A running command, with its standard streams."""

    def __init__(self, process: "asyncio.subprocess.Process") -> None:
        self.process = process

    async def next_line(self) -> str:
        """Return the next line of standard output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await self.process.stdout.readline()).decode()

    async def next_notice(self) -> str:
        """Return the next line of standard error."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await self.process.stderr.readline()).decode()

    async def notice_with(self, words: str) -> str:
        """Skip lines of standard error until one contains these words; return it."""
        while words not in (line := await self.next_notice()):
            assert line, f"the command ended without {words!r}"
        return line

    async def write_stdin(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        await self.process.stdin.drain()

    async def finish(self) -> CommandResult:
        """Close standard input, and wait for the end of the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        async with asyncio.timeout(PATIENCE_S):
            stdout, stderr = await self.process.communicate()
        code = self.process.returncode
        assert code is not None
        return CommandResult(code, (stdout or b"").decode(), (stderr or b"").decode())

    async def exit_code(self) -> int:
        """Wait for the end of the process; standard input stays open."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@asynccontextmanager
async def running(
    *arguments: str, stdin: int = PIPE, stdout: int = PIPE, stderr: int = PIPE
) -> AsyncIterator[RunningCommand]:
    """Run a command as a process of its own, with pipes as its standard streams."""
    process = await asyncio.create_subprocess_exec(
        *relay_command(), *arguments,
        stdin=stdin, stdout=stdout, stderr=stderr,
        env=environment(NO_PROXY),
    )  # fmt: skip
    try:
        yield RunningCommand(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@contextmanager
def pseudo_terminal() -> Iterator[tuple[int, int]]:
    """Open a pseudo-terminal: the descriptor that reads its screen, and that of the program."""
    screen, program_side = pty.openpty()
    try:
        yield screen, program_side
    finally:
        os.close(screen)
        os.close(program_side)


async def run_client(*arguments: str, env: dict[str, str] | None = None) -> CommandResult:
    """Run a command that reads no standard input; a fork, which takes less than an interpreter."""
    return await asyncio.to_thread(
        run_command, *arguments, directory=ROOT, env=NO_PROXY | (env or {})
    )
