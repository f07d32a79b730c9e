"""Render expensive pages once for all concurrent requests.

Owns the share of time spent on rendering. Knows no page, no route and no metric.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

COST_FACTOR = 20
"""A page that took 1 ms to render is followed by a pause of 20 ms: in the long run, rendering takes
at most a twentieth of the time."""

MAX_PAUSE_S = 1.0
"""Maximum pause after a page, however long its rendering took."""

BURST_S = 1.0
"""Pause time that idle time pays in advance: infrequent requests never wait."""

ANSWERS_PER_TURN = 4
"""Requests answered in one turn of the event loop. Each then writes the page to its connection."""

RenderPage = Callable[[], bytes]


class PageCache:
    """Pages that share one time budget.

    A request gets a page whose rendering started after the request arrived, so it never sees a
    state older than itself. All requests that are pending at that moment get the same bytes.
    """

    def __init__(self) -> None:
        self._pending: dict[str, tuple[RenderPage, list[asyncio.Future[bytes]]]] = {}
        self._rendered: deque[tuple[asyncio.Future[bytes], bytes]] = deque()
        self._is_scheduled = False
        self._next_at = 0.0

    async def get(self, name: str, render: RenderPage) -> bytes:
        """Return the page.

        Args:
            name: identifies the page.
            render: renders the page; of all pending requests, the first one's is called.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        self._pending.setdefault(name, (render, []))[1].append(answer)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_at(self._next_at, self._render)
        return await answer

    def _render(self) -> None:
        name = next(iter(self._pending))
        render, answers = self._pending.pop(name)
        started_at = perf_counter()
        try:
            page = render()
        except Exception as error:  # noqa: BLE001  # it is raised in every pending request
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
        else:
            if not self._rendered:
                asyncio.get_running_loop().call_soon(self._answer_some)
            self._rendered.extend((answer, page) for answer in answers)
        self._schedule_next(perf_counter() - started_at)

    def _schedule_next(self, cost_s: float) -> None:
        loop = asyncio.get_running_loop()
        pause_s = min(cost_s * COST_FACTOR, MAX_PAUSE_S)
        self._next_at = max(self._next_at, loop.time() - BURST_S) + pause_s
        self._is_scheduled = bool(self._pending)
        if self._is_scheduled:
            loop.call_at(self._next_at, self._render)

    def _answer_some(self) -> None:
        for _ in range(min(ANSWERS_PER_TURN, len(self._rendered))):
            answer, page = self._rendered.popleft()
            if not answer.done():
                answer.set_result(page)
        if self._rendered:
            asyncio.get_running_loop().call_soon(self._answer_some)
