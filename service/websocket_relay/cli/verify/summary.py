"""The result of `verify`, as JSON and as a table. Measures nothing."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

from websocket_relay.cli.bench.summary import milliseconds
from websocket_relay.cli.bench.tally import Latencies
from websocket_relay.cli.verify.judge import Verdict


@dataclass(frozen=True, slots=True)
class VerifyLoad:
    """The load on the relay.

    Attributes:
        clients: number of subscribers; each subscribes to all channels.
        publishers: number of publishers; each publishes to one channel.
        channels: the names of the channels.
        rate_per_s: messages per second of all publishers together.
    """

    clients: int
    publishers: int
    channels: tuple[str, ...]
    rate_per_s: int

    @property
    def text(self) -> str:
        """The load as text."""
        channels = "1 channel" if len(self.channels) == 1 else f"{len(self.channels):,} channels"
        return (
            f"{self.clients:,} subscribers, {self.publishers:,} publishers, {channels},"
            f" {self.rate_per_s:,} messages a second"
        )


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of a run.

    Attributes:
        load: the load.
        verdict: what was lost, doubled or reordered.
        took_s: duration of publishing.
        latencies: from each publish to each delivery.
        outages_s: the time of each reconnection, from the lost connection to the next one.
    """

    load: VerifyLoad
    verdict: Verdict
    took_s: float
    latencies: Latencies
    outages_s: tuple[float, ...]

    def as_json(self, url: str) -> dict[str, Any]:
        """Return all results for JSON."""
        verdict = asdict(self.verdict)
        examples = verdict.pop("examples")
        return {
            "url": url,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "load": asdict(self.load),
            "took_s": self.took_s,
            "published": self.verdict.published,
            **verdict,
            "reconnections": len(self.outages_s),
            "reconnection_median_s": median(self.outages_s) if self.outages_s else None,
            "reconnection_longest_s": max(self.outages_s, default=None),
            "latency_ms": self.latencies.summary_ms(),
            "examples": examples,
        }


def table(url: str, result: VerifyResult) -> str:
    """Return the summary table, and the first faults."""
    verdict, outages_s = result.verdict, result.outages_s
    times = ""
    if outages_s:
        times = f"median {median(outages_s):.2f} s, longest {max(outages_s):.2f} s"
    rows = [
        ("published", f"{verdict.published:,}", f"in {result.took_s:.1f} s"),
        ("acknowledged", f"{verdict.acknowledged:,}", ""),
        ("unconfirmed", f"{verdict.unconfirmed:,}", "published once or not at all"),
        ("refused", f"{verdict.refused:,}", ""),
        ("lost", f"{verdict.lost:,}", ""),
        ("doubled", f"{verdict.doubled:,}", ""),
        ("reordered", f"{verdict.reordered:,}", ""),
        ("reconnections", f"{len(outages_s):,}", times),
        *(
            (f"latency {name}", milliseconds(value), "")
            for name, value in result.latencies.summary_ms().items()
        ),
    ]
    width = max(len(value) for _, value, _ in rows)
    lines = [f"{name:<14}  {value:>{width}}  {more}".rstrip() for name, value, more in rows]
    return "\n".join([f"{url}: {result.load.text}", "", *lines, *verdict.examples])
