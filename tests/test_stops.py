"""Stops while the broker misbehaves: `make stops` in small."""

import asyncio
from pathlib import Path

import pytest

from tests.stops import CONDITIONS, KINDS, stop_many

AT_A_TIME = 4
SPAN_S = 0.5


@pytest.mark.parametrize("kind", KINDS)
async def test_a_relay_stops_in_time_whatever_its_broker_does(kind: str, tmp_path: Path) -> None:
    gate = asyncio.Semaphore(AT_A_TIME)

    async def stop(condition: str) -> None:
        directory = tmp_path / condition
        directory.mkdir()
        for end in await stop_many(kind, condition, 1, directory, gate, SPAN_S):
            assert end.is_clean, f"{condition}: {end}"

    async with asyncio.TaskGroup() as group:
        for condition in CONDITIONS:
            group.create_task(stop(condition))
