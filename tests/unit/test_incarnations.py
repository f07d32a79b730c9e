"""Which replicas are known, by their signs of life."""

import pytest
from websocket_relay.backplane.interface import Position
from websocket_relay.cluster.incarnations import FORGET_S, Incarnations

pytestmark = pytest.mark.fast


class Clock:
    """A clock that stands still."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def record(replicas: Incarnations, *incarnations: str, at: int = 1) -> None:
    for incarnation in incarnations:
        replicas.record_sign(incarnation, Position(1, at, 0), {})


def pass_seconds(replicas: Incarnations, clock: Clock, seconds: float, *living: str) -> None:
    """Let a time pass, with the heartbeats of this replica and of others."""
    until = clock.now_s + seconds
    while clock.now_s < until:
        clock.now_s += 1
        record(replicas, replicas.own, *living)


def test_without_presence_replicas_that_ended_are_forgotten() -> None:
    clock = Clock()
    replicas = Incarnations(clock, forget_s=FORGET_S)
    for number in range(500):  # as many restarts
        record(replicas, f"ended {number}", "living")
        pass_seconds(replicas, clock, 5, "living")
    known = [number for number in range(500) if f"ended {number}" in replicas]
    assert len(known) <= FORGET_S / 5 + 1
    assert "living" in replicas
    assert replicas.own in replicas


def test_an_outage_which_silences_all_replicas_alike_makes_none_forgotten() -> None:
    clock = Clock()
    replicas = Incarnations(clock, forget_s=FORGET_S)
    record(replicas, "other", replicas.own)
    clock.now_s += 10 * FORGET_S
    record(replicas, "new", replicas.own)
    assert "other" in replicas
    pass_seconds(replicas, clock, FORGET_S + 1, "new")
    assert "other" not in replicas


def test_with_presence_replicas_are_known_until_their_end_is_read() -> None:
    clock = Clock()
    replicas = Incarnations(clock)
    record(replicas, "ended")
    pass_seconds(replicas, clock, 10 * FORGET_S)
    assert "ended" in replicas
    replicas.remove("ended")
    assert "ended" not in replicas
