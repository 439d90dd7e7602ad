"""Triton kernels of ``expert_dispatch``'s forward.

What they compute, their traffic, numerics and limits are in ``triton_impl.py``; the conventions are
those of ``triton_kernels_tiles.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import activate, load_tile, project, store_tile
from petal_kernels.ops.expert_dispatch.triton_kernels_tiles import (
    choose,
    column,
    gates_tile,
    logit_tile,
    slot_tile,
    softmax,
    z_rows,
)


@triton.jit
def _store_routing(  # type: ignore[no-untyped-def]
    logits_ptr,
    chosen_ptr,
    x_ptr,
    router_ptr,
    router_bias_ptr,
    noise_ptr,
    offs_m,
    mask_m,
    D,
    E,
    K,
    stride_xm,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Logits and choice of the rows owned, stored and returned."""
    offs_e = tl.arange(0, BLOCK_E)
    logits = logit_tile(
        x_ptr, stride_xm, router_ptr, router_bias_ptr, noise_ptr, offs_m, mask_m, D, E,
        PRECISION, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    store_tile(logits_ptr, E, offs_m, offs_e, mask_m, E, logits)
    if GATE == "topk":
        chosen = choose(logits, K, E)
        store_tile(chosen_ptr, E, offs_m, offs_e, mask_m, E, chosen.to(tl.int8))
        chosen = chosen & mask_m[:, None]
    else:
        chosen = mask_m[:, None] & (offs_e < E)[None, :]
    return logits, chosen


@triton.jit
def _expert_dispatch_route_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    chosen_ptr,
    x_ptr,
    router_ptr,
    router_bias_ptr,
    noise_ptr,
    N,
    D,
    E,
    K,
    stride_xm,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sorted: logits and choice, which the sort needs before anything else."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    _store_routing(
        logits_ptr, chosen_ptr, x_ptr, router_ptr, router_bias_ptr, noise_ptr, offs_m, offs_m < N,
        D, E, K, stride_xm, GATE, PRECISION, BLOCK_K, BLOCK_E,
    )  # fmt: skip


@triton.jit
def _expert_dispatch_shrink_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    x_ptr,
    down_ptr,
    down_bias_ptr,
    order_ptr,
    offsets_ptr,
    D,
    R,
    E,
    A,
    stride_xm,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sorted: z of a tile of one expert's slots, x gathered. A shared bottleneck is copied to each
    slot of its token."""
    e, offs_s, mask_s = slot_tile(tl.program_id(0), offsets_ptr, E, BLOCK_M, BLOCK_E)
    if e < E:
        tokens = tl.load(order_ptr + offs_s, mask=mask_s, other=0)
        bias_ptr = down_bias_ptr
        if down_bias_ptr is not None:
            bias_ptr += e % A * R
        z = project(
            x_ptr, stride_xm, down_ptr + e % A * R * D, bias_ptr, tokens, mask_s, D, R,
            PRECISION, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        store_tile(z_ptr, R, offs_s, tl.arange(0, BLOCK_R), mask_s, R, z)


@triton.jit
def _add_expert(  # type: ignore[no-untyped-def]
    acc,
    z_ptr,
    slot_of_ptr,
    up_ptr,
    e,
    g,
    mask_e,
    offs_m,
    offs_o,
    N,
    A,
    R,
    O,  # noqa: E741
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + ga_e up_e^T, ga = g act(z)."""
    offs_r = tl.arange(0, BLOCK_R)
    rows = z_rows(slot_of_ptr, offs_m, mask_e, e, N, A)
    z = load_tile(z_ptr, R, rows, offs_r, mask_e, R)  # [M, R]
    ga = (activate(z.to(tl.float32), ACT) * g[:, None]).to(z.dtype)
    up = load_tile(up_ptr + e * O * R, R, offs_o, offs_r, offs_o < O, R).to(z.dtype)  # [O, R]
    return tl.dot(ga, tl.trans(up), acc, input_precision=PRECISION)


@triton.jit
def _expert_dispatch_fwd_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    z_ptr,
    logits_ptr,
    chosen_ptr,
    x_ptr,
    down_ptr,
    down_bias_ptr,
    h_ptr,
    up_ptr,
    up_bias_ptr,
    router_ptr,
    router_bias_ptr,
    noise_ptr,
    gates_ptr,
    slot_of_ptr,
    N,
    L,
    D,
    R,
    O,  # noqa: E741
    E,
    A,
    K,
    stride_xm,
    stride_hm,
    stride_om,
    keep,
    mix,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    RENORM: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out = keep H + mix sum_e g_e (act(z_e) up_e^T + up_bias_e); a program owns BLOCK_M rows.

    Stationary: it routes its rows and stores their z first, of the experts that some row chose, and
    reads it again for each tile of columns. Sorted: routing and z were there before.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_r = tl.arange(0, BLOCK_R)
    offs_e = tl.arange(0, BLOCK_E)
    CHOICE: tl.constexpr = chosen_ptr is not None
    if router_ptr is not None and slot_of_ptr is None:
        logits, chosen = _store_routing(
            logits_ptr, chosen_ptr, x_ptr, router_ptr, router_bias_ptr, noise_ptr, offs_m, mask_m,
            D, E, K, stride_xm, GATE, PRECISION, BLOCK_K, BLOCK_E,
        )  # fmt: skip
        g = tl.where(chosen, softmax(logits, chosen, E, RENORM and CHOICE), 0.0)
    else:
        g, _, chosen = gates_tile(
            logits_ptr, gates_ptr, chosen_ptr, offs_m, mask_m, L, E,
            GATE, RENORM and CHOICE, BLOCK_E,
        )  # fmt: skip
    chosen = chosen.to(tl.int32)
    if slot_of_ptr is None:
        for i in range(A):
            e = tl.cast(i, tl.int64)
            mask_e = mask_m if SHARED else column(chosen, e) > 0
            if SHARED or not CHOICE or tl.max(mask_e.to(tl.int32), 0) > 0:
                bias_ptr = down_bias_ptr
                if down_bias_ptr is not None:
                    bias_ptr += e * R
                z = project(
                    x_ptr, stride_xm, down_ptr + e * R * D, bias_ptr, offs_m, mask_m, D, R,
                    PRECISION, BLOCK_K, BLOCK_R,
                )  # fmt: skip
                store_tile(z_ptr, R, offs_m * A + e, offs_r, mask_e, R, z)
        tl.debug_barrier()  # z is read by other threads than those that stored it
    for o0 in range(0, O, BLOCK_O):
        offs_o = o0 + tl.arange(0, BLOCK_O)
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        if up_bias_ptr is not None:
            # [E, O]
            b = load_tile(up_bias_ptr, O, offs_e, offs_o, offs_e < E, O).to(z_ptr.dtype.element_ty)
            acc = tl.dot(g.to(b.dtype), b, acc, input_precision=PRECISION)
        for i in range(E):
            e = tl.cast(i, tl.int64)
            mask_e = column(chosen, e) > 0
            if not CHOICE or tl.max(mask_e.to(tl.int32), 0) > 0:
                acc = _add_expert(
                    acc, z_ptr, slot_of_ptr, up_ptr, e, column(g, e), mask_e, offs_m, offs_o,
                    N, A, R, O, ACT, PRECISION, BLOCK_R,
                )  # fmt: skip
        acc *= mix
        if h_ptr is not None:
            # [M, O]
            acc += keep * load_tile(h_ptr, stride_hm, offs_m, offs_o, mask_m, O).to(tl.float32)
        store_tile(out_ptr, stride_om, offs_m, offs_o, mask_m, O, acc)
