"""``lowrank_linear`` on the torch backend: the shared algebra in library calls, on every device and
dtype.

One down-projection for all outputs, the core already folded into P_k, updates accumulated by the
GEMM that computes them (``addmm``), and three exact plans:

    update   y_k = linear(x, W_k, b_k), then y_k += scale * m_k P_k^T in place
    augment  y_k = [x | scale * m_k] [W_k | P_k]^T: one GEMM with a longer inner dimension; copies x
    merge    y_k = linear(x, W_k + scale * P_k U, b_k): no update at all; needs dropout off. The sum
             is formed in fp32 and rounded once: on a 16-bit base its error is that of storing the
             merged weight

Parameters of another dtype are rounded to x's before the products. Numerics are torch's: 16-bit
products accumulate in fp32 and every intermediate N x R tensor is rounded to x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox
from petal_kernels.ops.lowrank_linear.arguments import Call, Gradients, Saved, Settings

PLANS = ("update", "augment", "merge")


def unsupported(call: Call, plan: str) -> list[str]:
    """Runs everywhere; plans it lacks are reasons."""
    if plan not in ("auto", *PLANS):
        return [f"has no plan {plan!r}"]
    return []


def _masks(rng: Tensor | None, s: Settings, k: int, like: Tensor) -> list[Tensor] | None:
    """Of the K bottlenecks; None where they are not masked."""
    if rng is None or s.dropout_at == "input":
        return None
    rows, rank = like.shape
    return list(philox.scaled_masks(rng, s.dropout, k, rows, rank, like.dtype))


def _middles(call: Call, h: Tensor, rng: Tensor | None) -> list[Tensor]:
    t, s = call
    middles = [h] * len(t.ups) if t.core is None else [h @ c.to(h.dtype) for c in t.core]
    masks = _masks(rng, s, len(t.ups), h)
    return middles if masks is None else [m * k for m, k in zip(middles, masks, strict=True)]


def _drop_input(x: Tensor, rng: Tensor | None, s: Settings) -> Tensor:
    if rng is None or s.dropout_at != "input":
        return x
    return x * philox.scaled_masks(rng, s.dropout, 1, x.shape[0], x.shape[1], x.dtype)[0]


def _merged(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.addmm(weight.to(wide), up.to(wide), down.to(wide), alpha=scale).to(weight.dtype)


def forward(call: Call, rng: Tensor | None, plan: str) -> tuple[list[Tensor], Saved]:
    """Outputs [N, O_k] and h [N, R]."""
    t, s = call
    x, scale = t.x, s.scale
    if t.hidden is not None:
        h = t.hidden
    else:
        assert x is not None
        assert t.down is not None
        h = _drop_input(x, rng, s) @ t.down.to(x.dtype).t()
    if plan == "merge":
        assert x is not None
        assert t.down is not None
        return [
            F.linear(x, _merged(w, up, t.down, scale), b)
            for w, up, b in zip(t.weights, t.ups, t.biases, strict=True)
        ], Saved(h)
    outputs = []
    for k, (m, up) in enumerate(zip(_middles(call, h, rng), t.ups, strict=True)):
        p = up.to(m.dtype)
        if t.base:
            outputs.append(torch.addmm(t.base[k], m, p.t(), alpha=scale))
        elif not t.weights:
            outputs.append((m * scale) @ p.t())
        elif plan == "augment":
            assert x is not None
            extended = torch.cat((x, m * scale), dim=1)
            outputs.append(F.linear(extended, torch.cat((t.weights[k], p), dim=1), t.biases[k]))
        else:
            assert x is not None
            outputs.append(F.linear(x, t.weights[k], t.biases[k]).addmm_(m, p.t(), alpha=scale))
    return outputs, Saved(h)


def backward(
    call: Call, saved: Saved, dys: list[Tensor], rng: Tensor | None, need: frozenset[str]
) -> Gradients:
    """The gradients that ``need`` names."""
    t, s = call
    h, dtype = saved.h, saved.h.dtype
    dups = None
    if "ups" in need:
        dups = [
            (dy.t() @ m).mul_(s.scale).to(up.dtype)
            for dy, m, up in zip(dys, _middles(call, h, rng), t.ups, strict=True)
        ]
    g = [(dy @ up.to(dtype)).mul_(s.scale) for dy, up in zip(dys, t.ups, strict=True)]
    masks = _masks(rng, s, len(t.ups), h)
    if masks is not None:
        g = [gk.mul_(mask) for gk, mask in zip(g, masks, strict=True)]
    dcore = None
    if t.core is not None:
        if "core" in need:
            dcore = torch.stack([h.t() @ gk for gk in g]).to(t.core.dtype)
        g = [gk @ c.to(dtype).t() for gk, c in zip(g, t.core, strict=True)]
    dh = g[0]
    for gk in g[1:]:
        dh = dh.add_(gk)
    ddown = None
    if t.down is not None and "down" in need:
        assert t.x is not None
        ddown = (dh.t() @ _drop_input(t.x, rng, s)).to(t.down.dtype)
    dx = None
    if "x" in need:
        for dy, w in zip(dys, t.weights, strict=False):
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
        if t.down is not None:
            through = t.down.to(dtype)
            if s.dropout_at == "input" and rng is not None:
                update = _drop_input(dh @ through, rng, s)
                dx = update if dx is None else dx.add_(update)
            else:
                dx = dh @ through if dx is None else dx.addmm_(dh, through)
    return Gradients(dx, ddown, dh, dups, dcore)
