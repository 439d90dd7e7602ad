"""``gated_mlp`` by definition, in plain torch, for any dtype and device.

With G, U [F, D] and W [O, F] the frozen weights of gate, up and down, b their biases, x [..., D]:

    g = x G^T + b_g + l_g(x)        u = x U^T + b_u + l_u(x)        [..., F]
    p = act(g) * u                                                  [..., F]
    y = p W^T + b_d + l_d(p)                                        [..., O]

Without G, the plain MLP: g = x U^T + b_u + l_u(x) and p = act(g). An update is LoRA's, of factors
A_k [R_k, in] = downs[k] and B_k [out, R_k] = ups[k], or nothing:

    l_k(t) = s_k drop_k(t) A_k^T B_k^T

k counts the linears in their order, gate, up, down (plain: up, down); ``drop_k`` multiplies by the
mask of stream k of ``_runtime/philox.py``. Source: gated linear units arXiv 2002.05202, LoRA
arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox
from petal_kernels._runtime.numerics import activate, derivative

Several = Sequence[Tensor | None] | None


def _nth(values: Several, k: int) -> Tensor | None:
    return None if values is None else values[k]


def _scale(scale: float | Sequence[float], k: int) -> float:
    return float(scale[k]) if isinstance(scale, Sequence) else scale


def _dropped(t: Tensor, k: int, dropout: float, rng: Tensor | None) -> Tensor:
    """drop_k(t)."""
    if rng is None or philox.threshold(dropout) == 0:
        return t
    rows, width = t.shape[:-1].numel(), t.shape[-1]
    return t * philox.scaled_mask(rng, dropout, k, rows, width, t.dtype).view(t.shape)


def _linear(
    t: Tensor,
    k: int,
    weights: Sequence[Tensor],
    biases: Several,
    downs: Several,
    ups: Several,
    scale: float | Sequence[float],
    dropout: float,
    rng: Tensor | None,
) -> Tensor:
    y = F.linear(t, weights[k], _nth(biases, k))
    down, up = _nth(downs, k), _nth(ups, k)
    if down is None or up is None:
        return y
    h = _dropped(t, k, dropout, rng) @ down.to(t.dtype).t()
    return y + _scale(scale, k) * (h @ up.to(t.dtype).t())


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Several = None,
    *,
    downs: Several = None,
    ups: Several = None,
    scale: float | Sequence[float] = 1.0,
    activation: str = "silu",
    dropout: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor]:
    """y. ``rng`` must be given where ``dropout`` > 0; factors are rounded to x's dtype."""
    rest = (weights, biases, downs, ups, scale, dropout, rng)
    last = len(weights) - 1
    p = activate(activation, _linear(x, 0, *rest))
    if last == 2:
        p = p * _linear(x, 1, *rest)
    return (_linear(p, last, *rest),)


def backward(
    dout: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Several = None,
    *,
    downs: Several = None,
    ups: Several = None,
    scale: float | Sequence[float] = 1.0,
    activation: str = "silu",
    dropout: float = 0.0,
    rng: Tensor | None = None,
) -> dict[str, Tensor | list[Tensor | None]]:
    """Gradients by the written-out formulas.

    Of a linear t -> t W^T + b + s drop(t) A^T B^T with the gradient dy of its output: dh = s dy B,
    dB = s dy^T drop(t) A^T, dA = dh^T drop(t), db the column sums of dy, dt = dy W + mask * (dh A).
    In between du = act(g) * dp and dg = act'(g) * u * dp.
    """
    rest = (weights, biases, downs, ups, scale, dropout, rng)
    last = len(weights) - 1
    x2, dy = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    g = _linear(x2, 0, *rest)
    a = activate(activation, g)
    u = _linear(x2, 1, *rest) if last == 2 else torch.ones_like(g)
    found: dict[str, list[Tensor | None]] = {
        name: [None] * len(weights) for name in ("downs", "ups", "biases")
    }

    def through(k: int, t: Tensor, dy: Tensor) -> Tensor:
        down, up, dt = _nth(downs, k), _nth(ups, k), dy @ weights[k]
        if _nth(biases, k) is not None:
            found["biases"][k] = dy.sum(0)
        if down is None or up is None:
            return dt
        seen = _dropped(t, k, dropout, rng)
        dh = _scale(scale, k) * dy @ up
        found["ups"][k] = _scale(scale, k) * dy.t() @ (seen @ down.t())
        found["downs"][k] = dh.t() @ seen
        return dt + _dropped(dh @ down, k, dropout, rng)

    dp = through(last, a * u, dy)
    dx = through(0, x2, derivative(activation, g) * u * dp)
    if last == 2:
        dx = dx + through(1, x2, a * dp)
    return {"x": dx.view(x.shape), **found}
