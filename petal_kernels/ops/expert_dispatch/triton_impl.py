"""``expert_dispatch`` in Triton: forward and backward, every gate, activation and plan;
deterministic.

Maths. l = x router^T + router_bias + noise, c the choice, g the gates, H is x, base or 0; there are
A down-projections, E or one that all experts share; what has no letter has its argument's name:

    route    l, c (sorted: before the sort)
    shrink   z_e = x down_e^T + down_bias_e of the slots of each expert (sorted)
    fwd      a_e = act(z_e), ga_e = g_e a_e; out = keep H + mix sum_e g_e (a_e up_e^T + up_bias_e);
             stationary: l, c and z before
    slots    t_e = mix dout up_e, dg_e = <t_e, a_e> + mix <dout, up_bias_e>,
             dz_e = g_e t_e act'(z_e) of each expert's slots (sorted)
    rows     the same of whole rows (stationary), summed over e where A is one; dgates = dg where
             chosen; dl = p (dg - sum g dg) + dlogits, p the softmax that g was read from;
             dx = keep dout + sum_e dz_e down_e + dl router
    weights  dup_e = mix dout^T ga_e, dup_bias = mix g^T dout; ddown_e = dz_e^T x,
             ddown_bias_e = sum dz_e, drouter = dl^T x; by splits of each expert's rows or slots
    reduce   the sums of those partials, in the order of the splits
    library  the sort (``routing.sort_by_expert``) and its inverse, sums of dl and of dgates over
             the tokens that share them: N E small numbers

Shapes. x, base and dout have any row stride and unit column stride, all else is made dense. N, D,
O, E and r are any up to the limits; r and E are padded to a power of two >= 16. Parameters have the
activations' dtype or float32 and are rounded to it as they are loaded, but for the router's logits.

Grid. route, fwd, rows: one program owns BLOCK_M tokens, all experts and columns; an expert that
none of them chose is passed by. out and dx are written once, by token, and find an expert's z or
dz through the sort's inverse: nothing of size N k d exists. shrink, slots: a program owns a tile of
one expert's slots, cdiv(slots, BLOCK_M) + E programs whatever the routing, the last of which find
no tile; a tile's expert is read off the offsets. weights: experts (and one for what has a number
per gate) x column tiles x splits, one launch for the sums over dout, one for those over x.

Traffic (e bytes per element; P a launch's parameters, Z = N A r, or N k r sorted; where an expert
was not chosen its z is not moved; what a launch reads of its own stores, of its own rows, comes
from L2 and is not counted; 4 N E bytes for l and 1 N E for c wherever gates are formed):

    fwd      (N (D + O [base] + O) + Z + P) e;  sorted: (N (O [H] + O) + Z + P) e + 4 N k, and
             route (N D + P) e, shrink (N D + Z + P) e + 4 N k
    rows     (N (O + D) + 2 Z + P) e + 4 N E;  sorted: (N (O [keep] + D) + Z + P) e + 4 N E + 8 N k,
             and slots (N O + 2 Z + P) e + 8 N k
    weights  (N (O + D) + 2 Z) e + 4 N E + 4 S P (+ 8 N k), S splits; reduce 4 S P + P e

E = 6, r = 64, d = 768: 2.02 N d + N E r forward; eager code moves each z_e, g_e z_e and expert's
output. A sorted launch that gathers asks for x or dout k times, of DRAM once if it fits L2.

Numerics. Every product, logit, gate and sum is fp32; where the router is float32 and x is not, its
products are tf32 in three parts, 22 bits, and x is exact. Roundings to the activations' dtype: z
(saved), ga, g where it multiplies biases, dz, dl where it multiplies router or x, and each
output. Partials are fp32, summed in the order of the splits, whose number depends on the sizes
alone and whose bounds on the routing: the same bits every time. fp32 products are IEEE unless torch
allows tf32. NaN and Inf propagate, but not from an expert's bottleneck to a token that did not
choose it. Ties go to the lowest expert, NaN is above everything.

Limits (``unsupported``): fp32, fp16, bf16; rank at most 256, at most 64 experts; a CUDA device of
compute capability 8.0, or TRITON_INTERPRET=1 with CPU tensors, which excludes bf16.

Source: PETAL arXiv 2312.12458; see ``reference.py``. Kernels: ``triton_kernels.py``,
``triton_kernels_bwd.py``, ``triton_kernels_weights.py``, their tiles in
``triton_kernels_tiles.py``; tables: ``triton_configs.py``; launches: ``triton_launch.py``.
"""

from __future__ import annotations

from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.expert_dispatch import triton_launch as launch
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved

MAX_RANK = 256
MAX_EXPERTS = 64


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    limits = {"rank": (call.rank, MAX_RANK), "experts": (call.experts, MAX_EXPERTS)}
    return lib.device_reasons(call.first) + [
        f"{name} at most {most}, got {found}"
        for name, (found, most) in limits.items()
        if found > most
    ]


def forward(call: Call, save: bool) -> tuple[Tensor, Saved]:
    """out [N, O], the routing, and what backward needs where ``save``."""
    with lib.on_device(call.first):
        return launch.forward(launch.Problem.of(call), save)


def backward(
    call: Call, saved: Saved, dout: Tensor, dlogits: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that ``need`` names."""
    with lib.on_device(dout):
        p = launch.Problem.of(call)
        d = launch.rows_backward(p, saved, dout, dlogits, need)
        grads = {} if d.x is None else {"x": d.x}
        return grads | launch.weights_backward(p, saved, dout, d, need)
