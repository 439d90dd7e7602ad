"""``lowrank_linear`` in Triton: plans "update" and "extend", forward and backward, deterministic.

Maths. mask is 0 or keep_scale of ``_runtime/philox.py``: mask_k from stream k, mask_x (only for
dropout_at="input") from stream 0. h_k is h, or h core_k ("mode", by the library).

    shrink    h = mask_x(x) U^T                                       [N, R]
    expand    y_k = base_k + scale * mask_k(h_k) P_k^T                [N, O_k]
    gemm_ext  y_k = x W_k^T + b_k + scale * mask_k(h_k) P_k^T         plan extend
              plan update: the library's GEMM, then expand in place
    dh        g_k = scale * mask_k(dy_k P_k), dh = sum_k g_k          [N, R]
              "mode": g [N, K R], then dh = sum_k g_k core_k^T by the library
    tn        dP_k = scale * dy_k^T mask_k(h_k)                       [O_k, R]
              dU = dh^T mask_x(x), dcore_k = h^T g_k                  [R, D], [R, R]
    dx        dx = sum_k dy_k W_k + mask_x(dh U)                      [N, D], in one pass
              or the library's GEMMs, then expand in place

Shapes. N rows; x, base_k, dy_k: any row stride, unit column stride. U [R, D], P_k [O_k, R], core
[K, R, R]: the activations' dtype or float32, rounded once to it as they are loaded (P_k beforehand
for extend and for the g_k of "mode"); P_k contiguous either way round. W_k [O_k, D]: unit stride in
either dim for the kernels, any for the library. K <= 4 outputs of any widths, R <= 256, nothing
need be a multiple of anything; addresses are int64.

Grid. shrink, dh: one program per BLOCK_M rows (dh in "mode": times K). expand, gemm_ext: row tiles
x column tiles, times K: k is a grid axis and its pointers are chosen by scalar selects, nothing is
unrolled over k. dx: row tiles x column tiles, a loop over k inside. tn: column tiles of all P_k and
U stacked, times splits of the rows; reduce: tiles of the stacked result. Up to 2048 rows, shrink
and dh compute the transposed product, so that 16-row tiles still fill the tensor core.

Traffic (e bytes per element, O = sum O_k, S splits; L2 serves the re-reads of what has R in a dim):

    shrink    (N D + R D + N R) e
    expand    (N O [base] + N O + N R + O R) e           eager: 5 N O + 3 K N R and masks
    gemm_ext  (N D + D O + N O + N R + O R) e            eager: 2 K N D + 4 N O more
    dh        (N O + O R + N R) e
    tn        (N O + N D + 2 N R) e + 4 S R (O + D)
    reduce    4 S R (O + D) + R (O + D) e                the partials once more, and the gradients
    dx        (N O + D O + N D + N R + R D) e            eager: K GEMMs and K sums of N D

Saved for backward: x and h, nothing else of N rows. Masks are drawn again wherever they act.

Numerics. Every product accumulates in fp32. Roundings to the activations' dtype: h, h core_k, g_k
("mode"), dh, and each output once; scale and keep_scale multiply the fp32 accumulator, so a masked
operand is not rounded a second time. Plan update rounds the base once more, where the library
writes it; extend and dx do not. Partials are fp32 and summed in the order of the splits: the same
bits every time. fp32 products are IEEE unless ``torch.backends.cuda.matmul.fp32_precision`` is
tf32. NaN and Inf propagate; a dropped NaN is dropped.

Limits (``unsupported``): fp32, fp16, bf16; at most 4 outputs; R <= 256; plans update and extend;
extend needs weights with a unit stride, all in the same dim; a CUDA device of compute capability
8.0, or TRITON_INTERPRET=1 with CPU tensors, which excludes bf16 (the interpreter multiplies its bit
patterns).

Source: mode approximation of PETAL (arXiv 2312.12458) and Aurora (arXiv 2305.08381); LoRA (arXiv
2106.09685). Kernels: ``triton_kernels*.py``, ``triton_gemm_ext.py``; launch tables:
``triton_configs.py``; launches: ``triton_launch.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.lowrank_linear import triton_launch as launch
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
    if call.own_downs:
        reasons.append("has no kernels for a down-projection of every output's own")
    if len(set(call.settings.scales)) > 1:
        reasons.append("has no kernels for scales that differ")
    if t.ups[0].shape[1] > MAX_RANK:
        reasons.append(f"rank at most {MAX_RANK}, got {t.ups[0].shape[1]}")
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
    """Outputs [N, O_k] and h [N, R]."""
    t, s = call
    x = t.x
    drop = launch.Dropout.of(rng, s)
    with lib.on_device(call.first):
        if t.hidden is not None:
            h = t.hidden
        else:
            assert x is not None
            none = x.shape[0] == 0
            h = x.new_empty(0, call.middle) if none else launch.shrink(x, t.downs[0], drop)
        rows, rank = h.shape
        if rows == 0:
            return [h.new_empty(0, up.shape[0]) for up in t.ups], Saved(h)
        shared = t.core is None
        middle = h if t.core is None else h @ _side_by_side(t.core, h.dtype)
        alpha = s.scales[0] * (drop.scale if drop.on_middle else 1.0)
        p = launch.matrices(t.ups, h.dtype, cast=plan == "extend")
        if plan == "extend":
            assert x is not None
            w = launch.matrices(t.weights, x.dtype)
            ys = launch.gemm_ext(x, w, t.biases, p, middle, shared, rank, alpha, drop)
            return ys, Saved(h)
        if t.weights:
            assert x is not None
            ys = [
                torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
                for w, b in zip(t.weights, t.biases, strict=True)
            ]
        else:
            ys = [h.new_empty(rows, up.shape[0]) for up in t.ups]
        base = ys if t.weights else t.base
        launch.expand(
            ys, base, p, middle, shared, rank, alpha, drop, drop_h=drop.on_middle, drop_y=False
        )
    return ys, Saved(h)


def _fuses_dx(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return len(weights) > 1 and x.shape[1] <= MAX_FUSED_DX_WIDTH and x.element_size() == 2


def _dx(
    t: Tensors, dys: Sequence[Tensor], dh: Tensor | None, drop: launch.Dropout
) -> Tensor | None:
    """One GEMM over all (dy_k, W_k) and (dh, U), or the library's GEMMs and one read-modify-write
    pass."""
    x, down, weights = t.x, t.downs[0] if t.downs else None, t.weights
    assert x is not None
    layout = launch.one_layout(weights)
    if down is not None and dh is not None and _fuses_dx(x, weights) and layout is not None:
        return launch.dx_one_pass(dys, x, dh, down, launch.Matrices(list(weights), layout), drop)
    dx = None
    for dy, w in zip(dys, weights, strict=False):
        dx = dy @ w if dx is None else dx.addmm_(dy, w)
    if down is None or dh is None:
        return dx
    base = [] if dx is None else [dx]
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx
    up = launch.matrices([down.t()], dh.dtype)
    alpha = drop.scale if drop.on_input else 1.0
    launch.expand(
        [out], base, up, dh, True, dh.shape[1], alpha, drop, drop_h=False, drop_y=drop.on_input
    )
    return out


def _parameter_gradients(
    t: Tensors,
    dys: Sequence[Tensor],
    middle: Tensor,
    alpha: float,
    dh: Tensor | None,
    drop: launch.Dropout,
    need: frozenset[str],
) -> tuple[list[Tensor] | None, Tensor | None]:
    """dP_k and dU: one launch, except that a masked x is reduced apart (its mask is drawn per
    element of x)."""
    rank = t.ups[0].shape[1]
    offset = 0 if t.core is None else rank
    alpha_u = drop.scale if drop.on_input else 1.0
    dups, ddown = None, None
    written: list[Tensor] = []
    transposed = False
    if "ups" in need:
        dups, written, transposed = launch.up_gradients(t.ups)
    if "downs" in need and t.x is not None and t.downs and dh is not None:
        ddown = torch.empty_like(t.downs[0], memory_format=torch.contiguous_format)
    if written and ddown is not None and not drop.on_input:
        both = launch.Reduction(dys, middle, offset, alpha, t.x, dh, alpha_u, rank)
        both.run(drop, written, transposed, ddown)
    else:
        if written:
            ups = launch.Reduction(dys, middle, offset, alpha, None, None, 1.0, rank)
            ups.run(drop, written, transposed, None)
        if ddown is not None:
            down = launch.Reduction((), None, 0, 1.0, t.x, dh, alpha_u, rank)
            down.run(drop, (), False, ddown)
    for target, source in zip(dups or (), written, strict=True):
        if target is not source:
            target.copy_(source)
    return dups, ddown


def backward(
    call: Call, saved: Saved, dys: list[Tensor], rng: Tensor | None, need: frozenset[str]
) -> Gradients:
    """The gradients that ``need`` names."""
    t, s = call
    h, core, rank = saved.h, t.core, saved.h.shape[1]
    drop = launch.Dropout.of(rng, s)
    alpha = s.scales[0] * (drop.scale if drop.on_middle else 1.0)
    with lib.on_device(h):
        g = None
        if need & {"x", "downs", "hidden", "core"} or not t.downs:
            p = launch.matrices(t.ups, h.dtype, cast=core is not None)
            g = launch.bottleneck_gradient(dys, p, rank, alpha, drop, separate=core is not None)
        dcore, dh, middle = None, g, h
        if core is not None:
            side = _side_by_side(core, h.dtype)
            dh = None if g is None else g @ side.t()
            middle = h @ side if "ups" in need else h
            if "core" in need and g is not None:
                dcore = torch.empty_like(core, memory_format=torch.contiguous_format)
                cores = launch.Reduction([h] * len(dys), g, rank, 1.0, None, None, 1.0, rank)
                cores.run(launch.NO_DROPOUT, dcore.unbind(0), False, None)
        dups, ddown = _parameter_gradients(t, dys, middle, alpha, dh, drop, need)
        dx = _dx(t, dys, dh, drop) if "x" in need and t.x is not None else None
    return Gradients(dx, None if ddown is None else [ddown], dh, dups, dcore)
