"""``gated_bottleneck`` on the C++ CPU kernels (``csrc/gated_bottleneck/cpu``).

The headers of the kernels write out in which order a block of rows goes through the maths of
``reference.py``. Everything N x O (Y, G, the logits, u and their gradients) exists for one block at
a time, in cache.

Shapes: rows [N, width] with unit stride in the last dim and any row stride, parameters of any
strides. In forward a task owns a block of at most 128 rows, in backward a split of the rows, of
whole samples where anything is summed over a sample. Under gate "small" a block holds whole
samples; one of more than 128 rows is walked twice, in backward forming Y twice.

Traffic: forward reads x, gate_input, base and residual once and writes out, z and zg once. Backward
reads dout, z, zg and the rows it needs once from memory (x and gate_input again from cache) and
writes every row gradient once. The published form with the large gate passes some 20 tensors of
N x O through memory in forward alone.

Numerics: fp32 accumulation in index order; z and zg are rounded to x's dtype, nothing else before a
result; gates, moments and every intermediate are fp32. Parameters are used as they are, without
rounding to x's dtype. exp, erf and sigmoid are polynomials within two units in the last place.
Weight, bias and gate-vector gradients are fp32 partials over splits that depend on N and the
samples alone, summed in order: the same bits for any number of threads.

Source: see ``reference.py``. Limits: CPU tensors; fp32, fp16 or bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import front
from petal_kernels._runtime.rows import fresh_rows
from petal_kernels.ops.gated_bottleneck import settings
from petal_kernels.ops.gated_bottleneck.arguments import Call, Saved, Tensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = []
    given = [call.first, *(t for t in call.tensors if t is not None)]
    if any(t.device.type != "cpu" for t in given):
        reasons.append("needs CPU tensors")
    wrong = sorted({str(t.dtype) for t in given if t.dtype not in _DTYPES})
    if wrong:
        reasons.append(f"has no kernels for {', '.join(wrong)}")
    return reasons


def _halves(call: Call) -> tuple[Tensor, Tensor]:
    """The logit's weights of gate_input and of what else it sees, fp32."""
    assert call.tensors.gate_weight is not None
    w, out = call.tensors.gate_weight.float(), call.tensors.up.shape[0]
    return w[:out], w[-out:]


def _derived(call: Call) -> list[Tensor | None]:
    """The gate of middleY; up^T w_h where the logit reads Y = H + a up^T + up_bias; the logit's
    bias."""
    t, s = call.tensors, call.settings
    if s.gate == "middleY":
        assert t.gate_weight is not None
        w = t.gate_weight.float()
        return [1 + (w if s.gate_linear else w.sigmoid()), None, None]
    if not call.has_logits:
        return [None] * 3
    bias = None if t.gate_bias is None else t.gate_bias.float()
    if not s.gate_sees_output:
        return [None, None, bias]
    _, weight_h = _halves(call)
    if t.up_bias is not None:
        through = (weight_h @ t.up_bias.float()).view(1)
        bias = through if bias is None else bias + through
    return [None, t.up.float().t() @ weight_h, bias]


def _arguments(call: Call, rng: Tensor | None) -> list[Any]:
    """What both kernels take first."""
    t, s = call.tensors, call.settings
    left, right = (None if m is None else m.contiguous() for m in (t.left, t.right))
    return [
        list(t._replace(left=left, right=right)),
        _derived(call),
        rng,
        *settings.codes(s, s.route),
    ]


def forward(
    call: Call, rng: Tensor | None, save: bool, out: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """out [N, O] and what backward needs; ``out`` is given where a sum overwrites its base."""
    kernel = front.native("gated_bottleneck_fwd")
    t, like = call.tensors, call.first
    rows = like.shape[0]
    out = fresh_rows(like, like.shape[0], t.up.shape[0]) if out is None else out
    z = None if t.bottleneck is not None else fresh_rows(like, like.shape[0], t.up.shape[1])
    zg = None if t.gate_down is None else fresh_rows(like, like.shape[0], t.gate_down.shape[0])
    logits = like.new_empty(rows, dtype=torch.float32) if call.has_logits else None
    moments = None
    if t.norm_weight is not None:
        moments = like.new_empty((rows, 2), dtype=torch.float32)
    saved = Saved(z, zg, logits, moments)
    empty = like.new_empty(0)
    results = [empty if r is None else r for r in (out, *saved)]
    kernel(*_arguments(call, rng), results)
    return out, saved


def backward(
    call: Call, saved: Saved, dout: Tensor, rng: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that ``need`` names."""
    kernel = front.native("gated_bottleneck_bwd")
    t, s = call.tensors, call.settings
    width = {"x": t.up.shape[0] if t.down is None else t.down.shape[1], "base": t.up.shape[0]}
    width["gate_input"] = t.up.shape[0] if t.gate_down is None else t.gate_down.shape[1]
    width["residual"], width["bottleneck"] = t.up.shape[0], t.up.shape[1]
    empty = dout.new_empty(0)
    grads: dict[str, Tensor] = {}
    for name, given in zip(Tensors._fields, t, strict=True):
        if name not in need:
            continue
        if name in width:
            grads[name] = fresh_rows(dout, dout.shape[0], width[name])
        elif name == "gate_weight":
            halves = (t.up.shape[0],) if s.gate == "middleY" else (2, t.up.shape[0])
            grads[name] = dout.new_zeros(halves, dtype=torch.float32)
        else:
            assert given is not None
            grads[name] = torch.empty(given.shape, dtype=given.dtype, device=given.device)
    kernel(
        *_arguments(call, rng),
        dout,
        [empty if s is None else s for s in saved],
        [grads.get(name, empty) for name in Tensors._fields],
    )
    if "gate_weight" in grads:
        grads["gate_weight"] = _gate_weight_gradient(call, grads["gate_weight"])
    return grads


def _gate_weight_gradient(call: Call, found: Tensor) -> Tensor:
    """From the gradient of middleY's gate, or of the two halves of the logit's weights."""
    gate, w = call.settings.gate, call.tensors.gate_weight
    if gate == "small":
        return found.view(-1)
    if gate == "middleX":
        return found.sum(0)
    assert w is not None
    if call.settings.gate_linear:
        return found
    sigmoid = w.float().sigmoid()
    return found * sigmoid * (1 - sigmoid)
