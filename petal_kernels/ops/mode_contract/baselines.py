"""What ``mode_contract`` is measured against: the published eager form, a well-written one."""

from __future__ import annotations

import torch
from torch import Tensor

from petal_kernels.ops.mode_contract import reference


def published(
    core: Tensor, modes: Tensor, up: Tensor | None = None, *, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """As the released code does it: one contraction per mode, then its own product with V."""
    out = []
    for p in modes:
        m = torch.diag(core * p) if core.dim() == 1 else (core @ p.unsqueeze(1)).squeeze(-1)
        out.append(scale * m if up is None else scale * (up @ m.t()))
    return (torch.stack(out),)


def well_written(
    core: Tensor, modes: Tensor, up: Tensor | None = None, *, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """Batched eager torch: one GEMM for all contractions, one batched GEMM for the fold."""
    return reference.forward(core, modes, up, scale=scale)


BASELINES = {"published": published, "eager": well_written}
