"""Cancel tasks and calls reliably, even if a library loses a cancellation.

asyncio cancels a task once. Python 3.11's `asyncio.wait_for` drops that cancellation if its result
arrives in the same turn of the event loop (https://github.com/python/cpython/issues/86296), nats-py
uses it, and some libraries catch CancelledError. The task then continues as if it had not been
cancelled. So this module repeats a cancellation until the task is done or the block is left.

Knows no connection and no broker.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")

RETRY_CANCEL_S = 0.1
"""A cancelled task has this time to clean up; then it is cancelled again."""


async def cancel_until_done(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until all of them are done.

    Raises:
        CancelledError: the caller was cancelled meanwhile. The tasks are done in this case, too.
    """
    cancelled: asyncio.CancelledError | None = None
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        try:
            await asyncio.wait(pending, timeout=RETRY_CANCEL_S)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def run_cancellable(function: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine such that a single cancellation ends it.

    Args:
        function: creates the coroutine. An existing coroutine would never be awaited if the
            cancellation arrives before the first step.
    """
    task = asyncio.create_task(function())
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        with suppress(asyncio.CancelledError):
            await cancel_until_done(task)
        if task.cancelled() or task.exception() is None:
            raise
    return task.result()


class Deadline:
    """Raise TimeoutError in a block that exceeds its deadline.

    Unlike `asyncio.timeout` it repeats the cancellation until the block is left: a block that lost
    it would continue without a deadline.

    Args:
        after_s: maximum duration of the block.
    """

    __slots__ = ("_after_s", "_cancelled_before", "_cancels", "_task", "_timer")

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._cancels = 0

    async def __aenter__(self) -> None:
        """Start the timer."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelled_before = task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(self._after_s, self._expire)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the timer; revoke the cancellations that the deadline made."""
        self._timer.cancel()
        for _ in range(self._cancels):
            self._task.uncancel()
        is_cancelled = self._task.cancelling() > self._cancelled_before
        if self._cancels and kind is asyncio.CancelledError and not is_cancelled:
            raise TimeoutError from error

    def _expire(self) -> None:
        self._cancels += 1
        self._task.cancel()
        self._timer = asyncio.get_running_loop().call_later(RETRY_CANCEL_S, self._expire)
