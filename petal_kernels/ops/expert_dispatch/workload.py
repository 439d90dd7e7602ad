"""Inputs, traffic, flops and baselines of ``expert_dispatch``, for tests and benchmarks only."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime.numerics import activate
from petal_kernels.ops.expert_dispatch import planner, reference

DIFFERENTIABLE = (
    "x",
    "down",
    "up",
    "down_bias",
    "up_bias",
    "base",
    "router",
    "router_bias",
    "noise",
    "gates",
)
ACTIVATIONS = ("x", "base", "noise", "gates", "indices")


@dataclass(frozen=True)
class Case:
    """One shape. ``lead`` are x's leading dims; ``base`` is "input", "given" or "none"; ``choice``
    says how "given" gates come: dense, with k "indices", or k "ones" (indices alone)."""

    name: str
    lead: tuple[int, ...]
    width: int
    experts: int
    rank: int
    out: int = 0  # 0: width
    gate: str = "softmax"
    top_k: int = 0  # also of indices
    renormalize: bool = True
    pooled: bool = False  # given: gates per sample
    mask: bool = False
    choice: str = "dense"
    base: str = "input"
    keep: float = 0.6
    mix: float = 0.4
    activation: str = "identity"
    bias: bool = True
    shared_down: bool = False
    noise: bool = False
    skew: str = "uniform"  # of the choice: "uniform", "one", "zipf"
    layout: str = "contiguous"
    plan: str = "auto"
    frozen: tuple[str, ...] = ()
    float_parameters: bool = False

    @property
    def rows(self) -> int:
        """N, the product of the leading dims."""
        return torch.Size(self.lead).numel()

    @property
    def outs(self) -> int:
        """O."""
        return self.out or self.width


def _topk(name: str, lead: tuple[int, ...], width: int, e: int, r: int, **more: Any) -> Case:
    rest: dict[str, Any] = {"top_k": 2, "keep": 1.0, "mix": 0.5, "noise": True} | more
    return Case(name, lead, width, e, r, **rest)


_GIVEN: dict[str, Any] = {"gate": "given"}
_PICKED: dict[str, Any] = {"gate": "given", "top_k": 2, "choice": "indices"}

CASES = (
    Case("mean", (3, 50), 64, 6, 16, gate="mean"),
    Case("mean-odd", (3, 47), 83, 5, 19, gate="mean", activation="gelu"),
    Case("softmax", (3, 50), 64, 6, 16),
    Case("softmax-odd", (3, 47), 83, 5, 19, activation="gelu_tanh", noise=True),
    _topk("topk", (3, 50), 64, 8, 16),
    _topk("topk-odd", (3, 47), 83, 5, 19, activation="silu", renormalize=False),
    Case("topk-one", (141,), 64, 4, 16, top_k=1, noise=True, activation="relu", renormalize=False),
    Case("pooled", (3, 50), 64, 6, 16, pooled=True, mask=True),
    Case("pooled-topk", (4, 37), 83, 6, 19, pooled=True, top_k=2, noise=True, activation="gelu"),
    Case("given", (3, 50), 64, 6, 16, **_GIVEN),
    Case("given-samples", (4, 37), 83, 5, 19, pooled=True, activation="gelu_tanh", **_GIVEN),
    Case("indices", (3, 50), 64, 6, 16, activation="silu", **_PICKED),
    _topk("topk-stationary", (3, 50), 64, 8, 16, plan="stationary", activation="gelu"),
    _topk("topk-sorted", (3, 50), 64, 8, 16, plan="sorted", activation="gelu"),
    _topk("topk-all", (3, 41), 64, 3, 16, top_k=3),
    _topk("topk-all-sorted", (3, 41), 64, 3, 16, top_k=3, plan="sorted"),
    _topk("topk-many", (260,), 48, 16, 24, plan="sorted", skew="zipf"),
    _topk("one-expert-gets-all", (200,), 64, 8, 16, top_k=1, plan="sorted", skew="one"),
    _topk("one-expert-stationary", (200,), 64, 8, 16, top_k=1, plan="stationary", skew="one"),
    _topk("fewer-tokens-than-experts", (5,), 64, 8, 16),
    _topk("fewer-tokens-stationary", (5,), 64, 8, 16, plan="stationary"),
    Case("domain", (3, 50), 64, 2, 16, top_k=1, choice="ones", activation="gelu", **_GIVEN),
    Case("indices-samples", (4, 37), 64, 6, 16, pooled=True, **_PICKED),
    Case("samples-stationary", (4, 70), 64, 6, 16, pooled=True, plan="stationary", **_PICKED),
    Case("lora", (3, 35), 64, 4, 8, base="given", out=56, keep=0.7, mix=2.0, bias=False),
    _topk("lora-topk", (3, 35), 64, 4, 8, base="given", out=72, bias=False),
    Case("no-base", (129,), 64, 4, 13, base="none", out=77, activation="silu"),
    _topk("no-base-topk", (129,), 64, 4, 13, base="none", out=77, plan="sorted"),
    Case("shared-down", (3, 50), 64, 4, 16, shared_down=True, base="given", out=96, keep=1.0),
    _topk("shared-down-topk", (3, 50), 64, 4, 16, shared_down=True, activation="gelu"),
    _topk("shared-down-stationary", (3, 50), 64, 4, 16, shared_down=True, plan="stationary"),
    Case("frozen-x", (3, 41), 64, 6, 16, frozen=("x",)),
    _topk("frozen-experts", (3, 41), 64, 6, 16, frozen=("down", "up", "down_bias", "up_bias")),
    Case("frozen-router", (3, 41), 64, 6, 16, frozen=("router", "router_bias"), gate="softmax"),
    Case("sliced-sequence", (3, 41), 64, 6, 16, layout="sliced"),
    _topk("strided-rows", (130,), 64, 6, 16, layout="strided"),
    Case("float-parameters", (3, 45), 64, 6, 16, float_parameters=True, activation="gelu_tanh"),
    _topk("float-parameters-topk", (3, 45), 64, 6, 16, float_parameters=True),
    Case("rank-1", (3, 30), 17, 3, 1),
    Case("rank-wide", (140,), 96, 3, 130, activation="gelu_tanh"),
    _topk("rank-wide-topk", (140,), 96, 4, 130, plan="sorted"),
    Case("one-expert", (3, 30), 64, 1, 16),
    _topk("one-row", (1,), 64, 6, 16),
    Case("one-token-mean", (2, 1), 64, 6, 16, gate="mean"),
    Case("empty", (0, 7), 64, 6, 16),
    _topk("empty-topk", (0, 7), 64, 6, 16),
)

SHAPES = (
    Case("petal mean E=6 r=64 N=4096", (128, 32), 768, 6, 64, gate="mean", frozen=("x",)),
    Case("petal softmax E=6 r=64 N=4096", (128, 32), 768, 6, 64),
    Case("petal softmax E=6 r=64 N=1024", (16, 64), 768, 6, 64),
    Case("petal pooled top-2 of 6 N=4096", (128, 32), 768, 6, 64, pooled=True, top_k=2),
    _topk("top-2 of 8 r=64 N=4096", (4096,), 768, 8, 64),
    _topk("top-2 of 8 r=64 N=4096 zipf", (4096,), 768, 8, 64, skew="zipf"),
    _topk("top-2 of 16 r=64 N=4096", (4096,), 768, 16, 64),
    _topk("lora top-2 of 8 r=16 N=4096", (4096,), 768, 8, 16, base="given", bias=False),
)


def _layout(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "sliced":
        return torch.cat((t, t[:, :5]), dim=1)[:, : t.shape[1]]
    if layout == "strided":
        return torch.cat((t, t), dim=-1)[..., : t.shape[-1]]
    return t


def _ranking(case: Case, lead: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Whole numbers 0 .. E - 1 in each row in random order, so that a choice is no matter of
    rounding; skewed towards the first experts on request."""
    uniform = torch.rand((*lead, case.experts), generator=g, dtype=torch.float64)
    if case.skew == "zipf":  # the order of a draw without replacement with weights 1 / (e + 1)
        weight = 1.0 / torch.arange(1, case.experts + 1, dtype=torch.float64)
        uniform = uniform.log() / weight
    if case.skew == "one":
        uniform[..., 0] = 2.0
    return uniform.argsort(-1).argsort(-1).double()


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the public function, its reference and its baselines."""
    g = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)

    def parameter(*shape: int, divisor: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64) / divisor
        wide = case.float_parameters and dtype.itemsize == 2
        return t.to(torch.float32 if wide else dtype).to(device)

    d, e, r, o = case.width, case.experts, case.rank, case.outs
    shared = 1 if case.shared_down else e
    inputs: dict[str, Any] = {
        "x": _layout(rows(*case.lead, d), case.layout),
        "down": parameter(shared, r, d, divisor=d**0.5),
        "up": parameter(e, o, r, divisor=r**0.5),
    }
    if case.bias:
        inputs["down_bias"], inputs["up_bias"] = parameter(shared, r), parameter(e, o)
    inputs["base"] = {"input": "input", "none": None}.get(case.base)
    if case.base == "given":
        inputs["base"] = rows(*case.lead, o)
    lead = case.lead[:1] if case.pooled else case.lead
    if case.gate == "softmax":
        inputs["router"] = parameter(e, d, divisor=8 * d**0.5)
        if case.bias:
            inputs["router_bias"] = parameter(e, divisor=8.0)
        if case.noise:
            inputs["noise"] = _ranking(case, lead, g).to(dtype).to(device)
        if case.pooled:
            inputs["router_input"] = "pooled"
        if case.mask:
            length = torch.randint(1, case.lead[1] + 1, (case.lead[0], 1), generator=g)
            inputs["mask"] = (torch.arange(case.lead[1]) < length).to(device)
        if case.top_k:
            inputs.update(top_k=case.top_k, renormalize=case.renormalize)
    elif case.gate == "given":
        if case.choice == "dense":
            inputs["gates"] = rows(*lead, e)
        else:
            picked = _ranking(case, lead, g).argsort(-1, descending=True)[..., : case.top_k]
            inputs["indices"] = picked.to(device)
            if case.choice == "indices":
                inputs["gates"] = rows(*lead, case.top_k)
    inputs.update(gate=case.gate, keep=case.keep, mix=case.mix, activation=case.activation)
    return inputs


def options(case: Case) -> dict[str, Any]:
    """Arguments of the public function that the reference does not know."""
    return {"plan": case.plan}


def frozen(case: Case) -> tuple[str, ...]:
    """Names of DIFFERENTIABLE inputs that this case does not train."""
    return case.frozen


def _plan(case: Case, device: str = "cpu") -> str:
    length = case.lead[1] if case.pooled else 1
    if case.plan != "auto":
        return case.plan
    return planner.choose(device, case.experts, case.rank, case.top_k, length)


def _middle(case: Case) -> int:
    """Bottleneck values per row that are kept."""
    if _plan(case) == "sorted":
        return case.top_k * case.rank
    return (1 if case.shared_down else case.experts) * case.rank


def bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Least bytes of forward and backward, parameters excluded.

    Forward: x and base read once, z and out written. Backward: x, z and dout read, dx written.
    """
    base = case.outs if case.base == "given" else 0
    fwd = case.width + base + case.outs + _middle(case)
    bwd = case.width + case.outs + _middle(case)
    bwd += 0 if "x" in case.frozen else case.width
    return case.rows * fwd * dtype.itemsize, case.rows * bwd * dtype.itemsize


def flops(case: Case) -> tuple[int, int]:
    """Multiply-adds times two of the experts that are used, forward and backward."""
    used = (case.top_k or case.experts) * case.rank
    down = case.rank if case.shared_down else used
    fwd = case.rows * (down * case.width + used * case.outs)
    bwd = case.rows * (down * case.width * (1 if "x" in case.frozen else 2) + 2 * used * case.outs)
    return 2 * fwd, 2 * bwd


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
        gates, indices = inputs.get("gates"), inputs.get("indices")
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


_BIASES = ("down_bias", "up_bias")
BASELINES = {"published": published, "eager": well_written}


def optional_baselines(case: Case, device: torch.device) -> dict[str, Any]:
    """Other engines for a choice of each token, where they can be had."""
    if not case.top_k or case.pooled or case.shared_down:
        return {}
    aligned = not any(size % 8 for size in (case.width, case.rank, case.outs))
    found: dict[str, Any] = {"grouped_mm": grouped} if aligned and hasattr(F, "grouped_mm") else {}
    if device.type == "cuda" and importlib.util.find_spec("scattermoe"):
        found["scattermoe"] = scattermoe
    return found


def saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """Exact bytes kept for backward when everything trainable is trained, parameters excluded."""
    n, e = case.rows, case.experts
    wide = 8 if dtype == torch.float64 else 4
    routed = case.gate == "softmax" and not case.pooled
    per_row = _middle(case)
    if "down" not in case.frozen or (routed and "router" not in case.frozen):
        per_row += case.width
    total = n * per_row * dtype.itemsize
    sort = _plan(case) == "sorted"
    if sort:
        total += 4 * (n * case.top_k + e + 1)
    if routed:
        total += n * e * wide
        total += n * e if case.top_k else 0
        total += n * e * dtype.itemsize if case.noise else 0
        return total
    rows, k = case.lead[0] if case.pooled else n, case.top_k
    total += rows * e if k else 0  # the choice
    if case.gate == "given":
        each = wide if case.choice == "ones" else dtype.itemsize
        total += rows * e * each
        total += rows * e * k * each if case.choice == "indices" else 0  # hits, for dgates
    elif case.gate == "softmax":  # pooled: the gates, the means and what formed them
        total += rows * (e + case.width) * wide
        total += n * wide if case.mask else 0
        total += rows * e * (wide + 1) if k else 0
    return total
