"""What lies between the linears of ``gated_mlp``, on CUDA C++ kernels (``csrc/gated_mlp/cuda``).

    forward   p = act(g) * u
    backward  du = act(g) * dp,  dg = act'(g) * u * dp,  dA = dh^T (mask * p), p formed again

One pass each way, dA's product in the same: a tile of g becomes p where it lies in shared memory,
and is multiplied there. dg takes dp's memory.

Shapes and strides: g, u and their gradients [N, F], dh [N, R] with unit stride in the last dim and
any row stride; dA [R, F] contiguous.
Grid: in the headers of the .cu files. No block waits for another.
Traffic: 3 N F forward, 5 N F backward (2 and 3 without u): each operand once, and g and u again for
each further 64 of R (fp32: 32). dh is read once per 64 columns, from L2; partials of dA, fp32
[splits, F, R], are written and read once. Eager code moves 5 and 9 N F, masks apart.
Numerics: fp32, rounded once; p of backward is rounded to the operands' dtype. 16-bit products run
on tensor cores (mma.sync), fp32 ones are IEEE FMAs. Splits of the rows depend on N alone and are
summed in order: the same bits on every run.
Limits: exactly what ``unsupported`` says.
Source: see ``reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.gated_mlp.arguments import Call, Gradients, Product

ROWS_PER_SPLIT = 256
MAX_SPLITS = 8

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _ops() -> Any:
    return torch.ops.petal_cuda


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors; an empty list says that they can."""
    reasons = []
    if call.device.type != "cuda":
        reasons.append(f"wants CUDA tensors, got {call.device.type}")
    if call.g.dtype not in _DTYPES:
        reasons.append(f"wants float32, float16 or bfloat16, got {call.g.dtype}")
    return reasons


def forward(call: Call) -> Tensor:
    """p [N, F]."""
    g, u, name = call
    p = g.new_empty(g.shape)
    _ops().gated_mlp_act_fwd(g, u, ACTIVATIONS.index(name), p)
    return p


def backward(call: Call, dp: Tensor | None, product: Product | None) -> Gradients:
    """dg, in dp's place, and du where dp is given, dA where ``product`` is."""
    g, u, name = call
    du = None if dp is None or u is None else g.new_empty(g.shape)
    dh, down, rng, dropout = (None, None, None, 0.0) if product is None else product
    ddown = None if down is None else down.new_empty(down.shape)
    splits = max(1, min(MAX_SPLITS, -(-g.shape[0] // ROWS_PER_SPLIT)))
    _ops().gated_mlp_act_bwd(dp, g, u, dh, rng, dropout, ACTIVATIONS.index(name), du, ddown, splits)
    return Gradients(du, ddown)
