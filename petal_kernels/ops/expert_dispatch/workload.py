"""Inputs, traffic and flops of ``expert_dispatch``, for tests and benchmarks only."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels.ops.expert_dispatch import baselines, planner
from petal_kernels.ops.expert_dispatch.baselines import BASELINES as BASELINES

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


def optional_baselines(case: Case, device: torch.device) -> dict[str, Any]:
    """Other engines for a choice of each token, where they can be had."""
    if not case.top_k or case.pooled or case.shared_down:
        return {}
    aligned = not any(size % 8 for size in (case.width, case.rank, case.outs))
    found: dict[str, Any] = (
        {"grouped_mm": baselines.grouped} if aligned and hasattr(F, "grouped_mm") else {}
    )
    if device.type == "cuda" and importlib.util.find_spec("scattermoe"):
        found["scattermoe"] = baselines.scattermoe
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
