"""``frozen_norm`` in Triton: a row's statistics and its result in one kernel each way.

Maths. With rho = 1 / deviation and xhat the normalised row (of "layer" less its mean), w' = w or
1 + w:

    forward   y = xhat w' + b; the moments (mean, rho), or rho
    backward  dx = rho (g - xhat mean(g xhat)), g = dy w'; of "layer" less mean(g) too

Shapes. x, y, dy and dx [N, D] with unit stride in the last dim and any row stride, moments [N, 1 or
2] in fp32, weight and bias [D]; N and D arbitrary; int64 addresses.

Grid. A program owns BLOCK_M rows and walks their columns BLOCK_K at a time: twice in forward, of
"layer" three times, twice in backward.

Traffic. 2 N D e + 4 N M forward, 3 N D e + 4 N M backward, M being 1 or 2 and e the bytes of an
element; the second and third walk of a row find it in cache. Eager code forms 16-bit rows in fp32
first and moves 8 N D e and more.

Numerics. fp32 sums in a fixed order: the same bits every time; y and dx rounded once, of kind "rms"
the normalised row too. NaN and Inf propagate.

Limits (``unsupported``): fp32, fp16, bf16; a CUDA device of compute capability 8.0, or
TRITON_INTERPRET=1 with CPU tensors, which excludes bf16.

Source: see ``reference.py``. Kernels: ``triton_kernels.py``, launch tables: ``triton_configs.py``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.frozen_norm import triton_kernels as tk
from petal_kernels.ops.frozen_norm.arguments import Call, moments_per_row
from petal_kernels.ops.frozen_norm.triton_configs import choose


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    return lib.device_reasons(call.x)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """y [N, D], and the moments."""
    x, weight, bias, kind, eps = call
    rows, width = x.shape
    y = x.new_empty(x.shape)
    moments = x.new_empty((rows, moments_per_row(kind)), dtype=torch.float32)
    config = choose("fwd", lib.machine(x))
    with lib.on_device(x):
        tk._frozen_norm_fwd_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
            x, weight, bias, y, moments, rows, width, x.stride(0), eps,
            CENTERED=call.centered, ROUNDED=call.rounded, OFFSET=call.offset, **config,
        )  # fmt: skip
    return y, moments


def backward(call: Call, moments: Tensor, dy: Tensor) -> Tensor:
    """dx [N, D]."""
    x, weight, _, _, _ = call
    rows, width = x.shape
    dx = x.new_empty(x.shape)
    config = choose("bwd", lib.machine(x))
    with lib.on_device(x):
        tk._frozen_norm_bwd_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
            dy, x, moments, weight, dx, rows, width, dy.stride(0), x.stride(0),
            CENTERED=call.centered, OFFSET=call.offset, **config,
        )  # fmt: skip
    return dx
