"""``gated_bottleneck`` on the torch backend, on every device and dtype.

What the algebra allows in library calls: one product per projection (the published form runs one
per head), gate logits of middleX and small as two matrix-vector products without a sum or a
concatenation, the gate applied in place, activations and masks formed again in backward.
Numerics are torch's: every intermediate is rounded to x's dtype but the gate, which is fp32 until
it is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox
from petal_kernels._runtime.numerics import activate, activate_backward, wide
from petal_kernels.ops.gated_bottleneck.arguments import Call, Saved, Settings, Tensors


def unsupported(call: Call) -> list[str]:
    """Runs everywhere."""
    return []


def _samples(t: Tensor, s: Settings) -> Tensor:
    return t.view(s.samples, -1, t.shape[-1])


def _route(t: Tensors, s: Settings, z: Tensor) -> Tensor:
    if s.route == "none":
        return z
    assert t.left is not None
    tokens = _samples(z, s)
    if s.route == "add":
        q = tokens + t.left
    elif s.route == "mul":
        q = tokens * t.left
    else:
        q = (tokens.relu() if s.route_relu else tokens) @ t.left.transpose(1, 2)
        q = q if t.right is None else q @ t.right
    return q.view_as(z)


def _route_backward(
    t: Tensors, s: Settings, z: Tensor, dq: Tensor, need: frozenset[str]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz, dleft, dright."""
    if s.route == "none":
        return dq, None, None
    assert t.left is not None
    tokens, d = _samples(z, s), _samples(dq, s)
    dleft = dright = None
    if s.route == "add":
        dz, dleft = dq, d.sum(1, keepdim=True) if "left" in need else None
    elif s.route == "mul":
        dz = (d * t.left).view_as(z)
        dleft = (d * tokens).sum(1, keepdim=True) if "left" in need else None
    else:
        f = tokens.relu() if s.route_relu else tokens
        dp = d
        if t.right is not None:
            if "right" in need:
                dright = (f @ t.left.transpose(1, 2)).transpose(1, 2) @ d
            dp = d @ t.right.transpose(1, 2)
        dleft = dp.transpose(1, 2) @ f if "left" in need else None
        dz = (dp @ t.left).view_as(z)
        if s.route_relu:
            dz = torch.ops.aten.threshold_backward(dz, z, 0)
    return dz, dleft, dright


@dataclass
class _Middle:
    """What both directions form from z, zg and the row tensors."""

    q: Tensor
    a: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None  # broadcasts against [N, O]
    sigmoid: Tensor | None = None  # of the logits, [N, 1]
    ag: Tensor | None = None


def _gate_halves(t: Tensors, s: Settings) -> tuple[Tensor, Tensor]:
    """The weights w_x of gate_input and w_h of H, as applied to rows of x's dtype."""
    assert t.gate_weight is not None
    out = t.up.shape[0]
    return t.gate_weight[:out], t.gate_weight[-out:]


def _pooled_gate(t: Tensors, s: Settings, sigmoid: Tensor) -> Tensor:
    """The mean over a sample's tokens, for each of its tokens: [N, 1]."""
    per_token = _samples(sigmoid, s)
    if t.token_weights is None:
        mean = per_token.mean(1, keepdim=True)
    else:
        mean = (per_token * _samples(t.token_weights.unsqueeze(1), s)).sum(1, keepdim=True)
    return mean.expand_as(per_token).reshape_as(sigmoid)


def _middle(call: Call, z: Tensor, zg: Tensor | None, logits: Tensor | None, y: bool) -> _Middle:
    t, s = call.tensors, call.settings
    dtype = z.dtype
    q = _route(t, s, z)
    m = _Middle(q, activate(s.activation, q))
    if y:
        bias = None if t.up_bias is None else t.up_bias.to(dtype)
        m.y = F.linear(m.a, t.up.to(dtype), bias)
        h = t.x if s.add_input else t.base
        if h is not None:
            m.y += h
    if s.gate == "large":
        assert zg is not None
        assert t.gate_up is not None
        m.ag = activate(s.activation, zg)
        bias = None if t.gate_up_bias is None else t.gate_up_bias.to(dtype)
        m.gate = wide(F.linear(m.ag, t.gate_up.to(dtype), bias)).sigmoid_()
    elif s.gate == "middleY":
        assert t.gate_weight is not None
        w = wide(t.gate_weight.to(dtype))
        m.gate = 1 + (w if s.gate_linear else w.sigmoid())
    elif call.has_logits:
        if logits is None:
            logits = _logits(call, m.y)
        m.sigmoid = logits.sigmoid().unsqueeze(1)
        m.gate = m.sigmoid if s.gate == "middleX" else _pooled_gate(t, s, m.sigmoid)
    return m


def _logits(call: Call, y: Tensor | None) -> Tensor:
    t, s = call.tensors, call.settings
    assert t.gate_input is not None
    assert y is not None
    wx, wh = (w.to(y.dtype) for w in _gate_halves(t, s))
    logit_h = y if s.gate_sees_output else t.x if s.add_input else t.base
    logits = wide(t.gate_input) @ wide(wx)
    if logit_h is not None:
        logits = logits + wide(logit_h) @ wide(wh)
    if t.gate_bias is not None:
        logits = logits + wide(t.gate_bias.to(y.dtype))
    return logits


def _mask(rng: Tensor | None, s: Settings, like: Tensor) -> Tensor | None:
    if rng is None:
        return None
    n, out = like.shape
    return philox.scaled_masks(rng, s.dropout, 1, n, out, like.dtype)[0]


def _sum(call: Call, m: _Middle, mask: Tensor | None) -> Tensor:
    """u = residual + drop(scale G Y)."""
    t, s = call.tensors, call.settings
    assert m.y is not None
    u = m.y if s.scale == 1.0 else m.y * s.scale
    if m.gate is not None:
        u = u * m.gate.to(u.dtype)
    if mask is not None:
        u = u * mask
    residual = t.gate_input if s.add_gate_input else t.residual
    return u if residual is None else u + residual


def forward(
    call: Call, rng: Tensor | None, save: bool, out: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """out [N, O] and what backward needs; ``out`` is given where a sum overwrites its base."""
    t, s = call.tensors, call.settings
    dtype = call.first.dtype

    def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, w.to(dtype), None if b is None else b.to(dtype))

    if t.bottleneck is not None:
        z = t.bottleneck
    else:
        assert t.x is not None
        assert t.down is not None
        z = linear(t.x, t.down, t.down_bias)
    zg = None
    if s.gate == "large":
        assert t.gate_input is not None
        assert t.gate_down is not None
        zg = linear(t.gate_input, t.gate_down, t.gate_down_bias)
    m = _middle(call, z, zg, None, out is None)
    if out is not None:
        out.addmm_(m.a, t.up.to(dtype).t())
        if t.up_bias is not None:
            out += t.up_bias.to(dtype)
        return out, Saved(None if t.bottleneck is not None else z, None, None, None)
    assert m.y is not None
    u = _sum(call, m, _mask(rng, s, m.y))
    logits = None if m.sigmoid is None or not save else _logits(call, m.y)
    moments = None
    if t.norm_weight is not None:
        assert t.norm_bias is not None
        w, b = t.norm_weight.to(dtype), t.norm_bias.to(dtype)
        u, mean, rstd = torch.native_layer_norm(u, [u.shape[1]], w, b, s.norm_eps)
        moments = torch.cat((mean, rstd), 1)
        moments = moments if dtype == torch.float64 else moments.float()
    return u, Saved(None if t.bottleneck is not None else z, zg, logits, moments)


def _norm_backward(
    t: Tensors, saved: Saved, u: Tensor, dout: Tensor, need: frozenset[str]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the norm's input u, its weight and its bias."""
    assert saved.moments is not None
    assert t.norm_weight is not None
    assert t.norm_bias is not None
    mean, rstd = saved.moments.t().contiguous().unsqueeze(2)
    found: tuple[Tensor, Tensor | None, Tensor | None]
    found = torch.ops.aten.native_layer_norm_backward(
        dout,
        u,
        [dout.shape[1]],
        mean.to(dout.dtype) if dout.device.type == "cpu" else mean,
        rstd.to(dout.dtype) if dout.device.type == "cpu" else rstd,
        t.norm_weight.to(dout.dtype),
        t.norm_bias.to(dout.dtype),
        [True, "norm_weight" in need, "norm_bias" in need],
    )
    return found


def backward(
    call: Call, saved: Saved, dout: Tensor, rng: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that ``need`` names."""
    t, s = call.tensors, call.settings
    dtype = dout.dtype
    grads: dict[str, Tensor | None] = {}
    z = t.bottleneck if t.bottleneck is not None else saved.z
    assert z is not None
    values = s.gate != "none" or t.norm_weight is not None
    m = _middle(call, z, saved.zg, saved.logits, values)
    mask = _mask(rng, s, dout)
    du = dout
    if t.norm_weight is not None:
        du, grads["norm_weight"], grads["norm_bias"] = _norm_backward(
            t, saved, _sum(call, m, mask), dout, need
        )
    dgate_input = du if s.add_gate_input and "gate_input" in need else None
    if "residual" in need:
        grads["residual"] = du
    # dv = scale drop(du), the gradient of G Y.
    dv = du if s.scale == 1.0 else du * s.scale
    if mask is not None:
        dv = dv * mask
    dy = dv if m.gate is None else dv * m.gate.to(dtype)
    dh = dy
    if s.gate != "none":
        assert m.y is not None
        assert m.gate is not None
        dh, dy, through_gate = _gate_backward(call, saved, m, dv, dy, need, grads)
        if through_gate is not None:
            dgate_input = through_gate if dgate_input is None else dgate_input + through_gate
    grads["gate_input"] = dgate_input
    grads["base"] = dh if "base" in need else None
    grads["up"] = dy.t() @ m.a if "up" in need else None
    grads["up_bias"] = dy.sum(0) if "up_bias" in need else None
    dz, grads["left"], grads["right"] = _route_backward(
        t, s, z, activate_backward(s.activation, m.q, dy @ t.up.to(dtype)), need
    )
    grads["bottleneck"] = dz if "bottleneck" in need else None
    if "down" in need:
        assert t.x is not None
        grads["down"] = dz.t() @ t.x
    grads["down_bias"] = dz.sum(0) if "down_bias" in need else None
    if "x" in need:
        through = None if t.down is None else t.down.to(dtype)
        if through is None:
            grads["x"] = dh
        elif s.add_input:
            grads["x"] = torch.addmm(dh, dz, through)
        else:
            grads["x"] = dz @ through
    return _separate(grads, need, dout)


def _separate(
    grads: dict[str, Tensor | None], need: frozenset[str], dout: Tensor
) -> dict[str, Tensor]:
    """The gradients that ``need`` names, each in storage of its own: where nothing stands between
    an input and the output, the sums above are one tensor under several names, or dout."""
    taken = {dout.untyped_storage().data_ptr()}
    found: dict[str, Tensor] = {}
    for name, value in grads.items():
        if name in need and value is not None:
            shared = value.untyped_storage().data_ptr() in taken
            found[name] = value = value.clone() if shared else value
            taken.add(value.untyped_storage().data_ptr())
    return found


def _sigmoid_slope(x: Tensor) -> Tensor:
    """s (1 - s), neither through a difference."""
    return x.sigmoid() * (-x).sigmoid()


def _gate_backward(
    call: Call,
    saved: Saved,
    m: _Middle,
    dv: Tensor,
    dy: Tensor,
    need: frozenset[str],
    grads: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dH, dY as the up-projection sees it, and what the gate adds to dgate_input."""
    t, s = call.tensors, call.settings
    assert m.y is not None
    assert m.gate is not None
    dtype = dy.dtype
    if s.gate == "large":
        assert t.gate_up is not None
        assert t.gate_down is not None
        assert saved.zg is not None
        assert m.ag is not None
        dlogit = (dv * m.y).mul_((m.gate * (1 - m.gate)).to(dtype))
        grads["gate_up"] = dlogit.t() @ m.ag if "gate_up" in need else None
        grads["gate_up_bias"] = dlogit.sum(0) if "gate_up_bias" in need else None
        dzg = activate_backward(s.activation, saved.zg, dlogit @ t.gate_up.to(dtype))
        if "gate_down" in need:
            assert t.gate_input is not None
            grads["gate_down"] = dzg.t() @ t.gate_input
        grads["gate_down_bias"] = dzg.sum(0) if "gate_down_bias" in need else None
        return dy, dy, dzg @ t.gate_down.to(dtype) if "gate_input" in need else None
    assert t.gate_weight is not None
    product = dv * m.y
    if s.gate == "middleY":
        if "gate_weight" in need:
            dw = product.sum(0)
            w = wide(t.gate_weight.to(dtype))
            grads["gate_weight"] = dw if s.gate_linear else dw * _sigmoid_slope(w).to(dtype)
        return dy, dy, None
    assert m.sigmoid is not None
    dgate = wide(product).sum(1, keepdim=True)
    if s.gate == "small":
        total = _samples(dgate, s).sum(1, keepdim=True).expand(-1, dgate.shape[0] // s.samples, 1)
        length = dgate.shape[0] // s.samples
        share = 1.0 / length if t.token_weights is None else t.token_weights.unsqueeze(1)
        dgate = total.reshape_as(dgate) * share
    assert saved.logits is not None
    dlogit = dgate * _sigmoid_slope(saved.logits).unsqueeze(1)
    wx, wh = (w.to(dtype) for w in _gate_halves(t, s))
    logit_h = m.y if s.gate_sees_output else t.x if s.add_input else t.base
    if "gate_weight" in need:
        assert t.gate_input is not None
        dwx = dlogit.t() @ wide(t.gate_input)
        dwh = torch.zeros_like(dwx) if logit_h is None else dlogit.t() @ wide(logit_h)
        both = dwx + dwh if s.gate == "middleX" else torch.cat((dwx, dwh), 1)
        grads["gate_weight"] = both[0]
    grads["gate_bias"] = dlogit.sum().view(1) if "gate_bias" in need else None
    small = dlogit.to(dtype)
    dh = dy if logit_h is None else torch.addcmul(dy, small, wh.unsqueeze(0))
    through_gate = small * wx if "gate_input" in need else None
    return dh, dh if s.gate_sees_output else dy, through_gate
