"""The load and the result of a load test, as JSON and as a table. Measures nothing."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from websocket_relay.cli.bench.tally import Tally

BUSY_CPU_SHARE = 0.9
"""Of one core. A client that uses more may have been the bottleneck."""

MIN_LATE_MS = 5.0
"""Timers are this late at times even on a machine with a free core: never reported."""

LATE_SHARE, MAX_LATE_MS = 0.2, 100.0
"""Share of the median latency, and its upper limit: a larger timer lag is reported."""


@dataclass(frozen=True, slots=True)
class BenchLoad:
    """The load on the relay.

    Attributes:
        clients: number of clients; each receives every message.
        publishers: number of clients that also publish.
        rate_per_s: messages per second of all publishers together; 0: `window` applies.
        window: messages in flight of each publisher; 0: `rate_per_s` applies.
        message_bytes: size of each message.
        duration_s: duration of the measurement.
        warmup_s: time under load before the measurement.
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
        """The load as text."""
        pace = (
            f"{self.rate_per_s:,g} messages a second in all"
            if self.rate_per_s
            else f"{self.window:,} in flight each"
        )
        return (
            f"{self.clients:,} clients, {self.publishers:,} of them publishing, {pace},"
            f" {self.message_bytes:,} bytes each, {self.duration_s:g} s"
        )


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The result of a load test.

    Attributes:
        load: the load.
        tally: the counters.
        took_s: from the start of the measurement to the last delivery.
        cpu_share: CPU use of this process, of one core.
        late_ms: timer lag of this process, 99th percentile.
    """

    load: BenchLoad
    tally: Tally
    took_s: float
    cpu_share: float
    late_ms: float

    @property
    def expected_deliveries(self) -> int:
        """The number of deliveries if none is missing."""
        return self.tally.sent * self.load.clients

    @property
    def was_busy(self) -> bool:
        """Whether the client may have been the bottleneck."""
        return self.cpu_share >= BUSY_CPU_SHARE

    @property
    def was_late(self) -> bool:
        """Whether timer lag of the client may be a large part of the latencies."""
        median_ms = self.tally.total.quantile_ms(0.5) or 0.0
        return self.late_ms > max(MIN_LATE_MS, min(median_ms * LATE_SHARE, MAX_LATE_MS))

    def as_json(self, url: str) -> dict[str, Any]:
        """Return all results for JSON."""
        tally, took_s = self.tally, self.took_s
        return {
            "url": url,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "load": asdict(self.load),
            "sent": tally.sent,
            "deliveries": tally.deliveries,
            "missing": self.expected_deliveries - tally.deliveries,
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


def table(url: str, result: BenchResult) -> str:
    """Return the summary table."""
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
        ("missing", f"{result.expected_deliveries - tally.deliveries:,}", ""),
        *((f"latency {name}", milliseconds(value), "") for name, value in latency.items()),
        ("own CPU", f"{result.cpu_share:.0%}", "of one core"),
        ("own delay p99", milliseconds(result.late_ms), "timer lag of this client"),
    ]
    width = max(len(value) for _, value, _ in rows)
    lines = [f"{name:<14}  {value:>{width}}  {more}".rstrip() for name, value, more in rows]
    if result.was_busy:
        lines += ["", "This client was the bottleneck: the result measures it, not the relay."]
    elif result.was_late:
        lines += ["", "This client was late itself: its own delay is part of the latencies."]
    elif load.rate_per_s and tally.sent < 0.95 * load.rate_per_s * took_s:
        lines += ["", f"The relay did not accept {load.rate_per_s:,g} messages a second."]
    return "\n".join([f"{url}: {load.text}", "", *lines])


def milliseconds(value: float | None) -> str:
    """Format a time in milliseconds; - for None."""
    if value is None:
        return "-"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
