"""The result of `bench.replicas` as text, compared with its targets. Measures nothing."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bench.report import number, origin, table, targets_table
from bench.targets import DISTURBED, Measurement, TargetVerdict

BROKERS = {"redis": "Redis Streams", "nats": "NATS JetStream"}
MOST_LATENCY = 1.5  # of the bare client's
LEAST_PER_S = 500_000
LEAST_OF_MEMORY = 0.8
FAULTS = ("lost", "duplicated", "out_of_order", "damaged", "differently_ordered")
PAIR = "2 write"  # both write and both read all: the flood that is judged

Take = Callable[[dict[str, Any]], float]


def per_round(found: Sequence[Measurement], what: str, who: str, take: Take) -> dict[int, float]:
    """Return a value by round; disturbed rounds only where there are no others."""
    worked = [each for each in found if (each.load, each.server) == (what, who) and not each.error]
    calm = [each for each in worked if each.disturbed <= DISTURBED] or worked
    return {each.round: take(each.values) for each in calm}


def middle(found: Sequence[Measurement], what: str, who: str, take: Take) -> float | None:
    """Return the median of a value over the rounds; None without one."""
    values = per_round(found, what, who, take).values()
    return median(values) if values else None


def floods(found: Sequence[Measurement]) -> dict[str, dict[str, Any]]:
    """Return the values of the median round of each flood, without disturbed rounds."""
    names = dict.fromkeys(each.server for each in found if each.load == "throughput")
    chosen = {}
    for name in names:
        rounds = per_round(found, "throughput", name, PER_S)
        if rounds:
            typical = sorted(rounds, key=rounds.__getitem__)[len(rounds) // 2]
            chosen[name] = next(
                each.values
                for each in found
                if (each.load, each.server, each.round) == ("throughput", name, typical)
            )
    return chosen


def key(name: str, factor: float = 1.0) -> Take:
    """Return a function that takes the value of that name, in a unit."""
    return lambda values: float(values[name]) * factor


P50, P99 = key("p50", 1e6), key("p99", 1e6)
PER_S = key("messages_per_s")
PER_CPU_S = key("deliveries_per_relay_cpu_s", 1e-6)


def ratios(over: dict[int, float], under: dict[int, float]) -> list[float]:
    """Divide within each round: what slowed the machine down in it slowed down both."""
    return [over[number] / under[number] for number in sorted(over.keys() & under.keys())]


def of_memory(found: Sequence[Measurement], load: str, kind: str) -> list[float]:
    """Return deliveries per CPU time with a broker as a share of those without, by round."""
    with_broker = per_round(found, load, kind, PER_CPU_S)
    return ratios(with_broker, per_round(found, load, "memory", PER_CPU_S))


def _ratio(text: str, rounds: list[float], bound: float, at_least: bool) -> TargetVerdict | None:
    if not rounds:
        return None
    found = median(rounds)
    met = found >= bound if at_least else found <= bound
    return TargetVerdict(
        f"{text} {'>=' if at_least else '<='} {bound:g} x", found, tuple(rounds), "x", met
    )


def _of_broker(found: Sequence[Measurement], kind: str) -> list[TargetVerdict | None]:
    bare = per_round(found, "latency", f"{kind}: bare", P50)
    ways = {"log": "from replica to replica", "clients": "from client to client"}
    judged = [
        _ratio(
            f"latency: {kind}, median {title}, against the bare client",
            ratios(per_round(found, "latency", f"{kind}: {how}", P50), bare),
            MOST_LATENCY,
            at_least=False,
        )
        for how, title in ways.items()
    ]
    flood = per_round(found, "throughput", f"{kind}: {PAIR}", PER_S)
    if flood:
        found_per_s = median(flood.values())
        text = (
            f"throughput: {kind}, two replicas, messages through the broker >= {LEAST_PER_S:,} /s"
        )
        met = found_per_s >= LEAST_PER_S
        judged.append(TargetVerdict(text, found_per_s, tuple(flood.values()), "/s", met))
    judged.append(
        _ratio(
            f"fanout: {kind}, deliveries per relay-CPU-second against memory://",
            of_memory(found, "fanout", kind),
            LEAST_OF_MEMORY,
            at_least=True,
        )
    )
    return judged


def verdicts(found: Sequence[Measurement]) -> list[TargetVerdict]:
    """Judge the run by every target for which it has values."""
    judged = [each for kind in BROKERS for each in _of_broker(found, kind)]
    faults = float(sum(each.values.get(name, 0) for each in found for name in FAULTS))
    complete = all(each.error is None for each in found)
    text = "all messages: none lost, duplicated, damaged, one order on all relays: faults = 0"
    judged.append(TargetVerdict(text, faults, (), "", complete and not faults))
    return [each for each in judged if each is not None]


def _cells(*values: float | None) -> list[str]:
    return [number(value) for value in values]


def _cost(found: Sequence[Measurement]) -> list[str]:
    names = ("replica", "broker", "pack", "unpack", "there_and_back")
    heading = [
        *("replica's CPU, µs", "broker's CPU, µs", "of it packing, µs", "unpacking, µs"),
        *("there and back, µs", "replica's CPU per message, µs"),
    ]
    rows = [["", *heading]]
    for each in found:
        if each.load == "cost" and not each.error:
            values = [each.values[name] * 1e6 for name in names]
            per_message = values[0] / each.values["messages"]
            rows.append([each.server, *_cells(*values, per_message)])
    text = "One replica appends so many messages of 128 bytes together, waits for them, and again."
    return ["## cost: what a packet takes", "", text, "", *_right(rows), ""]


WAYS = {
    "bare": "bare client: append to read",
    "log": "log: replica to replica",
    "hops": "WebSockets alone: client to client, `memory://`",
    "clients": "client to client, two relays",
}


def _latency(found: Sequence[Measurement]) -> list[str]:
    rows = [["", "p50, µs", "p99, µs"]]
    for kind, title in BROKERS.items():
        for how, way in WAYS.items():
            who = f"{kind}: {how}"
            values = [middle(found, "latency", who, take) for take in (P50, P99)]
            rows.append([f"{title}, {way}", *_cells(*values)])
    text = "One message of 128 bytes about every 1.7 ms; writer, reader and broker on both cores."
    return ["## latency: one small message across replicas", "", text, "", *_right(rows), ""]


def _cores(found: Sequence[Measurement], kind: str) -> str:
    """Return the shares of a core that relay and broker used."""
    relay = middle(found, "publish", kind, lambda it: sum(it["relay_cpu_seconds"]) / it["seconds"])
    broker = middle(found, "publish", kind, lambda it: it["broker_cpu_seconds"] / it["seconds"])
    return f"{number(relay)}, broker {number(broker)}"


def _shares(values: dict[str, Any]) -> str:
    ends = " + ".join(f"{share:.2f}" for share in values["cpu_shares"])
    return f"{ends}, broker {values['broker_share']:.2f}"


def _throughput(found: Sequence[Measurement]) -> list[str]:
    rows = [["", "messages/s", "MB/s", "cores used: replicas, broker"]]
    for who, values in floods(found).items():
        per_s = middle(found, "throughput", who, PER_S) or 0.0
        rows.append([who, *_cells(per_s, per_s * 128 / 1e6), _shares(values)])
    for kind in ("memory", *BROKERS):
        published = middle(found, "publish", kind, PER_S)
        if published:
            cells = _cells(published, published * 128 / 1e6)
            rows.append([f"{kind}: publish", *cells, _cores(found, kind)])
    text = (
        "128-byte messages, as many as two cores carry that replicas and broker share. Every "
        "replica reads all; the number is that of the slowest. `publish` is one relay on one core "
        "with its broker, and four WebSocket clients that publish and receive all."
    )
    return ["## throughput: all that goes through one broker", "", text, "", *_right(rows), ""]


def _fanout(found: Sequence[Measurement]) -> list[str]:
    rows = [["", "fanout, M", "single, M", "fanout, M/s", "fanout: broker's CPU for the relay's"]]
    takes = (
        ("fanout", PER_CPU_S),
        ("single", PER_CPU_S),
        ("fanout", key("deliveries_per_s", 1e-6)),
        ("fanout", broker_share),
    )
    rows += [
        [kind, *_cells(*(middle(found, load, kind, take) for load, take in takes))]
        for kind in ("memory", *BROKERS)
    ]
    text = (
        "The loads of `make bench` against one relay with 500 clients: deliveries per CPU-second "
        "of the relay."
    )
    return ["## fanout: what a broker takes from 500 clients", "", text, "", *_right(rows), ""]


def broker_share(values: dict[str, Any]) -> float:
    """Return the broker's CPU time per second of the relays'."""
    return float(values["broker_cpu_seconds"] / sum(values["relay_cpu_seconds"]))


def _several(found: Sequence[Measurement]) -> list[str]:
    rows = [["", "deliveries/s, M", "per relay-CPU-second, M", "broker's CPU for the relays'"]]
    for who in dict.fromkeys(each.server for each in found if each.load == "several"):
        takes = (key("deliveries_per_s", 1e-6), PER_CPU_S, broker_share)
        rows.append([who, *_cells(*(middle(found, "several", who, take) for take in takes))])
    text = (
        "500 clients for each relay, 100 publishers in all with one message in flight each; all "
        "relays and their broker on one core, the clients on the other."
    )
    return ["## several: one, two and four relays", "", text, "", *_right(rows), ""]


def _right(rows: list[list[str]]) -> list[str]:
    """Lay out a table whose last column has numbers, too."""
    return table([[*row, ""] for row in rows])


def markdown(facts: dict[str, Any], found: Sequence[Measurement]) -> str:
    """Write the whole result as one page."""
    lines = ["# What `make replicas` measured", ""]
    lines += [f"{line}  " for line in origin(facts)]
    lines += ["", "Medians over the rounds. How: [bench/README.md](../README.md).", ""]
    lines += ["## Targets", "", *targets_table(verdicts(found)), ""]
    parts = {
        "cost": _cost,
        "latency": _latency,
        "throughput": _throughput,
        "fanout": _fanout,
        "several": _several,
    }
    there = {each.load for each in found}
    for name, part in parts.items():
        if name in there:
            lines += part(found)
    return "\n".join(lines)
