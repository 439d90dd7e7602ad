"""How ``expert_dispatch``'s Triton kernels are launched: arguments, grids, splits, buffers.

The kernels' documentation is in ``triton_impl.py``, which calls these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.expert_dispatch import routing
from petal_kernels.ops.expert_dispatch import triton_kernels as tk
from petal_kernels.ops.expert_dispatch import triton_kernels_bwd as tb
from petal_kernels.ops.expert_dispatch import triton_kernels_weights as tw
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved, Settings, Tensors
from petal_kernels.ops.expert_dispatch.triton_configs import REDUCE, choose

# The order of the reduction's arguments; the two sides, each summed over its own rows.
UP_SIDE = ("up", "up_bias")
DOWN_SIDE = ("down", "down_bias", "router")
SECTIONS = UP_SIDE + DOWN_SIDE


def _bytes(chosen: Tensor | None) -> Tensor | None:
    """A choice as the kernels' int8."""
    return None if chosen is None else chosen.contiguous().view(torch.int8)


@dataclass(frozen=True)
class Problem:
    """One call in the kernels' terms: dense small tensors and sizes."""

    t: Tensors
    s: Settings
    first: Tensor
    rows: int

    @classmethod
    def of(cls, call: Call) -> Problem:
        """Row tensors stay as they are; the others are copied only where they are not dense."""
        dense = {
            n: v if v is None or n in ("x", "base") else v.contiguous()
            for n, v in call.tensors._asdict().items()
        }
        return cls(Tensors(**dense), call.settings, call.first, call.rows)

    @property
    def experts(self) -> int:
        """E."""
        return self.t.up.shape[0]

    @property
    def downs(self) -> int:
        """A: down-projections, 1 where all experts share one."""
        return self.t.down.shape[0]

    @property
    def shared(self) -> bool:
        """Whether they do."""
        return self.downs < self.experts

    @property
    def rank(self) -> int:
        """r."""
        return self.t.up.shape[2]

    @property
    def out(self) -> int:
        """O."""
        return self.t.up.shape[1]

    @property
    def width(self) -> int:
        """D."""
        return self.t.down.shape[2]

    @property
    def sorted(self) -> bool:
        """Whether z lies in slots."""
        return self.s.plan == "sorted"

    @property
    def slots(self) -> int:
        """Of the sorted plan."""
        return self.rows * self.s.top_k

    @property
    def z_shape(self) -> tuple[int, int]:
        """Of z, and of dz but for a shared bottleneck."""
        return (self.slots, self.rank) if self.sorted else (self.rows, self.downs * self.rank)

    def config(self, kernel: str) -> dict[str, Any]:
        """The launch table's row, and what every launch of a kernel has."""
        where, size = lib.machine(self.first), self.first.element_size()
        tiles = choose(kernel, where, self.rows, size, self.rank, self.experts)
        return {**tiles, "PRECISION": lib.precision()}

    def gating(self) -> dict[str, Any]:
        """How kernels form the gates."""
        return {"GATE": self.s.gate, "RENORM": self.s.renormalize}

    def slot_tiles(self, block: int) -> tuple[int]:
        """Enough programs for tiles of one expert's slots, however they fall."""
        return (triton.cdiv(self.slots, block) + self.experts,)

    def row_tiles(self, block: int) -> tuple[int]:
        """Programs that own rows."""
        return (triton.cdiv(self.rows, block),)

    def slot_of(self, chosen: Tensor | None) -> Tensor | None:
        """Sorted: the slot of an expert's token [E, N], of those that are chosen; else None."""
        if not self.sorted:
            return None
        return self.per_token(chosen).t().reshape(-1).cumsum(0, dtype=torch.int32).sub_(1)

    def per_token(self, chosen: Tensor | None) -> Tensor:
        """The choice of each token, bool [N, E]."""
        assert chosen is not None
        length = self.s.tokens_per_gate
        return chosen if length == 1 else chosen.repeat_interleave(length, 0)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _route(p: Problem, logits: Tensor, chosen: Tensor | None) -> None:
    t, config = p.t, p.config("route")
    tk._expert_dispatch_route_kernel[p.row_tiles(config["BLOCK_M"])](
        logits, _bytes(chosen), t.x, t.router, t.router_bias, t.noise,
        p.rows, p.width, p.experts, p.s.top_k, _stride(t.x), GATE=p.s.gate, **config,
    )  # fmt: skip


def forward(p: Problem, save: bool) -> tuple[Tensor, Saved]:
    """out [N, O], the routing, and what backward needs where ``save``."""
    t, s, first = p.t, p.s, p.first
    out, z = first.new_empty(p.rows, p.out), first.new_empty(p.z_shape)
    pairs = (p.rows, p.experts)
    logits = None if t.router is None else first.new_empty(pairs, dtype=torch.float32)
    ours = first.new_empty(pairs, dtype=torch.bool) if s.gate == "topk" else None
    chosen = t.chosen if ours is None else ours
    order = offsets = slot_of = None
    if p.sorted:
        if logits is not None:
            _route(p, logits, ours)
        order, offsets = routing.sort_by_expert(p.per_token(chosen), p.slots)
        slot_of = p.slot_of(chosen)
        config = p.config("shrink")
        tk._expert_dispatch_shrink_kernel[p.slot_tiles(config["BLOCK_M"])](
            z, t.x, t.down, t.down_bias, order, offsets,
            p.width, p.rank, p.experts, p.downs, _stride(t.x), **config,
        )  # fmt: skip
    h = t.x if s.add_input else t.base
    config = p.config("fwd")
    tk._expert_dispatch_fwd_kernel[p.row_tiles(config["BLOCK_M"])](
        out, z, logits, _bytes(chosen), None if p.sorted else t.x, t.down, t.down_bias, h,
        t.up, t.up_bias, t.router, t.router_bias, t.noise, t.gates, slot_of,
        p.rows, s.tokens_per_gate, p.width, p.rank, p.out, p.experts, p.downs, s.top_k,
        _stride(t.x), _stride(h), out.stride(0), s.keep, s.mix,
        ACT=s.activation, SHARED=p.shared, **p.gating(), **config,
    )  # fmt: skip
    if not save:
        return out, Saved(None, logits, ours, None, None)
    return out, Saved(z, logits, ours, order, offsets)


@dataclass(frozen=True)
class Rows:
    """What the kernels over rows and slots leave: dx, and gradients of what has one number per
    gate (of ``gates`` per token) or per bottleneck."""

    x: Tensor | None
    z: Tensor | None
    gates: Tensor | None
    logits: Tensor | None


def rows_backward(
    p: Problem, saved: Saved, dout: Tensor, dlogits: Tensor | None, need: frozenset[str]
) -> Rows:
    """The gradients of N rows."""
    t, s = p.t, p.s
    routed = t.router is not None and not need.isdisjoint(("x", "router", "router_bias", "noise"))
    given = "gates" in need
    wants_z = not need.isdisjoint(("x", "down", "down_bias"))
    pairs = dout.new_empty(0, dtype=torch.float32)
    d = Rows(
        dout.new_empty(p.rows, p.width) if "x" in need else None,
        dout.new_empty(p.z_shape) if wants_z else None,
        pairs.new_empty(p.rows, p.experts) if given else None,
        pairs.new_empty(p.rows, p.experts) if routed else None,
    )
    if not (wants_z or given or routed):
        return d
    chosen = t.chosen if saved.chosen is None else saved.chosen
    slot_of, dg = p.slot_of(chosen), None
    if p.sorted:
        dg = pairs.new_empty(p.rows, p.experts) if given or routed else None
        config = p.config("slots")
        tb._expert_dispatch_bwd_slots_kernel[p.slot_tiles(config["BLOCK_M"])](
            d.z, dg, dout, saved.z, t.up, t.up_bias, saved.logits, t.gates, _bytes(chosen),
            saved.order, saved.offsets,
            s.tokens_per_gate, p.rank, p.out, p.experts, dout.stride(0), s.mix,
            ACT=s.activation, **p.gating(), **config,
        )  # fmt: skip
        if not (d.x is not None or given or routed):
            return d
    config = p.config("rows")
    tb._expert_dispatch_bwd_rows_kernel[p.row_tiles(config["BLOCK_M"])](
        d.x, d.z, d.gates, d.logits, dout, saved.z, dg, saved.logits, t.gates, _bytes(chosen),
        None if dlogits is None else dlogits.contiguous(), slot_of,
        t.down, t.up, t.up_bias, t.router,
        p.rows, s.tokens_per_gate, p.width, p.rank, p.out, p.experts, p.downs,
        dout.stride(0), s.keep, s.mix,
        ACT=s.activation, SHARED=p.shared, ADD_INPUT=s.add_input, **p.gating(), **config,
    )  # fmt: skip
    return d


def _small_sums(p: Problem, d: Rows, need: frozenset[str]) -> dict[str, Tensor]:
    """Gradients that are sums of N x E numbers, or those themselves."""
    found = {}
    if d.gates is not None:
        length = p.s.tokens_per_gate
        found["gates"] = d.gates.view(-1, length, p.experts).sum(1) if length > 1 else d.gates
    if d.logits is not None and "router_bias" in need:
        found["router_bias"] = d.logits.sum(0, dtype=torch.float64)  # so little that it is free
    if d.logits is not None and "noise" in need:
        found["noise"] = d.logits
    return found


def weights_backward(
    p: Problem, saved: Saved, dout: Tensor, d: Rows, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of the parameters: partial sums over splits of the rows, then their sums."""
    grads = _small_sums(p, d, need)
    given = {n: getattr(p.t, n) for n in SECTIONS if n in need}
    if not given:
        return grads
    grads |= {n: torch.empty_like(v) for n, v in given.items()}
    starts, total = {}, 0
    for n, v in given.items():
        starts[n] = total
        total += triton.cdiv(v.numel(), lib.ALIGNED.value) * lib.ALIGNED.value
    config = p.config("weights")
    tiles = p.experts * triton.cdiv(max(p.out, p.width), config["BLOCK_W"])
    splits = lib.row_splits(lib.machine(dout), p.rows, tiles, config["BLOCK_M"], total * 4)
    part = torch.empty((splits, total), dtype=torch.float32, device=dout.device)
    sections = {n: part[:, start : start + given[n].numel()] for n, start in starts.items()}
    for up in (True, False):
        if not need.isdisjoint(UP_SIDE if up else DOWN_SIDE):
            _weights_launch(p, saved, dout, d, sections, part, config, up)
    largest = max(v.numel() for v in given.values())
    block = dict(REDUCE.blocks)["BLOCK"]
    tw._expert_dispatch_bwd_reduce_kernel[(triton.cdiv(largest, block), len(SECTIONS))](
        part, *[grads.get(n) for n in SECTIONS],
        *[given[n].numel() if n in given else 0 for n in SECTIONS], splits, total,
        **REDUCE.keywords(),
    )  # fmt: skip
    return grads


def _weights_launch(
    p: Problem,
    saved: Saved,
    dout: Tensor,
    d: Rows,
    sections: dict[str, Tensor],
    part: Tensor,
    config: dict[str, Any],
    up: bool,
) -> None:
    t, s = p.t, p.s
    rows, small, width = (dout, saved.z, p.out) if up else (t.x, d.z, p.width)
    matrix, vector, wide = (sections.get(n) for n in (("up", "", "up_bias") if up else DOWN_SIDE))
    experts = 0 if matrix is None and vector is None else p.experts if up else p.downs
    chosen = t.chosen if saved.chosen is None else saved.chosen
    if not up and (p.sorted or p.shared):
        chosen = None  # dz has every row that is read
    tiles = 1 if matrix is None and wide is None else triton.cdiv(width, config["BLOCK_W"])
    tw._expert_dispatch_bwd_weights_kernel[(experts + (wide is not None), tiles, part.shape[0])](
        matrix, vector, wide, rows, small, d.logits, saved.logits, t.gates, _bytes(chosen),
        saved.order, saved.offsets, experts, part.shape[0], part.stride(0),
        p.rows, s.tokens_per_gate, p.rank, width, p.experts, p.downs, _stride(rows), s.mix,
        UP=up, ACT=s.activation, **p.gating(), **config,
    )  # fmt: skip
