"""Inputs, traffic and flops of ``gated_mlp``; read by tests and benchmarks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels.ops.gated_mlp.baselines import BASELINES as BASELINES
from petal_kernels.ops.gated_mlp.baselines import floor as floor

DIFFERENTIABLE = ("x", "biases", "downs", "ups")


@dataclass(frozen=True)
class Case:
    """One shape. ``lead`` are x's leading dims; ``ranks`` has an entry for each linear (gate, up,
    down, or up and down), 0 where it has no update."""

    name: str
    lead: tuple[int, ...]
    width: int
    inner: int
    out: int
    ranks: tuple[int, ...]
    bias: bool = False
    activation: str = "silu"
    dropout: float = 0.0
    scale: float | tuple[float, ...] = 1.0
    recompute: bool = False
    layout: str = "contiguous"
    transposed_weights: bool = False
    frozen: tuple[str, ...] = ()
    float_parameters: bool = False

    @property
    def rows(self) -> int:
        """N, the product of the leading dims."""
        return torch.Size(self.lead).numel()

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return len(self.ranks) == 3

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """[out, in] of every linear."""
        first = [(self.inner, self.width)] * (len(self.ranks) - 1)
        return [*first, (self.out, self.inner)]

    @property
    def between(self) -> bool:
        """Whether g and u are read in backward: anything at p or before it is trained."""
        names = [name for name in ("downs", "ups") if name not in self.frozen]
        inner = any(self.ranks[:-1]) and bool(names)
        biases = self.bias and "biases" not in self.frozen
        last = bool(self.ranks[-1]) and "downs" not in self.frozen
        return "x" not in self.frozen or inner or biases or last


_LORA = (8, 8, 8)

CASES = (
    Case("llama", (3, 50), 48, 80, 48, _LORA),
    Case("llama-dropout", (3, 50), 48, 80, 48, _LORA, dropout=0.25, scale=2.0),
    Case("plain", (3, 50), 40, 72, 40, (8, 8), True, "gelu", dropout=0.1, scale=0.5),
    Case("recompute", (2, 73), 48, 80, 48, _LORA, dropout=0.1, recompute=True),
    Case("odd", (211,), 51, 83, 37, (19, 3, 8), True, "gelu_tanh", 0.3, (0.5, -1.5, 2.0)),
    Case("plain-odd", (2, 17), 33, 45, 51, (5, 13), True, "relu", 0.2, (-1.25, 0.5)),
    Case("gate-alone", (70,), 40, 72, 40, (8, 0, 0), dropout=0.1),
    Case("up-alone", (70,), 40, 72, 40, (0, 8, 0), dropout=0.1),
    Case("down-alone", (70,), 40, 72, 40, (0, 0, 8), True, dropout=0.1),
    Case("identity", (3, 21), 24, 40, 24, (4, 4, 4), activation="identity", dropout=0.1),
    Case("frozen-x", (130,), 40, 72, 40, _LORA, dropout=0.1, frozen=("x",)),
    Case("plain-recompute", (2, 40), 40, 72, 40, (8, 8), True, "gelu", 0.1, recompute=True),
    Case("no-update", (2, 40), 40, 72, 40, (0, 0, 0), True),
    Case("no-update-recompute", (2, 40), 40, 72, 40, (0, 0, 0), recompute=True),
    Case("plain-identity", (70,), 40, 72, 40, (8, 8), activation="identity"),
    Case("plain-fc2", (70,), 40, 72, 40, (0, 8), True, "gelu_tanh", dropout=0.1),
    Case("gate-and-down", (70,), 40, 72, 40, (8, 0, 4), dropout=0.1, recompute=True),
    Case("up-and-down", (70,), 40, 72, 40, (0, 8, 4), dropout=0.1, recompute=True),
    Case("frozen-downs", (70,), 40, 72, 40, _LORA, dropout=0.1, frozen=("x", "downs")),
    Case(
        "last-alone",
        (70,),
        40,
        72,
        40,
        (0, 0, 8),
        dropout=0.1,
        recompute=True,
        frozen=("x",),
    ),
    Case("last-up-alone", (70,), 40, 72, 40, (0, 0, 8), dropout=0.1, frozen=("x", "downs")),
    Case("frozen-factors", (70,), 40, 72, 40, _LORA, frozen=("downs", "ups")),
    Case("float-parameters", (3, 45), 40, 72, 40, _LORA, dropout=0.1, float_parameters=True),
    Case("conv1d", (3, 45), 40, 72, 40, (8, 8), True, "gelu", 0.1, transposed_weights=True),
    Case("sliced-sequence", (3, 41), 40, 72, 40, _LORA, dropout=0.1, layout="sliced"),
    Case("column-major", (130,), 40, 72, 40, _LORA, layout="transposed", recompute=True),
    Case("rank-1", (3, 30), 17, 29, 17, (1, 1, 1), dropout=0.5),
    Case("rank-wide", (140,), 40, 100, 40, (130, 130, 130), dropout=0.1),
    Case("one-row", (1,), 40, 72, 40, _LORA, dropout=0.1),
    Case("empty", (0, 7), 40, 72, 40, _LORA, True, dropout=0.1),
    Case("empty-recompute", (0, 7), 40, 72, 40, _LORA, dropout=0.1, recompute=True),
)

SHAPES = (
    Case("llama d=1024 N=1024", (1, 1024), 1024, 2816, 1024, (16,) * 3, dropout=0.05),
    Case("llama d=1024 N=1024, no dropout", (1, 1024), 1024, 2816, 1024, (16,) * 3),
    Case("vit d=768 N=1024", (4, 256), 768, 3072, 768, (16, 16), True, "gelu", 0.05),
)


def _layout(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "sliced":
        return torch.cat((t, t[:, :5]), dim=1)[:, : t.shape[1]]
    if layout == "transposed":
        return t.t().contiguous().t()
    return t


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the public function, its reference and its baselines."""
    g = torch.Generator().manual_seed(seed)

    def place(*shape: int, divisor: float = 1.0, parameter: bool = False) -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64) / divisor
        wide = parameter and case.float_parameters and dtype.itemsize == 2
        return t.to(torch.float32 if wide else dtype).to(device)

    def weight(out: int, width: int) -> Tensor:
        if case.transposed_weights:
            return place(width, out, divisor=width**0.5).t()
        return place(out, width, divisor=width**0.5)

    sites = list(zip(case.shapes, case.ranks, strict=True))
    inputs: dict[str, Any] = {"x": _layout(place(*case.lead, case.width), case.layout)}
    inputs["weights"] = [weight(out, width) for (out, width), _ in sites]
    inputs["biases"] = [place(out) for (out, _), _ in sites] if case.bias else None
    if any(case.ranks):
        inputs["downs"] = [
            place(r, width, divisor=width**0.5, parameter=True) if r else None
            for (_, width), r in sites
        ]
        inputs["ups"] = [
            place(out, r, divisor=r**0.5, parameter=True) if r else None for (out, _), r in sites
        ]
    inputs.update(scale=case.scale, activation=case.activation, dropout=case.dropout)
    if case.dropout:
        inputs["rng"] = torch.tensor([0x1234_5678_9ABC + seed, 0xFFFF_FFFE], device=device)
    return inputs


def options(case: Case) -> dict[str, Any]:
    """Arguments of the public function that the reference does not have."""
    return {"recompute": case.recompute}


def frozen(case: Case) -> tuple[str, ...]:
    """Names of DIFFERENTIABLE inputs that this case does not train."""
    return case.frozen


def bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Least bytes of forward and backward; the factors and middles, R wide, are left out.

    Forward: x and the weights read once, g and u written, read and p written (3 N F), p read, y
    written. Backward: dy read for dp and for dB, dp written; 5 N F between the linears; dg and du
    read for dx and the factors, x read, dx written, the weights read; with ``recompute`` x and the
    first weights once more, g and u written.
    """
    n, f, e = case.rows, case.inner, dtype.itemsize
    first = (2 if case.gated else 1) * n * f
    weights = sum(out * width for out, width in case.shapes)
    row_in, row_out = n * case.width, n * case.out
    between = (3 if case.gated else 2) * n * f
    fwd = row_in + weights + first + between + n * f + row_out
    bwd = 2 * row_out + n * f + (5 if case.gated else 3) * n * f + 2 * first + row_in
    if "x" not in case.frozen:
        bwd += row_in + weights
    if case.recompute:
        bwd += row_in + weights - case.out * f + first
    return fwd * e, bwd * e


def flops(case: Case) -> tuple[int, int]:
    """Multiply-adds times two, the frozen products included; forward and backward."""
    n = case.rows
    base = sum(2 * n * out * width for out, width in case.shapes)
    last = 2 * n * case.out * case.inner
    update = sum(
        2 * n * r * (out + width) for (out, width), r in zip(case.shapes, case.ranks, strict=True)
    )
    bwd = 2 * update + (last if "x" in case.frozen else base)
    return base + update, bwd + (base - last if case.recompute else 0)


def saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """Exact bytes kept for backward when everything trainable is trained, parameters excluded."""
    inner, last = sum(case.ranks[:-1]), case.ranks[-1]
    numbers = last
    if case.between:
        numbers += inner
        if not case.recompute:
            numbers += (2 if case.gated else 1) * case.inner
        if case.recompute or (inner and "downs" not in case.frozen):
            numbers += case.width
    rng = 16 if philox.threshold(case.dropout) and any(case.ranks) else 0
    return numbers * case.rows * dtype.itemsize + rng
