"""Compare the relay of this checkout with the same one at earlier commits: is a load slower now?

All versions run at the same time and are measured in turns, so that what slows the machine down
slows down each of them; a ratio is of two turns of the same round. An earlier commit runs with the
libraries that are installed now.

    python -m bench.compare COMMIT [COMMIT ...]    writes bench/results/compare.json and .md
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine, prepare
from bench.__main__ import RESULTS, allow_files, print_result
from bench.loads import Generator, Load
from bench.report import number, origin, table
from bench.rounds import Rounds
from bench.servers import Server, named_server
from bench.targets import Measurement, by_round, calm, load_named

NOW = "now"
COMPARED = (
    # load, the relay's variants, rounds, scale of its durations
    ("checks", ("relay", "relay_checks"), 40, 1.0),
    ("checks_single", ("relay", "relay_checks"), 40, 1.0),
    ("compression", ("relay_deflate",), 30, 0.5),
    ("steady", ("relay",), 20, 0.5),
    ("handshakes", ("relay", "relay_checks"), 12, 1.0),
    ("stall", ("relay",), 6, 0.5),
    ("idle", ("relay",), 1, 1.0),
    ("tls_idle", ("relay_tls",), 1, 1.0),
    ("tls_single", ("relay_tls",), 20, 0.5),
    ("tls_queue", ("relay_tls",), 20, 0.5),
    ("tls_handshakes", ("relay_tls", "relay_tls_checks"), 6, 1.0),
    ("tls_resumed", ("relay_tls",), 6, 1.0),
    ("tls_storm", ("relay_tls_checks",), 2, 1.0),
)
CONFIDENCE = 0.95


def _unpack(commit: str, folder: Path) -> Path:
    """Write the files of a commit into a folder of its name; return it."""
    command = ("git", "archive", commit)
    packed = subprocess.run(command, cwd=prepare.HERE.parent, stdout=subprocess.PIPE, check=True)
    folder /= commit
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def _at(commit: str, folder: Path, relay: Server) -> Server:
    """Return the relay of another commit; the package has had two names."""
    source = folder / "service"
    package = "websocket_relay" if (source / "websocket_relay").is_dir() else "service"
    path = source if package == "websocket_relay" else folder
    return replace(
        relay,
        name=f"{relay.name}@{commit}",
        title=f"{relay.name}@{commit}",
        command=(sys.executable, "-m", package, *relay.command[3:]),
        environment=(*relay.environment, ("PYTHONPATH", str(path))),
        reference=True,
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the bounds between which the median lies, by order statistics; for few all values."""
    ordered, count = sorted(values), len(values)
    outside, index = 0.0, 0
    while True:
        outside += 2 * math.comb(count, index) / 2**count
        if outside > 1 - CONFIDENCE or index >= count // 2:
            break
        index += 1
    index = max(0, index - 1)
    return ordered[index], ordered[count - 1 - index]


def _compared(load: Load, variant: str, commit: str, all_of: list[Measurement]) -> dict[str, Any]:
    """Return the figure of now divided by that of a commit, by round; over 1 is better."""
    now, before = (
        by_round(calm(all_of, load, f"{variant}@{version}"), load) for version in (NOW, commit)
    )
    better = 1 if load.main.more_is_better else -1
    rounds = [(now[n] / before[n]) ** better for n in sorted(now.keys() & before.keys())]
    return {
        "load": load.name,
        "relay": variant,
        "figure": f"{load.main.title}, {load.main.unit}".removesuffix(", "),
        "commit": commit,
        "before": median(before.values()),
        "now": median(now.values()),
        "ratio": median(rounds),
        "interval": _interval(rounds),
        "rounds": rounds,
    }


def _page(facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    rows = [["load", "relay", "figure", "commit", "before", "now", "ratio", "95 %", "rounds"]]
    for each in results:
        low, high = each["interval"]
        cells = (each["load"], each["relay"], each["figure"], each["commit"])
        values = (number(each["before"]), number(each["now"]), f"{each['ratio']:.3f}")
        rows.append([*cells, *values, f"{low:.3f} to {high:.3f}", str(len(each["rounds"]))])
    lines = ["# The relay beside itself at earlier commits", ""]
    lines += [*(f"{line}  " for line in origin(facts)), ""]
    lines += [
        "A ratio over 1 is better than before. It is the median of the rounds; the median lies"
    ]
    lines += ["between the bounds beside it with a probability of 95 %.", "", *table(rows), ""]
    return "\n".join(lines)


def _measure(
    folders: dict[str, Path], name: str, variants: Sequence[str], rounds: int, scale: float
) -> list[dict[str, Any]]:
    """Measure a load with all versions of all variants in turns."""
    servers = []
    for variant in variants:
        relay, title = named_server(variant), f"{variant}@{NOW}"
        relay.prepare()
        servers.append(replace(relay, name=title, title=title, reference=True))
        servers += [_at(commit, folder, relay) for commit, folder in folders.items()]
    load = replace(load_named(name), servers=tuple(server.name for server in servers))
    found = Rounds(Generator(1, 0, scale), rounds, print_result).all([load], servers)
    return [_compared(load, variant, each, found) for variant in variants for each in folders]


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare")
    parser.add_argument("commits", nargs="+", metavar="COMMIT")
    parser.add_argument("--loads", metavar="A,B", help=", ".join(each[0] for each in COMPARED))
    options = parser.parse_args()
    os.sched_setaffinity(0, {1})
    allow_files()
    prepare.loadgen()
    facts, results = machine.facts(), []
    with tempfile.TemporaryDirectory() as folder:
        folders = {commit: _unpack(commit, Path(folder)) for commit in options.commits}
        for load in COMPARED:
            if not options.loads or load[0] in options.loads.split(","):
                results += _measure(folders, *load)
    page = _page(facts, results)
    print(f"\n{page}")
    document = {**facts, "results": results}
    (RESULTS / "compare.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "compare.md").write_text(page)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a timeout stops the servers, too
    sys.exit(main())
