"""The demo's task through the other methods: what each attaches to, its steps, and fused beside
published.

VL-PET and VL-Adapter adapt the encoder-decoder, routing functions and LoRA the decoder
(`backbones.py`). Everything else is as in the demo of PETAL: the same pictures, the same mix of new
and old instructions, the same bound for the two curves (`compare.py`).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.insertion.attachment import InsertionAttachment
from petal_kernels.tools.demo import backbones, tasks
from petal_kernels.tools.demo.compare import (
    Comparison,
    Tick,
    _nudge,
    _share_parameters,
    curve_bound,
    largest_difference,
)
from petal_kernels.tools.demo.pretrain import rate
from petal_kernels.tools.demo.train import Batch, Batches, Cached, Settings, Trainer

_CONTROLS = 2
# The first tenth of the steps is a warm-up: Adam's first steps are as large for a gradient of
# rounding noise as for any other, and routes multiply what comes of that.
_WARMUP = 10


@dataclass(frozen=True)
class Method:
    """One method of the table below: its backbone, its config at a rank, its settings."""

    name: str
    label: str
    kind: str
    config: Callable[[int], AdapterConfig]
    settings: Settings


# Dropout off: the backbones have none. Half of a batch are old questions: "smaller" and "larger"
# differ in one word only, and so few parameters forget the one while they learn the other. Routes
# multiply features: at larger rates their training amplifies rounding until no bound says anything.
_SETTINGS = Settings(steps=150, rank=8, learning_rate=1e-2, dropout=0.0, old_share=0.5)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "vlpet",
            "VL-PET (large gate)",
            "bart",
            # s * G = 1 at step 0, so that training starts from the backbone's own answers.
            lambda r: pk.VLPetConfig(r=r, value_r=r, gate="large", init="identity", scale=2.0),
            _SETTINGS,
        ),
        Method("vladapter", "VL-Adapter", "bart", lambda r: pk.VLAdapterConfig(r=r), _SETTINGS),
        Method(
            "routing-lora",
            "routing LoRA (mul)",
            "gpt2",
            lambda r: pk.RoutingConfig(r=r, kind="lora", function="mul"),
            replace(_SETTINGS, rank=16, learning_rate=5e-3),
        ),
        Method(
            "routing-adapter",
            "routing adapters (gram)",
            "gpt2",
            lambda r: pk.RoutingConfig(r=r, kind="adapter", function="gram"),
            replace(_SETTINGS, learning_rate=3e-3),
        ),
        Method("lora", "LoRA", "gpt2", lambda r: pk.RoutingConfig(r=r, kind="lora"), _SETTINGS),
    )
}


def answer_logits(
    backbone: backbones.Backbone,
    attachment: InsertionAttachment | None,
    features: Tensor,
    questions: Tensor,
) -> Tensor:
    """Logits of the answer from cached features; a routed adapter reads the visual tokens too."""
    visual = backbone.visual_tokens(features)
    if attachment is None:
        # No adapter: the gradient flows through the same layers, to their input.
        visual.requires_grad_(torch.is_grad_enabled())
    seeing: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if attachment is not None and getattr(attachment.config, "function", "none") != "none":
        seeing = attachment.vision(visual)
    with seeing:
        logits: Tensor = backbone(visual, questions)
    return logits


@dataclass(frozen=True)
class Form:
    """A backbone with an adapter, or without one."""

    backbone: backbones.Backbone
    attachment: InsertionAttachment | None = None

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the answers."""
        logits = answer_logits(self.backbone, self.attachment, batch.features, batch.questions)
        return nn.functional.cross_entropy(logits, batch.answers)


class MethodTrainer(Trainer):
    """A trained backbone with one method's adapter and the adapter's optimizer."""

    def __init__(
        self, method: Method, batches: Batches, settings: Settings, implementation: str = "fused"
    ) -> None:
        backbone: Any = backbones.load(method.kind)
        torch.manual_seed(settings.seed)
        config = method.config(settings.rank)
        attachment = pk.attach(backbone, config, implementation=implementation)  # type: ignore[operator]
        assert isinstance(attachment, InsertionAttachment)
        super().__init__(backbone, attachment, batches, settings)
        self.form = Form(backbone, attachment)

    def step(self) -> float:
        """One training step; returns its loss."""
        done, total = self.step_number, self.settings.steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate(done, total, self.settings.learning_rate, warmup=total // _WARMUP)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.form.loss(self.batches[done])
        loss.backward()
        self.optimizer.step()
        self.curve.losses.append(loss.item())
        return self.curve.losses[-1]


@torch.no_grad()
def accuracy(trainer: MethodTrainer, cached: Cached, instruction: tasks.Instruction) -> float:
    """Share of the cached pictures whose best word answers the instruction."""
    trainer.form.backbone.eval()
    ids = tasks.question_ids((instruction,))
    parts = [
        answer_logits(
            trainer.form.backbone, trainer.form.attachment, part, ids.expand(part.shape[0], -1)
        ).argmax(-1)
        for part in cached.features.split(250)
    ]
    wanted = instruction.answer(cached.pairs.left, cached.pairs.right)
    return (torch.cat(parts) == wanted).float().mean().item()


def all_accuracies(trainer: MethodTrainer, cached: Cached) -> dict[str, float]:
    """`accuracy` of every instruction, by its text."""
    return {e.text: accuracy(trainer, cached, e) for e in (tasks.NEW, *tasks.OLD)}


def old_accuracy(shares: dict[str, float]) -> float:
    """The mean over the old instructions."""
    return statistics.mean(shares[entry.text] for entry in tasks.OLD)


def columns_of(cached: Cached) -> Cached:
    """The same pictures with the features that the backbones read."""
    return replace(cached, features=backbones.columns(cached.features))


def compare(
    method: Method, batches: Batches, settings: Settings, steps: int, timed: int, tick: Tick
) -> Comparison:
    """Fused and published from one seed, and each one's time and bytes, as `compare.compare`."""
    total = steps * (2 + _CONTROLS) + timed
    done = 0
    trainers = {"fused": MethodTrainer(method, batches, settings)}
    for name in ("published", *(f"control {i}" for i in range(_CONTROLS))):
        trainers[name] = MethodTrainer(method, batches, settings, "published")
    _share_parameters({**trainers})
    generator = torch.Generator().manual_seed(settings.seed)
    for i in range(_CONTROLS):
        _nudge(trainers[f"control {i}"].parameters, generator)
    for _ in range(steps):
        for trainer in trainers.values():
            trainer.step()
            done += 1
            tick(done, total)
    fused, published = trainers["fused"], trainers["published"]
    bare = Form(backbones.load(method.kind).requires_grad_(False))
    forms = {"frozen": bare, "published": published.form, "fused": fused.form}
    milliseconds = _times(forms, batches, timed, lambda count: tick(done + count, total))
    controls = [trainers[f"control {i}"].curve.losses for i in range(_CONTROLS)]
    return Comparison(
        steps=steps,
        fused_losses=fused.curve.losses,
        published_losses=published.curve.losses,
        max_difference=largest_difference(fused.curve.losses, published.curve.losses),
        bound=curve_bound(published.curve.losses, controls),
        milliseconds=milliseconds,
        saved_bytes={name: saved_bytes(form, batches[0]) for name, form in forms.items()},
        trainable=sum(p.numel() for p in fused.parameters),
        total=sum(p.numel() for p in bare.backbone.parameters()),
    )


def _times(
    forms: dict[str, Form], batches: Batches, count: int, tick: Callable[[int], None]
) -> dict[str, float]:
    """Median milliseconds of forward + backward, the forms taking turns on the same batches."""
    spent: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form.backbone.train()
        form.loss(batches[0]).backward()
    for i in range(count):
        batch = batches[i]
        for name, form in forms.items():
            form.backbone.zero_grad(set_to_none=True)
            began = time.perf_counter()
            form.loss(batch).backward()
            spent[name].append(1000.0 * (time.perf_counter() - began))
        tick(i + 1)
    for form in forms.values():
        form.backbone.zero_grad(set_to_none=True)
        form.backbone.eval()
    return {name: statistics.median(values) for name, values in spent.items() if values}


def saved_bytes(form: Form, batch: Batch) -> int:
    """Bytes that the graph of one training step keeps: each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in form.backbone.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    form.backbone.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = form.loss(batch)
    # The graph is alive until here, so no address was used twice.
    del loss
    form.backbone.eval()
    return sum(kept.values())
