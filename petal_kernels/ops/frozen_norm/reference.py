"""``frozen_norm`` by definition, in plain torch, for any dtype and device.

A row x of D numbers, its statistics in fp32 (fp64 where x is), weight w and bias b frozen:

    layer          y = (x - mean) rho * w + b     rho = 1 / sqrt(mean((x - mean)^2) + eps)
    rms            y = round(x rho) * w           rho = 1 / sqrt(mean(x^2) + eps)
    rms_once       y = x rho * w                  the same
    rms_plus_one   y = x rho * (1 + w)            the same

y is rounded to x's dtype once, at the end; of "rms", which is how Llama's norm and T5's are
written, the normalised row too (``round``). "rms_once" is torch.nn.RMSNorm's, "rms_plus_one"
Gemma's.

Source: layer normalisation arXiv 1607.06450, RMSNorm arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime.numerics import wide


def _normalised(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """The rows before the weight, and rho, in the wide dtype."""
    rows = wide(x)
    if kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    rho = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return rows * rho, rho


def _factor(weight: Tensor | None, kind: str, like: Tensor) -> Tensor:
    """What the normalised rows are multiplied by."""
    factor = like.new_ones(like.shape[-1]) if weight is None else weight.to(like.dtype)
    return factor + 1.0 if kind == "rms_plus_one" and weight is not None else factor


def forward(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
) -> tuple[Tensor]:
    """y."""
    xhat, _ = _normalised(x, kind, eps)
    if kind == "rms":
        xhat = xhat.to(x.dtype)
    y = xhat * _factor(weight, kind, xhat)
    return ((y if bias is None else y + bias.to(y.dtype)).to(x.dtype),)


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
) -> dict[str, Tensor]:
    """The gradient by the written-out formula, with g = dout * w (or * (1 + w)) and the
    normalised row xhat:

    dx = rho (g - xhat mean(g xhat)), and of "layer" rho (g - mean(g) - xhat mean(g xhat)).
    """
    xhat, rho = _normalised(x, kind, eps)
    g = dout.to(xhat.dtype) * _factor(weight, kind, xhat)
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if kind == "layer":
        dx = dx - g.mean(-1, keepdim=True)
    return {"x": (rho * dx).to(x.dtype)}
