"""Show the books to Prometheus. The only room that knows prometheus_client.

Plain integers of the ledger become metrics when the page is asked for; what needs a distribution
is observed in a histogram, once a batch or less often.
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

LAG_LOOK_S = 0.05

OURS = "websocket_"

OPENMETRICS = "application/openmetrics-text"
DRAFT = "version=0.0.1"  # of that; old Prometheus asks for it before the text format


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is read off the parts when the page is asked for."""

    max_connections: int
    free_descriptors: Callable[[], int]
    http_connections: Callable[[], dict[str, int]]
    http_evictions: Callable[[], int]
    total_backlog_bytes: int
    ready: Callable[[], bool]
    channels: Callable[[], int]
    slow_clients: Callable[[], int]
    backlog_bytes: Callable[[], int]
    unfinished_bytes: Callable[[], int]
    paused_publishers: Callable[[], int]
    log_books: BackplaneCounters
    log_up: Callable[[], bool]
    appends_bytes: Callable[[], int]
    history_messages: Callable[[], int]
    history_bytes: Callable[[], int]
    draining: Callable[[], bool]
    certificate_expiry: Callable[[], float | None]
    certificate_reloads: Callable[[], dict[str, int]]
    key_fetches: Callable[[], dict[str, int]]


class Metrics:
    """The metrics of one replica, on a registry of their own."""

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
            "How late the event loop was to wake a sleeper",
            buckets=LAG_BUCKETS_S,
            registry=self.registry,
        )
        self.observe_delivery: Callable[[float], None] = delivery.observe
        append = Histogram(
            "websocket_backplane_append_seconds",
            "From giving the broker a packet of messages to its answer",
            buckets=BACKPLANE_BUCKETS_S,
            registry=self.registry,
        )
        canary = Histogram(
            "websocket_backplane_lag_seconds",
            "From appending a canary to reading it",
            buckets=BACKPLANE_BUCKETS_S,
            registry=self.registry,
        )
        self._observe_lag: Callable[[float], None] = lag.observe
        self.observe_append: Callable[[float], None] = append.observe
        self.observe_backplane_lag: Callable[[float], None] = canary.observe

    def watch(self, ledger: Counters, gauges: Gauges) -> None:
        """Show these from now on."""
        self.registry.register(_RelayCollector(ledger, gauges))

    async def page(self, accept: str) -> tuple[bytes, str]:
        """Return the page and its content type, in the format that an Accept header asks for."""
        # Not prometheus_client's choose_encoder: it makes a format of each version that a client
        # may name, so that requests would not share a page, and fails for those that are no number.
        encode: Callable[[Collector], bytes] = generate_latest
        content_type = CONTENT_TYPE_PLAIN_0_0_4
        if _is_openmetrics(accept):
            encode, content_type = openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST
        return await self._pages.get(content_type, lambda: encode(self.registry)), content_type

    def figures(self) -> dict[str, Any]:
        """Return what is the relay's own on that page, for a page that people look at.

        Counters and gauges are numbers, or numbers by their label; histograms have `buckets`, pairs
        of a bound and how many observations were not above it, and `count` and `sum`.
        """
        families = self.registry.collect()
        return {
            family.name.removeprefix(OURS): _plain(family)
            for family in families
            if family.name.startswith(OURS)
        }

    async def measure_loop_lag(self) -> None:
        """Sleep and see how late it was, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_LOOK_S
            await asyncio.sleep(LAG_LOOK_S)
            self._observe_lag(max(0.0, loop.time() - due))


def _is_openmetrics(accept: str) -> bool:
    for offer in accept.split(","):
        kind, *parameters = map(str.strip, offer.split(";"))
        if kind == OPENMETRICS and DRAFT not in parameters:
            return True
    return False


def _plain(family: Metric) -> Any:
    samples = [each for each in family.samples if not each.name.endswith("_created")]
    if family.type == "histogram":
        return {
            "buckets": [
                [each.labels["le"], each.value] for each in samples if each.name.endswith("_bucket")
            ],
            "count": sum(each.value for each in samples if each.name.endswith("_count")),
            "sum": sum(each.value for each in samples if each.name.endswith("_sum")),
        }
    if any(each.labels for each in samples):
        return {list(each.labels.values())[-1]: each.value for each in samples}
    return sum(each.value for each in samples)


class _RelayCollector(Collector):
    def __init__(self, ledger: Counters, gauges: Gauges) -> None:
        self._ledger = ledger
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        return ()  # names are not reserved: reading the gauges before the start makes no sense

    def collect(self) -> Iterator[Metric]:
        books, now = self._ledger, self._gauges
        connected = books.connections - books.disconnections
        yield _gauge("connected_clients", "Clients connected now", connected)
        yield _gauge("connections_limit", "limits.max_connections; 0: none", now.max_connections)
        free = now.free_descriptors()
        yield _gauge("free_descriptors", "File descriptors that may still be opened", free)
        open_now = GaugeMetricFamily(
            "websocket_http_connections", "Connections that are no clients", labels=["port"]
        )
        for port, count in now.http_connections().items():
            open_now.add_metric([port], count)
        yield open_now
        text = "Idle HTTP connections closed for the sake of others"
        yield _counter("http_evictions", text, now.http_evictions())
        yield _counter("connections", "Connections established", books.connections)
        yield _counter("disconnections", "Connections ended", books.disconnections)
        yield _counter("messages", "Messages taken from clients and relayed", books.messages)
        yield _counter("owed", "Deliveries owed: members when published", books.owed)
        yield _counter("deliveries", "Messages written to clients' sockets", books.deliveries)
        drops = {(why.value,): count for why, count in books.drops.items()}
        yield _labelled("drops", "Deliveries owed and not made", ["reason"], drops)
        yield _counter("received_bytes", "Payload taken from clients", books.received_bytes)
        yield _counter("sent_bytes", "Frames of messages given to sockets", books.sent_bytes)
        closes = {(str(why.code), why.label): count for why, count in books.closes.items()}
        yield _labelled("closes", "Connections ended", ["code", "reason"], closes)
        refusals = {(why.label,): count for why, count in books.refusals.items()}
        yield _labelled("refusals", "Requests refused before the upgrade", ["reason"], refusals)
        yield _gauge("backlog_bytes", "Memory held for slow clients", now.backlog_bytes())
        text = "limits.total_backlog_bytes"
        yield _gauge("backlog_limit_bytes", text, now.total_backlog_bytes)
        unfinished = now.unfinished_bytes()
        yield _gauge("unfinished_bytes", "Bytes kept of messages that are not whole", unfinished)
        yield _gauge("slow_clients", "Clients that are behind now", now.slow_clients())
        yield _gauge("channels", "Channels with a client", now.channels())
        yield _gauge("paused_publishers", "Clients not read now", now.paused_publishers())
        pauses = books.publisher_pauses
        yield _counter("publisher_pauses", "Times a client was read no longer for a while", pauses)
        yield from self._backplane()
        kept = "for clients that come back"
        yield _gauge("history_messages", f"Messages kept {kept}", now.history_messages())
        yield _gauge("history_bytes", f"Memory that is kept {kept}", now.history_bytes())
        replays = {("recovered",): books.recovered, ("not_recovered",): books.not_recovered}
        text = "Clients that asked for what they had missed"
        yield _labelled("history_replays", text, ["result"], replays)
        yield _gauge("ready", "1 while the relay lets clients in", int(now.ready()))
        draining = now.draining()
        yield _gauge("draining", "1 while the relay stops", int(draining))
        left = connected if draining else 0
        yield _gauge("drain_clients_left", "Clients still to go in a stop", left)
        yield from self._certificate()
        fetches = {(result,): count for result, count in now.key_fetches().items()}
        if fetches:
            text = "Fetches of the keys that tokens are checked with"
            yield _labelled("jwks_fetches", text, ["result"], fetches)

    def _backplane(self) -> Iterator[Metric]:
        books, pending = self._gauges.log_books, self._gauges.appends_bytes()
        up = int(self._gauges.log_up())
        yield _gauge("backplane_up", "1 while messages get into the log and back", up)
        yield _gauge("backplane_pending_bytes", "What waits to get into the log", pending)
        yield _counter("backplane_outages", "Times that they did not for a while", books.outages)
        yield _counter("backplane_lost", "Messages that the log lost", books.lost)
        yield _counter("backplane_gaps", "Times that the log had lost some", books.gaps)
        yield _counter(
            "backplane_duplicates", "Packets left out, read or given up before", books.duplicates
        )
        yield _counter("backplane_unreadable", "Entries that are no packets", books.unreadable)
        unavailable = books.unavailable
        yield _counter("backplane_unavailable", "Messages not relayed in an outage", unavailable)
        yield _counter("backplane_local", "Messages relayed here only, in an outage", books.local)

    def _certificate(self) -> Iterator[Metric]:
        expiry = self._gauges.certificate_expiry()
        if expiry is None:
            return
        text = "When the served certificate expires"
        yield _gauge("tls_certificate_expiry_timestamp_seconds", text, expiry)
        reloads = {(result,): n for result, n in self._gauges.certificate_reloads().items()}
        yield _labelled("tls_reloads", "Renewed certificates found", ["result"], reloads)


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
