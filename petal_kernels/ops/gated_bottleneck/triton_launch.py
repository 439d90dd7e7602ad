"""How ``gated_bottleneck``'s Triton kernels are launched: arguments, grids, splits, buffers.

The kernels' documentation is in ``triton_impl.py``, which calls these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels._runtime import triton_lib as lib
from petal_kernels.ops.gated_bottleneck import triton_kernels as tk
from petal_kernels.ops.gated_bottleneck import triton_kernels_bwd as tb
from petal_kernels.ops.gated_bottleneck import triton_kernels_weights as tw
from petal_kernels.ops.gated_bottleneck.arguments import Call, Saved, Settings, Tensors
from petal_kernels.ops.gated_bottleneck.triton_configs import REDUCE, choose

# The order of the reduction's arguments.
SECTIONS = (
    "up", "gate_up", "down", "gate_down", "up_bias", "gate_up_bias", "gate_weight", "norm_weight",
    "norm_bias",
)  # fmt: skip


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@dataclass(frozen=True)
class Problem:
    """One call in the kernels' terms: dense small tensors, sizes, what a program may own."""

    t: Tensors
    s: Settings
    rows: int

    @classmethod
    def of(cls, call: Call, rows: int) -> Problem:
        """Row tensors stay as they are; the others are copied only where they are not dense."""
        t = call.tensors
        kept = ("x", "bottleneck", "base", "gate_input", "residual")
        dense: dict[str, Any] = {n: _dense(v) for n, v in t._asdict().items() if n not in kept}
        return cls(t._replace(**dense), call.settings, rows)

    @property
    def rank(self) -> int:
        """r."""
        return self.t.up.shape[1]

    @property
    def out(self) -> int:
        """O."""
        return self.t.up.shape[0]

    @property
    def width(self) -> int:
        """D, or 0 where z is given."""
        return 0 if self.t.down is None else self.t.down.shape[1]

    @property
    def gate_rank(self) -> int:
        """rg, or 0 where there is none."""
        return 0 if self.t.gate_down is None else self.t.gate_down.shape[0]

    @property
    def gate_width(self) -> int:
        """Dg of the large gate, or 0."""
        return 0 if self.t.gate_down is None else self.t.gate_down.shape[1]

    @property
    def tokens(self) -> int:
        """V, or 0."""
        return 0 if self.t.left is None else self.t.left.shape[1]

    @property
    def route(self) -> str:
        """The kernels' name of the route: a product with one vision token needs no samples."""
        if self.s.route == "product" and self.tokens == 1 and self.t.right is not None:
            return "outer"
        return self.s.route

    @property
    def normed(self) -> bool:
        """Whether a LayerNorm follows."""
        return self.t.norm_weight is not None

    @property
    def row_gate(self) -> bool:
        """Whether the gate is one number per row."""
        return self.s.gate in ("middleX", "small")

    @property
    def base(self) -> Tensor | None:
        """H."""
        return self.t.x if self.s.add_input else self.t.base

    @property
    def residual(self) -> Tensor | None:
        """What u adds."""
        return self.t.gate_input if self.s.add_gate_input else self.t.residual

    def config(self, kernel: str, like: Tensor) -> dict[str, Any]:
        """The launch table's row."""
        where, itemsize = lib.machine(like), like.element_size()
        return choose(kernel, where, self.rows, itemsize, self.rank, self.gate_rank)

    def grid(self, block_m: int) -> tuple[int, int, int, int]:
        """Programs, programs per part, rows per part, rows per sample. A part is a sample where a
        program must own rows of one, else everything."""
        length = self.rows // self.s.samples
        per_sample = self.route == "product" or self.s.gate == "small"
        parts = self.s.samples if per_sample else 1
        rows = self.rows // parts
        tiles = triton.cdiv(rows, block_m)
        return parts * tiles, tiles, rows, length


@dataclass(frozen=True)
class Dropout:
    """The generator's arguments of a launch; ``scale`` is the settings' times that of kept
    elements."""

    rng: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, rng: Tensor | None, s: Settings) -> Dropout:
        """A probability that rounds to zero is no dropout."""
        threshold = philox.threshold(s.dropout)
        if rng is None or threshold == 0:
            return cls(None, 0, s.scale)
        return cls(rng, threshold, s.scale * philox.keep_scale(s.dropout))


def _stride(*tensors: Tensor | None) -> int:
    return next((t.stride(0) for t in tensors if t is not None), 0)


def _weight_a(p: Problem) -> Tensor:
    """What the released gates read of Y beyond H: up^T w_h, the weight of a, then w_h . up_bias;
    fp32 [r + 1]."""
    assert p.t.gate_weight is not None
    w = p.t.gate_weight[-p.out :].float()
    constant = w.new_zeros(1) if p.t.up_bias is None else (w @ p.t.up_bias.float()).view(1)
    return torch.cat((w @ p.t.up.float(), constant))


def forward(
    p: Problem, first: Tensor, drop: Dropout, save: bool, out: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """out [N, O], and what backward needs where ``save``."""
    t, s = p.t, p.s
    given = t.bottleneck is not None
    small = s.gate == "small"
    out = first.new_empty(p.rows, p.out) if out is None else out
    slices = p.route == "product" and t.right is None  # the route reads z again
    z = t.bottleneck
    if not given and (save or small or slices):
        z = first.new_empty(p.rows, p.rank)
    zg = first.new_empty(p.rows, p.gate_rank) if s.gate == "large" and save else None
    wide: dict[str, Any] = {"dtype": torch.float32, "device": first.device}
    logits = torch.empty(p.rows, **wide) if p.row_gate and (save or small) else None
    moments = torch.empty(p.rows, 2, **wide) if p.normed and save else None
    weight_a = _weight_a(p) if p.row_gate and s.gate_sees_output else None
    config = p.config("fwd", first)
    programs, *parts = p.grid(config["BLOCK_M"])

    def launch(out: Tensor | None, x: Tensor | None, with_logits: bool) -> None:
        tk._gated_bottleneck_fwd_kernel[(programs,)](
            out, z, zg, logits, moments,
            x, t.down, t.down_bias, p.base, t.up, t.up_bias, t.left, t.right,
            t.gate_input, t.gate_down, t.gate_down_bias, t.gate_up, t.gate_up_bias,
            t.gate_weight, t.gate_bias, weight_a, t.token_weights, p.residual,
            t.norm_weight, t.norm_bias, drop.rng,
            *parts, p.tokens, p.width, p.rank, p.out, p.gate_width, p.gate_rank,
            _stride(x), _stride(z), _stride(p.base), _stride(t.gate_input), _stride(p.residual),
            _stride(out), drop.scale, s.norm_eps, drop.threshold,
            ACT=s.activation, ROUTE=p.route, RELU=s.route_relu, GATE=s.gate, LINEAR=s.gate_linear,
            LOGITS=with_logits, PRECISION=lib.precision(), **config,
        )  # fmt: skip

    x = None if given else t.x
    if small:
        launch(None, x, True)
        launch(out, None, False)
    else:
        launch(out, x, p.row_gate)
    return out, Saved(None if given else z, zg, logits, moments)


@dataclass(frozen=True)
class Rows:
    """What the row kernel leaves: gradients of row tensors, and the weights kernel's operands."""

    x: Tensor | None
    base: Tensor | None
    gate_input: Tensor | None
    residual: Tensor | None
    z: Tensor | None
    zg: Tensor | None
    q: Tensor | None
    a: Tensor | None
    ag: Tensor | None
    sums: Tensor | None

    @classmethod
    def empty(cls, p: Problem, dout: Tensor, need: frozenset[str]) -> Rows:
        """The buffers for the gradients that ``need`` names."""

        def buffer(wanted: bool, width: int) -> Tensor | None:
            return dout.new_empty(p.rows, width) if wanted else None

        large = p.s.gate == "large"
        through = "x" in need and p.t.down is not None
        wants_z = through or bool(need & {"down", "down_bias", "bottleneck", "left", "right"})
        wants_zg = large and bool(need & {"gate_down", "gate_down_bias", "gate_input"})
        slices = p.route == "product" and p.t.right is None
        wants_q = wants_z and (slices or bool(need & {"left", "right"}))
        out = bool(out_side(need))
        sums = p.normed or p.row_gate
        return cls(
            x=buffer("x" in need, p.width if p.t.down is not None else p.out),
            base=buffer("base" in need, p.out),
            gate_input=buffer("gate_input" in need, p.gate_width if large else p.out),
            residual=buffer("residual" in need, p.out),
            z=buffer(wants_z, p.rank),
            zg=buffer(wants_zg, p.gate_rank),
            q=buffer(wants_q, p.rank),
            a=buffer(out, p.rank),
            ag=buffer(out and large, p.gate_rank),
            sums=dout.new_empty(5, p.rows, dtype=torch.float32) if sums else None,
        )


def out_side(names: Iterable[str]) -> list[str]:
    """The parameters whose gradients are sums over dY and its like, in SECTIONS' order."""
    return [n for n in SECTIONS if n in names and n not in ("down", "gate_down")]


def rows_backward(
    p: Problem, saved: Saved, dout: Tensor, drop: Dropout, need: frozenset[str]
) -> Rows:
    """The gradients of N rows."""
    t, s = p.t, p.s
    z = t.bottleneck if t.bottleneck is not None else saved.z
    assert z is not None
    d = Rows.empty(p, dout, need)
    values = p.normed or s.gate != "none"
    h = p.base if values else None
    residual = p.residual if p.normed else None
    config = p.config("rows", dout)
    programs, *parts = p.grid(config["BLOCK_M"])
    dh = d.x if s.add_input else d.base
    dx = d.x if t.down is not None else None

    def launch(sums: bool, grads: bool) -> None:
        tb._gated_bottleneck_bwd_rows_kernel[(programs,)](
            dout, dx, dh, d.gate_input, d.residual, d.z, d.zg, d.q, d.a, d.ag, d.sums,
            z, saved.zg, saved.logits, saved.moments, t.down, h, t.up, t.up_bias,
            t.left, t.right, t.gate_down, t.gate_up, t.gate_up_bias, t.gate_weight,
            t.token_weights, residual, t.norm_weight, drop.rng,
            *parts, p.rows, p.tokens, p.width, p.rank, p.out, p.gate_width, p.gate_rank,
            dout.stride(0), z.stride(0), _stride(h), _stride(residual), drop.scale, drop.threshold,
            ACT=s.activation, ROUTE=p.route, RELU=s.route_relu, GATE=s.gate, LINEAR=s.gate_linear,
            SEES_OUTPUT=s.gate_sees_output, SUMS=sums, GRADS=grads, ADD_INPUT=s.add_input,
            ADD_GATE_INPUT=s.add_gate_input, PRECISION=lib.precision(), **config,
        )  # fmt: skip

    if s.gate == "small":
        launch(True, False)
        launch(False, True)
    else:
        launch(True, True)
    return d


def _jobs(p: Problem, names: list[str]) -> list[tuple[list[str], int]]:
    """The parameters of each launch and its width: one launch where all sides are equally wide."""
    sides = [
        (out_side(names), p.out),
        ([n for n in names if n == "down"], p.width),
        ([n for n in names if n == "gate_down"], p.gate_width),
    ]
    sides = [side for side in sides if side[0]]
    if len({width for _, width in sides}) == 1:
        return [(names, sides[0][1])]
    return sides


def weights_backward(
    p: Problem, saved: Saved, dout: Tensor, drop: Dropout, d: Rows, need: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients of the parameters: partial sums over splits of the rows, then their sums."""
    small = {"down_bias": d.z, "gate_down_bias": d.zg}  # so little that fp64 costs nothing
    grads = {
        n: v.sum(0, dtype=torch.float64) for n, v in small.items() if n in need and v is not None
    }
    if "gate_bias" in need:
        assert d.sums is not None
        grads["gate_bias"] = d.sums[4].sum().view(1)
    names = [n for n in SECTIONS if n in need]
    if not names:
        return grads
    given = {n: getattr(p.t, n) for n in names}
    grads |= {n: torch.empty_like(v) for n, v in given.items()}
    starts, total = {}, 0
    for n, v in given.items():
        starts[n] = total
        total += triton.cdiv(v.numel(), lib.ALIGNED.value) * lib.ALIGNED.value
    config = p.config("weights", dout)
    block_m = config["BLOCK_M"]
    tiles = triton.cdiv(p.out, config["BLOCK_W"])
    splits = lib.row_splits(lib.machine(dout), p.rows, tiles, block_m, total * 4)
    per_split = triton.cdiv(triton.cdiv(p.rows, block_m), splits) * block_m
    splits = triton.cdiv(p.rows, per_split)
    part = torch.empty((splits, total), dtype=torch.float32, device=dout.device)
    sections = {n: part[:, start : start + given[n].numel()] for n, start in starts.items()}
    for chosen, width in _jobs(p, names):
        _weights_launch(p, saved, dout, drop, d, chosen, width, sections, per_split, config)
    largest = max(v.numel() for v in given.values())
    block = dict(REDUCE.blocks)["BLOCK"]
    tw._gated_bottleneck_bwd_reduce_kernel[(triton.cdiv(largest, block), len(SECTIONS))](
        part, *[grads.get(n) for n in SECTIONS],
        *[given[n].numel() if n in given else 0 for n in SECTIONS], splits, total,
        **REDUCE.keywords(),
    )  # fmt: skip
    return grads


def _weights_launch(
    p: Problem,
    saved: Saved,
    dout: Tensor,
    drop: Dropout,
    d: Rows,
    chosen: list[str],
    width: int,
    sections: dict[str, Tensor],
    per_split: int,
    config: dict[str, Any],
) -> None:
    t, s = p.t, p.s
    out = bool(out_side(chosen))
    values = p.normed or s.gate != "none"
    # A tile that serves twice is loaded once.
    h = p.base if out and values else None
    residual = p.residual if out and p.normed else None
    x = None if s.add_input and h is not None else t.x
    gate_input = None if s.add_gate_input and residual is not None else t.gate_input
    splits = triton.cdiv(p.rows, per_split)
    tw._gated_bottleneck_bwd_weights_kernel[(triton.cdiv(width, config["BLOCK_W"]), splits)](
        *[sections[n] if n in chosen else None for n in SECTIONS],
        dout, x, h, gate_input, residual, d.a, d.ag, d.z, d.zg, d.sums, saved.moments,
        t.up, t.up_bias, t.gate_up, t.gate_up_bias, t.gate_weight,
        t.norm_weight if out else None, drop.rng,
        p.rows, p.rank, width, p.gate_rank, per_split, next(iter(sections.values())).stride(0),
        dout.stride(0), _stride(x), _stride(h), _stride(gate_input), _stride(residual),
        drop.scale, drop.threshold,
        GATE=s.gate, LINEAR=s.gate_linear, SEES_OUTPUT=s.gate_sees_output, OUT=out,
        PRECISION=lib.precision(), **config,
    )  # fmt: skip
