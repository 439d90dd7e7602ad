"""What the runs of the demo's other methods show: one table, one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petal_kernels._runtime.columns import rounded
from petal_kernels.tools.demo import tasks
from petal_kernels.tools.demo.methods import old_accuracy
from petal_kernels.tools.demo.report import _FUSED, _GREY, _PUBLISHED
from petal_kernels.tools.demo.terminal import table

_HEADER = (
    "method",
    "trained",
    "new before",
    "after",
    "old before",
    "after",
    "ms/step bare",
    "eager",
    "fused",
    "MB kept bare",
    "eager",
    "fused",
    "curves",
)
_FORMS = ("frozen", "published", "fused")


def table_of(all_figures: Sequence[dict[str, Any]]) -> str:
    """One row per method; what stands for what is written below it."""
    rows = [_row(figures) for figures in all_figures]
    return "\n".join(
        (
            table(_HEADER, rows),
            f"  (held-out answers to {tasks.NEW.text!r} and, in the mean, to the "
            f"{len(tasks.OLD)} old questions; forward + backward, median of steps",
            "  taken in turns; kept for backward without parameters; bare: no adapter; eager: the "
            "published form)",
        )
    )


def _row(figures: dict[str, Any]) -> list[str]:
    comparison, question = figures["comparison"], figures["question"]
    before, after = figures["before"], figures["after"]
    return [
        figures["label"],
        f"{rounded(comparison['trainable_percent'], 2)} %",
        f"{before[question]:.1%}",
        f"{after[question]:.1%}",
        f"{old_accuracy(before):.1%}",
        f"{old_accuracy(after):.1%}",
        *(f"{comparison['milliseconds'][form]:.1f}" for form in _FORMS),
        *(rounded(comparison["saved_bytes"][form] / 1e6, 2) for form in _FORMS),
        "coincide" if comparison["agrees"] else "DIFFER",
    ]


def write_summary(path: Path, all_figures: Sequence[dict[str, Any]]) -> None:
    """All methods in three panels: accuracy, time per step, bytes kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    names = [figures["label"].replace(" (", "\n(") for figures in all_figures]
    question = all_figures[0]["question"]
    shares = {
        f"{question} before": ([f["before"][question] for f in all_figures], _GREY),
        f"{question} after": ([f["after"][question] for f in all_figures], _FUSED),
        "old questions after": ([old_accuracy(f["after"]) for f in all_figures], _PUBLISHED),
    }
    _draw_groups(axes[0], names, shares, "{:.2f}")
    floors = all_figures[0]["baselines"]
    best = max(floors, key=floors.__getitem__)
    axes[0].axhline(floors[best], color=_GREY, ls=":", zorder=0, label=best)
    axes[0].legend(loc="upper right", fontsize=8)
    axes[0].set(title="Held-out pictures answered right", ylim=(0, 1.3))
    panels = (
        ("milliseconds", "ms per step, forward + backward", 1.0, "{:.0f}"),
        ("saved_bytes", "MB kept for backward", 1e-6, "{:.1f}"),
    )
    colours = {"no adapter": _GREY, "eager published": _PUBLISHED, "fused": _FUSED}
    for ax, (key, title, unit, form) in zip(axes[1:], panels, strict=True):
        groups = {
            label: ([unit * f["comparison"][key][name] for f in all_figures], colour)
            for name, (label, colour) in zip(_FORMS, colours.items(), strict=True)
        }
        _draw_groups(ax, names, groups, form)
        ax.set(title=title, ylim=(0, 1.3 * max(max(values) for values, _ in groups.values())))
    figure.savefig(path, dpi=100)


def _draw_groups(
    axes: Any, names: list[str], groups: dict[str, tuple[list[float], str]], form: str
) -> None:
    width = 0.8 / len(groups)
    for i, (label, (values, colour)) in enumerate(groups.items()):
        at = [k + (i - (len(groups) - 1) / 2) * width for k in range(len(names))]
        bars = axes.bar(at, values, width, color=colour, label=label)
        axes.bar_label(bars, [form.format(value) for value in values], fontsize=7)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.legend(loc="upper right", fontsize=8)
