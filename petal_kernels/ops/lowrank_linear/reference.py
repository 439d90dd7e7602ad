"""``lowrank_linear`` by definition, in plain torch, for any dtype and device.

With U = down [R, D], P_k = ups[k] [O_k, R], W_k = weights[k] [O_k, D] and x [..., D]:

    h    = drop_0(x) U^T   where dropout_at == "input", else x U^T       [..., R]
    m_k  = h               where dropout_at == "input": LoRA
    m_k  = drop_k(h)       where it is "bottleneck": PETAL, Aurora's BERT; the mask acts before the
                           core, which mode_contract folds into P_k = s V M_k^T
    m_k  = drop_k(h M_k)   where it is "mode": Aurora's ViT; core[k] = M_k, P_k = V
    y_k  = base_k + scale * m_k P_k^T,   base_k = x W_k^T + b_k | base[k] | 0

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


def _middles(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    outputs: int,
    core: Tensor | None,
    dropout: float,
    dropout_at: str,
    rng: Tensor | None,
) -> list[Tensor]:
    """m_k of every output."""
    if hidden is not None:
        h = hidden
    else:
        assert x is not None
        assert down is not None
        dropped = x
        if rng is not None and dropout_at == "input":
            dropped = x * _masks(rng, dropout, 1, x, x.shape[-1])[0]
        h = dropped @ down.to(x.dtype).t()
    middles = [h] * outputs if core is None else [h @ c.to(h.dtype) for c in core]
    if rng is not None and dropout_at != "input":
        masks = _masks(rng, dropout, outputs, h, h.shape[-1])
        middles = [m * mask for m, mask in zip(middles, masks, strict=True)]
    return middles


def forward(
    x: Tensor | None,
    down: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    base: Sequence[Tensor] | None = None,
    hidden: Tensor | None = None,
    core: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "bottleneck",
    rng: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The K outputs. ``rng`` must be given where ``dropout`` > 0; parameters are rounded to the
    activations' dtype."""
    if philox.threshold(dropout) == 0:
        rng = None
    middles = _middles(x, down, hidden, len(ups), core, dropout, dropout_at, rng)
    outputs = []
    for k, (m, up) in enumerate(zip(middles, ups, strict=True)):
        y = scale * (m @ up.to(m.dtype).t())
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
    down: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    base: Sequence[Tensor] | None = None,
    hidden: Tensor | None = None,
    core: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "bottleneck",
    rng: Tensor | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """Gradients by the written-out formulas.

    g_k = scale * mask_k * (dy_k P_k);  dP_k = scale * dy_k^T m_k;  dh = sum_k g_k (mode: g_k M_k^T,
    dM_k = h^T g_k); dU = dh^T drop(x);  dx = sum_k dy_k W_k + mask_0 * (dh U);  dbase_k = dy_k;
    db_k = column sums of dy_k.
    """
    if philox.threshold(dropout) == 0:
        rng = None
    k = len(ups)
    flat = [d.reshape(-1, d.shape[-1]) for d in douts]
    first = x if x is not None else hidden
    assert first is not None
    middles = _middles(x, down, hidden, k, core, dropout, dropout_at, rng)
    rank = middles[0].shape[-1]
    grads: dict[str, Tensor | list[Tensor]] = {
        "ups": [scale * d.t() @ m.reshape(-1, rank) for d, m in zip(flat, middles, strict=True)]
    }
    g = [scale * d @ up for d, up in zip(flat, ups, strict=True)]
    if rng is not None and dropout_at != "input":
        masks = philox.scaled_masks(rng, dropout, k, flat[0].shape[0], rank, first.dtype)
        g = [gk * mask for gk, mask in zip(g, masks, strict=True)]
    if core is not None:
        h = _middles(x, down, hidden, 1, None, 0.0, dropout_at, None)[0].reshape(-1, rank)
        grads["core"] = torch.stack([h.t() @ gk for gk in g])
        g = [gk @ c.t() for gk, c in zip(g, core, strict=True)]
    dh = torch.stack(g).sum(0)
    dx = None
    if weights is not None:
        dx = torch.stack([d @ w for d, w in zip(flat, weights, strict=True)]).sum(0)
        if biases is not None:
            grads["biases"] = [d.sum(0) for d in flat]
    if base is not None:
        grads["base"] = list(douts)
    if hidden is not None:
        grads["hidden"] = dh.view(hidden.shape)
    else:
        assert x is not None
        assert down is not None
        x2 = x.reshape(-1, x.shape[-1])
        through = dh @ down
        if rng is not None and dropout_at == "input":
            mask = philox.scaled_masks(rng, dropout, 1, x2.shape[0], x2.shape[1], x.dtype)[0]
            x2, through = x2 * mask, through * mask
        grads["down"] = dh.t() @ x2
        dx = through if dx is None else dx + through
    if dx is not None and x is not None:
        grads["x"] = dx.view(x.shape)
    return grads
