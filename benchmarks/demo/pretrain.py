"""Trains the small model of the demo from nothing and writes its weights.

Run it as: python -m benchmarks.demo.pretrain

Two phases on the training digits only (the held-out digits are used to print accuracies and for
nothing else):

1. The vision tower, with throw-away heads: a digit from the mean of each half of the patches, and
   "side and digit" from every single patch. The second loss is what makes a patch tell its side;
   without it the Q-Former can read digits but cannot answer "left" or "right".
2. The tower frozen and its features cached: Q-Former, projection and language model on the old
   instructions.

Each step draws its batch from (seed, phase, step), so a run that was stopped goes on as if it had
not been.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration

from petal_kernels.tools.demo import data, tasks
from petal_kernels.tools.demo.model import (
    GRID,
    WEIGHTS,
    WIDTH,
    answer_logits,
    build,
    image_features,
    load,
)
from petal_kernels.tools.demo.train import rate

_SAVE_EVERY = 100
_PRINT_EVERY = 100


class SideHeads(nn.Module):
    """The heads of phase 1."""

    def __init__(self) -> None:
        super().__init__()
        self.of_half = nn.Linear(WIDTH, 10)
        self.of_patch = nn.Linear(WIDTH, 20)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 1 + patches, WIDTH] -> logits of the halves [N, 2, 10] and of the patches
        [N, patches, 20].
        """
        patches = features[:, 1:]
        halves = patches.unflatten(1, (GRID, 2, GRID // 2)).mean(dim=(1, 3))
        return self.of_half(halves), self.of_patch(patches)


def vision_loss(heads: SideHeads, features: Tensor, pairs: data.Pairs) -> tuple[Tensor, Tensor]:
    """The loss of phase 1, and how many of the digits are read right."""
    half_logits, patch_logits = heads(features)
    digits = torch.stack([pairs.left, pairs.right], dim=1)
    side = torch.arange(2).repeat_interleave(GRID // 2).repeat(GRID)
    wanted = digits[:, side] + 10 * side
    loss = nn.functional.cross_entropy(
        half_logits.flatten(0, 1), digits.flatten(), label_smoothing=0.05
    )
    loss = loss + 0.5 * nn.functional.cross_entropy(patch_logits.flatten(0, 1), wanted.flatten())
    return loss, (half_logits.argmax(-1) == digits).float().mean()


class Phase:
    """One optimised set of modules with a checkpoint file."""

    def __init__(
        self, name: str, modules: dict[str, nn.Module], folder: Path, decay: float
    ) -> None:
        self.name, self.modules, self.path = name, modules, folder / f"{name}.pt"
        parameters = [
            p for module in modules.values() for p in module.parameters() if p.requires_grad
        ]
        self.parameters = list(dict.fromkeys(parameters))
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state[key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            print(f"{name}: going on at step {self.step}", flush=True)

    def update(self, loss: Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1

    def save(self) -> None:
        state: dict[str, Any] = {key: module.state_dict() for key, module in self.modules.items()}
        state.update(optimizer=self.optimizer.state_dict(), step=self.step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(self.path)


class Log:
    """Prints a line now and then, with the time per step."""

    def __init__(self, phase: Phase, steps: int) -> None:
        self.phase, self.steps = phase, steps
        self.mark, self.since = phase.step, time.perf_counter()

    def line(self, loss: float, extra: str) -> None:
        step = self.phase.step
        if step % _PRINT_EVERY and step != self.steps:
            return
        spent = (time.perf_counter() - self.since) / max(1, step - self.mark)
        self.mark, self.since = step, time.perf_counter()
        print(
            f"{self.phase.name} {step}/{self.steps}  loss {loss:.4f}  {extra}  "
            f"{1000 * spent:.0f} ms/step, {spent * (self.steps - step):.0f} s left",
            flush=True,
        )


def train_vision(
    model: InstructBlipForConditionalGeneration,
    train: data.Digits,
    held: data.Digits,
    steps: int,
    folder: Path,
    seed: int,
) -> float:
    """Phase 1; returns the share of held-out digits that the throw-away head reads right."""
    torch.manual_seed(seed)
    heads = SideHeads()
    phase = Phase("vision", {"tower": model.vision_model, "heads": heads}, folder, decay=0.05)
    log = Log(phase, steps)
    while phase.step < steps:
        pairs = data.draw_pairs(train, 64, seed=(seed * 10 + 1) * 10**6 + phase.step, augment=True)
        features = model.vision_model(
            pixel_values=pairs.pictures.expand(-1, 3, -1, -1)
        ).last_hidden_state
        loss, right = vision_loss(heads, features, pairs)
        phase.update(loss, rate(phase.step, steps, 1.5e-3))
        log.line(loss.item(), f"digits in this batch {right.item():.3f}")
        if phase.step % _SAVE_EVERY == 0 or phase.step == steps:
            phase.save()
    pairs = data.draw_pairs(held, 1000, seed=seed, augment=False)
    with torch.no_grad():
        share = vision_loss(heads, image_features(model, pairs.pictures), pairs)[1].item()
    print(f"vision: {share:.3f} of the held-out digits", flush=True)
    return share


def train_language(
    model: InstructBlipForConditionalGeneration,
    train: data.Digits,
    steps: int,
    pictures: int,
    folder: Path,
    seed: int,
) -> None:
    """Phase 2."""
    model.vision_model.requires_grad_(False)
    pairs = data.draw_pairs(train, pictures, seed=(seed * 10 + 2) * 10**6, augment=True)
    began = time.perf_counter()
    features = image_features(model, pairs.pictures)
    print(f"features of {pictures} pictures: {time.perf_counter() - began:.0f} s", flush=True)
    questions = tasks.question_ids(tasks.OLD)
    answers = tasks.answer_table(tasks.OLD, pairs.left, pairs.right)
    queries = nn.ParameterList([model.query_tokens])
    modules: dict[str, nn.Module] = {
        "queries": queries,
        "qformer": model.qformer,
        "projection": model.language_projection,
        "language": model.language_model,
    }
    phase = Phase("language", modules, folder, decay=0.01)
    log = Log(phase, steps)
    while phase.step < steps:
        generator = torch.Generator().manual_seed((seed * 10 + 3) * 10**6 + phase.step)
        rows = torch.randint(0, pictures, (128,), generator=generator)
        which = torch.randint(0, len(tasks.OLD), (128,), generator=generator)
        wanted = torch.stack([answers[which, rows], torch.full((128,), tasks.EOS)], dim=1)
        logits = answer_logits(model, features[rows], questions[which], wanted[:, :1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        phase.update(loss, rate(phase.step, steps, 1e-3))
        right = (logits[:, 0].argmax(-1) == wanted[:, 0]).float().mean()
        log.line(loss.item(), f"answers in this batch {right.item():.3f}")
        if phase.step % _SAVE_EVERY == 0 or phase.step == steps:
            phase.save()


@torch.no_grad()
def accuracies(
    model: InstructBlipForConditionalGeneration, held: data.Digits, seed: int
) -> dict[str, float]:
    """Held-out share of right first answer words, for every instruction and the unseen one."""
    pairs = data.draw_pairs(held, 1000, seed=seed, augment=False)
    features = image_features(model, pairs.pictures)
    result = {}
    for instruction in (*tasks.OLD, tasks.NEW):
        ids = tasks.question_ids((instruction,)).expand(len(pairs), -1)
        answer = answer_logits(model, features, ids)[:, 0].argmax(-1)
        result[instruction.text] = (
            (answer == instruction.answer(pairs.left, pairs.right)).float().mean().item()
        )
    return result


def save_weights(model: nn.Module, path: Path) -> None:
    """Half-precision weights, tied ones once."""
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in names:
            names[value.data_ptr()] = name
            tensors[name] = value.detach().to(torch.float16).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary, metadata={"format": "pt"})
    # safetensors makes a file for its owner only; this one is installed with the package.
    temporary.chmod(0o644)
    temporary.replace(path)


def main() -> None:
    """Train the small model from scratch and write its weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file of the weights")
    parser.add_argument(
        "--work", type=Path, default=Path("petal-pretrain"), help="folder of checkpoints"
    )
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--language-steps", type=int, default=2500)
    parser.add_argument("--pictures", type=int, default=16000, help="pictures cached in phase 2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    train, held = data.load_digits()
    model = build(args.seed)
    digits = train_vision(model, train, held, args.vision_steps, args.work, args.seed)
    train_language(model, train, args.language_steps, args.pictures, args.work, args.seed)
    save_weights(model, args.out)
    made_by = {
        key: getattr(args, key) for key in ("vision_steps", "language_steps", "pictures", "seed")
    }
    shares = {"single digits": digits, **accuracies(load(args.out), held, args.seed)}
    figures = {"made_by": made_by, "held_out": {key: round(v, 4) for key, v in shares.items()}}
    text = json.dumps(figures, indent=2)
    args.out.with_suffix(".json").write_text(text + "\n")
    print(text)
    spent = time.perf_counter() - began
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {spent:.0f} s")


if __name__ == "__main__":
    main()
