"""Calls of ``expert_dispatch``."""

from __future__ import annotations

from typing import Any

import torch

from tests.fuzz.case import Case, Draw, Ref
from tests.fuzz.draw_gated import _ACTIVATIONS, _mask


def expert_dispatch(d: Draw) -> Case:
    """Every gate, per token or per sample, with and without a choice, in both plans."""
    d.start()
    c = d.case
    gate = d.weighted(mean=15, softmax=55, given=30)
    pooled = d.chance(0.3)
    lead = d.lead(2 if pooled else None, most=220)
    experts = d.pick(1, 2, 3, 4, 5, 8, 13) if c.profile == "cpu" else d.pick(1, 2, 4, 5)
    rank, width = d.size(most=60), d.size(most=200)
    base = d.weighted(input=50, given=30, none=20)
    out = width if base == "input" else d.size(most=200)
    shared = 1 if d.chance(0.2) else experts
    x = d.row("x", *lead, width)
    down = d.parameter("down", shared, rank, width, factor=width**-0.5)
    up = d.parameter("up", experts, out, rank, factor=rank**-0.5)
    down_bias = d.maybe(0.5, lambda: d.parameter("down_bias", shared, rank))
    up_bias = d.maybe(0.5, lambda: d.parameter("up_bias", experts, out))
    given = d.row("base", *lead, out) if base == "given" else None
    args: dict[str, Any] = c.arguments
    args |= {"x": x, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias}
    args["base"] = {"input": "input", "none": None, "given": given}[base]
    args |= {"keep": d.number(), "mix": d.number(), "gate": gate}
    args["activation"] = d.pick(*_ACTIVATIONS)
    trainable: list[Ref | None] = [x, down, up, down_bias, up_bias, given]
    outs: list[tuple[Any, ...]] = [((*lead, out), c.dtype)]
    rows = lead[:1] if pooled else lead
    wide = torch.float64 if c.dtype == torch.float64 else torch.float32
    chooses = d.chance(0.55) and gate != "mean"
    if gate == "softmax":
        args["router"] = d.parameter("router", experts, width, factor=width**-0.5)
        args["router_bias"] = d.maybe(0.4, lambda: d.parameter("router_bias", experts))
        args["noise"] = d.maybe(0.4, lambda: d.parameter("noise", *rows, experts))
        trainable += [args["router"], args["router_bias"], args["noise"]]
        if pooled:
            args["router_input"] = "pooled"
            if d.chance(0.5):
                args["mask"] = _mask(d, *lead)
        if chooses:
            args["top_k"] = d.r.randint(1, min(experts, 4))
            args["renormalize"] = d.chance(0.6)
            # NaN in padding, times zero, is a logit, and then another choice altogether.
            c.spoiled = c.spoiled and args.get("mask") is None
    elif gate == "given":
        k = d.r.randint(1, min(experts, 3))
        if chooses:
            g = torch.Generator().manual_seed(d.r.getrandbits(40))
            indices = torch.randint(0, experts, (*rows, k), generator=g)
            args["indices"] = indices.to(d.pick(torch.int64, torch.int32))
            if d.chance(0.2) and len(rows) > 1:
                args["indices"] = args["indices"].transpose(0, 1).contiguous().transpose(0, 1)
        if not chooses or d.chance(0.6):
            args["gates"] = d.parameter("gates", *rows, k if chooses else experts)
            trainable.append(args["gates"])
    if chooses and d.chance(0.5):
        args["plan"] = d.pick("stationary", "sorted")
    if d.chance(0.3):
        args["return_routing"] = True
        if gate == "softmax":
            outs.append(((*rows, experts), wide))
    return d.finish(trainable, outs)
