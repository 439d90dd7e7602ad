"""The live bytes of a profile over its step, as charts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petal_kernels import memory
from petal_kernels.memory.profile import Curve
from petal_kernels.memory.records import mib
from petal_kernels.memory.timeline import CATEGORIES, RESIDENT
from petal_kernels.tools import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 1000  # of a file of its own


def stacked(curve: Curve) -> dict[str, list[int]]:
    """The curve's parts from the bottom up, those that are never there left out."""
    return {c: curve.parts[c] for c in CATEGORIES if any(curve.parts.get(c, []))}


def _areas(profile: memory.Profile, curve: Curve, parts: list[str], title: str) -> Figure:
    series = {name: [v / 2**20 for v in curve.parts[name]] for name in parts}
    labels = {"x_label": "operation", "y_label": "MiB"}
    return charts.areas(curve.steps, series, title=title, marks=profile.phases, **labels)


def changes(profile: memory.Profile) -> list[Figure]:
    """One chart, or none where nothing changes: the model itself does not during a step, and would
    dwarf what does."""
    curve = profile.curve()
    parts = list(stacked(curve))
    there = [name for name in RESIDENT if name in parts]
    below = sum(curve.parts[name][0] for name in there)
    title = f"Above the {mib(below)} of {', '.join(there)}"
    others = [name for name in parts if name not in RESIDENT]
    return [_areas(profile, curve, others, title)] if others else []


def timeline(profile: memory.Profile, title: str) -> Figure:
    """Everything that is there, and the peak."""
    curve = profile.curve(_POINTS)
    figure = _areas(profile, curve, list(stacked(curve)), title)
    top = (profile.peak_step, profile.peak_bytes / 2**20)
    style: dict[str, Any] = {
        "xytext": (8, 4),
        "textcoords": "offset points",
        "annotation_clip": False,
    }
    figure.axes[0].annotate(f"peak {mib(profile.peak_bytes)}", top, **style)
    return figure
