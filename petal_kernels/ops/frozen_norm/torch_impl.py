"""``frozen_norm`` on the torch backend: library calls, on every device and dtype.

Numerics: statistics and normalised rows in fp32 (fp64 for fp64 rows), y and dx rounded once, of
kind "rms" the normalised rows too; the bits are those of transformers' modules written in the same
order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime.numerics import wide
from petal_kernels.ops.frozen_norm.arguments import Call


def unsupported(call: Call) -> list[str]:
    """Runs everywhere."""
    return []


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [N, D], and the moments [N, 1 or 2]."""
    x, weight, bias, _, eps = call
    rows = wide(x)
    mean = rows.mean(-1, keepdim=True) if call.centered else None
    rows = rows if mean is None else rows - mean
    rho = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    y = rows * rho
    if call.rounded:
        y = y.to(x.dtype)
    if weight is not None:
        y = y * (weight.to(y.dtype) + call.offset if call.offset else weight.to(y.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype), rho if mean is None else torch.cat((mean, rho), dim=-1)


def backward(call: Call, moments: Tensor, dy: Tensor) -> Tensor:
    """dx [N, D]; the normalised rows are formed again."""
    rows, rho = wide(call.x), moments[:, -1:]
    xhat = (rows - moments[:, :1] if call.centered else rows) * rho
    g = wide(dy)
    if call.weight is not None:
        g = g * (wide(call.weight) + call.offset)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if call.centered:
        dx -= g.mean(-1, keepdim=True)
    return dx.mul_(rho).to(call.x.dtype)
