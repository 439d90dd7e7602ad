"""``lowrank_linear`` in Triton: plans "update" and "extend", forward and backward, deterministic.

Maths. mask is 0 or keep_scale of ``_runtime/philox.py``: mask_k from stream k, on h_k or, for
dropout_at="input", on x, where a down-projection U that all outputs share has stream 0. h_k is
h core_k ("mode", by the library), all of h, or the R_k columns of U_k, every output's own.

    shrink    h_k = mask_k(x) U_k^T, side by side                     [N, R], R = sum R_k
    expand    y_k = base_k + scale_k * mask_k(h_k) P_k^T              [N, O_k]
    gemm_ext  y_k = x W_k^T + b_k + scale_k * mask_k(h_k) P_k^T       plan extend
              plan update: the library's GEMM, then expand in place
    dh        g_k = scale_k * mask_k(dy_k P_k); U shared: dh = sum_k g_k, else side by side [N, R]
              "mode": g [N, K R], then dh = sum_k g_k core_k^T by the library
    tn        dP_k = scale_k * dy_k^T mask_k(h_k)                     [O_k, R_k]
              dcore_k = h^T g_k, and dU = dh^T x, shared, no mask     [R, R], [R, D]
    tn_x      dU_k = dh_k^T mask_k(x), masked or every output's own   [R_k, D]
    dx        dx = sum_k dy_k W_k + mask_0(dh U)                      [N, D], in one pass
              or the library's GEMMs, then
    through   dx += sum_k mask_k(dh_k U_k), in place

Shapes. N rows; x, base_k, dy_k: any row stride, unit column stride. U_k [R_k, D], P_k [O_k, R_k],
core [K, R, R]: the activations' dtype or float32, rounded once to it as they are loaded (P_k
beforehand for extend and for g_k side by side); P_k contiguous either way round. W_k [O_k, D]: unit
stride in either dim for the kernels, any for the library. K <= 4 outputs of any widths, each
R_k <= 256, nothing need be a multiple of anything; addresses are int64.

Grid. shrink, dh: one program per BLOCK_M rows (dh side by side: times K). expand, gemm_ext: row
tiles x column tiles, times K. through: row tiles x column tiles, a loop over k inside, as in dx.
tn: column tiles of all P_k and U stacked, times splits of the rows; tn_x: column tiles of x, times
splits; reduce: tiles of the stacked result. k is a grid axis or a loop and what is of k is chosen
by scalar selects; only shrink and tn_x are unrolled over k: they hold one sum for each
down-projection, so that a tile of x is loaded once for all, then masked anew for each. They hold
256 columns at most, each R_k as the largest, padded to a power of two (16 at least): what is beyond
is another launch. Up to 2048 rows, shrink and dh compute the transposed product, so that 16-row
tiles still fill the tensor core.

Traffic (e bytes per element, O = sum O_k, S splits; R stands for sum R_k where each output has its
own, and O R for sum O_k R_k; L2 serves the re-reads of what has R in a dim):

    shrink    (N D + R D + N R) e                        x once for 256 columns of h
    expand    (N O [base] + N O + N R + O R) e           eager: 5 N O + 3 K N R and masks
    gemm_ext  (N D + D O + N O + N R + O R) e            eager: 2 K N D + 4 N O more
    dh        (N O + O R + N R) e
    tn        (N O + N D + 2 N R) e + 4 S R (O + D)
              without U (N O + N R) e + 4 S R O
    tn_x      (N D + N R) e + 4 S R D                    x once for 256 columns of dh
    reduce    4 S R (O + D) + R (O + D) e                the partials once more, and the gradients
    dx        (N O + D O + N D + N R + R D) e            eager: K GEMMs and K sums of N D
    through   (N D [base] + N D + N R + R D) e           eager: K masks, products and sums of N D

Saved for backward: x and h, nothing else of N rows. Masks are drawn again wherever they act.

Numerics. Every product accumulates in fp32. Roundings to the activations' dtype: h, h core_k, g_k
("mode"), dh, and each output once; scale_k and keep_scale multiply the fp32 accumulator, so a
masked operand is not rounded a second time. Plan update rounds the base once more, where the
library writes it, and so does dx where the masks differ; extend and dx in one pass do not. Partials
are fp32 and summed in the order of the splits: the same bits every time. fp32 products are IEEE
unless ``torch.backends.cuda.matmul.fp32_precision`` is tf32. NaN and Inf propagate; a dropped NaN
is dropped.

Limits (``unsupported``): fp32, fp16, bf16; at most 4 outputs; every R_k <= 256; plans update and
extend; extend needs weights with a unit stride, all in the same dim; a CUDA device of compute
capability 8.0, or TRITON_INTERPRET=1 with CPU tensors, which excludes bf16 (the interpreter
multiplies its bit patterns).

Source: mode approximation of PETAL (arXiv 2312.12458) and Aurora (arXiv 2305.08381); LoRA (arXiv
2106.09685). Kernels: ``triton_kernels*.py``, ``triton_gemm_ext.py``; launch tables:
``triton_configs.py``; launches: ``triton_launch*.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.lowrank_linear import triton_launch as launch
from petal_kernels.ops.lowrank_linear import triton_launch_weights as sums
from petal_kernels.ops.lowrank_linear.arguments import Call, Gradients, Saved, Tensors

PLANS = ("update", "extend")
MAX_RANK = 256
# Below this width one pass over dx saves more than a generated GEMM loses against the library's.
MAX_FUSED_DX_WIDTH = 1024


def unsupported(call: Call, plan: str) -> list[str]:
    """Every reason for not running on these tensors."""
    t = call.tensors
    reasons = lib.device_reasons(t.x, t.hidden)
    if len(t.ups) > lib.MAX_POINTERS:
        reasons.append(f"at most {lib.MAX_POINTERS} outputs, got {len(t.ups)}")
    rank = max(up.shape[1] for up in t.ups)
    if rank > MAX_RANK:
        reasons.append(f"rank at most {MAX_RANK}, got {rank}")
    if plan not in ("auto", *PLANS):
        reasons.append(f"has no plan {plan!r}")
    if plan == "extend" and launch.one_layout(t.weights) is None:
        reasons.append("plan 'extend' needs weights with a unit stride, all in the same dim")
    return reasons


def _side_by_side(core: Tensor, dtype: torch.dtype) -> Tensor:
    """core [K, R, R] as [R, K*R], so that one GEMM multiplies h by every core_k."""
    k, rank, _ = core.shape
    return core.to(dtype).permute(1, 0, 2).reshape(rank, k * rank)


def forward(call: Call, rng: Tensor | None, plan: str) -> tuple[list[Tensor], Saved]:
    """Outputs [N, O_k] and h [N, R], or the sum of R_k."""
    t, s = call
    x = t.x
    drop = launch.Dropout.of(rng, s)
    with lib.on_device(call.first):
        if t.hidden is not None:
            h = t.hidden
        else:
            assert x is not None
            none = x.shape[0] == 0
            h = x.new_empty(0, call.middle) if none else launch.shrink(x, t.downs, drop)
        rows = h.shape[0]
        if rows == 0:
            return [h.new_empty(0, up.shape[0]) for up in t.ups], Saved(h)
        middle = h if t.core is None else h @ _side_by_side(t.core, h.dtype)
        parts = launch.Parts.of(call, drop)
        p = launch.matrices(t.ups, h.dtype, cast=plan == "extend")
        if plan == "extend":
            assert x is not None
            w = launch.matrices(t.weights, x.dtype)
            return launch.gemm_ext(x, w, t.biases, p, middle, parts, drop), Saved(h)
        if t.weights:
            assert x is not None
            ys = [
                torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
                for w, b in zip(t.weights, t.biases, strict=True)
            ]
        else:
            ys = [h.new_empty(rows, up.shape[0]) for up in t.ups]
        launch.expand(ys, ys if t.weights else t.base, p, middle, parts, drop)
    return ys, Saved(h)


def _fuses_dx(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return len(weights) > 1 and x.shape[1] <= MAX_FUSED_DX_WIDTH and x.element_size() == 2


def _dx(
    t: Tensors, dys: Sequence[Tensor], dh: Tensor | None, drop: launch.Dropout
) -> Tensor | None:
    """One GEMM over all (dy_k, W_k) and (dh, U), or the library's GEMMs and one read-modify-write
    pass over what dh adds."""
    x, downs, weights = t.x, t.downs, t.weights
    assert x is not None
    layout = launch.one_layout(weights)
    one_mask = len(downs) == 1 or not drop.on_input
    if downs and dh is not None and one_mask and _fuses_dx(x, weights) and layout is not None:
        u = downs[0] if len(downs) == 1 else torch.cat([d.to(x.dtype) for d in downs])
        return launch.dx_one_pass(dys, x, dh, u, launch.Matrices(list(weights), layout), drop)
    dx = None
    for dy, w in zip(dys, weights, strict=False):
        dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx if not downs or dh is None else launch.through(dx, x, dh, downs, drop)


def _parameter_gradients(
    t: Tensors,
    dys: Sequence[Tensor],
    middle: Tensor,
    parts: launch.Parts,
    dh: Tensor | None,
    drop: launch.Dropout,
    need: frozenset[str],
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """dP_k and dU: one launch where x is shared and not masked, else one for each."""
    dups, ddowns = None, None
    shared = None
    if "downs" in need and t.downs and dh is not None:
        assert t.x is not None
        if len(t.downs) == 1 and not drop.on_input and "ups" in need:
            ddowns = [torch.empty_like(t.downs[0], memory_format=torch.contiguous_format)]
            shared = (t.x, dh, ddowns[0])
        else:
            found, written, transposed = sums.gradients([d.t() for d in t.downs])
            downs = launch.Parts.downs(t.downs, drop)
            sums.sum_downs(t.x, dh, downs, drop, written, transposed)
            sums.copy_apart(found, written)
            ddowns = [d.t() for d in found]
    if "ups" in need:
        dups, written, transposed = sums.gradients(t.ups)
        sums.sum_ups(dys, middle, parts, drop, written, transposed, shared)
        sums.copy_apart(dups, written)
    return dups, ddowns


def backward(
    call: Call, saved: Saved, dys: list[Tensor], rng: Tensor | None, need: frozenset[str]
) -> Gradients:
    """The gradients that ``need`` names."""
    t, s = call
    h, core = saved.h, t.core
    drop = launch.Dropout.of(rng, s)
    parts = launch.Parts.of(call, drop)
    separate = core is not None or call.own_downs
    with lib.on_device(h):
        g = None
        if need & {"x", "downs", "hidden", "core"} or not t.downs:
            p = launch.matrices(t.ups, h.dtype, cast=separate)
            g = launch.bottleneck_gradient(dys, p, parts, drop, separate)
        dcore, dh, middle = None, g, h
        if core is not None:
            side = _side_by_side(core, h.dtype)
            dh = None if g is None else g @ side.t()
            middle = h @ side if "ups" in need else h
            if "core" in need and g is not None:
                dcore = torch.empty_like(core, memory_format=torch.contiguous_format)
                plain = launch.Parts(parts.spans, [1.0] * len(dys))
                sums.sum_ups([h] * len(dys), g, plain, launch.NO_DROPOUT, dcore.unbind(0), False)
        dups, ddowns = _parameter_gradients(t, dys, middle, parts, dh, drop, need)
        dx = _dx(t, dys, dh, drop) if "x" in need and t.x is not None else None
    return Gradients(dx, ddowns, dh, dups, dcore)
