"""Count what happens, as plain integers. Knows no metrics library and no reader.

The hot path adds to attributes here, once a batch where it can; the metrics page reads them when
it is scraped. One event loop writes and reads, so there is no lock.

Invariant, once nothing is in flight: owed == deliveries + the sum of drops.
"""

from dataclasses import dataclass, field

from websocket_relay.outcomes import Close, Drop, Refusal


@dataclass(slots=True)
class Counters:
    """The books of one replica."""

    connections: int = 0
    disconnections: int = 0
    messages: int = 0  # taken from clients and relayed
    owed: int = 0  # channel size at publishing time, summed over messages
    deliveries: int = 0  # messages written to clients' sockets
    received_bytes: int = 0  # payload of messages taken
    sent_bytes: int = 0  # frames of messages written, headers included
    publisher_pauses: int = 0
    recovered: int = 0  # clients that came back and were sent all that they had missed
    not_recovered: int = 0  # the others
    drops: dict[Drop, int] = field(default_factory=lambda: dict.fromkeys(Drop, 0))
    closes: dict[Close, int] = field(default_factory=lambda: dict.fromkeys(Close, 0))
    refusals: dict[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))


@dataclass(slots=True)
class BackplaneCounters:
    """The books of one replica's hold on the log."""

    outages: int = 0
    lost: int = 0  # messages that are in nobody's stream any more
    gaps: int = 0  # times that the stream did not hold what came next
    duplicates: int = 0  # packets left out: there twice, or behind a later life of their origin
    unreadable: int = 0  # entries that are no packets, and parts that nobody completed
    unavailable: int = 0  # messages that were not relayed, and whose publishers were told
    local: int = 0  # messages that were relayed on this replica alone
