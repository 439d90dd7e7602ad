"""``expert_dispatch`` on the C++ CPU kernels (``csrc/expert_dispatch/cpu``).

The headers of the kernels write out in which order a block of rows goes through the maths of
``reference.py``.

Shapes: rows [N, width] with unit stride in the last dim and any row stride, parameters of any
strides. A task of the first stage owns a block of at most 192 rows of x and out (dout and dx),
stationary with all experts side by side, sorted with each expert's rows gathered within the block
and added back into it. A task of the second stage owns a strip of columns of one weight gradient.

Traffic: forward reads x (and base) once and writes out once, z once, sorted z twice (r wide).
Backward reads dout and z and writes dx once; the second stage reads x and dout once more per chosen
expert (stationary once), and two fp32 matrices shaped like z, or twice. The published loop passes
E tensors of N x O (sorted k) through memory some five times in forward alone.

Numerics: fp32 accumulation in index order, in the second stage over 128 rows at a time; z, g and
g act(z) are rounded to x's dtype, nothing else before a result; logits and gates are fp32.
Parameters are used as they are, without rounding to x's dtype. Every sum has one owner and a fixed
order: the same bits for any number of threads.

Source: see ``reference.py``. Limits: CPU tensors; fp32, fp16 or bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import front
from petal_kernels._runtime.rows import fresh_rows
from petal_kernels.ops.expert_dispatch import settings
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved, Tensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors."""
    reasons = []
    given = [call.first, *(t for t in call.tensors if t is not None)]
    if any(t.device.type != "cpu" for t in given):
        reasons.append("needs CPU tensors")
    wrong = sorted({str(t.dtype) for t in given if t.dtype not in (*_DTYPES, torch.bool)})
    if wrong:
        reasons.append(f"has no kernels for {', '.join(wrong)}")
    return reasons


def _arguments(call: Call) -> list[Any]:
    """What both kernels take first: small tensors contiguous, those of N x E numbers in fp32."""
    t = call.tensors
    small = {"noise": t.noise, "gates": t.gates}
    plain = {name: None if v is None else v.float().contiguous() for name, v in small.items()}
    rows = {"x": t.x, "base": t.base}
    kept = {n: v if v is None else v.contiguous() for n, v in t._asdict().items() if n not in rows}
    return [
        list(Tensors(**(rows | kept | plain))),
        *settings.codes(call),
    ]


def forward(call: Call, save: bool) -> tuple[Tensor, Saved]:
    """out [N, O] and what backward needs."""
    kernel = front.native("expert_dispatch_fwd")
    first, s, pairs = call.first, call.settings, (call.rows, call.experts)
    out = fresh_rows(first, call.rows, call.tensors.up.shape[1])
    z = fresh_rows(first, *call.z_shape) if save else None
    logits = first.new_empty(pairs, dtype=torch.float32) if call.routed else None
    chosen = first.new_empty(pairs, dtype=torch.bool) if s.gate == "topk" else None
    order = offsets = None
    if save and s.plan == "sorted":
        order = first.new_empty(call.slots, dtype=torch.int32)
        offsets = first.new_empty(call.experts + 1, dtype=torch.int32)
    saved = Saved(z, logits, chosen, order, offsets)
    empty = first.new_empty(0)
    results = [empty if r is None else r for r in (out, *saved)]
    kernel(*_arguments(call), results)
    return out, saved


def backward(
    call: Call, saved: Saved, dout: Tensor, dlogits: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in ``need``; ``dlogits`` is the losses' gradient of the logits."""
    kernel = front.native("expert_dispatch_bwd")
    t, s = call.tensors, call.settings
    grads: dict[str, Tensor] = {}
    for name, given in zip(Tensors._fields, t, strict=True):
        if name not in need:
            continue
        if name == "x":
            grads[name] = fresh_rows(dout, call.rows, t.down.shape[2])
        else:
            assert given is not None
            wide = torch.float32 if name in ("noise", "gates") else given.dtype
            grads[name] = torch.empty(given.shape, dtype=wide)
    flat_up = None
    if s.plan == "stationary":
        flat_up = t.up.permute(1, 0, 2).reshape(t.up.shape[1], -1)
    empty = dout.new_empty(0)
    kernel(
        *_arguments(call),
        dout,
        flat_up,
        None if dlogits is None else dlogits.contiguous(),
        [empty if kept is None else kept for kept in saved],
        [grads.get(name, empty) for name in Tensors._fields],
    )
    return grads
