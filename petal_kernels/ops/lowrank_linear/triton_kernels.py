"""Triton kernels of ``lowrank_linear``: shrink, expand and dh.

What they compute, their traffic, numerics and limits are in ``triton_impl.py``; the two kernels
with a base GEMM in them are in ``triton_gemm_ext.py``, the gradients of the small matrices in
``triton_kernels_weights.py``. Common to all: outputs k = 0 .. 3 are four
pointer arguments chosen at run time (``pick``), so that one launch serves all outputs without
unrolling; rows are int64; every size may be ragged, and masked lanes read zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import dropout_keep, pick


@triton.jit
def _load_up(  # type: ignore[no-untyped-def]
    p_ptr,
    offs_o,
    offs_r,
    O,  # noqa: E741
    R,
    stride_p,
    P_TRANSPOSED: tl.constexpr,
):
    """P[o, r] as a [BLOCK_O, BLOCK_R] tile, read along whichever dim is contiguous."""
    if P_TRANSPOSED:
        offs = offs_r.to(tl.int64)[None, :] * stride_p + offs_o[:, None]
    else:
        offs = offs_o.to(tl.int64)[:, None] * stride_p + offs_r[None, :]
    return tl.load(p_ptr + offs, mask=(offs_o < O)[:, None] & (offs_r < R)[None, :], other=0.0)


@triton.jit
def _lowrank_linear_shrink_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    u_ptr,
    h_ptr,
    rng_ptr,
    N,
    D,
    R,
    stride_xm,
    stride_ur,
    keep_scale,
    threshold,
    DROPOUT: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h[m, r] = keep_scale * sum_d mask(x)[m, d] U[r, d]; a program owns BLOCK_M rows of h."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (offs_m < N)[:, None]
    mask_r = (offs_r < R)[:, None]
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    u_rows = u_ptr + offs_r.to(tl.int64)[:, None] * stride_ur
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    # With few rows the roles are swapped: h^T = U x^T fills the tensor core's 64 rows with R.
    if SWAP:
        acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = (offs_k < D)[None, :]
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m & mask_k, other=0.0)  # [M, K]
        u = tl.load(u_rows + offs_k[None, :], mask=mask_r & mask_k, other=0.0).to(x.dtype)  # [R, K]
        if DROPOUT:
            x = tl.where(dropout_keep(seed, stream, offs_m, k0, BLOCK_K, threshold), x, 0.0)
        if SWAP:
            acc = tl.dot(u, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(u), acc, input_precision=PRECISION)
    if SWAP:
        acc = tl.trans(acc)
    if DROPOUT:
        acc *= keep_scale
    h = acc.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + offs_m[:, None] * R + offs_r[None, :], h, mask=mask_m & (offs_r < R)[None, :])


@triton.jit
def _lowrank_linear_expand_kernel(  # type: ignore[no-untyped-def]
    y0_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    base0_ptr,
    base1_ptr,
    base2_ptr,
    base3_ptr,
    p0_ptr,
    p1_ptr,
    p2_ptr,
    p3_ptr,
    h_ptr,
    rng_ptr,
    N,
    R,
    out0,
    out1,
    out2,
    out3,
    stride_base0,
    stride_base1,
    stride_base2,
    stride_base3,
    stride_p0,
    stride_p1,
    stride_p2,
    stride_p3,
    stride_hm,
    stride_hk,
    alpha,
    threshold,
    HAS_BASE: tl.constexpr,
    P_TRANSPOSED: tl.constexpr,
    DROP_H: tl.constexpr,
    DROP_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y_k = base_k + alpha * mask_k(h_k) P_k^T; a program owns one tile of one y_k.

    DROP_H masks h by stream k (bottleneck, mode); DROP_Y masks the product by stream 0 (dx of input
    dropout). y_k may be base_k itself. The grid is sized for the widest output.
    """
    k = tl.program_id(1)
    O = pick(k, out0, out1, out2, out3)  # noqa: E741
    tiles_o = tl.cdiv(O, BLOCK_O)
    pid_o = tl.program_id(0) % tiles_o
    row0 = (tl.program_id(0) // tiles_o).to(tl.int64) * BLOCK_M
    if row0 >= N:
        return
    y_ptr = pick(k, y0_ptr, y1_ptr, y2_ptr, y3_ptr)
    p_ptr = pick(k, p0_ptr, p1_ptr, p2_ptr, p3_ptr)
    stride_p = pick(k, stride_p0, stride_p1, stride_p2, stride_p3)
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m = (offs_m < N)[:, None]
    mask = mask_m & (offs_o < O)[None, :]
    h_rows = h_ptr + k.to(tl.int64) * stride_hk + offs_m[:, None] * stride_hm
    if DROP_H or DROP_Y:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        # [M, R]
        h = tl.load(h_rows + offs_r[None, :], mask=mask_m & (offs_r < R)[None, :], other=0.0)
        p = _load_up(p_ptr, offs_o, offs_r, O, R, stride_p, P_TRANSPOSED).to(h.dtype)
        if DROP_H:
            h = tl.where(dropout_keep(seed, stream + k, offs_m, r0, BLOCK_R, threshold), h, 0.0)
        acc = tl.dot(h, tl.trans(p), acc, input_precision=PRECISION)
    y = acc * alpha
    if DROP_Y:
        keep = dropout_keep(seed, stream, offs_m, pid_o * BLOCK_O, BLOCK_O, threshold)
        y = tl.where(keep, y, 0.0)
    if HAS_BASE:
        base_ptr = pick(k, base0_ptr, base1_ptr, base2_ptr, base3_ptr)
        stride_base = pick(k, stride_base0, stride_base1, stride_base2, stride_base3)
        base_offs = offs_m[:, None] * stride_base + offs_o[None, :]
        y += tl.load(base_ptr + base_offs, mask=mask, other=0.0).to(tl.float32)  # [M, O]
    y_offs = offs_m[:, None] * O + offs_o[None, :]
    tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    R,
    K,
    out0,
    out1,
    out2,
    out3,
    stride_dy0,
    stride_dy1,
    stride_dy2,
    stride_dy3,
    stride_p0,
    stride_p1,
    stride_p2,
    stride_p3,
    stride_gm,
    alpha,
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
    """g_k = alpha * mask_k (dy_k P_k), summed over k, or side by side in g [N, K*R] (SEPARATE, k on
    the grid).

    A program owns BLOCK_M rows: of the sum, or of one g_k.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (offs_m < N)[:, None]
    first = tl.program_id(1)
    last = K
    if SEPARATE:
        last = first + 1
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
        total += acc
    g = (total * alpha).to(g_ptr.dtype.element_ty)
    g_offs = offs_m[:, None] * stride_gm + first.to(tl.int64) * R + offs_r[None, :]
    tl.store(g_ptr + g_offs, g, mask=mask_m & (offs_r < R)[None, :])
