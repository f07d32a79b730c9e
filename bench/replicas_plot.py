# mypy: disable-error-code="import-not-found"
"""The result of `bench.replicas` as a picture. Measures nothing.

usage: python -m bench.replicas_plot RESULT.json PICTURE.png    draws a stored result
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot as plt

from bench.plot import (
    BOUND,
    FLOOR,
    GRID,
    INK,
    LABEL_SPACE,
    OURS,
    SOFT,
    THEIRS,
    heading,
    redraw,
    source,
)
from bench.replicas_report import (
    BROKERS,
    LEAST_OF_MEMORY,
    LEAST_PER_S,
    MOST_LATENCY,
    P50,
    PER_CPU_S,
    PER_S,
    broker_share,
    floods,
    key,
    middle,
    of_memory,
)
from bench.report import number
from bench.targets import Measurement

COLOURS = {"redis": OURS, "nats": "#c08a1e", "memory": "#64707d"}
PALE = {"redis": "#9fd0cc", "nats": "#ead3a2"}
TITLES = {"redis": "Redis", "nats": "NATS", "memory": "memory://"}

Found = Sequence[Measurement]
Bar = tuple[str, float | None, str, bool]  # name, value, colour, whether it counts


_heading = partial(heading, left=-132)


def _bars(
    axes: Any, groups: Sequence[Sequence[Bar]], unit: str, label_space: float = LABEL_SPACE
) -> list[float]:
    """Draw groups of bars, a gap between two; return where each group ends."""
    row, ends, rows, names = 0.0, [], [], []
    longest = max((bar[1] or 0 for group in groups for bar in group), default=0) or 1
    for group in groups:
        for name, value, colour, counts in group:
            weight = "bold" if counts else "normal"
            axes.barh(row, value or 0, height=0.66, color=colour, zorder=2)
            axes.annotate(
                f"{number(value)} {unit}",
                (value or 0, row),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
                fontweight=weight,
                zorder=5,
                bbox={"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"},
            )
            rows.append(row)
            names.append((name, weight))
            row += 1
        ends.append(row - 0.5)
        row += 0.55
    axes.set_yticks(rows, [name for name, _ in names])
    for label, (_, weight) in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight(weight)
    axes.set_ylim(row - 0.95, -0.6)
    axes.set_xlim(0, longest * label_space)
    axes.set_xticks([])
    _frame(axes)
    return ends


def _frame(axes: Any) -> None:
    axes.tick_params(length=0, which="both", labelsize=9.5, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(THEIRS)


def _bound(axes: Any, value: float, top: float, bottom: float, text: str) -> None:
    """Mark a target across some rows."""
    axes.plot([value] * 2, [top, bottom], color=BOUND, lw=1.2, ls=(0, (4, 3)), zorder=4)
    axes.annotate(
        text,
        (value, top),
        (0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color=BOUND,
        zorder=6,
    )


def _latency(axes: Any, found: Found) -> None:
    ways = {
        "bare": "bare client",
        "log": "across replicas",
        "hops": "WebSockets alone",
        "clients": "client to client",
    }
    groups: list[list[Bar]] = []
    for kind in BROKERS:
        values = {how: middle(found, "latency", f"{kind}: {how}", P50) for how in ways}
        groups.append(
            [
                (
                    f"{TITLES[kind]}: {title}" if how != "hops" else title,
                    values[how],
                    COLOURS[kind] if how in {"log", "clients"} else FLOOR,
                    how == "log",
                )
                for how, title in ways.items()
            ]
        )
    ends = _bars(axes, groups, "µs", 1.3)
    for group, end in zip(groups, ends, strict=True):
        if group[0][1]:
            top = end - len(group)
            _bound(axes, MOST_LATENCY * group[0][1], top, end, "target: at most")
    _heading(
        axes,
        "Latency across replicas, median",
        "One small message at a time; bare client: one append, one read",
        "Less is better; the target is 1.5 times the bare client",
    )


def _throughput(axes: Any, found: Found) -> None:
    names = list(
        dict.fromkeys(each.server for each in found if each.load == "throughput" and not each.error)
    )
    groups: list[list[Bar]] = [
        [
            (
                f"{TITLES[kind]}: {name.partition(': ')[2]}",
                (middle(found, "throughput", name, PER_S) or 0) / 1e6,
                COLOURS[kind],
                name.endswith("2 write"),
            )
            for name in names
            if name.startswith(kind)
        ]
        for kind in BROKERS
    ]
    ends = _bars(axes, groups, "M/s")
    _bound(axes, LEAST_PER_S / 1e6, -0.5, ends[-1], "target: at least")
    _heading(
        axes,
        "Messages through one broker",
        "128 bytes each; every replica reads all; replicas and broker share two cores",
        "More is better",
    )


def _fanout(axes: Any, found: Found) -> None:
    groups: list[list[Bar]] = []
    for load, title in (("fanout", "100 publish"), ("single", "1 publishes")):
        bars: list[Bar] = [(f"memory://: {title}", 100.0, FLOOR, False)]
        for kind in BROKERS:
            parts = of_memory(found, load, kind)
            value = 100 * median(parts) if parts else None
            bars.append((f"{TITLES[kind]}: {title}", value, COLOURS[kind], load == "fanout"))
        groups.append(bars)
    ends = _bars(axes, groups, "%")
    _bound(axes, 100 * LEAST_OF_MEMORY, -0.5, ends[0], "target: at least")
    _heading(
        axes,
        "Deliveries per CPU-second of a relay",
        "500 clients of one relay; without a broker is 100 %",
        "More is better",
    )


def _cost(axes: Any, found: Found) -> None:
    lines: list[Any] = []
    for kind in (*BROKERS, "memory"):
        rows = [
            each.values
            for each in found
            if each.load == "cost" and each.server.startswith(f"{kind}:") and not each.error
        ]
        for part, style in (("replica", "-"), ("broker", (0, (2, 2)))):
            if kind == "memory" and part == "broker":
                continue
            sizes = [each["messages"] for each in rows]
            costs = [each[part] / each["messages"] * 1e6 for each in rows]
            label = f"{TITLES[kind]}, {part}" if kind != "memory" else TITLES[kind]
            lines += axes.plot(
                sizes, costs, color=COLOURS[kind], ls=style, lw=2, marker="o", ms=4.5, label=label
            )
    axes.legend(handles=lines, fontsize=8.5, frameon=False, loc="upper right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.8, 2200)
    axes.set_xticks([1, 10, 100, 900], ["1", "10", "100", "900 messages"])
    axes.set_yticks([0.1, 1, 10, 100], ["0.1 µs", "1 µs", "10 µs", "100 µs"])
    axes.minorticks_off()
    axes.grid(True, color=GRID, lw=1)
    _frame(axes)
    axes.tick_params(labelcolor=SOFT, labelsize=8.5)
    _heading(
        axes,
        "CPU time per message, by messages that leave together",
        "A replica appends, packs, sends, reads, unpacks and delivers",
        "Less is better; both axes are logarithmic",
    )


def _shares(axes: Any, found: Found) -> None:
    """Draw the use of the two cores at the highest throughput."""
    rows = list(floods(found).items())
    for row, (name, values) in enumerate(rows):
        kind = name.partition(":")[0]
        at = 0.0
        parts = [(share, COLOURS[kind]) for share in values["cpu_shares"]]
        for share, colour in (*parts, (values["broker_share"], PALE[kind])):
            axes.barh(row, share, left=at, height=0.62, color=colour, ec="white", lw=1.2, zorder=2)
            if share > 0.12:
                axes.text(
                    at + share / 2,
                    row,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=INK if colour == PALE[kind] else "white",
                    zorder=3,
                )
            at += share
    axes.set_yticks(
        range(len(rows)), [f"{TITLES[n.partition(':')[0]]}{n[n.index(':') :]}" for n, _ in rows]
    )
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 2.1)
    axes.set_xticks([0, 0.5, 1, 1.5, 2], ["0", "0.5", "1", "1.5", "2 cores"])
    axes.xaxis.grid(True, color=GRID, lw=1)
    _frame(axes)
    axes.tick_params(axis="x", labelcolor=SOFT, labelsize=8.5)
    _heading(
        axes,
        "Use of the cores at that throughput",
        "The same runs as above: replicas, and in pale the broker",
        "The rest up to 2 was used by other programs, or idle",
    )


def _several(axes: Any, found: Found) -> None:
    groups: list[list[Bar]] = []
    for kind in BROKERS:
        bars: list[Bar] = []
        for count in (1, 2, 4):
            who = f"{kind}: {count}"
            value = middle(found, "several", who, PER_CPU_S)
            bars.append(
                (
                    f"{TITLES[kind]}: {count} relay{'s' if count > 1 else ''}",
                    value,
                    COLOURS[kind],
                    False,
                )
            )
        groups.append(bars)
    _bars(axes, groups, "M", 2.0)
    row = 0.0
    for kind in BROKERS:
        for count in (1, 2, 4):
            who = f"{kind}: {count}"
            in_all = middle(found, "several", who, key("deliveries_per_s", 1e-6))
            share = middle(found, "several", who, broker_share)
            axes.annotate(
                f"{number(in_all)} M/s in all\nbroker: {100 * (share or 0):.0f} % more CPU",
                (1, row),
                (0, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                color=SOFT,
            )
            row += 1
        row += 0.55
    _heading(
        axes,
        "Deliveries per CPU-second, with more relays",
        "500 clients each; all relays and their broker share one core here",
        "More is better; equal bars: with a core for each relay, deliveries multiply",
    )


def draw(path: Path, facts: dict[str, Any], found: Found) -> None:
    """Write the picture as PNG."""
    with plt.rc_context({"font.family": "DejaVu Sans", "text.color": INK}):
        figure, panels = plt.subplots(2, 3, figsize=(18, 10.4), dpi=110)
        parts = (_latency, _throughput, _fanout, _cost, _shares, _several)
        for axes, part in zip(panels.flat, parts, strict=True):
            part(axes, found)
        figure.subplots_adjust(
            left=0.112, right=0.985, top=0.80, bottom=0.075, wspace=0.50, hspace=0.52
        )
        about = "Real brokers with their persistence on. Medians of one run."
        figure.text(0.012, 0.955, "websocket-relay on a broker", fontsize=20, weight="bold")
        figure.text(0.012, 0.925, about, fontsize=11.5, color=SOFT)
        figure.text(0.012, 0.018, source(facts), fontsize=9.5, color=SOFT)
        figure.savefig(path, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    redraw(draw)
