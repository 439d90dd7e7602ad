"""What ``frozen_norm`` computes, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def frozen_norm(a: dict[str, Any], loose: bool = False) -> list[Tensor]:
    """The rows, of LayerNorm less their mean, by their root mean square, times the weight."""
    x, weight, bias, kind = a["x"], a.get("weight"), a.get("bias"), a.get("kind", "rms")
    rows = x if x.dtype == torch.float64 else x.float()
    if kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * (rows.pow(2).mean(-1, keepdim=True) + a.get("eps", 1e-6)).rsqrt()
    if kind == "rms":
        rows = rows.to(x.dtype)
    if weight is not None:
        rows = rows * (weight.to(rows.dtype) + (1 if kind == "rms_plus_one" else 0))
    return [(rows if bias is None else rows + bias.to(rows.dtype)).to(x.dtype)]
