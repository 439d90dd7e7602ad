"""``gated_bottleneck`` on CUDA: CUDA C++ kernels, the library's products for routes by a matrix.

Kernels, in ``csrc/gated_bottleneck/cuda``: ``forward.cu`` (fwd, pool), ``backward.cu`` (rows),
``weights.cu`` (weights, reduce).

Maths (N rows, D input width, r rank, O output width, Dg and rg of the gate; H is x, base or 0;
T = x.dtype; what has no letter has its argument's name):

    fwd      z = x down^T + down_bias, zg = gate_input gate_down^T + gate_down_bias,
             Y = H + act(route(z)) up^T + up_bias, out = norm(residual + scale drop(G Y)), and the
             logits of a row gate
    pool     sums over the tokens of a sample: the gate of "small", and its gradient
    rows     the sums of a norm or a row gate; du, dv = scale drop(du), dY = G dv, dlogit;
             dz = route'((dY up) act'), dzg = (dlogit gate_up) act'; dx = dH + dz down,
             dgate_input = du + dlogit w_x + dzg gate_down
    weights  dup = dY^T a, dgate_up = dlogit^T ag and all sums over rows, dY and dlogit formed
             again; ddown = dz^T x, dgate_down = dzg^T gate_input
    reduce   the splits of weights in order

One launch forward, three backward. "small" adds one before a pool in both directions; a product
route through more than one vision token one for z, and every product route one for dx after its own
backward on r-wide tensors.
Shapes and strides: row tensors [N, width] with unit column stride and any row stride, parameters
with any strides (weights are made row-major where their rows are not, and rounded once to T).
Grid: in the headers of the .cu files. No block waits for another.
Traffic, in elements, for the large gate with a norm, D = O = Dg, H = x, r = rg, the residual being
X = gate_input: forward reads x, X and writes out, z, zg: 3 N D + 2 N r (the rows' second reading
and the norm's come from L2 and L1). Backward: rows reads x, X, dout, z, zg and writes dx, dX, a,
ag, dz, dzg; weights reads x, X, dout, a, ag, dz, dzg: 8 N D + 10 N r. At r = D / 8 that is 3.25 and
9.25 N D, beside fp32 partials of N / 256 (at most 8) times the weights, written and read once in
L2. "small" reads x and X twice in forward, x, X, dout once more in backward. A product by the
library reads z again, writes q and reads it: 3 N r and 2 N V for its half. Through one vision token
forward forms it from the rows at hand and moves nothing more. The eager chain's forward moves about
20 N D.
Numerics: fp32 accumulators and epilogues. Rounded to T: z, zg, q of a product, act(q), act(zg), dY
and dlogit as operands, dz, dzg, and dH, dgate_input before their products are added; u before a
norm. 16-bit products run on tensor cores (mma.sync), fp32 ones are IEEE FMAs. Every reduction has a
fixed order, and splits of the rows depend on N alone: same bits on every run.
Limits: exactly what ``unsupported`` says.
Source: see ``reference.py``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels.ops.gated_bottleneck import settings
from petal_kernels.ops.gated_bottleneck.arguments import Call, Saved, Settings, Tensors

MAX_RANK = 256
ROWS_PER_SPLIT = 256
MAX_SPLITS = 8  # with a dozen column tiles about a block per multiprocessor; partials grow with it

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROW_GATES = ("middleX", "small")
_SUMS = ("up_bias", "gate_up_bias", "gate_weight", "norm_weight", "norm_bias")
_COLUMNS = frozenset(("up", "gate_up", *_SUMS))  # want dY formed again
_WEIGHTS = _COLUMNS | {"down", "gate_down"}


class Work(NamedTuple):
    """What the kernels read and write besides their arguments and the output, in their order."""

    z: Tensor | None = None  # after a product by the library: q
    zg: Tensor | None = None
    logits: Tensor | None = None
    pooled: Tensor | None = None  # small: the samples' gates
    moments: Tensor | None = None
    weight_a: Tensor | None = None  # up^T w_h, where the logit reads Y
    sums: Tensor | None = None  # [N, 3]: mean(g), mean(g xhat), dlogit
    totals: Tensor | None = None  # small: the samples' gradients
    a: Tensor | None = None
    ag: Tensor | None = None
    dz: Tensor | None = None
    dzg: Tensor | None = None
    dq: Tensor | None = None
    du: Tensor | None = None
    dh: Tensor | None = None
    dgate_input: Tensor | None = None
    dx: Tensor | None = None


def _ops() -> Any:
    return torch.ops.petal_cuda


@functools.cache
def _shared_bytes(dtype: torch.dtype, device: torch.device, rank: int, gate_rank: int) -> int:
    """What a block of the widest kernel needs. By kind, since a dry run's tensors are fake."""
    like = torch.empty(0, dtype=dtype, device=device)
    return int(_ops().gated_bottleneck_shared_bytes(like, rank, gate_rank))


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors; an empty list says that they can."""
    first, t = call.first, call.tensors
    reasons = []
    if first.device.type != "cuda":
        reasons.append(f"wants CUDA tensors, got {first.device.type}")
    if first.dtype not in _DTYPES:
        reasons.append(f"wants float32, float16 or bfloat16, got {first.dtype}")
    ranks = {"rank": t.up, "gate rank": t.gate_up}
    for name, weight in ranks.items():
        if weight is not None and weight.shape[1] > MAX_RANK:
            reasons.append(f"wants a {name} of at most {MAX_RANK}, got {weight.shape[1]}")
    if first.device.type == "cuda" and not reasons:
        gate_rank = 0 if t.gate_up is None else t.gate_up.shape[1]
        wanted = _shared_bytes(first.dtype, first.device, t.up.shape[1], gate_rank)
        properties = torch.cuda.get_device_properties(first.device)
        found = int(getattr(properties, "shared_memory_per_block_optin", wanted))
        if found < wanted:
            reasons.append(f"wants {wanted} bytes of shared memory per block, got {found}")
    return reasons


def _splits(rows: int) -> int:
    return max(1, min(MAX_SPLITS, -(-rows // ROWS_PER_SPLIT)))


def _is_outer(t: Tensors, s: Settings) -> bool:
    """Whether the route is a product through one vision token: a number per row, times a vector."""
    return s.route == "product" and t.right is not None and t.right.shape[1] == 1


def _row_major(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None:
        return None
    t = t.to(dtype)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _arguments(t: Tensors, s: Settings, dtype: torch.dtype) -> Tensors:
    """The tensors as the kernels read them."""
    left = right = None
    if s.route in ("add", "mul") or _is_outer(t, s):
        assert t.left is not None
        left = t.left.reshape(s.samples, -1).contiguous()
        right = None if t.right is None else t.right.reshape(s.samples, -1).contiguous()
    weights = ("down", "up", "gate_down", "gate_up")
    cast: dict[str, Any] = {name: _row_major(getattr(t, name), dtype) for name in weights}
    token_weights = None if t.token_weights is None else t.token_weights.contiguous()
    return t._replace(left=left, right=right, token_weights=token_weights, **cast)


def _numbers(s: Settings, outer: bool = False) -> tuple[list[int], list[float]]:
    """The settings in the kernels' order. A product by the library is no route to them."""
    return settings.codes(s, s.route if s.route != "product" or outer else "none")


def _samples(t: Tensor, s: Settings) -> Tensor:
    return t.view(s.samples, -1, t.shape[-1])


def _product(t: Tensors, s: Settings, z: Tensor) -> Tensor:
    """q = (f(z) left^T) right on r-wide tensors, by the library."""
    assert t.left is not None
    tokens = _samples(z, s)
    q = (tokens.relu() if s.route_relu else tokens) @ t.left.transpose(1, 2)
    return (q if t.right is None else q @ t.right).view_as(z)


def _pool(values: Tensor, token_weights: Tensor | None, samples: int, sigmoid: bool) -> Tensor:
    out = values.new_empty(samples)
    _ops().gated_bottleneck_pool(values, token_weights, out, sigmoid)
    return out


def _read_output(t: Tensors, work: Work) -> tuple[Tensors, Work]:
    """w_h . Y = w_h . H + (up^T w_h) . a + w_h . up_bias: the logit's second half without Y."""
    assert t.gate_weight is not None
    weight = t.gate_weight[-t.up.shape[0] :].float()
    bias = weight.new_zeros(1) if t.gate_bias is None else t.gate_bias.float()
    if t.up_bias is not None:
        bias = bias + weight.dot(t.up_bias.float())
    return t._replace(gate_bias=bias), work._replace(weight_a=t.up.float().t().mv(weight))


def forward(
    call: Call, rng: Tensor | None, save: bool, out: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """out [N, O] and what backward needs; ``out`` is given where a sum overwrites its base."""
    s, first = call.settings, call.first
    t = _arguments(call.tensors, s, first.dtype)
    n, (outs, rank) = first.shape[0], t.up.shape
    outer, small = _is_outer(call.tensors, s), s.gate == "small"
    product = s.route == "product" and not outer  # by the library
    form_z = t.bottleneck is None
    z = t.bottleneck
    if form_z and (save or product or small):
        z = first.new_empty(n, rank)
    zg = logits = moments = None
    if save and t.gate_up is not None:
        zg = first.new_empty(n, t.gate_up.shape[1])
    if small or (save and s.gate == "middleX"):
        logits = first.new_empty(n, dtype=torch.float32)
    if save and t.norm_weight is not None:
        moments = first.new_empty(n, 2, dtype=torch.float32)
    work = Work(z=z, zg=zg, logits=logits, moments=moments)
    if s.gate in _ROW_GATES and s.gate_sees_output:
        t, work = _read_output(t, work)
    numbers = _numbers(s, outer)

    def run(out: Tensor | None, z: bool, zg: bool, logits: bool) -> None:
        _ops().gated_bottleneck_fwd(list(t), list(work), out, rng, *numbers, z, zg, logits)

    if product:
        if form_z:
            run(None, True, False, False)
        assert z is not None
        work = work._replace(z=_product(call.tensors, s, z))
        form_z = False
    if small:
        run(None, form_z, False, True)
        assert logits is not None
        work = work._replace(pooled=_pool(logits, t.token_weights, s.samples, True))
        form_z = False
    out = first.new_empty(n, outs) if out is None else out
    run(out, form_z, s.gate == "large", s.gate == "middleX")
    return out, Saved(None if t.bottleneck is not None else z, zg, logits, moments)


def backward(
    call: Call, saved: Saved, dout: Tensor, rng: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor | None]:
    """The gradients that ``need`` names."""
    s, dtype = call.settings, dout.dtype
    t = _arguments(call.tensors, s, dtype)
    z = t.bottleneck if t.bottleneck is not None else saved.z
    assert z is not None
    work, grads = _room(t, s, saved, z, dout, need)
    if s.route == "product":
        work = work._replace(z=_product(call.tensors, s, z))
    numbers = _numbers(s)

    def rows(work: Work, sums: bool, columns: bool, read_dz: bool = False) -> None:
        _ops().gated_bottleneck_bwd_rows(
            dout, list(t), list(work), rng, *numbers, sums, columns, read_dz
        )

    columns = any(g is not None for g in (work.dz, work.dzg, work.du, work.dh, work.dgate_input))
    # dx waits for the library's part of a product.
    direct = work._replace(dx=None) if s.route == "product" else work
    if s.gate == "small":
        assert work.sums is not None
        assert saved.logits is not None
        pooled = _pool(saved.logits, t.token_weights, s.samples, True)
        direct = direct._replace(pooled=pooled)
        rows(direct._replace(a=None), True, False)
        totals = _pool(work.sums[:, 2], None, s.samples, False)
        work = work._replace(pooled=pooled)
        rows(direct._replace(totals=totals), False, columns)
    else:
        rows(direct, work.sums is not None, columns)
    if "gate_bias" in need:
        assert work.sums is not None
        grads["gate_bias"] = work.sums[:, 2].sum().view(1)
    if work.dz is not None:
        work = work._replace(dz=_route_backward(call.tensors, s, z, work, need, grads))
        if s.route == "product" and work.dx is not None:
            rows(Work(dz=work.dz, dx=work.dx), False, False, True)
        grads["bottleneck"] = work.dz
    # Few numbers, and they often cancel: next to reading dz, fp64 sums cost nothing.
    for name, dz in (("down_bias", work.dz), ("gate_down_bias", work.dzg)):
        if name in need:
            assert dz is not None
            grads[name] = dz.sum(0, dtype=torch.float64)
    if need & _WEIGHTS:
        _weight_gradients(t, s, work, dout, rng, need, grads)
    return grads


def _room(
    t: Tensors, s: Settings, saved: Saved, z: Tensor, dout: Tensor, need: frozenset[str]
) -> tuple[Work, dict[str, Tensor | None]]:
    """What backward's kernels read and write, and the row gradients among it by name."""
    n, (outs, rank) = dout.shape[0], t.up.shape
    grads: dict[str, Tensor | None] = {}

    def empty(wanted: bool, width: int) -> Tensor | None:
        return dout.new_empty(n, width) if wanted else None

    large = t.gate_up is not None and t.gate_down is not None
    gate_rank = t.gate_up.shape[1] if t.gate_up is not None else 0
    gate_width = t.gate_down.shape[1] if t.gate_down is not None else outs
    weights = bool(need & _COLUMNS)
    through = need & {"down", "down_bias", "bottleneck", "left", "right"}
    has_sums = t.norm_weight is not None or s.gate in _ROW_GATES
    grads["residual"] = empty("residual" in need, outs)
    grads["gate_input"] = empty("gate_input" in need, gate_width)
    grads["base"] = empty("base" in need, outs)
    grads["x"] = empty("x" in need, outs if t.down is None else t.down.shape[1])
    projected = "x" in need and t.down is not None
    work = Work(
        z=z,
        zg=saved.zg,
        logits=saved.logits,
        moments=saved.moments,
        sums=dout.new_empty(n, 3, dtype=torch.float32) if has_sums else None,
        a=empty(weights, rank),
        ag=empty(weights and large, gate_rank),
        dz=empty(bool(through) or projected, rank),
        dzg=empty(large and bool(need & {"gate_down", "gate_down_bias", "gate_input"}), gate_rank),
        dq=empty(s.route == "mul" and "left" in need, rank),
        du=grads["residual"],
        dh=grads["x"] if s.add_input else grads["base"],
        dgate_input=grads["gate_input"],
        dx=grads["x"] if projected else None,
    )
    return work, grads


def _weight_gradients(
    t: Tensors,
    s: Settings,
    work: Work,
    dout: Tensor,
    rng: Tensor | None,
    need: frozenset[str],
    grads: dict[str, Tensor | None],
) -> None:
    """The gradients of the four matrices, and the sums over rows."""
    outs = t.up.shape[0]
    for name in need & _WEIGHTS:
        given: Tensor = getattr(t, name)
        grads[name] = given.new_empty(given.shape)
    gate = weight_h = grads.get("gate_up_bias")
    if "gate_weight" in need:
        assert t.gate_weight is not None
        # The curve of middleY's gate is applied to the sum before it is rounded.
        gate = t.gate_weight.new_empty(t.gate_weight.shape, dtype=torch.float32)
        grads["gate_weight"] = gate
        gate, weight_h = gate[:outs], gate[outs:]
    targets = [
        grads.get("up"),
        grads.get("gate_up"),
        grads.get("down"),
        grads.get("gate_down"),
        grads.get("up_bias"),
        gate,
        weight_h if s.gate == "small" and gate is not None else None,
        grads.get("norm_weight"),
        grads.get("norm_bias"),
    ]
    _ops().gated_bottleneck_bwd_weights(
        dout, list(t), list(work), targets, rng, *_numbers(s), _splits(dout.shape[0])
    )
    if "gate_weight" in need and s.gate == "middleY" and not s.gate_linear:
        assert t.gate_weight is not None
        assert gate is not None
        sigmoid = t.gate_weight.float().sigmoid()
        grads["gate_weight"] = gate * (sigmoid * (1 - sigmoid))


def _route_backward(
    t: Tensors,
    s: Settings,
    z: Tensor,
    work: Work,
    need: frozenset[str],
    grads: dict[str, Tensor | None],
) -> Tensor:
    """dz; left's and right's gradients. add and mul are done but for sums over tokens, a product
    has dq in dz's place."""
    assert work.dz is not None
    d = _samples(work.dz, s)
    if s.route == "add" and "left" in need:
        grads["left"] = d.sum(1, keepdim=True, dtype=torch.float32)
    if s.route == "mul" and "left" in need:
        assert work.dq is not None
        product = _samples(work.dq.float() * z, s)
        grads["left"] = product.sum(1, keepdim=True)
    if s.route != "product":
        return work.dz
    assert t.left is not None
    tokens = _samples(z, s)
    f = tokens.relu() if s.route_relu else tokens
    dp = d
    if t.right is not None:
        if "right" in need:
            grads["right"] = (f @ t.left.transpose(1, 2)).transpose(1, 2) @ d
        dp = d @ t.right.transpose(1, 2)
    if "left" in need:
        grads["left"] = dp.transpose(1, 2) @ f
    dz = (dp @ t.left).view_as(z)
    return torch.ops.aten.threshold_backward(dz, z, 0) if s.route_relu else dz
