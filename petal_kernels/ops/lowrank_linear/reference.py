"""``lowrank_linear`` by definition, in plain torch, for any dtype and device.

With U = down [R, D], P_k = ups[k] [O_k, R], W_k = weights[k] [O_k, D] and x [..., D]:

    h    = drop_0(x) U^T   where dropout_at == "input", else x U^T       [..., R]
    m_k  = h               where dropout_at == "input": LoRA
    m_k  = drop_k(h)       where it is "bottleneck": PETAL, Aurora's BERT; the mask acts before the
                           core, which mode_contract folds into P_k = s V M_k^T
    m_k  = drop_k(h M_k)   where it is "mode": Aurora's ViT; core[k] = M_k, P_k = V
    y_k  = base_k + s_k m_k P_k^T,       base_k = x W_k^T + b_k | base[k] | 0

Where every output has a down-projection of its own, A_k = down[k] [R_k, D] and P_k [O_k, R_k]:

    h_k  = drop_k(x) A_k^T where dropout_at == "input" (LoRA), else x A_k^T   [..., R_k]
    m_k  = h_k, or drop_k(h_k) where it is "bottleneck"

``drop_j`` multiplies by the mask of stream j of ``_runtime/philox.py``. Source: PETAL
arXiv 2312.12458 (release: Tucker core; paper: CP), Aurora arXiv 2305.08381, LoRA arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import philox


def _masks(rng: Tensor, p: float, streams: int, x: Tensor, cols: int) -> Tensor:
    rows = x.shape[:-1].numel()
    masks = philox.scaled_masks(rng, p, streams, rows, cols, x.dtype)
    return masks.view(streams, *x.shape[:-1], cols)


Downs = Tensor | Sequence[Tensor] | None
Scale = float | Sequence[float]


def _list(down: Downs) -> list[Tensor]:
    """One that all outputs share, every output's own, or none."""
    if down is None:
        return []
    return [down] if isinstance(down, Tensor) and down.dim() == 2 else list(down)


def _scales(scale: Scale, outputs: int) -> list[float]:
    return list(scale) if isinstance(scale, (list, tuple)) else [scale] * outputs  # type: ignore[list-item]


def _inputs(
    x: Tensor, downs: Sequence[Tensor], dropout: float, dropout_at: str, rng: Tensor | None
) -> list[Tensor]:
    """x as every down-projection reads it."""
    if rng is None or dropout_at != "input":
        return [x] * len(downs)
    return [x * mask for mask in _masks(rng, dropout, len(downs), x, x.shape[-1])]


def _hidden(
    x: Tensor, downs: Sequence[Tensor], dropout: float, dropout_at: str, rng: Tensor | None
) -> list[Tensor]:
    """h_k of every down-projection."""
    inputs = _inputs(x, downs, dropout, dropout_at, rng)
    return [each @ d.to(x.dtype).t() for each, d in zip(inputs, downs, strict=True)]


def _middles(
    x: Tensor | None,
    downs: Sequence[Tensor],
    hidden: Tensor | None,
    outputs: int,
    core: Tensor | None,
    dropout: float,
    dropout_at: str,
    rng: Tensor | None,
) -> list[Tensor]:
    """m_k of every output."""
    if hidden is not None:
        hs = [hidden]
    else:
        assert x is not None
        hs = _hidden(x, downs, dropout, dropout_at, rng)
    middles = hs * outputs if len(hs) == 1 else hs
    if core is not None:
        middles = [h @ c.to(h.dtype) for h, c in zip(middles, core, strict=True)]
    if rng is not None and dropout_at != "input":
        return [m * _masks(rng, dropout, outputs, m, m.shape[-1])[k] for k, m in enumerate(middles)]
    return middles


def forward(
    x: Tensor | None,
    down: Downs,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    base: Sequence[Tensor] | None = None,
    hidden: Tensor | None = None,
    core: Tensor | None = None,
    scale: Scale = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "bottleneck",
    rng: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The K outputs. ``rng`` must be given where ``dropout`` > 0; parameters are rounded to the
    activations' dtype."""
    if philox.threshold(dropout) == 0:
        rng = None
    middles = _middles(x, _list(down), hidden, len(ups), core, dropout, dropout_at, rng)
    scales = _scales(scale, len(ups))
    outputs = []
    for k, (m, up) in enumerate(zip(middles, ups, strict=True)):
        y = scales[k] * (m @ up.to(m.dtype).t())
        if base is not None:
            y = base[k] + y
        elif weights is not None:
            assert x is not None
            y = F.linear(x, weights[k], None if biases is None else biases[k]) + y
        outputs.append(y)
    return tuple(outputs)


def backward(
    douts: Sequence[Tensor],
    x: Tensor | None,
    down: Downs,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    base: Sequence[Tensor] | None = None,
    hidden: Tensor | None = None,
    core: Tensor | None = None,
    scale: Scale = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "bottleneck",
    rng: Tensor | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """Gradients by the written-out formulas.

    g_k = s_k * mask_k * (dy_k P_k);  dP_k = s_k * dy_k^T m_k;  dh = sum_k g_k (mode: g_k M_k^T,
    dM_k = h^T g_k), or dh_k = g_k where every output has its own;  dA_k = dh_k^T drop_k(x);  dx =
    sum_k dy_k W_k + sum over the downs of mask_k * (dh_k A_k);  dbase_k = dy_k;  db_k = column sums
    of dy_k.
    """
    if philox.threshold(dropout) == 0:
        rng = None
    downs, scales = _list(down), _scales(scale, len(ups))
    k = len(ups)
    flat = [d.reshape(-1, d.shape[-1]) for d in douts]
    first = x if x is not None else hidden
    assert first is not None
    middles = _middles(x, downs, hidden, k, core, dropout, dropout_at, rng)
    grads: dict[str, Tensor | list[Tensor]] = {
        "ups": [
            s * d.t() @ m.reshape(-1, m.shape[-1])
            for s, d, m in zip(scales, flat, middles, strict=True)
        ]
    }
    g = [s * d @ up for s, d, up in zip(scales, flat, ups, strict=True)]
    if rng is not None and dropout_at != "input":
        g = [gk * _masks(rng, dropout, k, gk, gk.shape[1])[j] for j, gk in enumerate(g)]
    if core is not None:
        h = _middles(x, downs, hidden, 1, None, 0.0, dropout_at, None)[0].flatten(0, -2)
        grads["core"] = torch.stack([h.t() @ gk for gk in g])
        g = [gk @ c.t() for gk, c in zip(g, core, strict=True)]
    dhs = g if len(downs) > 1 else [torch.stack(g).sum(0)]
    dx = None
    if weights is not None:
        dx = torch.stack([d @ w for d, w in zip(flat, weights, strict=True)]).sum(0)
        if biases is not None:
            grads["biases"] = [d.sum(0) for d in flat]
    if base is not None:
        grads["base"] = list(douts)
    if hidden is not None:
        grads["hidden"] = dhs[0].view(hidden.shape)
    else:
        assert x is not None
        x2 = x.reshape(-1, x.shape[-1])
        ddowns, through = _through_downs(x2, downs, dhs, dropout, dropout_at, rng)
        grads["down"] = ddowns[0] if isinstance(down, Tensor) and down.dim() == 2 else ddowns
        dx = through if dx is None else dx + through
    if dx is not None and x is not None:
        grads["x"] = dx.view(x.shape)
    return grads


def _through_downs(
    x: Tensor,
    downs: Sequence[Tensor],
    dhs: Sequence[Tensor],
    dropout: float,
    dropout_at: str,
    rng: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Every dA_k, and what reaches x [N, D] by the down-projections."""
    inputs = _inputs(x, downs, dropout, dropout_at, rng)
    through = [dh @ down for dh, down in zip(dhs, downs, strict=True)]
    if rng is not None and dropout_at == "input":
        masks = _masks(rng, dropout, len(downs), x, x.shape[1])
        through = [each * mask for each, mask in zip(through, masks, strict=True)]
    return [dh.t() @ each for dh, each in zip(dhs, inputs, strict=True)], torch.stack(through).sum(
        0
    )
