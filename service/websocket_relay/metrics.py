"""Export the counters to Prometheus. The only module that uses prometheus_client.

The integers of Counters are converted to metrics when the page is scraped. Distributions are
observed in histograms, once per batch or less often. Knows no connection and no channel.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from websocket_relay.counters import BackplaneCounters, Counters
from websocket_relay.page_cache import PageCache

DELIVERY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)

BACKPLANE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)

LAG_INTERVAL_S = 0.05

PREFIX = "websocket_"

OPENMETRICS = "application/openmetrics-text"
DRAFT = "version=0.0.1"  # of OpenMetrics; old Prometheus prefers it to the text format


@dataclass(frozen=True, slots=True)
class Gauges:
    """Callbacks that read the current state of the components when the page is scraped."""

    max_connections: Callable[[], int]
    free_descriptors: Callable[[], int]
    http_connections: Callable[[], dict[str, int]]
    http_evictions: Callable[[], int]
    total_backlog_bytes: Callable[[], int]
    ready: Callable[[], bool]
    channels: Callable[[], int]
    slow_clients: Callable[[], int]
    backlog_bytes: Callable[[], int]
    partial_message_bytes: Callable[[], int]
    paused_publishers: Callable[[], int]
    backplane_counters: BackplaneCounters
    backplane_up: Callable[[], bool]
    appends_bytes: Callable[[], int]
    history_messages: Callable[[], int]
    history_bytes: Callable[[], int]
    draining: Callable[[], bool]
    certificate_expiry: Callable[[], float | None]
    certificate_reloads: Callable[[], dict[str, int]]
    key_fetches: Callable[[], dict[str, int]]
    dropped_log_lines: Callable[[], int]


class Metrics:
    """The metrics of one replica, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._pages = PageCache()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        delivery = Histogram(
            "websocket_delivery_seconds",
            "From receiving a batch's first message to its last write",
            buckets=DELIVERY_BUCKETS_S,
            registry=self.registry,
        )
        lag = Histogram(
            "websocket_event_loop_lag_seconds",
            "Delay of the event loop in waking a task",
            buckets=LAG_BUCKETS_S,
            registry=self.registry,
        )
        self.observe_delivery: Callable[[float], None] = delivery.observe
        append = Histogram(
            "websocket_backplane_append_seconds",
            "From sending a packet to the broker to its acknowledgement",
            buckets=BACKPLANE_BUCKETS_S,
            registry=self.registry,
        )
        backplane_lag = Histogram(
            "websocket_backplane_lag_seconds",
            "From appending a heartbeat to reading it",
            buckets=BACKPLANE_BUCKETS_S,
            registry=self.registry,
        )
        self._observe_lag: Callable[[float], None] = lag.observe
        self.observe_append: Callable[[float], None] = append.observe
        self.observe_backplane_lag: Callable[[float], None] = backplane_lag.observe

    def register(self, counters: Counters, gauges: Gauges) -> None:
        """Register the counters and gauges of the replica."""
        self.registry.register(_RelayCollector(counters, gauges))

    async def page(self, accept: str) -> tuple[bytes, str]:
        """Return the page and its content type, in the format that an Accept header selects."""
        # Not prometheus_client's choose_encoder: it returns a different format for each version
        # that a client names, so that requests would not share a page, and it fails for a version
        # that is not a number.
        encode: Callable[[Collector], bytes] = generate_latest
        content_type = CONTENT_TYPE_PLAIN_0_0_4
        if _is_openmetrics(accept):
            encode, content_type = openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST
        return await self._pages.get(content_type, lambda: encode(self.registry)), content_type

    def to_stats(self) -> dict[str, Any]:
        """Return the relay's own metrics as plain values, for the console.

        Counters and gauges are numbers, or numbers by label value. Histograms have `count`, `sum`
        and `buckets`: pairs of an upper bound and the number of observations not above it.
        """
        families = self.registry.collect()
        return {
            family.name.removeprefix(PREFIX): _plain(family)
            for family in families
            if family.name.startswith(PREFIX)
        }

    async def measure_loop_lag(self) -> None:
        """Observe how late the event loop wakes a sleeping task, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self._observe_lag(max(0.0, loop.time() - due))


def _is_openmetrics(accept: str) -> bool:
    for offer in accept.split(","):
        kind, *parameters = map(str.strip, offer.split(";"))
        if kind == OPENMETRICS and DRAFT not in parameters:
            return True
    return False


def _plain(family: Metric) -> Any:
    """Return the value of a metric: a number, numbers by label value, or a histogram's parts."""
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    if family.type == "histogram":
        buckets = [sample for sample in samples if sample.name.endswith("_bucket")]
        return {
            "buckets": [[sample.labels["le"], sample.value] for sample in buckets],
            "count": sum(sample.value for sample in samples if sample.name.endswith("_count")),
            "sum": sum(sample.value for sample in samples if sample.name.endswith("_sum")),
        }
    if any(sample.labels for sample in samples):
        return {list(sample.labels.values())[-1]: sample.value for sample in samples}
    return sum(sample.value for sample in samples)


class _RelayCollector(Collector):
    def __init__(self, counters: Counters, gauges: Gauges) -> None:
        self._counters = counters
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        return ()  # no names to reserve: the gauges can't be read before the relay is built

    def collect(self) -> Iterator[Metric]:
        counters, now = self._counters, self._gauges
        connected = counters.connections - counters.disconnections
        yield _gauge("connected_clients", "Clients connected now", connected)
        yield _gauge("connections_limit", "limits.max_connections; 0: none", now.max_connections())
        free = now.free_descriptors()
        yield _gauge("free_descriptors", "File descriptors that may still be opened", free)
        open_now = GaugeMetricFamily(
            "websocket_http_connections", "Plain HTTP connections, by port", labels=["port"]
        )
        for port, count in now.http_connections().items():
            open_now.add_metric([port], count)
        yield open_now
        text = "Idle HTTP connections closed to accept others"
        yield _counter("http_evictions", text, now.http_evictions())
        yield _counter("connections", "Connections established", counters.connections)
        yield _counter("disconnections", "Connections ended", counters.disconnections)
        yield _counter("messages", "Messages received from clients and relayed", counters.messages)
        yield _counter(
            "expected_deliveries",
            "Expected deliveries: subscribers at publish time",
            counters.expected_deliveries,
        )
        yield _counter("deliveries", "Messages written to clients' sockets", counters.deliveries)
        drops = {(why.value,): count for why, count in counters.drops.items()}
        yield _labelled("drops", "Expected deliveries that were not made", ["reason"], drops)
        yield _counter(
            "received_bytes", "Payload bytes received from clients", counters.received_bytes
        )
        yield _counter("sent_bytes", "Bytes of frames written to sockets", counters.sent_bytes)
        closes = {(str(why.code), why.label): count for why, count in counters.closes.items()}
        yield _labelled("closes", "Connections ended, by reason", ["code", "reason"], closes)
        refusals = {(why.label,): count for why, count in counters.refusals.items()}
        yield _labelled("refusals", "Requests refused before the upgrade", ["reason"], refusals)
        yield _gauge("backlog_bytes", "Memory used by send backlogs", now.backlog_bytes())
        text = "limits.total_backlog_bytes"
        yield _gauge("backlog_limit_bytes", text, now.total_backlog_bytes())
        partial = now.partial_message_bytes()
        yield _gauge("partial_message_bytes", "Memory used by partial messages", partial)
        yield _gauge("slow_clients", "Clients with a send backlog", now.slow_clients())
        yield _gauge("channels", "Channels with subscribers", now.channels())
        yield _gauge(
            "paused_publishers", "Publishers paused by flow control", now.paused_publishers()
        )
        pauses = counters.publisher_pauses
        yield _counter("publisher_pauses", "Times a publisher was paused", pauses)
        yield from self._backplane()
        yield _gauge("history_messages", "Messages retained for replay", now.history_messages())
        yield _gauge("history_bytes", "Memory used by retained messages", now.history_bytes())
        replays = {("recovered",): counters.recovered, ("not_recovered",): counters.not_recovered}
        text = "Replays requested by clients"
        yield _labelled("history_replays", text, ["result"], replays)
        dropped = now.dropped_log_lines()
        yield _counter("log_lines_dropped", "Log lines that were not read in time", dropped)
        yield _gauge("ready", "1 while the relay accepts clients", int(now.ready()))
        draining = now.draining()
        yield _gauge("draining", "1 while the relay shuts down", int(draining))
        remaining = connected if draining else 0
        yield _gauge("draining_clients", "Clients not yet closed in a shutdown", remaining)
        yield from self._certificate()
        fetches = {(result,): count for result, count in now.key_fetches().items()}
        if fetches:
            text = "Fetches of the signing keys"
            yield _labelled("jwks_fetches", text, ["result"], fetches)

    def _backplane(self) -> Iterator[Metric]:
        counters, pending = self._gauges.backplane_counters, self._gauges.appends_bytes()
        up = int(self._gauges.backplane_up())
        yield _gauge("backplane_up", "1 while the backplane is up", up)
        yield _gauge("backplane_pending_bytes", "Bytes not yet appended to the log", pending)
        yield _counter("backplane_outages", "Outages of the backplane", counters.outages)
        yield _counter("backplane_lost", "Messages lost by the log", counters.lost)
        yield _counter("backplane_gaps", "Gaps found in the log", counters.gaps)
        yield _counter(
            "backplane_duplicates", "Packets skipped: repeated or expired", counters.duplicates
        )
        yield _counter(
            "backplane_unreadable", "Entries that are not valid packets", counters.unreadable
        )
        unavailable = counters.unavailable
        yield _counter("backplane_unavailable", "Messages not relayed in an outage", unavailable)
        yield _counter(
            "backplane_local", "Messages relayed on this replica only, in an outage", counters.local
        )

    def _certificate(self) -> Iterator[Metric]:
        expiry = self._gauges.certificate_expiry()
        if expiry is None:
            return
        text = "Expiry of the served certificate"
        yield _gauge("tls_certificate_expiry_timestamp_seconds", text, expiry)
        reloads = {(result,): count for result, count in self._gauges.certificate_reloads().items()}
        yield _labelled("tls_reloads", "Reloads of the certificate", ["result"], reloads)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"websocket_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"websocket_{name}", text, value=value)


def _labelled(name: str, text: str, labels: list[str], values: Mapping[Any, int]) -> Metric:
    """Return a counter of several series: the keys of `values` are tuples of label values."""
    family = CounterMetricFamily(f"websocket_{name}", text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
