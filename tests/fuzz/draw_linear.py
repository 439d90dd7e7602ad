"""Calls of ``mode_contract`` and ``lowrank_linear``."""

from __future__ import annotations

import torch

from tests.fuzz.case import LOW_PRECISION, Case, Draw, Ref


def mode_contract(d: Draw) -> Case:
    """Tucker or CP, with or without ``up``, any result dtype."""
    d.start()
    c, kind = d.case, d.weighted(tucker=60, cp=40)
    d.wide_parameters = False
    rank = d.size(most=24 if kind == "tucker" else 200)
    count = d.pick(0, 1, 2, 3, 5, d.size(most=70)) if d.chance(0.7) else d.r.randint(1, 14)
    if c.threads:
        count = d.r.randint(12, 60)
    shape = (rank,) if kind == "cp" else (rank, rank, rank)
    core = d.parameter("core", *shape, factor=1.0 if kind == "cp" else rank**-0.5)
    modes = d.parameter("modes", count, rank)
    up = None
    if d.chance(0.75):
        out = 0 if d.chance(0.03) else d.size(most=120 if count > 20 else 300)
        up = d.row("up", out, rank, factor=rank**-0.5)
    c.arguments = {"core": core, "modes": modes, "up": up, "scale": d.number()}
    dtype = c.dtype
    if d.chance(0.25):
        if c.profile == "cuda":  # what its kernels state: fp32 factors for another dtype
            dtypes = [torch.float32, *LOW_PRECISION] if c.dtype == torch.float32 else [c.dtype]
        else:
            dtypes = [torch.float32, *LOW_PRECISION, torch.float64]
        if c.profile == "triton":
            dtypes = [t for t in dtypes if t in (torch.float32, torch.float16)]
        dtype = c.arguments["dtype"] = d.pick(*dtypes)
    out_shape = (count, rank, rank) if up is None else (count, c.slots[up.index].shape[0], rank)
    return d.finish([core, modes, up], [(out_shape, dtype)])


def lowrank_linear(d: Draw) -> Case:
    """One to four outputs (now and then more) over weights, given bases or nothing."""
    d.start()
    c = d.case
    count = d.pick(1, 1, 2, 3, 3, 4) if c.profile != "cpu" or d.chance(0.95) else d.pick(5, 7)
    source = d.weighted(weights=45, base=30, none=25)
    given = d.chance(0.15)
    at = d.weighted(bottleneck=50, input=25, mode=25)
    if given and at == "input":
        at = "bottleneck"
    lead = d.lead(most=300 if count < 4 else 130)
    width, rank = d.size(), d.size(most=130)
    args = c.arguments
    own = count > 1 and not given and at != "mode" and d.chance(0.35)
    ranks = [d.size(most=130) for _ in range(count)] if own else [rank] * count
    x = hidden = core = None
    down: Ref | list[Ref] | None = None
    if not given or source == "weights":
        x = d.row("x", *lead, width)
    if given:
        hidden = d.row("hidden", *lead, rank)
    elif own:
        down = [
            d.parameter(f"down[{k}]", r, width, factor=width**-0.5) for k, r in enumerate(ranks)
        ]
    else:
        down = d.parameter("down", rank, width, factor=width**-0.5)
    args |= {"x": x, "down": down, "hidden": hidden}
    outs = [d.size(most=200) for _ in range(count)]
    stacked = not own and d.chance(0.2)
    if stacked:
        outs = [outs[0]] * count
        ups: list[Ref] = []
        joined = d.parameter("ups", count, outs[0], rank, factor=rank**-0.5)
        args["ups"] = joined
    else:
        ups = [
            d.parameter(f"ups[{k}]", o, r, factor=r**-0.5)
            for k, (o, r) in enumerate(zip(outs, ranks, strict=True))
        ]
        args["ups"] = ups
    frozen_base = _linear_base(d, source, lead, width, outs)
    if at == "mode":
        core = d.parameter("core", count, rank, rank, factor=rank**-0.5)
    scale = [d.number() for _ in range(count)] if d.chance(0.2) else d.number()
    args |= {"core": core, "scale": scale, "dropout_at": at}
    p = d.dropout()
    if p or d.chance(0.1):
        args |= {"dropout": p, "rng": d.state(), "training": not d.chance(0.1)}
    dropped = p >= 1e-5 and args["training"]
    if c.profile == "cpu" and d.chance(0.3):
        merge = source == "weights" and not dropped and at != "mode" and not given
        more = ["augment"] if source == "weights" else []
        c.plans["torch"] = d.pick("update", *more, *(["merge"] if merge else []))
        c.plans["native"] = d.pick("update", *(["extend"] if source == "weights" else []))
    downs = down if isinstance(down, list) else [down]
    trainable = [x, *downs, hidden, core, *(ups or [joined]), *frozen_base]
    return d.finish(trainable, [((*lead, o), c.dtype) for o in outs])


def _linear_base(
    d: Draw, source: str, lead: tuple[int, ...], width: int, outs: list[int]
) -> list[Ref | None]:
    """Weights with biases or without, given outputs, or nothing; what of it may be trained."""
    args = d.case.arguments
    found: list[Ref | None] = []
    if source == "weights":
        args["weights"] = [
            d.tensor(f"weights[{k}]", o, width, factor=width**-0.5) for k, o in enumerate(outs)
        ]
        if d.chance(0.6):
            found = [
                d.maybe(0.8, lambda k=k, o=o: d.row(f"biases[{k}]", o))  # type: ignore[misc]
                for k, o in enumerate(outs)
            ]
            args["biases"] = found
    elif source == "base":
        found = [d.row(f"base[{k}]", *lead, o) for k, o in enumerate(outs)]
        args["base"] = found
    return found
