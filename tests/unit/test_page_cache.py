"""Pages that are costly to render: each is rendered once for all who ask at the same time."""

import asyncio
import time

import pytest
from websocket_relay.page_cache import BURST_S, COST_FACTOR, MAX_PAUSE_S, PageCache

SLOW_S = 0.02


class Counter:
    """A page that says how often it was rendered, and takes its time."""

    def __init__(self, cost_s: float = 0.0) -> None:
        self.rendered_at: list[float] = []
        self._cost_s = cost_s

    def __call__(self) -> bytes:
        self.rendered_at.append(asyncio.get_running_loop().time())
        time.sleep(self._cost_s)  # rendering keeps the loop busy
        return str(len(self.rendered_at)).encode()


async def test_all_who_ask_at_the_same_time_get_the_same_page() -> None:
    pages, page = PageCache(), Counter()
    answers = await asyncio.gather(*(pages.get("page", page) for _ in range(100)))
    assert answers == [b"1"] * 100
    assert len({id(answer) for answer in answers}) == 1


async def test_a_page_is_never_older_than_the_request() -> None:
    pages, page = PageCache(), Counter()
    for number in range(1, 50):
        assert await pages.get("page", page) == str(number).encode()


async def test_a_request_that_comes_after_the_rendering_gets_the_next_page() -> None:
    pages, page = PageCache(), Counter()
    first = [asyncio.create_task(pages.get("page", page)) for _ in range(20)]
    await first[0]
    assert not first[-1].done(), "not all are answered in one turn of the loop"
    assert await pages.get("page", page) == b"2"
    assert await asyncio.gather(*first) == [b"1"] * 20


async def test_rendering_takes_a_bounded_share_of_the_time_however_many_ask() -> None:
    pages, page = PageCache(), Counter(SLOW_S)
    stopped = asyncio.Event()

    async def ask() -> None:
        while not stopped.is_set():
            await pages.get("page", page)

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(ask())
        await asyncio.sleep(0.5)
        stopped.set()
    rendered_at = page.rendered_at
    at_once = BURST_S / (SLOW_S * COST_FACTOR)
    in_time = (rendered_at[-1] - rendered_at[0]) / (SLOW_S * COST_FACTOR)
    assert 2 <= len(rendered_at) <= at_once + in_time + 2


async def test_no_request_waits_much_longer_than_a_second() -> None:
    pages, page = PageCache(), Counter(5 * MAX_PAUSE_S / COST_FACTOR)
    for _ in range(3):  # the first two use up what is advanced
        await pages.get("page", page)
    assert page.rendered_at[2] - page.rendered_at[1] < 4 * MAX_PAUSE_S


async def test_different_pages_share_the_time() -> None:
    pages, page, other = PageCache(), Counter(), Counter()
    answers = await asyncio.gather(*(pages.get(n, p) for n, p in (("a", page), ("b", other)) * 2))
    assert answers == [b"1"] * 4
    assert len(page.rendered_at) == len(other.rendered_at) == 1


async def test_a_page_that_can_not_be_rendered_fails_for_those_who_asked_and_not_for_others() -> (
    None
):
    pages, page = PageCache(), Counter()

    def broken() -> bytes:
        raise ValueError("broken")

    asked = [asyncio.create_task(pages.get("page", broken)) for _ in range(3)]
    for task in asked:
        with pytest.raises(ValueError, match="broken"):
            await task
    assert await pages.get("page", page) == b"1"


async def test_a_request_that_is_given_up_leaves_the_others_alone() -> None:
    pages, page = PageCache(), Counter()
    given_up = asyncio.create_task(pages.get("page", page))
    waiting = asyncio.create_task(pages.get("page", page))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await waiting == b"1"
    assert given_up.cancelled()
