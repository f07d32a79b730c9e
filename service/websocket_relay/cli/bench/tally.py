"""Count what a load test sent and heard, and how long it took. Knows no connection."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field

STEP = 0.01  # two neighbouring buckets are so far apart: no figure is wrong by more
SCALE = 1 / math.log1p(STEP)
BUCKETS = int(math.log(3.6e12) * SCALE) + 1  # to an hour
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class Latencies:
    """How long messages took: a histogram with logarithmic buckets."""

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.most_ns = 0

    def note(self, took_ns: int) -> None:
        """Count one."""
        self.counts[int(math.log(took_ns) * SCALE) if took_ns > 1 else 0] += 1
        self.most_ns = max(self.most_ns, took_ns)

    def add(self, other: "Latencies") -> None:
        """Add what another one counted."""
        self.counts = [
            ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.most_ns = max(self.most_ns, other.most_ns)

    def quantile_ms(self, share: float) -> float | None:
        """Return what so large a share did not exceed; None where nothing was counted."""
        rank, seen = share * sum(self.counts), 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return min(math.exp((index + 1) / SCALE), self.most_ns) / 1e6
        return None

    def summary_ms(self) -> dict[str, float | None]:
        """Return the figures that are shown."""
        figures = {name: self.quantile_ms(share) for name, share in QUANTILES.items()}
        return figures | {"max": self.most_ns / 1e6 if self.most_ns else None}


@dataclass(frozen=True, slots=True)
class Slice:
    """What happened in a piece of the time.

    Attributes:
        at_s: its end, from the start of the measurement.
        sent_per_s, deliveries_per_s: how fast it went.
        p50_ms, p99_ms: how long deliveries took; None where there were none.
    """

    at_s: float
    sent_per_s: float
    deliveries_per_s: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(slots=True)
class Tally:
    """The books of one measurement.

    Attributes:
        start_ns: what was sent before, or was due before, does not count.
        sent, deliveries: messages sent, and heard by all clients together.
        last_ns: when the last of them was heard.
        latencies: of the piece of time that goes on.
        closed: clients that were closed, by reason.
    """

    start_ns: int = 0
    sent: int = 0
    deliveries: int = 0
    last_ns: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    closed: Counter[str] = field(default_factory=Counter)
    total: Latencies = field(default_factory=Latencies)
    slices: list[Slice] = field(default_factory=list)
    _cut_ns: int = 0
    _sent_before: int = 0
    _deliveries_before: int = 0

    def start(self, now_ns: int) -> None:
        """Count from now on."""
        self.start_ns = self._cut_ns = self.last_ns = now_ns
        self.sent = self.deliveries = 0
        self.latencies = Latencies()

    def close(self, least_s: float) -> None:
        """Count the rest: as a piece of its own only where it took long enough to be shown."""
        end_ns = max(self.last_ns, self.start_ns + 1)
        is_long = not self.slices or end_ns - self._cut_ns > least_s * 1e9
        if is_long:
            self.cut(end_ns)
        else:
            self.total.add(self.latencies)

    def cut(self, now_ns: int) -> Slice:
        """End a piece of the time and begin the next."""
        took_s = max(1, now_ns - self._cut_ns) / 1e9
        piece = Slice(
            at_s=(now_ns - self.start_ns) / 1e9,
            sent_per_s=(self.sent - self._sent_before) / took_s,
            deliveries_per_s=(self.deliveries - self._deliveries_before) / took_s,
            p50_ms=self.latencies.quantile_ms(0.5),
            p99_ms=self.latencies.quantile_ms(0.99),
        )
        self.slices.append(piece)
        self.total.add(self.latencies)
        self.latencies = Latencies()
        self._cut_ns = now_ns
        self._sent_before, self._deliveries_before = self.sent, self.deliveries
        return piece

    def series(self) -> list[dict[str, float | None]]:
        """Return the pieces as JSON has them."""
        return [asdict(each) for each in self.slices]
