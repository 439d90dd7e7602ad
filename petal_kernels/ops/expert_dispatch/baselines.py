"""What ``expert_dispatch`` is measured against: the published eager form, a well-written one, other
engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime.numerics import activate
from petal_kernels.ops.expert_dispatch import reference

_BIASES = ("down_bias", "up_bias")


def _act(inputs: dict[str, Any], z: Tensor) -> Tensor:
    return activate(inputs["activation"], z)


def _start(inputs: dict[str, Any]) -> Tensor | None:
    base = inputs["base"]
    h = inputs["x"] if isinstance(base, str) else base
    return None if h is None else inputs["keep"] * h


def _gates(inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Gates that broadcast against [.., E], and the choice [.., k], as eager code forms them."""
    x, experts = inputs["x"], inputs["up"].shape[0]
    if inputs["gate"] == "mean":
        return x.new_full((experts,), 1.0 / experts), None
    if inputs["gate"] == "given":
        gates: Any = inputs.get("gates")
        indices: Tensor | None = inputs.get("indices")
        if indices is None:
            return gates, None
        return torch.ones_like(indices, dtype=x.dtype) if gates is None else gates, indices
    router_in = x
    if inputs.get("router_input") == "pooled":
        mask = inputs.get("mask")
        router_in = x.mean(1) if mask is None else reference.token_weights(mask, x).unsqueeze(1) @ x
        router_in = router_in.reshape(x.shape[0], x.shape[-1])
    logits = F.linear(router_in, inputs["router"], inputs.get("router_bias"))
    if inputs.get("noise") is not None:
        logits = logits + inputs["noise"]
    k = inputs.get("top_k")
    if k is None:
        return logits.softmax(-1), None
    if inputs.get("renormalize", True):
        values, indices = logits.topk(k, dim=-1)
        return values.softmax(-1), indices
    values, indices = logits.softmax(-1).topk(k, dim=-1)
    return values, indices


def _expert(inputs: dict[str, Any], e: int, x: Tensor) -> Tensor:
    own = e if inputs["down"].shape[0] > 1 else 0
    down_bias, up_bias = inputs.get("down_bias"), inputs.get("up_bias")
    z = F.linear(x, inputs["down"][own], None if down_bias is None else down_bias[own])
    bias = None if up_bias is None else up_bias[e]
    return F.linear(_act(inputs, z), inputs["up"][e], bias)


def published(**inputs: Any) -> tuple[Tensor]:
    """A loop over experts, as released: dense sums, or for a choice each expert's tokens gathered
    and added back."""
    gates, indices = _gates(inputs)
    x, start, experts = inputs["x"], _start(inputs), inputs["up"].shape[0]
    if indices is None:
        if gates.dim() > 1 and gates.dim() < x.dim():
            gates = gates.unsqueeze(1)
        total = sum(gates[..., e, None] * _expert(inputs, e, x) for e in range(experts))
        total = inputs["mix"] * total
        return (total if start is None else start + total,)
    flat = x.reshape(-1, x.shape[-1])
    if indices.dim() < x.dim():
        indices, gates = (t.repeat_interleave(x.shape[1], 0) for t in (indices, gates))
    indices, gates = indices.reshape(len(flat), -1), gates.reshape(len(flat), -1)
    total = flat.new_zeros(len(flat), inputs["up"].shape[1])
    for e in range(experts):
        token, slot = torch.where(indices == e)
        y = _expert(inputs, e, flat[token]) * gates[token, slot, None]
        total = total.index_add(0, token, y.to(total.dtype))
    total = inputs["mix"] * total.view(*x.shape[:-1], -1)
    return (total if start is None else start + total,)


def well_written(**inputs: Any) -> tuple[Tensor]:
    """All experts as one bottleneck of width E r; for a choice the tokens sorted once, each
    expert's rows multiplied, one addition back."""
    gates, indices = _gates(inputs)
    x, start, up = inputs["x"], _start(inputs), inputs["up"]
    experts, r = up.shape[0], up.shape[2]
    up_bias = inputs.get("up_bias")
    if indices is not None:
        return (_sorted(inputs, gates, indices, start),)
    if gates.dim() > 1 and gates.dim() < x.dim():
        gates = gates.unsqueeze(1)
    bias = inputs.get("down_bias")
    z = F.linear(x, inputs["down"].flatten(0, 1), None if bias is None else bias.flatten())
    a = _act(inputs, z).unflatten(-1, (-1, r)) * gates.unsqueeze(-1)
    total = F.linear(a.flatten(-2), up.permute(1, 0, 2).reshape(up.shape[1], experts * r))
    if up_bias is not None:
        total = total + gates @ up_bias
    return (
        inputs["mix"] * total if start is None else torch.add(start, total, alpha=inputs["mix"]),
    )


def _pairs(inputs: dict[str, Any], gates: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, expert) pairs sorted by expert: flat tokens, their experts, their gates."""
    if indices.dim() < inputs["x"].dim():
        indices, gates = (t.repeat_interleave(inputs["x"].shape[1], 0) for t in (indices, gates))
    experts, order = indices.reshape(-1).sort(stable=True)
    return order // indices.shape[-1], experts, gates.reshape(-1).index_select(0, order)


def _sorted(inputs: dict[str, Any], gates: Tensor, indices: Tensor, start: Tensor | None) -> Tensor:
    x = inputs["x"]
    flat = x.reshape(-1, x.shape[-1])
    token, experts, weight = _pairs(inputs, gates, indices)
    sizes = experts.bincount(minlength=inputs["up"].shape[0]).tolist()
    parts = flat.index_select(0, token).split(sizes)
    y = torch.cat([_expert(inputs, e, part) for e, part in enumerate(parts)])
    y = y * (inputs["mix"] * weight.unsqueeze(-1))
    total = (
        flat.new_zeros(len(flat), y.shape[-1]) if start is None else start.reshape(len(flat), -1)
    )
    return total.index_add(0, token, y).view(*x.shape[:-1], -1)


def grouped(**inputs: Any) -> tuple[Tensor]:
    """A choice by torch's grouped product: rows gathered, two products, one addition back."""
    gates, indices = _gates(inputs)
    assert indices is not None
    x, start, down_bias, up_bias = inputs["x"], _start(inputs), *map(inputs.get, _BIASES)
    flat = x.reshape(-1, x.shape[-1])
    token, experts, weight = _pairs(inputs, gates, indices)
    ends = experts.bincount(minlength=inputs["up"].shape[0]).cumsum(0).int()
    z = F.grouped_mm(flat.index_select(0, token), inputs["down"].transpose(1, 2), offs=ends)
    a = _act(inputs, z if down_bias is None else z + down_bias[experts])
    y = F.grouped_mm(a, inputs["up"].transpose(1, 2), offs=ends)
    y = (y if up_bias is None else y + up_bias[experts]) * (inputs["mix"] * weight.unsqueeze(-1))
    total = (
        flat.new_zeros(len(flat), y.shape[-1]) if start is None else start.reshape(len(flat), -1)
    )
    return (total.index_add(0, token, y).view(*x.shape[:-1], -1),)


def scattermoe(**inputs: Any) -> tuple[Tensor]:
    """A choice by ScatterMoE's parallel linears."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    gates, indices = _gates(inputs)
    assert indices is not None
    x, start = inputs["x"], _start(inputs)
    flat, k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
    gates, indices = gates.reshape(-1, k), indices.reshape(-1, k)
    sort = flatten_sort_count(indices, inputs["up"].shape[0])
    down, up = (inputs[name].transpose(1, 2) for name in ("down", "up"))
    down_bias, up_bias = map(inputs.get, _BIASES)
    a = _act(inputs, parallel_linear(flat, down, k, *sort, down_bias, grouped_out=True))
    y = parallel_linear(a, up, 1, *sort, up_bias, gates=gates, grouped_in=True)
    y = inputs["mix"] * y.view(*x.shape[:-1], -1)
    return (y if start is None else start + y,)


BASELINES = {"published": published, "eager": well_written}
