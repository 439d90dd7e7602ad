"""The eager published form of the layers, one step at a time: the oracle of the fused ones.

Written as the papers' steps and nothing else. It owns no parameter: it reads the same modules as
the fused layers, so that the two can be compared tensor by tensor and timed side by side from one
state dict.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from petal_kernels._runtime.autocast import autocast_off
from petal_kernels.nn.base_weight import base_weight
from petal_kernels.nn.compacter import CompacterAdapter, CompacterValueAdapter
from petal_kernels.nn.dora import DoRALinear
from petal_kernels.nn.experts import InstructionExperts
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.kronecker import PHMWeight
from petal_kernels.nn.lora import LoRALinear
from petal_kernels.nn.low_rank_experts import LowRankExperts
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.residual import CONTEXT_SCALE, RESIDUAL_SCALE, ScaleShift
from petal_kernels.nn.routed_lora import RoutedLoRALinear
from petal_kernels.nn.value_adapter import ValueAdapter
from petal_kernels.ops.expert_dispatch.routing import Routing


def published_mode(
    factors: ModeApproximation, mode: int, x: Tensor, dropout: Callable[[Tensor], Tensor]
) -> Tensor:
    """s (dropout(x U^T) M) V^T for one mode p of the shared factors."""
    p = factors.modes[mode]
    z = dropout(F.linear(x, factors.down.to(weight_dtype(x))))
    if factors.core_kind == "cp":
        w = z * (factors.core * p).to(z.dtype)
    else:
        w = z @ torch.einsum("abc,c->ab", factors.core, p).to(z.dtype)
    return factors.scale * F.linear(w, factors.up.to(weight_dtype(w)))


def weight_dtype(x: Tensor) -> torch.dtype:
    """float32 weights stay as they are under autocast, which casts them itself."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def published_residual(y: Tensor, a: Tensor, pair: ScaleShift) -> Tensor:
    """y + 0.1 (a * s + t)."""
    scale, shift = pair.scale.to(a.dtype), pair.shift.to(a.dtype)
    return y + RESIDUAL_SCALE * (a * scale + shift)


def published_context(c: Tensor, a: Tensor) -> Tensor:
    """c[:, 0] += 0.1 mean_b a[:, 0], in place."""
    context = torch.mean(a[:, 0, :], dim=0)
    c[:, 0, :] += CONTEXT_SCALE * context
    return c


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    assert weight is not None
    dtype = weight_dtype(x)
    return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))


def _activate(name: str, z: Tensor) -> Tensor:
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")
    if name in ("relu", "silu"):
        return F.relu(z) if name == "relu" else F.silu(z)
    return z


def _route(name: str, z: Tensor, v: Tensor | None, variant: str) -> Tensor:
    """f(z, v) with v [B, V, r]; beams of one sample are neighbours."""
    if name == "none":
        return z
    assert v is not None
    v = v.repeat_interleave(z.shape[0] // v.shape[0], dim=0)
    if name in ("gram", "gram_relu"):
        t = v.reshape(v.shape[0], v.shape[2], v.shape[1]) if variant == "release" else v.mT
        return F.relu(z) @ F.relu(t) @ v if name == "gram_relu" else z @ t @ v
    if name == "xt":
        return z @ z.mT @ v
    if variant == "paper":
        v = v.mean(dim=1, keepdim=True)
    if name == "expand":
        return z @ v.expand(-1, z.shape[-1], -1)
    return z + v if name == "add" else z * v


def published_adapter(
    m: GatedAdapter,
    h: Tensor,
    x: Tensor | None,
    *,
    vision: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """G * (h + up(act(route(down h)))), every gate expanded to a matrix; vision as [B, V, d]."""
    down, up = (m.down, m.up) if not isinstance(m, CompacterAdapter) else published_phm(m)
    z = _linear(h, down, m.down_bias)
    v = None if vision is None else _linear(vision.to(h.dtype), down, m.down_bias)
    y = _linear(_activate(m.activation, _route(m.route, z, v, m.variant)), up, m.up_bias)
    y = h + y if m.add_input else y
    seen = y if m.variant == "release" else h if m.add_input else torch.zeros_like(y)
    if m.gate == "none":
        return y if m.scale == 1.0 else m.scale * y
    if m.gate == "middleY":
        assert m.gate_weight is not None
        w = m.gate_weight.to(y.dtype)
        gate = 1 + (w if m.variant == "release" else torch.sigmoid(w))
        return m.scale * gate.expand_as(y) * y
    assert x is not None
    if m.gate == "large":
        middle = _activate(m.activation, _linear(x, m.gate_down, m.gate_down_bias))
        gate = torch.sigmoid(_linear(middle, m.gate_up, m.gate_up_bias))
        return m.scale * gate * y
    assert m.gate_weight is not None
    both = x + seen if m.gate == "middleX" else torch.cat((x, seen), dim=-1)
    gate = torch.sigmoid(_linear(both, m.gate_weight.unsqueeze(0), m.gate_bias))
    if m.gate == "small":
        if mask is None:
            gate = gate.mean(dim=1, keepdim=True)
        else:
            kept = mask.to(gate.dtype).unsqueeze(-1)
            gate = (gate * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
    return m.scale * gate.expand_as(y) * y


def published_phm(m: CompacterAdapter) -> tuple[Tensor, Tensor]:
    """Both projections of an adapter."""
    return published_kronecker(m.phm_down), published_kronecker(m.phm_up)


def published_kronecker(m: PHMWeight) -> Tensor:
    """sum_i kron(A_i, B_i), one product after the other; of several matrices, each by itself."""
    if m.count is not None:
        each = m.rules().expand(m.count, -1, -1, -1)
        factors = zip(*m.factors(), strict=True)
        return torch.stack([_kronecker(a, *b) for a, b in zip(each, factors, strict=True)])
    return _kronecker(m.rules(), *m.factors())


def _kronecker(rule: Tensor, *factors: Tensor) -> Tensor:
    total: Tensor | float = 0.0
    for a, *parts in zip(rule, *factors, strict=True):
        b = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
        total = total + torch.kron(a.to(b), b)
    assert isinstance(total, Tensor)
    return total


def published_value(m: ValueAdapter, values: Tensor, encoded: Tensor, layer: int) -> Tensor:
    """values + up(act(down encoded)) of one layer."""
    rows = slice(layer * m.r, (layer + 1) * m.r)
    if isinstance(m, CompacterValueAdapter):
        down, up = (published_kronecker(each)[layer] for each in (m.phm_down, m.phm_up))
    else:
        down, up = m.down[rows], m.up[layer]
    a = _activate(m.activation, _linear(encoded, down, m.down_bias[rows]))
    return values + m.scale * _linear(a, up, m.up_bias[layer])


def published_lora(m: RoutedLoRALinear, y: Tensor, x: Tensor, vision: Tensor | None) -> Tensor:
    """y + s * B route(A x, A vision) on the adapted ranges of the outputs."""
    z = _linear(F.dropout(x, m.dropout, m.training), m.down)
    v = None
    if vision is not None:
        v = _linear(F.dropout(vision.to(x.dtype), m.dropout, m.training), m.down)
    if m.groups == "merged":
        z = _route(m.route, z, v, m.variant)
    pieces = list(y.split(m.widths, dim=-1))
    for n, (target, up) in enumerate(zip(m.targets, m.ups(), strict=True)):
        columns = slice(n * m.r, (n + 1) * m.r)
        q = z[..., columns]
        if m.groups == "separate":
            q = _route(m.route, q, None if v is None else v[..., columns], m.variant)
        pieces[target] = pieces[target] + m.scale * _linear(q, up)
    return torch.cat(pieces, dim=-1)


def published_update(m: LoRALinear, y: Tensor, x: Tensor) -> Tensor:
    """y + s * B A drop(x), y without what was taken out of the weight."""
    z = _linear(F.dropout(x, m.dropout, m.training), m.down)
    return _residual(m, y, x) + m.scale * _linear(z, m.up)


def _residual(m: LoRALinear, y: Tensor, x: Tensor) -> Tensor:
    """y - s * B0 A0 x, which is PEFT's own base then."""
    if m.first_down is None:
        return y
    return y - m.scale * _linear(_linear(x, m.first_down), m.first_up)


def published_magnitude(m: DoRALinear, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """y + (g - 1) (y - bias) + g s B A x with g = m / |W + s B A|, that sum formed; with dropout
    of x in all but the first y, W x in place of y - bias."""
    weight = base_weight(m.base)
    assert isinstance(weight, Tensor)
    y = _residual(m, y, x)
    if m.first_down is not None and m.first_up is not None:
        weight = weight - m.scale * (m.first_up @ m.first_down).to(weight)
    whole = weight + m.scale * (m.up @ m.down).to(weight)
    gain = m.magnitude / torch.linalg.vector_norm(whole, dim=1).detach()
    dropped = F.dropout(x, m.dropout, m.training)
    if m.dropout and m.training:
        plain = _linear(dropped, weight)
    else:
        plain = y if bias is None else y - bias.to(y.dtype)
    update = m.scale * _linear(_linear(dropped, m.down), m.up)
    moved: Tensor = (gain - 1) * plain + gain * update
    return y + moved.to(y.dtype)


def published_rows(weight: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """A copy of an embedding's weight with other rows for some tokens."""
    return weight.index_copy(0, tokens, rows.to(weight.dtype))


def _gates(
    m: LowRankExperts, x: Tensor, mask: Tensor | None, domain: Tensor | None
) -> tuple[Tensor, Routing]:
    """The experts' weights [..., E], or [B, 1, E] where a sample's tokens share them."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if m.gate == "mean":
        gates = torch.full((m.experts,), 1.0 / m.experts, dtype=wide, device=x.device)
        return gates.expand(*x.shape[:-1], -1), Routing(None, None)
    if m.gate == "domain":
        assert domain is not None
        hit = F.one_hot(domain, m.experts).bool()
        gates = hit.to(wide)
        return gates if domain.dim() == x.dim() - 1 else gates.unsqueeze(1), Routing(None, hit)
    seen = x.to(wide)
    if m.router_input == "pooled":
        kept = x.new_ones(x.shape[:-1]) if mask is None else mask
        kept = kept.to(wide).unsqueeze(-1)
        seen = (kept * seen).sum(1) / kept.sum(1).clamp_min(1)
    assert m.router is not None
    with autocast_off(seen):
        logits = F.linear(seen, m.router.to(wide))
    if m.training and m.router_noise:
        noise = torch.randn(logits.shape, device=x.device)
        logits = logits + m.router_noise * noise.to(wide)
    chosen, scores = None, logits
    if m.top_k is not None:
        best = logits.argsort(dim=-1, descending=True, stable=True)[..., : m.top_k]
        chosen = F.one_hot(best, m.experts).any(-2)
        scores = logits.masked_fill(~chosen, float("-inf"))
    gates = F.softmax(scores, dim=-1)
    return gates if gates.dim() == x.dim() else gates.unsqueeze(1), Routing(logits, chosen)


def published_experts(
    m: LowRankExperts,
    x: Tensor,
    base: Tensor,
    *,
    keep: float,
    mix: float,
    mask: Tensor | None = None,
    domain: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """keep * base + mix * sum_j g_j (B_j act(A_j x + a_j) + b_j), one expert after the other on all
    tokens."""
    gates, routing = _gates(m, x, mask, domain)
    total = torch.zeros_like(base)
    for e in range(m.experts):
        own = 0 if m.shared_down else e
        z = _linear(x, m.down[own], None if m.down_bias is None else m.down_bias[own])
        bias = None if m.up_bias is None else m.up_bias[e]
        y = _linear(_activate(m.activation, z), m.up[e], bias)
        total = total + gates[..., e, None].to(y.dtype) * y
    return keep * base + mix * total, routing


def published_instruction(
    m: InstructionExperts, embeddings: Tensor, queries: int = 0, mask: Tensor | None = None
) -> tuple[Tensor, Routing]:
    """The same on [queries; instruction], or on the instruction alone."""
    first = queries if m.tokens == "text" else 0
    served = embeddings[:, first:]
    mask = None if mask is None else mask[:, first:]
    out, routing = published_experts(m, served, served, keep=m.keep, mix=m.mix, mask=mask)
    return torch.cat((embeddings[:, :first], out), dim=1), routing
