"""How ``lowrank_linear``'s sums over rows are launched: how rows are split, where partials lie and
where gradients are written.

The kernels' documentation is in ``triton_impl.py``, which calls these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.lowrank_linear import triton_kernels_weights as tw
from petal_kernels.ops.lowrank_linear.triton_configs import RANK_SLICE, REDUCE, choose
from petal_kernels.ops.lowrank_linear.triton_launch import Dropout, Parts, one_layout


@dataclass(frozen=True)
class Partials:
    """How a sum over the rows is launched: its tiles, its splits, and their sums [splits, stacked
    widths, R], R being the largest rank."""

    config: dict[str, Any]
    grid: tuple[int, int]
    per_split: int
    values: Tensor

    @classmethod
    def of(
        cls, kernel: str, like: Tensor, widths: Sequence[int], parts: Parts, each: int = 1
    ) -> Partials:
        """Over the rows of ``like``; a program holds ``each`` sums of its tile."""
        where, rows, rank = lib.machine(like), like.shape[0], parts.widest
        config = choose(kernel, where, rows, like.element_size(), rank, each)
        tiles = sum(triton.cdiv(o, config["BLOCK_O"]) for o in widths)
        total = sum(widths) * each
        splits = lib.row_splits(where, rows, tiles, config["BLOCK_M"], total * rank * 4)
        per_split = triton.cdiv(triton.cdiv(rows, config["BLOCK_M"]), splits) * config["BLOCK_M"]
        splits = triton.cdiv(rows, per_split)
        values = torch.empty((splits, total, rank), dtype=torch.float32, device=like.device)
        return cls(config, (tiles, splits), per_split, values)

    def add(
        self, parts: Parts, written: Sequence[Tensor], transposed: bool, du: Tensor | None
    ) -> None:
        """Sum them into ``written``, and what is stacked behind those into ``du``."""
        rank = parts.widest
        outs = [d.shape[0] for d in written] + [0] * (lib.MAX_POINTERS - len(written))
        width = 0 if du is None else du.shape[1]
        block_r = min(lib.padded_rank(rank), RANK_SLICE)
        tiles = sum(triton.cdiv(o, dict(REDUCE.blocks)["BLOCK_O"]) for o in [*outs, width])
        tw._lowrank_linear_bwd_reduce_kernel[(tiles, triton.cdiv(rank, block_r))](
            self.values, *lib.four(list(written)), written[0] if du is None else du,
            rank, width, *parts.ranks, *outs, self.grid[1], self.values.stride(0), *parts.alphas,
            HAS_DOWN=du is not None, P_TRANSPOSED=transposed, BLOCK_R=block_r, **REDUCE.keywords(),
        )  # fmt: skip


def sum_ups(
    bigs: Sequence[Tensor],
    small: Tensor,
    parts: Parts,
    drop: Dropout,
    written: Sequence[Tensor],
    transposed: bool,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """big_k^T mask_k(small_k) into ``written``; with ``shared`` = (x, dh, dU) x^T dh too."""
    outs = [b.shape[1] for b in bigs]
    outs += [0] * (lib.MAX_POINTERS - len(outs))
    x, dh, du = (bigs[0], small, None) if shared is None else shared
    width = 0 if shared is None else x.shape[1]
    p = Partials.of("tn", small, [*outs, width], parts)
    tw._lowrank_linear_bwd_tn_kernel[p.grid](
        *lib.four(list(bigs)), x, small, dh, p.values, drop.rng if drop.on_middle else None,
        small.shape[0], parts.widest, width, *parts.starts, *parts.ranks, *outs,
        *lib.four([b.stride(0) for b in bigs]), x.stride(0), small.stride(0), p.per_split,
        drop.threshold,
        DROPOUT=drop.on_middle, PRECISION=lib.precision(), **p.config,
    )  # fmt: skip
    p.add(parts, written, transposed, du)


def sum_downs(
    x: Tensor,
    dh: Tensor,
    parts: Parts,
    drop: Dropout,
    written: Sequence[Tensor],
    transposed: bool,
) -> None:
    """mask_k(x)^T dh_k of every down-projection into ``written``."""
    rows, width = x.shape
    for first, some in parts.groups():
        count = len(some.spans)
        p = Partials.of("tn_x", x, [width], some, count)
        tw._lowrank_linear_bwd_tn_x_kernel[p.grid](
            x, dh[:, some.starts[0] :], p.values, drop.rng if drop.on_input else None, first,
            rows, some.widest, width, *some.ranks, x.stride(0), dh.stride(0), p.per_split,
            drop.threshold,
            DOWNS=count, DROPOUT=drop.on_input, PRECISION=lib.precision(), **p.config,
        )  # fmt: skip
        p.add(some, written[first : first + count], transposed, None)


def gradients(of: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
    """What backward returns, what the kernel writes (the same where it can), and that one's
    layout."""
    returned = [torch.empty_like(t) for t in of]
    layout = one_layout(returned)
    dense = all(t.is_contiguous() if not layout else t.t().is_contiguous() for t in returned)
    if layout is not None and dense and len({t.dtype for t in returned}) == 1:
        return returned, returned, layout
    written = [torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in of]
    return returned, written, False


def copy_apart(returned: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """What the kernel could not write where it belongs."""
    for target, source in zip(returned, written, strict=True):
        if target is not source:
            target.copy_(source)
