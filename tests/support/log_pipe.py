"""A pipe as the standard error of a relay, which the test reads, leaves unread or closes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.support.forks import FORK_SERVER, ForkedProcess
from tests.support.relay_process import QUIET_SETTINGS, environment, merged


class LogPipe:
    """The reading end of a pipe.

    Args:
        reading: its descriptor.
        writing: the path of the other end in /proc.
    """

    def __init__(self, reading: int, writing: str) -> None:
        self.reading = reading
        self._writing = writing
        self._text = ""

    def read_until(self, word: str, *, count: int = 1) -> list[dict[str, Any]]:
        """Read lines until they contain a word so many times; return the events so far."""
        while self._text.count(word) < count or not self._text.endswith("\n"):
            piece = os.read(self.reading, 65_536)
            assert piece, self._text
            self._text += piece.decode()
        return list(map(json.loads, self._text.replace("\0", "").splitlines()))

    def fill(self) -> None:
        """Write to the pipe until it is full."""
        descriptor = os.open(self._writing, os.O_WRONLY | os.O_NONBLOCK)
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while True:
                    os.write(descriptor, bytes(size))
        os.close(descriptor)


@contextmanager
def relay_with_log_pipe(
    directory: Path, settings: Mapping[str, Any]
) -> Iterator[tuple[ForkedProcess, LogPipe]]:
    """Run a relay whose standard error is a pipe."""
    file = directory / "relay.yaml"
    file.write_text(yaml.safe_dump(merged(QUIET_SETTINGS, settings)))
    arguments = ["--config-file", str(file)]
    with open(os.devnull, "wb") as stdout:
        process = FORK_SERVER.start(arguments, directory, environment(), stdout.fileno())
    with process.stderr:
        try:
            yield process, LogPipe(process.stderr.fileno(), f"/proc/{process.pid}/fd/2")
        finally:
            process.kill()
            process.wait()
