"""Triton kernels of ``gated_bottleneck``'s parameter gradients: sums over rows, in two stages.

Conventions are those of ``triton_kernels_bwd.py``, whose row kernel leaves a, ag, dz, dzg and the
row's numbers here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import (
    dropout_keep,
    load_tile,
    load_vector,
    store_tile,
    sum_section,
)
from petal_kernels.ops.gated_bottleneck.triton_kernels_tiles import (
    gate_tile,
    load_row,
    normalised,
    output_tile,
)


@triton.jit
def _store_sum(ptr, part, offs, n, tile):  # type: ignore[no-untyped-def]
    if ptr is not None:
        tl.store(ptr + part + offs, tl.sum(tile, 0), mask=offs < n)


@triton.jit
def _gated_bottleneck_bwd_weights_kernel(  # type: ignore[no-untyped-def]
    p_up_ptr,
    p_gate_up_ptr,
    p_down_ptr,
    p_gate_down_ptr,
    p_up_bias_ptr,
    p_gate_up_bias_ptr,
    p_gate_weight_ptr,
    p_norm_weight_ptr,
    p_norm_bias_ptr,
    dout_ptr,
    x_ptr,
    h_ptr,
    gate_input_ptr,
    residual_ptr,
    a_ptr,
    ag_ptr,
    dz_ptr,
    dzg_ptr,
    sums_ptr,
    moments_ptr,
    up_ptr,
    up_bias_ptr,
    gate_up_ptr,
    gate_up_bias_ptr,
    gate_weight_ptr,
    norm_weight_ptr,
    rng_ptr,
    N,
    R,
    W,
    RG,
    rows_per_split,
    stride_part,
    stride_dm,
    stride_xm,
    stride_hm,
    stride_gm,
    stride_rm,
    scale,
    threshold,
    GATE: tl.constexpr,
    LINEAR: tl.constexpr,
    SEES_OUTPUT: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Partial sums over one split of the rows; a program owns BLOCK_W columns. Of dup, dgate_up and
    every sum over channels where OUT (W is O then), of ddown and dgate_down where their partials
    are given: all in one launch where x, gate_input and out are equally wide. x_ptr None: x is H;
    gate_input_ptr None: gate_input is the residual.
    """
    pid_w = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    part = split * stride_part
    offs_w = pid_w * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = tl.arange(0, BLOCK_G)
    mask_w = offs_w < W
    NORM: tl.constexpr = norm_weight_ptr is not None
    ROW_GATE: tl.constexpr = GATE == "middleX" or GATE == "small"
    WEIGHT: tl.constexpr = p_gate_weight_ptr is not None
    LOGIT: tl.constexpr = p_gate_up_ptr is not None or p_gate_up_bias_ptr is not None
    USES_Y: tl.constexpr = NORM or LOGIT or (WEIGHT and (SEES_OUTPUT or GATE == "middleY"))
    USES_H: tl.constexpr = (USES_Y or (WEIGHT and ROW_GATE)) and h_ptr is not None
    USES_GATE_INPUT: tl.constexpr = p_gate_down_ptr is not None or (WEIGHT and ROW_GATE)
    USES_RESIDUAL: tl.constexpr = NORM and residual_ptr is not None
    tile = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)  # summed over its rows once, at the end
    # The rank comes first: BLOCK_W is less than the rows of a tensor core.
    d_up = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
    d_down = d_up
    d_gate_up = tl.zeros((BLOCK_W, BLOCK_G), tl.float32)
    d_gate_down = d_gate_up
    d_up_bias = tile
    d_gate_up_bias = tile
    d_weight_x = tile
    d_weight_h = tile
    d_norm_weight = tile
    d_norm_bias = tile
    if OUT:
        if USES_Y:
            # [W, R]
            up = load_tile(up_ptr, R, offs_w, offs_r, mask_w, R).to(a_ptr.dtype.element_ty)
        gate_up = None
        if GATE == "large":
            gate_up = load_tile(gate_up_ptr, RG, offs_w, offs_g, mask_w, RG)  # [W, G]
            gate_up = gate_up.to(ag_ptr.dtype.element_ty)
        if rng_ptr is not None:
            seed = tl.load(rng_ptr)
            stream = tl.load(rng_ptr + 1)
    for step in range(tl.cdiv(rows_per_split, BLOCK_M)):
        offs_m = split * rows_per_split + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        h = None
        if USES_H or (p_down_ptr is not None and x_ptr is None):
            h = load_tile(h_ptr, stride_hm, offs_m, offs_w, mask_m, W)  # [M, W]
        residual = None
        if USES_RESIDUAL or (USES_GATE_INPUT and gate_input_ptr is None):
            residual = load_tile(residual_ptr, stride_rm, offs_m, offs_w, mask_m, W)  # [M, W]
        if p_down_ptr is not None:
            dz = load_tile(dz_ptr, R, offs_m, offs_r, mask_m, R)  # [M, R]
            x = h
            if x_ptr is not None:
                x = load_tile(x_ptr, stride_xm, offs_m, offs_w, mask_m, W)  # [M, W]
            d_down = tl.dot(tl.trans(x), dz, d_down, input_precision=PRECISION)
        if USES_GATE_INPUT:
            gate_input = residual
            if gate_input_ptr is not None:
                # [M, W]
                gate_input = load_tile(gate_input_ptr, stride_gm, offs_m, offs_w, mask_m, W)
        if p_gate_down_ptr is not None:
            dzg = load_tile(dzg_ptr, RG, offs_m, offs_g, mask_m, RG)  # [M, G]
            d_gate_down = tl.dot(tl.trans(gate_input), dzg, d_gate_down, input_precision=PRECISION)
        if OUT:
            a = load_tile(a_ptr, R, offs_m, offs_r, mask_m, R)  # [M, R]
            ag = a
            if GATE == "large":
                ag = load_tile(ag_ptr, RG, offs_m, offs_g, mask_m, RG)  # [M, G]
            row_gate = load_row(sums_ptr + 2 * N, offs_m, mask_m) if ROW_GATE else 0.0
            gate = gate_tile(
                ag, row_gate, gate_up, gate_up_bias_ptr, gate_weight_ptr, offs_w, W,
                GATE, LINEAR, PRECISION,
            )  # fmt: skip
            keep = None
            if rng_ptr is not None:
                first = pid_w * BLOCK_W
                keep = dropout_keep(seed, stream, offs_m, first, BLOCK_W, threshold)
            du = load_tile(dout_ptr, stride_dm, offs_m, offs_w, mask_m, W).to(tl.float32)  # [M, W]
            if USES_Y:
                y = output_tile(a, up, up_bias_ptr, h, offs_w, W, PRECISION)
            if NORM:
                mean = load_row(moments_ptr, 2 * offs_m, mask_m)
                rstd = load_row(moments_ptr + 1, 2 * offs_m, mask_m)
                mean_g = load_row(sums_ptr, offs_m, mask_m)[:, None]
                mean_gx = load_row(sums_ptr + N, offs_m, mask_m)[:, None]
                xhat = normalised(y, gate, keep, residual, mean, rstd, scale)
                d_norm_weight += du * xhat
                d_norm_bias += du
                du *= load_vector(norm_weight_ptr, offs_w, W)[None, :]
                du = rstd[:, None] * (du - mean_g - xhat * mean_gx)
            dv = du * scale
            if rng_ptr is not None:
                dv = tl.where(keep, dv, 0.0)
            dy = dv * gate
            if ROW_GATE:
                dlogit = load_row(sums_ptr + 4 * N, offs_m, mask_m)
                if SEES_OUTPUT:
                    half = gate_weight_ptr + W if GATE == "small" else gate_weight_ptr
                    dy += dlogit[:, None] * load_vector(half, offs_w, W)[None, :]
                if WEIGHT:
                    d_weight_x += dlogit[:, None] * gate_input.to(tl.float32)  # type: ignore[union-attr]
                    if SEES_OUTPUT:
                        d_weight_h += dlogit[:, None] * y
                    elif h_ptr is not None:
                        d_weight_h += dlogit[:, None] * h.to(tl.float32)  # type: ignore[union-attr]
            if WEIGHT and GATE == "middleY":
                d_weight_x += dv * y
            if LOGIT:
                dlogit = dv * y * gate * (1.0 - gate)
                d_gate_up_bias += dlogit
                if p_gate_up_ptr is not None:
                    dlogit = dlogit.to(ag.dtype)
                    d_gate_up = tl.dot(tl.trans(dlogit), ag, d_gate_up, input_precision=PRECISION)
            d_up_bias += dy
            if p_up_ptr is not None:
                d_up = tl.dot(tl.trans(dy.to(a.dtype)), a, d_up, input_precision=PRECISION)
    if p_up_ptr is not None:
        store_tile(p_up_ptr + part, R, offs_w, offs_r, mask_w, R, d_up)
    if p_gate_up_ptr is not None:
        store_tile(p_gate_up_ptr + part, RG, offs_w, offs_g, mask_w, RG, d_gate_up)
    if p_down_ptr is not None:
        store_tile(p_down_ptr + part, W, offs_r, offs_w, offs_r < R, W, tl.trans(d_down))
    if p_gate_down_ptr is not None:
        store_tile(p_gate_down_ptr + part, W, offs_g, offs_w, offs_g < RG, W, tl.trans(d_gate_down))
    _store_sum(p_up_bias_ptr, part, offs_w, W, d_up_bias)
    _store_sum(p_gate_up_bias_ptr, part, offs_w, W, d_gate_up_bias)
    _store_sum(p_norm_weight_ptr, part, offs_w, W, d_norm_weight)
    _store_sum(p_norm_bias_ptr, part, offs_w, W, d_norm_bias)
    if WEIGHT:
        if GATE == "middleX":
            d_weight_x += d_weight_h
        if GATE == "middleY" and not LINEAR:
            s = tl.sigmoid(load_vector(gate_weight_ptr, offs_w, W))
            d_weight_x *= (s * (1.0 - s))[None, :]
        _store_sum(p_gate_weight_ptr, part, offs_w, W, d_weight_x)
        if GATE == "small":
            _store_sum(p_gate_weight_ptr + W, part, offs_w, W, d_weight_h)


@triton.jit
def _gated_bottleneck_bwd_reduce_kernel(  # type: ignore[no-untyped-def]
    part_ptr,
    d0_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    d4_ptr,
    d5_ptr,
    d6_ptr,
    d7_ptr,
    d8_ptr,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    n6,
    n7,
    n8,
    splits,
    stride_part,
    BLOCK: tl.constexpr,
):
    """Every parameter's gradient from its partials: parameter on axis 1, BLOCK elements on 0."""
    s = 0
    s = sum_section(d0_ptr, 0, n0, s, part_ptr, stride_part, splits, BLOCK)
    s = sum_section(d1_ptr, 1, n1, s, part_ptr, stride_part, splits, BLOCK)
    s = sum_section(d2_ptr, 2, n2, s, part_ptr, stride_part, splits, BLOCK)
    s = sum_section(d3_ptr, 3, n3, s, part_ptr, stride_part, splits, BLOCK)
    s = sum_section(d4_ptr, 4, n4, s, part_ptr, stride_part, splits, BLOCK)
    s = sum_section(d5_ptr, 5, n5, s, part_ptr, stride_part, splits, BLOCK)
    s = sum_section(d6_ptr, 6, n6, s, part_ptr, stride_part, splits, BLOCK)
    s = sum_section(d7_ptr, 7, n7, s, part_ptr, stride_part, splits, BLOCK)
    sum_section(d8_ptr, 8, n8, s, part_ptr, stride_part, splits, BLOCK)
