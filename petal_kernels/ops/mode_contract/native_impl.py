"""``mode_contract`` on the C++ CPU kernels (``csrc/mode_contract/cpu``).

A task owns slabs C[a, :, :] of the core for all modes: it contracts the slab with every p_k and
folds V at once, so that M is never stored; backward recomputes it. Everything accumulates in fp32
and is rounded once; the gradients of the modes and of V are partials over ranges of slabs that R
alone fixes, summed in order, so the same bits come out for any number of threads.

Shapes: core [R, R, R] or [R], modes [K, R], up [O, R], result [K, R, O]. Traffic: core, modes and V
read once, the result written once; eager torch reads the core once per mode. Numerics: as above.
Source: the maths of ``reference.py``. Limits: CPU tensors, fp32, fp16 or bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime import front
from petal_kernels.ops.mode_contract.arguments import Call, Gradients

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = []
    if call.device.type != "cpu":
        reasons.append("needs CPU tensors")
    wrong = {call.dtype, call.core.dtype}.difference(_DTYPES)
    if wrong:
        reasons.append(f"has no kernels for {', '.join(sorted(str(d) for d in wrong))}")
    return reasons


def forward(call: Call) -> Tensor:
    """PT [K, R, O], or scale * M [K, R, R] without ``up``."""
    kernel = front.native("mode_contract_fwd")
    core, modes, up, scale, dtype = call
    out = core.new_empty(call.shape, dtype=dtype)
    kernel(core.contiguous(), modes, up, scale, out)
    return out


def backward(call: Call, dout: Tensor, need: frozenset[str]) -> Gradients:
    """The gradients that ``need`` names."""
    kernel = front.native("mode_contract_bwd")
    core, modes, up, scale, _ = call
    dcore = core.new_empty(core.shape) if "core" in need else None
    dmodes = torch.empty_like(modes) if "modes" in need else None
    dup = torch.empty_like(up) if "up" in need and up is not None else None
    kernel(dout, core.contiguous(), modes, up, scale, dcore, dmodes, dup)
    return Gradients(dcore, dmodes, dup)
