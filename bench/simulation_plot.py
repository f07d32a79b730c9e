# mypy: disable-error-code="import-not-found"
"""The result of the simulation as a picture. Simulates nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.plot import BOUND, GRID, INK, OURS, SOFT, THEIRS
from bench.simulation import CROWDED, EVENTS, LIMITED, OTHERS, SIZES, SPREADS, Rates, Result

WARM = "#d08700"
DEEP = "#33508a"
SHOWN_S = 20  # of a lost zone


def _axes(axes: Any, title: str, about: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=27)
    axes.annotate(
        about,
        (0, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10,
        color=SOFT,
    )
    axes.set_xlabel(x, fontsize=10, color=SOFT)
    axes.set_ylabel(y, fontsize=10, color=SOFT)
    axes.grid(True, axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(THEIRS)


def _line(axes: Any, x: Sequence[float], y: Sequence[float], colour: str, **look: Any) -> None:
    axes.plot(x, y, color=colour, linewidth=2.2, solid_capstyle="round", **look)


def _note(axes: Any, text: str, at: tuple[float, float], colour: str, **where: Any) -> None:
    axes.annotate(
        text,
        at,
        where.pop("by", (0, 5)),
        textcoords="offset points",
        fontsize=9.5,
        color=colour,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        **where,
    )


def _find(results: list[Result], table: str, event: str = "") -> list[Result]:
    return [each for each in results if each.case.table == table and event in each.case.event]


def _zone(axes: Any, results: list[Result]) -> None:
    wide, dense = (
        each
        for each in _find(results, EVENTS, "a zone lost")
        if each.case.fleet.clients == 1_000_000
    )
    (limited,) = _find(results, LIMITED, "a zone lost, limit 2,000")
    for result, colour, text in (
        (wide, OURS, "99 replicas"),
        (dense, DEEP, "24 replicas"),
        (limited, WARM, "24 replicas, max_handshakes_per_s 2,000"),
    ):
        fleet, away = result.case.fleet, result.outcome.away
        lost = fleet.replicas // 3 * fleet.clients / fleet.replicas
        shown = [lost, *away, *[0] * SHOWN_S][: SHOWN_S + 1]
        _line(axes, range(SHOWN_S + 1), shown, colour, label=text)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1000:,.0f}k" if y else "0"))
    axes.set_ylim(0, 400_000)
    axes.set_xlim(0, SHOWN_S)
    axes.set_xticks(range(0, SHOWN_S + 1, 5))
    axes.axvspan(0, 10, color=GRID, alpha=0.5, zorder=0, linewidth=0)
    text = "the balancer does not know yet"
    axes.annotate(text, (0.3, 380_000), fontsize=9.5, color=SOFT)
    axes.legend(frameon=False, fontsize=10, loc="center right", labelcolor="linecolor")


def _spread(axes: Any, results: list[Result], rates: Rates) -> None:
    colours = {
        (100_000, 3): BOUND,
        (100_000, 9): WARM,
        (1_000_000, 24): DEEP,
        (1_000_000, 99): OURS,
    }
    for (clients, replicas), colour in colours.items():
        found = [
            each
            for each in _find(results, SPREADS)
            if (each.case.fleet.clients, each.case.fleet.replicas) == (clients, replicas)
        ]
        x = [each.case.fleet.spread_s for each in found]
        y = [each.outcome.peak_of_one_per_s for each in found]
        _line(axes, x, y, colour, marker="o", markersize=6)
        text = f"{clients:,} on {replicas}"
        _note(axes, text, (x[-1], y[-1]), colour, by=(10, 0), va="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5\nthe default", "10", "20"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0.93, 46)
    axes.set_ylim(40, 20_000)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.axhline(rates.checked, color=BOUND, linewidth=1.1, linestyle=(0, (4, 3)))
    text = f"capacity of a replica: {rates.checked:,.0f}"
    _note(axes, text, (45, rates.checked), BOUND, ha="right")


def _crowded(axes: Any, results: list[Result], rates: Rates) -> None:
    looks = (
        ("all clients cut off", rates.checked, DEEP, "-", "all cut off, tokens and limits"),
        ("all clients cut off", rates.plain, DEEP, (0, (1, 1.5)), "all cut off, neither"),
        ("a zone lost", rates.checked, OURS, "-", "a zone lost, tokens and limits"),
        ("a zone lost", rates.plain, OURS, (0, (1, 1.5)), "a zone lost, neither"),
    )
    for event, rate, colour, style, text in looks:
        found = [
            each
            for each in _find(results, CROWDED, event)
            if each.case.fleet.handshakes_per_s == rate
        ]
        x = [each.case.fleet.clients / each.case.fleet.replicas / 1000 for each in found]
        y = [each.outcome.away_s[1] for each in found]
        _line(axes, x, y, colour, linestyle=style, marker="o", markersize=5, label=text)
    most = rates.checked * 10 / 1000
    axes.axvline(most, color=BOUND, linewidth=1.1, linestyle=(0, (4, 3)))
    text = "handshake_timeout_s (10)\ntimes handshakes a second"
    _note(axes, text, (most, 0), BOUND, by=(-5, 8), ha="right")
    axes.set_xlim(0, 61)
    axes.set_ylim(0, 20)
    axes.set_yticks(range(0, 21, 5))
    axes.legend(frameon=False, fontsize=10, loc="upper left", labelcolor="linecolor")


def _loads(axes: Any, results: list[Result]) -> None:
    for event, colour, text in (
        ("as it is", WARM, "any replica, at random"),
        ("the balancer picks the emptiest", OURS, "the one with the fewest clients"),
    ):
        result = _find(results, OTHERS, event)[-1]  # the last is the largest fleet
        loads = [load / 1000 for load in result.outcome.loads]
        offset = -0.2 if colour == WARM else 0.2
        at = [number + offset for number in range(1, len(loads) + 1)]
        axes.bar(at, loads, width=0.38, color=colour, label=text)
    axes.set_xlim(0.3, SIZES[-1][1] + 0.7)
    axes.set_ylim(0, 82)
    axes.set_xticks([1, 6, 12, 18, 24])
    axes.legend(frameon=False, fontsize=10, loc="upper right", labelcolor="linecolor")


def draw(path: Path, results: list[Result], rates: Rates) -> None:
    """Write the picture as PNG."""
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": INK}):
        figure, ((zone, spread), (crowded, loads)) = plt.subplots(2, 2, figsize=(15, 11.2), dpi=110)
        _zone(zone, results)
        _spread(spread, results, rates)
        _crowded(crowded, results, rates)
        _loads(loads, results)
        _axes(
            zone,
            "A lost zone: clients that are still away",
            "1,000,000 clients, a third of the replicas gone for good",
            "seconds after the loss",
            "clients away",
        )
        _axes(
            spread,
            "A rolling update: the busiest second of one replica",
            "each line: clients on replicas; one replica is replaced after another",
            "shutdown.spread_s",
            "handshakes requested in a second",
        )
        _axes(
            crowded,
            "How many clients a replica may have",
            "three replicas; no client has a retry_ms, all reconnect within half a second",
            "thousand clients a replica",
            "seconds until 99 % are connected again",
        )
        _axes(
            loads,
            "A rolling update: where the clients are afterwards",
            "1,000,000 clients on 24 replicas; the balancer chooses …",
            "replicas, in the order in which they were replaced",
            "thousand clients",
        )
        figure.subplots_adjust(
            left=0.065, right=0.985, top=0.845, bottom=0.085, wspace=0.17, hspace=0.48
        )
        figure.text(0.012, 0.962, "When clients reconnect", fontsize=20, weight="bold")
        about = (
            "Every client is simulated, with the example page's backoff. "
            f"One replica does {rates.checked:,.0f} handshakes a second with tokens and limits, "
            f"{rates.plain:,.0f} without: measured."
        )
        figure.text(0.012, 0.935, about, fontsize=11, color=SOFT)
        source = "All values: bench/results/simulation.md. How: bench/README.md."
        figure.text(0.012, 0.014, source, fontsize=9.5, color=SOFT)
        figure.savefig(path, facecolor="white")
        plt.close(figure)
