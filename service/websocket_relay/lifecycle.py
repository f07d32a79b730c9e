"""Own the relay's phase: starting, waiting, ready or draining. Knows no HTTP."""

from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    """The phases of a relay, from start to shutdown."""

    STARTING = "starting"
    WAITING_FOR_KEYS = "waiting for signing keys"  # for the first fetch of auth.jwt.jwks_url
    WAITING_FOR_BACKPLANE = "waiting for the backplane"  # and for the history in it
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """The relay's phase, and whether it refuses new upgrades.

    Args:
        is_backplane_down: returns whether an outage of the backplane prevents publishing here.
    """

    def __init__(self, *, is_backplane_down: Callable[[], bool] = lambda: False) -> None:
        self.phase = Phase.STARTING
        self._is_backplane_down = is_backplane_down
        self.refuses_upgrades = False  # draining, and shutdown.readiness_delay_s has passed

    @property
    def is_backplane_down(self) -> bool:
        """Whether an outage of the backplane prevents publishing here."""
        return self._is_backplane_down()

    @property
    def ready(self) -> bool:
        """Whether load balancers should send clients here."""
        return self.phase is Phase.READY and not self.is_backplane_down

    @property
    def status(self) -> str:
        """The phase, or the outage of a ready relay, in words."""
        is_outage = self.phase is Phase.READY and self.is_backplane_down
        return "backplane outage" if is_outage else self.phase
