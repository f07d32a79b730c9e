"""The phases of a relay: which follows which, and what each means for clients and probes."""

from itertools import product

import pytest
from websocket_relay.lifecycle import NEXT, Lifecycle, Phase

ORDER = list(Phase)
PATHS = {
    Phase.STARTING: [],
    Phase.WAITING_FOR_BACKPLANE: [Phase.WAITING_FOR_BACKPLANE],
    Phase.WAITING_FOR_REPLICAS: [Phase.WAITING_FOR_REPLICAS],
    Phase.WAITING_FOR_KEYS: [Phase.WAITING_FOR_KEYS],
    Phase.READY: [Phase.READY],
    Phase.DRAINING: [Phase.DRAINING],
    Phase.REFUSING: [Phase.DRAINING, Phase.REFUSING],
}


def lifecycle_in(phase: Phase, *, is_backplane_down: bool = False) -> Lifecycle:
    """Return a lifecycle in a phase."""
    lifecycle = Lifecycle(is_backplane_down=lambda: is_backplane_down)
    for each in PATHS[phase]:
        lifecycle.advance_to(each)
    return lifecycle


@pytest.mark.parametrize(("phase", "following"), [*product(Phase, Phase)])
@pytest.mark.fast
def test_a_phase_is_entered_after_an_earlier_one_only(phase: Phase, following: Phase) -> None:
    lifecycle = lifecycle_in(phase)
    if following in NEXT[phase]:
        assert ORDER.index(following) > ORDER.index(phase)
        lifecycle.advance_to(following)
    else:
        with pytest.raises(ValueError, match="after"):
            lifecycle.advance_to(following)


@pytest.mark.fast
def test_a_stop_is_possible_in_every_phase_before_it() -> None:
    before = ORDER[: ORDER.index(Phase.DRAINING)]
    assert all(Phase.DRAINING in NEXT[phase] for phase in before)
    assert [phase for phase in Phase if Phase.REFUSING in NEXT[phase]] == [Phase.DRAINING]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.fast
def test_readiness_and_status_follow_from_the_phase(phase: Phase) -> None:
    lifecycle = lifecycle_in(phase)
    assert lifecycle.ready is (phase is Phase.READY)
    assert lifecycle.status == ("draining" if phase is Phase.REFUSING else phase)
    assert lifecycle.is_draining is (phase in (Phase.DRAINING, Phase.REFUSING))
    assert lifecycle.refuses_upgrades is (phase is Phase.REFUSING)


@pytest.mark.fast
def test_an_outage_makes_a_ready_relay_unready_and_changes_no_other_status() -> None:
    ready = lifecycle_in(Phase.READY, is_backplane_down=True)
    assert (ready.ready, ready.status) == (False, "backplane outage")
    draining = lifecycle_in(Phase.DRAINING, is_backplane_down=True)
    assert (draining.ready, draining.status) == (False, "draining")
