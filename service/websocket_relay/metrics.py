"""Export counters and gauges to Prometheus. The only module that uses prometheus_client.

Owns the names, types and descriptions of the metrics. Each part returns the current values of its
own when the page is scraped. Distributions are observed in histograms, once per batch or less
often. Knows no connection and no channel.
"""

import asyncio
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
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
from websocket_relay.counters import Values
from websocket_relay.page_cache import PageCache

DELIVERY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)

BACKPLANE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)

HOOK_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

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


GAUGES = {
    "connected_clients": "Number of clients that are connected.",
    "connections_limit": "Setting limits.max_connections, where 0 means no limit.",
    "free_descriptors": "Number of file descriptors that the process may still open.",
    "http_connections": (
        "Number of connections that are neither WebSockets nor event streams, by port."
    ),
    "backlog_bytes": "Bytes of memory that the send backlogs use.",
    "backlog_limit_bytes": "Setting limits.total_backlog_bytes.",
    "partial_message_bytes": "Bytes of memory that incomplete messages and bodies use.",
    "slow_clients": "Number of clients that have a send backlog.",
    "channels": "Number of channels that have subscribers.",
    "paused_publishers": "Number of publishers that flow control pauses now.",
    "backplane_up": "Whether the backplane is up (1) or in an outage (0).",
    "backplane_pending_bytes": "Bytes of messages that are not appended to the log yet.",
    "auth_hook_in_flight": "Number of requests to auth.hook.url that are not answered yet.",
    "blocked_users": "Number of users that the server API has blocked for now.",
    "presence_clients": "Number of clients that are in channels with presence, on all replicas.",
    "history_messages": "Number of messages in the history.",
    "history_bytes": "Bytes of memory that the history uses.",
    "ready": "Whether the relay accepts clients (1) or not (0).",
    "draining": "Whether the relay shuts down (1) or not (0).",
    "draining_clients": "Number of clients that a shutdown has not closed yet.",
    "hook_pending_events": "Number of events that the receiver of webhooks has not accepted yet.",
    "hook_pending_bytes": "Payload bytes of these events.",
    "hook_pending_seconds": "Age of the oldest of these events, in seconds.",
    "tls_certificate_expiry_timestamp_seconds": (
        "Time at which the served certificate expires, in seconds since 1970."
    ),
}
"""Descriptions of the gauges, by name."""

COUNTERS = {
    "http_evictions": "Number of idle HTTP connections that were closed to accept others.",
    "connections": "Number of clients that have connected.",
    "disconnections": "Number of clients that have disconnected.",
    "messages": "Number of messages that were received from publishers to be relayed.",
    "expected_deliveries": (
        "Number of deliveries that messages require, one for each subscriber at publish time."
    ),
    "deliveries": "Number of messages that were written to the sockets of clients.",
    "drops": "Number of expected deliveries that were not made, by reason.",
    "received_bytes": "Number of payload bytes in messages from publishers.",
    "sent_bytes": "Number of bytes in frames and events that were written to clients.",
    "closes": "Number of closed client connections, by close code and reason.",
    "refusals": "Number of upgrades and requests that were refused, by reason.",
    "publisher_pauses": "Number of times that flow control paused a publisher.",
    "publish_repeats": (
        "Number of publishes of sessions and idempotency keys that were relayed before."
    ),
    "backplane_outages": "Number of outages of the backplane.",
    "backplane_lost": "Number of messages that the log lost before this replica read them.",
    "backplane_gaps": "Number of places in the log where messages may be missing.",
    "backplane_duplicates": (
        "Number of packets that were skipped because they were repeated or expired."
    ),
    "backplane_unreadable": (
        "Number of entries in the log that were skipped because they are not valid packets."
    ),
    "backplane_unavailable": "Number of messages that were not relayed because of an outage.",
    "backplane_local": (
        "Number of messages that were relayed on this replica only because of an outage."
    ),
    "history_replays": "Number of clients that resumed after a position, by result.",
    "presence_changes": (
        "Number of clients that joined and left channels with presence, on all replicas."
    ),
    "questions": "Number of questions and orders to all replicas, by result.",
    "blocks_dropped": "Number of blocks that were dropped because there were too many.",
    "log_lines_dropped": (
        "Number of log lines that were dropped because they could not be written in time."
    ),
    "tls_reloads": "Number of reloads of the certificate, by result.",
    "tls_handshake_failures": "Number of TLS handshakes that failed, by reason.",
    "jwks_fetches": "Number of fetches of the signing keys, by result.",
    "auth_hook_requests": "Number of requests to auth.hook.url, by result.",
    "hook_events": "Number of events that the receiver of webhooks has accepted from this replica.",
    "hook_events_dropped": "Number of events that no receiver will be sent.",
    "hook_attempts": "Number of requests to the receiver of webhooks, by result.",
}
"""Likewise of the counters."""

LABELS: Mapping[str, Sequence[str]] = {
    "http_connections": ["port"],
    "drops": ["reason"],
    "closes": ["code", "reason"],
    "refusals": ["reason"],
    "history_replays": ["result"],
    "presence_changes": ["change"],
    "questions": ["result"],
    "tls_reloads": ["result"],
    "tls_handshake_failures": ["reason"],
    "jwks_fetches": ["result"],
    "auth_hook_requests": ["result"],
    "hook_attempts": ["result"],
}


class Metrics(Collector):
    """The metrics of one replica, in their own registry."""

    def __init__(self) -> None:
        # A global setting of the library. Prometheus reads `_created` series as series of their
        # own, with the name and text of another metric.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no type for it
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.observe_delivery = self._histogram(
            "websocket_delivery_seconds",
            "Time from receiving the first message of a batch to its last write to a client.",
            DELIVERY_BUCKETS_S,
        )
        self._observe_lag = self._histogram(
            "websocket_event_loop_lag_seconds",
            "Time by which the event loop wakes a task too late.",
            LAG_BUCKETS_S,
        )
        self.observe_append = self._histogram(
            "websocket_backplane_append_seconds",
            "Time from sending messages to the broker to its confirmation.",
            BACKPLANE_BUCKETS_S,
        )
        self.observe_backplane_lag = self._histogram(
            "websocket_backplane_lag_seconds",
            "Time from appending a heartbeat to the log to reading it back.",
            BACKPLANE_BUCKETS_S,
        )
        self._sources: tuple[Callable[[], Values], ...] = ()
        self.registry.register(self)
        self._pages = PageCache()

    def add_auth_hook(self) -> Callable[[float], None]:
        """Register the histogram of auth.hook.url; return the method that observes a value."""
        return self._histogram(
            "websocket_auth_hook_seconds",
            "Time from a request to auth.hook.url to its answer, or to its failure.",
            HOOK_BUCKETS_S,
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Callable[[float], None]:
        """Register a histogram; return the method that observes a value."""
        observe: Callable[[float], None] = Histogram(
            name, text, buckets=buckets, registry=self.registry
        ).observe
        return observe

    def register(self, *sources: Callable[[], Values]) -> None:
        """Register the methods of the parts that return the values of their metrics."""
        self._sources += sources

    def collect(self) -> Iterator[Metric]:
        """Yield the counters and gauges, as they are now."""
        yield BUILD
        for name, value in chain.from_iterable(read().items() for read in self._sources):
            labels = LABELS.get(name)
            family: GaugeMetricFamily | CounterMetricFamily = (
                GaugeMetricFamily(PREFIX + name, GAUGES[name], labels=labels)
                if name in GAUGES
                else CounterMetricFamily(PREFIX + name, COUNTERS[name], labels=labels)
            )
            series = value.items() if isinstance(value, dict) else [((), value)]
            for key, number in series:
                family.add_metric([key] if isinstance(key, str) else key, number)
            yield family

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

    async def run(self) -> None:
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
