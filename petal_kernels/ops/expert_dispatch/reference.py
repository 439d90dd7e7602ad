"""``expert_dispatch`` by definition, in plain torch, for any dtype and device.

With x [.., D], experts e = 0 .. E - 1 of down_e [r, D], down_bias_e [r], up_e [O, r], up_bias_e
[O]:

    z_e = x down_e^T + down_bias_e                 [.., r]; one shared down: every z_e is z_0
    out = keep H + mix sum_e g_e (act(z_e) up_e^T + up_bias_e)     H = x | base | 0
    g   by ``gate``                                [.., E] fp32
          mean     1 / E                           (PETAL's released code)
          softmax  softmax(l), l = x router^T + router_bias + noise; with ``top_k``: over the k
                   largest l of a token (``renormalize``), or the softmax over all, kept at those k
          given    ``gates`` [.., E] or one row per sample; with ``indices`` [.., k]: gates[.., j]
                   is the weight of expert indices[.., j]
    router_input="pooled": l = xbar router^T + router_bias + noise, xbar the mean over a sample's
    tokens (with ``mask``, of those that count): one g per sample.

The gates are formed in fp32 and rounded to x's dtype before they multiply. Gradients, with dY = mix
dout and t_e = dY up_e:

    dg_e = <t_e, act(z_e)> + <dY, up_bias_e>, 0 where e is not chosen;  dl by the softmax
    dz_e = g_e t_e act'(z_e);  dx = keep dout + sum_e dz_e down_e + dl router
    ddown_e = dz_e^T x;  dup_e = dY^T (g_e act(z_e));  dup_bias_e = sum g_e dY;  drouter = dl^T x

Source: PETAL arXiv 2312.12458 (paper: a trainable gate; release: the mean), and the mixtures of
LoRA and adapters after it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime.numerics import activate, derivative, wide, wide_dtype
from petal_kernels.ops.expert_dispatch import routing


def token_weights(mask: Tensor | None, x: Tensor) -> Tensor:
    """Of the mean over a sample's tokens: [B, L]."""
    if mask is None:
        return wide(x).new_full(x.shape[:-1], 1.0 / max(x.shape[-2], 1))
    kept = mask.to(wide(x).dtype)
    return kept / kept.sum(-1, keepdim=True).clamp_min(1)


def _router_input(x: Tensor, router_input: str, mask: Tensor | None) -> Tensor:
    if router_input == "token":
        return wide(x)
    return (token_weights(mask, x).unsqueeze(-2) @ wide(x)).squeeze(-2)


def _gates(
    x: Tensor,
    experts: int,
    gate: str,
    router: Tensor | None,
    router_bias: Tensor | None,
    noise: Tensor | None,
    top_k: int | None,
    renormalize: bool,
    router_input: str,
    mask: Tensor | None,
    gates: Tensor | None,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g [.., E] or [B, E], logits and choice."""
    dtype = wide_dtype(x.dtype)
    if gate == "mean":
        return x.new_full((*x.shape[:-1], experts), 1.0 / experts, dtype=dtype), None, None
    if gate == "given":
        if indices is None:
            assert gates is not None
            return gates.to(dtype), None, None
        hit = F.one_hot(indices.long(), experts)
        values = torch.ones_like(indices, dtype=dtype) if gates is None else gates.to(dtype)
        return (values.unsqueeze(-1) * hit).sum(-2), None, hit.any(-2)
    assert router is not None
    bias = None if router_bias is None else router_bias.to(dtype)
    logits = F.linear(_router_input(x, router_input, mask), router.to(dtype), bias)
    if noise is not None:
        logits = logits + noise.to(dtype)
    chosen = None if top_k is None else routing.choose(logits, top_k)
    return routing.gates(logits, chosen, renormalize), logits, chosen


def _forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    base: Tensor | str | None = "input",
    keep: float = 1.0,
    mix: float = 1.0,
    activation: str = "identity",
    gate: str = "softmax",
    router: Tensor | None = None,
    router_bias: Tensor | None = None,
    noise: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    router_input: str = "token",
    mask: Tensor | None = None,
    gates: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """out, z [E, .., r], g for each token [.., E], logits, choice."""
    experts, dtype = up.shape[0], x.dtype
    g, logits, chosen = _gates(
        x, experts, gate, router, router_bias, noise, top_k, renormalize, router_input, mask, gates,
        indices,
    )  # fmt: skip
    if g.dim() < x.dim():
        g = g.unsqueeze(-2)
    g = g.expand(*x.shape[:-1], experts)
    z = []
    out = torch.zeros(*x.shape[:-1], up.shape[1], dtype=dtype, device=x.device)
    for e in range(experts):
        own = e if down.shape[0] > 1 else 0
        bias = None if down_bias is None else down_bias[own].to(dtype)
        z.append(F.linear(x, down[own].to(dtype), bias))
        bias = None if up_bias is None else up_bias[e].to(dtype)
        y = F.linear(activate(activation, z[-1]), up[e].to(dtype), bias)
        weighted = g[..., e, None].to(dtype) * y
        # An expert that was not chosen contributes nothing, not 0 times what may be infinite.
        if chosen is not None:
            per_token = chosen if chosen.dim() == x.dim() else chosen.unsqueeze(-2)
            weighted = weighted.masked_fill(~per_token[..., e, None], 0.0)
        out = out + weighted
    out = mix * out
    h = x if isinstance(base, str) else base
    if h is not None:
        out = keep * h + out
    return out, torch.stack(z), g, logits, chosen


def forward(x: Tensor, down: Tensor, up: Tensor, **options: object) -> tuple[Tensor]:
    """The output; the arguments are the public function's. Expert weights are rounded to x's dtype,
    the router works in fp32."""
    return (_forward(x, down, up, **options)[0],)  # type: ignore[arg-type]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.reshape(-1, a.shape[-1]).t() @ b.reshape(-1, b.shape[-1])


def _router_backward(
    x: Tensor,
    dgates: Tensor,
    logits: Tensor,
    chosen: Tensor | None,
    options: dict[str, object],
    grads: dict[str, Tensor],
) -> Tensor:
    """Adds the gradients of the router's arguments; what x gets through it."""
    router, mask = options["router"], options.get("mask")
    assert isinstance(router, Tensor)
    mask = mask if isinstance(mask, Tensor) else None
    pooled = options.get("router_input", "token") == "pooled"
    dl = dgates.sum(-2) if pooled else dgates
    dl = routing.gates_backward(dl, logits, chosen, bool(options.get("renormalize", True)))
    router_in = _router_input(x, "pooled" if pooled else "token", mask)
    grads["router"] = _outer(dl, router_in)
    grads["router_bias"] = dl.sum(tuple(range(dl.dim() - 1)))
    grads["noise"] = dl
    into = dl @ router
    return token_weights(mask, x).unsqueeze(-1) * into.unsqueeze(-2) if pooled else into


def backward(
    dout: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """Gradients by the written-out formulas, for fp32 and wider."""
    _, z, g, logits, chosen = _forward(x, down, up, down_bias, up_bias, **options)  # type: ignore[arg-type]
    get = options.get
    keep, mix = float(get("keep", 1.0)), float(get("mix", 1.0))  # type: ignore[arg-type]
    activation, base = str(get("activation", "identity")), get("base", "input")
    experts = up.shape[0]
    per_token = None if chosen is None else chosen
    if per_token is not None and per_token.dim() < x.dim():
        per_token = per_token.unsqueeze(-2).expand(*x.shape[:-1], experts)
    dy = mix * dout
    lead = tuple(range(dout.dim() - 1))
    dx = keep * dout if isinstance(base, str) else torch.zeros_like(x)
    ddown, dup = torch.zeros_like(down), torch.zeros_like(up)
    ddown_bias, dup_bias = down.new_zeros(down.shape[:2]), up.new_zeros(up.shape[:2])
    dgates = torch.zeros_like(g)
    for e in range(experts):
        own = e if down.shape[0] > 1 else 0
        weight, a = g[..., e, None], activate(activation, z[e])
        t = dy @ up[e]
        dgates[..., e] = (t * a).sum(-1)
        if up_bias is not None:
            dgates[..., e] += dy @ up_bias[e]
        dz = weight * t * derivative(activation, z[e])
        dx = dx + dz @ down[own]
        ddown[own] += _outer(dz, x)
        ddown_bias[own] += dz.sum(lead)
        dup[e] = _outer(weight * dy, a)
        dup_bias[e] = (weight * dy).sum(lead)
    if per_token is not None:
        dgates = dgates.masked_fill(~per_token, 0.0)
    grads = {"down": ddown, "up": dup, "down_bias": ddown_bias, "up_bias": dup_bias}
    if isinstance(base, Tensor):
        grads["base"] = keep * dout
    gates, indices = get("gates"), get("indices")
    if isinstance(gates, Tensor):
        if gates.dim() < x.dim():
            dgates = dgates.sum(-2)
        grads["gates"] = (
            dgates.gather(-1, indices.long()) if isinstance(indices, Tensor) else dgates
        )
    if logits is not None:
        dx = dx + _router_backward(x, dgates, logits, chosen, options, grads)
    grads["x"] = dx
    given = {"x": x, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias, **options}
    return {name: grad for name, grad in grads.items() if isinstance(given.get(name), Tensor)}
