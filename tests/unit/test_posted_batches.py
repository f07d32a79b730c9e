"""The lines of a posted batch are parsed in time slices. Runs in the test's process."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
from websocket_relay.api.publish import collect
from websocket_relay.messages import TEXT, Message
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.time_slicer import TimeSlicer

pytestmark = pytest.mark.fast


def lines(count: int, *, fails: bool) -> Iterator[Message]:
    yield from ((TEXT, b"%d" % number) for number in range(count))
    if fails:
        raise RefusedError(Refusal.INVALID_MESSAGE)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
async def test_a_request_that_is_cancelled_before_its_batch_is_parsed_causes_no_error(
    count: int, fails: bool
) -> None:
    loop = asyncio.get_running_loop()
    errors: list[object] = []
    loop.set_exception_handler(lambda _, facts: errors.append(facts))
    slicer = TimeSlicer()
    request = asyncio.create_task(collect(lines(count, fails=fails), slicer))
    await asyncio.sleep(0)  # the parsing is scheduled
    request.cancel()
    with suppress(asyncio.CancelledError, RefusedError):
        await request
    for _ in range(10):
        await asyncio.sleep(0)
    assert errors == []
    assert not slicer.is_busy
