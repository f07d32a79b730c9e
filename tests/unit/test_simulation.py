"""Simulated clients behave as real ones, and what comes of it is sound."""

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
    Fleet,
    Outcome,
)
from tests.support.relay_process import ROOT

pytestmark = pytest.mark.fast

RATE = 4000
FLEET = Fleet(clients=9_000, replicas=9, handshakes_per_s=RATE, refusals_per_s=5000)
SMALL = replace(FLEET, clients=3_000, replicas=3, handshakes_per_s=400, refusals_per_s=500)


def lost_zone(fleet: Fleet, seed: int = 1) -> Outcome:
    lost = fleet.replicas // 3
    return Crowd(fleet, seed).lose(gone=lost, cut=lost)


def all_cut(fleet: Fleet) -> Outcome:
    return Crowd(fleet).lose(gone=0, cut=fleet.replicas)


HARD: dict[str, Callable[[], Outcome]] = {
    "rolling update": Crowd(FLEET).update,
    "that the balancer hears of late": lambda: Crowd(FLEET).update(unaware_s=3),
    "of three replicas at once": lambda: Crowd(FLEET).update(at_once=3, pace_s=2),
    "lost zone": lambda: lost_zone(FLEET),
    "refusals": lambda: all_cut(replace(SMALL, max_handshakes_per_s=100)),
    "handshakes that take too long": lambda: all_cut(replace(SMALL, handshake_timeout_s=1)),
}


@pytest.mark.parametrize("name", HARD)
def test_nobody_is_lost(name: str) -> None:
    found = HARD[name]()
    assert sum(found.loads) in {FLEET.clients, SMALL.clients}
    assert found.away[-1] == 0
    assert sum(found.asked) == found.attempts
    failed = found.refused + found.given_up + found.unreached
    assert found.attempts == found.returns + failed


def test_the_same_seed_has_the_same_outcome_and_another_one_another() -> None:
    assert lost_zone(FLEET, seed=1) == lost_zone(FLEET, seed=1)
    assert lost_zone(FLEET, seed=1) != lost_zone(FLEET, seed=2)


def test_replicas_do_no_more_than_they_can() -> None:
    found = all_cut(SMALL)
    assert max(found.asked) == SMALL.clients  # all come within a second
    assert max(found.let_in) <= SMALL.replicas * SMALL.handshakes_per_s * 1.02
    assert found.longest_queue_s == pytest.approx(1000 / 400, rel=0.1)


def test_in_a_rolling_update_no_replica_is_asked_more_than_half_of_what_it_can_do() -> None:
    found = Crowd(replace(FLEET, clients=90_000)).update()
    assert found.peak_of_one_per_s < RATE / 2
    assert found.refused == found.given_up == 0
    assert found.longest_queue_s < 0.1


def test_clients_of_a_replica_that_stops_come_back_over_the_spread() -> None:
    slow, fast = (Crowd(replace(FLEET, spread_s=spread_s)).update() for spread_s in (8, 2))
    assert 2 < fast.peak_per_s / slow.peak_per_s < 6
    assert 0.9 < fast.away_s[2] < 1.1
    assert 0.9 < slow.away_s[2] < 1.1


def test_the_limit_on_handshakes_holds_and_costs_time() -> None:
    limited = all_cut(replace(SMALL, max_handshakes_per_s=100))
    assert limited.refused > 0
    assert max(limited.let_in) <= SMALL.replicas * 200  # the burst, and what a second brings
    assert limited.away_s[1] > all_cut(SMALL).away_s[1]


def test_handshakes_that_wait_longer_than_the_deadline_are_given_up_and_tried_again() -> None:
    assert all_cut(SMALL).given_up == 0
    assert all_cut(replace(SMALL, handshake_timeout_s=2)).given_up > 0


def test_a_replica_that_refuses_and_is_still_asked_costs_its_clients_another_try() -> None:
    assert Crowd(FLEET).update().refused == 0
    late = Crowd(FLEET).update(unaware_s=3)
    assert 0 < late.refused / late.attempts < 0.2


def test_a_balancer_that_picks_the_emptiest_leaves_all_alike() -> None:
    at_random, evenly = (
        Crowd(replace(FLEET, to_emptiest=choice)).update().loads for choice in (False, True)
    )
    assert max(at_random) > 4 * min(at_random)
    assert max(evenly) - min(evenly) < 10


def test_pages_wait_as_simulated() -> None:
    page = (ROOT / "examples" / "client.html").read_text()
    found = re.search(r"FIRST_WAIT_MS = (\d+), LONGEST_WAIT_MS = ([\d_]+);", page)
    assert found is not None
    assert [int(ms) / 1000 for ms in found.groups()] == [FIRST_WAIT_S, LONGEST_WAIT_S]


class Leaving:
    """Stands for a connection: notes when it is closed, and what it is told."""

    closed_at = 0.0
    reason = ""

    def close_when_written(self, _: Close, reason: str) -> None:
        self.closed_at, self.reason = asyncio.get_running_loop().time(), reason


async def test_a_relay_that_stops_tells_clients_what_is_simulated() -> None:
    clients, leaving = ConnectionRegistry(), [Leaving() for _ in range(500)]
    for each in leaving:
        clients.register(each)  # type: ignore[arg-type]
    started_at = asyncio.get_running_loop().time()
    await close_all(clients, spread_s=0.2, rng=random.Random(1))
    closed_s = sorted(each.closed_at - started_at for each in leaving)
    for number, at_s in enumerate(closed_s):
        assert at_s > 0.2 * number / len(closed_s) - 2 * STEP_S
    told_s = [int(each.reason.partition("retry_ms=")[2]) / 1000 for each in leaving]
    assert max(told_s) <= RETRY_WINDOW_S
    assert sum(told_s) / len(told_s) == pytest.approx(RETRY_WINDOW_S / 2, abs=0.05)
