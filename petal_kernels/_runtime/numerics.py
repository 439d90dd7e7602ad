"""The activations of bottlenecks with their derivatives, and the wide dtype of gates: what the
references and torch backends of several operators, and merging, compute with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")  # numbered so in C++ and Triton


def activate(name: str, z: Tensor) -> Tensor:
    """The activation by name."""
    if name == "relu":
        return F.relu(z)
    if name == "silu":
        return F.silu(z)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")
    return z


def derivative(name: str, z: Tensor) -> Tensor:
    """Its derivative, written out: for references, at any dtype's own precision."""
    if name == "relu":
        return (z > 0).to(z.dtype)
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if name == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    if name == "gelu_tanh":
        k = math.sqrt(2 / math.pi)
        t = torch.tanh(k * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z)
    return torch.ones_like(z)


def activate_backward(name: str, z: Tensor, da: Tensor, *, inplace: bool = False) -> Tensor:
    """The gradient to z, in one library call; ``inplace`` overwrites da."""
    where = {"grad_input": da} if inplace else {}
    if name == "relu":
        out: Tensor = torch.ops.aten.threshold_backward(da, z, 0, **where)
    elif name == "silu":
        out = torch.ops.aten.silu_backward(da, z, **where)
    elif name == "identity":
        out = da
    else:
        approximate = "tanh" if name == "gelu_tanh" else "none"
        out = torch.ops.aten.gelu_backward(da, z, approximate=approximate, **where)
    return out


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gates, logits and sums of weights: fp32, or fp64 where everything is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(t: Tensor) -> Tensor:
    """`t` in that dtype."""
    return t.to(wide_dtype(t.dtype))
