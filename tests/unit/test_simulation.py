"""The simulation of many clients: its clients behave as real ones, and its results are sound."""

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from websocket_relay.outcomes import Close
from websocket_relay.server.drain import RETRY_WINDOW_S, STEP_S, close_all
from websocket_relay.wire.registry import ConnectionRegistry

from bench.crowd import (
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    Crowd,
    CrowdOutcome,
    Fleet,
)
from tests.support.relay_process import ROOT

pytestmark = pytest.mark.fast

HANDSHAKES_PER_S = 4000
FLEET = Fleet(clients=9_000, replicas=9, handshakes_per_s=HANDSHAKES_PER_S, refusals_per_s=5000)
SMALL = replace(FLEET, clients=3_000, replicas=3, handshakes_per_s=400, refusals_per_s=500)


def lost_zone(fleet: Fleet, seed: int = 1) -> CrowdOutcome:
    lost = fleet.replicas // 3
    return Crowd(fleet, seed).lose(gone=lost, cut=lost)


def all_cut(fleet: Fleet) -> CrowdOutcome:
    return Crowd(fleet).lose(gone=0, cut=fleet.replicas)


SCENARIOS: dict[str, Callable[[], CrowdOutcome]] = {
    "rolling update": Crowd(FLEET).update,
    "late balancer": lambda: Crowd(FLEET).update(unaware_s=3),
    "three replicas at once": lambda: Crowd(FLEET).update(at_once=3, pace_s=2),
    "lost zone": lambda: lost_zone(FLEET),
    "refusals": lambda: all_cut(replace(SMALL, max_handshakes_per_s=100)),
    "slow handshakes": lambda: all_cut(replace(SMALL, handshake_timeout_s=1)),
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_every_client_is_connected_in_the_end(scenario: Callable[[], CrowdOutcome]) -> None:
    outcome = scenario()
    assert sum(outcome.loads) in {FLEET.clients, SMALL.clients}
    assert outcome.away[-1] == 0
    assert sum(outcome.asked) == outcome.attempts
    failed = outcome.refused + outcome.given_up + outcome.unreached
    assert outcome.attempts == outcome.returns + failed


def test_a_seed_determines_the_outcome() -> None:
    assert lost_zone(FLEET, seed=1) == lost_zone(FLEET, seed=1)
    assert lost_zone(FLEET, seed=1) != lost_zone(FLEET, seed=2)


def test_replicas_complete_no_more_handshakes_than_they_can() -> None:
    outcome = all_cut(SMALL)
    assert max(outcome.asked) == SMALL.clients  # all of them within a second
    assert max(outcome.let_in) <= SMALL.replicas * SMALL.handshakes_per_s * 1.02
    assert outcome.longest_queue_s == pytest.approx(1000 / 400, rel=0.1)


def test_a_rolling_update_loads_no_replica_with_half_of_its_handshakes_per_second() -> None:
    outcome = Crowd(replace(FLEET, clients=90_000)).update()
    assert outcome.peak_of_one_per_s < HANDSHAKES_PER_S / 2
    assert outcome.refused == outcome.given_up == 0
    assert outcome.longest_queue_s < 0.1


def test_clients_of_a_stopping_replica_reconnect_over_the_spread() -> None:
    slow, fast = (Crowd(replace(FLEET, spread_s=spread_s)).update() for spread_s in (8, 2))
    assert 2 < fast.peak_per_s / slow.peak_per_s < 6
    assert 0.9 < fast.away_s[2] < 1.1
    assert 0.9 < slow.away_s[2] < 1.1


def test_the_limit_on_handshakes_applies_and_takes_time() -> None:
    limited = all_cut(replace(SMALL, max_handshakes_per_s=100))
    assert limited.refused > 0
    assert max(limited.let_in) <= SMALL.replicas * 200  # the burst, and the rate of a second
    assert limited.away_s[1] > all_cut(SMALL).away_s[1]


def test_handshakes_that_wait_longer_than_the_deadline_are_abandoned_and_repeated() -> None:
    assert all_cut(SMALL).given_up == 0
    assert all_cut(replace(SMALL, handshake_timeout_s=2)).given_up > 0


def test_a_late_balancer_sends_clients_to_a_draining_replica_that_refuses_them() -> None:
    assert Crowd(FLEET).update().refused == 0
    late = Crowd(FLEET).update(unaware_s=3)
    assert 0 < late.refused / late.attempts < 0.2


def test_a_balancer_that_selects_the_emptiest_replica_levels_the_loads() -> None:
    at_random, evenly = (
        Crowd(replace(FLEET, to_emptiest=to_emptiest)).update().loads
        for to_emptiest in (False, True)
    )
    assert max(at_random) > 4 * min(at_random)
    assert max(evenly) - min(evenly) < 10


def test_the_example_page_backs_off_as_simulated() -> None:
    page = (ROOT / "examples" / "client.html").read_text()
    constants = re.search(r"FIRST_WAIT_MS = (\d+), LONGEST_WAIT_MS = ([\d_]+);", page)
    assert constants is not None
    assert [int(ms) / 1000 for ms in constants.groups()] == [FIRST_WAIT_S, LONGEST_WAIT_S]


class ClosingConnection:
    """A connection that records when it is closed, and when its client is to reconnect."""

    closed_at = 0.0
    retry_ms = 0

    def close(self, _: Close, retry_ms: int, *, when_written: bool) -> None:
        self.closed_at, self.retry_ms = asyncio.get_running_loop().time(), retry_ms


async def test_a_draining_relay_closes_and_delays_clients_as_simulated() -> None:
    registry, connections = ConnectionRegistry(), [ClosingConnection() for _ in range(500)]
    for connection in connections:
        registry.register(connection)  # type: ignore[arg-type]
    started_at = asyncio.get_running_loop().time()
    await close_all(registry, spread_s=0.2, rng=random.Random(1))
    closed_s = sorted(connection.closed_at - started_at for connection in connections)
    for number, at_s in enumerate(closed_s):
        assert at_s > 0.2 * number / len(closed_s) - 2 * STEP_S
    retries_s = [connection.retry_ms / 1000 for connection in connections]
    assert max(retries_s) <= RETRY_WINDOW_S
    assert sum(retries_s) / len(retries_s) == pytest.approx(RETRY_WINDOW_S / 2, abs=0.05)
