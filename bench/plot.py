# mypy: disable-error-code="import-not-found"
"""The result as a picture: a panel for each load, a line for each server. Measures nothing.

usage: python -m bench.plot RESULT.json PICTURE.png    draws a stored result
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.loads import LOADS, Figure, Load
from bench.report import middle, number
from bench.servers import SERVERS
from bench.targets import RELAYS, TARGETS, Measurement

INK = "#1f2933"
SOFT = "#64707d"
GRID = "#e6eaee"
OURS = "#0b7a75"
THEIRS = "#aab6c2"
FLOOR = "#d5dce3"
BOUND = "#c2410c"
FEWEST_ROWS = 5  # with fewer servers the space below stays empty: bars keep their height
LABEL_SPACE = 1.25  # of the axis, as a factor of the longest bar

Medians = dict[str, float]


def _medians(measurements: list[Measurement], load: Load, figure: Figure) -> Medians:
    found = {server: middle(measurements, load, server, figure) for server in SERVERS}
    return {server.name: value for server, value in found.items() if value is not None}


def _bound(load: Load, shown: Medians) -> float | None:
    """Return where the strictest of a load's targets is on its axis."""
    edges = [
        target.bound * (shown[target.rival] if target.rival else 1.0)
        for target in TARGETS
        if target.load == load.name and (target.rival is None or target.rival in shown)
    ]
    if not edges:
        return None
    return max(edges) if load.main.more_is_better else min(edges)


def _colour(name: str) -> str:
    return OURS if name in RELAYS else FLOOR if name == "floor" else THEIRS


def _label(axes: Any, name: str, x: float, row: int, unit: str, value: float) -> None:
    axes.annotate(
        f"{number(value)} {unit}".strip(),
        (x, row),
        (6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5,
        zorder=5,
        color=OURS if name in RELAYS else INK,
        fontweight="bold" if name in RELAYS else "normal",
        bbox={"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"},
    )


def _bars(axes: Any, load: Load, shown: Medians, bound: float | None) -> None:
    """Draw lengths from zero: they may be compared by eye."""
    for row, (name, value) in enumerate(shown.items()):
        axes.barh(row, value, height=0.62, color=_colour(name), zorder=2)
        _label(axes, name, value, row, load.main.unit, value)
    axes.set_xlim(0, max(*shown.values(), bound or 0) * LABEL_SPACE)
    axes.set_xticks([])


def _ranges(axes: Any, load: Load, shown: Medians, ends: tuple[Medians, Medians]) -> None:
    """Draw from the median to the worst with a dot at the p99, on a logarithmic axis."""
    low, high = ends
    for row, (name, value) in enumerate(shown.items()):
        colour = OURS if name in RELAYS else "#8a97a4"
        axes.plot([low[name], high[name]], [row, row], color=colour, linewidth=2.2, zorder=2)
        axes.plot([low[name], high[name]], [row, row], "|", color=colour, markersize=9, mew=2.2)
        axes.plot(value, row, "o", color=colour, markersize=9, zorder=4)
        _label(axes, name, high[name], row, load.main.unit, value)
    least, most = min(low.values()), max(high.values())
    axes.set_xscale("log")
    axes.set_xlim(least * 0.7, most * (most / least) ** (LABEL_SPACE - 1))
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} {load.main.unit}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.grid(True, color=GRID, linewidth=1)


def _draw_bound(axes: Any, bound: float, more_is_better: bool) -> None:
    axes.axvline(bound, color=BOUND, linewidth=1.1, linestyle=(0, (4, 3)), zorder=3)
    text = "target: at least" if more_is_better else "target: at most"
    axes.annotate(
        text,
        (bound, 1.0),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color=BOUND,
    )


def _heading(axes: Any, load: Load) -> None:
    better = "more is better" if load.main.more_is_better else "less is better"
    if load.spread:
        better += "; from the median to the worst, the dot and the number are the p99"
    heading(axes, load.main.title, load.title, better, left=-124)


def heading(axes: Any, title: str, about: str, better: str, *, left: int) -> None:
    """Write what a panel shows, how, and what is better above it, `left` points from its edge."""
    lines = ((title, 12.5, "bold", INK, 53), (about, 9.5, "normal", SOFT, 37))
    for text, size, weight, colour, above in (*lines, (better, 9.5, "normal", SOFT, 22)):
        axes.annotate(
            text[0].upper() + text[1:],
            (0, 1),
            (left, above),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=size,
            fontweight=weight,
            color=colour,
        )


def _names(axes: Any, names: list[str]) -> None:
    titles = {server.name: server.title for server in SERVERS}
    axes.set_yticks(range(len(names)), [titles[name] for name in names])
    axes.set_ylim(max(len(names), FEWEST_ROWS) - 0.45, -0.55)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(OURS if name in RELAYS else INK)
        label.set_fontweight("bold" if name in RELAYS else "normal")
    axes.tick_params(length=0, which="both", labelsize=9.5, pad=5)
    axes.tick_params(axis="x", labelsize=8.5, labelcolor=SOFT)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(THEIRS)


def _panel(axes: Any, load: Load, measurements: list[Measurement]) -> None:
    shown = _medians(measurements, load, load.main)
    if not shown:
        axes.set_axis_off()
        return
    bound = _bound(load, shown)
    if load.spread:
        low, high = (_medians(measurements, load, figure) for figure in load.spread)
        _ranges(axes, load, shown, (low, high))
    else:
        _bars(axes, load, shown, bound)
    _names(axes, list(shown))
    _heading(axes, load)
    if bound is not None:
        _draw_bound(axes, bound, load.main.more_is_better)


def source(facts: dict[str, Any]) -> str:
    """Return the line with the machine and the commit of a result."""
    machine = facts["machine"]
    commit = (facts["commit"] or "not committed")[:12] + (" with changes" if facts["dirty"] else "")
    return (
        f"{facts['when'][:10]}, commit {commit}.  {machine['cpu']}, {machine['cores']} cores, "
        f"kernel {machine['kernel']}, Python {facts['versions']['python']}.  "
        "What is measured and how: bench/README.md."
    )


COLUMNS = 3


def draw(path: Path, facts: dict[str, Any], measurements: list[Measurement]) -> None:
    """Write the picture as PNG."""
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": INK}):
        rows = -(-len(LOADS) // COLUMNS)
        figure, panels = plt.subplots(rows, COLUMNS, figsize=(18, 4.5 * rows), dpi=110)
        for axes, load in zip(panels.flat, LOADS, strict=False):
            _panel(axes, load, measurements)
        for axes in panels.flat[len(LOADS) :]:
            axes.set_axis_off()
        figure.subplots_adjust(
            left=0.105, right=0.985, top=0.91, bottom=0.045, wspace=0.50, hspace=0.58
        )
        about = "Each server has one core to itself, the clients another. Medians of one run."
        figure.text(0.012, 0.98, "websocket-relay beside other servers", fontsize=20, weight="bold")
        figure.text(0.012, 0.966, about, fontsize=11.5, color=SOFT)
        figure.text(0.012, 0.013, source(facts), fontsize=9.5, color=SOFT)
        figure.savefig(path, facecolor="white")
        plt.close(figure)


def redraw(draw: Callable[[Path, dict[str, Any], list[Measurement]], None]) -> None:
    """Draw a stored result: the command line has its file and that of the picture."""
    result = json.loads(Path(sys.argv[1]).read_text())
    draw(
        Path(sys.argv[2]), result, [Measurement.from_json(each) for each in result["measurements"]]
    )


if __name__ == "__main__":
    redraw(draw)
