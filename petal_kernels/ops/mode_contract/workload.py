"""Inputs, traffic and flops of ``mode_contract``; read by tests and benchmarks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petal_kernels.ops.mode_contract.baselines import BASELINES as BASELINES

DIFFERENTIABLE = ("core", "modes", "up")


@dataclass(frozen=True)
class Case:
    """One shape: K modes of rank R folded into O outputs."""

    name: str
    modes: int
    rank: int
    out: int
    core: str = "tucker"
    fold: bool = True
    scale: float = 1.0
    transposed_up: bool = False


CASES = (
    Case("tucker", 5, 16, 40),
    Case("cp", 5, 16, 40, core="cp"),
    Case("tucker-odd", 7, 19, 83, scale=0.5),
    Case("cp-odd", 7, 19, 83, core="cp", scale=-1.5),
    Case("tucker-wide", 54, 33, 200),
    Case("cp-wide", 54, 33, 200, core="cp"),
    Case("tucker-rank-1", 3, 1, 5),
    Case("tucker-one-mode", 1, 8, 24),
    Case("tucker-matrices", 6, 12, 0, fold=False, scale=2.0),
    Case("cp-matrices", 6, 12, 0, core="cp", fold=False),
    Case("tucker-strided", 4, 16, 48, transposed_up=True),
    Case("cp-strided", 4, 16, 48, core="cp", transposed_up=True),
    Case("no-modes", 0, 8, 24),
)

SHAPES = (
    Case("qformer-self tucker", 42, 64, 768),
    Case("qformer-image tucker", 12, 64, 768),
    Case("qformer-self cp", 42, 64, 768, core="cp"),
    Case("aurora R=32 tucker", 216, 32, 768),
    Case("qformer R=128 tucker", 42, 128, 768),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the public function, its reference and its baselines."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def place(t: Tensor) -> Tensor:
        return t.to(dtype).to(device)

    r = case.rank
    core = randn(r) if case.core == "cp" else randn(r, r, r) / r**0.5
    inputs: dict[str, Any] = {"core": place(core), "modes": place(randn(case.modes, r))}
    if case.fold:
        up = place(randn(case.out, r) / r**0.5)
        if case.transposed_up:
            up = up.t().contiguous().t()
        inputs["up"] = up
    inputs["scale"] = case.scale
    return inputs


def bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Least bytes of forward and backward: core, modes and V read once, P written once, and their
    gradients."""
    r, e = case.rank, dtype.itemsize
    core = r if case.core == "cp" else r**3
    parameters = core + case.modes * r + (case.out * r if case.fold else 0)
    out = case.modes * r * (case.out if case.fold else r)
    return (parameters + out) * e, (2 * parameters + out) * e


def flops(case: Case) -> tuple[int, int]:
    """Multiply-adds times two, forward and backward."""
    r, k = case.rank, case.modes
    contract = 2 * k * r * (1 if case.core == "cp" else r * r)
    fold = 2 * k * r * case.out * (1 if case.core == "cp" else r) if case.fold else 0
    return contract + fold, 2 * (contract + fold) + contract
