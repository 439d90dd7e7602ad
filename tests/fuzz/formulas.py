"""What the operators compute, from docs/kernels.md and the public docstrings, in plain torch.

Run in fp64 these are what every backend is measured against; in a case's own dtype, with autograd,
they are the plain torch of the rule. Masked products (dropout, padding, experts that were not
chosen, relu, a scale of 0, mode matrices without ``up``, which are products with the identity, the
gradient of an output that is not used) are read in two ways: ``loose`` multiplies by zero, as plain
torch does; the other way selects. What is NaN or Inf in one of them alone may be so or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.fuzz import masks
from tests.fuzz.formulas_norm import frozen_norm as frozen_norm
from tests.ops import folders

Outputs = list[Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _only(keep: Tensor, t: Tensor, loose: bool) -> Tensor:
    """t where it is kept, 0 elsewhere."""
    return t * keep.to(t.dtype) if loose else torch.where(keep, t, torch.zeros_like(t))


def _sigmoid(t: Tensor) -> Tensor:
    """In fp64 without the difference 1 - s in its derivative, which is 0 for logits above 37."""
    return torch.exp(F.logsigmoid(t)) if t.dtype == torch.float64 else torch.sigmoid(t)


def _relu(z: Tensor, loose: bool) -> Tensor:
    return z * (z > 0) if loose else F.relu(z)


def _activate(name: str, z: Tensor, loose: bool) -> Tensor:
    if name == "relu":
        return _relu(z, loose)
    out = _ACTIVATIONS[name](z)
    if name != "identity" and not bool(torch.isfinite(z).all()):
        # -Inf times the 0 that it is weighted with; or the limit, 0.
        out = torch.where(z == -torch.inf, torch.nan if loose else 0.0, out)
    return out


def _times(scale: float, t: Tensor, loose: bool) -> Tensor:
    """scale * t; times 0 is a masked product too."""
    return scale * t if scale != 0 or loose else torch.zeros_like(t)


class _Drop:
    """The masks of one call."""

    def __init__(self, a: dict[str, Any], streams: int, loose: bool) -> None:
        p = float(a.get("dropout", 0.0))
        self.on = a.get("training", True) and masks.dropped_of_65536(p) > 0
        self.p, self.streams, self.loose, self.rng = p, streams, loose, a.get("rng")
        self._kept: dict[int, Tensor] = {}

    def __call__(self, t: Tensor, stream: int = 0) -> Tensor:
        return self.select(t * masks.multiplier(self.p), stream) if self.on else t

    def select(self, t: Tensor, stream: int = 0) -> Tensor:
        """What is kept, as it is."""
        if not self.on:
            return t
        columns = t.shape[-1]
        if columns not in self._kept:
            rows = t.shape[:-1].numel()
            self._kept[columns] = masks.kept(self.rng, self.p, self.streams, rows, columns)  # type: ignore[arg-type]
        keep = self._kept[columns][stream].view(t.shape)
        return _only(keep, t, self.loose)


def mode_contract(a: dict[str, Any], loose: bool = False) -> Outputs:
    """P_k = scale * up M_k^T with M_k = core x_3 p_k, or diag(core * p_k)."""
    core, modes, up = a["core"], a["modes"], a.get("up")
    if core.dim() == 3:
        m = (core.unsqueeze(0) @ modes[:, None, :, None]).squeeze(-1)
    else:
        m = torch.diag_embed(core * modes)
    if up is None:
        out = m @ torch.eye(m.shape[-1], dtype=m.dtype) if loose else m
    elif core.dim() == 3:
        out = up @ m.transpose(1, 2)
    else:
        out = up * (core * modes).unsqueeze(1)
    out = _times(a.get("scale", 1.0), out, loose)
    return [out.to(a.get("dtype") or core.dtype)]


def lowrank_linear(a: dict[str, Any], loose: bool = False) -> Outputs:
    """y_k = base_k + scale * m_k P_k^T with m_k the bottleneck as output k sees it."""
    x: Any
    x, hidden, ups, at = a.get("x"), a.get("hidden"), a["ups"], a.get("dropout_at", "bottleneck")
    count, own = len(ups), isinstance(a.get("down"), list)
    drop = _Drop(a, count if own or at != "input" else 1, loose)
    outs = []
    for k in range(count):
        m = hidden
        if m is None:
            down = a["down"][k] if own else a["down"]
            m = F.linear(drop(x, k if own else 0) if at == "input" else x, down.to(x.dtype))
        if at == "mode":
            m = m @ a["core"][k].to(m.dtype)
        if at != "input":
            m = drop(m, k)
        scale = a.get("scale", 1.0)
        scale = scale[k] if isinstance(scale, list) else scale
        y = _times(scale, F.linear(m, ups[k].to(m.dtype)), loose)
        if a.get("weights") is not None:
            biases = a.get("biases")
            bias = None if biases is None else biases[k]
            y = F.linear(x, a["weights"][k], bias) + y
        elif a.get("base") is not None:
            y = a["base"][k] + y
        outs.append(y)
    return outs


def gated_mlp(a: dict[str, Any], loose: bool = False) -> Outputs:
    """down(act(gate(x)) * up(x)), or down(act(up(x))); a linear: t W^T + b + s drop(t) A^T B^T."""
    count, scale, t = len(a["weights"]), a.get("scale", 1.0), a["x"]
    drop, none, outs = _Drop(a, count, loose), [None] * 3, list[Tensor]()
    for k, weight in enumerate(a["weights"]):
        if k == count - 1:
            t = _activate(a["activation"], outs[0], loose)
            t = t * outs[1] if count == 3 else t
        y, down = F.linear(t, weight, a.get("biases", none)[k]), a.get("downs", none)[k]
        if down is not None:
            update = F.linear(F.linear(drop(t, k), down.to(t.dtype)), a["ups"][k].to(t.dtype))
            y = y + _times(scale[k] if isinstance(scale, list) else scale, update, loose)
        outs.append(y)
    return outs[-1:]


def _route(a: dict[str, Any], z: Tensor, loose: bool) -> Tensor:
    kind, v = a.get("route", "none"), a.get("vision")
    if kind == "none":
        return z
    assert v is not None
    if kind in ("gram", "gram_relu"):
        if a.get("variant", "paper") == "release":
            left = v.reshape(v.shape[0], v.shape[2], v.shape[1])
        else:
            left = v.transpose(1, 2)
        if kind == "gram_relu":
            z, left = _relu(z, loose), _relu(left, loose)
        return (z @ left) @ v
    mean = v.mean(dim=1, keepdim=True)
    if kind == "add":
        return z + mean
    return z * mean if kind == "mul" else z.sum(-1, keepdim=True) * mean


def _gate(a: dict[str, Any], y: Tensor, h: Tensor | None, loose: bool) -> Tensor:
    """G, which broadcasts against y."""
    kind, release = a["gate"], a.get("variant", "paper") == "release"
    x: Any
    dtype, x = y.dtype, a.get("gate_input")

    def cast(name: str) -> Tensor | None:
        t = a.get(name)
        return None if t is None else t.to(dtype)

    if kind == "large":
        down, up = cast("gate_down"), cast("gate_up")
        assert down is not None
        assert up is not None
        zg = F.linear(x, down, cast("gate_down_bias"))
        middle = _activate(a.get("activation", "gelu_tanh"), zg, loose)
        return _sigmoid(_wide(F.linear(middle, up, cast("gate_up_bias"))))
    w = cast("gate_weight")
    assert w is not None
    w = _wide(w)
    if kind == "middleY":
        return 1 + (w if release else _sigmoid(w))
    seen = y if release else h  # None: there is nothing to see, not 0 times a weight
    if seen is None and loose:
        seen = torch.zeros_like(y)
    out = y.shape[-1]
    if kind == "middleX":
        if loose and seen is not None:  # the sum taken apart: with an infinite weight not the same
            logit = (_wide(x) * w).sum(-1, keepdim=True) + (_wide(seen) * w).sum(-1, keepdim=True)
        else:
            both = _wide(x) if seen is None else _wide(x) + _wide(seen)
            logit = (both * w).sum(-1, keepdim=True)
    else:
        logit = (_wide(x) * w[:out]).sum(-1, keepdim=True)
        if seen is not None:
            logit = logit + (_wide(seen) * w[out:]).sum(-1, keepdim=True)
    bias = cast("gate_bias")
    if bias is not None:
        logit = logit + _wide(bias)
    gate = _sigmoid(logit)
    return gate if kind == "middleX" else _token_mean(gate, a.get("mask"), loose)


def _token_mean(values: Tensor, mask: Tensor | None, loose: bool) -> Tensor:
    """Over dim 1 of [B, L, C], of the tokens that count: [B, 1, C]; of none, 0."""
    if mask is None:
        return values.sum(1, keepdim=True) / max(values.shape[1], 1)
    weights = mask.to(values.dtype)
    share = (weights / weights.sum(1, keepdim=True).clamp_min(1)).unsqueeze(-1)
    if loose:
        return (values * share).sum(1, keepdim=True)
    return torch.where(share != 0, values * share, torch.zeros_like(values)).sum(1, keepdim=True)


def gated_bottleneck(a: dict[str, Any], loose: bool = False) -> Outputs:
    """norm(residual + drop(scale * G * (H + act(route(x down^T + c)) up^T + b)))."""
    x, z = a.get("x"), a.get("bottleneck")
    first = x if x is not None else z
    assert first is not None
    dtype = first.dtype

    def cast(name: str) -> Tensor | None:
        t = a.get(name)
        return None if t is None else t.to(dtype)

    if z is None:
        assert x is not None
        down = cast("down")
        assert down is not None
        z = F.linear(x, down, cast("down_bias"))
    up = cast("up")
    assert up is not None
    q = _activate(a.get("activation", "gelu_tanh"), _route(a, z, loose), loose)
    y = F.linear(q, up, cast("up_bias"))
    base = a.get("base", "input")
    first_column = a.get("update_at")
    h = x if isinstance(base, str) else base
    if first_column is not None:
        assert h is not None
        last = first_column + up.shape[0]
        new = h[..., first_column:last] + y
        return [torch.cat((h[..., :first_column], new, h[..., last:]), -1)]
    if h is not None:
        y = h + y
    drop = _Drop(a, 1, loose)
    u = drop(y)
    if a.get("gate", "none") != "none":
        u = u * _gate(a, y, h, loose).to(dtype)
        u = u if loose else drop.select(u)  # neither y nor a gate counts where it is dropped
    u = _times(a.get("scale", 1.0), u, loose)
    residual = a.get("residual")
    if residual is not None:
        u = (a["gate_input"] if isinstance(residual, str) else residual) + u
    weight, bias = cast("norm_weight"), cast("norm_bias")
    if weight is not None:
        norm = _written_norm if a.get("written_norm") else F.layer_norm
        u = norm(u, (u.shape[-1],), weight, bias, a.get("norm_eps", 1e-5))
    return [u]


def _written_norm(
    u: Tensor, _: tuple[int], weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """The norm step by step. Where one number of a row is left (dropout), its gradient is a small
    difference, and torch's kernel, which takes another way, may round it well by luck."""
    centred = u - u.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normed * weight if bias is None else normed * weight + bias


def _largest(logits: Tensor, k: int) -> Tensor:
    """The k largest of each row; of equal ones the first; NaN above everything."""
    own, other = logits.unsqueeze(-1), logits.unsqueeze(-2)
    nan_own, nan_other = own.isnan(), other.isnan()
    above = (other > own) | (nan_other & ~nan_own)
    place = torch.arange(logits.shape[-1])
    equal = (other == own) | (nan_other & nan_own)
    before = equal & (place.unsqueeze(0) < place.unsqueeze(1))
    return (above | before).sum(-1) < k


def expert_dispatch(a: dict[str, Any], loose: bool = False) -> Outputs:
    """out = keep * H + mix * sum_e g_e * (act(x down_e^T + a_e) up_e^T + b_e); then the logits
    and, as numbers, the choice, where the routing is asked for."""
    x, up = a["x"], a["up"]
    dtype, experts = x.dtype, up.shape[0]
    gates, logits, chosen = _expert_gates(a, loose)
    if gates.dim() < x.dim():
        gates = gates.unsqueeze(-2)
    spread = chosen
    if chosen is not None and chosen.dim() < x.dim():
        spread = chosen.unsqueeze(-2)
    gates = gates.expand(*x.shape[:-1], experts).reshape(-1, experts)
    flat = x.reshape(-1, x.shape[-1])
    total = flat.new_zeros((flat.shape[0], up.shape[1]))
    if spread is not None:
        spread = spread.expand(*x.shape[:-1], experts).reshape(-1, experts)
    for e in range(experts):
        rows = None  # an expert sees the rows that chose it, or all
        if spread is not None and not loose:
            rows = spread[:, e].nonzero().squeeze(1)
        xe, ge = (flat, gates) if rows is None else (flat[rows], gates[rows])
        own = e if a["down"].shape[0] > 1 else 0
        biases = [a.get("down_bias"), a.get("up_bias")]
        inner = None if biases[0] is None else biases[0][own].to(dtype)
        outer = None if biases[1] is None else biases[1][e].to(dtype)
        z = F.linear(xe, a["down"][own].to(dtype), inner)
        y = F.linear(_activate(a.get("activation", "identity"), z, loose), up[e].to(dtype), outer)
        y = ge[:, e : e + 1].to(dtype) * y
        total = total + y if rows is None else total.index_add(0, rows, y)
    total = total.view(*x.shape[:-1], up.shape[1])
    out = _times(a.get("mix", 1.0), total, loose)
    base = a.get("base", "input")
    h = x if isinstance(base, str) else base
    if h is not None:
        out = _times(a.get("keep", 1.0), h, loose) + out
    if not a.get("return_routing", False):
        return [out]
    found = [out]
    if logits is not None:
        found.append(logits)
    if chosen is not None:
        found.append(chosen.to(_wide(x[..., :0]).dtype))
    return found


def _expert_gates(a: dict[str, Any], loose: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g [..., E] or [B, E] in fp32 or wider, the logits, the choice."""
    x, experts = a["x"], a["up"].shape[0]
    kind, k = a.get("gate", "softmax"), a.get("top_k")
    if kind == "mean":
        return _wide(x[..., :0]).new_full((*x.shape[:-1], experts), 1 / experts), None, None
    if kind == "given":
        indices, gates = a.get("indices"), a.get("gates")
        if indices is None:
            assert gates is not None
            return _wide(gates), None, None
        named = indices.unsqueeze(-1) == torch.arange(experts)
        values = torch.ones(indices.shape, dtype=_wide(x[..., :0]).dtype)
        values = values if gates is None else _wide(gates)
        return (values.unsqueeze(-1) * named).sum(-2), None, named.any(-2)
    seen = _wide(x)
    if a.get("router_input", "token") == "pooled":
        seen = _token_mean(seen, a.get("mask"), loose).squeeze(1)
    bias = a.get("router_bias")
    logits = F.linear(seen, _wide(a["router"]).to(seen.dtype), None)
    if bias is not None:
        logits = logits + _wide(bias)
    if a.get("noise") is not None:
        logits = logits + _wide(a["noise"])
    if k is None:
        return torch.softmax(logits, -1), logits, None
    chosen = _largest(logits.detach(), k)
    if a.get("renormalize", True):
        low = torch.full_like(logits, -torch.inf)
        off = torch.where(chosen, torch.zeros_like(low), low)
        gates = torch.softmax(logits + off if loose else torch.where(chosen, logits, low), -1)
    else:
        gates = torch.softmax(logits, -1)
    return _only(chosen, gates, loose), logits, chosen


# The functions here that have an operator's name.
FORMULAS: dict[str, Callable[[dict[str, Any], bool], Outputs]] = {
    name: globals()[name] for name in folders.names() if name in globals()
}


def evaluate(
    operator: str,
    arguments: dict[str, Any],
    leaves: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    loose: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the leaves (zeros where nothing reaches one)."""
    outs = FORMULAS[operator](arguments, loose)
    pairs = [
        (o, torch.zeros_like(o) if u is None else u.to(o.dtype))
        for o, u in zip(outs, upstream, strict=False)
        if o.requires_grad and (loose or (u is not None and o.numel()))
    ]
    if not pairs or not leaves:
        return outs, [torch.zeros_like(t) for t in leaves]
    found = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves), [u for _, u in pairs], allow_unused=True
    )
    return outs, [
        torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)
    ]
