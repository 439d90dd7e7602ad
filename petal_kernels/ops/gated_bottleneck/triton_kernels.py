"""Triton kernel of ``gated_bottleneck``'s forward.

What it computes, its traffic, numerics and limits are in ``triton_impl.py``; the conventions are
those of ``triton_kernels_tiles.py``.

Args of ``_gated_bottleneck_fwd_kernel`` that are not an argument of the operator with ``_ptr``:
    out_ptr: out [N, O], or None: no more than z, zg and the logits
    z_ptr: z [N, R], written where x is given (None: not wanted), else read
    zg_ptr, logits_ptr, moments_ptr: [N, RG], [N], [N, 2] for backward, None where not wanted; gate
        "small" reads its logits in the second launch
    h_ptr: H, which is x, base or None
    weight_a_ptr: up^T w_h and behind it w_h . up_bias, where the logit reads Y: [R + 1]
    token_weights_ptr: [N], or None: 1 / L
    tiles, rows, length: programs of a part, rows of a part, rows of a sample; a part is a sample
        or everything
    V, D, R, O, DG, RG: sizes, 0 where there is none
    stride_xm, .. zm, hm, gm, rm, om: from row to row of x, z, H, gate_input, residual and out
    scale: the operator's, times what dropout multiplies kept elements with; threshold: dropout's
    LINEAR: middleY is 1 + gate_weight; LOGITS: this launch forms a row gate's logits
    BLOCK_K: columns of D and DG, and of O for the logits; BLOCK_O of O; BLOCK_V vision tokens;
        BLOCK_R and BLOCK_G all of R and RG
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import (
    activate,
    dropout_keep,
    load_tile,
    load_vector,
    project,
    store_tile,
)
from petal_kernels.ops.gated_bottleneck.triton_kernels_tiles import (
    gate_tile,
    output_tile,
    owned_rows,
    pooled_gate,
    route,
)


@triton.jit
def _logit_rows(  # type: ignore[no-untyped-def]
    gate_input_ptr,
    stride_gm,
    h_ptr,
    stride_hm,
    weight_ptr,
    bias_ptr,
    offs_m,
    mask_m,
    O,  # noqa: E741
    GATE: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """w_x . gate_input + w_h . H + gate_bias per row, in fp32."""
    logit = tl.zeros(offs_m.shape, tl.float32)
    for o0 in range(0, O, BLOCK_O):
        offs_o = o0 + tl.arange(0, BLOCK_O)
        w = load_vector(weight_ptr, offs_o, O)[None, :]
        terms = load_tile(gate_input_ptr, stride_gm, offs_m, offs_o, mask_m, O)  # [M, O]
        terms = terms.to(tl.float32) * w
        if h_ptr is not None:
            if GATE == "small":
                w = load_vector(weight_ptr + O, offs_o, O)[None, :]
            # [M, O]
            terms += load_tile(h_ptr, stride_hm, offs_m, offs_o, mask_m, O).to(tl.float32) * w
        logit += tl.sum(terms, 1)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr).to(tl.float32)
    return logit


@triton.jit
def _gated_bottleneck_fwd_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    z_ptr,
    zg_ptr,
    logits_ptr,
    moments_ptr,
    x_ptr,
    down_ptr,
    down_bias_ptr,
    h_ptr,
    up_ptr,
    up_bias_ptr,
    left_ptr,
    right_ptr,
    gate_input_ptr,
    gate_down_ptr,
    gate_down_bias_ptr,
    gate_up_ptr,
    gate_up_bias_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    weight_a_ptr,
    token_weights_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    rng_ptr,
    tiles,
    rows,
    length,
    V,
    D,
    R,
    O,  # noqa: E741
    DG,
    RG,
    stride_xm,
    stride_zm,
    stride_hm,
    stride_gm,
    stride_rm,
    stride_om,
    scale,
    eps,
    threshold,
    ACT: tl.constexpr,
    ROUTE: tl.constexpr,
    RELU: tl.constexpr,
    GATE: tl.constexpr,
    LINEAR: tl.constexpr,
    LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out = norm(residual + drop(scale G Y)); a program owns BLOCK_M rows, all columns.

    z is computed where x is given, else read. Gate "small" takes two launches: the first (LOGITS,
    no out) stores z and the logits, the second needs those of whole samples.
    """
    sample, offs_m, mask_m = owned_rows(tl.program_id(0), tiles, rows, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    if x_ptr is not None:
        z = project(
            x_ptr, stride_xm, down_ptr, down_bias_ptr, offs_m, mask_m, D, R,
            PRECISION, BLOCK_K, BLOCK_R,
        ).to(x_ptr.dtype.element_ty)  # fmt: skip
        if z_ptr is not None:
            store_tile(z_ptr, stride_zm, offs_m, offs_r, mask_m, R, z)
            if ROUTE == "product" and right_ptr is None:
                tl.debug_barrier()
    else:
        z = load_tile(z_ptr, stride_zm, offs_m, offs_r, mask_m, R)  # [M, R]
    q = route(
        z, z_ptr, stride_zm, left_ptr, right_ptr, sample, length, offs_m, mask_m, V, R,
        ROUTE, RELU, PRECISION, BLOCK_V, BLOCK_R,
    )  # fmt: skip
    a = activate(q, ACT)
    ag = a
    row_gate = tl.zeros((BLOCK_M,), tl.float32)
    if GATE == "large":
        zg = project(
            gate_input_ptr, stride_gm, gate_down_ptr, gate_down_bias_ptr, offs_m, mask_m, DG, RG,
            PRECISION, BLOCK_K, BLOCK_G,
        ).to(z.dtype)  # fmt: skip
        if zg_ptr is not None:
            store_tile(zg_ptr, RG, offs_m, tl.arange(0, BLOCK_G), mask_m, RG, zg)
        ag = activate(zg.to(tl.float32), ACT).to(z.dtype)
    elif LOGITS:
        logit = _logit_rows(
            gate_input_ptr, stride_gm, h_ptr, stride_hm, gate_weight_ptr, gate_bias_ptr,
            offs_m, mask_m, O, GATE, BLOCK_K,
        )  # fmt: skip
        if weight_a_ptr is not None:
            weight_a = load_vector(weight_a_ptr, offs_r, R)[None, :]
            logit += tl.sum(a * weight_a, 1) + tl.load(weight_a_ptr + R)
        if logits_ptr is not None:
            tl.store(logits_ptr + offs_m, logit, mask=mask_m)
        row_gate = tl.sigmoid(logit)
    elif GATE == "small":
        row_gate += pooled_gate(logits_ptr, token_weights_ptr, sample, rows, BLOCK_L=128)
    if out_ptr is not None:
        a = a.to(z.dtype)
        if rng_ptr is not None:
            seed = tl.load(rng_ptr)
            stream = tl.load(rng_ptr + 1)
        mean = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for o0 in range(0, O, BLOCK_O):
            offs_o = o0 + tl.arange(0, BLOCK_O)
            mask_o = offs_o < O
            up = load_tile(up_ptr, R, offs_o, offs_r, mask_o, R).to(z.dtype)  # [O, R]
            h = None
            if h_ptr is not None:
                h = load_tile(h_ptr, stride_hm, offs_m, offs_o, mask_m, O)  # [M, O]
            y = output_tile(a, up, up_bias_ptr, h, offs_o, O, PRECISION)
            gate_up = None
            if GATE == "large":
                offs_g = tl.arange(0, BLOCK_G)
                # [O, G]
                gate_up = load_tile(gate_up_ptr, RG, offs_o, offs_g, mask_o, RG).to(z.dtype)
            u = scale * y * gate_tile(
                ag, row_gate, gate_up, gate_up_bias_ptr, gate_weight_ptr, offs_o, O,
                GATE, LINEAR, PRECISION,
            )  # fmt: skip
            if rng_ptr is not None:
                u = tl.where(dropout_keep(seed, stream, offs_m, o0, BLOCK_O, threshold), u, 0.0)
            if residual_ptr is not None:
                # [M, O]
                u += load_tile(residual_ptr, stride_rm, offs_m, offs_o, mask_m, O).to(tl.float32)
            store_tile(out_ptr, stride_om, offs_m, offs_o, mask_m, O, u)
            if norm_weight_ptr is not None:
                # Chan's merge of each tile's mean and centred squares: exact in one pass.
                n = tl.minimum(O - o0, BLOCK_O)
                tile_mean = tl.sum(u, 1) / n
                centred = tl.where(mask_o[None, :], u - tile_mean[:, None], 0.0)
                delta = tile_mean - mean
                share = n / (o0 + n)
                squares += tl.sum(centred * centred, 1) + delta * delta * (o0 * share)
                mean += delta * share
        if norm_weight_ptr is not None:
            rstd = tl.rsqrt(squares / O + eps)
            if moments_ptr is not None:
                tl.store(moments_ptr + 2 * offs_m, mean, mask=mask_m)
                tl.store(moments_ptr + 2 * offs_m + 1, rstd, mask=mask_m)
            tl.debug_barrier()  # u was stored by other threads than those that read it
            for o0 in range(0, O, BLOCK_O):
                offs_o = o0 + tl.arange(0, BLOCK_O)
                # [M, O]
                u = load_tile(out_ptr, stride_om, offs_m, offs_o, mask_m, O).to(tl.float32)
                w = load_vector(norm_weight_ptr, offs_o, O)[None, :]
                b = load_vector(norm_bias_ptr, offs_o, O)[None, :]
                u = (u - mean[:, None]) * rstd[:, None] * w + b
                store_tile(out_ptr, stride_om, offs_m, offs_o, mask_m, O, u)
