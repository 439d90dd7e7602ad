"""``expert_dispatch`` on the torch backend, on every device and dtype.

Stationary: all experts are one bottleneck of width E r, scaled block by block by the gates. Sorted:
on a CPU each expert multiplies its own rows, gathered and added back; on a GPU, where the number of
rows is not known without a synchronisation, the stationary products serve and the slots are read
out of them. Numerics are torch's: every intermediate is rounded to x's dtype, logits and gates are
fp32.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime.numerics import activate, activate_backward, wide, wide_dtype
from petal_kernels.ops.expert_dispatch import routing
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved, Settings


def unsupported(call: Call) -> list[str]:
    """Runs everywhere."""
    return []


def _wide(call: Call, t: Tensor) -> Tensor:
    """`t` in the dtype of gates and logits: the activations decide, parameters may be narrower."""
    return t.to(wide_dtype(call.first.dtype))


def _logits(call: Call) -> tuple[Tensor | None, Tensor | None]:
    t, s = call.tensors, call.settings
    if t.router is None:
        return None, t.chosen
    assert t.x is not None
    logits = _wide(call, t.x) @ _wide(call, t.router).t()
    for extra in (t.router_bias, t.noise):
        if extra is not None:
            logits = logits + _wide(call, extra)
    return logits, routing.choose(logits, s.top_k) if s.gate == "topk" else None


def _gates(call: Call, logits: Tensor | None, chosen: Tensor | None) -> Tensor:
    """[N, E] in fp32 (fp64)."""
    t, s = call.tensors, call.settings
    if s.gate == "mean":
        return wide(call.first.new_empty(0)).new_full((call.rows, call.experts), 1 / call.experts)
    if s.gate == "given":
        assert t.gates is not None
        gates = _wide(call, t.gates)
        gates = gates if chosen is None else gates.masked_fill(~chosen, 0.0)
        return _per_token(gates, s)
    assert logits is not None
    return routing.gates(logits, chosen, s.renormalize)


def _per_token(rows: Tensor, s: Settings) -> Tensor:
    return rows if s.tokens_per_gate == 1 else rows.repeat_interleave(s.tokens_per_gate, 0)


def _flat_up(call: Call, dtype: torch.dtype) -> Tensor:
    """Every up side by side: [O, E r]."""
    return call.tensors.up.to(dtype).permute(1, 0, 2).reshape(call.tensors.up.shape[1], -1)


def _blocks(call: Call, z: Tensor) -> Tensor:
    """[N, E, r] of a stationary z."""
    return z.view(call.rows, -1, call.rank).expand(-1, call.experts, -1)


def _start(call: Call) -> Tensor | None:
    """keep * H."""
    t, s = call.tensors, call.settings
    h = t.x if s.add_input else t.base
    return None if h is None else s.keep * h


def forward(call: Call, save: bool) -> tuple[Tensor, Saved]:
    """The output, and what backward needs."""
    logits, chosen = _logits(call)
    gates = _gates(call, logits, chosen)
    ours = chosen if call.settings.gate == "topk" else None
    chosen = None if chosen is None else _per_token(chosen, call.settings)
    order = offsets = None
    if call.settings.plan == "sorted":
        assert chosen is not None
        order, offsets = routing.sort_by_expert(chosen, call.slots)
    if call.settings.plan == "sorted" and not call.is_cuda:
        assert order is not None
        assert offsets is not None
        out, z = _forward_sorted(call, gates, order, offsets)
    else:
        out, z = _forward_stationary(call, gates, chosen)
        if order is not None and save:
            assert chosen is not None
            z = _blocks(call, z)[order.clamp_min(0).long(), _expert_of_slot(call, offsets)]
    return out, Saved(z if save else None, logits, ours, order, offsets)


def _masked(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Nothing, not 0 times what may be infinite, where an expert was not chosen."""
    return values if chosen is None else values.masked_fill(~chosen.unsqueeze(-1), 0.0)


def _forward_stationary(call: Call, gates: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    t, s = call.tensors, call.settings
    assert t.x is not None
    dtype = t.x.dtype
    bias = None if t.down_bias is None else t.down_bias.to(dtype).reshape(-1)
    z = F.linear(t.x, t.down.to(dtype).reshape(-1, t.down.shape[-1]), bias)
    g = gates.to(dtype)
    a = _masked(activate(s.activation, _blocks(call, z)) * g.unsqueeze(-1), chosen)
    a, start = a.reshape(call.rows, -1), _start(call)
    up = _flat_up(call, dtype)
    if t.up_bias is not None:
        biases = g @ t.up_bias.to(dtype)
        start = s.mix * biases if start is None else start.add_(biases, alpha=s.mix)
    if start is None:
        return (a @ up.t()).mul_(s.mix), z
    return start.addmm_(a, up.t(), alpha=s.mix), z


def _forward_sorted(
    call: Call, gates: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    t, s = call.tensors, call.settings
    assert t.x is not None
    dtype, bounds = t.x.dtype, offsets.tolist()
    z = t.x.new_empty(call.z_shape)
    z[bounds[-1] :] = 0
    start = _start(call)
    out = t.x.new_zeros(call.rows, t.up.shape[1]) if start is None else start
    for e, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        own = 0 if call.shared_down else e
        rows = order[lo:hi].long()
        bias = None if t.down_bias is None else t.down_bias[own].to(dtype)
        ze = F.linear(t.x.index_select(0, rows), t.down[own].to(dtype), bias)
        z[lo:hi] = ze
        bias = None if t.up_bias is None else t.up_bias[e].to(dtype)
        y = F.linear(activate(s.activation, ze), t.up[e].to(dtype), bias)
        weight = gates[:, e].index_select(0, rows).to(dtype)
        out.index_add_(0, rows, y.mul_(weight.unsqueeze(-1)), alpha=s.mix)
    return out, z


def _expert_of_slot(call: Call, offsets: Tensor | None) -> Tensor:
    assert offsets is not None
    slots = torch.arange(call.slots, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(offsets[1:], slots, right=True).clamp_max(call.experts - 1)


def backward(
    call: Call, saved: Saved, dout: Tensor, dlogits: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in ``need``; ``dlogits`` is the losses' gradient of the logits."""
    t, s = call.tensors, call.settings
    chosen = saved.chosen if s.gate == "topk" else t.chosen
    gates = _gates(call, saved.logits, chosen)
    per_token = None if chosen is None else _per_token(chosen, s)
    if s.plan == "sorted" and not call.is_cuda:
        grads, dgates = _backward_sorted(call, saved, gates, dout, need)
    else:
        z = saved.z
        assert z is not None
        if s.plan == "sorted":
            z = _slots_to_blocks(call, saved)
        grads, dgates = _backward_stationary(call, z, gates, per_token, dout, need)
    if dgates is None:
        return grads
    if per_token is not None:
        dgates = dgates.masked_fill(~per_token, 0.0)
    if "gates" in need:
        grads["gates"] = dgates.view(-1, s.tokens_per_gate, call.experts).sum(1)
    if saved.logits is not None:
        dl = routing.gates_backward(dgates, saved.logits, chosen, s.renormalize)
        _router_backward(call, dl if dlogits is None else dl + dlogits, grads, need)
    return grads


def _router_backward(
    call: Call, dl: Tensor, grads: dict[str, Tensor], need: frozenset[str]
) -> None:
    t = call.tensors
    assert t.router is not None
    if "router" in need:
        assert t.x is not None
        grads["router"] = dl.t() @ wide(t.x)
    if "router_bias" in need:
        grads["router_bias"] = dl.sum(0)
    if "noise" in need:
        grads["noise"] = dl
    if "x" in need:
        grads["x"] = grads["x"] + (dl @ _wide(call, t.router)).to(grads["x"].dtype)


def _wants_gates(call: Call, need: frozenset[str]) -> bool:
    router = call.routed and not need.isdisjoint(("x", "router", "router_bias", "noise"))
    return router or "gates" in need


def _backward_stationary(
    call: Call, z: Tensor, gates: Tensor, chosen: Tensor | None, dout: Tensor, need: frozenset[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    t, s = call.tensors, call.settings
    n, experts, r, dtype = call.rows, call.experts, call.rank, dout.dtype
    blocks = _blocks(call, z)
    grads: dict[str, Tensor] = {}
    dgates = None
    g = gates.to(dtype)
    a = activate(s.activation, blocks)
    wants_gates = _wants_gates(call, need)
    if wants_gates or not need.isdisjoint(("x", "down", "down_bias")):
        tt = (dout @ _flat_up(call, dtype)).view(n, experts, r).mul_(s.mix)
        if wants_gates:
            dgates = wide((tt * a).sum(-1))
            if t.up_bias is not None:
                dgates = dgates + s.mix * wide(dout @ t.up_bias.to(dtype).t())
        dz = activate_backward(s.activation, blocks, _masked(tt * g.unsqueeze(-1), chosen))
        dz = _masked(dz, chosen)
        dz = dz.sum(1) if call.shared_down else dz.reshape(n, -1)
        if "down" in need:
            assert t.x is not None
            grads["down"] = (dz.t() @ t.x).view(t.down.shape)
        if "down_bias" in need:
            grads["down_bias"] = dz.sum(0).view(-1, r)
        if "x" in need:
            dx = s.keep * dout if s.add_input else dout.new_zeros(n, t.down.shape[-1])
            grads["x"] = dx.addmm_(dz, t.down.to(dtype).reshape(-1, t.down.shape[-1]))
    if "up" in need:
        ga = _masked(a * g.unsqueeze(-1), chosen).reshape(n, -1)
        grads["up"] = (ga.t() @ dout).mul_(s.mix).view(experts, r, -1).transpose(1, 2)
    if "up_bias" in need:
        grads["up_bias"] = _weighted_columns(g, dout).mul_(s.mix)
    return grads, dgates


_RUN = 256  # rows that a product adds up in one chain


def _weighted_columns(g: Tensor, dout: Tensor) -> Tensor:
    """g^T dout [E, O]. The library adds N rows in one chain where a sum of columns adds them by
    pairs: rounding would grow with N. 16-bit products accumulate wider and are rounded once."""
    whole = g.shape[0] // _RUN * _RUN
    if g.dtype.itemsize < 4 or whole == 0:
        return g.t() @ dout
    runs = (t[:whole].view(-1, _RUN, t.shape[1]) for t in (g.contiguous(), dout.contiguous()))
    left, right = runs
    total = (left.transpose(1, 2) @ right).sum(0)
    return total.addmm_(g[whole:].t(), dout[whole:])


def _slots_to_blocks(call: Call, saved: Saved) -> Tensor:
    """A stationary z [N, E, r] out of the sorted one, 0 where nothing was chosen."""
    assert saved.z is not None
    assert saved.order is not None
    n, experts = call.rows, call.experts
    expert = _expert_of_slot(call, saved.offsets)
    used = saved.order >= 0
    row = (saved.order * experts + expert).masked_fill(~used, n * experts).long()
    z = saved.z.new_zeros(n * experts + 1, call.rank)
    return z.index_copy_(0, row, saved.z)[:-1].view(n, experts, call.rank)


def _backward_sorted(
    call: Call, saved: Saved, gates: Tensor, dout: Tensor, need: frozenset[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    t, s, dtype = call.tensors, call.settings, dout.dtype
    assert saved.z is not None
    assert saved.order is not None
    assert saved.offsets is not None
    bounds = saved.offsets.tolist()
    wants_gates = _wants_gates(call, need)
    dgates = torch.zeros_like(gates) if wants_gates else None
    wants_z = wants_gates or not need.isdisjoint(("x", "down", "down_bias"))
    like = {"down": t.down, "up": t.up, "down_bias": t.down_bias, "up_bias": t.up_bias}
    grads = {n: dout.new_zeros(p.shape) for n, p in like.items() if n in need and p is not None}
    if "x" in need:
        dx = s.keep * dout if s.add_input else dout.new_zeros(call.rows, t.down.shape[-1])
        grads["x"] = dx
    for e, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        own, rows, z = 0 if call.shared_down else e, saved.order[lo:hi].long(), saved.z[lo:hi]
        dy = dout.index_select(0, rows).mul_(s.mix)
        weight = gates[:, e].index_select(0, rows)
        a = activate(s.activation, z)
        if wants_z:
            up = t.up[e].to(dtype)
            tt = dy @ up
            if dgates is not None:
                dots = wide((tt * a).sum(-1))
                if t.up_bias is not None:
                    dots = dots + wide(dy @ t.up_bias[e].to(dtype))
                dgates[:, e].index_copy_(0, rows, dots)
            dz = activate_backward(s.activation, z, tt.mul_(weight.to(dtype).unsqueeze(-1)))
            if "down" in need:
                assert t.x is not None
                grads["down"][own] += dz.t() @ t.x.index_select(0, rows)
            if "down_bias" in need:
                grads["down_bias"][own] += dz.sum(0)
            if "x" in need:
                grads["x"].index_add_(0, rows, dz @ t.down[own].to(dtype))
        dy.mul_(weight.to(dtype).unsqueeze(-1))
        if "up" in need:
            grads["up"][e] = dy.t() @ a
        if "up_bias" in need:
            grads["up_bias"][e] = dy.sum(0)
    return grads, dgates
