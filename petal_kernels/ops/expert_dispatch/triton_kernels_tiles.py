"""The tiles that the Triton kernels of ``expert_dispatch`` form in both directions.

What those compute, their traffic, numerics and limits are in ``triton_impl.py``. Common to all: N
tokens, E experts (padded to BLOCK_E) of rank R, A down-projections (E, or 1 for all); L tokens
share a row of given gates. Where ``slot_of_ptr`` is given the plan is sorted: row n of z is slot n,
and ``slot_of`` [E, N] holds the slot of an expert's token; else row n A + e is expert e's of token
n. In the kernels of sums over rows W is the width of what is being
reduced, O or D. Expert numbers are made int64 before they multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import (
    activate,
    activate_backward,
    load_tile,
    load_vector,
)

_HIGHEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def column(tile, e):  # type: ignore[no-untyped-def]
    """Column e of a tile in registers."""
    own = tl.arange(0, tile.shape[1]) == e
    return tl.sum(tl.where(own[None, :], tile, 0), 1)


@triton.jit
def with_column(tile, e, values):  # type: ignore[no-untyped-def]
    """The tile with ``values`` added to column e."""
    own = tl.arange(0, tile.shape[1]) == e
    return tl.where(own[None, :], tile + values[:, None], tile)


@triton.jit
def logit_tile(  # type: ignore[no-untyped-def]
    x_ptr,
    stride_xm,
    router_ptr,
    bias_ptr,
    noise_ptr,
    offs_m,
    mask_m,
    D,
    E,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """x router^T + router_bias + noise in fp32; a router that is wider than x is not rounded."""
    SAME: tl.constexpr = x_ptr.dtype.element_ty == router_ptr.dtype.element_ty
    offs_e = tl.arange(0, BLOCK_E)
    acc = tl.zeros((offs_m.shape[0], BLOCK_E), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_xm, offs_m, offs_k, mask_m, D)  # [M, K]
        w = load_tile(router_ptr, D, offs_e, offs_k, offs_e < E, D)  # [E, K]
        if SAME:
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x.to(tl.float32), tl.trans(w), acc, input_precision="tf32x3")
    acc += load_vector(bias_ptr, offs_e, E)[None, :]
    if noise_ptr is not None:
        acc += load_tile(noise_ptr, E, offs_m, offs_e, mask_m, E).to(tl.float32)  # [M, E]
    return acc


@triton.jit
def choose(logits, K, E):  # type: ignore[no-untyped-def]
    """The K largest of each row; of equal ones the first, NaN above everything."""
    offs_e = tl.arange(0, logits.shape[1])
    # Integers in the order of the floats, both zeros being one.
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ _HIGHEST, bits)
    key = tl.where(logits != logits, _HIGHEST, key)
    left = tl.broadcast_to((offs_e < E)[None, :], logits.shape)
    for _ in range(K):
        best = tl.max(tl.where(left, key, -_HIGHEST - 1), 1)
        ties = left & (key == best[:, None])
        first = tl.min(tl.where(ties, offs_e[None, :], E), 1)
        left = left & (offs_e[None, :] != first[:, None])
    return (offs_e < E)[None, :] & ~left


@triton.jit
def softmax(logits, chosen, E, RENORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Over the experts chosen where RENORM, else over all; an infinity or NaN spoils its row."""
    over = tl.broadcast_to((tl.arange(0, logits.shape[1]) < E)[None, :], logits.shape)
    if RENORM:
        over = over & chosen
    logits = tl.where(over, logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def gates_tile(  # type: ignore[no-untyped-def]
    logits_ptr,
    gates_ptr,
    chosen_ptr,
    offs_m,
    mask_m,
    L,
    E,
    GATE: tl.constexpr,
    RENORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Of tokens offs_m: g, 0 where not chosen; the softmax before the choice; who is chosen."""
    offs_e = tl.arange(0, BLOCK_E)
    rows = offs_m // L
    chosen = mask_m[:, None] & (offs_e < E)[None, :]
    if chosen_ptr is not None:
        chosen = load_tile(chosen_ptr, E, rows, offs_e, mask_m, E) != 0  # [M, E]
    if GATE == "mean":
        p = tl.zeros(chosen.shape, tl.float32) + 1.0 / E
    elif GATE == "given":
        p = load_tile(gates_ptr, E, rows, offs_e, mask_m, E).to(tl.float32)  # [M, E]
    else:
        p = softmax(load_tile(logits_ptr, E, rows, offs_e, mask_m, E), chosen, E, RENORM)  # [M, E]
    return tl.where(chosen, p, 0.0), p, chosen


@triton.jit
def z_rows(slot_of_ptr, offs_m, mask, e, N, A):  # type: ignore[no-untyped-def]
    """Where expert e's bottleneck of each token lies in z."""
    if slot_of_ptr is None:
        rows = offs_m * A + e % A
    else:
        rows = tl.load(slot_of_ptr + e * N + offs_m, mask=mask, other=0).to(tl.int64)
    return rows


@triton.jit
def slot_tile(  # type: ignore[no-untyped-def]
    pid, offsets_ptr, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The tile of slots number pid: its expert (E behind the last tile), slots and their mask. No
    tile spans two experts."""
    offs_e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + offs_e, mask=offs_e < E, other=0)
    end = tl.load(offsets_ptr + 1 + offs_e, mask=offs_e < E, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    behind = tl.cumsum(tiles, 0)
    e = tl.sum(((behind <= pid) & (offs_e < E)).to(tl.int32), 0)
    first = begin + (pid - behind + tiles) * BLOCK_M
    first = tl.sum(tl.where(offs_e == e, first, 0), 0)
    stop = tl.sum(tl.where(offs_e == e, end, 0), 0)
    offs = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    return e.to(tl.int64), offs, offs < stop


@triton.jit
def expert_gradient(  # type: ignore[no-untyped-def]
    dout_ptr,
    stride_dm,
    up_ptr,
    z,
    g,
    offs_m,
    mask_m,
    R,
    O,  # noqa: E741
    mix,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """<t, act(z)> and dz of one expert, t = mix dout up."""
    offs_r = tl.arange(0, BLOCK_R)
    t = tl.zeros((offs_m.shape[0], BLOCK_R), tl.float32)
    for o0 in range(0, O, BLOCK_O):
        offs_o = o0 + tl.arange(0, BLOCK_O)
        dout = load_tile(dout_ptr, stride_dm, offs_m, offs_o, mask_m, O)  # [M, O]
        up = load_tile(up_ptr, R, offs_o, offs_r, offs_o < O, R).to(dout.dtype)  # [O, R]
        t = tl.dot(dout, up, t, input_precision=PRECISION)
    t *= mix
    q = z.to(tl.float32)
    return tl.sum(t * activate(q, ACT), 1), activate_backward(q, g[:, None] * t, ACT)
