"""Know whether the relay is starting, waits for keys, is ready or draining. Knows no HTTP."""

from enum import StrEnum


class Phase(StrEnum):
    """Where the relay is in its life."""

    STARTING = "starting"
    WAITING_FOR_KEYS = "waiting for keys"  # of auth.jwt.jwks_url, which it never had yet
    READY = "ready"
    DRAINING = "draining"


class Health:
    """The relay's phase, and since when new upgrades are refused."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.refusing = False  # draining, and shutdown.readiness_delay_s has passed

    @property
    def ready(self) -> bool:
        """Whether load balancers should send clients here."""
        return self.phase is Phase.READY
