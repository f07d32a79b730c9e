"""Share the event loop between long-running work and everything else. Knows nothing of the work.

Queued work is called in turn, with the time at which its slice ends. Between two slices the loop
serves other reads, writes and callbacks. Needs no task and no timer.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

SlicedWork = Callable[[float], bool]
"""Does some of the work, at least one step, and stops soon after the given `perf_counter` time.
Returns whether the work is complete.
"""

SLICE_S = 0.001
"""How long all queued work together runs in one iteration of the loop."""


class TimeSlicer:
    """A queue of work; each item is called until it is complete.

    Args:
        rest_turns: iterations of the loop between two slices. Where input wakes a task that wakes
            another, each of them takes one iteration; with a slice in every iteration, each would
            wait for a slice.
    """

    def __init__(self, rest_turns: int = 0) -> None:
        self._rest_iterations = rest_turns
        self._queue: deque[SlicedWork] = deque()
        self._is_scheduled = False

    @property
    def is_busy(self) -> bool:
        """Whether work is queued."""
        return self._is_scheduled

    def schedule_work(self, work: SlicedWork, *, first: bool = False) -> None:
        """Queue work, which must not be in the queue already.

        Args:
            first: puts it before all other queued work.
        """
        if first:
            self._queue.appendleft(work)
        else:
            self._queue.append(work)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run_slice)

    def _run_slice(self) -> None:
        queue = self._queue
        until = perf_counter() + SLICE_S
        try:
            while queue:
                work = queue.popleft()
                if not work(until):
                    queue.append(work)
                if perf_counter() > until:
                    break
        finally:  # work that raises does not stop the rest
            self._is_scheduled = bool(queue)
            if self._is_scheduled:
                self._reschedule(self._rest_iterations)

    def _reschedule(self, iterations: int) -> None:
        loop = asyncio.get_running_loop()
        if iterations:
            loop.call_soon(self._reschedule, iterations - 1)
        else:
            loop.call_soon(self._run_slice)
