"""Triton kernels of ``frozen_norm``; what they compute and move is documented in
``triton_impl.py``.

Of the kinds they know what `arguments.Call` says: CENTERED, the mean is taken off and stored before
rho; ROUNDED, the normalised row is rounded to x's dtype; OFFSET, 0 or 1, is added to the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import load_tile, load_vector, store_tile


@triton.jit
def _factor(weight_ptr, offs_k, D, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the normalised columns are multiplied by."""
    if weight_ptr is None:
        factor = tl.full(offs_k.shape, 1.0, tl.float32)
    else:
        factor = load_vector(weight_ptr, offs_k, D) + OFFSET
    return factor


@triton.jit
def _frozen_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    moments_ptr,
    N,
    D,
    stride_xm,
    eps,
    CENTERED: tl.constexpr,
    ROUNDED: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The moments and y of BLOCK_M rows."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    mean = tl.zeros((BLOCK_M,), tl.float32)
    if CENTERED:
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            total += load_tile(x_ptr, stride_xm, offs_m, offs_k, mask_m, D)  # [M, K]
        mean = tl.sum(total, axis=1) / D
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_xm, offs_m, offs_k, mask_m, D).to(tl.float32)  # [M, K]
        if CENTERED:
            x = tl.where((offs_k < D)[None, :], x - mean[:, None], 0.0)
        squares += x * x
    rho = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps)
    if CENTERED:
        tl.store(moments_ptr + 2 * offs_m, mean, mask=mask_m)
        tl.store(moments_ptr + 2 * offs_m + 1, rho, mask=mask_m)
    else:
        tl.store(moments_ptr + offs_m, rho, mask=mask_m)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_xm, offs_m, offs_k, mask_m, D).to(tl.float32)  # [M, K]
        xhat = (x - mean[:, None]) * rho[:, None]
        if ROUNDED:
            xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        y = xhat * _factor(weight_ptr, offs_k, D, OFFSET)[None, :]
        y += load_vector(bias_ptr, offs_k, D)[None, :]
        store_tile(y_ptr, D, offs_m, offs_k, mask_m, D, y)


@triton.jit
def _frozen_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    moments_ptr,
    weight_ptr,
    dx_ptr,
    N,
    D,
    stride_dym,
    stride_xm,
    CENTERED: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx of BLOCK_M rows. The first walk over the columns forms mean(g) and mean(g xhat)."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    mean = tl.zeros((BLOCK_M,), tl.float32)
    if CENTERED:
        mean = tl.load(moments_ptr + 2 * offs_m, mask=mask_m, other=0.0)
        rho = tl.load(moments_ptr + 2 * offs_m + 1, mask=mask_m, other=0.0)
    else:
        rho = tl.load(moments_ptr + offs_m, mask=mask_m, other=0.0)
    sum_g = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    sum_gx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_xm, offs_m, offs_k, mask_m, D).to(tl.float32)  # [M, K]
        dy = load_tile(dy_ptr, stride_dym, offs_m, offs_k, mask_m, D).to(tl.float32)  # [M, K]
        g = dy * _factor(weight_ptr, offs_k, D, OFFSET)[None, :]
        # Behind the last column g is 0, but (0 - mean) rho may overflow, and 0 * inf is NaN.
        xhat = tl.where((offs_k < D)[None, :], (x - mean[:, None]) * rho[:, None], 0.0)
        sum_gx += g * xhat
        if CENTERED:
            sum_g += g
    mean_gx = (tl.sum(sum_gx, axis=1) / D)[:, None]
    mean_g = (tl.sum(sum_g, axis=1) / D)[:, None]
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_xm, offs_m, offs_k, mask_m, D).to(tl.float32)  # [M, K]
        dy = load_tile(dy_ptr, stride_dym, offs_m, offs_k, mask_m, D).to(tl.float32)  # [M, K]
        g = dy * _factor(weight_ptr, offs_k, D, OFFSET)[None, :]
        dx = g - (x - mean[:, None]) * rho[:, None] * mean_gx - mean_g
        store_tile(dx_ptr, D, offs_m, offs_k, mask_m, D, dx * rho[:, None])
