"""What the demo leaves in its output folder: report.json, curves.png, answers.png."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data

_RIGHT, _WRONG, _FUSED, _PUBLISHED, _GREY = "#1a7f37", "#cf222e", "#0969da", "#bc4c00", "#6e7781"


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    import matplotlib
    import mlxtend
    import numpy
    import transformers

    import petal_kernels

    return {
        "versions": {
            "petal_kernels": petal_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "mlxtend": mlxtend.__version__,
            "matplotlib": matplotlib.__version__,
        },
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        },
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, or None where there is none."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "log", "-1", "--format=%H", "--", str(here.parents[1])]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def write_json(path: Path, figures: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(figures, indent=2) + "\n")
    temporary.replace(path)


def write_curves(path: Path, figures: dict[str, Any]) -> None:
    """Both forms' losses and their distance; the whole run's loss; held-out accuracy with the baselines."""
    from matplotlib.figure import Figure

    comparison, training = figures["comparison"], figures["training"]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)

    steps = range(1, comparison["steps"] + 1)
    both = axes[0][0]
    both.plot(
        steps,
        comparison["published_losses"],
        color=_PUBLISHED,
        lw=5,
        alpha=0.4,
        label="eager published",
    )
    both.plot(steps, comparison["fused_losses"], color=_FUSED, lw=1.5, label="fused")
    both.set(title="Same seed, dropout off: one curve", xlabel="step", ylabel="loss")
    both.legend()

    apart = axes[0][1]
    pairs = zip(comparison["fused_losses"], comparison["published_losses"], strict=True)
    floor = torch.finfo(torch.float32).eps / 4
    apart.semilogy(
        steps, [max(abs(a - b), floor) for a, b in pairs], color=_FUSED, label="|fused - published|"
    )
    apart.axhline(
        comparison["bound"], color=_GREY, ls="--", label="bound (rounding, amplified by training)"
    )
    apart.set(title="Distance of the two curves", xlabel="step", ylabel="difference of the loss")
    apart.legend()

    whole = axes[1][0]
    losses = training["losses"]
    whole.plot(range(1, len(losses) + 1), losses, color=_FUSED, lw=0.8)
    whole.set(title="Training the adapter (fused)", xlabel="step", ylabel="loss")

    share = axes[1][1]
    share.plot(
        training["accuracy_steps"],
        training["accuracies"],
        "o-",
        color=_FUSED,
        label=f"{figures['question']}",
    )
    share.axhline(
        figures["before"][figures["question"]], color=_WRONG, ls=":", label="untouched model"
    )
    for name, value in figures["baselines"].items():
        if "left" in name or "always '" in name:
            share.axhline(value, color=_GREY, ls="--" if "left" in name else "-.", label=name)
    share.set(title="Held-out pictures", xlabel="step", ylabel="share answered right", ylim=(0, 1))
    share.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def write_answers(path: Path, pictures: Tensor, rows: list[dict[str, Any]], count: int) -> None:
    """The first `count` pictures; under each its questions with the answers before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.3 * count, 4.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, height_ratios=[2, 1.6])
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
