"""Triton kernels of ``lowrank_linear``'s forward: shrink and expand.

What they compute, their traffic, numerics and limits are in ``triton_impl.py``; the rows' gradients
are in ``triton_kernels_bwd.py``, those of the small matrices in ``triton_kernels_weights.py``, the
two kernels with a base GEMM in them in ``triton_gemm_ext.py``. Common to all: outputs k = 0 .. 3
are four pointer arguments, chosen at run time (``pick``) so that one launch serves all outputs,
or unrolled (DOWNS of them) where all read one tile of x; output k's part of h is its ``rank``
columns from ``start`` on; rows are int64; every size may be ragged, and masked lanes read zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import dropout_keep, load_tile, pick, store_tile


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
def _shrink_step(  # type: ignore[no-untyped-def]
    acc,
    x,
    u_ptr,
    seed,
    stream,
    offs_m,
    k0,
    D,
    R,
    stride_u,
    threshold,
    DROPOUT: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_K columns of x into the sum of one down-projection, under its mask."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    u = load_tile(u_ptr, stride_u, offs_r, offs_k, offs_r < R, D).to(x.dtype)  # [R, K]
    if DROPOUT:
        x = tl.where(dropout_keep(seed, stream, offs_m, k0, BLOCK_K, threshold), x, 0.0)
    if SWAP:
        acc = tl.dot(u, tl.trans(x), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, tl.trans(u), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_hidden(  # type: ignore[no-untyped-def]
    h_ptr,
    acc,
    offs_m,
    mask_m,
    R,
    stride_hm,
    keep_scale,
    DROPOUT: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One down-projection's columns of h."""
    if SWAP:
        acc = tl.trans(acc)
    if DROPOUT:
        acc *= keep_scale
    store_tile(h_ptr, stride_hm, offs_m, tl.arange(0, BLOCK_R), mask_m, R, acc)


@triton.jit
def _lowrank_linear_shrink_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    u0_ptr,
    u1_ptr,
    u2_ptr,
    u3_ptr,
    h_ptr,
    rng_ptr,
    first,
    N,
    D,
    rank0,
    rank1,
    rank2,
    rank3,
    stride_xm,
    stride_u0,
    stride_u1,
    stride_u2,
    stride_u3,
    stride_hm,
    keep_scale,
    threshold,
    DOWNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h_k[m, r] = keep_scale * sum_d mask_k(x)[m, d] U_k[r, d], side by side; a program owns
    BLOCK_M rows of DOWNS of them, ``first`` being the stream of the first, and reads x once."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    seed, stream = 0, 0
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1) + first
    # With few rows the roles are swapped: h^T = U x^T fills the tensor core's 64 rows with R.
    if SWAP:
        acc0 = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    else:
        acc0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for k0 in range(0, D, BLOCK_K):
        x = load_tile(x_ptr, stride_xm, offs_m, k0 + tl.arange(0, BLOCK_K), mask_m, D)  # [M, K]
        acc0 = _shrink_step(
            acc0, x, u0_ptr, seed, stream, offs_m, k0, D, rank0, stride_u0, threshold,
            DROPOUT, SWAP, PRECISION, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        if DOWNS > 1:
            acc1 = _shrink_step(
                acc1, x, u1_ptr, seed, stream + 1, offs_m, k0, D, rank1, stride_u1, threshold,
                DROPOUT, SWAP, PRECISION, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        if DOWNS > 2:
            acc2 = _shrink_step(
                acc2, x, u2_ptr, seed, stream + 2, offs_m, k0, D, rank2, stride_u2, threshold,
                DROPOUT, SWAP, PRECISION, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        if DOWNS > 3:
            acc3 = _shrink_step(
                acc3, x, u3_ptr, seed, stream + 3, offs_m, k0, D, rank3, stride_u3, threshold,
                DROPOUT, SWAP, PRECISION, BLOCK_K, BLOCK_R,
            )  # fmt: skip
    _store_hidden(h_ptr, acc0, offs_m, mask_m, rank0, stride_hm, keep_scale, DROPOUT, SWAP, BLOCK_R)
    if DOWNS > 1:
        h_ptr += rank0
        _store_hidden(
            h_ptr, acc1, offs_m, mask_m, rank1, stride_hm, keep_scale, DROPOUT, SWAP, BLOCK_R
        )
    if DOWNS > 2:
        h_ptr += rank1
        _store_hidden(
            h_ptr, acc2, offs_m, mask_m, rank2, stride_hm, keep_scale, DROPOUT, SWAP, BLOCK_R
        )
    if DOWNS > 3:
        h_ptr += rank2
        _store_hidden(
            h_ptr, acc3, offs_m, mask_m, rank3, stride_hm, keep_scale, DROPOUT, SWAP, BLOCK_R
        )


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
    rank0,
    rank1,
    rank2,
    rank3,
    start0,
    start1,
    start2,
    start3,
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
    alpha0,
    alpha1,
    alpha2,
    alpha3,
    threshold,
    HAS_BASE: tl.constexpr,
    P_TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y_k = base_k + alpha_k * mask_k(h_k) P_k^T; a program owns one tile of one y_k.

    y_k may be base_k itself. The grid is sized for the widest output.
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
    R = pick(k, rank0, rank1, rank2, rank3)
    h_rows = h_ptr + offs_m[:, None] * stride_hm + pick(k, start0, start1, start2, start3)
    if DROPOUT:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        # [M, R]
        h = tl.load(h_rows + offs_r[None, :], mask=mask_m & (offs_r < R)[None, :], other=0.0)
        p = _load_up(p_ptr, offs_o, offs_r, O, R, stride_p, P_TRANSPOSED).to(h.dtype)
        if DROPOUT:
            h = tl.where(dropout_keep(seed, stream + k, offs_m, r0, BLOCK_R, threshold), h, 0.0)
        acc = tl.dot(h, tl.trans(p), acc, input_precision=PRECISION)
    y = acc * pick(k, alpha0, alpha1, alpha2, alpha3)
    if HAS_BASE:
        base_ptr = pick(k, base0_ptr, base1_ptr, base2_ptr, base3_ptr)
        stride_base = pick(k, stride_base0, stride_base1, stride_base2, stride_base3)
        base_offs = offs_m[:, None] * stride_base + offs_o[None, :]
        y += tl.load(base_ptr + base_offs, mask=mask, other=0.0).to(tl.float32)  # [M, O]
    store_tile(y_ptr, O, offs_m, offs_o, offs_m < N, O, y)
