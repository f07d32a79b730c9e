"""Render pages that cost more than other answers, once for all who ask at the same time.

Owns how much of the time goes into it. Knows no page, no route and no metric.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

COST_FACTOR = 20
"""A page that took a millisecond to render pays for it with 20: rendering takes at most a twentieth
of the time in the long run."""

MAX_PAUSE_S = 1.0
"""However long it took, the next page is rendered after a second."""

BURST_S = 1.0
"""How much of that is advanced after a rest: requests that come seldom never wait."""

ANSWERS_A_TURN = 4
"""Requests that get their page in one turn of the loop. Each then writes it to its connection."""

RenderPage = Callable[[], bytes]


class PageCache:
    """Pages that share one budget of time.

    A request gets a page whose rendering began after the request came: it never sees a state that
    is older than its question. All requests that wait by then get the same bytes.
    """

    def __init__(self) -> None:
        self._wanted: dict[str, tuple[RenderPage, list[asyncio.Future[bytes]]]] = {}
        self._rendered: deque[tuple[asyncio.Future[bytes], bytes]] = deque()
        self._is_scheduled = False
        self._next_at = 0.0

    async def get(self, name: str, render: RenderPage) -> bytes:
        """Return the page.

        Args:
            name: tells pages apart.
            render: makes the page; of all who ask at the same time, the first one's is called.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        self._wanted.setdefault(name, (render, []))[1].append(answer)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_at(self._next_at, self._render)
        return await answer

    def _render(self) -> None:
        name = next(iter(self._wanted))
        render, answers = self._wanted.pop(name)
        began = perf_counter()
        try:
            page = render()
        except Exception as error:  # noqa: BLE001  # it is raised where the page is asked for
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
        else:
            if not self._rendered:
                asyncio.get_running_loop().call_soon(self._answer_some)
            self._rendered.extend((answer, page) for answer in answers)
        self._pay(perf_counter() - began)

    def _pay(self, cost_s: float) -> None:
        loop = asyncio.get_running_loop()
        pause_s = min(cost_s * COST_FACTOR, MAX_PAUSE_S)
        self._next_at = max(self._next_at, loop.time() - BURST_S) + pause_s
        self._is_scheduled = bool(self._wanted)
        if self._is_scheduled:
            loop.call_at(self._next_at, self._render)

    def _answer_some(self) -> None:
        for _ in range(min(ANSWERS_A_TURN, len(self._rendered))):
            answer, page = self._rendered.popleft()
            if not answer.done():
                answer.set_result(page)
        if self._rendered:
            asyncio.get_running_loop().call_soon(self._answer_some)
