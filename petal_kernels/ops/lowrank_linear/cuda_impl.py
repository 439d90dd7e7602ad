"""``lowrank_linear`` on CUDA: CUDA C++ kernels for the update, the library's GEMM for the base.

Kernels, in ``csrc/lowrank_linear/cuda``: ``forward.cu`` (shrink, expand, update), ``weights.cu``.

Maths (N rows, D input width, R rank, K outputs of widths O_k; T = x.dtype):

    shrink      h = drop(x) U^T                          [N, R] in T
    expand      y_k = base_k + scale * drop_k(h) P_k^T   in place on a fresh base GEMM, or out of
                                                         place on a given base
    update      shrink and expand in one launch, for few rows
    dh          scale * sum_k mask_k * (dy_k P_k)        the shrink kernel; "mode": every k apart,
                                                         then one GEMM with the cores
    param_grad  dP_k = scale * dy_k^T m_k, dU^T = drop(x)^T dh, all in one grid; also dcore_k^T
    dx          sum_k dy_k W_k (library), then += mask * (dh U) by the expand kernel

Shapes and strides: x, hidden, base and dy 2-D with unit column stride and any row stride; ups
row-major or the transposed view of a row-major [R, O_k] (copied once when they are neither, or do
not agree); down and core are made row-major.
Grid: in the headers of the .cu files. No block waits for another.
Traffic, in elements: forward N D (x again, for h) + N R, then per output N R + 2 N O_k (read,
modify, write). Backward per output N O_k (for dh) + N O_k (for dP) + N R, then N D + N R for dU and
2 N D for dx. The eager chain adds a mask and a masked copy of every h, the product before scaling,
and reads and writes each y twice more.
Numerics: fp32 accumulators and epilogues; h, dh and the base are rounded to T, every output once.
16-bit products run on tensor cores (mma.sync), fp32 products are IEEE FMAs whatever allow_tf32
says. float32 factors next to 16-bit activations are rounded once to T. Gradients of factors are
rounded once, from fp32 to the factor's dtype. Every reduction has a fixed order: same bits on
every run.
Limits: exactly what ``unsupported`` says.
Source: see ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petal_kernels.ops.lowrank_linear.arguments import Call, Gradients, Saved

PLANS = ("update",)

MAX_OUTPUTS = 4
MAX_RANK = 256
MAX_FUSED_RANK = 64
FUSED_ROWS = 1024  # up to here one launch saves more than recomputing h in every block costs
SMALL_ROWS = 4096  # up to here 64-row blocks would leave multiprocessors idle

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NO_MASK, _MASK_BIG, _MASK_SMALL = 0, 1, 2


def _ops() -> Any:
    return torch.ops.petal_cuda


def unsupported(call: Call, plan: str) -> list[str]:
    """Every reason for not running on these tensors; an empty list says that they can."""
    first, ups = call.first, call.tensors.ups
    reasons = []
    if first.device.type != "cuda":
        reasons.append(f"wants CUDA tensors, got {first.device.type}")
    if first.dtype not in _DTYPES:
        reasons.append(f"wants float32, float16 or bfloat16, got {first.dtype}")
    if plan not in ("auto", *PLANS):
        reasons.append(f"has no plan {plan!r}")
    if len(ups) > MAX_OUTPUTS:
        reasons.append(f"wants at most {MAX_OUTPUTS} outputs, got {len(ups)}")
    if call.own_downs:
        reasons.append("has no kernels for a down-projection of every output's own")
    if len(set(call.settings.scales)) > 1:
        reasons.append("has no kernels for scales that differ")
    rank = ups[0].shape[1]
    if rank > MAX_RANK:
        reasons.append(f"wants a rank of at most {MAX_RANK}, got {rank}")
    widest = max((up.shape[0] for up in ups), default=0)
    if widest > 1 << 20:
        reasons.append(f"wants outputs of at most {1 << 20} columns, got {widest}")
    return reasons


def _row_major(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype`` with unit column stride."""
    t = t.to(dtype)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _factors(ups: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The ups in ``dtype`` and in one common layout of the two that the kernels read."""
    cast = [up.to(dtype) for up in ups]
    if all(up.stride(1) == 1 or up.shape[1] == 1 for up in cast):
        return cast
    if all(up.stride(0) == 1 and up.shape[1] > 1 for up in cast):
        return cast
    return [up.contiguous() for up in cast]


def _modes(h: Tensor, core: Tensor, k: int) -> list[Tensor]:
    """Columns of ``h [core_1 ... core_K]``, one GEMM for all outputs."""
    joined = core.to(h.dtype).permute(1, 0, 2).reshape(core.shape[1], -1)
    wide = torch.mm(h, joined)
    return list(wide.split(core.shape[2], dim=1))[:k]


def _shrink(
    a: Sequence[Tensor],
    factors: Sequence[Tensor],
    rng: Tensor | None,
    scale: float,
    dropout: float,
    *,
    mask_a: bool = False,
    mask_out: bool = False,
    separate: bool = False,
) -> Tensor:
    rows, rank = a[0].shape[0], factors[0].shape[1]
    out = a[0].new_empty(rows, rank * len(a) if separate else rank)
    small = rows <= SMALL_ROWS
    _ops().lowrank_linear_shrink(
        a, factors, out, rng, scale, dropout, mask_a, mask_out, separate, small
    )
    return out


def forward(call: Call, rng: Tensor | None, plan: str) -> tuple[list[Tensor], Saved]:
    """Outputs [N, O_k] and h [N, R]."""
    assert plan in PLANS
    t, s = call
    x, first, p = t.x, call.first, s.dropout
    factors = _factors(t.ups, first.dtype)
    if t.weights:
        assert x is not None
        ys = [torch.nn.functional.linear(x, w, b) for w, b in zip(t.weights, t.biases, strict=True)]
    else:
        ys = [first.new_empty(first.shape[0], up.shape[0]) for up in t.ups]
    bases = ys if t.weights else t.base
    at_input = s.dropout_at == "input"
    if t.hidden is not None:
        h = t.hidden
    else:
        assert x is not None
        narrow = _row_major(t.downs[0], x.dtype)
        rank = narrow.shape[0]
        if t.core is None and x.shape[0] <= FUSED_ROWS and rank <= MAX_FUSED_RANK:
            h = x.new_empty(x.shape[0], rank)
            _ops().lowrank_linear_fwd_update(
                x, narrow, h, factors, bases, ys, rng, s.scales[0], p, at_input, not at_input
            )
            return ys, Saved(h)
        h = _shrink([x], [narrow.t()], rng, 1.0, p, mask_a=at_input)
    middles = [h] if t.core is None else _modes(h, t.core, len(t.ups))
    _ops().lowrank_linear_expand(
        middles, factors, bases, ys, rng, s.scales[0], p, not at_input, False
    )
    return ys, Saved(h)


def backward(
    call: Call, saved: Saved, dys: list[Tensor], rng: Tensor | None, need: frozenset[str]
) -> Gradients:
    """The gradients that ``need`` names."""
    t, s = call
    h, core, p = saved.h, t.core, s.dropout
    down = t.downs[0] if t.downs else None
    k, dtype, rank = len(t.ups), h.dtype, h.shape[1]
    at_input = s.dropout_at == "input"
    factors = _factors(t.ups, dtype)

    # dh, and every g_k apart where a core follows.
    g = _shrink(dys, factors, rng, s.scales[0], p, mask_out=not at_input, separate=core is not None)
    gs = list(g.split(rank, dim=1)) if core is not None else []
    dh = g
    if core is not None:
        dh = torch.mm(g, core.to(dtype).transpose(1, 2).reshape(k * rank, rank))

    # dP_k first (their masks are the streams 0 .. K - 1), then dU and the cores.
    bigs: list[Tensor] = []
    smalls: list[Tensor] = []
    outs: list[Tensor] = []
    scales: list[float] = []
    masks: list[int] = []
    dups = None
    if "ups" in need:
        middles = [h] * k if core is None else _modes(h, core, k)
        dups = [torch.empty_like(up, memory_format=torch.contiguous_format) for up in t.ups]
        bigs += dys
        smalls += middles
        outs += dups
        scales += [s.scales[0]] * k
        masks += [_NO_MASK if at_input else _MASK_SMALL] * k
    ddown = None
    if "downs" in need and down is not None:
        assert t.x is not None
        ddown = torch.empty_like(down, memory_format=torch.contiguous_format)
        bigs.append(t.x)
        smalls.append(dh)
        outs.append(ddown.t())
        scales.append(1.0)
        masks.append(_MASK_BIG if at_input else _NO_MASK)
    if bigs:
        _ops().lowrank_linear_bwd_weights(bigs, smalls, outs, rng, scales, p, masks, 0)
    dcore = None
    if "core" in need and core is not None:
        dcore = torch.empty_like(core, memory_format=torch.contiguous_format)
        _ops().lowrank_linear_bwd_weights(
            gs, [h] * k, [d.t() for d in dcore], None, [1.0] * k, 0.0, [_NO_MASK] * k, 0
        )

    dx = _input_gradient(call, dh, dys, rng) if "x" in need else None
    return Gradients(dx, None if ddown is None else [ddown], dh, dups, dcore)


def _input_gradient(call: Call, dh: Tensor, dys: list[Tensor], rng: Tensor | None) -> Tensor | None:
    """dx = sum_k dy_k W_k + mask (dh U)."""
    t, s = call
    dx = None
    for dy, w in zip(dys, t.weights, strict=False):
        dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
    if t.downs:
        bases = [] if dx is None else [dx]
        dx = dh.new_empty(dh.shape[0], t.downs[0].shape[1]) if dx is None else dx
        narrow, at_input = _row_major(t.downs[0], dh.dtype), s.dropout_at == "input"
        _ops().lowrank_linear_expand(
            [dh], [narrow.t()], bases, [dx], rng, 1.0, s.dropout, False, at_input
        )
    return dx
