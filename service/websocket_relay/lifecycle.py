"""Know whether the relay is starting, waits for keys, is ready or draining. Knows no HTTP."""

from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    """Where the relay is in its life."""

    STARTING = "starting"
    WAITING_FOR_KEYS = "waiting for keys"  # of auth.jwt.jwks_url, which it never had yet
    WAITING_FOR_BACKPLANE = "waiting for the backplane"  # and for what it holds
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """The relay's phase, and since when new upgrades are refused.

    Args:
        is_cut_off: tells whether it is without its backplane, so that nothing can be said here.
    """

    def __init__(self, *, is_cut_off: Callable[[], bool] = lambda: False) -> None:
        self.phase = Phase.STARTING
        self._is_cut_off = is_cut_off
        self.refusing = False  # draining, and shutdown.readiness_delay_s has passed

    @property
    def is_cut_off(self) -> bool:
        """Whether it is without its backplane, so that nothing can be said here."""
        return self._is_cut_off()

    @property
    def ready(self) -> bool:
        """Whether load balancers should send clients here."""
        return self.phase is Phase.READY and not self.is_cut_off

    @property
    def status(self) -> str:
        """What it is, in words."""
        is_outage = self.phase is Phase.READY and self.is_cut_off
        return "backplane outage" if is_outage else self.phase
