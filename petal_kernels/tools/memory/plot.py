"""The timeline of a profile as a PNG."""

from __future__ import annotations

from pathlib import Path

from petal_kernels import memory
from petal_kernels.memory.records import mib
from petal_kernels.tools.memory.html import stacked


def timeline(profile: memory.Profile, title: str, path: Path) -> None:
    """Writes the stacked curve of live bytes; raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = profile.curve(points=1000)
    parts = stacked(curve)
    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    values = [[v / 2**20 for v in part] for part in parts.values()]
    axes.stackplot(curve.steps, values, labels=list(parts), step="post")
    for name, at in profile.phases.items():
        axes.axvline(at, color="0.5", linewidth=0.8)
        axes.annotate(name, (at, 0), xytext=(4, 4), textcoords="offset points")
    axes.set(title=title, xlabel="operation", ylabel="live MiB", xlim=(0, curve.steps[-1]))
    peak = f"peak {mib(profile.peak_bytes)}"
    top = (profile.peak_step, profile.peak_bytes / 2**20)
    axes.annotate(peak, top, xytext=(8, 4), textcoords="offset points", annotation_clip=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
