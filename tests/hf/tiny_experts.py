"""Tiny models with experts attached, and batches for them."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny, tiny_blip, tiny_text

SAME = 1e-9  # relative, in fp64
EXPERTS = 3


def lora(**more: Any) -> pk.ExpertConfig:
    return pk.ExpertConfig(**{"experts": EXPERTS, "r": 4, **more})


def adapter(**more: Any) -> pk.ExpertConfig:
    return lora(kind="adapter", **more)


def petal(**more: Any) -> pk.PetalConfig:
    return pk.PetalConfig(**{"r": 5, "dropout": 0.0, "experts": EXPERTS, "expert_r": 4, **more})


def build(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    if family in tiny.FAMILIES:
        return tiny.FAMILIES[family]().to(dtype)
    if family in tiny_blip.TASKS:
        return tiny_blip.build(family, dtype)
    return tiny_text.build(family, dtype)


def batch(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    if family in tiny_blip.TASKS:
        values = tiny_blip.batch(family, seed=seed)
    elif family in tiny.FAMILIES:
        values = tiny.batch(family, seed=seed)
    else:
        return tiny_text.batch(family, seed=seed)
    if "qformer_attention_mask" in values:
        values["qformer_attention_mask"][-1, 5:] = 0
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}


def attached(
    family: str, config: AdapterConfig, implementation: str = "fused"
) -> tuple[nn.Module, Any]:
    model = build(family)
    attachment = pk.attach(model, copy.deepcopy(config), implementation=implementation)
    tiny.randomise(attachment.adapter)
    model.to(torch.float64)
    return model, attachment


def domain_of(family: str, seed: int = 0) -> Tensor:
    """Of every position of the adapted stack's sequence."""
    values = batch(family, seed)
    if family not in tiny.FAMILIES:
        return values["input_ids"] % EXPERTS
    queries = torch.arange(tiny.QUERIES).expand(len(values["input_ids"]), -1)
    instruction = values.get("qformer_input_ids", queries[:, :0])
    return torch.cat((queries, instruction), dim=1) % EXPERTS


def read(family: str, model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(what the model's task reads, its loss)."""
    if family in tiny_blip.TASKS:
        out, loss = tiny_blip.forward(model, family, seed)
        return (loss if family == "vqa" else out), loss  # of an answer nothing else is returned
    out = model(**batch(family, seed))
    return out.logits, out.loss


def served(attachment: Any, family: str, seed: int = 0) -> contextlib.AbstractContextManager[Any]:
    if attachment.config.gate != "domain":
        return contextlib.nullcontext()
    return attachment.domains(domain_of(family, seed), generated=2, image=1)


def step(
    model: nn.Module, attachment: Any, family: str, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    for p in attachment.parameters():
        p.grad = None
    torch.manual_seed(9)  # router_noise
    with served(attachment, family, seed):
        out, loss = read(family, model.train(), seed)
    loss.backward()
    model.eval()
    return out.detach(), {n: p.grad.clone() for n, p in attachment.named_parameters()}


def logits(model: nn.Module, attachment: Any, family: str) -> Tensor:
    with torch.no_grad(), served(attachment, family):
        return read(family, model)[0]
