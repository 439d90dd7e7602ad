"""Inputs, traffic, flops and baselines of ``gated_bottleneck``, for tests and benchmarks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox
from petal_kernels._runtime.numerics import activate
from petal_kernels.ops.gated_bottleneck import reference

DIFFERENTIABLE = (
    "x",
    "down",
    "up",
    "down_bias",
    "up_bias",
    "base",
    "bottleneck",
    "vision",
    "gate_input",
    "gate_down",
    "gate_down_bias",
    "gate_up",
    "gate_up_bias",
    "gate_weight",
    "gate_bias",
    "residual",
    "norm_weight",
    "norm_bias",
)
ACTIVATIONS = ("x", "base", "bottleneck", "vision", "gate_input", "residual")


@dataclass(frozen=True)
class Case:
    """One shape. ``lead`` are x's leading dims; ``base`` is "input", "given" or "none";
    ``residual`` is "none", "given" or "gate_input"."""

    name: str
    lead: tuple[int, ...]
    width: int
    rank: int
    out: int = 0  # 0: width
    base: str = "input"
    bottleneck: bool = False
    activation: str = "gelu_tanh"
    route: str = "none"
    vision: int = 1
    gate: str = "none"
    gate_rank: int = 0  # 0: rank
    gate_width: int = 0  # 0: out
    mask: bool = False
    scale: float = 1.0
    dropout: float = 0.0
    residual: str = "none"
    norm: bool = False
    bias: bool = True
    variant: str = "paper"
    layout: str = "contiguous"
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


def _bart(name: str, lead: tuple[int, ...], width: int, rank: int, gate: str, **more: Any) -> Case:
    """VL-PET on BART: dropout, residual = gate input, LayerNorm."""
    rest = {"dropout": 0.1, "residual": "gate_input", "norm": True} | more
    return Case(name, lead, width, rank, gate=gate, **rest)


CASES = (
    Case("adapter", (3, 50), 64, 16),
    Case("adapter-odd", (3, 47), 83, 19, activation="gelu"),
    _bart("large", (3, 50), 64, 16, "large"),
    _bart("large-odd", (3, 47), 83, 19, "large", gate_rank=13, scale=0.5, activation="gelu"),
    Case("large-alone", (150,), 72, 16, gate="large", activation="relu"),
    Case("large-t5", (2, 61), 64, 24, gate="large", scale=0.3, dropout=0.1, residual="gate_input"),
    _bart("middleX", (3, 50), 64, 16, "middleX"),
    _bart("middleX-odd", (3, 47), 83, 19, "middleX", scale=-0.5),
    Case("middleX-release", (3, 31), 64, 16, gate="middleX", variant="release", residual="given"),
    _bart("middleY", (3, 50), 64, 16, "middleY"),
    Case("middleY-release", (141,), 51, 11, gate="middleY", variant="release", scale=0.3),
    _bart("small", (3, 50), 64, 16, "small"),
    _bart("small-mask-odd", (4, 37), 83, 19, "small", mask=True),
    Case("small-release", (3, 40), 64, 16, gate="small", variant="release", dropout=0.2),
    Case("small-one-sample", (1, 130), 64, 16, gate="small", mask=True),
    Case("adapter-norm", (3, 50), 64, 16, residual="given", dropout=0.1, norm=True),
    Case("adapter-replaces", (3, 33), 64, 16, base="none", activation="gelu", residual="given"),
    Case("value", (3, 33), 64, 16, base="given", bottleneck=True, out=48),
    Case("value-odd", (129,), 64, 13, base="given", out=77, scale=0.5, activation="silu"),
    Case("parallel-large", (3, 33), 88, 16, base="given", out=56, gate="large", gate_width=40),
    Case("parallel-small", (3, 33), 88, 16, base="given", out=56, gate="small", dropout=0.1),
    Case("lora-add", (3, 35), 64, 16, base="given", activation="identity", route="add", bias=False),
    Case("lora-mul", (3, 35), 64, 16, base="given", activation="identity", route="mul", bias=False),
    Case("add", (3, 50), 64, 16, route="add"),
    Case("mul-tokens", (3, 41), 64, 16, route="mul", vision=5),
    Case("expand", (3, 50), 64, 16, route="expand", bias=False),
    Case("expand-tokens", (4, 37), 83, 19, route="expand", vision=3, bias=False),
    Case("gram", (3, 50), 64, 16, route="gram"),
    Case("gram-tokens", (3, 41), 64, 24, route="gram", vision=7),
    Case("gram-square", (3, 41), 64, 8, route="gram", vision=37, activation="gelu"),
    Case("gram-release", (4, 37), 83, 19, route="gram", vision=5, variant="release"),
    Case("gram-relu", (3, 41), 64, 24, route="gram_relu", vision=7),
    Case("gram-relu-square", (3, 41), 64, 8, route="gram_relu", vision=37),
    _bart("gram-large", (3, 41), 64, 16, "large", route="gram", vision=3),
    _bart("mul-small", (3, 41), 64, 16, "small", route="mul", mask=True),
    _bart("expand-middleX", (3, 41), 64, 16, "middleX", route="expand"),
    _bart("silu-large", (3, 41), 64, 16, "large", activation="silu"),
    _bart("relu-small", (3, 41), 64, 16, "small", activation="relu"),
    _bart("identity-middleX", (3, 41), 64, 16, "middleX", activation="identity", bias=False),
    _bart("frozen-rows", (3, 41), 64, 16, "large", frozen=("x", "gate_input")),
    Case("frozen-parameters", (3, 41), 64, 16, frozen=("down", "up", "down_bias")),
    _bart("sliced-sequence", (3, 41), 64, 16, "large", layout="sliced"),
    Case("strided-rows", (130,), 64, 16, layout="strided", gate="middleX"),
    _bart("float-parameters", (3, 45), 64, 16, "large", float_parameters=True),
    _bart("rank-1", (3, 30), 17, 1, "large", dropout=0.5),
    _bart("rank-wide", (140,), 96, 130, "large"),
    _bart("one-row", (1, 1), 64, 16, "small"),
    _bart("empty", (0, 7), 64, 16, "large"),
)

SHAPES = (
    _bart("vl-pet large N=6400 r=96", (50, 128), 768, 96, "large"),
    _bart("vl-pet middleX N=6400 r=96", (50, 128), 768, 96, "middleX"),
    _bart("vl-pet middleY N=6400 r=96", (50, 128), 768, 96, "middleY"),
    _bart("vl-pet small N=6400 r=96", (50, 128), 768, 96, "small"),
    Case("vl-adapter N=6400 r=96", (50, 128), 768, 96, dropout=0.1, residual="given", norm=True),
    Case("vl-pet large T5 N=4480 r=192", (80, 56), 768, 192, gate="large", scale=0.3),
    Case("value adapter N=6400 r=96", (50, 128), 768, 96, base="given", bottleneck=True),
    Case("routing adapter gpt-2 mul N=2040 r=128", (40, 51), 768, 128, route="mul"),
    Case("routing adapter gpt-2 gram V=197", (40, 51), 768, 128, route="gram", vision=197),
    Case("routing adapter roberta expand", (512, 21), 768, 64, route="expand", activation="gelu"),
)


def _layout(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "sliced":
        return torch.cat((t, t[:, :5]), dim=1)[:, : t.shape[1]]
    if layout == "strided":
        return torch.cat((t, t), dim=-1)[..., : t.shape[-1]]
    return t


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the public function, its reference and its baselines."""
    g = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)

    def parameter(*shape: int, divisor: float = 1.0, mean: float = 0.0) -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64) / divisor + mean
        wide = case.float_parameters and dtype.itemsize == 2
        return t.to(torch.float32 if wide else dtype).to(device)

    d, r, o, rg = case.width, case.rank, case.outs, case.gate_rank or case.rank
    inputs: dict[str, Any] = {"x": None, "down": None, "up": parameter(o, r, divisor=r**0.5)}
    if not case.bottleneck or case.base == "input":
        inputs["x"] = _layout(rows(*case.lead, d), case.layout)
    if case.bottleneck:
        inputs["bottleneck"] = rows(*case.lead, r)
    else:
        inputs["down"] = parameter(r, d, divisor=d**0.5)
        if case.bias:
            inputs["down_bias"] = parameter(r)
    if case.bias:
        inputs["up_bias"] = parameter(o)
    inputs["base"] = {"input": "input", "none": None}.get(case.base)
    if case.base == "given":
        inputs["base"] = rows(*case.lead, o)
    if case.route != "none":
        inputs["vision"] = rows(case.lead[0], case.vision, r)
    if case.gate not in ("none", "middleY") or case.residual == "gate_input":
        inputs["gate_input"] = _layout(rows(*case.lead, case.gate_width or o), case.layout)
    if case.gate == "large":
        width = case.gate_width or o
        inputs["gate_down"] = parameter(rg, width, divisor=width**0.5)
        inputs["gate_up"] = parameter(o, rg, divisor=rg**0.5)
        if case.bias:
            inputs["gate_down_bias"] = parameter(rg)
            inputs["gate_up_bias"] = parameter(o)
    elif case.gate != "none":
        inputs["gate_weight"] = parameter(2 * o if case.gate == "small" else o, divisor=o**0.5)
        if case.gate != "middleY" and case.bias:
            inputs["gate_bias"] = parameter(1)
    if case.mask:
        length = torch.randint(1, case.lead[1] + 1, (case.lead[0], 1), generator=g)
        inputs["mask"] = (torch.arange(case.lead[1]) < length).to(device)
    if case.residual != "none":
        given = case.residual == "given"
        inputs["residual"] = rows(*case.lead, o) if given else "gate_input"
    if case.norm:
        inputs["norm_weight"] = parameter(o, divisor=4.0, mean=1.0)
        inputs["norm_bias"] = parameter(o)
    inputs.update(
        activation=case.activation,
        route=case.route,
        gate=case.gate,
        scale=case.scale,
        dropout=case.dropout,
        variant=case.variant,
    )
    if case.dropout:
        inputs["rng"] = torch.tensor([0x1234_5678_9ABC + seed, 0xFFFF_FFFE], device=device)
    return inputs


def frozen(case: Case) -> tuple[str, ...]:
    """Names of DIFFERENTIABLE inputs that this case does not train."""
    return case.frozen


def _row_tensors(case: Case) -> tuple[int, int]:
    """Elements per row that forward reads, and that backward writes."""
    d, o = case.width, case.outs
    reads = case.rank if case.bottleneck else d
    reads += o if case.base == "given" or (case.bottleneck and case.base == "input") else 0
    gated = case.gate not in ("none", "middleY") or case.residual == "gate_input"
    reads += (case.gate_width or o) if gated else 0
    reads += o if case.residual == "given" else 0
    return reads, reads


def bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Least bytes of forward and backward, parameters excluded.

    Forward: every row tensor read once, z and zg written, out written. Backward: every row tensor,
    z, zg and dout read once, every row gradient written.
    """
    reads, writes = _row_tensors(case)
    middle = 0 if case.bottleneck else case.rank
    middle += (case.gate_rank or case.rank) if case.gate == "large" else 0
    e = dtype.itemsize
    fwd = case.rows * (reads + case.outs + middle)
    return fwd * e, case.rows * (reads + case.outs + middle + writes) * e


def flops(case: Case) -> tuple[int, int]:
    """Multiply-adds times two, forward and backward (with the products formed again)."""
    n, d, r, o = case.rows, case.width, case.rank, case.outs
    products = n * r * (0 if case.bottleneck else d) + n * r * o
    again = n * r * o
    if case.gate == "large":
        rg = case.gate_rank or r
        products += n * rg * ((case.gate_width or o) + o)
        again += n * rg * o
    if case.route in ("gram", "gram_relu"):
        products += 2 * n * r * min(case.vision, r)
    return 2 * products, 4 * products + 2 * again


def _drop(t: Tensor, inputs: dict[str, Any]) -> Tensor:
    return F.dropout(t, inputs["dropout"]) if inputs["dropout"] else t


def _heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Four down-projections and their concatenation, as released."""
    if weight.shape[0] % 4:
        return F.linear(x, weight, bias)
    parts = zip(weight.chunk(4), bias.chunk(4) if bias is not None else [None] * 4, strict=True)
    return torch.cat([F.linear(x, w, b) for w, b in parts], dim=-1)


def _routed(z: Tensor, inputs: dict[str, Any]) -> Tensor:
    v, route = inputs.get("vision"), inputs["route"]
    if v is None:
        return z
    if route == "expand":
        pooled = v.mean(1, keepdim=True)
        return z @ pooled.expand(-1, z.shape[-1], -1).contiguous()
    return reference.route_values(route, z, v, "paper")


def _finish(y: Tensor, gate: Tensor | None, inputs: dict[str, Any]) -> Tensor:
    y = y if gate is None else y * gate
    y = y * inputs["scale"] if inputs["scale"] != 1.0 else y
    y = _drop(y, inputs)
    residual = inputs.get("residual")
    if residual is not None:
        y = (inputs["gate_input"] if isinstance(residual, str) else residual) + y
    if inputs.get("norm_weight") is None:
        return y
    return F.layer_norm(y, y.shape[-1:], inputs["norm_weight"], inputs["norm_bias"])


def _new_gelu(z: Tensor) -> Tensor:
    """gelu_new as the authors' transformers computes it: eight element-wise operators."""
    inner = (2 / torch.pi) ** 0.5 * (z + 0.044715 * torch.pow(z, 3.0))
    return 0.5 * z * (1.0 + torch.tanh(inner))


def _adapter(inputs: dict[str, Any], published: bool) -> tuple[Tensor, Any]:
    name = inputs["activation"]

    def act(q: Tensor) -> Tensor:
        if published and name == "gelu_tanh":
            return _new_gelu(q)
        return activate(name, q)

    z = inputs.get("bottleneck")
    if z is None:
        down = _heads if published and inputs["gate"] != "none" else F.linear
        z = down(inputs["x"], inputs["down"], inputs.get("down_bias"))
    y = F.linear(act(_routed(z, inputs)), inputs["up"], inputs.get("up_bias"))
    base = inputs["base"]
    if base is not None:
        y = (inputs["x"] if isinstance(base, str) else base) + y
    return y, act


def published(**inputs: Any) -> tuple[Tensor]:
    """As the released code does it: a product per head, concatenations, every gate a matrix."""
    y, act = _adapter(inputs, True)
    x, w, gate = inputs.get("gate_input"), inputs.get("gate_weight"), None
    if inputs["gate"] == "large":
        zg = F.linear(x, inputs["gate_down"], inputs.get("gate_down_bias"))
        logits = F.linear(act(zg), inputs["gate_up"], inputs.get("gate_up_bias"))
        gate = torch.sigmoid(logits)
    elif inputs["gate"] == "middleX":
        gate = torch.sigmoid(F.linear(x + y, w.unsqueeze(0), inputs.get("gate_bias")))
    elif inputs["gate"] == "middleY":
        gate = 1 + w
    elif inputs["gate"] == "small":
        both = torch.cat((x, y), dim=-1)
        gate = torch.sigmoid(F.linear(both, w.unsqueeze(0), inputs.get("gate_bias")))
        gate = gate.mean(-2, keepdim=True)
    if gate is not None:
        gate = gate.expand_as(y)
    return (_finish(y, gate, inputs),)


def well_written(**inputs: Any) -> tuple[Tensor]:
    """One product per projection, torch's own activation, gates by matrix-vector products."""
    y, act = _adapter(inputs, False)
    x, w, gate = inputs.get("gate_input"), inputs.get("gate_weight"), None
    logit_h = inputs["x"] if isinstance(inputs["base"], str) else inputs["base"]
    bias = inputs.get("gate_bias")
    if inputs["gate"] == "large":
        zg = F.linear(x, inputs["gate_down"], inputs.get("gate_down_bias"))
        gate = F.linear(act(zg), inputs["gate_up"], inputs.get("gate_up_bias")).sigmoid()
    elif inputs["gate"] == "middleY":
        gate = 1 + w.sigmoid()
    elif inputs["gate"] != "none":
        o = y.shape[-1]
        logits = F.linear(x, w[None, :o], bias) + F.linear(logit_h, w[None, -o:])
        gate = logits.sigmoid()
        gate = gate.mean(-2, keepdim=True) if inputs["gate"] == "small" else gate
    return (_finish(y, gate, inputs),)


BASELINES = {"published": published, "eager": well_written}


def saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """Exact bytes kept for backward when everything trainable is trained, parameters excluded."""
    gate, o, rg = case.gate, case.outs, case.gate_rank or case.rank
    values = gate != "none" or case.norm
    per_row = case.rank  # z, or the bottleneck that was given
    if (not case.bottleneck and "down" not in case.frozen) or (values and case.base == "input"):
        per_row += case.width
    per_row += o if values and case.base == "given" else 0
    if gate in ("large", "middleX", "small") or (case.residual == "gate_input" and case.norm):
        per_row += case.gate_width or o
    per_row += o if case.residual == "given" and case.norm else 0
    per_row += rg if gate == "large" else 0
    wide = 8 if dtype == torch.float64 else 4
    numbers = (1 if gate in ("middleX", "small") else 0) + (2 if case.norm else 0)
    numbers += 1 if case.mask else 0
    total = case.rows * (per_row * dtype.itemsize + numbers * wide)
    if case.route != "none":
        b, v, r = case.lead[0], case.vision, case.rank
        length = case.lead[1]
        if case.route == "expand":
            total += 2 * b * r * dtype.itemsize
        elif case.route in ("add", "mul"):
            total += b * r * dtype.itemsize
        elif v > 1 and r * (length + v) < 2 * length * v:
            copies = 2 if case.route == "gram_relu" else 1
            total += b * (r * r + copies * v * r) * dtype.itemsize
        else:
            copies = 2 if case.route == "gram_relu" or (case.variant == "release" and v > 1) else 1
            total += copies * b * v * r * dtype.itemsize
    rng = 16 if philox.threshold(case.dropout) else 0
    return total + rng
