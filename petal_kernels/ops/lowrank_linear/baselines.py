"""What ``lowrank_linear`` is measured against: the published eager form, a well-written one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _rebase(y: Tensor, k: int, inputs: dict[str, Any]) -> Tensor:
    if inputs.get("base") is not None:
        base: Tensor = inputs["base"][k]
        return base + y
    if inputs.get("weights") is not None:
        biases = inputs.get("biases")
        return F.linear(inputs["x"], inputs["weights"][k], biases and biases[k]) + y
    return y


def _down(inputs: dict[str, Any], k: int) -> Tensor:
    """The down-projection of output k: its own, or the shared one."""
    down = inputs["down"]
    own: Tensor = down if isinstance(down, Tensor) else down[k]
    return own


def _scale(inputs: dict[str, Any], k: int) -> float:
    scale = inputs["scale"]
    return float(scale[k] if isinstance(scale, (tuple, list)) else scale)


def _drop(t: Tensor, inputs: dict[str, Any], site: str) -> Tensor:
    return F.dropout(t, inputs["dropout"]) if inputs["dropout_at"] == site else t


def published(**inputs: Any) -> tuple[Tensor, ...]:
    """Every output by itself: its own down-projection, dropout, core product and up-projection,
    then the add.

    The released code multiplies by M_k and V separately; the folded P_k = V M_k^T stands for both
    when no factors are given, so ``published`` is asked for the factored form through
    ``factors=(modes' M [K, R, R], V [O, R])``.
    """
    outs = []
    for k, up in enumerate(inputs["ups"]):
        x = inputs["x"]
        z = inputs.get("hidden")
        z = F.linear(_drop(x, inputs, "input"), _down(inputs, k)) if z is None else z
        z = _drop(z, inputs, "bottleneck")
        if inputs.get("core") is not None:
            z = _drop(z @ inputs["core"][k], inputs, "mode")
        if inputs.get("factors") is not None:
            m, v = inputs["factors"]
            y = F.linear(z @ m[k], v)
        else:
            y = F.linear(z, up)
        scale = _scale(inputs, k)
        outs.append(_rebase(scale * y if scale != 1.0 else y, k, inputs))
    return tuple(outs)


def well_written(**inputs: Any) -> tuple[Tensor, ...]:
    """The shared algebra in eager torch: one h where it is shared, P_k folded, updates by addmm."""
    x, hidden, shared = inputs["x"], inputs.get("hidden"), isinstance(inputs["down"], Tensor)
    h = hidden
    if hidden is None and shared:
        h = F.linear(_drop(x, inputs, "input"), inputs["down"])
    outs = []
    for k, up in enumerate(inputs["ups"]):
        z = F.linear(_drop(x, inputs, "input"), inputs["down"][k]) if h is None else h
        z = _drop(z, inputs, "bottleneck")
        if inputs.get("core") is not None:
            z = _drop(z @ inputs["core"][k], inputs, "mode")
        z2 = z.reshape(-1, z.shape[-1])
        if inputs.get("base") is not None:
            y = inputs["base"][k]
        elif inputs.get("weights") is not None:
            biases = inputs.get("biases")
            y = F.linear(x, inputs["weights"][k], biases and biases[k])
        else:
            outs.append(_scale(inputs, k) * F.linear(z, up))
            continue
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), z2, up.t(), alpha=_scale(inputs, k))
        outs.append(flat.view(y.shape))
    return tuple(outs)


BASELINES = {"published": published, "eager": well_written}
