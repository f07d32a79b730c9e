"""Stops while the broker misbehaves: `make stops` in small."""

import asyncio
from pathlib import Path

import pytest

from tests.support.stops import CONDITIONS, stop_many

SPAN_S = 0.5
WITH_REDIS = ("unfit", "flapping", "frozen")
"""Its library has never lost a cancellation."""


@pytest.mark.parametrize(
    ("kind", "condition"),
    [*(("nats", name) for name in CONDITIONS), *(("redis", name) for name in WITH_REDIS)],
)
async def test_a_relay_stops_in_time_whatever_its_broker_does(
    kind: str, condition: str, tmp_path: Path
) -> None:
    (end,) = await stop_many(kind, condition, 1, tmp_path, asyncio.Semaphore(1), SPAN_S)
    assert end.is_clean, end
