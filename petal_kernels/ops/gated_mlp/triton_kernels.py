"""Triton kernels of ``gated_mlp``; what they compute and move is documented in
``triton_impl.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import (
    activate,
    activate_backward,
    dropout_keep,
    load_tile,
    store_tile,
    sum_section,
)


@triton.jit
def _gated_mlp_act_fwd_kernel(  # type: ignore[no-untyped-def]
    g_ptr,
    u_ptr,
    p_ptr,
    N,
    F,
    stride_gm,
    stride_um,
    stride_pm,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """p = act(g) * u of one tile."""
    tiles = tl.cdiv(F, BLOCK_F)
    offs_m = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = (tl.program_id(0) % tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_m = offs_m < N
    g = load_tile(g_ptr, stride_gm, offs_m, offs_f, mask_m, F).to(tl.float32)  # [M, F]
    p = activate(g, ACT)
    if u_ptr is not None:
        p *= load_tile(u_ptr, stride_um, offs_m, offs_f, mask_m, F).to(tl.float32)  # [M, F]
    store_tile(p_ptr, stride_pm, offs_m, offs_f, mask_m, F, p)


@triton.jit
def _gated_mlp_act_bwd_kernel(  # type: ignore[no-untyped-def]
    g_ptr,
    u_ptr,
    dp_ptr,
    du_ptr,
    dh_ptr,
    part_ptr,
    rng_ptr,
    N,
    F,
    R,
    stride_gm,
    stride_um,
    stride_dpm,
    stride_dum,
    stride_dhm,
    rows_per_split,
    threshold,
    keep_scale,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dg into dp's memory, du, and part[split] = dh^T (mask * p) of the split's rows.

    A program owns BLOCK_F columns of one split and BLOCK_R ranks; those of the first ranks alone
    read dp and write dg and du."""
    tiles = tl.cdiv(F, BLOCK_F)
    col0 = (tl.program_id(0) % tiles) * BLOCK_F
    split = (tl.program_id(0) // tiles).to(tl.int64)
    offs_f = col0 + tl.arange(0, BLOCK_F)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if rng_ptr is not None:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    acc = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    for step in range(tl.cdiv(rows_per_split, BLOCK_M)):
        offs_m = split * rows_per_split + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        mask_first = mask_m & (tl.program_id(1) == 0)
        g = load_tile(g_ptr, stride_gm, offs_m, offs_f, mask_m, F).to(tl.float32)  # [M, F]
        a = activate(g, ACT)
        p = a
        if u_ptr is not None:
            u = load_tile(u_ptr, stride_um, offs_m, offs_f, mask_m, F).to(tl.float32)  # [M, F]
            p = a * u
        if dp_ptr is not None:
            dp = load_tile(dp_ptr, stride_dpm, offs_m, offs_f, mask_first, F)  # [M, F]
            dp = dp.to(tl.float32)
            d = dp
            if u_ptr is not None:
                store_tile(du_ptr, stride_dum, offs_m, offs_f, mask_first, F, a * dp)
                d = u * dp
            dg = activate_backward(g, d, ACT)
            store_tile(dp_ptr, stride_dpm, offs_m, offs_f, mask_first, F, dg)
        if dh_ptr is not None:
            dh = load_tile(dh_ptr, stride_dhm, offs_m, offs_r, mask_m, R)  # [M, R]
            p = p.to(dh.dtype)
            if rng_ptr is not None:
                p = tl.where(dropout_keep(seed, stream, offs_m, col0, BLOCK_F, threshold), p, 0.0)
            acc = tl.dot(tl.trans(p), dh, acc, input_precision=PRECISION)
    if dh_ptr is not None:
        offs = (split * R + offs_r.to(tl.int64))[None, :] * F + offs_f[:, None]
        mask = (offs_f < F)[:, None] & (offs_r < R)[None, :]
        tl.store(part_ptr + offs, acc * keep_scale, mask=mask)


@triton.jit
def _gated_mlp_act_bwd_reduce_kernel(  # type: ignore[no-untyped-def]
    part_ptr, ddown_ptr, size, stride_part, splits, BLOCK: tl.constexpr
):
    """ddown = the partials' sum in the order of the splits."""
    sum_section(ddown_ptr, 0, size, 0, part_ptr, stride_part, splits, BLOCK)
