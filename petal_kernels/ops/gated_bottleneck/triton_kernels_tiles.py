"""The tiles that the Triton kernels of ``gated_bottleneck`` form in both directions.

What those compute, their traffic, numerics and limits are in ``triton_impl.py``. Common to all: an
absent tensor is None and costs nothing; rows are int64; every size may be ragged, and masked lanes
read zero. In the kernels of sums over rows W is the width of the output or the input that is being
reduced: O, D or DG.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import load_tile, load_vector


@triton.jit
def owned_rows(pid, tiles, rows, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The part that a program works on, its rows and their mask: ``tiles`` programs per part of
    ``rows`` rows (a sample, or everything)."""
    part = (pid // tiles).to(tl.int64)
    offs = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    return part, part * rows + offs, offs < rows


@triton.jit
def load_row(ptr, offs_m, mask_m):  # type: ignore[no-untyped-def]
    """One fp32 number per row."""
    return tl.load(ptr + offs_m, mask=mask_m, other=0.0)


@triton.jit
def rectify(z, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """relu(z) or z, in z's dtype."""
    if RELU:
        z = tl.where(z < 0, 0.0, z).to(z.dtype)
    return z


@triton.jit
def route(  # type: ignore[no-untyped-def]
    z,
    z_ptr,
    stride_z,
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
    """q in fp32. "outer" is a product with one vision token, rows of any samples; "product" has
    rows of one sample and, where right is the identity, reads z again in slices of the sum."""
    BLOCK_S: tl.constexpr = BLOCK_V  # ranks of such a slice
    offs_r = tl.arange(0, BLOCK_R)
    if ROUTE == "product":
        q = tl.zeros(z.shape, tl.float32)
        if right_ptr is None:
            own_ptr = left_ptr + sample * R * R
            for s0 in range(0, R, BLOCK_S):
                offs_s = s0 + tl.arange(0, BLOCK_S)
                f = rectify(load_tile(z_ptr, stride_z, offs_m, offs_s, mask_m, R), RELU)  # [M, S]
                left = load_tile(own_ptr, R, offs_r, offs_s, offs_r < R, R)  # [R, S]
                q = tl.dot(f, tl.trans(left), q, input_precision=PRECISION)
        else:
            f = rectify(z, RELU)
            for v0 in range(0, V, BLOCK_V):
                offs_v = v0 + tl.arange(0, BLOCK_V)
                # [V, R]
                left = load_tile(left_ptr + sample * V * R, R, offs_v, offs_r, offs_v < V, R)
                # [V, R]
                right = load_tile(right_ptr + sample * V * R, R, offs_v, offs_r, offs_v < V, R)
                p = tl.dot(f, tl.trans(left), input_precision=PRECISION).to(z.dtype)
                q = tl.dot(p, right, q, input_precision=PRECISION)
    else:
        q = rectify(z, RELU).to(tl.float32)
        if ROUTE != "none":
            # [M, R]
            left = load_tile(left_ptr, R, offs_m // length, offs_r, mask_m, R).to(tl.float32)
            if ROUTE == "add":
                q += left
            else:
                q *= left
            if ROUTE == "outer":
                right = load_tile(right_ptr, R, offs_m // length, offs_r, mask_m, R)  # [M, R]
                q = tl.sum(q, 1)[:, None] * right.to(tl.float32)
    return q


@triton.jit
def pooled_gate(  # type: ignore[no-untyped-def]
    logits_ptr, token_weights_ptr, sample, L, BLOCK_L: tl.constexpr
):
    """sum_j weight_j sigmoid(logit_j) over the L tokens of a sample, in one order everywhere."""
    acc = tl.zeros((BLOCK_L,), tl.float32)
    for l0 in range(0, L, BLOCK_L):
        offs = l0 + tl.arange(0, BLOCK_L)
        mask = offs < L
        value = tl.sigmoid(tl.load(logits_ptr + sample * L + offs, mask=mask, other=0.0))
        if token_weights_ptr is not None:
            value *= tl.load(token_weights_ptr + sample * L + offs, mask=mask, other=0.0)
        acc += tl.where(mask, value, 0.0)
    mean = tl.sum(acc, 0)
    return mean / L if token_weights_ptr is None else mean


@triton.jit
def gate_tile(  # type: ignore[no-untyped-def]
    ag,
    row_gate,
    gate_up,
    gate_up_bias_ptr,
    gate_weight_ptr,
    offs_o,
    O,  # noqa: E741
    GATE: tl.constexpr,
    LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G in fp32: [BLOCK_M, BLOCK_O], [1, BLOCK_O], [BLOCK_M, 1] or 1."""
    if GATE == "large":
        logit = tl.dot(ag, tl.trans(gate_up), input_precision=PRECISION)
        gate = tl.sigmoid(logit + load_vector(gate_up_bias_ptr, offs_o, O)[None, :])
    elif GATE == "middleY":
        w = load_vector(gate_weight_ptr, offs_o, O)
        gate = (1.0 + (w if LINEAR else tl.sigmoid(w)))[None, :]
    elif GATE == "none":
        gate = 1.0
    else:
        gate = row_gate[:, None]
    return gate


@triton.jit
def output_tile(a, up, up_bias_ptr, h, offs_o, O, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    """Y = a up^T + up_bias + H in fp32."""
    y = tl.dot(a, tl.trans(up), input_precision=PRECISION)
    y += load_vector(up_bias_ptr, offs_o, O)[None, :]
    if h is not None:
        y += h.to(tl.float32)
    return y


@triton.jit
def normalised(y, gate, keep, residual, mean, rstd, scale):  # type: ignore[no-untyped-def]
    """xhat of u = residual + drop(scale G Y), which is formed again."""
    u = scale * y * gate
    if keep is not None:
        u = tl.where(keep, u, 0.0)
    if residual is not None:
        u += residual.to(tl.float32)
    return (u - mean[:, None]) * rstd[:, None]
