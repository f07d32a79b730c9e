"""Limit the rate of an event. Knows no event and no clock."""

MAX_CREDIT_S = 10.0
"""Maximum paused time that is credited to a bucket."""


class TokenBucket:
    """A token bucket whose state is the time at which it will be full (GCRA, ITU-T I.371).

    Args:
        per_s: sustained rate, in events per second.
        burst: maximum number of events at once, after idle time.
    """

    __slots__ = ("_burst_s", "_credit_s", "_full_at", "_step_s")

    def __init__(self, per_s: float, burst: float) -> None:
        self._step_s = 1.0 / per_s
        self._burst_s = (burst + 0.01) / per_s  # tolerance for rounding errors of floats
        self._full_at = 0.0
        self._credit_s = 0.0  # how far in the past _full_at may lie: paused time not used yet

    def take(self, now: float) -> bool:
        """Consume a token and return True, or return False if the bucket is empty.

        Args:
            now: seconds of a monotonic clock, greater than `burst / per_s`.
        """
        full_at = max(self._full_at, now - self._credit_s) + self._step_s
        if full_at - now > self._burst_s:
            return False
        self._full_at = full_at
        if full_at >= now:
            self._credit_s = 0.0
        return True

    def credit_paused_time(self, seconds: float) -> None:
        """Credit time during which no event could happen; its events arrive late, in a burst."""
        self._credit_s = min(self._credit_s + seconds, MAX_CREDIT_S)
