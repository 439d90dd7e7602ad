"""Triton kernels of ``lowrank_linear`` that contain a base GEMM: plan "extend" and the one-pass dx.

The low-rank product starts the accumulator, the base's loop runs on from there, and the output is
rounded and written once: there is no read-modify-write pass, and no 16-bit rounding of the base
between the two. Documentation common to all kernels of the operator is in ``triton_impl.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import dropout_keep, pick
from petal_kernels.ops.lowrank_linear.triton_kernels import _load_up


@triton.jit
def _tile_of(pid, tiles_m, tiles_o, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column tile of a program: columns inside groups of GROUP_M rows, so that both
    operands stay in L2."""
    group = pid // (GROUP_M * tiles_o)
    rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_o)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def _lowrank_linear_gemm_ext_kernel(  # type: ignore[no-untyped-def]
    y0_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    w3_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    b3_ptr,
    p0_ptr,
    p1_ptr,
    p2_ptr,
    p3_ptr,
    x_ptr,
    h_ptr,
    rng_ptr,
    N,
    D,
    out0,
    out1,
    out2,
    out3,
    rank0,
    rank1,
    rank2,
    rank3,
    start0,
    start1,
    start2,
    start3,
    stride_w0,
    stride_w1,
    stride_w2,
    stride_w3,
    stride_p0,
    stride_p1,
    stride_p2,
    stride_p3,
    stride_xm,
    stride_hm,
    alpha0,
    alpha1,
    alpha2,
    alpha3,
    threshold,
    HAS_BIAS: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    P_TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y_k = x W_k^T + b_k + alpha_k * mask_k(h_k) P_k^T; a program owns one tile of one y_k."""
    k = tl.program_id(1)
    O = pick(k, out0, out1, out2, out3)  # noqa: E741
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_o = tl.cdiv(O, BLOCK_O)
    if tl.program_id(0) >= tiles_m * tiles_o:
        return
    pid_m, pid_o = _tile_of(tl.program_id(0), tiles_m, tiles_o, GROUP_M)
    y_ptr = pick(k, y0_ptr, y1_ptr, y2_ptr, y3_ptr)
    w_ptr = pick(k, w0_ptr, w1_ptr, w2_ptr, w3_ptr)
    p_ptr = pick(k, p0_ptr, p1_ptr, p2_ptr, p3_ptr)
    stride_w = pick(k, stride_w0, stride_w1, stride_w2, stride_w3)
    stride_p = pick(k, stride_p0, stride_p1, stride_p2, stride_p3)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m = (offs_m < N)[:, None]
    mask_o = offs_o < O
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    R = pick(k, rank0, rank1, rank2, rank3)
    h_rows = h_ptr + pick(k, start0, start1, start2, start3) + offs_m[:, None] * stride_hm
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        # [M, R]
        h = tl.load(h_rows + offs_r[None, :], mask=mask_m & (offs_r < R)[None, :], other=0.0)
        p = _load_up(p_ptr, offs_o, offs_r, O, R, stride_p, P_TRANSPOSED).to(h.dtype)
        if DROPOUT:
            h = tl.where(dropout_keep(seed, stream + k, offs_m, r0, BLOCK_R, threshold), h, 0.0)
        acc = tl.dot(h, tl.trans(p), acc, input_precision=PRECISION)
    acc *= pick(k, alpha0, alpha1, alpha2, alpha3)
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < D
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m & mask_k[None, :], other=0.0)  # [M, K]
        if W_TRANSPOSED:
            w_offs = offs_k.to(tl.int64)[:, None] * stride_w + offs_o[None, :]  # [BLOCK_K, BLOCK_O]
        else:
            w_offs = offs_o.to(tl.int64)[None, :] * stride_w + offs_k[:, None]
        w = tl.load(w_ptr + w_offs, mask=mask_k[:, None] & mask_o[None, :], other=0.0)  # [K, O]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        b_ptr = pick(k, b0_ptr, b1_ptr, b2_ptr, b3_ptr)
        acc += tl.load(b_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[None, :]  # [1, O]
    y_offs = offs_m[:, None] * O + offs_o[None, :]
    tl.store(y_ptr + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_o[None, :])


@triton.jit
def _lowrank_linear_bwd_dx_kernel(  # type: ignore[no-untyped-def]
    dx_ptr,
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    dy3_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    w3_ptr,
    dh_ptr,
    u_ptr,
    rng_ptr,
    N,
    D,
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
    stride_w0,
    stride_w1,
    stride_w2,
    stride_w3,
    stride_ur,
    keep_scale,
    threshold,
    W_TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dx = keep_scale * mask_0(dh U) + sum_k dy_k W_k; a program owns one tile of dx (BLOCK_K
    columns of D)."""
    tiles_m = tl.cdiv(N, BLOCK_M)
    pid_m, pid_d = _tile_of(tl.program_id(0), tiles_m, tl.cdiv(D, BLOCK_K), GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = (offs_m < N)[:, None]
    mask_d = (offs_d < D)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        dh_offs = offs_m[:, None] * R + offs_r[None, :]
        dh = tl.load(dh_ptr + dh_offs, mask=mask_m & mask_r[None, :], other=0.0)  # [M, R]
        u_offs = offs_r.to(tl.int64)[:, None] * stride_ur + offs_d[None, :]
        u = tl.load(u_ptr + u_offs, mask=mask_r[:, None] & mask_d, other=0.0)  # [R, K]
        acc = tl.dot(dh, u.to(dh.dtype), acc, input_precision=PRECISION)
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
        keep = dropout_keep(seed, stream, offs_m, pid_d * BLOCK_K, BLOCK_K, threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    for k in range(K):
        O = pick(k, out0, out1, out2, out3)  # noqa: E741
        dy_ptr = pick(k, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr)
        w_ptr = pick(k, w0_ptr, w1_ptr, w2_ptr, w3_ptr)
        dy_rows = dy_ptr + offs_m[:, None] * pick(k, stride_dy0, stride_dy1, stride_dy2, stride_dy3)
        stride_w = pick(k, stride_w0, stride_w1, stride_w2, stride_w3)
        for o0 in range(0, O, BLOCK_O):
            offs_o = o0 + tl.arange(0, BLOCK_O)
            mask_o = offs_o < O
            # [M, O]
            dy = tl.load(dy_rows + offs_o[None, :], mask=mask_m & mask_o[None, :], other=0.0)
            if W_TRANSPOSED:
                w_offs = offs_d.to(tl.int64)[None, :] * stride_w + offs_o[:, None]
            else:  # [BLOCK_O, BLOCK_K]
                w_offs = offs_o.to(tl.int64)[:, None] * stride_w + offs_d[None, :]
            w = tl.load(w_ptr + w_offs, mask=mask_o[:, None] & mask_d, other=0.0)  # [O, K]
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    dx_offs = offs_m[:, None] * D + offs_d[None, :]
    tl.store(dx_ptr + dx_offs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m & mask_d)
