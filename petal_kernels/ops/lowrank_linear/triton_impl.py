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
2106.09685). Kernels: ``triton_kernels.py``, ``triton_gemm_ext.py``; launch tables:
``triton_configs.py``; launches: ``triton_launch.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.lowrank_linear import triton_launch as launch

PLANS = ("update", "extend")
MAX_RANK = 256
# Below this width one pass over dx saves more than a generated GEMM loses against the library's.
MAX_FUSED_DX_WIDTH = 1024


def unsupported(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    base: Sequence[Tensor],
    core: Tensor | None,
    dropout: float,
    dropout_at: str,
    plan: str,
) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = lib.device_reasons(x, hidden)
    if len(ups) > lib.MAX_POINTERS:
        reasons.append(f"at most {lib.MAX_POINTERS} outputs, got {len(ups)}")
    if ups[0].shape[1] > MAX_RANK:
        reasons.append(f"rank at most {MAX_RANK}, got {ups[0].shape[1]}")
    if plan not in ("auto", *PLANS):
        reasons.append(f"has no plan {plan!r}")
    if plan == "extend" and launch.one_layout(weights) is None:
        reasons.append("plan 'extend' needs weights with a unit stride, all in the same dim")
    return reasons


def _side_by_side(core: Tensor, dtype: torch.dtype) -> Tensor:
    """core [K, R, R] as [R, K*R], so that one GEMM multiplies h by every core_k."""
    k, rank, _ = core.shape
    return core.to(dtype).permute(1, 0, 2).reshape(rank, k * rank)


def forward(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    base: Sequence[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    plan: str,
) -> tuple[list[Tensor], Tensor]:
    """Outputs [N, O_k] and h [N, R]."""
    first = x if hidden is None else hidden
    assert first is not None
    drop = launch.dropout_arguments(rng, dropout, dropout_at)
    with lib.on_device(first):
        if hidden is None:
            assert x is not None
            assert down is not None
            h = x.new_empty(0, down.shape[0]) if x.shape[0] == 0 else launch.shrink(x, down, drop)
        else:
            h = hidden
        rows, rank = h.shape
        if rows == 0:
            return [h.new_empty(0, up.shape[0]) for up in ups], h
        middle = h if core is None else h @ _side_by_side(core, h.dtype)
        alpha = scale * (drop.scale if drop.on_middle else 1.0)
        p = launch.matrices(ups, h.dtype, cast=plan == "extend")
        if plan == "extend":
            assert x is not None
            w = launch.matrices(weights, x.dtype)
            return launch.gemm_ext(x, w, biases, p, middle, core is None, rank, alpha, drop), h
        if weights:
            assert x is not None
            ys = [
                torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
                for w, b in zip(weights, biases, strict=True)
            ]
        else:
            ys = [h.new_empty(rows, up.shape[0]) for up in ups]
        launch.expand(
            ys,
            ys if weights else base,
            p,
            middle,
            core is None,
            rank,
            alpha,
            drop,
            drop_h=drop.on_middle,
            drop_y=False,
        )
    return ys, h


def _fuses_dx(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return len(weights) > 1 and x.shape[1] <= MAX_FUSED_DX_WIDTH and x.element_size() == 2


def _dx(
    dys: Sequence[Tensor],
    x: Tensor,
    dh: Tensor | None,
    down: Tensor | None,
    weights: Sequence[Tensor],
    drop: launch.Dropout,
) -> Tensor | None:
    """One GEMM over all (dy_k, W_k) and (dh, U), or the library's GEMMs and one read-modify-write
    pass."""
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


def _reduce_parameters(
    dys: Sequence[Tensor],
    middle: Tensor,
    alpha: float,
    x: Tensor | None,
    dh: Tensor | None,
    drop: launch.Dropout,
    rank: int,
    has_core: bool,
    written: list[Tensor],
    transposed: bool,
    ddown: Tensor | None,
) -> None:
    """dP_k and dU: one launch, except that a masked x is reduced apart (its mask is drawn per
    element of x)."""
    alpha_u = drop.scale if drop.on_input else 1.0
    offset = rank if has_core else 0
    ups_only = launch.Reduction(dys, middle, offset, alpha, None, None, 1.0, rank)
    if ddown is None or x is None:
        if written:
            ups_only.run(drop, written, transposed, None)
        return
    if written and not drop.on_input:
        both = launch.Reduction(dys, middle, offset, alpha, x, dh, alpha_u, rank)
        both.run(drop, written, transposed, ddown)
        return
    if written:
        ups_only.run(drop, written, transposed, None)
    launch.Reduction((), None, 0, 1.0, x, dh, alpha_u, rank).run(drop, (), False, ddown)


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor,
    down: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    need_dx: bool,
    need_ddown: bool,
    need_dups: bool,
    need_dcore: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor] | None, Tensor | None]:
    """dx, dh, ddown, dups, dcore."""
    drop = launch.dropout_arguments(rng, dropout, dropout_at)
    rank = h.shape[1]
    alpha = scale * (drop.scale if drop.on_middle else 1.0)
    with lib.on_device(h):
        p = launch.matrices(ups, h.dtype, cast=core is not None)
        g = None
        if need_dx or need_ddown or need_dcore or down is None:
            g = launch.bottleneck_gradient(dys, p, rank, alpha, drop, separate=core is not None)
        dcore, dh, middle = None, g, h
        if core is not None:
            side = _side_by_side(core, h.dtype)
            dh = None if g is None else g @ side.t()
            middle = h @ side if need_dups else h
            if need_dcore and g is not None:
                dcore = torch.empty_like(core, memory_format=torch.contiguous_format)
                cores = launch.Reduction([h] * len(ups), g, rank, 1.0, None, None, 1.0, rank)
                cores.run(launch.dropout_arguments(None, 0.0, ""), dcore.unbind(0), False, None)
        returned, written, transposed = launch.up_gradients(ups) if need_dups else ([], [], False)
        ddown = None
        if need_ddown and x is not None and down is not None and dh is not None:
            ddown = torch.empty_like(down, memory_format=torch.contiguous_format)
        _reduce_parameters(
            dys, middle, alpha, x, dh, drop, rank, core is not None, written, transposed, ddown
        )
        for target, source in zip(returned, written, strict=True):
            if target is not source:
                target.copy_(source)
        dx = _dx(dys, x, dh, down, weights, drop) if need_dx and x is not None else None
    return dx, dh, ddown, returned if need_dups else None, dcore
