"""Counters of a load test: messages, deliveries, latencies over time. Knows no connection."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field

STEP = 0.01  # the ratio between neighbouring buckets, and so the largest relative error
SCALE = 1 / math.log1p(STEP)
BUCKETS = int(math.log(3.6e12) * SCALE) + 1  # up to one hour
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class Latencies:
    """A histogram of latencies with logarithmic buckets."""

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.max_ns = 0

    def note(self, took_ns: int) -> None:
        """Count one latency."""
        self.counts[int(math.log(took_ns) * SCALE) if took_ns > 1 else 0] += 1
        self.max_ns = max(self.max_ns, took_ns)

    def merge(self, other: "Latencies") -> None:
        """Add the counts of another histogram."""
        self.counts = [
            ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.max_ns = max(self.max_ns, other.max_ns)

    def quantile_ms(self, share: float) -> float | None:
        """Return the quantile of `share`, 0 to 1; None if nothing was counted."""
        rank, seen = share * sum(self.counts), 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return min(math.exp((index + 1) / SCALE), self.max_ns) / 1e6
        return None

    def summary_ms(self) -> dict[str, float | None]:
        """Return the quantiles and the maximum."""
        quantiles = {name: self.quantile_ms(share) for name, share in QUANTILES.items()}
        return quantiles | {"max": self.max_ns / 1e6 if self.max_ns else None}


@dataclass(frozen=True, slots=True)
class Slice:
    """The counters of one interval.

    Attributes:
        at_s: end of the interval, from the start of the measurement.
        sent_per_s, deliveries_per_s: rates in the interval.
        p50_ms, p99_ms: latencies in the interval; None if there were no deliveries.
    """

    at_s: float
    sent_per_s: float
    deliveries_per_s: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(slots=True)
class Tally:
    """The counters of one measurement.

    Attributes:
        start_ns: start of the measurement; messages sent or due before do not count.
        sent, deliveries: messages sent, and messages received by all clients together.
        last_ns: time of the last delivery.
        latencies: of the current interval.
        closed: number of clients that were closed, by reason.
        total: latencies of all intervals.
        slices: the intervals so far.
    """

    start_ns: int = 0
    sent: int = 0
    deliveries: int = 0
    last_ns: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    closed: Counter[str] = field(default_factory=Counter)
    total: Latencies = field(default_factory=Latencies)
    slices: list[Slice] = field(default_factory=list)
    _interval_start_ns: int = 0
    _sent_before: int = 0
    _deliveries_before: int = 0

    def start(self, now_ns: int) -> None:
        """Start the measurement: reset the counters."""
        self.start_ns = self._interval_start_ns = self.last_ns = now_ns
        self.sent = self.deliveries = 0
        self.latencies = Latencies()

    def close(self, min_slice_s: float) -> None:
        """End the measurement; the rest is an interval of its own only if longer than this."""
        end_ns = max(self.last_ns, self.start_ns + 1)
        is_long = not self.slices or end_ns - self._interval_start_ns > min_slice_s * 1e9
        if is_long:
            self.cut(end_ns)
        else:
            self.total.merge(self.latencies)

    def cut(self, now_ns: int) -> Slice:
        """End the current interval and start the next; return the ended one."""
        interval_s = max(1, now_ns - self._interval_start_ns) / 1e9
        ended = Slice(
            at_s=(now_ns - self.start_ns) / 1e9,
            sent_per_s=(self.sent - self._sent_before) / interval_s,
            deliveries_per_s=(self.deliveries - self._deliveries_before) / interval_s,
            p50_ms=self.latencies.quantile_ms(0.5),
            p99_ms=self.latencies.quantile_ms(0.99),
        )
        self.slices.append(ended)
        self.total.merge(self.latencies)
        self.latencies = Latencies()
        self._interval_start_ns = now_ns
        self._sent_before, self._deliveries_before = self.sent, self.deliveries
        return ended

    def series(self) -> list[dict[str, float | None]]:
        """Return the intervals for JSON."""
        return [asdict(each) for each in self.slices]
