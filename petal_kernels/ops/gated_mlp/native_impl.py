"""What lies between the linears of ``gated_mlp``, on the C++ CPU kernels (``csrc/gated_mlp/cpu``).

    forward   p = act(g) * u
    backward  du = act(g) * dp,  dg = act'(g) * u * dp,  dA = dh^T (mask * p), p formed again

One pass each way: activation and derivative share their exponential, the mask is drawn beside the
product that needs it, and p waits in cache for that. A backward task owns a strip of columns for a
split of the rows; dg takes dp's memory.

Shapes: g, u and their gradients [N, F], dh [N, R] with unit stride in the last dim and any row
stride, dA [R, F]. Traffic: 3 N F forward, 5 N F backward (2 and 3 without u); eager code moves 5
and 9, masks apart. Numerics: fp32, rounded once; dA's sums are fp32 partials over splits of the
rows that N and F alone fix, summed in order: the same bits for any number of threads. Source: the
maths of ``reference.py``. Limits: CPU tensors, fp32, fp16 or bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime import front
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels._runtime.rows import fresh_rows
from petal_kernels.ops.gated_mlp.arguments import Call, Gradients, Product

# As the kernels count them, for compiled calls (``csrc/gated_mlp/front``) too.
ACTIVATION_OF = {name: number for number, name in enumerate(ACTIVATIONS)}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = []
    if call.device.type != "cpu":
        reasons.append("needs CPU tensors")
    if call.g.dtype not in _DTYPES:
        reasons.append(f"has no kernels for {call.g.dtype}")
    return reasons


def forward(call: Call) -> Tensor:
    """p [N, F]."""
    kernel = front.native("gated_mlp_act_fwd")
    p = fresh_rows(call.g, *call.g.shape)
    kernel(call.g, call.u, ACTIVATION_OF[call.activation], p)
    return p


def backward(call: Call, dp: Tensor | None, product: Product | None) -> Gradients:
    """dg, in dp's place, and du where dp is given, dA where ``product`` is."""
    kernel = front.native("gated_mlp_act_bwd")
    g, u, name = call
    du = None if dp is None or u is None else fresh_rows(g, *g.shape)
    dh, down, rng, dropout = (None, None, None, 0.0) if product is None else product
    ddown = None if down is None else down.new_empty(down.shape)
    kernel(dp, g, u, dh, rng, dropout, ACTIVATION_OF[name], du, ddown)
    return Gradients(du, ddown)
