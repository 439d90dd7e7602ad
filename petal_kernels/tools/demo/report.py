"""What the demo leaves in its output folder: report.json, curves.png, answers.png; its one small
picture is `chart.py`'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petal_kernels._runtime.columns import rounded
from petal_kernels.tools import environment
from petal_kernels.tools.demo import data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RIGHT, _WRONG, _FUSED, _PUBLISHED, _GREY = "#1a7f37", "#cf222e", "#0969da", "#bc4c00", "#6e7781"


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    packages = ("numpy", "mlxtend", "matplotlib")
    return environment.describe(torch.get_num_threads()) | {
        name: environment.version(name) for name in packages
    }


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write every figure of the run, indented, keys in the order they were found."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(figures, indent=2) + "\n")
    temporary.replace(path)


def write_curves(path: Path, figures: dict[str, Any]) -> None:
    """All figures of the run in six panels, and two more about the experts where there are any."""
    from matplotlib.figure import Figure

    training = figures["training"]
    columns = 4 if training["expert_usage"] else 3
    figure = Figure(figsize=(17 * columns / 3, 8), layout="constrained")
    axes = figure.subplots(2, columns)
    comparison = figures["comparison"]
    _draw_both(axes[0][0], comparison)
    _draw_distance(axes[0][1], comparison)
    percent = comparison["trainable_percent"]
    draw_bars(axes[0][2], comparison["milliseconds"], "ms per step, forward + backward", 1.0)
    draw_bars(axes[1][2], comparison["saved_bytes"], "MB kept for backward", 1e-6)
    losses = training["losses"]
    axes[1][0].plot(range(1, len(losses) + 1), losses, color=_FUSED, lw=0.8)
    title = f"Training the adapter (fused): {rounded(percent, 2)} % of the parameters"
    axes[1][0].set(title=title, xlabel="step", ylabel="loss")
    draw_accuracy(axes[1][1], figures)
    if training["expert_usage"]:
        _draw_usage(axes[0][3], training["expert_usage"][-1])
        _draw_balance(axes[1][3], training)
    figure.savefig(path, dpi=100)


def _draw_both(axes: Axes, comparison: dict[str, Any]) -> None:
    steps = range(1, comparison["steps"] + 1)
    style: dict[str, Any] = {"color": _PUBLISHED, "lw": 5, "alpha": 0.4}
    axes.plot(steps, comparison["published_losses"], label="eager published", **style)
    axes.plot(steps, comparison["fused_losses"], color=_FUSED, lw=1.5, label="fused")
    axes.set(title="Same seed, dropout off: one curve", xlabel="step", ylabel="loss")
    axes.legend()


def _draw_distance(axes: Axes, comparison: dict[str, Any]) -> None:
    steps = range(1, comparison["steps"] + 1)
    pairs = zip(comparison["fused_losses"], comparison["published_losses"], strict=True)
    # Equal losses have no logarithm: they are drawn at a quarter of the rounding unit.
    floor = torch.finfo(torch.float32).eps / 4
    distances = [max(abs(a - b), floor) for a, b in pairs]
    axes.semilogy(steps, distances, color=_FUSED, label="|fused - published|")
    label = "bound: rounding, amplified by training"
    axes.axhline(comparison["bound"], color=_GREY, ls="--", label=label)
    axes.set(title="Distance of the two curves", xlabel="step", ylabel="difference of the loss")
    axes.legend(loc="lower right")


def draw_bars(axes: Axes, values: dict[str, float], title: str, unit: float) -> None:
    """The step of each form, with what the adapter adds to the frozen one."""
    names = {"frozen": "no adapter", "published": "eager published", "fused": "fused"}
    heights = [values[key] * unit for key in names]
    bars = axes.bar(list(names.values()), heights, color=[_GREY, _PUBLISHED, _FUSED])
    above = [f"{height:.1f}" for height in heights[:1]]
    above += [f"{height:.1f}\nadapter {height - heights[0]:+.1f}" for height in heights[1:]]
    axes.bar_label(bars, above)
    axes.set(title=title, ylim=(0, 1.25 * max(heights)))


def draw_accuracy(axes: Axes, figures: dict[str, Any]) -> None:
    """The new question's accuracy on held-out pictures over the steps, beside the baselines."""
    training, question = figures["training"], figures["question"]
    steps = [0, *training["accuracy_steps"]]
    shares = [figures["before"][question], *training["accuracies"]]
    axes.plot(steps, shares, "o-", color=_FUSED, label=question)
    styles = zip(figures["baselines"].items(), ("--", ":", "-."), strict=True)
    for (name, value), style in styles:
        axes.axhline(value, color=_GREY, ls=style, label=name)
    axes.set_xscale("symlog", linthresh=1)
    axes.set(title="Held-out pictures", xlabel="step", ylabel="share answered right")
    axes.set(xlim=(-0.2, 1.2 * steps[-1]), ylim=(0, 1.02))
    axes.legend(loc="lower right")


def _draw_usage(axes: Axes, usage: dict[str, list[float]]) -> None:
    shares = list(usage.values())
    experts = range(len(shares[0]))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(map(max, shares)), aspect="auto")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xticks(experts, [str(e) for e in experts])
    axes.set_yticks(range(len(shares)), list(usage))
    axes.set(title="Share of each expert in an instruction's tokens", xlabel="expert")


def _draw_balance(axes: Axes, training: dict[str, Any]) -> None:
    steps = [0, *training["accuracy_steps"]]
    # A router of zeros: every expert has the same share.
    axes.plot(steps, [1.0, *training["expert_balance"]], "o-", color=_FUSED)
    axes.axhline(1.0, color=_GREY, ls="--", label="all serve alike")
    axes.set_xscale("symlog", linthresh=1)
    title = "Balance of the experts (E times the squared shares)"
    axes.set(title=title, xlabel="step", xlim=(-0.2, 1.2 * steps[-1]))
    axes.legend(loc="upper left")


def write_answers(path: Path, pictures: Tensor, rows: list[dict[str, Any]], count: int) -> None:
    """The first `count` pictures; under each its questions with the answers before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * count, 3.6), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, height_ratios=[2.4, 1])
    for i in range(count):
        axes[0][i].imshow(data.to_grey(pictures[i]), cmap="gray", vmin=0, vmax=1)
        axes[0][i].set_axis_off()
        axes[1][i].set_axis_off()
        mine = [row for row in rows if row["picture"] == i]
        for j, row in enumerate(mine):
            colour = _RIGHT if row["after"] == row["right"] else _WRONG
            text = f"{row['question']} {row['after']}"
            if row["before"] != row["after"]:
                text += f"  (before: {row['before']})"
            axes[1][i].text(
                0.5,
                0.95 - 0.3 * j,
                text,
                color=colour,
                ha="center",
                va="top",
                fontsize=8.5,
                transform=axes[1][i].transAxes,
            )
    figure.suptitle("Held-out pictures: answers of generate() after the adapter was trained")
    figure.savefig(path, dpi=110)
