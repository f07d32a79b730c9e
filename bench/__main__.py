"""The command: measures the servers in turns, then prints, writes and draws the results."""

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine, prepare, report
from bench.loads import LOADS, Generator, Load
from bench.rounds import Rounds
from bench.servers import SERVERS, Server
from bench.targets import DISTURBED, Measurement, verdicts

RESULTS = prepare.HERE / "results"
OPEN_FILES = 10_300  # 10,000 clients, earlier ones that are not closed yet, and some more
QUICK_SCALE = 0.5


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


def _parser() -> argparse.ArgumentParser:
    loads = [load.name for load in LOADS]
    servers = [server.name for server in SERVERS]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the relay beside other servers. See bench/README.md.",
        epilog="Only a full run writes to bench/results; any other to bench/build/results.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer servers, shorter: six minutes")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every load")
    parser.add_argument("--loads", type=_names(loads), metavar="A,B", help=", ".join(loads))
    parser.add_argument("--servers", type=_names(servers), metavar="A,B", help=", ".join(servers))
    parser.add_argument("--scale", type=float, help="of durations and rounds (quick: 0.5)")
    parser.add_argument("--server-core", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--client-core", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write the result")
    return parser


def _prepare(servers: list[Server]) -> dict[str, str]:
    """Build everything; return the servers that are unavailable here, and why."""
    absent = {}
    try:
        prepare.python_parts()
    except prepare.AbsentError as error:
        print(f"Python parts: {error}", flush=True)
    for server in servers:
        try:
            server.prepare()
        except prepare.AbsentError as error:
            absent[server.name] = str(error)
            print(f"{server.title} is absent: {error}", flush=True)
    return absent


def print_result(load: Load, server: Server, found: Measurement) -> None:
    value = f"{report.number(load.main.value(found.values))} {load.main.unit}"
    text = f"failed: {found.error}" if found.error else f"{load.main.title}: {value}"
    note = f"  (disturbed: {found.disturbed:.0%})" if found.disturbed > DISTURBED else ""
    print(f"round {found.round}  {load.name:<10}  {server.title:<20}  {text}{note}", flush=True)


def _write(folder: Path, document: dict[str, Any], page: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "latest.md").write_text(page)
    print(f"written: {folder}/latest.json, {folder}/latest.md")


def allow_files() -> None:
    """Raise the limit of open files, which the servers inherit: the default is too low."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < OPEN_FILES:
        print(f"bench: the limit of open files is {most}, some loads need {OPEN_FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536) if most > 0 else 65536, most))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 whether or not the targets were met."""
    options = _parser().parse_args(arguments)
    cores = {options.server_core, options.client_core}
    if len(cores) < 2 or not cores <= os.sched_getaffinity(0):
        print("bench: two different cores are needed, see --help", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, {options.client_core})
    allow_files()
    started_at = time.monotonic()
    loads = [load for load in LOADS if not options.loads or load.name in options.loads]
    servers = [each for each in SERVERS if not options.servers or each.name in options.servers]
    if options.quick and not options.servers:
        servers = [server for server in servers if server.reference]
    scale = options.scale or (QUICK_SCALE if options.quick else 1.0)
    generator = Generator(options.client_core, options.server_core, scale)
    try:
        prepare.loadgen()
    except prepare.AbsentError as error:
        print(f"bench: no load generator: {error}", file=sys.stderr)
        return 1
    absent = _prepare(servers)
    present = [server for server in servers if server.name not in absent]
    facts = machine.facts()
    measurements = Rounds(generator, options.rounds, print_result).all(loads, present)
    judged = verdicts(measurements)
    page = report.markdown(facts, measurements, judged, loads, servers, absent)
    print(f"\n{page}")
    how = {**asdict(generator), "seconds": time.monotonic() - started_at}
    asked = (options.quick, options.loads, options.servers, options.scale, options.rounds)
    full = not any(asked)
    folder = options.output or (RESULTS if full else prepare.BUILD / "results")
    _write(folder, report.document(facts, measurements, judged, absent, how), page)
    report.draw("plot", folder / "latest.png", facts, measurements)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a timeout stops the servers, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # the status that a shell uses; servers and clients are stopped by then
