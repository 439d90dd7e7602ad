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

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox

PLANS = ("update", "augment", "merge")


def unsupported(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    base: Sequence[Tensor],
    core: Tensor | None,
    dropout: float,
    dropout_at: str,
    plan: str,
) -> list[str]:
    """Runs everywhere; plans it lacks are reasons."""
    if plan not in ("auto", *PLANS):
        return [f"has no plan {plan!r}"]
    return []


def _middles(
    h: Tensor, k: int, core: Tensor | None, rng: Tensor | None, p: float, dropout_at: str
) -> list[Tensor]:
    middles = [h] * k if core is None else [h @ c.to(h.dtype) for c in core]
    if rng is None or dropout_at == "input":
        return middles
    masks = philox.scaled_masks(rng, p, k, h.shape[0], h.shape[1], h.dtype)
    return [m * mask for m, mask in zip(middles, masks, strict=True)]


def _drop_input(x: Tensor, rng: Tensor | None, p: float, dropout_at: str) -> Tensor:
    if rng is None or dropout_at != "input":
        return x
    return x * philox.scaled_masks(rng, p, 1, x.shape[0], x.shape[1], x.dtype)[0]


def _merged(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.addmm(weight.to(wide), up.to(wide), down.to(wide), alpha=scale).to(weight.dtype)


def forward(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    base: Sequence[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    plan: str,
) -> tuple[list[Tensor], Tensor]:
    """Outputs [N, O_k] and h [N, R]."""
    if hidden is not None:
        h = hidden
    else:
        assert x is not None
        assert down is not None
        h = _drop_input(x, rng, dropout, dropout_at) @ down.to(x.dtype).t()
    if plan == "merge":
        assert x is not None
        assert down is not None
        return [
            F.linear(x, _merged(w, up, down, scale), b)
            for w, up, b in zip(weights, ups, biases, strict=True)
        ], h
    middles = _middles(h, len(ups), core, rng, dropout, dropout_at)
    outputs = []
    for k, (m, up) in enumerate(zip(middles, ups, strict=True)):
        p = up.to(m.dtype)
        if base:
            outputs.append(torch.addmm(base[k], m, p.t(), alpha=scale))
        elif not weights:
            outputs.append((m * scale) @ p.t())
        elif plan == "augment":
            assert x is not None
            extended = torch.cat((x, m * scale), dim=1)
            outputs.append(F.linear(extended, torch.cat((weights[k], p), dim=1), biases[k]))
        else:
            assert x is not None
            outputs.append(F.linear(x, weights[k], biases[k]).addmm_(m, p.t(), alpha=scale))
    return outputs, h


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor,
    down: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    need_dx: bool,
    need_ddown: bool,
    need_dups: bool,
    need_dcore: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor] | None, Tensor | None]:
    """dx, dh, ddown, dups, dcore."""
    k, dtype = len(ups), h.dtype
    dups = None
    if need_dups:
        middles = _middles(h, k, core, rng, dropout, dropout_at)
        dups = [
            (dy.t() @ m).mul_(scale).to(up.dtype)
            for dy, m, up in zip(dys, middles, ups, strict=True)
        ]
    g = [(dy @ up.to(dtype)).mul_(scale) for dy, up in zip(dys, ups, strict=True)]
    if rng is not None and dropout_at != "input":
        masks = philox.scaled_masks(rng, dropout, k, h.shape[0], h.shape[1], dtype)
        g = [gk.mul_(mask) for gk, mask in zip(g, masks, strict=True)]
    dcore = None
    if core is not None:
        if need_dcore:
            dcore = torch.stack([h.t() @ gk for gk in g]).to(core.dtype)
        g = [gk @ c.to(dtype).t() for gk, c in zip(g, core, strict=True)]
    dh = g[0]
    for gk in g[1:]:
        dh = dh.add_(gk)
    ddown = None
    if down is not None and need_ddown:
        assert x is not None
        ddown = (dh.t() @ _drop_input(x, rng, dropout, dropout_at)).to(down.dtype)
    dx = None
    if need_dx:
        for dy, w in zip(dys, weights, strict=False):
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
        if down is not None:
            through = down.to(dtype)
            if dropout_at == "input" and rng is not None:
                update = _drop_input(dh @ through, rng, dropout, dropout_at)
                dx = update if dx is None else dx.add_(update)
            else:
                dx = dh @ through if dx is None else dx.addmm_(dh, through)
    return dx, dh, ddown, dups, dcore
