"""``mode_contract`` on CUDA: the CUDA C++ kernels of ``csrc/mode_contract/cuda``.

Maths (K modes, R rank, O rows of V): ``PT[k, a, o] = s sum_b V[o, b] M_k[a, b]`` with
``M_k[a, b] = sum_c C[a, b, c] p_k[c]`` (Tucker) or ``diag(lambda * p_k)`` (CP); without V, ``s M``.
Gradients: ``dM = s dPT V``, ``dC = sum_k dM_k p_k``, ``dp_k = sum_{a,b} dM_k C``,
``dV = s sum_{k,a} dPT M``, with M computed again.
Shapes: core [R, R, R] or [R], modes [K, R], up [O, R], dout [K, R, O], made contiguous; the output
PT [K, R, O] is contiguous.
Grid: a block owns one slab C[a, :, :] for all modes and folds V onto it (in forward, for a group of
column tiles); M never leaves shared memory.
Traffic: the core once, PT once. Backward reads dPT twice (for dM and dV) and the core twice, writes
dC once and fp32 partials of dp [R, K, R] and of dV, which are read once. The eager form contracts
every mode apart: K times the core.
Numerics: fp32 accumulators, one rounding per output element; 16-bit inputs run on tensor cores with
M and dM split into two 16-bit halves, fp32 ones are IEEE FMAs. Fixed order of every sum: same bits
on every run.
Limits: exactly what ``unsupported`` says.
Source: see ``reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petal_kernels.ops.mode_contract.arguments import Call, Gradients

MAX_RANK = 256
MAX_TILES = 4  # ceil(K / 64) * ceil(R / 64): the mode matrices of one slab in shared memory
MAX_DIAGONAL_MODES = 1024
SHARED_BYTES = 150 * 1024  # of the largest block; sm_80, sm_90 and sm_100 have 163 KiB or more

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _ops() -> Any:
    return torch.ops.petal_cuda


def _shared_bytes(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES))


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors; an empty list says that they can."""
    core, dtype = call.core, call.dtype
    reasons = []
    if core.device.type != "cuda":
        reasons.append(f"wants CUDA tensors, got {core.device.type}")
    if core.dtype not in _DTYPES:
        reasons.append(f"wants float32, float16 or bfloat16, got {core.dtype}")
    elif dtype not in _DTYPES:
        reasons.append(f"wants a float32, float16 or bfloat16 output, got {dtype}")
    elif core.dtype != torch.float32 and dtype != core.dtype:
        reasons.append(f"wants float32 factors for a {dtype} output, got {core.dtype}")
    count, rank = call.modes.shape
    if core.dim() == 3:
        if rank > MAX_RANK:
            reasons.append(f"wants a rank of at most {MAX_RANK}, got {rank}")
        tiles = -(-count // 64) * -(-rank // 64)
        if tiles > MAX_TILES:
            reasons.append(f"wants ceil(modes / 64) * ceil(rank / 64) <= {MAX_TILES}, got {tiles}")
        if core.device.type == "cuda" and _shared_bytes(core.device) < SHARED_BYTES:
            reasons.append(f"wants {SHARED_BYTES} bytes of shared memory per block")
    elif count > MAX_DIAGONAL_MODES:
        reasons.append(f"wants at most {MAX_DIAGONAL_MODES} modes, got {count}")
    return reasons


def forward(call: Call) -> Tensor:
    """PT [K, R, O], or scale * M [K, R, R] without ``up``."""
    core, modes, up, scale, dtype = call
    out = core.new_empty(call.shape, dtype=dtype)
    _ops().mode_contract_fwd(
        core.contiguous(),
        modes.contiguous(),
        None if up is None else up.contiguous(),
        out,
        scale,
    )
    return out


def backward(call: Call, dout: Tensor, need: frozenset[str]) -> Gradients:
    """The gradients that ``need`` names."""
    core, modes, up, scale, _ = call
    fold = up
    if up is None and core.dim() == 3:
        fold = torch.eye(modes.shape[1], dtype=core.dtype, device=core.device)
    dcore = core.new_empty(core.shape) if "core" in need else None
    dmodes = modes.new_empty(modes.shape) if "modes" in need else None
    dup = up.new_empty(up.shape) if up is not None and "up" in need else None
    if dcore is not None or dmodes is not None or dup is not None:
        _ops().mode_contract_bwd(
            dout.to(core.dtype).contiguous(),
            core.contiguous(),
            modes.contiguous(),
            None if fold is None else fold.contiguous(),
            dcore,
            dmodes,
            dup,
            scale,
        )
    return Gradients(dcore, dmodes, dup)
