"""Those who have much to write share the event loop with all others."""

import asyncio
from time import perf_counter

import pytest
from websocket_relay.wire.time_slicer import TimeSlicer

pytestmark = pytest.mark.fast


async def test_tasks_that_wake_each_other_get_through_between_two_slices() -> None:
    turns, slices = TimeSlicer(rest_turns=4), 0

    def work(until: float) -> bool:
        nonlocal slices
        while perf_counter() <= until:
            pass
        slices += 1
        return slices == 3

    turns.schedule_work(work)
    seen = []
    while slices < 3:
        await asyncio.sleep(0)  # a turn of the loop
        seen.append(slices)
    assert seen == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]
