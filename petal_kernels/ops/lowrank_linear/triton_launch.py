"""How ``lowrank_linear``'s Triton kernels are launched: arguments, grids, output buffers; the sums
over rows are in ``triton_launch_weights.py``.

The kernels' documentation is in ``triton_impl.py``, which calls these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.lowrank_linear import triton_gemm_ext as gx
from petal_kernels.ops.lowrank_linear import triton_kernels as tk
from petal_kernels.ops.lowrank_linear import triton_kernels_bwd as tb
from petal_kernels.ops.lowrank_linear.arguments import Call, Settings
from petal_kernels.ops.lowrank_linear.triton_configs import MAX_COLUMNS, choose, swaps


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


@dataclass(frozen=True)
class Parts:
    """First column and rank of every output's part of a tensor with columns of h, and what its
    product is multiplied by."""

    spans: Sequence[tuple[int, int]]
    factors: Sequence[float]

    @classmethod
    def of(cls, call: Call, drop: Dropout) -> Parts:
        """What the up-projections multiply: of h, or where there is a core of all h core_k side by
        side. The factor is the scale, and the keep scale where a mask acts there."""
        spans = call.spans
        if call.tensors.core is not None:
            spans = [(k * rank, rank) for k, (_, rank) in enumerate(spans)]
        keep_scale = drop.scale if drop.on_middle else 1.0
        return cls(spans, [scale * keep_scale for scale in call.settings.scales])

    @classmethod
    def downs(cls, downs: Sequence[Tensor], drop: Dropout) -> Parts:
        """What the down-projections yield."""
        ranks = [d.shape[0] for d in downs]
        spans = [(sum(ranks[:k]), rank) for k, rank in enumerate(ranks)]
        return cls(spans, [drop.scale if drop.on_input else 1.0] * len(ranks))

    @property
    def starts(self) -> list[int]:
        """For the kernels' four slots, as the next two."""
        return lib.four([start for start, _ in self.spans])

    @property
    def ranks(self) -> list[int]:
        """Columns of each part."""
        return lib.four([rank for _, rank in self.spans])

    @property
    def alphas(self) -> list[float]:
        """Multiplier of each product."""
        return lib.four(list(self.factors))

    @property
    def widest(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    @property
    def columns(self) -> int:
        """Of the whole tensor."""
        return max(start + rank for start, rank in self.spans)

    def groups(self) -> Iterator[tuple[int, Parts]]:
        """The parts that one program may hold at once, and the number of the first: neighbours
        whose padded ranks are at most MAX_COLUMNS together."""
        first = 0
        while first < len(self.spans):
            last = first + 1
            while last < len(self.spans) and self._fits(first, last + 1):
                last += 1
            yield first, Parts(self.spans[first:last], self.factors[first:last])
            first = last

    def _fits(self, first: int, last: int) -> bool:
        widest = max(rank for _, rank in self.spans[first:last])
        return lib.padded_rank(widest) * (last - first) <= MAX_COLUMNS


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


def shrink(x: Tensor, downs: Sequence[Tensor], drop: Dropout) -> Tensor:
    """h [N, sum of R_k]: mask_k(x) U_k^T of every down-projection, side by side."""
    rows, width = x.shape
    parts = Parts.downs(downs, drop)
    h = x.new_empty(rows, parts.columns)
    same = len({d.dtype for d in downs}) == 1
    us = [d if same else d.to(x.dtype) for d in downs]
    us = [u if u.stride(1) == 1 else u.contiguous() for u in us]
    where = lib.machine(x)
    for first, some in parts.groups():
        count = len(some.spans)
        mine = lib.four(us[first : first + count])
        config = choose("shrink", where, rows, x.element_size(), some.widest, count)
        tk._lowrank_linear_shrink_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
            x, *mine, h[:, some.starts[0] :], drop.rng if drop.on_input else None, first,
            rows, width, *some.ranks, x.stride(0), *[u.stride(0) for u in mine], h.stride(0),
            drop.scale, drop.threshold,
            DOWNS=count, DROPOUT=drop.on_input, SWAP=swaps(where, rows),
            PRECISION=lib.precision(), **config,
        )  # fmt: skip
    return h


def expand(
    ys: Sequence[Tensor],
    base: Sequence[Tensor],
    ups: Matrices,
    h: Tensor,
    parts: Parts,
    drop: Dropout,
) -> None:
    """Every y_k, over base_k or alone."""
    rows = h.shape[0]
    config = choose("expand", lib.machine(h), rows, h.element_size(), parts.widest)
    outs = [y.shape[1] for y in ys]
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(max(outs), config["BLOCK_O"])
    sources = base or ys
    tk._lowrank_linear_expand_kernel[(tiles, len(ys))](
        *lib.four(list(ys)), *lib.four(list(sources)), *ups.pointers, h,
        drop.rng if drop.on_middle else None,
        rows, *parts.ranks, *parts.starts, *lib.four(outs),
        *lib.four([b.stride(0) for b in sources]), *ups.strides, h.stride(0), *parts.alphas,
        drop.threshold,
        HAS_BASE=bool(base), P_TRANSPOSED=ups.transposed, DROPOUT=drop.on_middle,
        PRECISION=lib.precision(), **config,
    )  # fmt: skip


def gemm_ext(
    x: Tensor,
    weights: Matrices,
    biases: Sequence[Tensor | None],
    ups: Matrices,
    h: Tensor,
    parts: Parts,
    drop: Dropout,
) -> list[Tensor]:
    """Every y_k by the extended GEMM."""
    rows, width = x.shape
    outs = [w.shape[0] for w in weights.tensors]
    ys = [x.new_empty(rows, o) for o in outs]
    has_bias = any(b is not None for b in biases)
    given = [
        x.new_zeros(o) if b is None else b.contiguous() for b, o in zip(biases, outs, strict=True)
    ]
    config = choose("gemm_ext", lib.machine(x), rows, x.element_size(), parts.widest)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(max(outs), config["BLOCK_O"])
    gx._lowrank_linear_gemm_ext_kernel[(tiles, len(ys))](
        *lib.four(ys), *weights.pointers, *lib.four(given if has_bias else ys), *ups.pointers, x, h,
        drop.rng if drop.on_middle else None,
        rows, width, *lib.four(outs), *parts.ranks, *parts.starts, *weights.strides, *ups.strides,
        x.stride(0), h.stride(0), *parts.alphas, drop.threshold,
        HAS_BIAS=has_bias, W_TRANSPOSED=weights.transposed, P_TRANSPOSED=ups.transposed,
        DROPOUT=drop.on_middle, PRECISION=lib.precision(), **config,
    )  # fmt: skip
    return ys


def bottleneck_gradient(
    dys: Sequence[Tensor], ups: Matrices, parts: Parts, drop: Dropout, separate: bool
) -> Tensor:
    """dh [N, R], or with ``separate`` every g_k side by side, as ``parts`` says."""
    rows, outputs = dys[0].shape[0], len(dys)
    g = dys[0].new_empty(rows, parts.columns)
    where = lib.machine(g)
    config = choose("dh", where, rows, g.element_size(), parts.widest)
    grid = (triton.cdiv(rows, config["BLOCK_M"]), outputs if separate else 1)
    tb._lowrank_linear_bwd_dh_kernel[grid](
        *lib.four(list(dys)), *ups.pointers, g, drop.rng if drop.on_middle else None,
        rows, outputs, *parts.starts, *lib.four([dy.shape[1] for dy in dys]), *parts.ranks,
        *lib.four([dy.stride(0) for dy in dys]), *ups.strides, g.stride(0), *parts.alphas,
        drop.threshold,
        DROPOUT=drop.on_middle, SEPARATE=separate, P_TRANSPOSED=ups.transposed,
        SWAP=swaps(where, rows), PRECISION=lib.precision(), **config,
    )  # fmt: skip
    return g


def through(
    base: Tensor | None, like: Tensor, dh: Tensor, downs: Sequence[Tensor], drop: Dropout
) -> Tensor:
    """dx: mask_k(dh_k U_k) of every down-projection added to ``base``, in place, or alone."""
    rows, width = like.shape
    dx = torch.empty_like(like, memory_format=torch.contiguous_format) if base is None else base
    parts = Parts.downs(downs, drop)
    ups = matrices([d.t() for d in downs], dh.dtype)
    where, count = lib.machine(dh), len(downs)
    config = choose("through", where, rows, dh.element_size(), parts.widest, count)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_O"])
    tb._lowrank_linear_bwd_through_kernel[(tiles,)](
        dx, dx, *ups.pointers, dh, drop.rng if drop.on_input else None,
        rows, width, count, *parts.starts, *parts.ranks, dx.stride(0), *ups.strides,
        dh.stride(0), drop.scale, drop.threshold,
        HAS_BASE=base is not None, P_TRANSPOSED=ups.transposed, DROPOUT=drop.on_input,
        PRECISION=lib.precision(), **config,
    )  # fmt: skip
    return dx


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
