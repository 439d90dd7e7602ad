"""What lies between the linears of ``gated_mlp``, in Triton.

Maths. A [R, F] is the last linear's down-projection, ``down``, and h = (mask * p) A^T. Backward is
one kernel, launched as "rows" where no dA is wanted and as "down" where it is. Without a gate u is
1:

    fwd           p = act(g) * u                                          [N, F]
    rows, down    du = act(g) * dp,  dg = act'(g) * (u * dp)              [N, F]
    down          dA = dh^T (mask * p), p formed again                    [R, F]
    reduce        the partial sums of dA

Shapes. g, u, dp, dh [N, R]: unit stride in the last dim, any row stride. dg takes dp's memory; p
and du are dense, dA [R, F] too, in its factor's dtype. Nothing need be a multiple of anything;
addresses are int64.

Grid. fwd, rows: a program per BLOCK_M x BLOCK_F tile. down: column tiles x splits of the rows,
times slices of 64 ranks; the programs of the first slice write dg and du. reduce: tiles of dA.

Traffic (e bytes per element, S splits):

    fwd     3 N F e                                       eager: 5 N F e
    rows    5 N F e                                       eager: 9 N F e
    down    (5 N F + N R) e + 4 S R F                     eager: 12 N F e with a mask
            g and u once more for each further 64 ranks; dh again per column tile, from L2
    reduce  4 S R F + R F e_A, e_A of dA's dtype

Without u, 2 N F forward and 3 N F backward.

Numerics. fp32, each result rounded once; p of backward is rounded to the operands' dtype, and the
factor of kept elements multiplies the fp32 sums. fp32 products are IEEE unless
``torch.backends.cuda.matmul.fp32_precision`` is tf32. Partials are fp32 and summed in the order of
the splits: the same bits every time. NaN and Inf propagate; a dropped NaN is dropped.

Limits (``unsupported``): fp32, fp16, bf16; a CUDA device of compute capability 8.0, or
TRITON_INTERPRET=1 with CPU tensors, which excludes bf16.

Source: gated linear units arXiv 2002.05202, LoRA arXiv 2106.09685, as ``reference.py`` has them.
Kernels: ``triton_kernels.py``; launch tables: ``triton_configs.py``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.gated_mlp import triton_kernels as tk
from petal_kernels.ops.gated_mlp.arguments import Call, Gradients, Product
from petal_kernels.ops.gated_mlp.triton_configs import REDUCE, choose


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    return lib.device_reasons(call.g)


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward(call: Call) -> Tensor:
    """p [N, F]."""
    g, u, name = call
    (rows, width), p = g.shape, g.new_empty(g.shape)
    config = choose("fwd", lib.machine(g), g.element_size())
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_F"])
    with lib.on_device(g):
        tk._gated_mlp_act_fwd_kernel[(tiles,)](
            g, u, p, rows, width, g.stride(0), _row_stride(u), p.stride(0), ACT=name, **config
        )
    return p


def backward(call: Call, dp: Tensor | None, product: Product | None) -> Gradients:
    """dg, in dp's place, and du where dp is given, dA where ``product`` is."""
    g, u, name = call
    (rows, width), where = g.shape, lib.machine(g)
    du = None if dp is None or u is None else g.new_empty(g.shape)
    dh, down, rng, dropout = (None, None, None, 0.0) if product is None else product
    threshold = 0 if rng is None else philox.threshold(dropout)
    drops = threshold > 0
    rank = 0 if dh is None else dh.shape[1]
    config = choose("rows" if dh is None else "down", where, g.element_size(), rank)
    block_m, slices = config["BLOCK_M"], max(1, triton.cdiv(rank, config["BLOCK_R"]))
    tiles = triton.cdiv(width, config["BLOCK_F"])
    splits, per_split = triton.cdiv(rows, block_m), block_m
    part = None
    if dh is not None:
        wanted = lib.row_splits(where, rows, tiles * slices, block_m, rank * width * 4)
        per_split = triton.cdiv(triton.cdiv(rows, block_m), wanted) * block_m
        splits = triton.cdiv(rows, per_split)
        part = torch.empty((splits, rank, width), dtype=torch.float32, device=g.device)
    with lib.on_device(g):
        tk._gated_mlp_act_bwd_kernel[(tiles * splits, slices)](
            g, u, dp, du, dh, part, rng if drops else None, rows, width, rank,
            *(_row_stride(t) for t in (g, u, dp, du, dh)), per_split, threshold,
            philox.keep_scale(dropout) if drops else 1.0,
            ACT=name, PRECISION=lib.precision(), **config,
        )  # fmt: skip
        return Gradients(du, None if down is None else _reduced(part, down))


def _reduced(part: Tensor | None, down: Tensor) -> Tensor:
    """The partials' sum, in the dtype of ``down``."""
    assert part is not None
    ddown, block = down.new_empty(down.shape), dict(REDUCE.blocks)["BLOCK"]
    tk._gated_mlp_act_bwd_reduce_kernel[(triton.cdiv(ddown.numel(), block), 1)](
        part, ddown, ddown.numel(), part.stride(0), part.shape[0], **REDUCE.keywords()
    )
    return ddown
