"""What ``gated_mlp`` is measured against: LoRA as PEFT writes it, a well-written eager form, and
the frozen MLP without updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime.numerics import activate


def _nth(inputs: dict[str, Any], name: str, k: int) -> Any:
    values = inputs.get(name)
    return None if values is None else values[k]


def _scale(inputs: dict[str, Any], k: int) -> float:
    scale = inputs["scale"]
    return float(scale[k] if isinstance(scale, (tuple, list)) else scale)


def _base(t: Tensor, k: int, inputs: dict[str, Any]) -> Tensor:
    return F.linear(t, inputs["weights"][k], _nth(inputs, "biases", k))


def _peft(t: Tensor, k: int, inputs: dict[str, Any]) -> Tensor:
    """The factors in their own dtype, t cast to it, the sum cast back."""
    y, down, up = _base(t, k, inputs), _nth(inputs, "downs", k), _nth(inputs, "ups", k)
    if down is None:
        return y
    h = F.linear(F.dropout(t.to(down.dtype), inputs["dropout"]), down)
    return (y + F.linear(h, up) * _scale(inputs, k)).to(t.dtype)


def _added(t: Tensor, k: int, inputs: dict[str, Any]) -> Tensor:
    """The update added by the product that computes it."""
    y, down, up = _base(t, k, inputs), _nth(inputs, "downs", k), _nth(inputs, "ups", k)
    if down is None:
        return y
    h = F.linear(F.dropout(t, inputs["dropout"]), down.to(t.dtype)).flatten(0, -2)
    flat = y.reshape(-1, y.shape[-1])
    return flat.addmm(h, up.to(t.dtype).t(), alpha=_scale(inputs, k)).view(y.shape)


def _mlp(linear: Any, inputs: dict[str, Any]) -> tuple[Tensor]:
    last = len(inputs["weights"]) - 1
    p = activate(inputs["activation"], linear(inputs["x"], 0, inputs))
    if last == 2:
        p = p * linear(inputs["x"], 1, inputs)
    return (linear(p, last, inputs),)


def published(**inputs: Any) -> tuple[Tensor]:
    """PEFT's: every linear by itself, then act(gate) * up."""
    return _mlp(_peft, inputs)


def well_written(**inputs: Any) -> tuple[Tensor]:
    """One addmm for an update and its sum."""
    return _mlp(_added, inputs)


def floor(**inputs: Any) -> tuple[Tensor]:
    """Without updates: what any of the others costs on top of."""
    return _mlp(_base, inputs)


BASELINES = {"published": published, "eager": well_written}
