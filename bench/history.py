"""Measure what the history adds to the cost of a message, at its bounds and below them.

usage: python -m bench.history [--before COMMIT]    writes bench/results/history.json and .md

With `--before` the history of another commit is measured in the same rounds.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from types import ModuleType
from typing import Any

from websocket_relay.backplane.interface import LogEntry, Position
from websocket_relay.channels import history

from bench import machine
from bench.__main__ import RESULTS
from bench.report import origin, table
from bench.servers import ROOT

PAYLOAD = b"." * 128
MESSAGES = 60_000  # measured, after half as many that fill the history
ROUNDS = 7
CHANNELS = (1, 100, 10_000)
NO_BOUND = 10**12
BOUNDS = {
    "below the bounds": (NO_BOUND, NO_BOUND),
    "at max_messages (10,000)": (10_000, NO_BOUND),
    "at max_bytes (5 MB)": (NO_BOUND, 5_000_000),
}
Nanoseconds = dict[str, list[float]]


def _entries(channels: int) -> list[LogEntry]:
    """Return messages, each in a random channel."""
    chance = random.Random(1)
    names = [f"channel-{number}" for number in range(channels)]
    numbers = range(MESSAGES + MESSAGES // 2)
    return [
        LogEntry(Position(1, number, 0), chance.choice(names), 1, PAYLOAD) for number in numbers
    ]


def _cost_ns(module: ModuleType, entries: Sequence[LogEntry], bounds: tuple[int, int]) -> float:
    """Return the CPU time of one message."""
    messages, size = bounds
    made = module.History(
        max_messages=messages,
        max_bytes=size,
        max_age_s=300.0,
        max_channels=10_000,
        clock=time.monotonic,
    )
    add = made.add
    for entry in entries[: MESSAGES // 2]:
        add(entry)
    measured = entries[MESSAGES // 2 :]
    gc.collect()
    gc.freeze()  # these messages are not the collector's work
    started = time.process_time()
    for entry in measured:
        add(entry)
    return (time.process_time() - started) / MESSAGES * 1e9


def _history_of(commit: str) -> ModuleType:
    """Load the module as it was at a commit."""
    path = f"{commit}:service/websocket_relay/channels/history.py"
    command = ("git", "show", path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    module = ModuleType("history_before")
    sys.modules[module.__name__] = module
    exec(compile(done.stdout, path, "exec"), module.__dict__)
    return module


def measure(modules: dict[str, ModuleType]) -> dict[str, dict[str, Nanoseconds]]:
    """Measure all modules in turns: by bounds, by channels, by module, each round."""
    found: dict[str, dict[str, Nanoseconds]] = {}
    for title, bounds in BOUNDS.items():
        for channels in CHANNELS:
            entries = _entries(channels)
            costs = found.setdefault(title, {})[str(channels)] = {name: [] for name in modules}
            for _ in range(ROUNDS):
                for name, module in modules.items():
                    costs[name].append(_cost_ns(module, entries, bounds))
    return found


def _page(facts: dict[str, Any], found: dict[str, dict[str, Nanoseconds]], before: str) -> str:
    names = [name for name in ("before", "now") if before or name == "now"]
    rows = [["history", "channels", *names]]
    for title, by_channels in found.items():
        for channels, costs in by_channels.items():
            rows.append([title, channels, *(f"{median(costs[name]):,.0f}" for name in names)])
    lines = ["# What the history costs", "", *(f"{line}  " for line in origin(facts))]
    lines += [f"before: commit {before}"] if before else []
    lines += ["", "CPU time of a message of 128 bytes, ns; each is in a channel by chance."]
    return "\n".join([*lines, f"Medians of {ROUNDS} rounds.", "", *table(rows), ""])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.history")
    parser.add_argument("--before", default="", metavar="COMMIT", help="measure its history, too")
    before = parser.parse_args().before
    modules = {"before": _history_of(before)} if before else {}
    facts, found = machine.facts(), measure({**modules, "now": history})
    page = _page(facts, found, before)
    print(page)
    (RESULTS / "history.json").write_text(json.dumps({**facts, "ns": found}, indent=1) + "\n")
    (RESULTS / "history.md").write_text(page)


if __name__ == "__main__":
    main()
