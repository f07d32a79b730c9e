"""Draw a load test as a self-contained SVG, without library, font or script.

The picture follows the reader's light or dark colour scheme. Knows no connection.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from websocket_relay.cli.bench.tally import Slice, Tally

WIDTH, HEIGHT = 880, 576
LEFT, RIGHT = 76, 800
LABEL_HEIGHT = 14
TOP, PANEL_HEIGHT, GAP = 100, 180, 66

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


def draw(url: str, load: str, tally: Tally) -> str:
    """Return the picture: throughput above, latency below, over time.

    Args:
        url: of the channel.
        load: the load, as text.
        tally: the counters.
    """
    slices = [each for each in tally.slices if each.at_s > 0]
    x_of = _x_scale(slices[-1].at_s if slices else 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(f'{url}: {load}')}</title><style>{STYLE}</style>",
        _text(LEFT - 52, 28, escape(url), "title"),
        _text(LEFT - 52, 47, escape(load), "soft"),
        *_throughput(slices, x_of),
        *_latency(slices, x_of),
        *_seconds(x_of, slices[-1].at_s if slices else 1.0),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _x_scale(duration_s: float) -> Callable[[float], float]:
    return lambda at_s: LEFT + (RIGHT - LEFT) * at_s / duration_s


def _throughput(slices: Sequence[Slice], x_of: Callable[[float], float]) -> list[str]:
    highest = max((each.deliveries_per_s for each in slices), default=0) or 1
    ticks = _round_ticks(highest)
    bottom = TOP + PANEL_HEIGHT

    def y_of(value: float) -> float:
        return bottom - PANEL_HEIGHT * value / ticks[-1]

    points = [(x_of(each.at_s), y_of(each.deliveries_per_s)) for each in slices]
    return [
        _text(LEFT - 52, TOP - 14, "deliveries per second", "head"),
        *_grid(ticks, y_of, _short),
        _line(points, "a"),
    ]


def _latency(slices: Sequence[Slice], x_of: Callable[[float], float]) -> list[str]:
    p50 = [(each.at_s, each.p50_ms) for each in slices if each.p50_ms]
    p99 = [(each.at_s, each.p99_ms) for each in slices if each.p99_ms]
    values = [value for _, value in (*p50, *p99)] or [1.0]
    first = math.floor(math.log10(min(values)))
    last = max(first + 1, math.ceil(math.log10(max(values))))
    bottom = TOP + PANEL_HEIGHT + GAP + PANEL_HEIGHT

    def y_of(value: float) -> float:
        return bottom - PANEL_HEIGHT * (math.log10(value) - first) / (last - first)

    lines = [
        (name, shade, [(x_of(at_s), y_of(value)) for at_s, value in points])
        for name, shade, points in (("p50", "a", p50), ("p99", "b", p99))
    ]
    return [
        _text(LEFT - 52, TOP + PANEL_HEIGHT + GAP - 14, "latency, ms", "head"),
        *_grid([10.0**power for power in range(first, last + 1)], y_of, lambda value: f"{value:g}"),
        *(_line(points, shade) for _, shade, points in lines),
        *_labels([(name, shade, points[-1][1]) for name, shade, points in lines if points]),
    ]


def _seconds(x_of: Callable[[float], float], duration_s: float) -> list[str]:
    y = TOP + PANEL_HEIGHT + GAP + PANEL_HEIGHT + 22
    ticks = [value for value in _round_ticks(duration_s) if value <= duration_s * 1.01]
    marks = [_text(x_of(value), y, f"{value:g}", "soft", "middle") for value in ticks]
    return [*marks, _text(RIGHT + 10, y, "seconds", "soft")]


def _round_ticks(highest: float) -> list[float]:
    """Return round numbers from 0 to the first that is not less than `highest`, about five."""
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough)
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def _grid(
    ticks: Sequence[float], y_of: Callable[[float], float], label: Callable[[float], str]
) -> list[str]:
    parts = []
    for value in ticks:
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(_text(LEFT - 8, y + 4, label(value), "soft", "end"))
    return parts


def _line(points: Points, shade: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="line {shade}" d="M{path}"/>' if points else ""


def _labels(ends: Sequence[tuple[str, str, float]]) -> list[str]:
    """Label the lines at their ends: the upper line last, moved up where the labels overlap."""
    parts, below = [], math.inf
    for name, shade, end in ends:
        y = min(end, below - LABEL_HEIGHT)
        parts.append(_text(RIGHT + 8, y + 4, name, f"f{shade}"))
        below = y
    return parts


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
