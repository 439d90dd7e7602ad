"""The charts of reports, by matplotlib: lines, grouped bars and stacked areas.

Each function returns a figure; `inline` makes SVG for a page of it, with text that stays text, the
page's colours in light and dark, and a tooltip (`<title>`) on every dot, bar and area. matplotlib
is imported when the first chart is drawn.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petal_kernels.tools.exits import Refusal
from petal_kernels.tools.page import FAINT, LINE, SERIES, Html, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _BAR = 7.2, 4.0, 0.23  # inches
_TIP = "tip: "  # begins the id of what has a tooltip
_VARIABLES = {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)} | {LINE: "var(--line)"}
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "petal_kernels"}


def need(option: str) -> None:
    """Raises Refusal where `option` asks for charts and matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Refusal(f"{option}: want matplotlib: pip install matplotlib")


def number(value: float) -> str:
    """Three significant digits, with k, M or G from ten thousand on."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor and abs(value) >= 1e4:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _colour(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _axes(title: str, height: float, values: Sequence[float]) -> tuple[Figure, Axes]:
    """An empty chart for these values."""
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError("series: want at least one point, and finite numbers")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=FAINT)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(axes: Axes, names: int, x_label: str, y_label: str) -> None:
    """What charts with two axes have in common."""
    axes.grid(axis="y", color=LINE)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel(x_label, color=FAINT)
    axes.set_ylabel(y_label, color=FAINT)
    axes.margins(x=0.02)
    axes.figure.legend(loc="outside lower left", ncols=min(names, 4), frameon=False)


def lines(
    series: Mapping[str, Points], *, title: str, x_label: str, y_label: str, log_x: bool = False
) -> Figure:
    """One line with dots per series, over y from zero; ticks where points are."""
    places = sorted({x for points in series.values() for x, _ in points})
    heights = [y for points in series.values() for _, y in points]
    figure, axes = _axes(title, _HEIGHT, [*places, *heights])
    for i, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), color=_colour(i), label=name)
        for x, y in points:
            tip = f"{_TIP}{name}: {number(y)} {y_label} at {number(x)} {x_label}"
            axes.plot(x, y, "o", markersize=5, color=_colour(i), gid=tip)
    axes.set(xscale="log" if log_x else "linear", ylim=(min(0.0, *heights), None))
    axes.minorticks_off()
    axes.set_xticks(places, [number(x) for x in places])
    _finish(axes, len(series), x_label, y_label)
    return figure


def areas(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Mapping[str, float],
) -> Figure:
    """Areas stacked in the order given, the first at the bottom, each value from its x to the next;
    `marks` are named places on the x axis.
    """
    figure, axes = _axes(title, _HEIGHT, [*x, *(y for values in series.values() for y in values)])
    colours = [_colour(i) for i in range(len(series))]
    stack = axes.stackplot(
        x, list(series.values()), labels=list(series), colors=colours, alpha=0.75, step="post"
    )
    for area, (name, values) in zip(stack, series.items(), strict=True):
        area.set_gid(f"{_TIP}{name}: at most {number(max(values))} {y_label}")
    for name, at in marks.items():
        axes.axvline(at, color=FAINT, linewidth=0.8)
        axes.annotate(name, (at, 0), xytext=(4, 4), textcoords="offset points")
    _finish(axes, len(series), x_label, y_label)
    return figure


def bars(rows: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> Figure:
    """Horizontal bars in groups: {group: {name: value}}, a group without a name without a heading;
    a name has one colour in all groups."""
    names = list(dict.fromkeys(n for group in rows.values() for n in group))
    values = [v for group in rows.values() for v in group.values()]
    count = len(values) + sum(1.5 if group else 0.5 for group in rows)
    figure, axes = _axes(title, 0.8 + _BAR * count, values)
    y, ticks = 0.0, {}
    for group, found in rows.items():
        if group:
            axes.text(0.0, y, group, fontweight="bold", va="center")
            y += 1.0
        for name, value in found.items():
            tip = f"{group}, {name}: {number(value)} {unit}".removeprefix(", ")
            (bar,) = axes.barh(y, value, color=_colour(names.index(name)))
            bar.set_gid(_TIP + tip)
            text, end = f"{number(value)} {unit}", (max(value, 0.0), y)
            axes.annotate(text, end, (4, 0), textcoords="offset points", va="center")
            ticks[y] = name
            y += 1.0
        y += 0.5
    axes.set_ylim(y, -1.0)
    axes.set_xlim(min(0.0, *values), 1.15 * max(0.0, *values) or 1.0)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.grid(axis="x", color=LINE)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    return figure


def inline(figure: Figure) -> Html:
    """The figure as SVG for a page: no address but SVG's own, no id but those it refers to."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = text.replace("xlink:href", "href")
    text = re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    title = escape(figure.axes[0].get_title(loc="left"))
    return Html(text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1))
