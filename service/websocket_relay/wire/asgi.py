"""Name the types of ASGI 3, and run a request without a task for as long as nothing is awaited.

Knows no protocol. https://asgi.readthedocs.io/en/latest/specs/main.html
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from typing import Any

Scope = dict[str, Any]
Event = dict[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application."""


def start_now(work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine until it first suspends, and the rest of it in a task.

    A task, and the loop iteration until it starts, cost more than the rest of most handshakes.
    Python 3.12 has `asyncio.eager_task_factory` for it.

    Args:
        work: suspends first in `enter_task`: what it awaits before that must not suspend.

    Returns:
        The task; None if the coroutine has ended.
    """
    context = copy_context()
    try:
        awaited = context.run(work.send, None)
    except StopIteration:
        return None
    if awaited is not None:
        work.close()
        raise RuntimeError(f"{awaited} is awaited before enter_task")
    return asyncio.get_running_loop().create_task(work, context=context)


async def enter_task() -> None:
    """Go on in a task, in the next iteration of the loop. See `start_now`."""
    await asyncio.sleep(0)
