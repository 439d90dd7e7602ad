"""Inputs, traffic and flops of ``lowrank_linear``; read by tests and benchmarks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels.ops.lowrank_linear.baselines import BASELINES as BASELINES

DIFFERENTIABLE = ("x", "down", "ups", "biases", "base", "hidden", "core")


@dataclass(frozen=True)
class Case:
    """One shape. ``lead`` are x's leading dims; ``base`` is "weights", "outputs" or "none"; with
    ``ranks`` every output has a down-projection of its own."""

    name: str
    lead: tuple[int, ...]
    width: int
    rank: int
    outs: tuple[int, ...]
    base: str = "weights"
    bias: bool = True
    dropout: float = 0.0
    dropout_at: str = "bottleneck"
    hidden: bool = False
    ranks: tuple[int, ...] = ()
    scale: float | tuple[float, ...] = 1.0
    layout: str = "contiguous"
    frozen_x: bool = False
    frozen_down: bool = False
    float_parameters: bool = False
    transposed_ups: bool = False
    plan: str = "auto"

    @property
    def rows(self) -> int:
        """N, the product of the leading dims."""
        return torch.Size(self.lead).numel()

    @property
    def middle(self) -> int:
        """Columns of h."""
        return sum(self.ranks) or self.rank

    @property
    def expand(self) -> int:
        """Sum over the outputs of rank times width."""
        ranks = self.ranks or (self.rank,) * len(self.outs)
        return sum(r * o for r, o in zip(ranks, self.outs, strict=True))


_QKV = (48, 48, 48)

CASES = (
    Case("qkv", (3, 50), 64, 16, _QKV),
    Case("qkv-dropout", (3, 50), 64, 16, _QKV, dropout=0.25),
    Case("qkv-outputs", (3, 50), 64, 16, _QKV, base="outputs", dropout=0.1),
    Case("qkv-odd", (3, 47), 83, 19, (37, 53, 41), dropout=0.1, scale=0.5),
    Case("outputs-odd", (211,), 83, 19, (37, 53, 41), base="outputs", dropout=0.1, scale=-0.5),
    Case("update-alone", (5, 31), 40, 8, (24, 24), base="none", dropout=0.1),
    Case("lora", (150,), 72, 16, (80,), dropout=0.1, dropout_at="input", scale=2.0),
    Case("lora-odd", (2, 73), 77, 13, (45,), base="outputs", dropout=0.3, dropout_at="input"),
    Case("lora-qkv", (2, 75), 64, 16, _QKV, dropout=0.1, dropout_at="input"),
    Case("lora-no-dropout", (150,), 72, 16, (80,), bias=False, plan="merge"),
    Case("lora-own", (2, 75), 64, 8, _QKV, dropout=0.1, dropout_at="input", ranks=(8, 8, 8)),
    Case(
        "lora-own-odd",
        (211,),
        83,
        19,
        (37, 53, 41),
        dropout=0.3,
        dropout_at="input",
        ranks=(19, 3, 8),
        scale=(0.5, -1.5, 2.0),
    ),
    Case("lora-own-gqa", (3, 47), 72, 16, (80, 24), "outputs", ranks=(16, 16), scale=2.0),
    Case("own-bottleneck", (140,), 51, 13, (33, 20, 8, 61), dropout=0.2, ranks=(5, 13, 1, 7)),
    Case("own-alone", (5, 31), 40, 8, (24, 24), "none", dropout=0.1, ranks=(8, 4)),
    Case(
        "own-frozen-x",
        (130,),
        40,
        8,
        (24, 17),
        dropout=0.1,
        dropout_at="input",
        ranks=(8, 4),
        frozen_x=True,
        float_parameters=True,
    ),
    Case("aurora-vit", (2, 70), 64, 16, _QKV, dropout=0.1, dropout_at="mode"),
    Case(
        "aurora-vit-odd", (141,), 51, 11, (33, 70), base="outputs", dropout=0.2, dropout_at="mode"
    ),
    Case("aurora-vit-no-dropout", (2, 70), 64, 16, _QKV, dropout_at="mode"),
    Case("image-kv", (2, 65), 88, 16, (64, 64), base="outputs", hidden=True, dropout=0.1),
    Case("image-kv-weights", (2, 65), 88, 16, (64, 64), hidden=True, dropout=0.1, frozen_x=True),
    Case("image-kv-odd", (129,), 88, 21, (51, 67), base="outputs", hidden=True, dropout=0.1),
    Case("frozen-x", (140,), 64, 16, _QKV, dropout=0.1, frozen_x=True),
    Case("frozen-down", (140,), 64, 16, _QKV, dropout=0.1, frozen_down=True),
    Case(
        "frozen-down-lora",
        (70,),
        72,
        16,
        (80,),
        "outputs",
        dropout=0.1,
        dropout_at="input",
        frozen_down=True,
    ),
    Case("sliced-sequence", (3, 41), 64, 16, _QKV, dropout=0.1, layout="sliced"),
    Case("strided-rows", (130,), 64, 16, (48,), layout="strided", base="outputs"),
    Case("column-major", (130,), 64, 16, (48,), layout="transposed"),
    Case("float-parameters", (3, 45), 64, 16, _QKV, dropout=0.1, float_parameters=True),
    Case("transposed-ups", (3, 45), 64, 16, _QKV, dropout=0.1, transposed_ups=True),
    Case("rank-1", (3, 30), 17, 1, (9, 9), dropout=0.5),
    Case("rank-wide", (140,), 96, 130, (100,), dropout=0.1),
    Case("four", (140,), 32, 8, (16, 24, 32, 40), dropout=0.1),
    Case("one-row", (1,), 64, 16, _QKV, dropout=0.1),
    Case("empty", (0, 7), 64, 16, _QKV, dropout=0.1),
    Case("augment", (3, 50), 64, 16, _QKV, dropout=0.1, plan="augment"),
    Case("augment-odd", (211,), 83, 19, (37, 53), scale=0.5, plan="augment"),
    Case("extend", (3, 50), 64, 16, _QKV, dropout=0.1, plan="extend"),
    Case("extend-odd", (211,), 83, 19, (37, 53), dropout=0.1, scale=0.5, plan="extend"),
    Case("merge-qkv", (211,), 83, 19, (37, 53), scale=0.5, plan="merge"),
    Case("own-augment", (211,), 83, 19, (37, 53), ranks=(19, 8), scale=(0.5, 2.0), plan="augment"),
    Case("own-merge", (211,), 83, 19, (37, 53), ranks=(19, 8), scale=(0.5, 2.0), plan="merge"),
)

SHAPES = (
    Case("qformer self qkv N=1024", (32, 32), 768, 64, (768,) * 3, dropout=0.1),
    Case("qformer self qkv N=4096", (64, 64), 768, 64, (768,) * 3, dropout=0.1),
    Case("qformer self qkv N=4096, update", (64, 64), 768, 64, (768,) * 3, "outputs", dropout=0.1),
    Case("qformer cross q N=512", (16, 32), 768, 64, (768,), dropout=0.1),
    Case(
        "qformer image kv N=4112",
        (16, 257),
        1408,
        64,
        (768,) * 2,
        "outputs",
        dropout=0.1,
        hidden=True,
    ),
    Case("lora d=1024 N=2048", (2048,), 1024, 16, (1024,), dropout=0.1, dropout_at="input"),
    Case(
        "lora qkv d=1024 N=2048",
        (2048,),
        1024,
        16,
        (1024, 256, 256),
        dropout=0.05,
        dropout_at="input",
        ranks=(16, 16, 16),
    ),
)


def _layout(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "sliced":
        return torch.cat((t, t[:, :5]), dim=1)[:, : t.shape[1]]
    if layout == "strided":
        return torch.cat((t, t), dim=-1)[..., : t.shape[-1]]
    if layout == "transposed":
        return t.t().contiguous().t()
    return t


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the public function (with ``plan``), its reference and its
    baselines."""
    g = torch.Generator().manual_seed(seed)

    def place(*shape: int, divisor: float = 1.0, parameter: bool = False) -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64) / divisor
        wide = parameter and case.float_parameters and dtype.itemsize == 2
        return t.to(torch.float32 if wide else dtype).to(device)

    d, r = case.width, case.rank
    inputs: dict[str, Any] = {"x": None, "down": None}
    if not case.hidden or case.base == "weights":
        inputs["x"] = _layout(place(*case.lead, d), case.layout)
    if case.hidden:
        inputs["hidden"] = place(*case.lead, r)
    elif case.ranks:
        inputs["down"] = [place(rk, d, divisor=d**0.5, parameter=True) for rk in case.ranks]
    else:
        inputs["down"] = place(r, d, divisor=d**0.5, parameter=True)
    ranks = case.ranks or (r,) * len(case.outs)
    inputs["ups"] = [
        place(o, rk, divisor=rk**0.5, parameter=True)
        for o, rk in zip(case.outs, ranks, strict=True)
    ]
    if case.transposed_ups:
        inputs["ups"] = [u.t().contiguous().t() for u in inputs["ups"]]
    if case.base == "weights":
        inputs["weights"] = [place(o, d, divisor=d**0.5) for o in case.outs]
        inputs["biases"] = [place(o) for o in case.outs] if case.bias else None
    elif case.base == "outputs":
        inputs["base"] = [place(*case.lead, o) for o in case.outs]
    if case.dropout_at == "mode":
        inputs["core"] = place(len(case.outs), r, r, divisor=r**0.5, parameter=True)
    inputs.update(scale=case.scale, dropout=case.dropout, dropout_at=case.dropout_at)
    if case.dropout:
        inputs["rng"] = torch.tensor([0x1234_5678_9ABC + seed, 0xFFFF_FFFE], device=device)
    return inputs


def options(case: Case) -> dict[str, Any]:
    """Arguments of the public function that the reference does not have, and tensors that stay
    frozen."""
    return {"plan": case.plan}


def frozen(case: Case) -> tuple[str, ...]:
    """Names of DIFFERENTIABLE inputs that this case does not train."""
    names = ["down"] if case.frozen_down else []
    if case.frozen_x or (case.hidden and case.base == "weights"):
        names.append("x")
    return tuple(names)


def bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Least bytes of forward and backward, of whichever plan; of the same products as `flops`: the
    base's too where its weights are given. The factors, R wide, are left out.

    Forward: x read once for h and the base product, its weights and biases read; h written and
    read; every y written, and where it is given read. Backward: every dy read twice (dh and dx,
    dP), h and dh written and read, x for dU; the base's weights and dx, written once.
    """
    n, d, r, e = case.rows, case.width, case.middle, dtype.itemsize
    wide = sum(case.outs)
    weights = case.base == "weights"
    base = d * wide if weights else 0
    biases = wide if weights and case.bias else 0
    reads_x = n * d if weights or not case.hidden else 0
    reads_y = n * wide if case.base == "outputs" else 0
    fwd = reads_x + base + biases + 2 * n * r + reads_y + n * wide
    down = 0 if case.hidden else n * d
    dx = 0 if case.frozen_x or case.hidden else n * d + base
    bwd = 2 * n * wide + 4 * n * r + down + dx
    return fwd * e, bwd * e


def flops(case: Case) -> tuple[int, int]:
    """Multiply-adds times two, base included where its weights are given; forward and backward."""
    n, d, wide = case.rows, case.width, sum(case.outs)
    shrink = 0 if case.hidden else 2 * n * d * case.middle
    expand = 2 * n * case.expand
    base = 2 * n * d * wide if case.base == "weights" else 0
    dx = 0 if case.frozen_x or case.hidden else base + shrink
    return shrink + expand + base, 2 * expand + shrink + dx


def saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """Exact bytes kept for backward when everything trainable is trained, parameters excluded."""
    h = 0 if case.hidden else case.rows * case.middle
    x = 0 if case.hidden or case.frozen_down else case.rows * case.width
    rng = 16 if philox.threshold(case.dropout) else 0
    given = case.rows * case.rank if case.hidden else 0
    return (h + x + given) * dtype.itemsize + rng
