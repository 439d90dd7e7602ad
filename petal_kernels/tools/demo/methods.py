"""The demo's task through the other methods: what each attaches to, and its settings.

VL-PET and VL-Adapter adapt the encoder-decoder, routing functions and LoRA the decoder
(`backbones.py`). Everything else is as in the demo of PETAL: the same pictures, the same mix of new
and old instructions, the same bound for the two curves (`compare.py`).
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.tools.demo import backbones, tasks
from petal_kernels.tools.demo.train import Batches, Cached, Form, Settings, Trainer


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
# Hence the warm-up, too: Adam's first steps are as large for a gradient of rounding noise as for
# any other.
_SETTINGS = Settings(steps=150, rank=8, learning_rate=1e-2, warm_up=0.1, dropout=0.0, old_share=0.5)

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
        # Routing's own baseline, on q and v of GPT-2's one projection of both; LoraConfig would
        # adapt that whole.
        Method("lora", "LoRA", "gpt2", lambda r: pk.RoutingConfig(r=r, kind="lora"), _SETTINGS),
    )
}


def answer_logits(
    backbone: backbones.Backbone,
    attachment: pk.Attachment | None,
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


def form_of(backbone: backbones.Backbone, attachment: pk.Attachment | None = None) -> Form:
    """A backbone with an adapter, or without one."""
    return Form(backbone, functools.partial(answer_logits, backbone, attachment))


def bare_form(method: Method) -> Form:
    """The method's backbone without an adapter."""
    return form_of(backbones.load(method.kind).requires_grad_(False))


def attached(
    method: Method, batches: Batches, settings: Settings, implementation: str = "fused"
) -> Trainer:
    """A trained backbone with one method's adapter, drawn from the settings' seed."""
    backbone: Any = backbones.load(method.kind)
    torch.manual_seed(settings.seed)
    config = method.config(settings.rank)
    attachment = pk.attach(backbone, config, implementation=implementation)
    return Trainer(form_of(backbone, attachment), attachment, batches, settings)


def old_accuracy(shares: dict[str, float]) -> float:
    """The mean over the old instructions."""
    return statistics.mean(shares[entry.text] for entry in tasks.OLD)


def columns_of(cached: Cached) -> Cached:
    """The same pictures with the features that the backbones read."""
    return replace(cached, features=backbones.columns(cached.features))
