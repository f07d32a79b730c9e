"""The page cache: a page is rendered once for all requests at the same time."""

import asyncio
import time

import pytest
from websocket_relay.page_cache import BURST_S, COST_FACTOR, MAX_PAUSE_S, PageCache

pytestmark = pytest.mark.fast

SLOW_S = 0.02


class CountedPage:
    """A page that contains how often it was rendered, and blocks the loop while it is rendered."""

    def __init__(self, cost_s: float = 0.0) -> None:
        self.rendered_at: list[float] = []
        self._cost_s = cost_s

    def __call__(self) -> bytes:
        self.rendered_at.append(asyncio.get_running_loop().time())
        time.sleep(self._cost_s)  # rendering blocks the loop
        return str(len(self.rendered_at)).encode()


async def test_concurrent_requests_receive_the_same_page() -> None:
    pages, page = PageCache(), CountedPage()
    responses = await asyncio.gather(*(pages.get("page", page) for _ in range(100)))
    assert responses == [b"1"] * 100
    assert len({id(response) for response in responses}) == 1


async def test_a_page_is_never_older_than_its_request() -> None:
    pages, page = PageCache(), CountedPage()
    for number in range(1, 50):
        assert await pages.get("page", page) == str(number).encode()


async def test_a_request_after_the_rendering_receives_the_next_page() -> None:
    pages, page = PageCache(), CountedPage()
    first = [asyncio.create_task(pages.get("page", page)) for _ in range(20)]
    await first[0]
    assert not first[-1].done(), "all requests were answered in one turn of the loop"
    assert await pages.get("page", page) == b"2"
    assert await asyncio.gather(*first) == [b"1"] * 20


async def test_rendering_takes_a_bounded_share_of_the_time_for_any_number_of_requests() -> None:
    pages, page = PageCache(), CountedPage(SLOW_S)
    stopped = asyncio.Event()

    async def request_pages() -> None:
        while not stopped.is_set():
            await pages.get("page", page)

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(request_pages())
        await asyncio.sleep(0.5)
        stopped.set()
    rendered_at = page.rendered_at
    burst_pages = BURST_S / (SLOW_S * COST_FACTOR)
    paced_pages = (rendered_at[-1] - rendered_at[0]) / (SLOW_S * COST_FACTOR)
    assert 2 <= len(rendered_at) <= burst_pages + paced_pages + 2


async def test_a_request_waits_little_longer_than_the_longest_pause() -> None:
    pages, page = PageCache(), CountedPage(5 * MAX_PAUSE_S / COST_FACTOR)
    for _ in range(3):  # the first two use up the burst
        await pages.get("page", page)
    assert page.rendered_at[2] - page.rendered_at[1] < 4 * MAX_PAUSE_S


async def test_each_page_is_rendered_once_for_its_own_requests() -> None:
    pages, page, other = PageCache(), CountedPage(), CountedPage()
    responses = await asyncio.gather(*(pages.get(n, p) for n, p in (("a", page), ("b", other)) * 2))
    assert responses == [b"1"] * 4
    assert len(page.rendered_at) == len(other.rendered_at) == 1


async def test_an_error_while_rendering_fails_its_requests_and_no_later_one() -> None:
    pages, page = PageCache(), CountedPage()

    def broken() -> bytes:
        raise ValueError("broken")

    requests = [asyncio.create_task(pages.get("page", broken)) for _ in range(3)]
    for task in requests:
        with pytest.raises(ValueError, match="broken"):
            await task
    assert await pages.get("page", page) == b"1"


async def test_a_cancelled_request_does_not_affect_the_others() -> None:
    pages, page = PageCache(), CountedPage()
    cancelled = asyncio.create_task(pages.get("page", page))
    waiting = asyncio.create_task(pages.get("page", page))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert await waiting == b"1"
    assert cancelled.cancelled()
