"""Charts as inline SVG, written by hand: lines, grouped bars and stacked areas.

Each has axes with round ticks, a legend and a tooltip (`<title>`) on every point. Colours are the
variables --s0 to --s7 that `page` sets for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from petal_kernels.tools.page import Html, escape

Points = Sequence[tuple[float, float]]
WIDTH, COLOURS = 640, 8
_LEFT, _RIGHT, _PLOT = 66, 18, 250  # margins beside the plot, and its height
_CHARACTER = 7.0  # mean width of one at 13 px
_TIPS = 400  # tooltips on the edge of one area


def number(value: float) -> str:
    """Three significant digits, with k, M or G from ten thousand on."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor and abs(value) >= 1e4:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from at most `low` to at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the range; only the powers over a long one."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0,) if last - first > 3 else (1.0, 2.0, 5.0)
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in factors]
    below = [t for t in ticks if t <= low * (1 + 1e-9)]
    above = [t for t in ticks if t >= high * (1 - 1e-9)]
    ends = (below[-1] if below else ticks[0], above[0] if above else ticks[-1])
    kept = [t for t in ticks if ends[0] <= t <= ends[1]]
    return kept if len(kept) > 1 else [kept[0], kept[0] * 10]


@dataclass(frozen=True)
class _Axis:
    """Data to pixels along one axis, from the first tick to the last."""

    ticks: list[float]
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        f: Callable[[float], float] = math.log10 if self.log else float
        low, high = f(self.ticks[0]), f(self.ticks[-1])
        return self.start + (f(value) - low) / (high - low) * (self.end - self.start)


def _axis(values: Sequence[float], start: float, end: float, log: bool, zero: bool) -> _Axis:
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError("series: want at least one point, and finite numbers")
    low, high = min(values), max(values)
    if log:
        if low <= 0:
            raise ValueError(f"series: want positive numbers on a logarithmic axis, got {low}")
        return _Axis(log_ticks(low, high), start, end, True)
    return _Axis(round_ticks(min(low, 0.0) if zero else low, high), start, end, False)


def _colour(i: int) -> str:
    return f"var(--s{i % COLOURS})"


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _legend(names: Sequence[str], top: float) -> tuple[str, float]:
    """Coloured squares with names, in as many lines as needed, and where the plot may start."""
    x, y, out = float(_LEFT), top, []
    for i, name in enumerate(names):
        width = 22 + _CHARACTER * len(name)
        if x + width > WIDTH - _RIGHT and x > _LEFT:
            x, y = float(_LEFT), y + 18
        out.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="11" height="11" fill="{_colour(i)}"/>')
        out.append(_text(x + 15, y + 10, name))
        x += width + 8
    return "".join(out), y + 24


def _svg(height: float, title: str, parts: Sequence[str]) -> Html:
    head = _text(_LEFT, 16, title, more=' font-weight="600" style="font-weight:600"')
    return Html(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{head}{chr(10).join(parts)}</svg>'
    )


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> list[str]:
    """Grid lines, tick labels and the names of both axes."""
    out = []
    for tick in y.ticks:
        at = y(tick)
        out.append(
            f'<line x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="var(--line)"/>'
        )
        out.append(_text(x.start - 8, at + 4, number(tick), "end", ' class="faint"'))
    for tick in x.ticks:
        at = x(tick)
        out.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.start + 4:.1f}" '
            'stroke="var(--faint)"/>'
        )
        out.append(_text(at, y.start + 18, number(tick), "middle", ' class="faint"'))
    middle = (y.start + y.end) / 2
    turned = f' class="faint" transform="rotate(-90 14 {middle:.1f})"'
    out.append(_text((x.start + x.end) / 2, y.start + 38, x_label, "middle", ' class="faint"'))
    out.append(_text(14, middle, y_label, "middle", turned))
    return out


def _dot(x: float, y: float, colour: str, tip: str, radius: float = 3.5) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">'
        f"<title>{escape(tip)}</title></circle>"
    )


def lines(
    series: Mapping[str, Points],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Html:
    """One line with dots per series; a linear y axis includes zero."""
    legend, top = _legend(list(series), 26)
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_axis = _axis(xs, _LEFT, WIDTH - _RIGHT, log_x, zero=False)
    y_axis = _axis(ys, top + _PLOT, top, log_y, zero=True)
    out = [legend, *_frame(x_axis, y_axis, x_label, y_label)]
    for i, (name, points) in enumerate(series.items()):
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{_colour(i)}" stroke-width="2"/>'
        )
        for x, y in points:
            tip = f"{name}: {number(y)} {y_label} at {number(x)} {x_label}"
            out.append(_dot(x_axis(x), y_axis(y), _colour(i), tip))
    return _svg(top + _PLOT + 48, title, out)


def areas(series: Mapping[str, Points], *, title: str, x_label: str, y_label: str) -> Html:
    """Areas stacked in the order given, the first at the bottom; all share their x values."""
    places = [[x for x, _ in points] for points in series.values()]
    if not places or any(p != places[0] for p in places):
        raise ValueError("series: want the same x values in every series")
    legend, top = _legend(list(series), 26)
    total = [0.0] * len(places[0])
    edges = [total]
    for points in series.values():
        total = [t + y for t, (_, y) in zip(total, points, strict=True)]
        edges.append(total)
    x_axis = _axis(places[0], _LEFT, WIDTH - _RIGHT, False, zero=False)
    y_axis = _axis([v for e in edges for v in e], top + _PLOT, top, False, zero=True)
    out = [legend, *_frame(x_axis, y_axis, x_label, y_label)]
    for i, (name, points) in enumerate(series.items()):
        upper = [(x, y) for x, y in zip(places[0], edges[i + 1], strict=True)]
        lower = [(x, y) for x, y in zip(places[0], edges[i], strict=True)]
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in upper + lower[::-1])
        peak = max(y for _, y in points)
        out.append(
            f'<polygon points="{path}" fill="{_colour(i)}" fill-opacity="0.75">'
            f"<title>{escape(f'{name}: at most {number(peak)} {y_label}')}</title></polygon>"
        )
    for i, (name, points) in enumerate(series.items()):
        every = math.ceil(len(points) / _TIPS)  # a timeline has thousands of points
        for j in range(0, len(points), every):
            (x, y), height = points[j], edges[i + 1][j]
            tip = f"{name}: {number(y)} of {number(total[j])} {y_label} at {number(x)} {x_label}"
            out.append(_dot(x_axis(x), y_axis(height), "transparent", tip, 4))
    return _svg(top + _PLOT + 48, title, out)


def bars(rows: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> Html:
    """Horizontal bars in groups: {group: {name: value}}, a group without a name without a heading;
    a name has one colour in all groups."""
    names = list(dict.fromkeys(n for group in rows.values() for n in group))
    values = [v for group in rows.values() for v in group.values()]
    label = min(190.0, 14 + _CHARACTER * max((len(n) for n in names), default=0))
    axis = _axis(values, label, WIDTH - 70, False, zero=True)
    y, marks = 30.0, []
    for group, found in rows.items():
        if group:
            marks.append(_text(4, y + 12, group, more=' style="font-weight:600"'))
            y += 19
        for name, value in found.items():
            zero, end = axis(0.0), axis(value)
            colour = _colour(names.index(name))
            tip = f"{group}, {name}: {number(value)} {unit}".removeprefix(", ")
            marks.append(_text(label - 8, y + 12, name, "end", ' class="faint"'))
            marks.append(
                f'<rect x="{min(zero, end):.1f}" y="{y + 1:.1f}" height="14" rx="2" '
                f'width="{max(abs(end - zero), 1):.1f}" fill="{colour}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            marks.append(_text(max(zero, end) + 6, y + 12, f"{number(value)} {unit}"))
            y += 18
        y += 8
    grid = []
    for tick in axis.ticks:
        at = axis(tick)
        grid.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="28" y2="{y:.1f}" stroke="var(--line)"/>'
        )
        grid.append(_text(at, y + 14, number(tick), "middle", ' class="faint"'))
    return _svg(y + 24, title, grid + marks)
