"""Export the counters to Prometheus. The only module that uses prometheus_client.

The integers of Counters are converted to metrics when the page is scraped. Distributions are
observed in histograms, once per batch or less often. Knows no connection and no channel.
"""

import asyncio
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from websocket_relay import __version__
from websocket_relay.counters import BackplaneCounters, Counters
from websocket_relay.page_cache import PageCache

DELIVERY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)

BACKPLANE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)

LAG_INTERVAL_S = 0.05

PREFIX = "websocket_"

OPENMETRICS = "application/openmetrics-text"
DRAFT = "version=0.0.1"  # of OpenMetrics; old Prometheus prefers it to the text format


BUILD = GaugeMetricFamily(
    "websocket_relay_build_info",
    "Version of the relay and of its Python, with the value 1.",
    labels=["python", "version"],
)
BUILD.add_metric([platform.python_version(), __version__], 1)


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


def disable_created_series() -> None:
    """Export no `_created` series: a global setting of the library.

    Prometheus reads them as series of their own, with the name and text of another metric.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no type for it


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
            "Time from receiving the first message of a batch to its last write to a client.",
            buckets=DELIVERY_BUCKETS_S,
            registry=self.registry,
        )
        lag = Histogram(
            "websocket_event_loop_lag_seconds",
            "Time by which the event loop wakes a task too late.",
            buckets=LAG_BUCKETS_S,
            registry=self.registry,
        )
        self.observe_delivery: Callable[[float], None] = delivery.observe
        append = Histogram(
            "websocket_backplane_append_seconds",
            "Time from sending messages to the broker to its confirmation.",
            buckets=BACKPLANE_BUCKETS_S,
            registry=self.registry,
        )
        backplane_lag = Histogram(
            "websocket_backplane_lag_seconds",
            "Time from appending a heartbeat to the log to reading it back.",
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
    samples = family.samples
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
        yield BUILD
        connected = counters.connections - counters.disconnections
        yield _gauge("connected_clients", "Number of clients that are connected.", connected)
        yield _gauge(
            "connections_limit",
            "Setting limits.max_connections, where 0 means no limit.",
            now.max_connections(),
        )
        free = now.free_descriptors()
        yield _gauge(
            "free_descriptors", "Number of file descriptors that the process may still open.", free
        )
        open_now = GaugeMetricFamily(
            "websocket_http_connections",
            "Number of connections that are neither WebSockets nor event streams, by port.",
            labels=["port"],
        )
        for port, count in now.http_connections().items():
            open_now.add_metric([port], count)
        yield open_now
        text = "Number of idle HTTP connections that were closed to accept others."
        yield _counter("http_evictions", text, now.http_evictions())
        yield _counter(
            "connections", "Number of clients that have connected.", counters.connections
        )
        yield _counter(
            "disconnections", "Number of clients that have disconnected.", counters.disconnections
        )
        yield _counter(
            "messages",
            "Number of messages that were received from publishers to be relayed.",
            counters.messages,
        )
        yield _counter(
            "expected_deliveries",
            "Number of deliveries that messages require, one for each subscriber at publish time.",
            counters.expected_deliveries,
        )
        yield _counter(
            "deliveries",
            "Number of messages that were written to the sockets of clients.",
            counters.deliveries,
        )
        drops = {(why.value,): count for why, count in counters.drops.items()}
        yield _labelled(
            "drops",
            "Number of expected deliveries that were not made, by reason.",
            ["reason"],
            drops,
        )
        yield _counter(
            "received_bytes",
            "Number of payload bytes in messages from publishers.",
            counters.received_bytes,
        )
        yield _counter(
            "sent_bytes",
            "Number of bytes in frames and events that were written to clients.",
            counters.sent_bytes,
        )
        closes = {(str(why.code), why.label): count for why, count in counters.closes.items()}
        yield _labelled(
            "closes",
            "Number of closed client connections, by close code and reason.",
            ["code", "reason"],
            closes,
        )
        refusals = {(why.label,): count for why, count in counters.refusals.items()}
        yield _labelled(
            "refusals",
            "Number of upgrades and requests that were refused, by reason.",
            ["reason"],
            refusals,
        )
        yield _gauge(
            "backlog_bytes", "Bytes of memory that the send backlogs use.", now.backlog_bytes()
        )
        text = "Setting limits.total_backlog_bytes."
        yield _gauge("backlog_limit_bytes", text, now.total_backlog_bytes())
        partial = now.partial_message_bytes()
        yield _gauge(
            "partial_message_bytes",
            "Bytes of memory that incomplete messages and bodies use.",
            partial,
        )
        yield _gauge(
            "slow_clients", "Number of clients that have a send backlog.", now.slow_clients()
        )
        yield _gauge("channels", "Number of channels that have subscribers.", now.channels())
        yield _gauge(
            "paused_publishers",
            "Number of publishers that flow control pauses now.",
            now.paused_publishers(),
        )
        pauses = counters.publisher_pauses
        yield _counter(
            "publisher_pauses", "Number of times that flow control paused a publisher.", pauses
        )
        yield from self._backplane()
        yield _gauge(
            "history_messages", "Number of messages in the history.", now.history_messages()
        )
        yield _gauge("history_bytes", "Bytes of memory that the history uses.", now.history_bytes())
        replays = {("recovered",): counters.recovered, ("not_recovered",): counters.not_recovered}
        text = "Number of clients that resumed after a position, by result."
        yield _labelled("history_replays", text, ["result"], replays)
        text = "Number of log lines that were dropped because they could not be written in time."
        yield _counter("log_lines_dropped", text, now.dropped_log_lines())
        yield _gauge("ready", "Whether the relay accepts clients (1) or not (0).", int(now.ready()))
        draining = now.draining()
        yield _gauge("draining", "Whether the relay shuts down (1) or not (0).", int(draining))
        remaining = connected if draining else 0
        yield _gauge(
            "draining_clients", "Number of clients that a shutdown has not closed yet.", remaining
        )
        yield from self._certificate()
        fetches = {(result,): count for result, count in now.key_fetches().items()}
        if fetches:
            text = "Number of fetches of the signing keys, by result."
            yield _labelled("jwks_fetches", text, ["result"], fetches)

    def _backplane(self) -> Iterator[Metric]:
        counters, pending = self._gauges.backplane_counters, self._gauges.appends_bytes()
        up = int(self._gauges.backplane_up())
        yield _gauge("backplane_up", "Whether the backplane is up (1) or in an outage (0).", up)
        yield _gauge(
            "backplane_pending_bytes",
            "Bytes of messages that are not appended to the log yet.",
            pending,
        )
        yield _counter("backplane_outages", "Number of outages of the backplane.", counters.outages)
        yield _counter(
            "backplane_lost",
            "Number of messages that the log lost before this replica read them.",
            counters.lost,
        )
        yield _counter(
            "backplane_gaps",
            "Number of places in the log where messages may be missing.",
            counters.gaps,
        )
        yield _counter(
            "backplane_duplicates",
            "Number of packets that were skipped because they were repeated or expired.",
            counters.duplicates,
        )
        yield _counter(
            "backplane_unreadable",
            "Number of entries in the log that were skipped because they are not valid packets.",
            counters.unreadable,
        )
        unavailable = counters.unavailable
        yield _counter(
            "backplane_unavailable",
            "Number of messages that were not relayed because of an outage.",
            unavailable,
        )
        yield _counter(
            "backplane_local",
            "Number of messages that were relayed on this replica only because of an outage.",
            counters.local,
        )

    def _certificate(self) -> Iterator[Metric]:
        expiry = self._gauges.certificate_expiry()
        if expiry is None:
            return
        text = "Time at which the served certificate expires, in seconds since 1970."
        yield _gauge("tls_certificate_expiry_timestamp_seconds", text, expiry)
        reloads = {(result,): count for result, count in self._gauges.certificate_reloads().items()}
        yield _labelled(
            "tls_reloads", "Number of reloads of the certificate, by result.", ["result"], reloads
        )
        failures = {(why.value,): count for why, count in self._counters.tls_failures.items()}
        text = "Number of TLS handshakes that failed, by reason."
        yield _labelled("tls_handshake_failures", text, ["reason"], failures)


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
