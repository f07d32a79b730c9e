"""The delays between attempts."""

from itertools import islice

import pytest
from websocket_relay.backoff import backoff

pytestmark = pytest.mark.fast


def test_delays_double_up_to_the_longest_with_jitter() -> None:
    bounds = [0.5, 1, 2, 4, 5, 5, 5]
    for _ in range(20):
        for delay_s, bound_s in zip(backoff(0.5, 5), bounds, strict=False):
            assert bound_s / 2 <= delay_s <= bound_s
    assert len({next(backoff(1, 5)) for _ in range(20)}) > 1


def test_delays_never_end() -> None:
    assert 15 <= list(islice(backoff(0.5, 30), 5_000))[-1] <= 30
