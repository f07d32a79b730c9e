"""Own the relay's phase, from start to shutdown, and what may follow what. Knows no HTTP.

`server.run` alone moves it on; readiness and the status are derived from it.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum


class Phase(StrEnum):
    """The phases of a relay, in their order."""

    STARTING = "starting"
    WAITING_FOR_BACKPLANE = "waiting for the backplane"  # and for the history in it
    WAITING_FOR_REPLICAS = "waiting for the other replicas"  # to state who is there
    WAITING_FOR_KEYS = "waiting for signing keys"  # for the first fetch of auth.jwt.jwks_url
    READY = "ready"
    DRAINING = "draining"  # load balancers notice; new clients are still accepted
    REFUSING = "refusing"  # clients are closed, new ones are refused; the status is "draining"


NEXT: Mapping[Phase, tuple[Phase, ...]] = {
    Phase.STARTING: (
        Phase.WAITING_FOR_BACKPLANE,
        Phase.WAITING_FOR_REPLICAS,
        Phase.WAITING_FOR_KEYS,
        Phase.READY,
        Phase.DRAINING,
    ),
    Phase.WAITING_FOR_BACKPLANE: (
        Phase.WAITING_FOR_REPLICAS,
        Phase.WAITING_FOR_KEYS,
        Phase.READY,
        Phase.DRAINING,
    ),
    Phase.WAITING_FOR_REPLICAS: (Phase.WAITING_FOR_KEYS, Phase.READY, Phase.DRAINING),
    Phase.WAITING_FOR_KEYS: (Phase.READY, Phase.DRAINING),
    Phase.READY: (Phase.DRAINING,),
    Phase.DRAINING: (Phase.REFUSING,),
    Phase.REFUSING: (),
}
"""The phases that may follow each phase. Only those of waiting may be left out."""


class Lifecycle:
    """The phase of one relay.

    Args:
        is_backplane_down: returns whether an outage of the backplane prevents publishing here.
    """

    def __init__(self, *, is_backplane_down: Callable[[], bool] = lambda: False) -> None:
        self._phase = Phase.STARTING
        self._is_backplane_down = is_backplane_down

    def advance_to(self, phase: Phase) -> None:
        """Enter a phase.

        Raises:
            ValueError: it may not follow the present one.
        """
        if phase not in NEXT[self._phase]:
            raise ValueError(f"{phase!r} after {self._phase!r}")
        self._phase = phase

    @property
    def is_backplane_down(self) -> bool:
        """Whether an outage of the backplane prevents publishing here."""
        return self._is_backplane_down()

    @property
    def ready(self) -> bool:
        """Whether load balancers should send clients here."""
        return self._phase is Phase.READY and not self.is_backplane_down

    @property
    def is_draining(self) -> bool:
        """Whether the relay shuts down."""
        return self._phase in (Phase.DRAINING, Phase.REFUSING)

    @property
    def refuses_upgrades(self) -> bool:
        """Whether new clients are refused, because the relay shuts down."""
        return self._phase is Phase.REFUSING

    @property
    def status(self) -> str:
        """The phase as probes report it, or the outage of a ready relay."""
        if self._phase is Phase.READY and self.is_backplane_down:
            return "backplane outage"
        return Phase.DRAINING if self.refuses_upgrades else self._phase

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of the phase."""
        return {"ready": int(self.ready), "draining": int(self.is_draining)}
