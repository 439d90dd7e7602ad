"""``lowrank_linear`` on CUDA: CUDA C++ kernels for the update, the library's GEMM for the base.

Kernels, in ``csrc/lowrank_linear/cuda``: ``shrink.cu``, ``forward.cu`` (expand, update),
``weights.cu``.

Maths (N rows, D input width, R rank, K outputs of widths O_k; T = x.dtype):

    shrink      h = drop(x) U^T                          [N, R] in T
    expand      y_k = base_k + s_k * drop_k(h) P_k^T     in place on a fresh base GEMM, or out of
                                                         place on a given base
    update      shrink and expand in one launch, for few rows
    dh          sum_k s_k mask_k * (dy_k P_k)            the shrink kernel; "mode": every k apart,
                                                         then one GEMM with the cores
    param_grad  dP_k = s_k * dy_k^T m_k, dU^T = drop(x)^T dh, all in one grid; also dcore_k^T
    dx          sum_k dy_k W_k (library), then += mask * (dh U) by the expand kernel

Where every output has a down-projection A_k [R_k, D] of its own, in the same launches:

    shrink      h_k = drop_k(x) A_k^T, side by side in h [N, sum R_k]
    expand      y_k from its columns of h; update too
    dh          dh_k = s_k mask_k * (dy_k P_k), side by side
    param_grad  dA_k^T = drop_k(x)^T dh_k, which read one x
    dx          then += sum_k mask_k * (dh_k A_k)

Shapes and strides: x, hidden, base and dy 2-D with unit column stride and any row stride; ups
row-major or the transposed view of a row-major [R, O_k] (copied once when they are neither, or do
not agree); downs and core are made row-major.
Grid: in the headers of the .cu files. No block waits for another.
Traffic, in elements: forward N D (x again, for h) + N R, then per output N R + 2 N O_k (read,
modify, write). Backward per output N O_k (for dh) + N O_k (for dP) + N R, then N D + N R for dU and
2 N D for dx. Own down-projections: the same with sum R_k for R and N R_k per output; x is read once
for all h_k, once for all dA_k, and dx once for all K terms, each with its mask. (A tile of x serves
the ranks that, each rounded up to 16, are 64 columns together, in fp32 32; past them it is read
again, from L2.) The eager chain adds a mask and a masked copy of every h, or of x for every h_k,
the product before scaling, and reads and writes each y twice more.
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
    rank = max((up.shape[1] for up in ups), default=0)
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


def _parts(call: Call, h: Tensor) -> list[Tensor]:
    """Every output's columns of ``h``, or of its gradient; the whole where they share them."""
    return [h[:, at : at + rank] for at, rank in call.spans] if call.own_downs else [h]


def _shrink(
    a: Sequence[Tensor],
    factors: Sequence[Tensor],
    rng: Tensor | None,
    scales: Sequence[float],
    dropout: float,
    *,
    mask_a: bool = False,
    mask_out: bool = False,
    separate: bool = False,
) -> Tensor:
    rows, ranks = a[0].shape[0], [factor.shape[1] for factor in factors]
    apart = separate or len(factors) > len(a)
    out = a[0].new_empty(rows, sum(ranks) if apart else ranks[0])
    small = rows <= SMALL_ROWS
    _ops().lowrank_linear_shrink(
        a, factors, out, rng, scales, dropout, mask_a, mask_out, separate, small
    )
    return out


def _outputs(call: Call) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Where the outputs go, and what they are added to: the base's fresh products, or the given
    ones."""
    t, first = call.tensors, call.first
    if not t.weights:
        return [first.new_empty(first.shape[0], up.shape[0]) for up in t.ups], t.base
    assert t.x is not None
    ys = [torch.nn.functional.linear(t.x, w, b) for w, b in zip(t.weights, t.biases, strict=True)]
    return ys, ys


def forward(call: Call, rng: Tensor | None, plan: str) -> tuple[list[Tensor], Saved]:
    """Outputs [N, O_k] and h [N, R], or [N, sum of R_k]."""
    assert plan in PLANS
    t, s = call
    x, p = t.x, s.dropout
    factors = _factors(t.ups, call.first.dtype)
    ys, bases = _outputs(call)
    at_input = s.dropout_at == "input"
    if t.hidden is not None:
        h = t.hidden
    else:
        assert x is not None
        narrow = [_row_major(down, x.dtype) for down in t.downs]
        rank = max(down.shape[0] for down in narrow)
        if t.core is None and x.shape[0] <= FUSED_ROWS and rank <= MAX_FUSED_RANK:
            h = x.new_empty(x.shape[0], call.middle)
            parts = _parts(call, h)
            _ops().lowrank_linear_fwd_update(
                x, narrow, parts, factors, bases, ys, rng, s.scales, p, at_input, not at_input
            )
            return ys, Saved(h)
        ones = [1.0] * len(narrow)
        h = _shrink([x], [down.t() for down in narrow], rng, ones, p, mask_a=at_input)
    middles = _parts(call, h) if t.core is None else _modes(h, t.core, len(t.ups))
    _ops().lowrank_linear_expand(middles, factors, bases, ys, rng, s.scales, p, not at_input, False)
    return ys, Saved(h)


def backward(
    call: Call, saved: Saved, dys: list[Tensor], rng: Tensor | None, need: frozenset[str]
) -> Gradients:
    """The gradients that ``need`` names."""
    t, s = call
    h, core, p = saved.h, t.core, s.dropout
    k, dtype = len(t.ups), h.dtype
    at_input = s.dropout_at == "input"
    factors = _factors(t.ups, dtype)

    # dh, and every g_k apart where a core follows.
    separate = core is not None or call.own_downs
    g = _shrink(dys, factors, rng, s.scales, p, mask_out=not at_input, separate=separate)
    dh = g
    if core is not None:
        rank = h.shape[1]
        dh = torch.mm(g, core.to(dtype).transpose(1, 2).reshape(k * rank, rank))

    ddowns, dups = _weight_gradients(call, h, dh, dys, rng, need)
    dcore = None
    if "core" in need and core is not None:
        dcore = torch.empty_like(core, memory_format=torch.contiguous_format)
        gs, outs = list(g.split(h.shape[1], dim=1)), [d.t() for d in dcore]
        _ops().lowrank_linear_bwd_weights(
            gs, [h] * k, outs, None, [1.0] * k, 0.0, [_NO_MASK] * k, [0] * k, 0
        )

    dx = _input_gradient(call, dh, dys, rng) if "x" in need else None
    return Gradients(dx, ddowns, dh, dups, dcore)


def _weight_gradients(
    call: Call,
    h: Tensor,
    dh: Tensor,
    dys: list[Tensor],
    rng: Tensor | None,
    need: frozenset[str],
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """dU, or every dA_k, and every dP_k: all that are asked for in one launch."""
    t, s = call
    k, at_input = len(t.ups), s.dropout_at == "input"
    jobs: list[tuple[Tensor, Tensor, Tensor, float, int, int]] = []
    dups = ddowns = None
    if "ups" in need:
        middles = _parts(call, h) if t.core is None else _modes(h, t.core, k)
        middles = middles * k if len(middles) == 1 else middles
        dups = [torch.empty_like(up, memory_format=torch.contiguous_format) for up in t.ups]
        mask = _NO_MASK if at_input else _MASK_SMALL
        jobs += [(dys[j], middles[j], dups[j], s.scales[j], mask, j) for j in range(k)]
    if "downs" in need and t.downs:
        assert t.x is not None
        ddowns = [torch.empty_like(d, memory_format=torch.contiguous_format) for d in t.downs]
        mask = _MASK_BIG if at_input else _NO_MASK
        for stream, (part, ddown) in enumerate(zip(_parts(call, dh), ddowns, strict=True)):
            jobs.append((t.x, part, ddown.t(), 1.0, mask, stream))
    if jobs:
        bigs, smalls, outs, scales, masks, streams = map(list, zip(*jobs, strict=True))
        _ops().lowrank_linear_bwd_weights(
            bigs, smalls, outs, rng, scales, s.dropout, masks, streams, 0
        )
    return ddowns, dups


def _input_gradient(call: Call, dh: Tensor, dys: list[Tensor], rng: Tensor | None) -> Tensor | None:
    """dx = sum_k dy_k W_k + mask (dh U), or + sum_k mask_k (dh_k A_k)."""
    t, s = call
    dx = None
    for dy, w in zip(dys, t.weights, strict=False):
        dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
    if t.downs:
        bases = [] if dx is None else [dx]
        dx = dh.new_empty(dh.shape[0], t.downs[0].shape[1]) if dx is None else dx
        wide = [_row_major(down, dh.dtype).t() for down in t.downs]
        at_input = s.dropout_at == "input"
        _ops().lowrank_linear_expand(
            _parts(call, dh), wide, bases, [dx], rng, [1.0], s.dropout, False, at_input
        )
    return dx
