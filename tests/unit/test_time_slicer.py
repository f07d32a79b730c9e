"""Time slices: long work shares the event loop with all other tasks."""

import asyncio
from collections.abc import Iterator
from time import perf_counter

import pytest
from websocket_relay.wire.time_slicer import SLICE_S, TimeSlicer

pytestmark = pytest.mark.fast


async def test_the_event_loop_has_free_turns_between_two_slices() -> None:
    """Tasks that wake each other need several turns of the loop."""
    slicer, slices = TimeSlicer(rest_turns=4), 0

    def work() -> Iterator[None]:
        nonlocal slices
        while slices < 3:
            slices += 1
            until = perf_counter() + SLICE_S
            while perf_counter() <= until:
                pass
            yield

    slicer.schedule_work(work())
    slices_by_turn = []
    while slices < 3:
        await asyncio.sleep(0)  # a turn of the loop
        slices_by_turn.append(slices)
    assert slices_by_turn == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]


async def test_work_that_goes_first_is_continued_before_all_other() -> None:
    slicer, steps = TimeSlicer(), []

    def work(name: str, *, goes_first: bool) -> Iterator[bool]:
        for _ in range(2):
            steps.append(name)
            until = perf_counter() + SLICE_S
            while perf_counter() <= until:
                pass
            yield goes_first

    slicer.schedule_work(work("plain", goes_first=False))
    slicer.schedule_work(work("urgent", goes_first=True))
    for _ in range(10):
        await asyncio.sleep(0)
    assert steps == ["plain", "urgent", "urgent", "plain"]


async def test_work_that_fails_does_not_stop_the_rest() -> None:
    slicer, done = TimeSlicer(), asyncio.Event()
    failures: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, facts: failures.append(repr(facts["exception"]))
    )

    def work(*, fails: bool) -> Iterator[None]:
        if fails:
            raise ValueError
        done.set()
        yield

    slicer.schedule_work(work(fails=True))
    slicer.schedule_work(work(fails=False))
    await asyncio.wait_for(done.wait(), 5)
    assert failures == ["ValueError()"]
