"""Inputs, traffic and flops of ``frozen_norm``; read by tests and benchmarks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petal_kernels.ops.frozen_norm.baselines import BASELINES as BASELINES

DIFFERENTIABLE = ("x",)


@dataclass(frozen=True)
class Case:
    """One shape. ``lead`` are x's leading dims."""

    name: str
    lead: tuple[int, ...]
    width: int
    kind: str = "rms"
    weight: bool = True
    bias: bool = False
    eps: float = 1e-6
    shift: float = 0.0  # of every row's mean
    layout: str = "contiguous"
    recompute: bool = False
    frozen: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """N, the product of the leading dims."""
        return torch.Size(self.lead).numel()


CASES = (
    Case("llama", (3, 50), 48),
    Case("layer", (3, 50), 48, "layer", bias=True, eps=1e-5),
    Case("gemma", (3, 50), 48, "rms_plus_one"),
    Case("once", (3, 50), 48, "rms_once"),
    Case("layer-no-bias", (67,), 96, "layer", eps=1e-12),
    Case("layer-no-weight", (67,), 96, "layer", weight=False),
    Case("no-weight", (67,), 96, "rms", weight=False),
    Case("shifted", (70,), 80, "layer", bias=True, shift=30.0),
    Case("odd", (211,), 51),
    Case("layer-odd", (211,), 51, "layer", bias=True),
    Case("gemma-odd", (2, 17), 33, "rms_plus_one", eps=1e-2),
    Case("recompute", (3, 50), 48, recompute=True),
    Case("wide", (5, 7), 1300, "rms_once"),
    Case("layer-wide", (37,), 2051, "layer", bias=True),
    Case("gemma-wide", (9,), 4099, "rms_plus_one"),
    Case("one-column", (70,), 1, "rms"),
    Case("one-row", (1,), 40, "layer", bias=True),
    Case("vector", (), 40, "rms"),
    Case("sliced-sequence", (3, 41), 40, "layer", bias=True, layout="sliced"),
    Case("column-major", (130,), 40, layout="transposed"),
    Case("frozen-x", (70,), 40, frozen=("x",)),
    Case("empty", (0, 7), 40, "layer", bias=True),
)

SHAPES = (
    Case("llama d=4096 N=2048", (4, 512), 4096),
    Case("gemma d=2304 N=2048", (4, 512), 2304, "rms_plus_one"),
    Case("vit d=1024 N=2056", (8, 257), 1024, "layer", bias=True, eps=1e-5),
)


def _layout(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "sliced":
        return torch.cat((t, t[:, :5]), dim=1)[:, : t.shape[1]]
    return t.t().contiguous().t() if layout == "transposed" else t


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the public function, its reference and its baselines."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, shift: float = 0.0) -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64) + shift
        return t.to(dtype).to(device)

    return {
        "x": _layout(draw(*case.lead, case.width, shift=case.shift), case.layout),
        "weight": draw(case.width) if case.weight else None,
        "bias": draw(case.width) if case.bias else None,
        "kind": case.kind,
        "eps": case.eps,
    }


def options(case: Case) -> dict[str, Any]:
    """Arguments of the public function that the reference does not have."""
    return {"recompute": case.recompute}


def frozen(case: Case) -> tuple[str, ...]:
    """Names of DIFFERENTIABLE inputs that this case does not train."""
    return case.frozen


def moments(case: Case) -> int:
    """Numbers of each row beside it: 1 / deviation, and of "layer" the mean."""
    return 2 if case.kind == "layer" else 1


def bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Least bytes of forward and backward: x read and y written; dy and x read, dx written; the
    moments once each way."""
    rows = case.rows * case.width * dtype.itemsize
    few = 4 * case.rows * moments(case)
    return 2 * rows + few, 3 * rows + few


def flops(case: Case) -> tuple[int, int]:
    """About: operations on each element; forward and backward."""
    each = case.rows * case.width
    return (8 if case.kind == "layer" else 4) * each, 10 * each


def saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """Exact bytes kept for backward, the weight excluded."""
    if "x" in case.frozen:
        return 0
    wide = 8 if dtype == torch.float64 else 4
    return case.rows * (case.width * dtype.itemsize + moments(case) * wide)
