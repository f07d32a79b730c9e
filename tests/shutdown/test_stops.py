"""Stops while the broker is faulty: a small run of `make stops`.

The relays are forks, which take a tenth of the processor time of an interpreter: each is stopped
when it listens. `tests/shutdown/test_signals.py` stops interpreters while they start.
"""

import asyncio
from pathlib import Path

import pytest

from tests.support.stops import stop_many

SPAN_S = 0.5

WITH_NATS = (
    "misconfigured",
    "unsupported",
    "flapping",
    "slow",
    "freezing",
    "unreachable",
    "restarting",
)
WITH_REDIS = ("flapping", "frozen")
"""The library for Redis has never lost a cancellation."""


@pytest.mark.parametrize(
    ("kind", "condition"),
    [*(("nats", name) for name in WITH_NATS), *(("redis", name) for name in WITH_REDIS)],
)
async def test_a_relay_stops_in_time_while_its_broker_is_faulty(
    kind: str, condition: str, tmp_path: Path
) -> None:
    slots = asyncio.Semaphore(1)
    (end,) = await stop_many(kind, condition, 1, tmp_path, slots, SPAN_S, are_forks=True)
    assert end.is_clean, end
