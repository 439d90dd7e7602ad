"""What ``gated_bottleneck`` is measured against: the published eager form, a well-written one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime.numerics import activate
from petal_kernels.ops.gated_bottleneck import reference


def _drop(t: Tensor, inputs: dict[str, Any]) -> Tensor:
    return F.dropout(t, inputs["dropout"]) if inputs["dropout"] else t


def _heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Four down-projections and their concatenation, as released."""
    if weight.shape[0] % 4:
        return F.linear(x, weight, bias)
    parts = zip(weight.chunk(4), bias.chunk(4) if bias is not None else [None] * 4, strict=True)
    return torch.cat([F.linear(x, w, b) for w, b in parts], dim=-1)


def _routed(z: Tensor, inputs: dict[str, Any]) -> Tensor:
    v, route = inputs.get("vision"), inputs["route"]
    if v is None:
        return z
    if route == "expand":
        pooled = v.mean(1, keepdim=True)
        expanded: Tensor = pooled.expand(-1, z.shape[-1], -1).contiguous()
        return z @ expanded
    return reference.route_values(route, z, v, "paper")


def _finish(y: Tensor, gate: Tensor | None, inputs: dict[str, Any]) -> Tensor:
    y = y if gate is None else y * gate
    y = y * inputs["scale"] if inputs["scale"] != 1.0 else y
    y = _drop(y, inputs)
    residual = inputs.get("residual")
    if residual is not None:
        y = (inputs["gate_input"] if isinstance(residual, str) else residual) + y
    if inputs.get("norm_weight") is None:
        return y
    return F.layer_norm(y, y.shape[-1:], inputs["norm_weight"], inputs["norm_bias"])


def _new_gelu(z: Tensor) -> Tensor:
    """gelu_new as the authors' transformers computes it: eight element-wise operators."""
    inner = (2 / torch.pi) ** 0.5 * (z + 0.044715 * torch.pow(z, 3.0))
    return 0.5 * z * (1.0 + torch.tanh(inner))


def _adapter(inputs: dict[str, Any], published: bool) -> tuple[Tensor, Any]:
    name = inputs["activation"]

    def act(q: Tensor) -> Tensor:
        if published and name == "gelu_tanh":
            return _new_gelu(q)
        return activate(name, q)

    z = inputs.get("bottleneck")
    if z is None:
        down = _heads if published and inputs["gate"] != "none" else F.linear
        z = down(inputs["x"], inputs["down"], inputs.get("down_bias"))
    y = F.linear(act(_routed(z, inputs)), inputs["up"], inputs.get("up_bias"))
    base = inputs["base"]
    if base is not None:
        y = (inputs["x"] if isinstance(base, str) else base) + y
    return y, act


def published(**inputs: Any) -> tuple[Tensor]:
    """As the released code does it: a product per head, concatenations, every gate a matrix."""
    y, act = _adapter(inputs, True)
    x: Any = inputs.get("gate_input")
    w: Any = inputs.get("gate_weight")
    gate: Tensor | None = None
    if inputs["gate"] == "large":
        zg = F.linear(x, inputs["gate_down"], inputs.get("gate_down_bias"))
        logits = F.linear(act(zg), inputs["gate_up"], inputs.get("gate_up_bias"))
        gate = torch.sigmoid(logits)
    elif inputs["gate"] == "middleX":
        gate = torch.sigmoid(F.linear(x + y, w.unsqueeze(0), inputs.get("gate_bias")))
    elif inputs["gate"] == "middleY":
        gate = 1 + w
    elif inputs["gate"] == "small":
        both = torch.cat((x, y), dim=-1)
        gate = torch.sigmoid(F.linear(both, w.unsqueeze(0), inputs.get("gate_bias")))
        gate = gate.mean(-2, keepdim=True)
    if gate is not None:
        gate = gate.expand_as(y)
    return (_finish(y, gate, inputs),)


def well_written(**inputs: Any) -> tuple[Tensor]:
    """One product per projection, torch's own activation, gates by matrix-vector products."""
    y, act = _adapter(inputs, False)
    x: Any = inputs.get("gate_input")
    w: Any = inputs.get("gate_weight")
    gate: Tensor | None = None
    logit_h = inputs["x"] if isinstance(inputs["base"], str) else inputs["base"]
    bias = inputs.get("gate_bias")
    if inputs["gate"] == "large":
        zg = F.linear(x, inputs["gate_down"], inputs.get("gate_down_bias"))
        gate = F.linear(act(zg), inputs["gate_up"], inputs.get("gate_up_bias")).sigmoid()
    elif inputs["gate"] == "middleY":
        gate = 1 + w.sigmoid()
    elif inputs["gate"] != "none":
        o = y.shape[-1]
        logits = F.linear(x, w[None, :o], bias) + F.linear(logit_h, w[None, -o:])
        gate = logits.sigmoid()
        gate = gate.mean(-2, keepdim=True) if inputs["gate"] == "small" else gate
    return (_finish(y, gate, inputs),)


BASELINES = {"published": published, "eager": well_written}
