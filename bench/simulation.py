"""Simulate a rolling update, a lost zone and a cut of all connections, for fleets of many sizes.

usage: python -m bench.simulation    writes bench/results/simulation.json, .md and .png

The clients are simulated; the capacity of a replica is measured, and read from bench/results.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from bench import machine
from bench.__main__ import RESULTS
from bench.crowd import Crowd, CrowdOutcome, Fleet
from bench.report import number, table
from bench.targets import JSON_VALUES

SIZES = ((10_000, 3), (100_000, 9), (100_000, 3), (1_000_000, 99), (1_000_000, 24))
SPREADS_S = (1.0, 2.0, 5.0, 10.0, 20.0)
LIMITS = (0, 1000, 2000, 3000)
DENSITIES = (5_000, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000)
ZONES = 3
LATE_S = 5.0
WIDE_WINDOW_S = 5.0

EVENTS = "What happens, with the defaults"
SPREADS = "Rolling update: shutdown.spread_s"
LIMITED = "limits.max_handshakes_per_s, 1,000,000 clients on 24 replicas"
OTHERS = "What else counts in a rolling update"
CROWDED = "How many clients a replica may have, three replicas"


@dataclass(frozen=True, slots=True)
class Rates:
    """The measured capacity of one replica per second.

    Attributes:
        plain, checked: handshakes, without and with tokens and limits.
        refusals: answers with 503.
    """

    plain: float
    checked: float
    refusals: float


@dataclass(frozen=True, slots=True)
class Case:
    """An event that a fleet is subject to."""

    table: str
    event: str
    fleet: Fleet
    happen: Callable[[Crowd], CrowdOutcome]


@dataclass(frozen=True, slots=True)
class Result:
    """A case and its outcome."""

    case: Case
    outcome: CrowdOutcome
    seconds: float  # of the simulation


def measured() -> Rates:
    """Read the measured rates."""
    loads = json.loads((RESULTS / "latest.json").read_text())["measurements"]
    connection = json.loads((RESULTS / "connections.json").read_text())

    def handshakes(server: str) -> float:
        found = [each for each in loads if (each["load"], each["server"]) == ("handshakes", server)]
        return float(median(each[JSON_VALUES]["handshakes_per_s"] for each in found))

    refusals = 1 / connection["ws"]["refusal_cpu_s"]
    return Rates(handshakes("relay"), handshakes("relay_checks"), refusals)


def updated(**how: Any) -> Callable[[Crowd], CrowdOutcome]:
    """Replace every replica."""
    return lambda crowd: crowd.update(**how)


def zone_lost(fleet: Fleet) -> Callable[[Crowd], CrowdOutcome]:
    """Lose a third of the replicas, with their clients."""
    lost = fleet.replicas // ZONES
    return lambda crowd: crowd.lose(gone=lost, cut=lost)


def all_cut(fleet: Fleet) -> Callable[[Crowd], CrowdOutcome]:
    """Cut all connections, as the restart of a balancer does."""
    return lambda crowd: crowd.lose(gone=0, cut=fleet.replicas)


def cases(rates: Rates) -> Iterator[Case]:
    """Yield all cases."""
    fleets = [Fleet(*size, rates.checked, rates.refusals) for size in SIZES]
    small, medium, _, _, big = fleets
    for fleet in fleets:
        at_once = -(-fleet.replicas // 4)
        yield Case(EVENTS, "rolling update, one at a time", fleet, updated())
        if at_once > 1:
            yield Case(EVENTS, "rolling update, a quarter at once", fleet, updated(at_once=at_once))
        yield Case(EVENTS, "a zone lost", fleet, zone_lost(fleet))
        yield Case(EVENTS, "all clients cut off", fleet, all_cut(fleet))
    for fleet in fleets[1:]:
        for spread_s in SPREADS_S:
            event = f"spread_s {spread_s:g}"
            yield Case(SPREADS, event, replace(fleet, spread_s=spread_s), updated())
    for limit in LIMITS:
        fleet = replace(big, max_handshakes_per_s=limit)
        text = f"limit {limit:,}" if limit else "no limit"
        yield Case(LIMITED, f"a zone lost, {text}", fleet, zone_lost(fleet))
        yield Case(LIMITED, f"all clients cut off, {text}", fleet, all_cut(fleet))
    later = replace(big, retry_window_s=WIDE_WINDOW_S)
    emptiest = replace(big, to_emptiest=True)
    patient = replace(emptiest, spread_s=20.0)
    late = updated(unaware_s=LATE_S)
    yield Case(OTHERS, "as it is", big, updated())
    yield Case(OTHERS, "the balancer reacts 5 s late", small, late)
    yield Case(OTHERS, "the balancer reacts 5 s late", big, late)
    yield Case(OTHERS, "retry_ms up to 5,000", later, updated())
    yield Case(OTHERS, "both", later, late)
    yield Case(
        OTHERS, "the balancer picks the emptiest", replace(medium, to_emptiest=True), updated()
    )
    yield Case(OTHERS, "the balancer picks the emptiest", emptiest, updated())
    yield Case(OTHERS, "the same, spread_s 20, one in 30 s", patient, updated(pace_s=30.0))
    for rate in (rates.checked, rates.plain):
        for density in DENSITIES:
            fleet = Fleet(ZONES * density, ZONES, rate, rates.refusals)
            text = f"{rate:,.0f} handshakes/s"
            yield Case(CROWDED, f"a zone lost, {text}", fleet, zone_lost(fleet))
            yield Case(CROWDED, f"all clients cut off, {text}", fleet, all_cut(fleet))


def _run(case: Case) -> Result:
    started = time.perf_counter()
    outcome = case.happen(Crowd(case.fleet))
    seconds = time.perf_counter() - started
    fleet = case.fleet
    print(f"{fleet.clients:>9,} on {fleet.replicas:>2}  {case.event}: {seconds:.1f} s", flush=True)
    return Result(case, outcome, seconds)


HEADING = [
    "",
    "clients",
    "replicas",
    "asked of one at most, /s",
    "of what it can do",
    "longest queue, s",
    "refused",
    "given up",
    "away p50, s",
    "p99",
    "max",
    "returns per client",
    "clients of a replica after",
    "",
]


def _row(result: Result) -> list[str]:
    fleet, found = result.case.fleet, result.outcome
    return [
        result.case.event,
        f"{fleet.clients:,}",
        str(fleet.replicas),
        f"{found.peak_of_one_per_s:,}",
        f"{found.peak_of_one_per_s / fleet.handshakes_per_s:.0%}",
        number(found.longest_queue_s),
        f"{found.refused / found.attempts:.0%}",
        f"{found.given_up / found.attempts:.0%}",
        *map(number, found.away_s),
        number(found.returns / fleet.clients),
        f"{min(found.loads):,} to {max(found.loads):,}",
        "",
    ]


def _page(facts: dict[str, Any], rates: Rates, results: list[Result]) -> str:
    lines = [
        "# What `make simulation` found",
        "",
        f"{facts['when']}, commit {facts['commit']}. How: [bench/README.md](../README.md).",
        f"One replica can do {rates.checked:,.0f} handshakes a second with tokens and limits,",
        f"{rates.plain:,.0f} without ([latest.md](latest.md)), or {rates.refusals:,.0f} refusals",
        "([connections.md](connections.md)). The first of these, unless stated otherwise.",
    ]
    for title in dict.fromkeys(each.case.table for each in results):
        rows = [_row(each) for each in results if each.case.table == title]
        lines += ["", f"## {title}", "", *table([HEADING, *rows])]
    return "\n".join([*lines, ""])


def _record(result: Result) -> str:
    """Return a line of JSON, without the values of each second of a long update."""
    outcome = asdict(result.outcome)
    if len(outcome["asked"]) > 60:
        outcome |= {"asked": None, "let_in": None, "away": None}
    case = {"table": result.case.table, "event": result.case.event}
    fleet = asdict(result.case.fleet)
    return json.dumps({**case, "fleet": fleet, **outcome, "seconds": round(result.seconds, 1)})


def main() -> int:
    """Simulate, print, write and draw."""
    facts, rates = machine.facts(), measured()
    results = [_run(case) for case in cases(rates)]
    page = _page(facts, rates, results)
    head = json.dumps({**facts, "rates": asdict(rates)})[:-1]
    lines = ",\n".join(map(_record, results))
    print(f"\n{page}")
    (RESULTS / "simulation.json").write_text(f'{head}, "cases": [\n{lines}\n]}}\n')
    (RESULTS / "simulation.md").write_text(page)
    try:
        from bench.simulation_plot import draw
    except ImportError as error:
        print(f"no plot: {error}")
        return 0
    draw(RESULTS / "simulation.png", results, rates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
