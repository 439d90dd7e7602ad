"""``gated_bottleneck`` in Triton: forward and backward, every gate, activation and route;
deterministic.

Maths. k is 0 or keep_scale times ``scale``, the mask stream 0 of ``_runtime/philox.py``; H is x,
base or 0; G is 1, large, per channel (middleY) or per row (middleX, small), whose gate_weight is
(w_x, w_h); what has no letter has its argument's name:

    fwd      z = x down^T + down_bias, q = route(z), a = act(q)
             zg = gate_input gate_down^T + gate_down_bias, ag = act(zg)
             logit = w_x . gate_input + w_h . H + gate_bias; released gates add
             (up^T w_h) . a + w_h . up_bias
             Y = H + a up^T + up_bias, u = residual + k G Y
             out = (u - mean) rstd norm_weight + norm_bias or u
    rows     xhat of u, formed again; g = norm_weight dout, mean_g = mean(g),
             mean_gx = mean(g xhat);  du = rstd (g - mean_g - xhat mean_gx) or dout
             dv = k du;  dY = G dv
             dlogit = dv Y G (1 - G), or per row s (1 - s) sum_o dv Y, s = sigmoid(logit) (small:
             summed over the sample, times the token's weight);  dH = dY + dlogit w_h
             dz = route'(act'(q) dY up), dzg = act'(zg) dlogit gate_up
             dx = dH + dz down
             dgate_input = du (as residual) + dlogit w_x or dzg gate_down
    weights  dup = dY^T a, dgate_up = dlogit^T ag, ddown = dz^T x, dgate_down = dzg^T gate_input;
             sums over rows of dY, dlogit, dout, dout xhat, dv Y or dlogit (gate_input + H), by
             splits of the rows
    reduce   the sums of those partials, in the order of the splits
    library  sums over rows of dz, dzg, dlogit; dleft, dright of a route, from q's gradient

Shapes. N rows in samples of L; row tensors have any row stride and unit column stride, everything
else is made dense. D, O, Dg, V and L are any; r and rg at most 256, padded to a power of two >= 16.
Parameters have the activations' dtype or float32, rounded to it as they are loaded.

Grid. fwd, rows: one program owns BLOCK_M rows and loops over the columns; rows of one sample where
the gate is small or the route a product of more than one vision token. Gate small takes two
launches of each, for it needs sums over samples, which a program then forms itself in the order of
the tokens. weights: column tiles x splits of the rows; one launch where x, gate_input and the
output are equally wide, else one for each. reduce: blocks of elements x parameters.

Traffic (e bytes per element; P parameters' elements without r-wide biases, S splits; what a launch
reads of its own stores, of its own rows, comes from L2 and is not counted):

    fwd      (N (D + Dg [gate or residual] + O [other H, residual] + O + r + rg) + P) e + 8 N [norm]
    rows     (N (O + O [H] + O [residual, with a norm] + 3 r + 3 rg + every row gradient) + P) e
             + 4 N for every number per row
    weights  (N (O + D + Dg + O [other H, residual] + 2 r + 2 rg) + P [up, gate_up]) e + 4 S P
    reduce   4 S P + P e

VL-PET large with a norm, r = d / 8: 3.25 N d forward and 9.25 N d backward, where the published
form moves each of some forty [N, d] intermediates. Gates without a second bottleneck, and calls
without a gate or a norm, which do not form Y again, move less. Own rows read again: u once with a
norm; dH and du once where dz down or dzg gate_down is added.

Numerics. Every product, gate logit, sum and moment is fp32; mean and variance by Chan's merge over
column tiles. Roundings to the activations' dtype: z, zg (saved), a, ag, the operands dY, dlogit,
dq, dz, dzg, the products of a route's two factors, u where a norm follows, dH and du where a
product is added to them, and each output. Partials are fp32, summed in the order of the splits,
whose number depends on the sizes alone: the same bits every time. fp32 products are IEEE unless
torch allows tf32. NaN and Inf propagate; a dropped NaN is dropped.

Limits (``unsupported``): fp32, fp16, bf16; rank and gate's rank at most 256; a CUDA device of
compute capability 8.0, or TRITON_INTERPRET=1 with CPU tensors, which excludes bf16.

Source: VL-PET arXiv 2308.09804, VL-Adapter arXiv 2112.06825, routing functions arXiv 2403.09377.
Kernels: ``triton_kernels.py``, ``triton_kernels_bwd.py``, ``triton_kernels_weights.py``, their
tiles in ``triton_kernels_tiles.py``; tables: ``triton_configs.py``; launches: ``triton_launch.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.gated_bottleneck import triton_launch as launch
from petal_kernels.ops.gated_bottleneck.arguments import Call, Saved

MAX_RANK = 256


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    t = call.tensors
    reasons = lib.device_reasons(call.first)
    ranks = {
        "rank": t.up.shape[1],
        "gate's rank": 0 if t.gate_down is None else t.gate_down.shape[0],
    }
    reasons += [f"{n} at most {MAX_RANK}, got {r}" for n, r in ranks.items() if r > MAX_RANK]
    return reasons


def forward(
    call: Call, rng: Tensor | None, save: bool, out: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """out [N, O] and what backward needs; ``out`` is given where a sum overwrites its base."""
    first = call.first
    with lib.on_device(first):
        p = launch.Problem.of(call, first.shape[0])
        return launch.forward(p, first, launch.Dropout.of(rng, call.settings), save, out)


def _route_gradients(
    p: launch.Problem, z: Tensor, dq: Tensor, need: frozenset[str]
) -> dict[str, Tensor]:
    """dleft and dright, by the library's batched products of r-wide matrices."""
    left, right = p.t.left, p.t.right
    assert left is not None
    z, dq = (v.reshape(p.s.samples, -1, p.rank) for v in (z, dq))
    if p.s.route == "add":
        return {"left": dq.sum(1, keepdim=True)}
    if p.s.route == "mul":
        return {"left": (dq * z).sum(1, keepdim=True)}
    f = z.relu() if p.s.route_relu else z
    grads = {}
    if right is not None and "right" in need:
        grads["right"] = torch.bmm(torch.bmm(f, left.transpose(1, 2)).transpose(1, 2), dq)
    if "left" in need:
        dp = dq if right is None else torch.bmm(dq, right.transpose(1, 2))
        grads["left"] = torch.bmm(dp.transpose(1, 2), f)
    return grads


def backward(
    call: Call, saved: Saved, dout: Tensor, rng: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that ``need`` names."""
    with lib.on_device(dout):
        p = launch.Problem.of(call, dout.shape[0])
        drop = launch.Dropout.of(rng, call.settings)
        d = launch.rows_backward(p, saved, dout, drop, need)
        found = {
            "x": d.x,
            "base": d.base,
            "gate_input": d.gate_input,
            "residual": d.residual,
            "bottleneck": d.z,
        }
        grads = {name: value for name, value in found.items() if name in need and value is not None}
        if need & {"left", "right"}:
            z = p.t.bottleneck if p.t.bottleneck is not None else saved.z
            assert z is not None
            assert d.q is not None
            grads |= _route_gradients(p, z, d.q, need)
        return grads | launch.weights_backward(p, saved, dout, drop, d, need)
