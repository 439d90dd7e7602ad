"""Calls of ``gated_bottleneck``."""

from __future__ import annotations

from typing import Any

import torch

from tests.fuzz.case import Case, Draw, Ref

_ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")


def _mask(d: Draw, batch: int, length: int) -> torch.Tensor:
    """Which tokens count: bool, integer or float, of any strides; now and then none of a sample."""
    g = torch.Generator().manual_seed(d.r.getrandbits(40))
    mask = torch.rand(batch, length, generator=g) < d.pick(0.2, 0.7, 0.95)
    dtype = d.pick(torch.bool, torch.bool, torch.int64, torch.float32, torch.uint8)
    mask = mask.to(dtype)
    return mask.t().contiguous().t() if d.chance(0.2) else mask


def gated_bottleneck(d: Draw) -> Case:
    """Every route with every gate, base, residual and norm."""
    d.start()
    c = d.case
    if d.chance(0.04):
        return _update(d)
    route = d.weighted(none=46, add=9, mul=9, expand=9, gram=14, gram_relu=13)
    gate = d.weighted(none=30, large=22, middleX=16, middleY=14, small=18)
    per_sample = route != "none" or gate == "small"
    lead = d.lead(3 - 1 if per_sample else None, most=220)
    base = d.weighted(input=50, given=30, none=20)
    bottleneck = d.chance(0.15)
    rank, width = d.size(most=130), d.size()
    out = width if base == "input" else d.size()
    norm = d.chance(0.35)
    # Where u is stored before its norm, its mean is that of the sums before rounding: the norm of
    # one number, exactly nothing, shows that alone.
    norm = norm and (out > 1 or not d.small)
    residual = d.weighted(none=45, given=25, gate_input=30)
    variant = d.weighted(paper=65, release=35)
    args: dict[str, Any] = {}
    if norm:  # equal columns have no variance: a norm of them shows rounding alone
        d.layouts = tuple(layout for layout in d.layouts if layout != "expanded")
    x = down = down_bias = z = None
    if not bottleneck or base == "input":
        x = d.row("x", *lead, width)
    if bottleneck:
        z = d.row("bottleneck", *lead, rank)
    else:
        down = d.parameter("down", rank, width, factor=width**-0.5)
        down_bias = d.maybe(0.5, lambda: d.parameter("down_bias", rank))
    up = d.parameter("up", out, rank, factor=rank**-0.5)
    up_bias = d.maybe(0.5, lambda: d.parameter("up_bias", out))
    given = d.row("base", *lead, out) if base == "given" else None
    args |= {"x": x, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias}
    args["base"] = {"input": "input", "none": None, "given": given}[base]
    args |= {"bottleneck": z, "activation": d.pick(*_ACTIVATIONS), "variant": variant}
    vision = None
    if route != "none":
        tokens = _tokens(d, route, variant)
        # Enters a gram twice: huge, its square alone overflows, and relu's zeros tell the orders
        # of the products apart.
        factor = 1 / d.scales[0] if route == "gram_relu" and d.scales[0] > 1 else 1.0
        vision = d.row("vision", lead[0], tokens, rank, factor=factor)
        args |= {"route": route, "vision": vision}
    trainable: list[Ref | None] = [x, down, up, down_bias, up_bias, given, z, vision]
    trainable += _gate(d, gate, lead, out, residual, variant)
    if residual == "given":
        args["residual"] = d.row("residual", *lead, out)
        trainable.append(args["residual"])
    elif residual == "gate_input":
        args["residual"] = "gate_input"
    if norm:
        args["norm_weight"] = d.parameter("norm_weight", out)
        args["norm_bias"] = d.parameter("norm_bias", out)
        trainable += [args["norm_weight"], args["norm_bias"]]
        if d.chance(0.3):
            args["norm_eps"] = d.pick(1e-6, 1e-12, 1e-3, 1)
    args["scale"] = d.number()
    p = d.dropout()
    if norm and d.small:  # where one number of a row is left, its norm is constant
        p = min(p, 0.5)
    if p or d.chance(0.1):
        args |= {"dropout": p, "rng": d.state(), "training": not d.chance(0.1)}
    c.arguments = args | c.arguments
    if norm and out < 3:
        trainable = []  # the norm of one or two numbers hardly depends on them
    return d.finish(trainable, [((*lead, out), c.dtype)])


def _tokens(d: Draw, route: str, variant: str) -> int:
    """Vision tokens of a sample: where the released code averages none, one."""
    several: int = d.pick(1, 1, 2, 3, d.size(most=40))
    return 1 if variant == "release" and not route.startswith("gram") else several


def _gate(
    d: Draw, gate: str, lead: tuple[int, ...], out: int, residual: str, variant: str
) -> list[Ref | None]:
    """The gate's own arguments; what of them can be trained."""
    args = d.case.arguments
    args["gate"] = gate
    made: list[Ref | None] = []
    width = out
    if gate == "large" and residual != "gate_input" and d.chance(0.4):
        width = d.size()
    if gate in ("large", "middleX", "small") or residual == "gate_input":
        args["gate_input"] = d.row("gate_input", *lead, width)
        made.append(args["gate_input"])
    if gate == "large":
        rank = d.size(most=80)
        args["gate_down"] = d.parameter("gate_down", rank, width, factor=width**-0.5)
        args["gate_up"] = d.parameter("gate_up", out, rank, factor=rank**-0.5)
        args["gate_down_bias"] = d.maybe(0.5, lambda: d.parameter("gate_down_bias", rank))
        args["gate_up_bias"] = d.maybe(0.5, lambda: d.parameter("gate_up_bias", out))
        made += [args[n] for n in ("gate_down", "gate_up", "gate_down_bias", "gate_up_bias")]
    elif gate != "none":
        size = 2 * out if gate == "small" else out
        args["gate_weight"] = d.parameter("gate_weight", size, factor=out**-0.5)
        made.append(args["gate_weight"])
        if gate != "middleY":
            args["gate_bias"] = d.maybe(0.6, lambda: d.parameter("gate_bias", 1))
            made.append(args["gate_bias"])
    if gate == "small" and variant == "paper" and d.chance(0.5):
        args["mask"] = _mask(d, *lead)
    return made


def _update(d: Draw) -> Case:
    """Columns of a base that nobody else reads are overwritten."""
    c = d.case
    lead, width, rank, out = d.lead(most=150), d.size(), d.size(most=80), d.size()
    before, behind = d.pick(0, d.size(most=40)), d.pick(0, d.size(most=40))
    x = d.row("x", *lead, width)
    down = d.parameter("down", rank, width, factor=width**-0.5)
    up = d.parameter("up", out, rank, factor=rank**-0.5)
    down_bias = d.maybe(0.5, lambda: d.parameter("down_bias", rank))
    up_bias = d.maybe(0.5, lambda: d.parameter("up_bias", out))
    shape = (*lead, before + out + behind)
    base = d.tensor("base", *shape, factor=d.scales[0], layouts=("contiguous", "offset"))
    c.arguments = {
        "x": x, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias, "base": base,
        "activation": d.pick(*_ACTIVATIONS), "update_at": before,
    }  # fmt: skip
    return d.finish([x, down, up, down_bias, up_bias, base], [(shape, c.dtype)])
