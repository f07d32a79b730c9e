"""What a load test was and what came of it: as figures, and as a table. Measures nothing."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from websocket_relay.cli.bench.tally import Tally

BUSY = 0.9
"""Of a core; a client that takes more may have been what was slow."""

LATE_MS = 5.0
"""So much a machine with a free core is late at times."""

LATE, MOST_LATE_MS = 0.2, 100.0
"""Of a latency, and at most; if more of it was the client's own, that is said."""


@dataclass(frozen=True, slots=True)
class BenchLoad:
    """What is done to the relay.

    Attributes:
        clients: how many hear.
        publishers: how many of them send.
        rate_per_s: messages in all; 0: as `window` says.
        window: messages of each publisher that are on the way; 0: as `rate_per_s` says.
        message_bytes: the size of each.
        duration_s: how long it is measured.
        warmup_s: how long it goes on before.
    """

    clients: int
    publishers: int
    rate_per_s: float
    window: int
    message_bytes: int
    duration_s: float
    warmup_s: float

    @property
    def text(self) -> str:
        """The load in words."""
        how = (
            f"{self.rate_per_s:,g} messages a second in all"
            if self.rate_per_s
            else f"{self.window:,} each on the way"
        )
        return (
            f"{self.clients:,} clients, {self.publishers:,} of them publishing, {how},"
            f" {self.message_bytes:,} bytes each, {self.duration_s:g} s"
        )


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What came of it.

    Attributes:
        took_s: from the start to the last delivery.
        cpu_share: of one core, this process.
        late_ms: by how much this process woke up too late, 99 times of 100 at most.
    """

    load: BenchLoad
    tally: Tally
    took_s: float
    cpu_share: float
    late_ms: float

    @property
    def owed(self) -> int:
        """How many deliveries there should be."""
        return self.tally.sent * self.load.clients

    @property
    def was_busy(self) -> bool:
        """Whether the client may have been the bottleneck."""
        return self.cpu_share >= BUSY

    @property
    def was_late(self) -> bool:
        """Whether much of the latencies may be the client's own."""
        typical_ms = self.tally.total.quantile_ms(0.5) or 0.0
        return self.late_ms > max(LATE_MS, min(typical_ms * LATE, MOST_LATE_MS))

    def as_json(self, address: str) -> dict[str, Any]:
        """Return all figures."""
        tally, took_s = self.tally, self.took_s
        return {
            "url": address,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "load": asdict(self.load),
            "sent": tally.sent,
            "deliveries": tally.deliveries,
            "missing": self.owed - tally.deliveries,
            "closed": dict(tally.closed),
            "took_s": took_s,
            "sent_per_s": tally.sent / took_s,
            "deliveries_per_s": tally.deliveries / took_s,
            "latency_ms": tally.total.summary_ms(),
            "client_cpu_share": self.cpu_share,
            "client_late_ms_p99": self.late_ms,
            "client_was_busy": self.was_busy,
            "client_was_late": self.was_late,
            "series": tally.series(),
        }


def table(address: str, result: BenchResult) -> str:
    """Return the summary."""
    tally, load, took_s = result.tally, result.load, result.took_s
    megabytes = tally.deliveries * load.message_bytes / took_s / 1e6
    latency = tally.total.summary_ms()
    rows = [
        ("messages", f"{tally.sent:,}", f"{tally.sent / took_s:,.0f} a second"),
        (
            "deliveries",
            f"{tally.deliveries:,}",
            f"{tally.deliveries / took_s:,.0f} a second, {megabytes:,.1f} MB/s",
        ),
        ("missing", f"{result.owed - tally.deliveries:,}", ""),
        *((f"latency {name}", milliseconds(value), "") for name, value in latency.items()),
        ("own CPU", f"{result.cpu_share:.0%}", "of one core"),
        ("own delay p99", milliseconds(result.late_ms), "how late this client was itself"),
    ]
    wide = max(len(value) for _, value, _ in rows)
    lines = [f"{name:<14}  {value:>{wide}}  {more}".rstrip() for name, value, more in rows]
    if result.was_busy:
        lines += ["", "This client was the bottleneck: the figures are its own, not the relay's."]
    elif result.was_late:
        lines += ["", "This client was late itself: that much of the latencies is its own."]
    elif load.rate_per_s and tally.sent < 0.95 * load.rate_per_s * took_s:
        lines += ["", f"The relay did not take {load.rate_per_s:,g} messages a second."]
    return "\n".join([f"{address}: {load.text}", "", *lines])


def milliseconds(value: float | None) -> str:
    """Return a time as it is shown."""
    if value is None:
        return "-"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
