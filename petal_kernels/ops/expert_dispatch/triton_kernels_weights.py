"""Triton kernels of ``expert_dispatch``'s parameter gradients: sums over rows, in two stages.

Conventions are those of ``triton_kernels_tiles.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from petal_kernels._runtime.triton_lib import activate, load_tile, store_tile, sum_section
from petal_kernels.ops.expert_dispatch.triton_kernels_tiles import column, gates_tile


@triton.jit
def _expert_sum(  # type: ignore[no-untyped-def]
    p_matrix_ptr,
    p_vector_ptr,
    part,
    rows_ptr,
    small_ptr,
    logits_ptr,
    gates_ptr,
    chosen_ptr,
    order_ptr,
    offsets_ptr,
    e,
    split,
    experts,
    splits,
    N,
    L,
    R,
    W,
    E,
    A,
    stride_rows,
    mix,
    UP: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    RENORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One expert's share of a split: of dup where UP, else of ddown and ddown_bias. ``experts`` is
    1 where one down-projection has the slots of all."""
    begin = 0
    end = N
    if offsets_ptr is not None:
        begin = tl.load(offsets_ptr + e)
        end = tl.load(offsets_ptr + tl.where(experts == 1, E, e + 1))
    per_split = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_M) * BLOCK_M
    start = begin + split * per_split
    stop = tl.minimum(start + per_split, end)
    pid_w = tl.program_id(1)
    offs_w = pid_w * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
    bias = tl.zeros((BLOCK_R,), tl.float32)
    for s0 in range(start, stop, BLOCK_M):
        offs = (s0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = offs < stop
        tokens = offs
        z_row = offs * A + e % A
        if order_ptr is not None:
            tokens = tl.load(order_ptr + offs, mask=mask, other=0).to(tl.int64)
            z_row = offs
        elif chosen_ptr is not None:
            chosen = tl.load(chosen_ptr + tokens // L * E + e, mask=mask, other=0)
            mask = mask & (chosen != 0)
        if chosen_ptr is None or order_ptr is not None or tl.max(mask.to(tl.int32), 0) > 0:
            small = load_tile(small_ptr, R, z_row, offs_r, mask, R)  # [M, R]
            if UP:
                g, _, _ = gates_tile(
                    logits_ptr, gates_ptr, chosen_ptr, tokens, mask, L, E, GATE, RENORM, BLOCK_E
                )
                a = activate(small.to(tl.float32), ACT)
                small = (a * column(g, e)[:, None]).to(small.dtype)  # ga
            elif p_vector_ptr is not None and pid_w == 0:
                bias += tl.sum(small.to(tl.float32), 0)
            if p_matrix_ptr is not None:
                rows = load_tile(rows_ptr, stride_rows, tokens, offs_w, mask, W)  # [M, W]
                acc = tl.dot(tl.trans(rows), small, acc, input_precision=PRECISION)
    if p_matrix_ptr is not None:
        matrix_ptr = p_matrix_ptr + part + e * R * W
        if UP:
            store_tile(matrix_ptr, R, offs_w, offs_r, offs_w < W, R, mix * acc)
        else:
            store_tile(matrix_ptr, W, offs_r, offs_w, offs_r < R, W, tl.trans(acc))
    if not UP and p_vector_ptr is not None and pid_w == 0:
        tl.store(p_vector_ptr + part + e * R + offs_r, bias, mask=offs_r < R)


@triton.jit
def _gate_sum(  # type: ignore[no-untyped-def]
    p_wide_ptr,
    part,
    rows_ptr,
    dl_ptr,
    logits_ptr,
    gates_ptr,
    chosen_ptr,
    split,
    splits,
    N,
    L,
    W,
    E,
    stride_rows,
    mix,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    RENORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A split's share of dup_bias = mix g^T dout where UP, else of drouter = dl^T x."""
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_e = tl.arange(0, BLOCK_E)
    per_split = tl.cdiv(tl.cdiv(N, splits), BLOCK_M) * BLOCK_M
    start = split * per_split
    stop = tl.minimum(start + per_split, N)
    acc = tl.zeros((BLOCK_W, BLOCK_E), tl.float32)
    for s0 in range(start, stop, BLOCK_M):
        tokens = (s0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = tokens < stop
        rows = load_tile(rows_ptr, stride_rows, tokens, offs_w, mask, W)  # [M, W]
        if UP:
            small, _, _ = gates_tile(
                logits_ptr, gates_ptr, chosen_ptr, tokens, mask, L, E, GATE, RENORM, BLOCK_E
            )
            small *= mix
        else:
            small = load_tile(dl_ptr, E, tokens, offs_e, mask, E)  # [M, E]
        small = small.to(rows.dtype)
        acc = tl.dot(tl.trans(rows), small, acc, input_precision=PRECISION)
    store_tile(p_wide_ptr + part, W, offs_e, offs_w, offs_e < E, W, tl.trans(acc))


@triton.jit
def _expert_dispatch_bwd_weights_kernel(  # type: ignore[no-untyped-def]
    p_matrix_ptr,
    p_vector_ptr,
    p_wide_ptr,
    rows_ptr,
    small_ptr,
    dl_ptr,
    logits_ptr,
    gates_ptr,
    chosen_ptr,
    order_ptr,
    offsets_ptr,
    experts,
    splits,
    stride_part,
    N,
    L,
    R,
    W,
    E,
    A,
    stride_rows,
    mix,
    UP: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    RENORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Partial sums over one split of an expert's rows, BLOCK_W columns; behind the experts, of all
    rows for what has one number per gate. UP: of dout (W is O) with ga or g; else of x (W is D)
    with dz or dl."""
    e = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    part = split.to(tl.int64) * stride_part
    if e < experts:
        _expert_sum(
            p_matrix_ptr, p_vector_ptr, part, rows_ptr, small_ptr, logits_ptr, gates_ptr,
            chosen_ptr, order_ptr, offsets_ptr, e, split, experts, splits, N, L, R, W, E, A,
            stride_rows, mix, UP, ACT, GATE, RENORM, PRECISION, BLOCK_M, BLOCK_W, BLOCK_R, BLOCK_E,
        )  # fmt: skip
    elif p_wide_ptr is not None:
        _gate_sum(
            p_wide_ptr, part, rows_ptr, dl_ptr, logits_ptr, gates_ptr, chosen_ptr, split, splits,
            N, L, W, E, stride_rows, mix, UP, GATE, RENORM, PRECISION, BLOCK_M, BLOCK_W, BLOCK_E,
        )  # fmt: skip


@triton.jit
def _expert_dispatch_bwd_reduce_kernel(  # type: ignore[no-untyped-def]
    part_ptr,
    d0_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    d4_ptr,
    n0,
    n1,
    n2,
    n3,
    n4,
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
    sum_section(d4_ptr, 4, n4, s, part_ptr, stride_part, splits, BLOCK)
