"""``lowrank_linear`` on the C++ CPU kernels (``csrc/lowrank_linear/cpu``).

Blocks of rows stay in cache while everything is done to them: the shrink, the masks, the update
and, in plan ``extend``, the base product in the same accumulators, so that y is written once. The
products are register-tiled for skinny matrices; 16-bit blocks and weights are widened to fp32 once,
and results are rounded once. Down-projections of every output's own are one product where x has no
mask; where each has its mask, a piece of x in the nearest cache is masked for one after the other.

    update  base by the library, or given; then one read-modify-write pass for the update
    extend  the sum over D runs on over R: no second pass, and no 16-bit library GEMM

Shapes: x [N, D], downs [R, D] or K of [R_k, D], ups [O_k, R_k], weights [O_k, D] of any strides,
base and dy [N, O_k] with unit stride in the last dim and any row stride. One task owns a block of
at most 192 rows (a split of rows, in backward) for all outputs.

Traffic: forward reads x (and base) once and writes h and every y once; in backward dy, x and h are
read once, dx is written once. The eager chain moves 5.5 N*O per output forward, 7.8 backward.

Source: the maths of ``reference.py``. Limits: CPU tensors, fp32, fp16 or bf16. Numerics: fp32
accumulation in index order; h (and h core_k) are rounded to x's dtype, nothing else is rounded
before a result. Parameters are used as they are, without rounding to x's dtype. The weight
gradients are fp32 partials over a split of the rows that depends on N alone, summed in order: the
same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import device, front
from petal_kernels._runtime.rows import fresh_rows, linears, sum_of_products
from petal_kernels.ops.lowrank_linear.arguments import Call, Gradients, Saved, Settings

PLANS = ("update", "extend")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SITES = {"bottleneck": 0, "input": 1, "mode": 2}


def unsupported(call: Call, plan: str) -> list[str]:
    """Every reason for not running on these tensors."""
    t = call.tensors
    reasons = []
    if plan not in ("auto", *PLANS):
        reasons.append(f"has no plan {plan!r}")
    if plan == "extend" and not t.weights:
        reasons.append("plan 'extend' needs the base's weights")
    if call.device.type != "cpu":
        reasons.append("needs CPU tensors")
    single = (t.x, t.hidden, t.core)
    given = [each for each in (*single, *t.downs, *t.ups, *t.weights, *t.base) if each is not None]
    wrong = {each.dtype for each in given}.difference(_DTYPES)
    if wrong:
        reasons.append(f"has no kernels for {', '.join(sorted(str(d) for d in wrong))}")
    return reasons


def _library_multiplies(dtype: torch.dtype) -> bool:
    """Whether the base products of backward go to the library (in forward the plan says so).

    In fp32 the two are equal within noise where N is large and the library is ahead where packing
    the weights shows; in 16 bits the library is far behind unless the CPU has native products.
    """
    return dtype == torch.float32 or device.native_16bit(dtype)


def _numbers(rng: Tensor | None, s: Settings) -> list[Any]:
    """The settings as both kernels take them."""
    return [rng, s.scales, s.dropout, _SITES[s.dropout_at]]


def _downs(call: Call, rng: Tensor | None) -> Sequence[Tensor]:
    """As forward contracts x with them: one product, unless each reads x under its own mask."""
    downs, masked = call.tensors.downs, rng is not None and call.settings.dropout > 0.0
    if len(downs) < 2 or (masked and call.settings.dropout_at == "input"):
        return downs
    return [torch.cat(downs)]  # type: ignore[arg-type]


def compiled(call: Call, plan: str) -> tuple[Any, ...]:
    """What compiled calls (``csrc/lowrank_linear/front``) need to do as the two below do: scales,
    dropout, its site, whether the base goes to the library in forward and in backward, and whether
    x is contracted with one down-projection after the other."""
    t, s = call
    masked = s.dropout > 0.0 and s.dropout_at == "input"
    by_library = bool(t.weights) and plan == "update"
    return (
        *(list(s.scales), s.dropout, _SITES[s.dropout_at]),
        *(by_library, _library_multiplies(call.first.dtype), masked),
    )


def forward(call: Call, rng: Tensor | None, plan: str) -> tuple[list[Tensor], Saved]:
    """Outputs [N, O_k] and h [N, R]."""
    kernel = front.native("lowrank_linear_fwd")
    t, s = call
    like = t.x if t.hidden is None else t.hidden
    assert like is not None
    base, weights = t.base, t.weights
    if weights and plan == "update":
        assert t.x is not None
        base = ys = linears(t.x, weights)
        weights = ()
    else:
        ys = [fresh_rows(like, like.shape[0], up.shape[0]) for up in t.ups]
    h = like.new_empty((like.shape[0], call.middle)) if t.hidden is None else t.hidden
    kernel(
        t.x,
        _downs(call, rng),
        t.hidden,
        t.ups,
        weights,
        t.biases,
        base,
        t.core,
        *_numbers(rng, s),
        ys,
        h if t.hidden is None else None,
    )
    return ys, Saved(h)


def backward(
    call: Call, saved: Saved, dys: list[Tensor], rng: Tensor | None, need: frozenset[str]
) -> Gradients:
    """The gradients that ``need`` names."""
    kernel = front.native("lowrank_linear_bwd")
    t, s = call
    h, core, downs = saved.h, t.core, t.downs
    weights = t.weights if "x" in need else ()
    dx: Tensor | None = None
    dx_has_base = False
    if "x" in need and (downs or weights):
        dx_has_base = bool(weights) and _library_multiplies(h.dtype)
        if dx_has_base:
            dx, weights = sum_of_products(dys, weights), ()
        else:
            dx = fresh_rows(h, h.shape[0], (weights or downs)[0].shape[1])
    dh = h.new_empty(h.shape) if not downs or "hidden" in need else None
    ddowns = [torch.empty_like(down) for down in downs] if "downs" in need else []
    dups = [torch.empty_like(up) for up in t.ups] if "ups" in need else None
    dcore = torch.empty_like(core) if core is not None and "core" in need else None
    kernel(
        dys,
        t.x if ddowns else None,  # else only its shape is real: nothing may read it
        h,
        downs,
        t.ups,
        weights,
        core,
        *_numbers(rng, s),
        dx_has_base,
        dx,
        dh,
        ddowns,
        dups or [],
        dcore,
    )
    return Gradients(dx, ddowns or None, dh, dups, dcore)
