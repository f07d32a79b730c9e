"""Share out the event loop among those who have much to do.

Whoever has work is called in turn with the time at which its slice ends. Between two slices the
loop reads, writes and answers others. No task and no timer.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

SlicedWork = Callable[[float], bool]
"""Does some of the work, at least a little, and stops soon after the given `perf_counter` time.
Returns whether all is done."""

SLICE_S = 0.001
"""How long all of them together work in one turn of the loop."""


class TimeSlicer:
    """A queue of workers, each called until it is done.

    Args:
        rest_turns: turns of the loop that are left to others between two slices. Where what came in
            wakes a task that wakes another, it takes a turn for each, and with a slice in every
            turn as many slices.
    """

    def __init__(self, rest_turns: int = 0) -> None:
        self._rest_turns = rest_turns
        self._workers: deque[SlicedWork] = deque()
        self._is_scheduled = False

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for a turn."""
        return self._is_scheduled

    def add(self, work: SlicedWork, *, first: bool = False) -> None:
        """Give somebody turns. It must not be in the queue already.

        Args:
            first: before all others who wait.
        """
        if first:
            self._workers.appendleft(work)
        else:
            self._workers.append(work)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        workers = self._workers
        until = perf_counter() + SLICE_S
        try:
            while workers:
                work = workers.popleft()
                if not work(until):
                    workers.append(work)
                if perf_counter() > until:
                    break
        finally:  # one that fails does not stop the others
            self._is_scheduled = bool(workers)
            if self._is_scheduled:
                self._rest(self._rest_turns)

    def _rest(self, turns: int) -> None:
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._rest, turns - 1)
        else:
            loop.call_soon(self._work)
