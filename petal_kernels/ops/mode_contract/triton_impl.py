"""``mode_contract`` in Triton: contraction and fold in one kernel, no mode matrix stored.

Maths. Tucker core C [R, R, R], modes p_k (rows of [K, R]), V [O, R], s = scale, PT the stored
transpose of P_k:

    forward   M_k[a, b] = sum_c C[a, b, c] p_k[c]
              PT[k, a, o] = s sum_b V[o, b] M_k[a, b];   without V: s M_k
    backward  dM_k[a, b] = s sum_o dPT[k, a, o] V[o, b]
              dC[a, b, c] = sum_k dM_k[a, b] p_k[c]
              dp_k[c] = sum_ab dM_k[a, b] C[a, b, c]
              dV[o, b] = s sum_ka dPT[k, a, o] M_k[a, b]
    CP        M_k = diag(lambda p_k): the same, elementwise

Shapes. core, modes contiguous (copied if not), V with any strides, output contiguous; K, R, O
arbitrary; int64 addresses. core, modes and V share a dtype, fp32, fp16 or bf16; the output may have
another of the three.

Grid. fwd: a program owns the slab C[a] for up to BLOCK_K modes (a Q-Former's all in one block) and
one tile of o: it contracts BLOCK_B rows of the slab at a time and folds them at once, so neither
M_k nor the slab is ever held whole. bwd_slab: a program owns a [b, c] tile of a slab, forms dM_k
block by block of modes, writes its tile of dC once and its share of every dp_k. bwd_up: a program
owns a tile of dV and a group of slabs, and forms M_k anew. sum: tiles of the result. CP: tiles of
V, of (k, a) and of dV.

Traffic (e bytes per element, f of the output's; the tiles of one slab run side by side, so that L2
serves all but the first):

    fwd       (R^3 + K R + O R) e + K R O f              one by one: K R^3 e + 2 K R^2 e more
    bwd_slab  K R O f + (2 R^3 + K R + O R) e + 4 T K R  T = R ceil(R / BLOCK_B) shares
    bwd_up    K R O f + (R^3 + K R) e + 4 G O R          G groups of slabs
    sum       4 T K R + K R e, and 4 G O R + O R e       the partials once more, and the gradients
    CP        fwd (R + K R + O R) e + K R O f
              bwd 2 K R O f + (2 O R + 3 K R + 3 R) e + 8 K R

Saved for backward: the inputs.

Numerics. Accumulation in fp32 and one rounding, at the store: M_k and dM_k stay fp32. A product of
inputs is done in their dtype; a product with M_k or dM_k is fp32: IEEE for fp32 inputs (unless
``torch.backends.cuda.matmul.fp32_precision`` is tf32), three TF32 products for 16-bit inputs, whose
8 or 11 bits are exact in TF32. Partials are summed in a fixed order: the same bits every time. NaN
and Inf propagate.

Limits (``unsupported``): fp32, fp16, bf16; a CUDA device of compute capability 8.0, or
TRITON_INTERPRET=1 with CPU tensors, which excludes bf16 (the interpreter multiplies its bit
patterns).

Source: PETAL (arXiv 2312.12458), Aurora (arXiv 2305.08381). Kernels: ``triton_kernels.py``,
launch tables: ``triton_configs.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.mode_contract import triton_kernels as tk
from petal_kernels.ops.mode_contract.arguments import Call, Gradients
from petal_kernels.ops.mode_contract.triton_configs import choose


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    return lib.device_reasons(call.core, dtypes=(call.dtype,))


def _choose(kernel: str, like: Tensor) -> dict[str, Any]:
    return choose(kernel, lib.machine(like), like.element_size())


def _precisions(core: Tensor) -> dict[str, str]:
    """Of products of the inputs, and of products with a mode matrix, which is fp32."""
    if core.element_size() == 2:
        return {"PRECISION": "ieee", "FOLD_PRECISION": "tf32x3"}
    return {"PRECISION": lib.precision(), "FOLD_PRECISION": lib.precision()}


def _v_arguments(up: Tensor | None, core: Tensor) -> tuple[Tensor, int, int, int]:
    """V (or a stand-in that is never read), the output's width and V's strides."""
    if up is None:
        return core, core.shape[0], 0, 0
    return up, up.shape[0], up.stride(0), up.stride(1)


def forward(call: Call) -> Tensor:
    """PT [K, R, O], or scale * M [K, R, R] without ``up``."""
    core, modes, up, scale, dtype = call
    core, modes = core.contiguous(), modes.contiguous()
    (k, rank), (v, width, stride_vo, stride_vb) = modes.shape, _v_arguments(up, core)
    out = torch.empty(call.shape, dtype=dtype, device=core.device)
    if out.numel() == 0:
        return out
    fold = up is not None
    with lib.on_device(core):
        if core.dim() == 1:
            config = _choose("cp_fwd", core)
            tiles = triton.cdiv(rank, config["BLOCK_A"]) * triton.cdiv(width, config["BLOCK_O"])
            # Enough programs to fill the device; the modes of one program share their tile of V.
            chunks = min(k, triton.cdiv(4 * lib.machine(core).processors, tiles))
            each = triton.cdiv(k, chunks)
            tk._mode_contract_cp_fwd_kernel[(tiles, triton.cdiv(k, each))](
                core, modes, v, out, k, rank, width, stride_vo, stride_vb, each, scale,
                FOLD=fold, **config,
            )  # fmt: skip
        else:
            config = _choose("fwd", core)
            tiles = triton.cdiv(k, config["BLOCK_K"]) * triton.cdiv(width, config["BLOCK_O"])
            tk._mode_contract_fwd_kernel[(tiles, rank)](
                core, modes, v, out, k, rank, width, stride_vo, stride_vb, scale,
                FOLD=fold, **_precisions(core), **config,
            )  # fmt: skip
    return out


def _sum(part: Tensor, out: Tensor, scale: float) -> None:
    config = _choose("sum", part)
    grid = (triton.cdiv(out.numel(), config["BLOCK"]),)
    tk._mode_contract_bwd_sum_kernel[grid](part, out, out.numel(), part.shape[0], scale, **config)


def backward(call: Call, dout: Tensor, need: frozenset[str]) -> Gradients:
    """The gradients that ``need`` names."""
    core, modes, up, scale, _ = call
    core, modes, dout = core.contiguous(), modes.contiguous(), dout.contiguous()
    dcore = torch.empty_like(core) if "core" in need else None
    dmodes = torch.empty_like(modes) if "modes" in need else None
    dup = None
    if "up" in need and up is not None:
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    with lib.on_device(core):
        if core.dim() == 1:
            _backward_cp(dout, core, modes, up, scale, dcore, dmodes, dup)
        else:
            if dcore is not None or dmodes is not None:
                _backward_slabs(dout, core, modes, up, scale, dcore, dmodes)
            if dup is not None:
                _backward_up(dout, core, modes, scale, dup)
    return Gradients(dcore, dmodes, dup)


def _backward_slabs(
    dout: Tensor,
    core: Tensor,
    modes: Tensor,
    up: Tensor | None,
    scale: float,
    dcore: Tensor | None,
    dmodes: Tensor | None,
) -> None:
    (k, rank), (v, width, stride_vo, stride_vb) = modes.shape, _v_arguments(up, core)
    config = _choose("bwd_slab", core)
    tiles = triton.cdiv(rank, config["BLOCK_B"])
    shares = rank * tiles if dmodes is not None else 0
    part = torch.empty((shares, k, rank), dtype=torch.float32, device=core.device)
    tk._mode_contract_bwd_slab_kernel[(tiles * tiles, rank)](
        dout, core, modes, v, core if dcore is None else dcore, part, k, rank, width,
        stride_vo, stride_vb, scale,
        FOLD=up is not None, NEED_CORE=dcore is not None, NEED_MODES=dmodes is not None,
        **_precisions(core), **config,
    )  # fmt: skip
    if dmodes is not None:
        _sum(part, dmodes, 1.0)


def _backward_up(dout: Tensor, core: Tensor, modes: Tensor, scale: float, dup: Tensor) -> None:
    (k, rank), (width, _) = modes.shape, dup.shape
    config = _choose("bwd_up", core)
    tiles = triton.cdiv(width, config["BLOCK_O"]) * triton.cdiv(rank, config["BLOCK_B"])
    wanted = triton.cdiv(2 * lib.machine(core).processors, tiles)
    slabs = triton.cdiv(rank, max(1, min(rank, wanted)))
    groups = triton.cdiv(rank, slabs)
    part = torch.empty((groups, width, rank), dtype=torch.float32, device=core.device)
    tk._mode_contract_bwd_up_kernel[(tiles, groups)](
        dout, core, modes, part, k, rank, width, slabs, **_precisions(core), **config
    )  # fmt: skip
    _sum(part, dup, scale)


def _backward_cp(
    dout: Tensor,
    core: Tensor,
    modes: Tensor,
    up: Tensor | None,
    scale: float,
    dcore: Tensor | None,
    dmodes: Tensor | None,
    dup: Tensor | None,
) -> None:
    (k, rank), (v, width, stride_vo, stride_vb) = modes.shape, _v_arguments(up, core)
    if dcore is not None or dmodes is not None:
        diagonal = torch.empty((k, rank), dtype=torch.float32, device=core.device)
        config = _choose("cp_bwd_modes", core)
        tk._mode_contract_cp_bwd_modes_kernel[(triton.cdiv(rank, config["BLOCK_A"]), k)](
            dout, core, v, diagonal, diagonal if dmodes is None else dmodes, rank, width,
            stride_vo, stride_vb, scale,
            FOLD=up is not None, NEED_MODES=dmodes is not None, **config,
        )  # fmt: skip
        if dcore is not None:
            config = _choose("cp_bwd_core", core)
            tk._mode_contract_cp_bwd_core_kernel[(triton.cdiv(rank, config["BLOCK_A"]),)](
                diagonal, modes, dcore, k, rank, **config
            )  # fmt: skip
    if dup is not None:
        config = _choose("cp_bwd_up", core)
        tiles = triton.cdiv(rank, config["BLOCK_A"]) * triton.cdiv(width, config["BLOCK_O"])
        tk._mode_contract_cp_bwd_up_kernel[(tiles,)](
            dout, core, modes, dup, k, rank, width, scale, **config
        )  # fmt: skip
