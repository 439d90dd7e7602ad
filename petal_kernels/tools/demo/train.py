"""Adapting the small model to the new instruction: batches, steps, accuracies, checkpoints.

A step is a function of (settings, step number, adapter, optimizer, torch's generator): its batch is
drawn from the step number. A checkpoint holds the rest, so a resumed run walks the same curve bit
for bit.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration

import petal_kernels as pk
from petal_kernels.tools.demo import data, tasks
from petal_kernels.tools.demo import model as small

_EVALUATION_SEED = 7


@dataclass(frozen=True)
class Settings:
    """Everything that decides the curve."""

    steps: int = 200
    batch: int = 128
    rank: int = 32
    experts: int = 6
    expert_rank: int = 16
    learning_rate: float = 1e-2
    warm_up: float = 0.0  # share of the steps
    dropout: float = 0.1
    old_share: float = 0.3
    pictures: int = 4000
    held_out: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Cached:
    """Pictures with the frozen vision tower's features, computed once."""

    pairs: data.Pairs
    features: Tensor

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass
class Curve:
    """What a run has shown so far."""

    losses: list[float] = field(default_factory=list)
    accuracy_steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    # At the accuracy steps: the mean gate of each expert by instruction, and 1 where all are equal.
    expert_usage: list[dict[str, list[float]]] = field(default_factory=list)
    expert_balance: list[float] = field(default_factory=list)


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def cache(model: InstructBlipForConditionalGeneration, settings: Settings) -> tuple[Cached, Cached]:
    """Training pictures and held-out pictures of the run."""
    train, held = data.load_digits()
    train_pairs = data.draw_pairs(train, settings.pictures, seed=settings.seed + 1000, augment=True)
    held_pairs = data.draw_pairs(held, settings.held_out, seed=_EVALUATION_SEED, augment=False)
    return (
        Cached(train_pairs, small.image_features(model, train_pairs.pictures)),
        Cached(held_pairs, small.image_features(model, held_pairs.pictures)),
    )


def adapter_config(settings: Settings) -> pk.PetalConfig:
    """The PETAL configuration that these settings ask for."""
    return pk.PetalConfig(
        r=settings.rank,
        variant="paper",
        dropout=settings.dropout,
        experts=settings.experts,
        expert_r=settings.expert_rank,
    )


@dataclass(frozen=True)
class Batch:
    """Cached picture features, an instruction and the answers to it."""

    features: Tensor
    questions: Tensor
    answers: Tensor


class Batches:
    """Batch number i: the new instruction, and a share of old ones to keep them."""

    def __init__(self, cached: Cached, settings: Settings) -> None:
        self.cached, self.settings = cached, settings
        instructions = (tasks.NEW, *tasks.OLD)
        self.questions = tasks.question_ids(instructions)
        self.answers = tasks.answer_table(instructions, cached.pairs.left, cached.pairs.right)

    def __getitem__(self, step: int) -> Batch:
        count = self.settings.batch
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        rows = torch.randint(0, len(self.cached), (count,), generator=generator)
        which = torch.randint(1, len(self.questions), (count,), generator=generator)
        is_new = torch.rand(count, generator=generator) >= self.settings.old_share
        which = torch.where(is_new, 0, which)
        return Batch(self.cached.features[rows], self.questions[which], self.answers[which, rows])


@dataclass(frozen=True)
class Form:
    """A model, with an adapter or without one, and the logits of its answers' first word [N, words]
    from cached features and questions.
    """

    model: nn.Module
    logits: Callable[[Tensor, Tensor], Tensor]

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the answers' first word."""
        return nn.functional.cross_entropy(
            self.logits(batch.features, batch.questions), batch.answers
        )


def form_of(model: InstructBlipForConditionalGeneration) -> Form:
    """The InstructBLIP, with whatever is attached to it."""

    def logits(features: Tensor, questions: Tensor) -> Tensor:
        return small.answer_logits(model, features, questions)[:, 0]

    return Form(model, logits)


def bare_form() -> Form:
    """No adapter; the gradient still flows through the Q-Former to its queries."""
    model = small.load()
    model.requires_grad_(False)
    model.query_tokens.requires_grad_(True)
    return form_of(model)


class Trainer:
    """One model with its attached adapter and the adapter's optimizer."""

    def __init__(
        self, form: Form, attachment: pk.Attachment, batches: Batches, settings: Settings
    ) -> None:
        self.form, self.attachment, self.batches = form, attachment, batches
        self.settings = settings
        self.parameters = list(attachment.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=0.0
        )
        self.curve = Curve()

    @property
    def model(self) -> Any:  # of the class that the form was made of
        return self.form.model

    @property
    def step_number(self) -> int:
        return len(self.curve.losses)

    def step(self) -> float:
        """One training step; returns its loss."""
        done, settings = self.step_number, self.settings
        warm_up = int(settings.warm_up * settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(done, settings.steps, settings.learning_rate, warm_up)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.form.loss(self.batches[done])
        loss.backward()
        self.optimizer.step()
        self.curve.losses.append(loss.item())
        return self.curve.losses[-1]

    def run(self, until: int) -> Iterator[float]:
        """Steps in training mode until step number `until`."""
        while self.step_number < until:
            self.model.train()
            yield self.step()
        self.model.eval()

    def save(self, folder: Path, notes: dict[str, Any]) -> Path:
        """Writes checkpoint-<step> under a temporary name, renames it, removes the older ones."""
        final = folder / f"checkpoint-{self.step_number:06d}"
        temporary = folder / f".{final.name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.attachment.save(temporary / "adapter")
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "generator": torch.get_rng_state()},
            temporary / "optimizer.pt",
        )
        state = {"settings": asdict(self.settings), "curve": asdict(self.curve), "notes": notes}
        (temporary / "state.json").write_text(json.dumps(state))
        older = [path for path in checkpoints(folder) if path != final]
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
        return final

    def restore(self, checkpoint: Path) -> None:
        """Adapter, optimizer, generator and curve of a checkpoint made with the same settings."""
        state = read_state(checkpoint)
        self.attachment.load(checkpoint / "adapter")
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["generator"])
        self.curve = Curve(**state["curve"])


def attached(
    model: InstructBlipForConditionalGeneration,
    batches: Batches,
    settings: Settings,
    implementation: str = "fused",
) -> Trainer:
    """The InstructBLIP with PETAL on it, whose parameters are drawn from the settings' seed."""
    torch.manual_seed(settings.seed)
    attachment = pk.attach(model, adapter_config(settings), implementation=implementation)
    return Trainer(form_of(model), attachment, batches, settings)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest last."""
    return sorted(folder.glob("checkpoint-[0-9]*"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Settings, curve and notes of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


@torch.no_grad()
def accuracy(form: Form, cached: Cached, instruction: tasks.Instruction) -> float:
    """Share of the cached pictures whose best first word answers the instruction."""
    form.model.eval()
    ids = tasks.question_ids((instruction,))
    parts = [
        form.logits(part, ids.expand(part.shape[0], -1)).argmax(-1)
        for part in cached.features.split(250)
    ]
    wanted = instruction.answer(cached.pairs.left, cached.pairs.right)
    return (torch.cat(parts) == wanted).float().mean().item()


def all_accuracies(form: Form, cached: Cached) -> dict[str, float]:
    """`accuracy` of every instruction, by its text."""
    return {entry.text: accuracy(form, cached, entry) for entry in (tasks.NEW, *tasks.OLD)}


def baselines(train: Cached, held: Cached) -> dict[str, float]:
    """What one gets on the new instruction without looking well: the fair figures to stand beside
    the result.
    """
    wanted = tasks.NEW.answer(held.pairs.left, held.pairs.right)
    common = tasks.NEW.answer(train.pairs.left, train.pairs.right).mode().values
    left = tasks.OLD[0].answer(held.pairs.left, held.pairs.right)
    right = tasks.OLD[1].answer(held.pairs.left, held.pairs.right)
    return {
        "always the left digit": (left == wanted).float().mean().item(),
        "always the right digit": (right == wanted).float().mean().item(),
        f"always {tasks.WORDS[int(common)]!r}": (wanted == common).float().mean().item(),
    }


@torch.no_grad()
def expert_usage(
    form: Form, attachment: pk.Attachment, cached: Cached, pictures: int = 8
) -> dict[str, list[float]]:
    """Mean gate of each expert over the tokens of an instruction, by the instruction's text."""
    form.model.eval()
    found = {}
    for instruction in (tasks.NEW, *tasks.OLD):
        questions = tasks.question_ids((instruction,)).expand(pictures, -1)
        form.logits(cached.features[:pictures], questions)
        (usage,) = attachment.expert_usage().values()
        found[instruction.text] = usage.tolist()
    return found


def balance(usage: dict[str, list[float]]) -> float:
    """E times the sum of squared mean shares: 1 where all experts serve alike, E where one does."""
    shares = torch.tensor(list(usage.values())).mean(0)
    return len(shares) * shares.square().sum().item()
