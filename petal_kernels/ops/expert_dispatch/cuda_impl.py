"""``expert_dispatch`` on CUDA: CUDA C++ kernels.

Kernels, in ``csrc/expert_dispatch/cuda``: ``sort.cu`` (sort, invert), ``forward.cu`` (fwd),
``backward.cu`` (rows), ``weights.cu`` (weights, sums, reduce).

Maths (N tokens, E experts, r rank of each, D input width, O output width, S slots = (token, expert)
pairs that were chosen; T = x.dtype; H is x, base or 0, l the logits, g the gates):

    fwd      l = x router^T + router_bias + noise, choice, g; z_e = x down_e^T + down_bias_e;
             out = keep H + mix sum_e g_e (act(z_e) up_e^T + up_bias_e)
    rows     t_e = dout up_e; a_e = act(z_e), ga_e = g_e a_e; dz_e = mix g_e t_e act';
             dg_e = mix (<t_e, a_e> + <dout, up_bias_e>); dl;
             dx = keep dout + sum_e dz_e down_e + dl router
    weights  dup_e = mix dout^T ga_e, ddown_e = dz_e^T x;  sums: dup_bias_e, drouter, sorted
             ddown_bias_e
    reduce   the splits of both in order

Stationary: one launch forward, four backward. Sorted: logits (top-k), sort (three small launches),
z by slots, out by tokens; backward inverts the order and has rows by slots before rows by tokens.
Shapes and strides: row tensors with unit column stride and any row stride, parameters with any
strides: a call casts and lays out the projections once, as [E r, D] and [O, E r].
Grid: in the headers of the .cu files. No block waits for another, nothing waits for the host.
Traffic, in elements, weights excluded, for H = x and S = N k. Stationary: forward reads x and
writes out, z and the logits: 2 N D + N E r; backward reads dout twice, x and z, writes dx, and
writes and reads dz and ga: 4 N D + 5 N E r (sums have dout and x from L2). Sorted: forward
reads x for the logits, k times gathered and as H, and writes out: (3 + k) N D + 2 S r; backward
reads dout by slots, by tokens and, with x, gathered for the weights: (2 + 3 k) N D + 5 S r. Nothing
is N k D large. The eager chain writes and reads N D numbers (sorted: k N D) at every step of an
expert. fp32 partials of at most 8 splits times the weights are written and read once in L2.
Numerics: fp32 accumulators, gates and epilogues; logits in fp32 of x and router as they are.
Rounded to T: z, ga, dz, out, dx. 16-bit products run on tensor cores (mma.sync), fp32 ones
are IEEE FMAs. Every reduction has a fixed order, the number of splits depends on shapes alone: same
bits on every run.
Limits: exactly what ``unsupported`` says.
Source: see ``reference.py``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels.ops.expert_dispatch import settings
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved, Tensors

MAX_RANK = 256
MAX_EXPERTS = 64  # a choice is a word of 64 bits
ROWS_PER_SPLIT = 256
MAX_SPLITS = 8

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WEIGHTS = ("up", "down", "up_bias", "router", "down_bias")  # in the kernel's order


class Work(NamedTuple):
    """What the kernels read and write besides their arguments, in their order."""

    z: Tensor | None = None
    logits: Tensor | None = None
    chosen: Tensor | None = None
    order: Tensor | None = None
    offsets: Tensor | None = None
    inverse: Tensor | None = None  # [N, E]: the slot of a token and an expert it chose
    out: Tensor | None = None
    dz: Tensor | None = None
    ga: Tensor | None = None  # g act(z)
    dx: Tensor | None = None
    dgates: Tensor | None = None  # with a router its logits' gradient
    gates: Tensor | None = None  # fp32 [N, E]
    dlogits: Tensor | None = None


def _ops() -> Any:
    return torch.ops.petal_cuda


@functools.cache
def _shared_bytes(dtype: torch.dtype, device: torch.device, experts: int, rank: int) -> int:
    """What a block of the widest kernel needs. By kind, since a dry run's tensors are fake."""
    like = torch.empty(0, dtype=dtype, device=device)
    return int(_ops().expert_dispatch_shared_bytes(like, experts, rank))


def unsupported(call: Call) -> list[str]:
    """Every reason for not running on these tensors; an empty list says that they can."""
    first = call.first
    reasons = []
    if first.device.type != "cuda":
        reasons.append(f"wants CUDA tensors, got {first.device.type}")
    if first.dtype not in _DTYPES:
        reasons.append(f"wants float32, float16 or bfloat16, got {first.dtype}")
    if call.rank > MAX_RANK:
        reasons.append(f"wants a rank of at most {MAX_RANK}, got {call.rank}")
    if call.experts > MAX_EXPERTS:
        reasons.append(f"wants at most {MAX_EXPERTS} experts, got {call.experts}")
    if first.device.type == "cuda" and not reasons:
        wanted = _shared_bytes(first.dtype, first.device, call.experts, call.rank)
        properties = torch.cuda.get_device_properties(first.device)
        found = int(getattr(properties, "shared_memory_per_block_optin", wanted))
        if found < wanted:
            reasons.append(f"wants {wanted} bytes of shared memory per block, got {found}")
    return reasons


def _arguments(call: Call, backward: bool) -> Tensors:
    """The tensors as the kernels read them; backward has a shared down once for every expert."""
    t, dtype, (experts, rank) = call.tensors, call.first.dtype, (call.experts, call.rank)
    down = t.down.to(dtype)
    if backward:
        down = down.expand(experts, rank, down.shape[-1])
    up = t.up.to(dtype).permute(1, 0, 2).reshape(t.up.shape[1], experts * rank)
    vectors = ("down_bias", "up_bias", "router", "router_bias", "noise", "gates", "chosen")
    flat: dict[str, Any] = {}
    for name in vectors:
        given: Tensor | None = getattr(t, name)
        flat[name] = None if given is None else given.contiguous()
    down = down.reshape(-1, down.shape[-1])
    return t._replace(down=_row_major(down), up=_row_major(up), **flat)


def _row_major(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def forward(call: Call, save: bool) -> tuple[Tensor, Saved]:
    """The output, and what backward needs."""
    first, s = call.first, call.settings
    n, experts, outs = call.rows, call.experts, call.tensors.up.shape[1]
    t, numbers = _arguments(call, False), settings.codes(call)
    is_sorted, topk = s.plan == "sorted", s.gate == "topk"
    work = Work(
        z=first.new_empty(call.z_shape),
        logits=first.new_empty(n, experts, dtype=torch.float32) if call.routed else None,
        chosen=first.new_empty(n, experts, dtype=torch.bool) if topk else None,
    )

    def run(work: Work, logits: bool, z: bool, by_slot: bool = False) -> None:
        _ops().expert_dispatch_fwd(list(t), list(work), *numbers, logits, z, by_slot)

    if is_sorted:
        if topk:
            run(work._replace(z=None), True, False)
        chosen = work.chosen if topk else t.chosen
        assert chosen is not None
        work = work._replace(
            order=first.new_empty(call.slots, dtype=torch.int32),
            offsets=first.new_empty(experts + 1, dtype=torch.int32),
            inverse=first.new_empty(n, experts, dtype=torch.int32),
        )
        _ops().expert_dispatch_fwd_sort(chosen, work.order, work.offsets, work.inverse)
        run(work, False, True, by_slot=True)
    out = first.new_empty(n, outs)
    run(work._replace(out=out), call.routed and not is_sorted, not is_sorted)
    return out, Saved(work.z, work.logits, work.chosen, work.order, work.offsets)


def _splits(call: Call) -> int:
    """Of the tokens, or of twice an expert's share of the slots."""
    rows = call.rows
    if call.settings.plan == "sorted":
        rows = min(rows, -(-2 * call.slots // call.experts))
    return max(1, min(MAX_SPLITS, -(-rows // ROWS_PER_SPLIT)))


def backward(
    call: Call, saved: Saved, dout: Tensor, dlogits: Tensor | None, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that ``need`` names."""
    s, n, experts = call.settings, call.rows, call.experts
    is_sorted = s.plan == "sorted"
    t, numbers = _arguments(call, True), settings.codes(call)
    through_router = bool(need & {"x", "router", "router_bias", "noise"})
    wants_gates = "gates" in need or (call.routed and through_router)
    side = (call.slots, call.rank) if is_sorted else (n, experts * call.rank)

    def empty(wanted: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor | None:
        return dout.new_empty(shape, dtype=dtype) if wanted else None

    work = Work(
        z=saved.z,
        logits=saved.logits,
        chosen=saved.chosen,
        order=saved.order,
        offsets=saved.offsets,
        inverse=empty(is_sorted, n, experts, dtype=torch.int32),
        dz=empty(bool(need & {"x", "down", "down_bias"}), *side),
        ga=empty("up" in need, *side),
        dx=empty("x" in need, n, t.down.shape[1]),
        dgates=empty(wants_gates, n, experts, dtype=torch.float32),
        gates=empty("up_bias" in need, n, experts, dtype=torch.float32),
        dlogits=None if dlogits is None else dlogits.contiguous(),
    )

    def rows(dz: bool, rest: bool, by_slot: bool = False) -> None:
        given = t._replace(x=None)
        _ops().expert_dispatch_bwd_rows(dout, list(given), list(work), *numbers, dz, rest, by_slot)

    forms_dz = wants_gates or work.dz is not None or work.ga is not None
    if is_sorted:
        _ops().expert_dispatch_bwd_invert(work.order, work.offsets, work.inverse)
        if forms_dz:
            rows(True, False, by_slot=True)
        forms_dz = False
    rows(forms_dz, True)
    return _collect(call, t, work, dout, need)


def _collect(
    call: Call, t: Tensors, work: Work, dout: Tensor, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients out of what the rows have left."""
    s, grads = call.settings, {}
    if work.dx is not None:
        grads["x"] = work.dx
    # Few numbers, and they often cancel: next to reading them, fp64 sums cost nothing.
    if work.dgates is not None:
        if "noise" in need:
            grads["noise"] = work.dgates
        if "router_bias" in need:
            grads["router_bias"] = work.dgates.sum(0, dtype=torch.float64)
        if "gates" in need:
            per_sample = work.dgates.view(-1, s.tokens_per_gate, call.experts)
            grads["gates"] = per_sample.sum(1) if s.tokens_per_gate > 1 else work.dgates
    by_kernel = set(_WEIGHTS)
    if s.plan == "stationary":
        by_kernel.remove("down_bias")
        if "down_bias" in need:
            assert work.dz is not None
            summed = work.dz.sum(0, dtype=torch.float64).view(-1, call.rank)
            grads["down_bias"] = summed.sum(0, keepdim=True) if call.shared_down else summed
    targets = []
    for name in _WEIGHTS:
        given: Tensor | None = getattr(call.tensors, name)
        wanted = name in need and name in by_kernel and given is not None
        targets.append(given.new_empty(given.shape) if wanted and given is not None else None)
    if any(target is not None for target in targets):
        left = work._replace(z=None, logits=None, chosen=None, dx=None)
        _ops().expert_dispatch_bwd_weights(
            dout, t.x, list(left), targets, call.experts, call.rank, s.mix, _splits(call)
        )
    grads.update({n: g for n, g in zip(_WEIGHTS, targets, strict=True) if g is not None})
    return grads
