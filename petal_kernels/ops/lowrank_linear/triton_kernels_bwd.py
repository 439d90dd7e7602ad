"""Triton kernels of ``lowrank_linear``'s gradients of the rows: dh, and the way of dh to dx.

Conventions are those of ``triton_kernels.py``, documentation is in ``triton_impl.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import dropout_keep, load_tile, pick, store_tile
from petal_kernels.ops.lowrank_linear.triton_kernels import _load_up


@triton.jit
def _lowrank_linear_bwd_dh_kernel(  # type: ignore[no-untyped-def]
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    dy3_ptr,
    p0_ptr,
    p1_ptr,
    p2_ptr,
    p3_ptr,
    g_ptr,
    rng_ptr,
    N,
    K,
    start0,
    start1,
    start2,
    start3,
    out0,
    out1,
    out2,
    out3,
    rank0,
    rank1,
    rank2,
    rank3,
    stride_dy0,
    stride_dy1,
    stride_dy2,
    stride_dy3,
    stride_p0,
    stride_p1,
    stride_p2,
    stride_p3,
    stride_gm,
    alpha0,
    alpha1,
    alpha2,
    alpha3,
    threshold,
    DROPOUT: tl.constexpr,
    SEPARATE: tl.constexpr,
    P_TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """g_k = alpha_k * mask_k (dy_k P_k), summed over k, or side by side in g (SEPARATE, k on the
    grid).

    A program owns BLOCK_M rows: of the sum, or of one g_k.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (offs_m < N)[:, None]
    first = tl.program_id(1)
    last = K
    R = rank0  # what is summed has one rank
    if SEPARATE:
        last = first + 1
        R = pick(first, rank0, rank1, rank2, rank3)
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, last):
        O = pick(k, out0, out1, out2, out3)  # noqa: E741
        dy_ptr = pick(k, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr)
        p_ptr = pick(k, p0_ptr, p1_ptr, p2_ptr, p3_ptr)
        stride_dy = pick(k, stride_dy0, stride_dy1, stride_dy2, stride_dy3)
        stride_p = pick(k, stride_p0, stride_p1, stride_p2, stride_p3)
        dy_rows = dy_ptr + offs_m[:, None] * stride_dy
        if SWAP:
            acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for o0 in range(0, O, BLOCK_O):
            offs_o = o0 + tl.arange(0, BLOCK_O)
            # [M, O]
            dy = tl.load(dy_rows + offs_o[None, :], mask=mask_m & (offs_o < O)[None, :], other=0.0)
            p = _load_up(p_ptr, offs_o, offs_r, O, R, stride_p, P_TRANSPOSED).to(dy.dtype)
            if SWAP:
                acc = tl.dot(tl.trans(p), tl.trans(dy), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(dy, p, acc, input_precision=PRECISION)
        if SWAP:
            acc = tl.trans(acc)
        if DROPOUT:
            acc = tl.where(dropout_keep(seed, stream + k, offs_m, 0, BLOCK_R, threshold), acc, 0.0)
        total += acc * pick(k, alpha0, alpha1, alpha2, alpha3)
    if SEPARATE:
        g_ptr += pick(first, start0, start1, start2, start3)
    store_tile(g_ptr, stride_gm, offs_m, offs_r, offs_m < N, R, total)


@triton.jit
def _lowrank_linear_bwd_through_kernel(  # type: ignore[no-untyped-def]
    dx_ptr,
    base_ptr,
    p0_ptr,
    p1_ptr,
    p2_ptr,
    p3_ptr,
    dh_ptr,
    rng_ptr,
    N,
    D,
    K,
    start0,
    start1,
    start2,
    start3,
    rank0,
    rank1,
    rank2,
    rank3,
    stride_base,
    stride_p0,
    stride_p1,
    stride_p2,
    stride_p3,
    stride_dh,
    keep_scale,
    threshold,
    HAS_BASE: tl.constexpr,
    P_TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx = base + keep_scale * sum_k mask_k(dh_k U_k), P_k being U_k^T [D, R_k]; a program owns one
    tile of dx (BLOCK_O columns). dx may be the base itself."""
    tiles_o = tl.cdiv(D, BLOCK_O)
    pid_o = tl.program_id(0) % tiles_o
    offs_m = (tl.program_id(0) // tiles_o).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m = offs_m < N
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for k in range(K):
        R = pick(k, rank0, rank1, rank2, rank3)
        dh = dh_ptr + pick(k, start0, start1, start2, start3)
        p_ptr = pick(k, p0_ptr, p1_ptr, p2_ptr, p3_ptr)
        stride_p = pick(k, stride_p0, stride_p1, stride_p2, stride_p3)
        acc = total
        if DROPOUT:
            acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for r0 in range(0, R, BLOCK_R):
            offs_r = r0 + tl.arange(0, BLOCK_R)
            s = load_tile(dh, stride_dh, offs_m, offs_r, mask_m, R)  # [M, R]
            p = _load_up(p_ptr, offs_o, offs_r, D, R, stride_p, P_TRANSPOSED).to(s.dtype)  # [O, R]
            acc = tl.dot(s, tl.trans(p), acc, input_precision=PRECISION)
        if DROPOUT:
            keep = dropout_keep(seed, stream + k, offs_m, pid_o * BLOCK_O, BLOCK_O, threshold)
            total += tl.where(keep, acc, 0.0)
        else:
            total = acc
    if DROPOUT:
        total *= keep_scale
    if HAS_BASE:
        base = load_tile(base_ptr, stride_base, offs_m, offs_o, mask_m, D)  # [M, O]
        total += base.to(tl.float32)
    store_tile(dx_ptr, D, offs_m, offs_o, mask_m, D, total)
