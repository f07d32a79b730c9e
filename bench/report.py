"""The result as text: a table for people, JSON for machines. Measures nothing."""

from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from bench.loads import Figure, Load
from bench.servers import Server
from bench.targets import DISTURBED, FAULTS, Measurement, TargetVerdict, calm


def draw(plot: str, path: Path, facts: dict[str, Any], measurements: list[Measurement]) -> None:
    """Draw the result with a module of `bench`; print where the machine lacks a library for it."""
    try:
        module = import_module(f"bench.{plot}")
    except ImportError as error:
        print(f"no plot: {error}")
        return
    module.draw(path, facts, measurements)
    print(f"drawn: {path}")


def number(value: float | None) -> str:
    """Print three significant digits, as a person would."""
    if value is None:
        return "-"
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _of(measurements: list[Measurement], load: Load, server: Server) -> list[Measurement]:
    return [each for each in measurements if (each.load, each.server) == (load.name, server.name)]


def middle(measurements: list[Measurement], load: Load, server: Server, figure: Figure) -> Any:
    """Return the median over the rounds; None without a value."""
    found = [figure.value(each.values) for each in calm(measurements, load, server.name)]
    there = [value for value in found if value is not None]
    return median(there) if there else None


def _heading(figure: Figure) -> str:
    return f"{figure.title}, {figure.unit}" if figure.unit else figure.title


def _notes(load: Load, found: list[Measurement]) -> str:
    """Return the faults, or "none lost" for a load whose messages are checked."""
    failed = [f"failed: {each.error}" for each in found if each.error]
    counts = [(title, sum(each.values.get(name, 0) for each in found)) for name, title in FAULTS]
    faults = [f"{count:,} {title}" for title, count in counts if count]
    if load.messages and not failed and not faults:
        faults = ["none lost"]
    disturbed = sum(each.disturbed > DISTURBED for each in found)
    return ", ".join(failed + faults + ([f"disturbed: {disturbed}"] if disturbed else []))


def _row(
    measurements: list[Measurement], load: Load, server: Server, absent: dict[str, str]
) -> list[str]:
    found = _of(measurements, load, server)
    values = (load.main, *load.others)
    if not found:
        why = absent.get(server.name)
        return [server.title, *("-" for _ in values), f"absent: {why}" if why else "not measured"]
    cells = [number(middle(measurements, load, server, figure)) for figure in values]
    return [server.title, *cells, _notes(load, found)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(rows: list[list[str]]) -> list[str]:
    """Lay out a Markdown table that is readable as plain text; numbers are aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = [
        _line(
            cell.rjust(width) if 0 < i < last else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = _line("-" * (w - 1) + ":" if 0 < i < last else "-" * w for i, w in enumerate(widths))
    return [lines[0], rule, *lines[1:]]


def targets_table(verdicts: list[TargetVerdict]) -> list[str]:
    """Return the table of targets, and whether each is met."""
    rows = [["target", "measured", "rounds", ""]]
    for each in verdicts:
        rounds = ", ".join(number(value) for value in each.rounds)
        measured = f"{number(each.measured)} {each.unit}".strip()
        rows.append([each.text, measured, rounds, "met" if each.met else "MISSED"])
    return table(rows)


def origin(facts: dict[str, Any]) -> list[str]:
    """Return the lines with the time, the commit and the machine of a result."""
    machine = facts["machine"]
    commit = (facts["commit"] or "not committed")[:12] + (" (dirty)" if facts["dirty"] else "")
    versions = [f"{name} {text}" for name, text in facts["versions"].items() if text]
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return [
        f"{facts['when']}, commit {commit}",
        f"{hardware}, kernel {machine['kernel']}",
        ", ".join(versions),
    ]


def markdown(
    facts: dict[str, Any],
    measurements: list[Measurement],
    verdicts: list[TargetVerdict],
    loads: Iterable[Load],
    servers: Iterable[Server],
    absent: dict[str, str],
) -> str:
    """Write the whole result as one page."""
    lines = ["# What `make bench` measured", ""]
    lines += [f"{line}  " for line in origin(facts)]
    lines += ["", "One core for the server, one for the clients; medians over the rounds."]
    lines += ["How, and what each server is: [bench/README.md](../README.md).", ""]
    if verdicts:
        lines += ["## Targets", "", *targets_table(verdicts), ""]
    for load in loads:
        heading = [_heading(figure) for figure in (load.main, *load.others)]
        rows = [["server", *heading, "notes"]]
        rows += [
            _row(measurements, load, server, absent)
            for server in servers
            if server.name in load.servers
        ]
        lines += [f"## {load.name}: {load.title}", "", *table(rows), ""]
    return "\n".join(lines)


def document(
    facts: dict[str, Any],
    measurements: list[Measurement],
    verdicts: list[TargetVerdict],
    absent: dict[str, str],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the whole result, every round included, for JSON."""
    return {
        **facts,
        "options": options,
        "absent": absent,
        "targets": [asdict(each) for each in verdicts],
        "measurements": [each.to_json() for each in measurements],
    }
