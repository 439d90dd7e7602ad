"""VL-PET, VL-Adapter and routing on tiny models: the configs, a step, and how near two are."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny, tiny_text

SAME = 1e-9  # relative, in fp64
VLMS = ("llava", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl")


def vlpet(**more: Any) -> pk.VLPetConfig:
    return pk.VLPetConfig(r=6, value_r=4, scale=0.7, **more)


def routing(**more: Any) -> pk.RoutingConfig:
    return pk.RoutingConfig(r=6, **more)


CASES: dict[str, tuple[str, AdapterConfig]] = {
    **{f"bart-{g}": ("bart", vlpet(gate=g)) for g in ("large", "middleX", "middleY", "small")},
    "bart-release": ("bart", vlpet(gate="middleX", variant="release")),
    "bart-vladapter": ("bart", pk.VLAdapterConfig(r=6)),
    "bart-routing": ("bart", routing(kind="adapter", function="gram")),
    "bart-lora": ("bart", routing(function="mul")),
    **{f"t5-{g}": ("t5", vlpet(gate=g)) for g in ("large", "small")},
    "t5-release": ("t5", vlpet(gate="large", variant="release", init="zero")),
    "t5-vladapter": ("t5", pk.VLAdapterConfig(r=6)),
    **{f"gpt2-lora-{f}": ("gpt2", routing(function=f)) for f in ("none", "add", "expand", "gram")},
    "gpt2-merged": ("gpt2", routing(function="gram", groups="merged", train_bias=True)),
    "gpt2-adapter": ("gpt2", routing(kind="adapter", function="mul", share=True)),
    "roberta-lora": ("roberta", routing(function="mul", alpha=12.0)),
    "roberta-adapter": ("roberta", routing(kind="adapter", function="expand", residual=False)),
    **{f"{f}-lora": (f, routing(function="gram")) for f in VLMS},
    "llava-adapter": ("llava", routing(kind="adapter", function="add")),
}
EVERY = [pytest.param(*case, id=name) for name, case in CASES.items()]
SOME = [
    pytest.param(*CASES[name], id=name)
    for name in ("bart-large", "bart-small", "t5-large", "gpt2-merged", "llava-adapter")
]


def routed(config: AdapterConfig) -> bool:
    return getattr(config, "function", "none") != "none"


def attached(
    family: str, config: AdapterConfig, implementation: str = "fused"
) -> tuple[nn.Module, Any]:
    model = tiny_text.build(family)
    attachment = pk.attach(model, copy.deepcopy(config), implementation=implementation)
    tiny.randomise(attachment.adapter)
    model.to(torch.float64)
    return model, attachment


def seeing(
    attachment: Any, config: AdapterConfig, **kind: Any
) -> contextlib.AbstractContextManager[Any]:
    if not routed(config):
        return contextlib.nullcontext()
    return attachment.vision(tiny_text.features(**kind))


def step(
    model: nn.Module, attachment: Any, family: str, config: AdapterConfig, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    for p in attachment.parameters():
        p.grad = None
    with seeing(attachment, config, tokens=3, seed=seed + 3):
        out = model(**tiny_text.batch(family, seed=seed))
    out.loss.backward()
    grads = {}
    for name, p in attachment.named_parameters():
        assert p.grad is not None, name
        grads[name] = p.grad.clone()
    return out.logits.detach(), grads


def close(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=SAME, atol=SAME)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = float((got[1][name] - gradient).norm())
        assert error <= SAME * max(float(gradient.norm()), 1.0), name
