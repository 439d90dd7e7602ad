"""Triton kernel of ``gated_bottleneck``'s backward per row; sums over rows are in
``triton_kernels_weights.py``.

Conventions are those of ``triton_kernels_tiles.py``. ``sums_ptr`` holds five fp32 numbers per row
as planes of N: the norm's mean_g and mean_gx, the row's gate, its gradient dgate, the logit's
gradient dlogit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import (
    activate,
    activate_backward,
    dropout_keep,
    load_tile,
    load_vector,
    store_tile,
)
from petal_kernels.ops.gated_bottleneck.triton_kernels_tiles import (
    gate_tile,
    load_row,
    normalised,
    output_tile,
    owned_rows,
    pooled_gate,
    route,
)


@triton.jit
def _route_backward(  # type: ignore[no-untyped-def]
    dq,
    z,
    dq_ptr,
    left_ptr,
    right_ptr,
    sample,
    length,
    offs_m,
    mask_m,
    V,
    R,
    ROUTE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dz in fp32; a product whose right is the identity reads dq again in slices of the sum."""
    offs_r = tl.arange(0, BLOCK_R)
    if ROUTE == "product":
        dz = tl.zeros(z.shape, tl.float32)
        d = dq.to(z.dtype)
        for v0 in range(0, V, BLOCK_V):
            offs_v = v0 + tl.arange(0, BLOCK_V)
            if right_ptr is None:
                dp = load_tile(dq_ptr, R, offs_m, offs_v, mask_m, R)  # [M, V]
            else:
                # [V, R]
                right = load_tile(right_ptr + sample * V * R, R, offs_v, offs_r, offs_v < V, R)
                dp = tl.dot(d, tl.trans(right), input_precision=PRECISION).to(z.dtype)
            left = load_tile(left_ptr + sample * V * R, R, offs_v, offs_r, offs_v < V, R)  # [V, R]
            dz = tl.dot(dp, left, dz, input_precision=PRECISION)
    else:
        dz = dq
        if ROUTE == "outer":
            right = load_tile(right_ptr, R, offs_m // length, offs_r, mask_m, R)  # [M, R]
            dz = tl.sum(dz * right.to(tl.float32), 1)[:, None]
        if ROUTE == "outer" or ROUTE == "mul":
            # [M, R]
            dz *= load_tile(left_ptr, R, offs_m // length, offs_r, mask_m, R).to(tl.float32)
    if RELU:
        dz = tl.where(z <= 0, 0.0, dz)
    return dz


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    d_ptr,
    small,
    weight_ptr,
    offs_m,
    mask_m,
    W,
    R,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """d (+)= small weight, over all W columns (of D or DG) of the rows owned."""
    offs_r = tl.arange(0, BLOCK_R)
    for w0 in range(0, W, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        weight = load_tile(weight_ptr, W, offs_r, offs_w, offs_r < R, W).to(small.dtype)  # [R, W]
        d = tl.dot(small, weight, input_precision=PRECISION)
        if ADD:
            d += load_tile(d_ptr, W, offs_m, offs_w, mask_m, W).to(tl.float32)  # [M, W]
        store_tile(d_ptr, W, offs_m, offs_w, mask_m, W, d)


@triton.jit
def _gated_bottleneck_bwd_rows_kernel(  # type: ignore[no-untyped-def]
    dout_ptr,
    dx_ptr,
    dh_ptr,
    dgate_input_ptr,
    dresidual_ptr,
    dz_ptr,
    dzg_ptr,
    dq_ptr,
    a_ptr,
    ag_ptr,
    sums_ptr,
    z_ptr,
    zg_ptr,
    logits_ptr,
    moments_ptr,
    down_ptr,
    h_ptr,
    up_ptr,
    up_bias_ptr,
    left_ptr,
    right_ptr,
    gate_down_ptr,
    gate_up_ptr,
    gate_up_bias_ptr,
    gate_weight_ptr,
    token_weights_ptr,
    residual_ptr,
    norm_weight_ptr,
    rng_ptr,
    tiles,
    rows,
    length,
    N,
    V,
    D,
    R,
    O,  # noqa: E741
    DG,
    RG,
    stride_dm,
    stride_zm,
    stride_hm,
    stride_rm,
    scale,
    threshold,
    ACT: tl.constexpr,
    ROUTE: tl.constexpr,
    RELU: tl.constexpr,
    GATE: tl.constexpr,
    LINEAR: tl.constexpr,
    SEES_OUTPUT: tl.constexpr,
    SUMS: tl.constexpr,
    GRADS: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    ADD_GATE_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Everything of N rows that backward writes; a program owns BLOCK_M rows, all columns.

    SUMS: the sums over a row (of the norm, of one gate per row). GRADS: the gradients of the row
    tensors and of the bottlenecks, where dx, dgate_input hold dH, du until dz, dzg are known. Gate
    "small" takes a launch for each, because its gate's gradient is a sum over the sample.
    """
    sample, offs_m, mask_m = owned_rows(tl.program_id(0), tiles, rows, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = tl.arange(0, BLOCK_G)
    NORM: tl.constexpr = norm_weight_ptr is not None
    ROW_GATE: tl.constexpr = GATE == "middleX" or GATE == "small"
    z = load_tile(z_ptr, stride_zm, offs_m, offs_r, mask_m, R)  # [M, R]
    q = route(
        z, z_ptr, stride_zm, left_ptr, right_ptr, sample, length, offs_m, mask_m, V, R,
        ROUTE, RELU, PRECISION, BLOCK_V, BLOCK_R,
    )  # fmt: skip
    a = activate(q, ACT).to(z.dtype)
    ag = a
    if GATE == "large":
        zg = load_tile(zg_ptr, RG, offs_m, offs_g, mask_m, RG)  # [M, G]
        ag = activate(zg.to(tl.float32), ACT).to(z.dtype)
    if rng_ptr is not None:
        seed = tl.load(rng_ptr)
        stream = tl.load(rng_ptr + 1)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = mean
    mean_g, mean_gx = mean, mean
    row_gate, dgate = mean, mean
    if NORM:
        mean = load_row(moments_ptr, 2 * offs_m, mask_m)
        rstd = load_row(moments_ptr + 1, 2 * offs_m, mask_m)
    if ROW_GATE and SUMS:
        row_gate = tl.sigmoid(load_row(logits_ptr, offs_m, mask_m))
        if GATE == "small":
            row_gate = pooled_gate(logits_ptr, token_weights_ptr, sample, rows, 128) + dgate
        tl.store(sums_ptr + 2 * N + offs_m, row_gate, mask=mask_m)
    if SUMS and (NORM or ROW_GATE):
        # With a norm, du is linear in its two means, which are known only after the loop: so is
        # the gate's gradient, as dgate - mean_g * sum_kept - mean_gx * sum_kept_x.
        sum_kept = tl.zeros((BLOCK_M,), tl.float32)
        sum_kept_x = sum_kept
        for o0 in range(0, O, BLOCK_O):
            offs_o = o0 + tl.arange(0, BLOCK_O)
            mask_o = offs_o < O
            up = load_tile(up_ptr, R, offs_o, offs_r, mask_o, R).to(z.dtype)  # [O, R]
            h = None
            if h_ptr is not None:
                h = load_tile(h_ptr, stride_hm, offs_m, offs_o, mask_m, O)  # [M, O]
            y = output_tile(a, up, up_bias_ptr, h, offs_o, O, PRECISION)
            keep = None
            if rng_ptr is not None:
                keep = dropout_keep(seed, stream, offs_m, o0, BLOCK_O, threshold)
            d = load_tile(dout_ptr, stride_dm, offs_m, offs_o, mask_m, O).to(tl.float32)  # [M, O]
            kept = scale * y
            if rng_ptr is not None:
                kept = tl.where(keep, kept, 0.0)
            if NORM:
                gate_up = None
                if GATE == "large":
                    # [O, G]
                    gate_up = load_tile(gate_up_ptr, RG, offs_o, offs_g, mask_o, RG).to(z.dtype)
                gate = gate_tile(
                    ag, row_gate, gate_up, gate_up_bias_ptr, gate_weight_ptr, offs_o, O,
                    GATE, LINEAR, PRECISION,
                )  # fmt: skip
                residual = None
                if residual_ptr is not None:
                    # [M, O]
                    residual = load_tile(residual_ptr, stride_rm, offs_m, offs_o, mask_m, O)
                xhat = normalised(y, gate, keep, residual, mean, rstd, scale)
                d *= load_vector(norm_weight_ptr, offs_o, O)[None, :]
                mean_g += tl.sum(d, 1)
                mean_gx += tl.sum(d * xhat, 1)
                if ROW_GATE:
                    sum_kept += tl.sum(kept, 1)
                    sum_kept_x += tl.sum(kept * xhat, 1)
            if ROW_GATE:
                dgate += tl.sum(kept * d, 1)
        if NORM:
            mean_g /= O
            mean_gx /= O
            dgate = rstd * (dgate - mean_g * sum_kept - mean_gx * sum_kept_x)
            tl.store(sums_ptr + offs_m, mean_g, mask=mask_m)
            tl.store(sums_ptr + N + offs_m, mean_gx, mask=mask_m)
        if GATE == "small":
            tl.store(sums_ptr + 3 * N + offs_m, dgate, mask=mask_m)
    if GRADS:
        if GATE == "small":
            if NORM:
                mean_g = load_row(sums_ptr, offs_m, mask_m)
                mean_gx = load_row(sums_ptr + N, offs_m, mask_m)
            row_gate = load_row(sums_ptr + 2 * N, offs_m, mask_m)
            total = tl.zeros((128,), tl.float32)
            for l0 in range(0, rows, 128):
                offs_l = l0 + tl.arange(0, 128)
                total += load_row(sums_ptr + 3 * N + sample * rows, offs_l, offs_l < rows)
            dgate = tl.sum(total, 0) / rows
            if token_weights_ptr is not None:
                dgate = tl.sum(total, 0) * load_row(token_weights_ptr, offs_m, mask_m)
        if ROW_GATE:
            s = tl.sigmoid(load_row(logits_ptr, offs_m, mask_m))
            dlogit = dgate * s * (1.0 - s)
            tl.store(sums_ptr + 4 * N + offs_m, dlogit, mask=mask_m)
        if a_ptr is not None:
            store_tile(a_ptr, R, offs_m, offs_r, mask_m, R, a)
        if ag_ptr is not None:
            store_tile(ag_ptr, RG, offs_m, offs_g, mask_m, RG, ag)
        da = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        dag = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
        for o0 in range(0, O, BLOCK_O):
            offs_o = o0 + tl.arange(0, BLOCK_O)
            mask_o = offs_o < O
            up = load_tile(up_ptr, R, offs_o, offs_r, mask_o, R).to(z.dtype)  # [O, R]
            du = load_tile(dout_ptr, stride_dm, offs_m, offs_o, mask_m, O).to(tl.float32)  # [M, O]
            keep = None
            if rng_ptr is not None:
                keep = dropout_keep(seed, stream, offs_m, o0, BLOCK_O, threshold)
            gate_up = None
            if GATE == "large":
                # [O, G]
                gate_up = load_tile(gate_up_ptr, RG, offs_o, offs_g, mask_o, RG).to(z.dtype)
            gate = gate_tile(
                ag, row_gate, gate_up, gate_up_bias_ptr, gate_weight_ptr, offs_o, O,
                GATE, LINEAR, PRECISION,
            )  # fmt: skip
            if NORM or GATE == "large":
                h = None
                if h_ptr is not None:
                    h = load_tile(h_ptr, stride_hm, offs_m, offs_o, mask_m, O)  # [M, O]
                y = output_tile(a, up, up_bias_ptr, h, offs_o, O, PRECISION)
            if NORM:
                residual = None
                if residual_ptr is not None:
                    # [M, O]
                    residual = load_tile(residual_ptr, stride_rm, offs_m, offs_o, mask_m, O)
                xhat = normalised(y, gate, keep, residual, mean, rstd, scale)
                du *= load_vector(norm_weight_ptr, offs_o, O)[None, :]
                du = rstd[:, None] * (du - mean_g[:, None] - xhat * mean_gx[:, None])
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr, O, offs_m, offs_o, mask_m, O, du)
            dv = du * scale
            if rng_ptr is not None:
                dv = tl.where(keep, dv, 0.0)
            dy = dv * gate
            dh = dy
            if ROW_GATE:
                # middleX has one weight for both halves; small has gate_input's first.
                half = gate_weight_ptr + O if GATE == "small" else gate_weight_ptr
                through = dlogit[:, None] * load_vector(half, offs_o, O)[None, :]
                if SEES_OUTPUT:
                    dy += through
                if SEES_OUTPUT or h_ptr is not None:
                    dh += through
            if dh_ptr is not None:
                store_tile(dh_ptr, O, offs_m, offs_o, mask_m, O, dh)
            if dgate_input_ptr is not None and (ADD_GATE_INPUT or ROW_GATE):
                dgate_input = du if ADD_GATE_INPUT else tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
                if ROW_GATE:
                    weight_x = load_vector(gate_weight_ptr, offs_o, O)[None, :]
                    dgate_input += dlogit[:, None] * weight_x
                store_tile(dgate_input_ptr, O, offs_m, offs_o, mask_m, O, dgate_input)
            if dz_ptr is not None:
                da = tl.dot(dy.to(z.dtype), up, da, input_precision=PRECISION)
            if dzg_ptr is not None:
                dlogit = (dv * y * gate * (1.0 - gate)).to(z.dtype)
                dag = tl.dot(dlogit, gate_up, dag, input_precision=PRECISION)
        if dz_ptr is not None:
            z = load_tile(z_ptr, stride_zm, offs_m, offs_r, mask_m, R)  # [M, R]
            q = route(
                z, z_ptr, stride_zm, left_ptr, right_ptr, sample, length, offs_m, mask_m, V, R,
                ROUTE, RELU, PRECISION, BLOCK_V, BLOCK_R,
            )  # fmt: skip
            dq = activate_backward(q, da, ACT)
            if dq_ptr is not None:
                store_tile(dq_ptr, R, offs_m, offs_r, mask_m, R, dq)
            tl.debug_barrier()  # dq and dH are read by other threads than those that stored them
            dz = _route_backward(
                dq, z, dq_ptr, left_ptr, right_ptr, sample, length, offs_m, mask_m, V, R,
                ROUTE, RELU, PRECISION, BLOCK_V, BLOCK_R,
            ).to(z.dtype)  # fmt: skip
            store_tile(dz_ptr, R, offs_m, offs_r, mask_m, R, dz)
            if dx_ptr is not None:
                _add_product(
                    dx_ptr, dz, down_ptr, offs_m, mask_m, D, R, ADD_INPUT,
                    PRECISION, BLOCK_O, BLOCK_R,
                )  # fmt: skip
        if dzg_ptr is not None:
            zg = load_tile(zg_ptr, RG, offs_m, offs_g, mask_m, RG)  # [M, G]
            dzg = activate_backward(zg.to(tl.float32), dag, ACT).to(z.dtype)
            store_tile(dzg_ptr, RG, offs_m, offs_g, mask_m, RG, dzg)
            if dgate_input_ptr is not None:
                tl.debug_barrier()
                _add_product(
                    dgate_input_ptr, dzg, gate_down_ptr, offs_m, mask_m, DG, RG, ADD_GATE_INPUT,
                    PRECISION, BLOCK_O, BLOCK_G,
                )  # fmt: skip
