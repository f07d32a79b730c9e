"""Notice that files are replaced. Knows nothing of their content."""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

POLL_INTERVAL_S = 1.0
"""Interval between two polls, of one stat call for each file. File system events would not report
that Kubernetes replaces a mounted Secret, because it swaps a link in the parent directory."""

States = dict[Path, tuple[int, int, int] | None]
"""Time of change, size and inode of each file; None: it does not exist."""


class WatchedFiles:
    """Files, and their state when they were last seen.

    Args:
        files: returns the paths; called for each poll, because they may change.
    """

    def __init__(self, files: Callable[[], Iterable[Path]]) -> None:
        self._files = files
        self._seen = self._states()

    async def wait_for_change(self) -> None:
        """Wait until a file is another one, has another content, appears or disappears."""
        while True:
            states = self._states()
            if states != self._seen:
                self._seen = states
                return
            await asyncio.sleep(POLL_INTERVAL_S)

    def _states(self) -> States:
        states: States = {}
        for file in self._files():
            try:
                stat = file.stat()
                states[file] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            except (OSError, ValueError):  # a NUL byte in a name raises ValueError
                states[file] = None
        return states
