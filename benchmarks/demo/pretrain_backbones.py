"""Trains a text backbone of the demo on the old instructions and writes its weights.

Run it as: python -m benchmarks.demo.pretrain_backbones bart (or gpt2)

The vision tower is the one inside the demo's InstructBLIP, frozen, its features cached; only
training digits are seen (the held-out digits are used to print accuracies and for nothing else).
Each step draws its batch from (seed, step), so a run that was stopped goes on as if it had not
been.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn
from transformers import InstructBlipForConditionalGeneration

from benchmarks.demo.pretrain import Log, Phase, save_weights
from petal_kernels.tools.demo import backbones, data, tasks
from petal_kernels.tools.demo import model as small
from petal_kernels.tools.demo.train import rate

_SAVE_EVERY = 200
_BATCH, _PEAK = 128, 1e-3


def train(
    backbone: backbones.Backbone,
    model: InstructBlipForConditionalGeneration,
    digits: data.Digits,
    steps: int,
    pictures: int,
    folder: Path,
    seed: int,
) -> None:
    """Projection and language model on the old instructions."""
    began = time.perf_counter()
    pairs = data.draw_pairs(digits, pictures, seed=(seed * 10 + 4) * 10**6, augment=True)
    features = backbones.columns(small.image_features(model, pairs.pictures))
    print(f"features of {pictures} pictures: {time.perf_counter() - began:.0f} s", flush=True)
    questions = tasks.question_ids(tasks.OLD)
    answers = tasks.answer_table(tasks.OLD, pairs.left, pairs.right)
    phase = Phase(backbone.kind, {"backbone": backbone}, folder, decay=0.01)
    log = Log(phase, steps)
    backbone.train()
    while phase.step < steps:
        generator = torch.Generator().manual_seed((seed * 10 + 5) * 10**6 + phase.step)
        rows = torch.randint(0, pictures, (_BATCH,), generator=generator)
        which = torch.randint(0, len(tasks.OLD), (_BATCH,), generator=generator)
        wanted = answers[which, rows]
        logits = backbone(backbone.visual_tokens(features[rows]), questions[which])
        loss = nn.functional.cross_entropy(logits, wanted)
        phase.update(loss, rate(phase.step, steps, _PEAK))
        right = (logits.argmax(-1) == wanted).float().mean()
        log.line(loss.item(), f"answers in this batch {right.item():.3f}")
        if phase.step % _SAVE_EVERY == 0 or phase.step == steps:
            phase.save()
    backbone.eval()


@torch.no_grad()
def accuracies(
    backbone: backbones.Backbone,
    model: InstructBlipForConditionalGeneration,
    held: data.Digits,
    seed: int,
) -> dict[str, float]:
    """Held-out share of right answers, for every instruction and the unseen one."""
    pairs = data.draw_pairs(held, 1000, seed=seed, augment=False)
    features = backbones.columns(small.image_features(model, pairs.pictures))
    visual = backbone.visual_tokens(features)
    result = {}
    for instruction in (*tasks.OLD, tasks.NEW):
        ids = tasks.question_ids((instruction,)).expand(len(pairs), -1)
        right = backbone(visual, ids).argmax(-1) == instruction.answer(pairs.left, pairs.right)
        result[instruction.text] = right.float().mean().item()
    return result


def main() -> None:
    """Train one backbone from scratch and write its weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=backbones.KINDS)
    parser.add_argument("--out", type=Path, help="file of the weights (default: in the package)")
    parser.add_argument(
        "--work", type=Path, default=Path("petal-pretrain"), help="folder of checkpoints"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--pictures", type=int, default=12000, help="pictures cached")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    out = args.out or backbones.weights(args.kind)
    digits, held = data.load_digits()
    model = small.load()
    backbone = backbones.build(args.kind, args.seed)
    train(backbone, model, digits, args.steps, args.pictures, args.work, args.seed)
    save_weights(backbone, out)
    shares = accuracies(backbones.load(args.kind, out), model, held, args.seed)
    figures = {
        "made_by": {key: getattr(args, key) for key in ("steps", "pictures", "seed")},
        "held_out": {key: round(value, 4) for key, value in shares.items()},
    }
    text = json.dumps(figures, indent=2)
    out.with_suffix(".json").write_text(text + "\n")
    print(text)
    spent = time.perf_counter() - began
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {spent:.0f} s")


if __name__ == "__main__":
    main()
