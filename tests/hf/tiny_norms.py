"""Tiny models whose frozen norms LoRA runs by the operator, and what a step of them gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import tiny_text

P = 0.25
ALL = ("language", "projector", "vision")
FAMILIES = (
    *("llama", "mistral", "gemma2", "t5", "bart", "gpt2", "bert", "roberta"),
    *("llava", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl"),
)
MODES = ("fused", "folded")


def attached(model: nn.Module, mode: str, **more: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    settings |= {"target_modules": "all-linear", "lora_dropout": P, "frozen_norms": mode} | more
    torch.manual_seed(1)
    return pk.attach(model, pk.LoraConfig(**settings))


def weighted(model: nn.Module) -> nn.Module:
    """With norms' weights and biases that differ."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name.lower():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


def built(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return weighted(tiny_text.build(family, dtype)).train()


def parts_of(family: str) -> dict[str, Any]:
    return {} if FAMILIES.index(family) < 8 else {"parts": ALL}


def step(model: Any, attachment: Any, family: str, seed: int = 3) -> dict[str, Tensor]:
    """Loss and gradients."""
    parameters = dict(attachment.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(seed)
    loss = model(**tiny_text.batch(family)).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(got: dict[str, Tensor], want: dict[str, Tensor], share: float = 2e-4) -> None:
    """Of a tensor's largest value: another order of sums in float32."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        apart = float((got[name].float() - value.float()).abs().max())
        assert apart <= share * max(float(value.abs().max()), 1e-3), name
