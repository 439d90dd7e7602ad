"""Triton kernels of ``expert_dispatch``'s backward per row and per slot; sums over rows are in
``triton_kernels_weights.py``.

Conventions are those of ``triton_kernels_tiles.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import load_tile, project, store_tile
from petal_kernels.ops.expert_dispatch.triton_kernels_tiles import (
    column,
    expert_gradient,
    gates_tile,
    slot_tile,
    with_column,
    z_rows,
)


@triton.jit
def _expert_dispatch_bwd_slots_kernel(  # type: ignore[no-untyped-def]
    dz_ptr,
    dg_ptr,
    dout_ptr,
    z_ptr,
    up_ptr,
    up_bias_ptr,
    logits_ptr,
    gates_ptr,
    chosen_ptr,
    order_ptr,
    offsets_ptr,
    L,
    R,
    O,  # noqa: E741
    E,
    stride_dm,
    mix,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    RENORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sorted: dz of a tile of one expert's slots, dout gathered, and its gates' gradients, to the
    tokens' rows [N, E]."""
    e, offs_s, mask_s = slot_tile(tl.program_id(0), offsets_ptr, E, BLOCK_M, BLOCK_E)
    if e < E:
        offs_r = tl.arange(0, BLOCK_R)
        tokens = tl.load(order_ptr + offs_s, mask=mask_s, other=0).to(tl.int64)
        g, _, _ = gates_tile(
            logits_ptr, gates_ptr, chosen_ptr, tokens, mask_s, L, E, GATE, RENORM, BLOCK_E
        )
        z = load_tile(z_ptr, R, offs_s, offs_r, mask_s, R)  # [S, R]
        dg, dz = expert_gradient(
            dout_ptr, stride_dm, up_ptr + e * O * R, z, column(g, e), tokens, mask_s, R, O, mix,
            ACT, PRECISION, BLOCK_O, BLOCK_R,
        )  # fmt: skip
        if dz_ptr is not None:
            store_tile(dz_ptr, R, offs_s, offs_r, mask_s, R, dz)
        if dg_ptr is not None:
            if up_bias_ptr is not None:
                through = project(
                    dout_ptr, stride_dm, up_bias_ptr, None, tokens, mask_s, O, E,
                    PRECISION, BLOCK_O, BLOCK_E,
                )  # fmt: skip
                dg += mix * column(through, e)
            tl.store(dg_ptr + tokens * E + e, dg, mask=mask_s)


@triton.jit
def _softmax_backward(dg, g, p, dlogits_ptr, offs_m, mask_m, E):  # type: ignore[no-untyped-def]
    """dl = p (dg - sum g dg) plus the losses' gradient; p differs from g where the softmax over all
    was kept at the choice."""
    offs_e = tl.arange(0, dg.shape[1])
    dl = p * (dg - tl.sum(g * dg, 1)[:, None])
    if dlogits_ptr is not None:
        dl += load_tile(dlogits_ptr, E, offs_m, offs_e, mask_m, E)  # [M, E]
    return tl.where((offs_e < E)[None, :], dl, 0.0)


@triton.jit
def _expert_dispatch_bwd_rows_kernel(  # type: ignore[no-untyped-def]
    dx_ptr,
    dz_ptr,
    dgates_ptr,
    dl_ptr,
    dout_ptr,
    z_ptr,
    dg_ptr,
    logits_ptr,
    gates_ptr,
    chosen_ptr,
    dlogits_ptr,
    slot_of_ptr,
    down_ptr,
    up_ptr,
    up_bias_ptr,
    router_ptr,
    N,
    L,
    D,
    R,
    O,  # noqa: E741
    E,
    A,
    stride_dm,
    keep,
    mix,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    RENORM: tl.constexpr,
    SHARED: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Everything of N rows that backward writes; a program owns BLOCK_M rows, all columns.

    Stationary: dz, the sum over experts where A is 1, and the gates' gradients. Sorted: both were
    there before, dg in the columns chosen.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_r = tl.arange(0, BLOCK_R)
    offs_e = tl.arange(0, BLOCK_E)
    SORTED: tl.constexpr = slot_of_ptr is not None
    CHOICE: tl.constexpr = chosen_ptr is not None
    DG: tl.constexpr = dl_ptr is not None or dgates_ptr is not None
    g, p, chosen = gates_tile(
        logits_ptr, gates_ptr, chosen_ptr, offs_m, mask_m, L, E, GATE, RENORM and CHOICE, BLOCK_E
    )
    used = chosen.to(tl.int32)
    dg = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if not SORTED:
        if DG and up_bias_ptr is not None:
            dg += mix * project(
                dout_ptr, stride_dm, up_bias_ptr, None, offs_m, mask_m, O, E,
                PRECISION, BLOCK_O, BLOCK_E,
            )  # fmt: skip
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in range(E):
            e = tl.cast(i, tl.int64)
            mask_e = column(used, e) > 0
            if not CHOICE or tl.max(mask_e.to(tl.int32), 0) > 0:
                rows = z_rows(slot_of_ptr, offs_m, mask_e, e, N, A)
                z = load_tile(z_ptr, R, rows, offs_r, mask_e, R)  # [M, R]
                dge, dz = expert_gradient(
                    dout_ptr, stride_dm, up_ptr + e * O * R, z, column(g, e), offs_m, mask_m, R, O,
                    mix, ACT, PRECISION, BLOCK_O, BLOCK_R,
                )  # fmt: skip
                if DG:
                    dg = with_column(dg, e, dge)
                if SHARED:
                    total += tl.where(mask_e[:, None], dz, 0.0)
                elif dz_ptr is not None:
                    store_tile(dz_ptr, R, rows, offs_r, mask_e, R, dz)
        if SHARED and dz_ptr is not None:
            store_tile(dz_ptr, R, offs_m, offs_r, mask_m, R, total)
        dg = tl.where(chosen, dg, 0.0)
    elif DG:
        dg_all = dg_ptr + offs_m[:, None] * E + offs_e[None, :]
        dg = tl.load(dg_all, mask=chosen, other=0.0)
    if dgates_ptr is not None:
        store_tile(dgates_ptr, E, offs_m, offs_e, mask_m, E, dg)
    if dl_ptr is not None:
        dl = _softmax_backward(dg, g, p, dlogits_ptr, offs_m, mask_m, E)
        store_tile(dl_ptr, E, offs_m, offs_e, mask_m, E, dl)
    if dx_ptr is not None:
        tl.debug_barrier()  # dz is read by other threads than those that stored it
        blocks = A if SHARED and not SORTED else E
        for d0 in range(0, D, BLOCK_O):
            offs_d = d0 + tl.arange(0, BLOCK_O)
            acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
            if ADD_INPUT:
                dout = load_tile(dout_ptr, stride_dm, offs_m, offs_d, mask_m, O)  # [M, O]
                acc += keep * dout.to(tl.float32)
            if dl_ptr is not None:
                w = load_tile(router_ptr, D, offs_e, offs_d, offs_e < E, D)  # [E, O]
                w = w.to(dz_ptr.dtype.element_ty)
                acc = tl.dot(dl.to(w.dtype), w, acc, input_precision=PRECISION)
            for i in range(blocks):
                e = tl.cast(i, tl.int64)
                mask_e = mask_m if SHARED and not SORTED else column(used, e) > 0
                if not CHOICE or tl.max(mask_e.to(tl.int32), 0) > 0:
                    rows = z_rows(slot_of_ptr, offs_m, mask_e, e, N, A)
                    dz = load_tile(dz_ptr, R, rows, offs_r, mask_e, R)  # [M, R]
                    # [R, O]
                    down = load_tile(down_ptr + e % A * R * D, D, offs_r, offs_d, offs_r < R, D)
                    acc = tl.dot(dz, down.to(dz.dtype), acc, input_precision=PRECISION)
            store_tile(dx_ptr, D, offs_m, offs_d, mask_m, D, acc)
