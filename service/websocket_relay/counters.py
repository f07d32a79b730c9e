"""Count events as plain integers. Knows no metrics library and no reader.

Hot paths increment these attributes, once per batch where possible; `metrics` reads them when the
page is scraped. One event loop writes and reads, so there is no lock.

Invariant, once nothing is in flight: expected_deliveries == deliveries + the sum of drops.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from websocket_relay.outcomes import Close, Drop, Refusal, TlsFailure

Values = Mapping[str, float | dict[str, int] | dict[tuple[str, str], int]]
"""The current values of metrics, by name; those of a metric with labels by the labels' values. Each
part returns its own; `metrics` has the types and the descriptions."""


@dataclass(slots=True)
class Counters:
    """The counters of one replica."""

    connections: int = 0
    disconnections: int = 0
    messages: int = 0  # received from clients and relayed
    expected_deliveries: int = 0  # channel size at publish time, summed over messages
    deliveries: int = 0  # messages written to clients' sockets
    received_bytes: int = 0  # payload of these messages
    sent_bytes: int = 0  # frames of delivered messages, headers included
    publisher_pauses: int = 0
    publish_repeats: int = 0  # publishes that the log held already, of sessions and keys
    recovered: int = 0  # clients that reconnected and were replayed every missed message
    not_recovered: int = 0  # clients whose replay was incomplete
    drops: dict[Drop, int] = field(default_factory=lambda: dict.fromkeys(Drop, 0))
    closes: dict[Close, int] = field(default_factory=lambda: dict.fromkeys(Close, 0))
    refusals: dict[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))
    tls_failures: dict[TlsFailure, int] = field(
        default_factory=lambda: dict.fromkeys(TlsFailure, 0)
    )

    def metrics(self) -> Values:
        """Return the values of the metrics, except those of TLS."""
        return {
            "connected_clients": self.connections - self.disconnections,
            "connections": self.connections,
            "disconnections": self.disconnections,
            "messages": self.messages,
            "expected_deliveries": self.expected_deliveries,
            "deliveries": self.deliveries,
            "drops": {why.value: count for why, count in self.drops.items()},
            "received_bytes": self.received_bytes,
            "sent_bytes": self.sent_bytes,
            "closes": {(str(why.code), why.label): count for why, count in self.closes.items()},
            "refusals": {why.label: count for why, count in self.refusals.items()},
            "publisher_pauses": self.publisher_pauses,
            "publish_repeats": self.publish_repeats,
            "history_replays": {"recovered": self.recovered, "not_recovered": self.not_recovered},
        }

    def tls_metrics(self) -> Values:
        """Return the values of the metrics of TLS."""
        failures = {why.value: count for why, count in self.tls_failures.items()}
        return {"tls_handshake_failures": failures}


@dataclass(slots=True)
class BackplaneCounters:
    """The counters of one replica's connection to the log."""

    outages: int = 0
    lost: int = 0  # messages that are missing in every replica's stream
    gaps: int = 0  # times that the next expected message was missing in the stream
    duplicates: int = 0  # skipped packets: repeated, or after a later epoch of their producer
    unreadable: int = 0  # entries that are not packets, and incomplete multi-part packets
    unavailable: int = 0  # messages that were not relayed, and whose publishers were notified
    local: int = 0  # messages that were relayed on this replica alone

    def metrics(self) -> Values:
        """Return the values of the metrics."""
        return {f"backplane_{each.name}": getattr(self, each.name) for each in fields(self)}
