"""``lowrank_linear`` in Triton: plans "update" and "extend", forward and backward, deterministic.

Maths. With mask_k = 0 or keep_scale from ``_runtime/philox.py`` (stream k; stream 0 on the input), U [R, D],
P_k [O_k, R], W_k [O_k, D]:

    shrink    h = mask_x(x) U^T                                   [N, R]      mask_x only for dropout_at="input"
    expand    y_k = base_k + scale * mask_k(h_k) P_k^T            [N, O_k]    h_k = h, or h core_k ("mode", by the library)
    gemm_ext  y_k = x W_k^T + b_k + scale * mask_k(h_k) P_k^T     plan extend; plan update: library GEMM, then expand
    dh        g_k = scale * mask_k(dy_k P_k), dh = sum_k g_k      "mode": all g_k, then dh = sum_k g_k core_k^T
    tn        dP_k = scale * dy_k^T mask_k(h_k), dU = dh^T mask_x(x), dcore_k = h^T g_k
    dx        dx = sum_k dy_k W_k + mask_x(dh U)                  one GEMM, or library GEMMs, then expand

Shapes. N rows; x, base_k, dy_k: any row stride, unit column stride. U, P_k, core: the activations' dtype or float32,
rounded once to it as they are loaded; P_k contiguous either way round. W_k: unit stride in either dim for the kernels.
K <= 4 outputs of any widths O_k, R <= 256, nothing need be a multiple of anything; addresses are int64.

Grid. shrink, dh: one program per BLOCK_M rows (dh "mode": times K). expand, gemm_ext: row tiles x column tiles, times K:
k is a grid axis and its pointers are chosen by scalar selects, nothing is unrolled over k. tn: column tiles of all P_k
and U stacked, times splits of the rows; reduce: tiles of the stacked result. Under 2048 rows shrink and dh compute the
transposed product, so that 16-row tiles still fill the tensor core.

Traffic (e bytes per element, O = sum O_k; L2 serves re-reads of operands with R in a dim):
    shrink    (N D + R D + N R) e
    expand    (N O read where a base is given, N O written + N R + O R) e;       eager: 5 N O + 3 K N R and a mask
    gemm_ext  (N D + D O + N O + N R + O R) e;                                     eager: + 2 K N D + 4 N O
    dh        (N O + O R + N R) e
    tn        (N O + N D + 2 N R) e + 4 S R (O + D), S splits of the rows;  reduce: the same partials + R (O + D) e
    dx        (N O + D O + N D + N R + R D) e;                                     eager: K GEMMs and K additions of N D
Saved for backward: x and h, nothing else of N rows. Masks are drawn again wherever they act, never stored.

Numerics. Every product accumulates in fp32. Roundings to the activations' dtype: h, h core_k, g_k ("mode"), dh, and each
output once; scale and keep_scale multiply the fp32 accumulator, so masked operands are not rounded a second time. Plan
update rounds the base once more, where the library writes it; plan extend and dx do not. Partials are fp32 and summed
in the order of the splits: the same bits every time. fp32 products are IEEE unless
``torch.backends.cuda.matmul.allow_tf32``. NaN and Inf propagate; a dropped NaN is dropped.

Limits (``unsupported``): fp32, fp16, bf16; at most 4 outputs; R <= 256; plans update and extend; extend needs weights with
a unit stride, all in the same dim; a CUDA device of compute capability 8.0, or TRITON_INTERPRET=1 with CPU tensors, which
excludes bf16 (the interpreter multiplies its bit patterns).

Source: mode approximation of PETAL (arXiv 2312.12458) and Aurora (arXiv 2305.08381); LoRA (arXiv 2106.09685).
Kernels: ``triton_kernels.py``, ``triton_gemm_ext.py``; launch tables: ``triton_configs.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.lowrank_linear import triton_gemm_ext as gx
from petal_kernels.ops.lowrank_linear import triton_kernels as tk
from petal_kernels.ops.lowrank_linear.triton_configs import REDUCE, choose, swaps

PLANS = ("update", "extend")
MAX_RANK = 256
# Partials larger than this leave the L2 cache of the smallest device the tables serve well (an eighth of 50 MB).
MAX_PARTIAL_BYTES = 6 << 20
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
    if plan == "extend" and _one_layout(weights) is None:
        reasons.append("plan 'extend' needs weights with a unit stride, all in the same dim")
    return reasons


@dataclass(frozen=True)
class _Dropout:
    """The generator's arguments of a launch: where masks act, and the multiplier of kept elements."""

    rng: Tensor | None
    at: str
    threshold: int
    scale: float

    @property
    def on_input(self) -> bool:
        return self.rng is not None and self.at == "input"

    @property
    def on_middle(self) -> bool:
        return self.rng is not None and self.at != "input"


def _dropout(rng: Tensor | None, p: float, at: str) -> _Dropout:
    if rng is None or philox.threshold(p) == 0:
        return _Dropout(None, at, 0, 1.0)
    return _Dropout(rng, at, philox.threshold(p), philox.keep_scale(p))


def _is_transposed(t: Tensor) -> bool | None:
    """Which dim of a matrix is contiguous: False the last, True the first, None neither."""
    if t.stride(1) == 1 or (t.shape[1] == 1 and t.stride(0) != 1):
        return False
    return True if t.stride(0) == 1 or t.shape[0] == 1 else None


def _one_layout(matrices: Sequence[Tensor]) -> bool | None:
    """The layout that all share, or None."""
    layouts = {_is_transposed(t) for t in matrices}
    return layouts.pop() if len(layouts) == 1 else None


@dataclass(frozen=True)
class _Matrices:
    """Up to four matrices of one dtype and layout, as kernel arguments."""

    tensors: list[Tensor]
    transposed: bool

    @property
    def strides(self) -> list[int]:
        return lib.four([t.stride(1 if self.transposed else 0) for t in self.tensors])

    @property
    def pointers(self) -> list[Tensor]:
        return lib.four(self.tensors)


def _matrices(given: Sequence[Tensor], dtype: torch.dtype) -> _Matrices:
    """Copies only where dtypes or layouts differ among the matrices, or one has no unit stride."""
    tensors = list(given)
    if len({t.dtype for t in tensors}) > 1:
        tensors = [t.to(dtype) for t in tensors]
    layout = _one_layout(tensors)
    if layout is None:
        return _Matrices([t.contiguous() for t in tensors], False)
    return _Matrices(tensors, layout)


def _shrink(x: Tensor, down: Tensor, drop: _Dropout) -> Tensor:
    rows, width = x.shape
    u = down if down.stride(1) == 1 else down.contiguous()
    h = x.new_empty(rows, u.shape[0])
    where = lib.machine(x)
    config = choose("shrink", where, rows, x.element_size(), u.shape[0])
    tk._lowrank_linear_shrink_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
        x, u, h, drop.rng if drop.on_input else None,
        rows, width, u.shape[0], x.stride(0), u.stride(0), drop.scale, drop.threshold,
        DROPOUT=drop.on_input, SWAP=swaps(where, rows), PRECISION=lib.precision(), **config,
    )
    return h


def _expand(
    ys: Sequence[Tensor], base: Sequence[Tensor], ups: _Matrices, h: Tensor, shared: bool,
    rank: int, alpha: float, drop: _Dropout, drop_h: bool, drop_y: bool,
) -> None:
    """``shared``: every output reads the same h; otherwise output k reads columns k*R of it."""
    rows = h.shape[0]
    config = choose("expand", lib.machine(h), rows, h.element_size(), rank)
    outs = [y.shape[1] for y in ys]
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(max(outs), config["BLOCK_O"])
    sources = base or ys
    tk._lowrank_linear_expand_kernel[(tiles, len(ys))](
        *lib.four(list(ys)), *lib.four(list(sources)), *ups.pointers, h,
        drop.rng if drop_h or drop_y else None,
        rows, rank, *lib.four(outs), *lib.four([b.stride(0) for b in sources]), *ups.strides,
        h.stride(0), 0 if shared else rank, alpha, drop.threshold,
        HAS_BASE=bool(base), P_TRANSPOSED=ups.transposed, DROP_H=drop_h, DROP_Y=drop_y,
        PRECISION=lib.precision(), **config,
    )


def _gemm_ext(
    x: Tensor, weights: _Matrices, biases: Sequence[Tensor | None], ups: _Matrices, h: Tensor,
    shared: bool, rank: int, alpha: float, drop: _Dropout,
) -> list[Tensor]:
    rows, width = x.shape
    outs = [w.shape[0] for w in weights.tensors]
    ys = [x.new_empty(rows, o) for o in outs]
    has_bias = any(b is not None for b in biases)
    given = [x.new_zeros(o) if b is None else b.contiguous() for b, o in zip(biases, outs, strict=True)]
    config = choose("gemm_ext", lib.machine(x), rows, x.element_size(), rank)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(max(outs), config["BLOCK_O"])
    gx._lowrank_linear_gemm_ext_kernel[(tiles, len(ys))](
        *lib.four(ys), *weights.pointers, *lib.four(given if has_bias else ys), *ups.pointers, x, h,
        drop.rng if drop.on_middle else None,
        rows, width, rank, *lib.four(outs), *weights.strides, *ups.strides,
        x.stride(0), h.stride(0), 0 if shared else rank, alpha, drop.threshold,
        HAS_BIAS=has_bias, W_TRANSPOSED=weights.transposed, P_TRANSPOSED=ups.transposed,
        DROPOUT=drop.on_middle, PRECISION=lib.precision(), **config,
    )
    return ys


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
    drop = _dropout(rng, dropout, dropout_at)
    with lib.on_device(first):
        if hidden is None:
            assert x is not None and down is not None
            h = x.new_empty(0, down.shape[0]) if x.shape[0] == 0 else _shrink(x, down, drop)
        else:
            h = hidden
        rows, rank = h.shape
        if rows == 0:
            return [h.new_empty(0, up.shape[0]) for up in ups], h
        middle = h if core is None else h @ _side_by_side(core, h.dtype)
        alpha = scale * (drop.scale if drop.on_middle else 1.0)
        p = _matrices(ups, h.dtype)
        if plan == "extend":
            assert x is not None
            w = _matrices(weights, x.dtype)
            return _gemm_ext(x, w, biases, p, middle, core is None, rank, alpha, drop), h
        if weights:
            assert x is not None
            ys = [
                torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
                for w, b in zip(weights, biases, strict=True)
            ]
        else:
            ys = [h.new_empty(rows, up.shape[0]) for up in ups]
        _expand(
            ys, ys if weights else base, p, middle, core is None, rank, alpha, drop,
            drop_h=drop.on_middle, drop_y=False,
        )
    return ys, h


def _dh(
    dys: Sequence[Tensor], ups: _Matrices, rank: int, alpha: float, drop: _Dropout, separate: bool
) -> Tensor:
    rows, outputs = dys[0].shape[0], len(dys)
    g = dys[0].new_empty(rows, outputs * rank if separate else rank)
    where = lib.machine(g)
    config = choose("dh", where, rows, g.element_size(), rank)
    grid = (triton.cdiv(rows, config["BLOCK_M"]), outputs if separate else 1)
    tk._lowrank_linear_bwd_dh_kernel[grid](
        *lib.four(list(dys)), *ups.pointers, g, drop.rng if drop.on_middle else None,
        rows, rank, outputs, *lib.four([dy.shape[1] for dy in dys]),
        *lib.four([dy.stride(0) for dy in dys]), *ups.strides, g.stride(0), alpha, drop.threshold,
        DROPOUT=drop.on_middle, SEPARATE=separate, P_TRANSPOSED=ups.transposed,
        SWAP=swaps(where, rows), PRECISION=lib.precision(), **config,
    )
    return g


def _splits(where: lib.Machine, rows: int, tiles: int, block_m: int, bytes_per_split: int) -> int:
    """How many ways to split the rows: two programs per processor, partials that stay in L2, two tiles each."""
    if where.arch == 0:
        return min(3, triton.cdiv(rows, block_m))
    wanted = triton.cdiv(2 * where.processors, tiles)
    return max(1, min(wanted, rows // (2 * block_m), MAX_PARTIAL_BYTES // bytes_per_split))


@dataclass(frozen=True)
class _Reduction:
    """dP_k = alpha * big_k^T mask_k(small[:, k*offset:]) for every k, and dU = alpha_u * dh^T mask(x)."""

    bigs: Sequence[Tensor]
    small: Tensor | None
    offset: int
    alpha: float
    x: Tensor | None
    dh: Tensor | None
    alpha_u: float
    rank: int

    def run(
        self, drop: _Dropout, douts: Sequence[Tensor], transposed: bool, ddown: Tensor | None
    ) -> None:
        """Launch the split reduction and the summation of its partials."""
        widths = [b.shape[1] for b in self.bigs]
        outs = widths + [0] * (lib.MAX_POINTERS - len(widths))
        any_big = self.bigs[0] if self.bigs else self.x
        assert any_big is not None
        width = 0 if self.x is None else self.x.shape[1]
        rows, rank = any_big.shape[0], self.rank
        where = lib.machine(any_big)
        config = choose("tn", where, rows, any_big.element_size(), rank)
        tiles = sum(triton.cdiv(o, config["BLOCK_O"]) for o in [*outs, width])
        total = sum(outs) + width
        splits = _splits(where, rows, tiles, config["BLOCK_M"], total * rank * 4)
        per_split = triton.cdiv(triton.cdiv(rows, config["BLOCK_M"]), splits) * config["BLOCK_M"]
        splits = triton.cdiv(rows, per_split)
        part = torch.empty((splits, total, rank), dtype=torch.float32, device=any_big.device)
        bigs = list(self.bigs) or [any_big]
        x = any_big if self.x is None else self.x
        dh = self.small if self.dh is None else self.dh
        small = dh if self.small is None else self.small
        assert small is not None and dh is not None
        drop_small = drop.on_middle and bool(self.bigs)
        drop_x = drop.on_input and self.x is not None
        tk._lowrank_linear_bwd_tn_kernel[(tiles, splits)](
            *lib.four(bigs), x, small, dh, part, drop.rng if drop_small or drop_x else None,
            rows, rank, width, *outs, *lib.four([b.stride(0) for b in bigs]), x.stride(0),
            small.stride(0), self.offset, per_split, drop.threshold,
            DROP_SMALL=drop_small, DROP_X=drop_x, PRECISION=lib.precision(), **config,
        )
        some = ddown if ddown is not None else douts[0]
        block_r = min(lib.padded_rank(rank), 64)
        block_o = dict(REDUCE.blocks)["BLOCK_O"]
        tiles = sum(triton.cdiv(o, block_o) for o in [*outs, width])
        tk._lowrank_linear_bwd_reduce_kernel[(tiles, triton.cdiv(rank, block_r))](
            part, *lib.four(list(douts) or [some]), some, rank, width, *outs, splits, part.stride(0),
            self.alpha, self.alpha_u,
            HAS_UPS=bool(douts), HAS_DOWN=ddown is not None, P_TRANSPOSED=transposed,
            BLOCK_R=block_r, **REDUCE.keywords(),
        )


def _up_gradients(ups: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
    """What backward returns, what the kernel writes (the same where it can), and that one's layout."""
    returned = [torch.empty_like(up) for up in ups]
    layout = _one_layout(returned)
    dense = all(
        t.is_contiguous() if not layout else t.t().is_contiguous() for t in returned
    )
    if layout is not None and dense and len({t.dtype for t in returned}) == 1:
        return returned, returned, layout
    written = [torch.empty(up.shape, dtype=torch.float32, device=up.device) for up in ups]
    return returned, written, False


def _dx(
    dys: Sequence[Tensor], x: Tensor, dh: Tensor | None, down: Tensor | None,
    weights: Sequence[Tensor], drop: _Dropout,
) -> Tensor | None:
    """One GEMM over all (dy_k, W_k) and (dh, U), or the library's GEMMs and one read-modify-write pass."""
    layout = _one_layout(weights)
    if down is not None and dh is not None and _fuses_dx(x, weights) and layout is not None:
        return _dx_one_pass(dys, x, dh, down, _Matrices(list(weights), layout), drop)
    dx = None
    for dy, w in zip(dys, weights, strict=False):
        dx = dy @ w if dx is None else dx.addmm_(dy, w)
    if down is None or dh is None:
        return dx
    base = [] if dx is None else [dx]
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx
    up = _matrices([down.t()], dh.dtype)
    alpha = drop.scale if drop.on_input else 1.0
    _expand(
        [out], base, up, dh, True, dh.shape[1], alpha, drop, drop_h=False, drop_y=drop.on_input
    )
    return out


def _fuses_dx(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return len(weights) > 1 and x.shape[1] <= MAX_FUSED_DX_WIDTH and x.element_size() == 2


def _dx_one_pass(
    dys: Sequence[Tensor], x: Tensor, dh: Tensor, down: Tensor, weights: _Matrices, drop: _Dropout
) -> Tensor:
    rows, width = x.shape
    rank = dh.shape[1]
    u = down if down.stride(1) == 1 else down.contiguous()
    dx = x.new_empty(rows, width)
    config = choose("dx", lib.machine(x), rows, x.element_size(), rank)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_K"])
    gx._lowrank_linear_bwd_dx_kernel[(tiles,)](
        dx, *lib.four(list(dys)), *weights.pointers, dh, u, drop.rng if drop.on_input else None,
        rows, width, rank, len(dys), *lib.four([dy.shape[1] for dy in dys]),
        *lib.four([dy.stride(0) for dy in dys]), *weights.strides, u.stride(0),
        drop.scale, drop.threshold,
        W_TRANSPOSED=weights.transposed, DROPOUT=drop.on_input, PRECISION=lib.precision(), **config,
    )
    return dx


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
    drop = _dropout(rng, dropout, dropout_at)
    rank = h.shape[1]
    alpha = scale * (drop.scale if drop.on_middle else 1.0)
    with lib.on_device(h):
        p = _matrices(ups, h.dtype)
        g = _dh(dys, p, rank, alpha, drop, separate=core is not None)
        dcore, dh, middle = None, g, h
        if core is not None:
            side = _side_by_side(core, h.dtype)
            dh = g @ side.t()
            middle = h @ side if need_dups else h
            if need_dcore:
                dcore = torch.empty_like(core, memory_format=torch.contiguous_format)
                cores = _Reduction([h] * len(ups), g, rank, 1.0, None, None, 1.0, rank)
                cores.run(_dropout(None, 0.0, ""), dcore.unbind(0), False, None)
        returned, written, transposed = _up_gradients(ups) if need_dups else ([], [], False)
        ddown = None
        if need_ddown and x is not None and down is not None:
            ddown = torch.empty_like(down, memory_format=torch.contiguous_format)
        _reduce_parameters(
            dys, middle, alpha, x, dh, drop, rank, core is not None, written, transposed, ddown
        )
        for target, source in zip(returned, written, strict=True):
            if target is not source:
                target.copy_(source)
        dx = _dx(dys, x, dh, down, weights, drop) if need_dx and x is not None else None
    return dx, dh, ddown, returned if need_dups else None, dcore


def _reduce_parameters(
    dys: Sequence[Tensor], middle: Tensor, alpha: float, x: Tensor | None, dh: Tensor,
    drop: _Dropout, rank: int, has_core: bool, written: list[Tensor], transposed: bool,
    ddown: Tensor | None,
) -> None:
    """dP_k and dU: one launch, except that a masked x is reduced apart (its mask is drawn per element of x)."""
    alpha_u = drop.scale if drop.on_input else 1.0
    offset = rank if has_core else 0
    ups_only = _Reduction(dys, middle, offset, alpha, None, None, 1.0, rank)
    if ddown is None or x is None:
        if written:
            ups_only.run(drop, written, transposed, None)
        return
    if written and not drop.on_input:
        both = _Reduction(dys, middle, offset, alpha, x, dh, alpha_u, rank)
        both.run(drop, written, transposed, ddown)
        return
    if written:
        ups_only.run(drop, written, transposed, None)
    _Reduction((), None, 0, 1.0, x, dh, alpha_u, rank).run(drop, (), False, ddown)
