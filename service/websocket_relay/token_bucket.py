"""Limit how often something happens. Knows not what."""

MAX_LATE_S = 10.0
"""Of the time in which it could not happen, so much is made good at most."""


class TokenBucket:
    """A token bucket, told by one number: when it will be full again (GCRA, ITU-T I.371).

    Args:
        per_s: how often in the long run.
        burst: how often at once, after a rest.
    """

    __slots__ = ("_burst_s", "_full_at", "_late_s", "_step_s")

    def __init__(self, per_s: float, burst: float) -> None:
        self._step_s = 1.0 / per_s
        self._burst_s = (burst + 0.01) / per_s  # a little room for what floats get wrong
        self._full_at = 0.0
        self._late_s = 0.0  # how far in the past it may have been full: what was excused

    def take(self, now: float) -> bool:
        """Let it happen once, if it may.

        Args:
            now: seconds of a clock that only grows, above `burst / per_s`.
        """
        full_at = max(self._full_at, now - self._late_s) + self._step_s
        if full_at - now > self._burst_s:
            return False
        self._full_at = full_at
        if full_at >= now:
            self._late_s = 0.0
        return True

    def excuse(self, seconds: float) -> None:
        """Take note of time in which it could not happen, whose share comes late."""
        self._late_s = min(self._late_s + seconds, MAX_LATE_S)
