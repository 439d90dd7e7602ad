"""Triton kernels of ``lowrank_linear``'s parameter gradients: sums over rows, in two stages.

Conventions are those of ``triton_kernels.py``. One tile is of one segment of the stacked widths
[O_0 | .. | O_3 | D], the ups' and a shared down-projection's, so that one launch serves them all;
where x is masked, or every output has a down-projection of its own, theirs is another launch, which
reads a tile of x once for all. Partials are [stacked width, R], R being the largest rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import dropout_keep, load_tile, pick

MAX_OUTPUTS = tl.constexpr(4)


@triton.jit
def _segment(tile, out0, out1, out2, out3, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a tile of the stacked widths [out0 | .. | out3 | D] lies: segment, its first row, tile
    within it."""
    end0 = tl.cdiv(out0, BLOCK)
    end1 = end0 + tl.cdiv(out1, BLOCK)
    end2 = end1 + tl.cdiv(out2, BLOCK)
    end3 = end2 + tl.cdiv(out3, BLOCK)
    k = (
        (tile >= end0).to(tl.int32)
        + (tile >= end1).to(tl.int32)
        + (tile >= end2).to(tl.int32)
        + (tile >= end3).to(tl.int32)
    )
    begin = tl.where(k == 0, 0, pick(k - 1, end0, end1, end2, end3))
    row1 = out0 + out1
    row2 = row1 + out2
    row = tl.where(k == 0, 0, pick(k - 1, out0, row1, row2, row2 + out3))
    return k, row, tile - begin


@triton.jit
def _lowrank_linear_bwd_tn_kernel(  # type: ignore[no-untyped-def]
    big0_ptr,
    big1_ptr,
    big2_ptr,
    big3_ptr,
    x_ptr,
    small_ptr,
    dh_ptr,
    part_ptr,
    rng_ptr,
    N,
    R,
    D,
    start0,
    start1,
    start2,
    start3,
    rank0,
    rank1,
    rank2,
    rank3,
    out0,
    out1,
    out2,
    out3,
    stride_big0,
    stride_big1,
    stride_big2,
    stride_big3,
    stride_xm,
    stride_sm,
    rows_per_split,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[split] = sum over the split's rows of big_k^T mask_k(small_k) stacked over k, then
    x^T dh.

    A program owns BLOCK_O stacked columns of one split of the rows, all of R.
    """
    k, row, tile_o = _segment(tl.program_id(0), out0, out1, out2, out3, BLOCK_O)
    split = tl.program_id(1)
    is_x = k == MAX_OUTPUTS
    big_ptr = tl.where(is_x, x_ptr, pick(k, big0_ptr, big1_ptr, big2_ptr, big3_ptr))
    stride_big = pick(k, stride_big0, stride_big1, stride_big2, stride_big3)
    stride_big = tl.where(is_x, stride_xm, stride_big)
    small = tl.where(is_x, dh_ptr, small_ptr + pick(k, start0, start1, start2, start3))
    stride_small = tl.where(is_x, R, stride_sm)
    O = tl.where(is_x, D, pick(k, out0, out1, out2, out3))  # noqa: E741
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.arange(0, BLOCK_R)
    mask_o = offs_o < O
    mask_r = offs_r < tl.where(is_x, R, pick(k, rank0, rank1, rank2, rank3))
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    row0 = split.to(tl.int64) * rows_per_split
    acc = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for step in range(tl.cdiv(rows_per_split, BLOCK_M)):
        offs_m = row0 + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < N)[:, None]
        big_offs = offs_m[:, None] * stride_big + offs_o[None, :]
        big = tl.load(big_ptr + big_offs, mask=mask_m & mask_o[None, :], other=0.0)  # [M, O]
        s_offs = offs_m[:, None] * stride_small + offs_r[None, :]
        s = tl.load(small + s_offs, mask=mask_m & mask_r[None, :], other=0.0)  # [M, R]
        if DROPOUT:
            keep = dropout_keep(seed, stream + k, offs_m, 0, BLOCK_R, threshold)
            s = tl.where(keep | is_x, s, 0.0)
        acc = tl.dot(tl.trans(big), s, acc, input_precision=PRECISION)
    total = out0 + out1 + out2 + out3 + D
    part_rows = split.to(tl.int64) * total + row + offs_o
    part_offs = part_rows[:, None] * R + offs_r[None, :]
    tl.store(part_ptr + part_offs, acc, mask=mask_o[:, None] & mask_r[None, :])


@triton.jit
def _downs_step(  # type: ignore[no-untyped-def]
    acc,
    x,
    dh_ptr,
    seed,
    stream,
    offs_m,
    mask_m,
    col0,
    R,
    stride_dh,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of x into the sum of one down-projection, under its mask."""
    s = load_tile(dh_ptr, stride_dh, offs_m, tl.arange(0, BLOCK_R), mask_m, R)  # [M, R]
    if DROPOUT:
        x = tl.where(dropout_keep(seed, stream, offs_m, col0, BLOCK_O, threshold), x, 0.0)
    return tl.dot(tl.trans(x), s, acc, input_precision=PRECISION)


@triton.jit
def _store_part(  # type: ignore[no-untyped-def]
    part_ptr, acc, row, offs_o, D, rank, R, BLOCK_R: tl.constexpr
):
    """One down-projection's partial sums: D rows from ``row`` (int64) on, each of R values of which
    ``rank`` are real."""
    offs_r = tl.arange(0, BLOCK_R)
    offs = (row + offs_o)[:, None] * R + offs_r[None, :]
    tl.store(part_ptr + offs, acc, mask=(offs_o < D)[:, None] & (offs_r < rank)[None, :])


@triton.jit
def _lowrank_linear_bwd_tn_x_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dh_ptr,
    part_ptr,
    rng_ptr,
    first,
    N,
    R,
    D,
    rank0,
    rank1,
    rank2,
    rank3,
    stride_xm,
    stride_dh,
    rows_per_split,
    threshold,
    DOWNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[split] = sum over the split's rows of mask_k(x)^T dh_k, stacked over DOWNS of them,
    ``first`` being the stream of the first.

    A program owns BLOCK_O columns of x in one split of the rows, and reads them once.
    """
    col0 = tl.program_id(0) * BLOCK_O
    split = tl.program_id(1).to(tl.int64)
    offs_o = col0 + tl.arange(0, BLOCK_O)
    seed, stream = 0, 0
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1) + first
    dh1_ptr = dh_ptr + rank0
    dh2_ptr = dh1_ptr + rank1
    dh3_ptr = dh2_ptr + rank2
    acc0 = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for step in range(tl.cdiv(rows_per_split, BLOCK_M)):
        offs_m = split * rows_per_split + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        x = load_tile(x_ptr, stride_xm, offs_m, offs_o, mask_m, D)  # [M, O]
        acc0 = _downs_step(
            acc0, x, dh_ptr, seed, stream, offs_m, mask_m, col0, rank0, stride_dh, threshold,
            DROPOUT, PRECISION, BLOCK_O, BLOCK_R,
        )  # fmt: skip
        if DOWNS > 1:
            acc1 = _downs_step(
                acc1, x, dh1_ptr, seed, stream + 1, offs_m, mask_m, col0, rank1, stride_dh,
                threshold, DROPOUT, PRECISION, BLOCK_O, BLOCK_R,
            )  # fmt: skip
        if DOWNS > 2:
            acc2 = _downs_step(
                acc2, x, dh2_ptr, seed, stream + 2, offs_m, mask_m, col0, rank2, stride_dh,
                threshold, DROPOUT, PRECISION, BLOCK_O, BLOCK_R,
            )  # fmt: skip
        if DOWNS > 3:
            acc3 = _downs_step(
                acc3, x, dh3_ptr, seed, stream + 3, offs_m, mask_m, col0, rank3, stride_dh,
                threshold, DROPOUT, PRECISION, BLOCK_O, BLOCK_R,
            )  # fmt: skip
    row = split * DOWNS * D
    _store_part(part_ptr, acc0, row, offs_o, D, rank0, R, BLOCK_R)
    if DOWNS > 1:
        _store_part(part_ptr, acc1, row + D, offs_o, D, rank1, R, BLOCK_R)
    if DOWNS > 2:
        _store_part(part_ptr, acc2, row + 2 * D, offs_o, D, rank2, R, BLOCK_R)
    if DOWNS > 3:
        _store_part(part_ptr, acc3, row + 3 * D, offs_o, D, rank3, R, BLOCK_R)


@triton.jit
def _lowrank_linear_bwd_reduce_kernel(  # type: ignore[no-untyped-def]
    part_ptr,
    d0_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    du_ptr,
    R,
    D,
    rank0,
    rank1,
    rank2,
    rank3,
    out0,
    out1,
    out2,
    out3,
    splits,
    stride_part,
    alpha0,
    alpha1,
    alpha2,
    alpha3,
    HAS_DOWN: tl.constexpr,
    P_TRANSPOSED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the partials in the order of the splits, scale, cast, store dP_k [O_k, R_k] and dU [R,
    D]."""
    k, row, tile_o = _segment(tl.program_id(0), out0, out1, out2, out3, BLOCK_O)
    is_x = k == MAX_OUTPUTS
    O = tl.where(is_x, D, pick(k, out0, out1, out2, out3))  # noqa: E741
    rank = tl.where(is_x, R, pick(k, rank0, rank1, rank2, rank3))
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (offs_o < O)[:, None] & (offs_r < rank)[None, :]
    part = part_ptr + (row + offs_o).to(tl.int64)[:, None] * R + offs_r[None, :]
    acc = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for _ in range(splits):
        acc += tl.load(part, mask=mask, other=0.0)  # [O, R]
        part += stride_part
    o = offs_o.to(tl.int64)[:, None]
    r = offs_r.to(tl.int64)[None, :]
    d_ptr = pick(k, d0_ptr, d1_ptr, d2_ptr, d3_ptr)
    offs = r * O + o if P_TRANSPOSED else o * rank + r
    grad = (acc * pick(k, alpha0, alpha1, alpha2, alpha3)).to(d_ptr.dtype.element_ty)
    tl.store(d_ptr + offs, grad, mask=mask & (k < MAX_OUTPUTS))
    if HAS_DOWN:
        grad = acc.to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + r * D + o, grad, mask=mask & is_x)
