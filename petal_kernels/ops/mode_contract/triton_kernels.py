"""Triton kernels of ``mode_contract``; what they compute and move is documented in
``triton_impl.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _v_pointers(up_ptr, rows, cols, stride_row, stride_col):  # type: ignore[no-untyped-def]
    """A tile of V or of its transpose, whichever the strides say."""
    rows = rows.to(tl.int64)
    cols = cols.to(tl.int64)
    return up_ptr + rows[:, None] * stride_row + cols[None, :] * stride_col


@triton.jit
def _mode_matrix(  # type: ignore[no-untyped-def]
    core_ptr,
    modes_ptr,
    a,
    b0,
    k0,
    K,
    R,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """M_k[a, b] for a block of modes and of b: [BLOCK_K, BLOCK_B] in fp32, from the slab C[a]."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_b = b0 + tl.arange(0, BLOCK_B)
    slab = core_ptr + (a * R + offs_b)[:, None] * R
    rows = modes_ptr + offs_k.to(tl.int64)[:, None] * R
    m = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for c0 in range(0, R, BLOCK_C):
        offs_c = c0 + tl.arange(0, BLOCK_C)
        mask_c = (offs_c < R)[None, :]
        # [K, C]
        p = tl.load(rows + offs_c[None, :], mask=(offs_k < K)[:, None] & mask_c, other=0.0)
        # [B, C]
        c = tl.load(slab + offs_c[None, :], mask=(offs_b < R)[:, None] & mask_c, other=0.0)
        m = tl.dot(p, tl.trans(c), m, input_precision=PRECISION)
    return m


@triton.jit
def _mode_contract_fwd_kernel(  # type: ignore[no-untyped-def]
    core_ptr,
    modes_ptr,
    up_ptr,
    out_ptr,
    K,
    R,
    O,  # noqa: E741
    stride_vo,
    stride_vb,
    scale,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    FOLD_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """PT[k, a, o] = scale * sum_b V[o, b] M_k[a, b]; a program owns one slab a, a block of modes, a
    tile of o.

    Without FOLD: out[k, a, b] = scale * M_k[a, b], and the tiles run over b.
    """
    tiles_o = tl.cdiv(O, BLOCK_O)
    o0 = (tl.program_id(0) % tiles_o) * BLOCK_O
    k0 = (tl.program_id(0) // tiles_o) * BLOCK_K
    a = tl.program_id(1).to(tl.int64)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_o = o0 + tl.arange(0, BLOCK_O)
    mask_o = offs_o < O
    if FOLD:
        acc = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
        for b0 in range(0, R, BLOCK_B):
            m = _mode_matrix(
                core_ptr, modes_ptr, a, b0, k0, K, R, PRECISION, BLOCK_K, BLOCK_B, BLOCK_C
            )
            offs_b = b0 + tl.arange(0, BLOCK_B)
            v_ptrs = _v_pointers(up_ptr, offs_b, offs_o, stride_vb, stride_vo)
            v = tl.load(v_ptrs, mask=(offs_b < R)[:, None] & mask_o[None, :], other=0.0)  # [B, O]
            acc = tl.dot(m, v.to(tl.float32), acc, input_precision=FOLD_PRECISION)
    else:
        acc = _mode_matrix(
            core_ptr, modes_ptr, a, o0, k0, K, R, PRECISION, BLOCK_K, BLOCK_O, BLOCK_C
        )
    out_offs = (offs_k.to(tl.int64) * R + a)[:, None] * O + offs_o[None, :]
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offs, out, mask=(offs_k < K)[:, None] & mask_o[None, :])


@triton.jit
def _mode_contract_bwd_slab_kernel(  # type: ignore[no-untyped-def]
    dout_ptr,
    core_ptr,
    modes_ptr,
    up_ptr,
    dcore_ptr,
    part_ptr,
    K,
    R,
    O,  # noqa: E741
    stride_vo,
    stride_vb,
    scale,
    FOLD: tl.constexpr,
    NEED_CORE: tl.constexpr,
    NEED_MODES: tl.constexpr,
    PRECISION: tl.constexpr,
    FOLD_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """dC[a, b, c] and this tile's share of dp_k[c]; a program owns a [BLOCK_B, BLOCK_B] tile of the
    slab a.

    dM_k[a, b] = scale * sum_o dPT[k, a, o] V[o, b] is formed block by block of modes and never
    stored.
    """
    tiles = tl.cdiv(R, BLOCK_B)
    tile_b = tl.program_id(0) // tiles
    offs_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_c = (tl.program_id(0) % tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
    a = tl.program_id(1).to(tl.int64)
    mask_b = offs_b < R
    mask_c = (offs_c < R)[None, :]
    tile_offs = (a * R + offs_b)[:, None] * R + offs_c[None, :]
    if NEED_MODES:
        core = tl.load(core_ptr + tile_offs, mask=mask_b[:, None] & mask_c, other=0.0)  # [B, B]
        core = core.to(tl.float32)
    dcore = tl.zeros((BLOCK_B, BLOCK_B), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = (offs_k < K)[:, None]
        rows = dout_ptr + (offs_k.to(tl.int64) * R + a)[:, None] * O
        if FOLD:
            dm = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
            for o0 in range(0, O, BLOCK_O):
                offs_o = o0 + tl.arange(0, BLOCK_O)
                # [K, O]
                d = tl.load(rows + offs_o[None, :], mask=mask_k & (offs_o < O)[None, :], other=0.0)
                v_ptrs = _v_pointers(up_ptr, offs_o, offs_b, stride_vo, stride_vb)
                # [O, B]
                v = tl.load(v_ptrs, mask=(offs_o < O)[:, None] & mask_b[None, :], other=0.0)
                if d.dtype != v.dtype:
                    d = d.to(tl.float32)
                    v = v.to(tl.float32)
                dm = tl.dot(d, v, dm, input_precision=PRECISION)
        else:
            dm = tl.load(rows + offs_b[None, :], mask=mask_k & mask_b[None, :], other=0.0)  # [K, B]
            dm = dm.to(tl.float32)
        dm *= scale
        if NEED_CORE:
            p_offs = offs_k.to(tl.int64)[:, None] * R + offs_c[None, :]
            # [K, B]
            p = tl.load(modes_ptr + p_offs, mask=mask_k & mask_c, other=0.0).to(tl.float32)
            dcore = tl.dot(tl.trans(dm), p, dcore, input_precision=FOLD_PRECISION)
        if NEED_MODES:
            share = tl.dot(dm, core, input_precision=FOLD_PRECISION)
            part_rows = (a * tiles + tile_b) * K + offs_k
            part_offs = part_rows[:, None] * R + offs_c[None, :]
            tl.store(part_ptr + part_offs, share, mask=mask_k & mask_c)
    if NEED_CORE:
        grad = dcore.to(dcore_ptr.dtype.element_ty)
        tl.store(dcore_ptr + tile_offs, grad, mask=mask_b[:, None] & mask_c)


@triton.jit
def _mode_contract_bwd_up_kernel(  # type: ignore[no-untyped-def]
    dout_ptr,
    core_ptr,
    modes_ptr,
    part_ptr,
    K,
    R,
    O,  # noqa: E741
    slabs,
    PRECISION: tl.constexpr,
    FOLD_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """part[g, o, b] = sum over k and the group's slabs a of dPT[k, a, o] M_k[a, b], M formed
    anew."""
    tiles_o = tl.cdiv(O, BLOCK_O)
    offs_o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    b0 = (tl.program_id(0) // tiles_o) * BLOCK_B
    offs_b = b0 + tl.arange(0, BLOCK_B)
    group = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK_O, BLOCK_B), tl.float32)
    for a in range(group * slabs, tl.minimum((group + 1) * slabs, R)):
        for k0 in range(0, K, BLOCK_K):
            m = _mode_matrix(
                core_ptr, modes_ptr, a, b0, k0, K, R, PRECISION, BLOCK_K, BLOCK_B, BLOCK_C
            )
            offs_k = k0 + tl.arange(0, BLOCK_K)
            d_offs = (offs_k.to(tl.int64) * R + a)[:, None] * O + offs_o[None, :]
            mask = (offs_k < K)[:, None] & (offs_o < O)[None, :]
            d = tl.load(dout_ptr + d_offs, mask=mask, other=0.0).to(tl.float32)  # [K, O]
            acc = tl.dot(tl.trans(d), m, acc, input_precision=FOLD_PRECISION)
    part_offs = (group * O + offs_o)[:, None] * R + offs_b[None, :]
    tl.store(part_ptr + part_offs, acc, mask=(offs_o < O)[:, None] & (offs_b < R)[None, :])


@triton.jit
def _mode_contract_bwd_sum_kernel(  # type: ignore[no-untyped-def]
    part_ptr, out_ptr, size, parts, scale, BLOCK: tl.constexpr
):
    """out[i] = scale * sum_s part[s, i], in the order of s."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(part_ptr + offs, mask=mask, other=0.0)
        part_ptr += size
    tl.store(out_ptr + offs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mode_contract_cp_fwd_kernel(  # type: ignore[no-untyped-def]
    core_ptr,
    modes_ptr,
    up_ptr,
    out_ptr,
    K,
    R,
    O,  # noqa: E741
    stride_vo,
    stride_vb,
    modes_each,
    scale,
    FOLD: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """PT[k, a, o] = scale * lambda[a] p_k[a] V[o, a]; a program owns a tile of V and some modes.

    Without FOLD, V is the identity and the output the diagonal mode matrices.
    """
    tiles_o = tl.cdiv(O, BLOCK_O)
    offs_o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_a = (tl.program_id(0) // tiles_o) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < R
    mask = mask_a[:, None] & (offs_o < O)[None, :]
    if FOLD:
        v_ptrs = _v_pointers(up_ptr, offs_a, offs_o, stride_vb, stride_vo)
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)  # [A, O]
    else:
        v = tl.where(offs_a[:, None] == offs_o[None, :], 1.0, 0.0)
    core = tl.load(core_ptr + offs_a, mask=mask_a, other=0.0).to(tl.float32) * scale  # [A]
    first = tl.program_id(1).to(tl.int64) * modes_each
    for k in range(first, tl.minimum(first + modes_each, K)):
        p = tl.load(modes_ptr + k * R + offs_a, mask=mask_a, other=0.0).to(tl.float32)  # [A]
        factor = (core * p)[:, None]
        # Off the diagonal a select, not a product: Inf times zero would be NaN.
        out = factor * v if FOLD else tl.where(v > 0, factor, 0.0)
        out_offs = (k * R + offs_a)[:, None] * O + offs_o[None, :]
        tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mode_contract_cp_bwd_modes_kernel(  # type: ignore[no-untyped-def]
    dout_ptr,
    core_ptr,
    up_ptr,
    diagonal_ptr,
    dmodes_ptr,
    R,
    O,  # noqa: E741
    stride_vo,
    stride_vb,
    scale,
    FOLD: tl.constexpr,
    NEED_MODES: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """t[k, a] = scale * sum_o dPT[k, a, o] V[o, a] in fp32, and dp_k[a] = lambda[a] t[k, a]; a
    program owns (k, a tile)."""
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    k = tl.program_id(1).to(tl.int64)
    mask_a = offs_a < R
    rows = (k * R + offs_a) * O
    if FOLD:
        acc = tl.zeros((BLOCK_A, BLOCK_O), tl.float32)
        for o0 in range(0, O, BLOCK_O):
            offs_o = o0 + tl.arange(0, BLOCK_O)
            mask = mask_a[:, None] & (offs_o < O)[None, :]
            d = tl.load(dout_ptr + rows[:, None] + offs_o[None, :], mask=mask, other=0.0)  # [A, O]
            v_ptrs = _v_pointers(up_ptr, offs_a, offs_o, stride_vb, stride_vo)
            v = tl.load(v_ptrs, mask=mask, other=0.0)  # [A, O]
            acc += d.to(tl.float32) * v.to(tl.float32)
        t = tl.sum(acc, axis=1) * scale
    else:
        t = tl.load(dout_ptr + rows + offs_a, mask=mask_a, other=0.0).to(tl.float32) * scale  # [A]
    offs = k * R + offs_a
    tl.store(diagonal_ptr + offs, t, mask=mask_a)
    if NEED_MODES:
        core = tl.load(core_ptr + offs_a, mask=mask_a, other=0.0).to(tl.float32)  # [A]
        tl.store(dmodes_ptr + offs, (t * core).to(dmodes_ptr.dtype.element_ty), mask=mask_a)


@triton.jit
def _mode_contract_cp_bwd_core_kernel(  # type: ignore[no-untyped-def]
    diagonal_ptr, modes_ptr, dcore_ptr, K, R, BLOCK_A: tl.constexpr
):
    """dlambda[a] = sum_k t[k, a] p_k[a], in the order of k."""
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < R
    acc = tl.zeros((BLOCK_A,), tl.float32)
    row = offs_a.to(tl.int64)
    for _ in range(K):
        t = tl.load(diagonal_ptr + row, mask=mask_a, other=0.0)  # [A]
        acc += t * tl.load(modes_ptr + row, mask=mask_a, other=0.0).to(tl.float32)
        row += R
    tl.store(dcore_ptr + offs_a, acc.to(dcore_ptr.dtype.element_ty), mask=mask_a)


@triton.jit
def _mode_contract_cp_bwd_up_kernel(  # type: ignore[no-untyped-def]
    dout_ptr,
    core_ptr,
    modes_ptr,
    dup_ptr,
    K,
    R,
    O,  # noqa: E741
    scale,
    BLOCK_A: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dV[o, a] = scale * lambda[a] sum_k p_k[a] dPT[k, a, o]; a program owns a tile of dV."""
    tiles_o = tl.cdiv(O, BLOCK_O)
    offs_o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_a = (tl.program_id(0) // tiles_o) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < R
    mask = mask_a[:, None] & (offs_o < O)[None, :]
    acc = tl.zeros((BLOCK_A, BLOCK_O), tl.float32)
    row = offs_a.to(tl.int64)
    for _ in range(K):
        p = tl.load(modes_ptr + row, mask=mask_a, other=0.0).to(tl.float32)  # [A]
        d = tl.load(dout_ptr + row[:, None] * O + offs_o[None, :], mask=mask, other=0.0)  # [A, O]
        acc += p[:, None] * d.to(tl.float32)
        row += R
    core = tl.load(core_ptr + offs_a, mask=mask_a, other=0.0).to(tl.float32)  # [A]
    grad = acc * (core * scale)[:, None]
    dup_offs = offs_o.to(tl.int64)[None, :] * R + offs_a[:, None]
    tl.store(dup_ptr + dup_offs, grad.to(dup_ptr.dtype.element_ty), mask=mask)
