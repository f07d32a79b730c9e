"""Share the event loop between long-running work and everything else. Knows nothing of the work.

Queued work is stepped in turn until the slice ends. Between two slices the loop serves other reads,
writes and callbacks. Needs no task and no timer.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from time import perf_counter

SlicedWork = Iterator[bool | None]
"""Each step does some of the work. It yields True if this work goes before all other next time."""

SLICE_S = 0.001
"""How long all queued work together runs in one iteration of the loop."""


class TimeSlicer:
    """A queue of work; each item is stepped until it ends.

    Args:
        rest_turns: iterations of the loop between two slices. Where input wakes a task that wakes
            another, each of them takes one iteration; with a slice in every iteration, each would
            wait for a slice.
    """

    def __init__(self, rest_turns: int = 0) -> None:
        self._rest_turns = rest_turns
        self._queue: deque[SlicedWork] = deque()
        self._is_scheduled = False

    @property
    def is_busy(self) -> bool:
        """Whether work is queued."""
        return self._is_scheduled

    def schedule_work(self, work: SlicedWork) -> None:
        """Queue work."""
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
                for goes_first in work:
                    if perf_counter() > until:
                        (queue.appendleft if goes_first else queue.append)(work)
                        break
                if perf_counter() > until:
                    break
        finally:  # work that raises does not stop the rest
            self._is_scheduled = bool(queue)
            if self._is_scheduled:
                self._rest(self._rest_turns)

    def _rest(self, turns: int) -> None:
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._rest, turns - 1)
        else:
            loop.call_soon(self._run_slice)
