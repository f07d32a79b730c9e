"""Draw a load test as an SVG picture, on its own: no library, no font, no script.

It is readable on a light page and on a dark one.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from websocket_relay.cli.bench.tally import Slice, Tally

WIDTH, HEIGHT = 880, 576
LEFT, RIGHT = 76, 800
LABEL = 14
TOP, PANEL, BETWEEN = 100, 180, 66

STYLE = """
  svg { font: 12px system-ui, sans-serif; background: #fff; }
  text { fill: #1f2933; } .soft { fill: #64707d; } .title { font-size: 15px; font-weight: 600; }
  .head { font-weight: 600; } .grid { stroke: #e6eaee; } .line { fill: none; stroke-width: 2; }
  .a { stroke: #0b7a75; } .b { stroke: #c2410c; } .fa { fill: #0b7a75; } .fb { fill: #c2410c; }
  @media (prefers-color-scheme: dark) {
    svg { background: #12181f; } text { fill: #e6eaee; } .soft { fill: #9aa7b4; }
    .grid { stroke: #2a333d; } .a { stroke: #2dd4bf; } .b { stroke: #fb923c; }
    .fa { fill: #2dd4bf; } .fb { fill: #fb923c; }
  }
"""

Points = Sequence[tuple[float, float]]


def draw(address: str, load: str, tally: Tally) -> str:
    """Return the picture: throughput above, latency below, over time.

    Args:
        address: what was measured.
        load: what was done to it.
        tally: what came of it.
    """
    slices = [each for each in tally.slices if each.at_s > 0]
    across = _across(slices[-1].at_s if slices else 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(f'{address}: {load}')}</title><style>{STYLE}</style>",
        _text(LEFT - 52, 28, escape(address), "title"),
        _text(LEFT - 52, 47, escape(load), "soft"),
        *_throughput(slices, across),
        *_latency(slices, across),
        *_seconds(across, slices[-1].at_s if slices else 1.0),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _across(duration_s: float) -> Callable[[float], float]:
    return lambda at_s: LEFT + (RIGHT - LEFT) * at_s / duration_s


def _throughput(slices: Sequence[Slice], across: Callable[[float], float]) -> list[str]:
    most = max((each.deliveries_per_s for each in slices), default=0) or 1
    ticks = _even(most)
    bottom = TOP + PANEL

    def up(value: float) -> float:
        return bottom - PANEL * value / ticks[-1]

    points = [(across(each.at_s), up(each.deliveries_per_s)) for each in slices]
    return [
        _text(LEFT - 52, TOP - 14, "deliveries per second", "head"),
        *_grid(ticks, up, _short),
        _line(points, "a"),
    ]


def _latency(slices: Sequence[Slice], across: Callable[[float], float]) -> list[str]:
    low = [(each.at_s, each.p50_ms) for each in slices if each.p50_ms]
    high = [(each.at_s, each.p99_ms) for each in slices if each.p99_ms]
    values = [value for _, value in (*low, *high)] or [1.0]
    first = math.floor(math.log10(min(values)))
    last = max(first + 1, math.ceil(math.log10(max(values))))
    bottom = TOP + PANEL + BETWEEN + PANEL

    def up(value: float) -> float:
        return bottom - PANEL * (math.log10(value) - first) / (last - first)

    drawn = [
        (name, shade, [(across(at_s), up(value)) for at_s, value in points])
        for name, shade, points in (("p50", "a", low), ("p99", "b", high))
    ]
    return [
        _text(LEFT - 52, TOP + PANEL + BETWEEN - 14, "latency, ms", "head"),
        *_grid([10.0**power for power in range(first, last + 1)], up, lambda value: f"{value:g}"),
        *(_line(points, shade) for _, shade, points in drawn),
        *_labels([(name, shade, points[-1][1]) for name, shade, points in drawn if points]),
    ]


def _seconds(across: Callable[[float], float], duration_s: float) -> list[str]:
    y = TOP + PANEL + BETWEEN + PANEL + 22
    ticks = [value for value in _even(duration_s) if value <= duration_s * 1.01]
    marks = [_text(across(value), y, f"{value:g}", "soft", "middle") for value in ticks]
    return [*marks, _text(RIGHT + 10, y, "seconds", "soft")]


def _even(most: float) -> list[float]:
    """Return round numbers from 0 to the first that is not less than `most`: about five."""
    rough = most / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough)
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def _grid(
    ticks: Sequence[float], up: Callable[[float], float], shown: Callable[[float], str]
) -> list[str]:
    parts = []
    for value in ticks:
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 4, shown(value), "soft", "end"))
    return parts


def _line(points: Points, shade: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="line {shade}" d="M{path}"/>' if points else ""


def _labels(ends: Sequence[tuple[str, str, float]]) -> list[str]:
    """Name the lines at their ends: the upper one last, and moved up where both would be one."""
    parts, below = [], math.inf
    for name, shade, end in ends:
        y = min(end, below - LABEL)
        parts.append(_text(RIGHT + 8, y + 4, name, f"f{shade}"))
        below = y
    return parts


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
