"""``gated_bottleneck`` by definition, in plain torch, for any dtype and device.

With x [B, L, D] (any leading dims where nothing is per sample), down [r, D], up [O, r], H = x, base
or 0:

    z   = x down^T + down_bias          [.., r]   (or given as ``bottleneck``)
    q   = route(z)                      with v = vision [B, V, r], already projected likewise:
          none  z                       add   z + mean(v)          mul   z * mean(v)
          expand  (sum_i z_i) mean(v)   gram  (z v^T) v            gram_relu  (relu(z) relu(v)^T) v
    Y   = H + act(q) up^T + up_bias     [.., O]
    u   = residual + drop(scale G Y),   G by ``gate``, with w = gate_weight:
          none     1
          large    sigmoid(act(gate_input gate_down^T + gate_down_bias) gate_up^T + gate_up_bias)
          middleX  sigmoid(w . (gate_input + H) + gate_bias)      per token
          middleY  1 + sigmoid(w)                                 per channel
          small    mean over tokens of sigmoid(w . [gate_input; H] + gate_bias)
                                                                  per sample, padding left out
    out = u, or LayerNorm(u)

``variant="release"`` is what the authors' code does: middleX and small read Y in place of H,
middleY is 1 + w, the mean of small includes padding, and gram takes v.reshape(B, r, V) for v^T.
``drop`` is stream 0 of ``_runtime/philox.py``. Gate logits are formed in fp32. Source: VL-PET
arXiv 2308.09804, VL-Adapter arXiv 2112.06825, routing functions arXiv 2403.09377.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox
from petal_kernels._runtime.numerics import activate, derivative, wide


def _transposed(vision: Tensor, variant: str) -> Tensor:
    if variant == "release":
        return vision.reshape(vision.shape[0], vision.shape[2], vision.shape[1])
    return vision.transpose(1, 2)


def route_values(route: str, z: Tensor, vision: Tensor | None, variant: str) -> Tensor:
    """q of the table above."""
    if route == "none":
        return z
    assert vision is not None
    if route in ("gram", "gram_relu"):
        left = _transposed(vision, variant)
        if route == "gram_relu":
            return (F.relu(z) @ F.relu(left)) @ vision
        return (z @ left) @ vision
    pooled = vision.mean(1, keepdim=True)
    if route == "add":
        return z + pooled
    if route == "mul":
        return z * pooled
    return z.sum(-1, keepdim=True) * pooled


@dataclass
class _Values:
    """Every intermediate of one forward."""

    h: Tensor | None
    z: Tensor
    q: Tensor
    a: Tensor
    y: Tensor
    gate: Tensor
    zg: Tensor | None = None
    logits: Tensor | None = None
    u: Tensor | None = None
    mask: Tensor | None = None


def _token_weights(mask: Tensor | None, like: Tensor) -> Tensor:
    """Of the mean over a sample's tokens: [B, L, 1]."""
    if mask is None:
        return wide(like).new_full((*like.shape[:-1], 1), 1.0 / max(like.shape[-2], 1))
    kept = mask.to(wide(like).dtype)
    return (kept / kept.sum(-1, keepdim=True).clamp_min(1)).unsqueeze(-1)


def _values(
    x: Tensor | None,
    down: Tensor | None,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    base: Tensor | str | None = "input",
    bottleneck: Tensor | None = None,
    activation: str = "gelu_tanh",
    route: str = "none",
    vision: Tensor | None = None,
    gate: str = "none",
    gate_input: Tensor | None = None,
    gate_down: Tensor | None = None,
    gate_down_bias: Tensor | None = None,
    gate_up: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    residual: Tensor | str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    variant: str = "paper",
    rng: Tensor | None = None,
) -> _Values:
    first = x if x is not None else bottleneck
    assert first is not None
    dtype = first.dtype

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    if bottleneck is not None:
        z = bottleneck
    else:
        assert x is not None
        assert down is not None
        z = F.linear(x, down.to(dtype), cast(down_bias))
    q = route_values(route, z, vision, variant)
    a = activate(activation, q)
    y = F.linear(a, up.to(dtype), cast(up_bias))
    h = x if isinstance(base, str) else base
    if h is not None:
        y = h + y
    v = _Values(h, z, q, a, y, y.new_ones(()))
    logit_h = y if variant == "release" else h if h is not None else torch.zeros_like(y)
    if gate == "large":
        assert gate_input is not None
        assert gate_down is not None
        assert gate_up is not None
        v.zg = F.linear(gate_input, gate_down.to(dtype), cast(gate_down_bias))
        logits = F.linear(activate(activation, v.zg), gate_up.to(dtype), cast(gate_up_bias))
        v.gate = torch.sigmoid(wide(logits))
    elif gate == "middleY":
        assert gate_weight is not None
        w = wide(gate_weight.to(dtype))
        v.gate = 1 + (w if variant == "release" else torch.sigmoid(w))
    elif gate in ("middleX", "small"):
        assert gate_input is not None
        assert gate_weight is not None
        w = wide(gate_weight.to(dtype))
        if gate == "middleX":
            logit = (wide(gate_input) + wide(logit_h)) @ w
        else:
            logit = wide(gate_input) @ w[: y.shape[-1]] + wide(logit_h) @ w[y.shape[-1] :]
        if gate_bias is not None:
            logit = logit + wide(gate_bias.to(dtype))
        v.logits = logit.unsqueeze(-1)
        v.gate = torch.sigmoid(v.logits)
        if gate == "small":
            weights = _token_weights(mask, y)
            v.gate = (weights * v.gate).sum(-2, keepdim=True)
    u = scale * v.gate.to(dtype) * y
    if rng is not None and philox.threshold(dropout):
        rows = y.shape[:-1].numel()
        v.mask = philox.scaled_masks(rng, dropout, 1, rows, y.shape[-1], dtype)[0].view(y.shape)
        u = u * v.mask
    if residual is not None:
        other = gate_input if isinstance(residual, str) else residual
        assert other is not None
        u = other + u
    v.u = u
    return v


def forward(x: Tensor | None, down: Tensor | None, up: Tensor, **options: object) -> tuple[Tensor]:
    """The output; the arguments are the public function's. ``rng`` must be given where ``dropout``
    > 0; parameters are rounded to the activations' dtype."""
    u = _values(x, down, up, **options).u  # type: ignore[arg-type]
    assert u is not None
    weight, bias = options.get("norm_weight"), options.get("norm_bias")
    if weight is None:
        return (u,)
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    eps = float(options.get("norm_eps", 1e-5))  # type: ignore[arg-type]
    return (F.layer_norm(u, u.shape[-1:], weight.to(u.dtype), bias.to(u.dtype), eps),)


def _norm_backward(
    dout: Tensor, u: Tensor, weight: Tensor, eps: float, grads: dict[str, Tensor]
) -> Tensor:
    """du of y = xhat * weight + bias, xhat = (u - mean) * rstd."""
    mean = u.mean(-1, keepdim=True)
    rstd = torch.rsqrt((u - mean).square().mean(-1, keepdim=True) + eps)
    xhat = (u - mean) * rstd
    lead = tuple(range(u.dim() - 1))
    grads["norm_weight"] = (dout * xhat).sum(lead)
    grads["norm_bias"] = dout.sum(lead)
    g = dout * weight
    return rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))


def _route_backward(
    route: str, dq: Tensor, z: Tensor, vision: Tensor | None, variant: str
) -> tuple[Tensor, Tensor | None]:
    """dz, dvision."""
    if route == "none":
        return dq, None
    assert vision is not None
    if route in ("gram", "gram_relu"):
        f = F.relu(z) if route == "gram_relu" else z
        left = _transposed(vision, variant)
        relu_left = F.relu(left) if route == "gram_relu" else left
        p = f @ relu_left
        dp = dq @ vision.transpose(1, 2)
        dvision = p.transpose(1, 2) @ dq
        dz, dleft = dp @ relu_left.transpose(1, 2), f.transpose(1, 2) @ dp
        if route == "gram_relu":
            dz, dleft = dz * (z > 0), dleft * (left > 0)
        if variant == "release":
            return dz, dvision + dleft.reshape(vision.shape)
        return dz, dvision + dleft.transpose(1, 2)
    pooled = vision.mean(1, keepdim=True)
    if route == "add":
        dz, dpooled = dq, dq.sum(1, keepdim=True)
    elif route == "mul":
        dz, dpooled = dq * pooled, (dq * z).sum(1, keepdim=True)
    else:
        s = z.sum(-1, keepdim=True)
        dz = (dq * pooled).sum(-1, keepdim=True).expand_as(z)
        dpooled = (dq * s).sum(1, keepdim=True)
    return dz, (dpooled / vision.shape[1]).expand_as(vision)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.reshape(-1, a.shape[-1]).t() @ b.reshape(-1, b.shape[-1])


def _add(grads: dict[str, Tensor], name: str, value: Tensor) -> None:
    grads[name] = grads[name] + value if name in grads else value


def _gate_backward(
    v: _Values, masked: Tensor, options: dict[str, object], grads: dict[str, Tensor]
) -> Tensor | None:
    """Adds the gradients of the gate's arguments; that of what it sees beside its input, if any."""
    get = options.get
    gate, variant = get("gate", "none"), str(get("variant", "paper"))
    scale, activation = float(get("scale", 1.0)), str(get("activation", "gelu_tanh"))  # type: ignore[arg-type]
    lead = tuple(range(masked.dim() - 1))
    gate_input = get("gate_input")
    w = get("gate_weight")
    if gate == "large":
        gate_up, gate_down = get("gate_up"), get("gate_down")
        assert isinstance(gate_up, Tensor)
        assert isinstance(gate_down, Tensor)
        assert isinstance(gate_input, Tensor)
        assert v.zg is not None
        dlogit = scale * masked * v.y * v.gate * (1 - v.gate)
        grads["gate_up"] = _outer(dlogit, activate(activation, v.zg))
        grads["gate_up_bias"] = dlogit.sum(lead)
        dzg = (dlogit @ gate_up) * derivative(activation, v.zg)
        grads["gate_down"] = _outer(dzg, gate_input)
        grads["gate_down_bias"] = dzg.sum(lead)
        _add(grads, "gate_input", dzg @ gate_down)
    elif gate == "middleY":
        assert isinstance(w, Tensor)
        dw = (scale * masked * v.y).sum(lead)
        s = torch.sigmoid(w)
        grads["gate_weight"] = dw if variant == "release" else dw * s * (1 - s)
    elif gate in ("middleX", "small"):
        assert isinstance(w, Tensor)
        assert isinstance(gate_input, Tensor)
        assert v.logits is not None
        s = torch.sigmoid(v.logits)
        dgate = (scale * masked * v.y).sum(-1, keepdim=True)
        if gate == "small":
            mask = get("mask")
            weights = _token_weights(mask if isinstance(mask, Tensor) else None, v.y)
            dgate = dgate.sum(-2, keepdim=True) * weights
        dlogit = dgate * s * (1 - s)
        logit_h = v.y if variant == "release" else v.h if v.h is not None else torch.zeros_like(v.y)
        d = v.y.shape[-1]
        wx, wh = (w, w) if gate == "middleX" else (w[:d], w[d:])
        dwx, dwh = (dlogit * gate_input).sum(lead), (dlogit * logit_h).sum(lead)
        grads["gate_weight"] = dwx + dwh if gate == "middleX" else torch.cat((dwx, dwh))
        grads["gate_bias"] = dlogit.sum().view(1)
        _add(grads, "gate_input", dlogit * wx)
        return dlogit * wh
    return None


def backward(
    dout: Tensor, x: Tensor | None, down: Tensor | None, up: Tensor, **options: object
) -> dict[str, Tensor]:
    """Gradients by the written-out formulas, for fp32 and wider.

    dv = scale mask du;  dY = G dv;  dlogit = dv Y G (1 - G) (large), its sum over channels
    (middleX), over the sample times the token's weight (small);  da = dY up;
    dz = route'(da act'(q));  dH = dY (+ dlogit w);  dup = dY^T a;  ddown = dz^T x;  the gate alike.
    In the code below `scale` multiplies last: what it multiplies is ``masked``.
    """
    v = _values(x, down, up, **options)  # type: ignore[arg-type]
    get = options.get
    assert v.u is not None
    variant, scale = str(get("variant", "paper")), float(get("scale", 1.0))  # type: ignore[arg-type]
    activation = str(get("activation", "gelu_tanh"))
    lead = tuple(range(dout.dim() - 1))
    grads: dict[str, Tensor] = {}
    du = dout
    weight = get("norm_weight")
    if isinstance(weight, Tensor):
        eps = float(get("norm_eps", 1e-5))  # type: ignore[arg-type]
        du = _norm_backward(dout, v.u, weight, eps, grads)
    residual = get("residual")
    if residual is not None:
        _add(grads, "gate_input" if isinstance(residual, str) else "residual", du)
    masked = du if v.mask is None else du * v.mask
    dy = scale * v.gate * masked
    dh = dy
    dseen = _gate_backward(v, masked, options, grads)
    if dseen is not None:
        dh = dy + dseen
        if variant == "release":
            dy = dh
    if isinstance(get("base", "input"), str):
        _add(grads, "x", dh)
    else:
        grads["base"] = dh
    grads["up"] = _outer(dy, v.a)
    grads["up_bias"] = dy.sum(lead)
    dq = (dy @ up) * derivative(activation, v.q)
    vision = get("vision")
    dz, dvision = _route_backward(
        str(get("route", "none")), dq, v.z, vision if isinstance(vision, Tensor) else None, variant
    )
    if dvision is not None:
        grads["vision"] = dvision
    if isinstance(get("bottleneck"), Tensor):
        grads["bottleneck"] = dz
    else:
        assert x is not None
        assert down is not None
        grads["down"] = _outer(dz, x)
        grads["down_bias"] = dz.sum(lead)
        _add(grads, "x", dz @ down)
    given = {"x": x, "down": down, "up": up, **options}
    return {name: g for name, g in grads.items() if isinstance(given.get(name), Tensor)}
