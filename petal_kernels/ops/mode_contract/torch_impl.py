"""``mode_contract`` on the torch backend: two library GEMMs in place of one small contraction per
mode.

All modes at once, M = reshape(C, R*R x R) modes^T; then one GEMM of [K*R, R] with V^T that lands
directly in the stored layout PT [K, R, O]. 16-bit inputs are widened first, so that every product
accumulates in fp32 and the result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime.numerics import wide
from petal_kernels.ops.mode_contract.arguments import Call, Gradients


def unsupported(call: Call) -> list[str]:
    """Runs everywhere."""
    return []


def _matrices(core: Tensor, modes: Tensor) -> Tensor:
    """Tucker: M [K, R, R]. CP: its diagonals [K, R]."""
    if core.dim() == 1:
        return core * modes
    rank = core.shape[0]
    return (modes @ core.reshape(rank * rank, rank).t()).view(-1, rank, rank)


def forward(call: Call) -> Tensor:
    """PT [K, R, O], or scale * M [K, R, R] without ``up``."""
    core, modes, up, scale, dtype = call
    m = _matrices(wide(core), wide(modes))
    if up is None:
        out = torch.diag_embed(m) if core.dim() == 1 else m
        return (out * scale).to(dtype)
    v = wide(up) * scale
    if core.dim() == 1:
        return (m.unsqueeze(2) * v.t()).to(dtype)
    k, rank, _ = m.shape
    return (m.view(k * rank, rank) @ v.t()).view(k, rank, -1).to(dtype)


def backward(call: Call, dout: Tensor, need: frozenset[str]) -> Gradients:
    """The gradients that ``need`` names."""
    core, modes, up, scale, _ = call
    c, p = wide(core), wide(modes)
    d = dout.to(c.dtype)  # the result's dtype is anyone's; sums are in the factors' wide one
    rank = core.shape[0]
    dup = None
    if core.dim() == 1:
        diagonal = scale * (
            torch.diagonal(d, dim1=1, dim2=2) if up is None else (d * wide(up).t()).sum(2)
        )
        if up is not None and "up" in need:
            dup = scale * torch.einsum("kro,kr->or", d, c * p)
        dcore = (diagonal * p).sum(0) if "core" in need else None
        dmodes = diagonal * c if "modes" in need else None
    else:
        flat = d.reshape(-1, d.shape[2])
        dm = (scale * (flat if up is None else flat @ wide(up))).view(-1, rank * rank)
        if up is not None and "up" in need:
            dup = scale * (flat.t() @ _matrices(c, p).view(-1, rank))
        dcore = (dm.t() @ p).view(rank, rank, rank) if "core" in need else None
        dmodes = dm @ c.reshape(rank * rank, rank) if "modes" in need else None
    return Gradients(
        None if dcore is None else dcore.to(core.dtype),
        None if dmodes is None else dmodes.to(modes.dtype),
        None if dup is None or up is None else dup.to(up.dtype),
    )
