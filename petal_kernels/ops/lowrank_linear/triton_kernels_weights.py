"""Triton kernels of ``lowrank_linear``'s parameter gradients: sums over rows, in two stages.

Conventions are those of ``triton_kernels.py``. One tile is of one segment of the stacked widths
[O_0 | .. | O_3 | D], the ups' and the down-projection's, so that one launch serves them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import dropout_keep, pick

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
    stride_sk,
    rows_per_split,
    threshold,
    DROP_SMALL: tl.constexpr,
    DROP_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[split] = sum over the split's rows of big_k^T mask_k(small_k) stacked over k, then
    mask(x)^T dh.

    A program owns BLOCK_O stacked columns of one split of the rows, all of R. DROP_X is launched
    for x alone.
    """
    k, row, tile_o = _segment(tl.program_id(0), out0, out1, out2, out3, BLOCK_O)
    split = tl.program_id(1)
    is_x = k == MAX_OUTPUTS
    big_ptr = tl.where(is_x, x_ptr, pick(k, big0_ptr, big1_ptr, big2_ptr, big3_ptr))
    stride_big = pick(k, stride_big0, stride_big1, stride_big2, stride_big3)
    stride_big = tl.where(is_x, stride_xm, stride_big)
    small = tl.where(is_x, dh_ptr, small_ptr + k.to(tl.int64) * stride_sk)
    stride_small = tl.where(is_x, R, stride_sm)
    O = tl.where(is_x, D, pick(k, out0, out1, out2, out3))  # noqa: E741
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.arange(0, BLOCK_R)
    mask_o = offs_o < O
    mask_r = offs_r < R
    if DROP_SMALL or DROP_X:
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
        if DROP_SMALL:
            keep = dropout_keep(seed, stream + k, offs_m, 0, BLOCK_R, threshold)
            s = tl.where(keep | is_x, s, 0.0)
        if DROP_X:
            keep = dropout_keep(seed, stream, offs_m, tile_o * BLOCK_O, BLOCK_O, threshold)
            big = tl.where(keep, big, 0.0)
        acc = tl.dot(tl.trans(big), s, acc, input_precision=PRECISION)
    total = out0 + out1 + out2 + out3 + D
    part_rows = split.to(tl.int64) * total + row + offs_o
    part_offs = part_rows[:, None] * R + offs_r[None, :]
    tl.store(part_ptr + part_offs, acc, mask=mask_o[:, None] & mask_r[None, :])


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
    out0,
    out1,
    out2,
    out3,
    splits,
    stride_part,
    alpha,
    alpha_u,
    HAS_UPS: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    P_TRANSPOSED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the partials in the order of the splits, scale, cast, store dP_k [O_k, R] and dU [R,
    D]."""
    k, row, tile_o = _segment(tl.program_id(0), out0, out1, out2, out3, BLOCK_O)
    O = tl.where(k == MAX_OUTPUTS, D, pick(k, out0, out1, out2, out3))  # noqa: E741
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (offs_o < O)[:, None] & (offs_r < R)[None, :]
    part = part_ptr + (row + offs_o).to(tl.int64)[:, None] * R + offs_r[None, :]
    acc = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for _ in range(splits):
        acc += tl.load(part, mask=mask, other=0.0)  # [O, R]
        part += stride_part
    o = offs_o.to(tl.int64)[:, None]
    r = offs_r.to(tl.int64)[None, :]
    if HAS_UPS:
        d_ptr = pick(k, d0_ptr, d1_ptr, d2_ptr, d3_ptr)
        offs = r * O + o if P_TRANSPOSED else o * R + r
        grad = (acc * alpha).to(d_ptr.dtype.element_ty)
        tl.store(d_ptr + offs, grad, mask=mask & (k < MAX_OUTPUTS))
    if HAS_DOWN:
        grad = (acc * alpha_u).to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + r * D + o, grad, mask=mask & (k == MAX_OUTPUTS))
