"""The command: break relays and their broker repeatedly, and check what clients observe.

usage: python -m bench.chaos [--runs N] [--seconds S] [--broker redis|nats|both] [--seed N] [-v]
"""

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from bench import machine, prepare
from bench.chaos.faults import plan_of
from bench.chaos.scenario import Run, RunOutcome
from bench.report import origin, table
from bench.servers import FailedError

RESULTS = prepare.HERE / "results"
BROKERS = {"redis": ("redis",), "nats": ("nats",), "both": ("redis", "nats")}
FULL_RUNS, FULL_SECONDS = 30, 45.0
NOTES = """\
`joined` and `left` are notices to watchers. `resumed in time`: returns of clients with a session
within the grace, none of which a watcher noticed; `returned late`: after it, or after the client's
own close. `positions compared`: messages at which watchers of two relays or more had the roster;
`not settled`: rosters left out, of a relay that was not ready, or had just lost entries. `answers`:
to those who asked. `at rest`: clients listed at the end, in so many answers.""".splitlines()
SHOWN = 3
"""Violations of a kind that are shown for a run; all of them are in its directory."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos",
        description="Break relays, their broker and connections at random. See bench/README.md.",
        epilog="Only a full run writes to bench/results; any other to bench/build/results.",
    )
    parser.add_argument("--runs", type=int, default=FULL_RUNS, metavar="N")
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help="of each run")
    parser.add_argument("--broker", choices=BROKERS, default="both")
    parser.add_argument("--seed", type=int, help="of the first run; later runs count up from it")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="run relays from that source tree")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write the result")
    parser.add_argument("--keep", action="store_true", help="keep the logs of passed runs, too")
    parser.add_argument("-v", "--verbose", action="store_true", help="show each event")
    return parser


def _run(seed: int, broker: str, options: argparse.Namespace) -> RunOutcome:
    plan = plan_of(seed, broker, options.seconds)
    kept = prepare.BUILD / "chaos"
    kept.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{broker}-{seed}-", dir=kept))
    show_event = print if options.verbose else None

    async def run() -> RunOutcome:
        return await Run(plan, directory, options.tree, show_event).outcome()

    outcome = uvloop.run(run())
    if outcome.passed and not options.keep:
        shutil.rmtree(directory)
    return outcome


def _line(outcome: RunOutcome) -> str:
    plan, stats, presence = outcome.plan, outcome.stats, outcome.verdict.presence
    answers = ", ".join(f"{count} {status}" for status, count in sorted(stats["answers"].items()))
    how = f"{plan.broker} {plan.persistence}{' deletions' if plan.deletes else ''}"
    reports = f"{stats['gaps']} gaps, {stats['not_recovered']} not recovered"
    return (
        f"{'PASS' if outcome.passed else 'FAIL'} seed {plan.seed} {how}, {plan.relays} relays,"
        f" {len(plan.faults)} faults: {stats['published']} published, {answers}, {reports},"
        f" {outcome.verdict.false_alarms} false alarms, {presence.resumed_in_time} resumed in time,"
        f" rosters compared at {presence.positions} messages"
    )


def _show(outcome: RunOutcome) -> None:
    print(_line(outcome), flush=True)
    shown: Counter[str] = Counter()
    for each in outcome.verdict.violations:
        shown[each.kind.name] += 1
        if shown[each.kind.name] <= SHOWN:
            print(f"  {each.kind.value}: {each.at_s:.3f} {each.text}")
    if not outcome.passed:
        plan = outcome.plan
        again = f"--runs 1 --seed {plan.seed} --broker {plan.broker} --seconds {plan.seconds:g}"
        print(f'  again: make chaos BENCH_ARGS="{again}"\n  logs: {outcome.directory}', flush=True)


def _page(facts: dict[str, Any], outcomes: Sequence[RunOutcome]) -> str:
    rows = [["seed", "broker", "faults", "published", "202", "503", "504", "broken off"]]
    rows[0] += ["resumed", "not recovered", "gaps", "false alarms", "grown, MiB", "violations"]
    for each in outcomes:
        plan, stats = each.plan, each.stats
        counts = each.verdict.counts()
        broker = f"{plan.broker} {plan.persistence}{', deletions' if plan.deletes else ''}"
        cells = [str(plan.seed), broker, str(len(plan.faults)), str(stats["published"])]
        cells += [str(stats["answers"].get(status, 0)) for status in ("202", "503", "504", "0")]
        cells += [str(stats["recovered"] + stats["not_recovered"])]
        cells += [str(stats["not_recovered"]), str(stats["gaps"])]
        cells += [str(each.verdict.false_alarms), f"{max(stats['grown_mib'], default=0):.0f}"]
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        rows.append([*cells, found or "none"])
    passed = sum(each.passed for each in outcomes)
    lines = ["# What `make chaos` found", "", *(f"{line}  " for line in origin(facts)), ""]
    lines += [f"{passed} of {len(outcomes)} runs passed. How: [bench/README.md](../README.md)."]
    return "\n".join([*lines, "", *table(rows), "", "## Presence", "", *_presence(outcomes), ""])


def _presence(outcomes: Sequence[RunOutcome]) -> list[str]:
    """Return a table of how much of presence was exercised and judged."""
    rows = [["seed", "broker", "relays", "grace, s", "joined", "left", "resumed in time"]]
    rows[0] += ["returned late", "positions compared", "not settled", "answers", "at rest"]
    for each in outcomes:
        plan, counts = each.plan, each.verdict.presence
        cells = [str(plan.seed), plan.broker, str(plan.relays), f"{plan.grace_s:g}"]
        cells += [str(counts.joined), str(counts.left), str(counts.resumed_in_time)]
        cells += [str(counts.returned_late), str(counts.positions), str(counts.unsettled)]
        rests = each.record.rosters_at_rest
        at_rest = f"{sum(len(rest.answer.clients) for rest in rests)} in {len(rests)}"
        rows.append([*cells, str(counts.answers), at_rest])
    return [*table(rows), "", *NOTES]


def _document(facts: dict[str, Any], outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    return {
        **facts,
        "runs": [
            {
                **asdict(each.plan),
                **each.stats,
                "passed": each.passed,
                "false_alarms": each.verdict.false_alarms,
                "covered_holes": each.verdict.covered_holes,
                "presence": asdict(each.verdict.presence),
                "violations": [
                    {"kind": one.kind.name.lower(), "text": one.text, "at_s": one.at_s}
                    for one in each.verdict.violations
                ],
            }
            for each in outcomes
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; exit status 1: a promise was not kept; 2: a broker is not installed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    print(f"seed {seed}", flush=True)
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # an unavailable broker is expected
    facts = machine.facts()
    brokers = BROKERS[options.broker]
    outcomes = []
    for number in range(options.runs):
        try:
            outcomes.append(_run(seed + number, brokers[number % len(brokers)], options))
        except FailedError as error:
            parser.exit(2, f"{error}\n")
        _show(outcomes[-1])
    is_full = options.runs >= FULL_RUNS and options.seconds >= FULL_SECONDS
    folder = options.output or (RESULTS if is_full else prepare.BUILD / "results")
    folder.mkdir(parents=True, exist_ok=True)
    page = _page(facts, outcomes)
    (folder / "chaos.md").write_text(page)
    (folder / "chaos.json").write_text(json.dumps(_document(facts, outcomes), indent=1) + "\n")
    print(f"\n{page}\nwritten: {folder}/chaos.json, {folder}/chaos.md")
    return 0 if all(each.passed for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
