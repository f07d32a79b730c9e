"""Time slices: long work shares the event loop with all other tasks."""

import asyncio
from time import perf_counter

import pytest
from websocket_relay.wire.time_slicer import TimeSlicer

pytestmark = pytest.mark.fast


async def test_the_event_loop_has_free_turns_between_two_slices() -> None:
    """Tasks that wake each other need several turns of the loop."""
    slicer, slices = TimeSlicer(rest_turns=4), 0

    def work(until: float) -> bool:
        nonlocal slices
        while perf_counter() <= until:
            pass
        slices += 1
        return slices == 3

    slicer.schedule_work(work)
    slices_by_turn = []
    while slices < 3:
        await asyncio.sleep(0)  # a turn of the loop
        slices_by_turn.append(slices)
    assert slices_by_turn == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]
