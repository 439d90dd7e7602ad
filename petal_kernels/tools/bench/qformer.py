"""A full-width InstructBLIP Q-Former step with random weights: what the adapters add to the frozen
model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.tools.bench.scenarios import Scenario, Step


@dataclass(frozen=True)
class QFormerCase:
    """InstructBLIP's Q-Former: 32 queries, ``text`` instruction tokens, 257 image tokens of width
    1408."""

    layers: int = 12
    batch: int = 16
    text: int = 32
    queries: int = 32
    image_tokens: int = 257
    image_width: int = 1408
    rank: int = 64
    variant: str = "release"


def _model(case: QFormerCase) -> nn.Module:
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    torch.manual_seed(0)
    config = InstructBlipQFormerConfig(
        num_hidden_layers=case.layers,
        encoder_hidden_size=case.image_width,
        cross_attention_frequency=2,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    model = InstructBlipQFormerModel(config)
    for p in model.parameters():
        p.requires_grad_(False)
    return model.train()


def _inputs(case: QFormerCase, device: torch.device) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 1000, (case.batch, case.text), generator=g)
    image = torch.randn(case.batch, case.image_tokens, case.image_width, generator=g)
    queries = torch.randn(1, case.queries, 768, generator=g).expand(case.batch, -1, -1)
    ones = torch.ones(case.batch, case.queries + case.text, dtype=torch.long)
    inputs = {
        "input_ids": tokens,
        "attention_mask": ones,
        "query_embeds": queries,
        "encoder_hidden_states": image,
    }
    return {k: v.to(device) for k, v in inputs.items()}


def qformer(case: QFormerCase, device: torch.device) -> Scenario:
    """Forward and backward without an optimizer: ``published`` first, then ``petal``, and the
    ``frozen`` floor.

    The floor is the same model without adapters, its embedding output made to require grad, so that
    its backward runs through every layer as the adapters' does.
    """
    base = _model(case)
    inputs = _inputs(case, device)
    every: list[Tensor] = []
    providers: dict[str, Step] = {}
    saved: dict[str, Any] = {}

    def add(label: str, model: nn.Module, parameters: list[Tensor]) -> None:
        def forward() -> Tensor:
            return model(**inputs).last_hidden_state

        def step() -> tuple[Tensor, ...]:
            out = forward()
            for p in parameters:
                p.grad = None
            out.square().mean().backward()
            return tuple(p.grad for p in parameters if p.grad is not None)

        providers[label] = step
        saved[label] = forward

    for label, implementation in (("published", "published"), ("petal", "fused")):
        model = copy.deepcopy(base).to(device)
        torch.manual_seed(2)
        att = pk.attach(
            model, pk.PetalConfig(r=case.rank, variant=case.variant), implementation=implementation
        )
        model.train()
        every.extend(model.parameters())
        add(label, model, list(att.parameters()))
    frozen = copy.deepcopy(base).to(device)
    frozen.embeddings.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())
    add("frozen", frozen, [])
    every.extend(frozen.parameters())
    size = f"{case.layers} layers, B={case.batch} L={case.text} R={case.rank}"
    name = f"Q-Former step, {size} {case.variant} fp32"
    return Scenario(name, providers, saved, every)


def adapter_tax(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """(step - frozen step) / frozen step of each implementation."""
    floor = rows["frozen"]["median"]
    return {k: round(rows[k]["median"] / floor - 1.0, 4) for k in ("published", "petal")}
