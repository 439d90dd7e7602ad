"""``frozen_norm`` on CUDA: the CUDA C++ kernels of ``csrc/frozen_norm/cuda``.

Maths: as in ``reference.py``, per row: its moments and y; backward ``dx = rho (g - xhat
mean(g xhat))``, of "layer" less ``mean(g)`` too, with xhat formed again from x and the moments.
Shapes: x, y, dy and dx [N, D] with unit stride in the last dim and any row stride; weight and bias
[D], moments [N, 1 or 2] in fp32, contiguous.
Grid: a warp owns a row of up to 1024 columns, else a block does.
Traffic: 2 N D forward, 3 N D backward; the second and third walk of a row find it in L1 or L2.
Numerics: fp32 sums in a fixed order, the same bits on every run; y and dx rounded once, of kind
"rms" the normalised row too.
Limits: exactly what ``unsupported`` says.
Source: see ``reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petal_kernels.ops.frozen_norm.arguments import KINDS, Call, moments_per_row

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _ops() -> Any:
    return torch.ops.petal_cuda


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors; an empty list says that they can."""
    reasons = []
    if call.device.type != "cuda":
        reasons.append(f"wants CUDA tensors, got {call.device.type}")
    if call.x.dtype not in _DTYPES:
        reasons.append(f"wants float32, float16 or bfloat16, got {call.x.dtype}")
    return reasons


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [N, D], and the moments."""
    x, weight, bias, kind, eps = call
    y = x.new_empty(x.shape)
    moments = x.new_empty((x.shape[0], moments_per_row(kind)), dtype=torch.float32)
    _ops().frozen_norm_fwd(x, weight, bias, KINDS.index(kind), eps, y, moments)
    return y, moments


def backward(call: Call, moments: Tensor, dy: Tensor) -> Tensor:
    """dx [N, D]."""
    x, weight, _, kind, _ = call
    dx = x.new_empty(x.shape)
    _ops().frozen_norm_bwd(dy, x, moments, weight, KINDS.index(kind), dx)
    return dx
