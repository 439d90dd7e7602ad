"""``lowrank_linear`` on the torch backend: the shared algebra in library calls, on every device and
dtype.

One product with the down-projections, shared or every output's own, the core already folded into
P_k, updates accumulated by the GEMM that computes them (``addmm``), and three exact plans:

    update   y_k = linear(x, W_k, b_k), then y_k += s_k m_k P_k^T in place
    augment  y_k = [x | s_k m_k] [W_k | P_k]^T: one GEMM with a longer inner dimension; copies x
    merge    y_k = linear(x, W_k + s_k P_k U, b_k): no update at all; needs dropout off. The sum
             is formed in fp32 and rounded once: on a 16-bit base its error is that of storing the
             merged weight

Parameters of another dtype are rounded to x's before the products. Numerics are torch's: 16-bit
products accumulate in fp32 and every intermediate N x R tensor is rounded to x's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox
from petal_kernels.ops.lowrank_linear.arguments import Call, Gradients, Saved

PLANS = ("update", "augment", "merge")


def unsupported(call: Call, plan: str) -> list[str]:
    """Runs everywhere; plans it lacks are reasons."""
    if plan not in ("auto", *PLANS):
        return [f"has no plan {plan!r}"]
    return []


def _masks(rng: Tensor | None, call: Call, h: Tensor) -> list[Tensor] | None:
    """Of every output's bottleneck; None where they are not masked."""
    s = call.settings
    if rng is None or s.dropout_at == "input":
        return None
    spans, rows = call.spans, h.shape[0]
    widest = max(rank for _, rank in spans)
    # A mask does not depend on how many columns are drawn.
    masks = philox.scaled_masks(rng, s.dropout, len(spans), rows, widest, h.dtype)
    return [mask[:, :rank] for mask, (_, rank) in zip(masks, spans, strict=True)]


def _middles(call: Call, h: Tensor, rng: Tensor | None) -> list[Tensor]:
    t = call.tensors
    # Contiguous: oneDNN's 16-bit product multiplies what lies behind a row's end by zero, and a NaN
    # of a neighbour would come through.
    middles = [h[:, at : at + rank].contiguous() for at, rank in call.spans]
    if t.core is not None:
        middles = [m @ c.to(h.dtype) for m, c in zip(middles, t.core, strict=True)]
    masks = _masks(rng, call, h)
    return middles if masks is None else [m * k for m, k in zip(middles, masks, strict=True)]


def _inputs(call: Call, x: Tensor, rng: Tensor | None) -> Iterator[Tensor]:
    """x as each down-projection reads it, one after the other: none is kept."""
    s, count = call.settings, len(call.tensors.downs)
    if rng is None or s.dropout_at != "input":
        yield from [x] * count
        return
    rows, width = x.shape
    for stream in range(count):
        yield x * philox.scaled_mask(rng, s.dropout, stream, rows, width, x.dtype)


def _shrink(call: Call, rng: Tensor | None) -> Tensor:
    """h [N, R], or every output's side by side."""
    x, downs = call.tensors.x, call.tensors.downs
    assert x is not None
    if rng is None or call.settings.dropout_at != "input":
        return x @ _stacked(downs, x.dtype).t()
    products = [
        each @ d.to(x.dtype).t() for each, d in zip(_inputs(call, x, rng), downs, strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _stacked(downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    cast = [d.to(dtype) for d in downs]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def _merged(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.addmm(weight.to(wide), up.to(wide), down.to(wide), alpha=scale).to(weight.dtype)


def forward(call: Call, rng: Tensor | None, plan: str) -> tuple[list[Tensor], Saved]:
    """Outputs [N, O_k] and h [N, R]."""
    t, s = call
    x = t.x
    h = _shrink(call, rng) if t.hidden is None else t.hidden
    if plan == "merge":
        assert x is not None
        downs = t.downs if call.own_downs else [t.downs[0]] * len(t.ups)
        return [
            F.linear(x, _merged(w, up, down, scale), b)
            for w, up, down, scale, b in zip(
                t.weights, t.ups, downs, s.scales, t.biases, strict=True
            )
        ], Saved(h)
    outputs = []
    for k, (m, up) in enumerate(zip(_middles(call, h, rng), t.ups, strict=True)):
        p, scale = up.to(m.dtype), s.scales[k]
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
            (dy.t() @ m).mul_(scale).to(up.dtype)
            for dy, m, up, scale in zip(dys, _middles(call, h, rng), t.ups, s.scales, strict=True)
        ]
    g = [
        (dy @ up.to(dtype)).mul_(scale) for dy, up, scale in zip(dys, t.ups, s.scales, strict=True)
    ]
    masks = _masks(rng, call, h)
    if masks is not None:
        g = [gk.mul_(mask) for gk, mask in zip(g, masks, strict=True)]
    dcore = None
    if t.core is not None:
        if "core" in need:
            dcore = torch.stack([h.t() @ gk for gk in g]).to(t.core.dtype)
        g = [gk @ c.to(dtype).t() for gk, c in zip(g, t.core, strict=True)]
    if not call.own_downs:
        total = g[0]
        for gk in g[1:]:
            total = total.add_(gk)
        g = [total]
    ddowns = None
    if t.downs and "downs" in need:
        assert t.x is not None
        ddowns = [
            (dh.t() @ each).to(d.dtype)
            for dh, each, d in zip(g, _inputs(call, t.x, rng), t.downs, strict=True)
        ]
    dhidden = None
    if "hidden" in need:
        dhidden = torch.cat(g, dim=1) if call.own_downs else g[0]
    dx = _input_gradient(call, g, dys, rng) if "x" in need else None
    return Gradients(dx, ddowns, dhidden, dups, dcore)


def _input_gradient(
    call: Call, g: list[Tensor], dys: list[Tensor], rng: Tensor | None
) -> Tensor | None:
    """dx = sum_k dy_k W_k + sum over the downs of mask_k (dh_k A_k)."""
    t, s = call
    dx = None
    for dy, w in zip(dys, t.weights, strict=False):
        dx = dy @ w if dx is None else dx.addmm_(dy, w)
    masked = rng is not None and s.dropout_at == "input"
    for stream, (dh, down) in enumerate(zip(g, t.downs, strict=False)):
        through = down.to(dh.dtype)
        if masked:
            assert rng is not None
            update = dh @ through
            rows, width = update.shape
            update *= philox.scaled_mask(rng, s.dropout, stream, rows, width, update.dtype)
            dx = update if dx is None else dx.add_(update)
        else:
            dx = dh @ through if dx is None else dx.addmm_(dh, through)
    return dx
