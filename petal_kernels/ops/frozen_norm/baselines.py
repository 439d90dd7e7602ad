"""What ``frozen_norm`` is measured against: the modules as transformers writes them, and torch's
own calls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels.ops.frozen_norm import reference


def published(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """LlamaRMSNorm's, GemmaRMSNorm's or nn.LayerNorm's forward."""
    if kind == "layer":
        return (F.layer_norm(x, x.shape[-1:], weight, bias, eps),)
    return reference.forward(x, weight, bias, kind=kind, eps=eps)


def library(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """torch's fused calls; of "rms" with one rounding."""
    if kind == "layer":
        return (F.layer_norm(x, x.shape[-1:], weight, bias, eps),)
    if kind == "rms_plus_one" and weight is not None:
        weight = weight + torch.ones((), dtype=weight.dtype, device=weight.device)
    return (F.rms_norm(x, x.shape[-1:], weight, eps),)


BASELINES = {"published": published, "eager": library}
