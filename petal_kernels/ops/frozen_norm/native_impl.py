"""``frozen_norm`` on the C++ CPU kernels (``csrc/frozen_norm/cpu``).

    forward   the row's mean (of "layer") and 1 / deviation, then y
    backward  two means of the row, then dx; the normalised row is formed again

Shapes: x, y, dy and dx [N, D] with unit stride in the last dim and any row stride; the moments
[N, 1 or 2] in fp32. Traffic: 2 N D forward, 3 N D backward; a row is walked two or three times and
waits in cache. Eager code moves 8 N D and more forward, with an fp32 copy of 16-bit rows.
Numerics: fp32, rounded once, of kind "rms" the normalised row too; a row's sums have one order.
Source: the maths of ``reference.py``. Limits: CPU tensors, fp32, fp16 or bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime import device
from petal_kernels._runtime.rows import fresh_rows
from petal_kernels.ops.frozen_norm.arguments import KINDS, Call, moments_per_row

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = []
    if call.device.type != "cpu":
        reasons.append("needs CPU tensors")
    if call.x.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {call.x.dtype}")
    return reasons


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [N, D], and the moments."""
    device.load_cpu_library()
    x, weight, bias, kind, eps = call
    y = fresh_rows(x, *x.shape)
    moments = x.new_empty((x.shape[0], moments_per_row(kind)), dtype=torch.float32)
    torch.ops.petal_native.frozen_norm_fwd(x, weight, bias, KINDS.index(kind), eps, y, moments)
    return y, moments


def backward(call: Call, moments: Tensor, dy: Tensor) -> Tensor:
    """dx [N, D]."""
    device.load_cpu_library()
    x, weight, _, kind, _ = call
    dx = fresh_rows(x, *x.shape)
    torch.ops.petal_native.frozen_norm_bwd(dy, x, moments, weight, KINDS.index(kind), dx)
    return dx
