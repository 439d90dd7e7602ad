"""How ``lowrank_linear``'s Triton kernels are launched: arguments, grids, splits, output buffers.

The kernels' documentation is in ``triton_impl.py``, which calls these.
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
from petal_kernels.ops.lowrank_linear import triton_kernels_weights as tw
from petal_kernels.ops.lowrank_linear.arguments import Settings
from petal_kernels.ops.lowrank_linear.triton_configs import RANK_SLICE, REDUCE, choose, swaps


@dataclass(frozen=True)
class Dropout:
    """The generator's arguments of a launch: where masks act, and the multiplier of kept
    elements."""

    rng: Tensor | None
    at: str
    threshold: int
    scale: float

    @classmethod
    def of(cls, rng: Tensor | None, s: Settings) -> Dropout:
        """A probability that rounds to zero is no dropout."""
        if rng is None or philox.threshold(s.dropout) == 0:
            return NO_DROPOUT
        return cls(rng, s.dropout_at, philox.threshold(s.dropout), philox.keep_scale(s.dropout))

    @property
    def on_input(self) -> bool:
        """Whether x is masked."""
        return self.rng is not None and self.at == "input"

    @property
    def on_middle(self) -> bool:
        """Whether the bottleneck is masked, before or after the core."""
        return self.rng is not None and self.at != "input"


NO_DROPOUT = Dropout(None, "", 0, 1.0)


def _is_transposed(t: Tensor) -> bool | None:
    """Which dim of a matrix is contiguous: False the last, True the first, None neither."""
    if t.stride(1) == 1 or (t.shape[1] == 1 and t.stride(0) != 1):
        return False
    return True if t.stride(0) == 1 or t.shape[0] == 1 else None


def one_layout(matrices: Sequence[Tensor]) -> bool | None:
    """The layout that all share, or None."""
    layouts = {_is_transposed(t) for t in matrices}
    return layouts.pop() if len(layouts) == 1 else None


@dataclass(frozen=True)
class Matrices:
    """Up to four matrices of one dtype and layout, as kernel arguments."""

    tensors: list[Tensor]
    transposed: bool

    @property
    def strides(self) -> list[int]:
        """Of the dim that is not contiguous, for the kernels' four slots."""
        return lib.four([t.stride(1 if self.transposed else 0) for t in self.tensors])

    @property
    def pointers(self) -> list[Tensor]:
        """The tensors, for the kernels' four slots."""
        return lib.four(self.tensors)


def matrices(given: Sequence[Tensor], dtype: torch.dtype, cast: bool = False) -> Matrices:
    """Copies only where dtypes or layouts differ among the matrices, or one has no unit stride.

    ``cast``: round to ``dtype`` here, for the kernels whose tiles leave no room to do it on load.
    """
    tensors = list(given)
    if cast or len({t.dtype for t in tensors}) > 1:
        tensors = [t.to(dtype) for t in tensors]
    layout = one_layout(tensors)
    if layout is None:
        return Matrices([t.contiguous() for t in tensors], False)
    return Matrices(tensors, layout)


def shrink(x: Tensor, down: Tensor, drop: Dropout) -> Tensor:
    """h = mask(x) U^T [N, R]."""
    rows, width = x.shape
    u = down if down.stride(1) == 1 else down.contiguous()
    h = x.new_empty(rows, u.shape[0])
    where = lib.machine(x)
    config = choose("shrink", where, rows, x.element_size(), u.shape[0])
    tk._lowrank_linear_shrink_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
        x, u, h, drop.rng if drop.on_input else None,
        rows, width, u.shape[0], x.stride(0), u.stride(0), drop.scale, drop.threshold,
        DROPOUT=drop.on_input, SWAP=swaps(where, rows), PRECISION=lib.precision(), **config,
    )  # fmt: skip
    return h


def expand(
    ys: Sequence[Tensor],
    base: Sequence[Tensor],
    ups: Matrices,
    h: Tensor,
    shared: bool,
    rank: int,
    alpha: float,
    drop: Dropout,
    drop_h: bool,
    drop_y: bool,
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
    )  # fmt: skip


def gemm_ext(
    x: Tensor,
    weights: Matrices,
    biases: Sequence[Tensor | None],
    ups: Matrices,
    h: Tensor,
    shared: bool,
    rank: int,
    alpha: float,
    drop: Dropout,
) -> list[Tensor]:
    """Every y_k by the extended GEMM; ``shared`` as in ``expand``."""
    rows, width = x.shape
    outs = [w.shape[0] for w in weights.tensors]
    ys = [x.new_empty(rows, o) for o in outs]
    has_bias = any(b is not None for b in biases)
    given = [
        x.new_zeros(o) if b is None else b.contiguous() for b, o in zip(biases, outs, strict=True)
    ]
    config = choose("gemm_ext", lib.machine(x), rows, x.element_size(), rank)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(max(outs), config["BLOCK_O"])
    gx._lowrank_linear_gemm_ext_kernel[(tiles, len(ys))](
        *lib.four(ys), *weights.pointers, *lib.four(given if has_bias else ys), *ups.pointers, x, h,
        drop.rng if drop.on_middle else None,
        rows, width, rank, *lib.four(outs), *weights.strides, *ups.strides,
        x.stride(0), h.stride(0), 0 if shared else rank, alpha, drop.threshold,
        HAS_BIAS=has_bias, W_TRANSPOSED=weights.transposed, P_TRANSPOSED=ups.transposed,
        DROPOUT=drop.on_middle, PRECISION=lib.precision(), **config,
    )  # fmt: skip
    return ys


def bottleneck_gradient(
    dys: Sequence[Tensor], ups: Matrices, rank: int, alpha: float, drop: Dropout, separate: bool
) -> Tensor:
    """dh [N, R], or with ``separate`` every g_k side by side [N, K*R]."""
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
    )  # fmt: skip
    return g


@dataclass(frozen=True)
class Reduction:
    """dP_k = alpha * big_k^T mask_k(small[:, k*offset:]) for every k, and dU = alpha_u * dh^T
    mask(x)."""

    bigs: Sequence[Tensor]
    small: Tensor | None
    offset: int
    alpha: float
    x: Tensor | None
    dh: Tensor | None
    alpha_u: float
    rank: int

    def run(
        self, drop: Dropout, douts: Sequence[Tensor], transposed: bool, ddown: Tensor | None
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
        splits = lib.row_splits(where, rows, tiles, config["BLOCK_M"], total * rank * 4)
        per_split = triton.cdiv(triton.cdiv(rows, config["BLOCK_M"]), splits) * config["BLOCK_M"]
        splits = triton.cdiv(rows, per_split)
        part = torch.empty((splits, total, rank), dtype=torch.float32, device=any_big.device)
        bigs = list(self.bigs) or [any_big]
        x = any_big if self.x is None else self.x
        dh = self.small if self.dh is None else self.dh
        small = dh if self.small is None else self.small
        assert small is not None
        assert dh is not None
        drop_small = drop.on_middle and bool(self.bigs)
        drop_x = drop.on_input and self.x is not None
        tw._lowrank_linear_bwd_tn_kernel[(tiles, splits)](
            *lib.four(bigs), x, small, dh, part, drop.rng if drop_small or drop_x else None,
            rows, rank, width, *outs, *lib.four([b.stride(0) for b in bigs]), x.stride(0),
            small.stride(0), self.offset, per_split, drop.threshold,
            DROP_SMALL=drop_small, DROP_X=drop_x, PRECISION=lib.precision(), **config,
        )  # fmt: skip
        self._sum(part, outs, width, douts, transposed, ddown)

    def _sum(
        self,
        part: Tensor,
        outs: list[int],
        width: int,
        douts: Sequence[Tensor],
        transposed: bool,
        ddown: Tensor | None,
    ) -> None:
        some = ddown if ddown is not None else douts[0]
        block_r = min(lib.padded_rank(self.rank), RANK_SLICE)
        block_o = dict(REDUCE.blocks)["BLOCK_O"]
        tiles = sum(triton.cdiv(o, block_o) for o in [*outs, width])
        tw._lowrank_linear_bwd_reduce_kernel[(tiles, triton.cdiv(self.rank, block_r))](
            part, *lib.four(list(douts) or [some]), some, self.rank, width, *outs,
            part.shape[0], part.stride(0), self.alpha, self.alpha_u,
            HAS_UPS=bool(douts), HAS_DOWN=ddown is not None, P_TRANSPOSED=transposed,
            BLOCK_R=block_r, **REDUCE.keywords(),
        )  # fmt: skip


def up_gradients(ups: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
    """What backward returns, what the kernel writes (the same where it can), and that one's
    layout."""
    returned = [torch.empty_like(up) for up in ups]
    layout = one_layout(returned)
    dense = all(t.is_contiguous() if not layout else t.t().is_contiguous() for t in returned)
    if layout is not None and dense and len({t.dtype for t in returned}) == 1:
        return returned, returned, layout
    written = [torch.empty(up.shape, dtype=torch.float32, device=up.device) for up in ups]
    return returned, written, False


def dx_one_pass(
    dys: Sequence[Tensor], x: Tensor, dh: Tensor, down: Tensor, weights: Matrices, drop: Dropout
) -> Tensor:
    """dx by one GEMM over all (dy_k, W_k) and (dh, U)."""
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
    )  # fmt: skip
    return dx
