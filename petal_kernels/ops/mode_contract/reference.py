"""``mode_contract`` by definition, in plain torch, for any dtype and device.

With modes p_k (rows of ``modes``), core C or lambda, and up-projection V:

    release (Tucker)  M_k[a, b] = sum_c C[a, b, c] p_k[c]         PETAL and Aurora as released
    paper   (CP)      M_k       = diag(lambda * p_k)              PETAL's and Aurora's figures
    fold              P_k       = scale * V M_k^T                 [O, R]

The variant is the core's shape: ``[R, R, R]`` or ``[R]``. Source: PETAL arXiv 2312.12458, Aurora
arXiv 2305.08381.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mode_matrices(core: Tensor, modes: Tensor) -> Tensor:
    """M [K, R, R] of every mode."""
    if core.dim() == 1:
        return torch.diag_embed(core * modes)
    return torch.einsum("abc,kc->kab", core, modes)


def forward(
    core: Tensor,
    modes: Tensor,
    up: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """``(P [K, O, R],)``, or ``(scale * M [K, R, R],)`` without ``up``."""
    m = mode_matrices(core, modes)
    out = scale * m if up is None else scale * torch.einsum("ob,kab->koa", up, m)
    return (out.to(core.dtype if dtype is None else dtype),)


def backward(
    dout: Tensor, core: Tensor, modes: Tensor, up: Tensor | None = None, *, scale: float = 1.0
) -> dict[str, Tensor]:
    """Gradients by the written-out formulas; ``dout`` is shaped like the output of ``forward``.

    dM_k = scale * dP_k^T V,  dV = scale * sum_k dP_k M_k,  dC[a, b, c] = sum_k dM_k[a, b] p_k[c],
    dp_k[c] = sum_ab dM_k[a, b] C[a, b, c];  CP: dlambda = sum_k diag(dM_k) p_k,  dp_k = lambda
    diag(dM_k).
    """
    dout = dout.to(core.dtype)
    grads: dict[str, Tensor] = {}
    if up is None:
        dm = scale * dout
    else:
        m = mode_matrices(core, modes)
        dm = scale * torch.einsum("koa,ob->kab", dout, up)
        grads["up"] = scale * torch.einsum("koa,kab->ob", dout, m)
    if core.dim() == 1:
        diagonal = torch.diagonal(dm, dim1=1, dim2=2)
        grads["core"] = (diagonal * modes).sum(0)
        grads["modes"] = diagonal * core
    else:
        grads["core"] = torch.einsum("kab,kc->abc", dm, modes)
        grads["modes"] = torch.einsum("kab,abc->kc", dm, core)
    return grads
