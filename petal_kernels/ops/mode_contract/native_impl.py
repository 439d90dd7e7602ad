"""``mode_contract`` on the C++ CPU kernels (``csrc/mode_contract_cpu_kernel.h``).

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

from petal_kernels._runtime import device

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(core: Tensor, modes: Tensor, up: Tensor | None, dtype: torch.dtype) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = []
    given = [core, modes] if up is None else [core, modes, up]
    if any(t.device.type != "cpu" for t in given):
        reasons.append("needs CPU tensors")
    wrong = sorted({str(d) for d in (dtype, *(t.dtype for t in given)) if d not in _DTYPES})
    if wrong:
        reasons.append(f"has no kernels for {', '.join(wrong)}")
    return reasons


def forward(
    core: Tensor, modes: Tensor, up: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """PT [K, R, O], or scale * M [K, R, R] without ``up``."""
    device.load_cpu_library()
    rank = core.shape[0]
    out = core.new_empty((modes.shape[0], rank, rank if up is None else up.shape[0]), dtype=dtype)
    torch.ops.petal_native.mode_contract_forward(core.contiguous(), modes, up, scale, out)
    return out


def backward(
    dout: Tensor,
    core: Tensor,
    modes: Tensor,
    up: Tensor | None,
    scale: float,
    need_dcore: bool,
    need_dmodes: bool,
    need_dup: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of core, modes and up in their dtypes."""
    device.load_cpu_library()
    dcore = core.new_empty(core.shape) if need_dcore else None
    dmodes = torch.empty_like(modes) if need_dmodes else None
    dup = torch.empty_like(up) if need_dup and up is not None else None
    torch.ops.petal_native.mode_contract_backward(
        dout, core.contiguous(), modes, up, scale, dcore, dmodes, dup
    )
    return dcore, dmodes, dup
