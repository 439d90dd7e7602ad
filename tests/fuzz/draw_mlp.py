"""Calls of ``gated_mlp``."""

from __future__ import annotations

from petal_kernels._runtime.numerics import ACTIVATIONS
from tests.fuzz.case import Case, Draw, Ref


def gated_mlp(d: Draw) -> Case:
    """With and without a gate; an update of every linear, of some, of none."""
    d.start()
    c = d.case
    gated = d.chance(0.7)
    lead, width, inner, out = d.lead(most=200), d.size(most=200), d.size(most=200), d.size(most=200)
    shapes = [(inner, width)] * (2 if gated else 1) + [(out, inner)]
    args = c.arguments
    x = args["x"] = d.row("x", *lead, width)
    args["weights"] = [
        d.tensor(f"weights[{k}]", o, i, factor=i**-0.5) for k, (o, i) in enumerate(shapes)
    ]
    biases: list[Ref | None] = []
    if d.chance(0.5):
        biases = args["biases"] = [
            d.maybe(0.8, lambda k=k, o=o: d.row(f"biases[{k}]", o))  # type: ignore[misc]
            for k, (o, _) in enumerate(shapes)
        ]
    downs: list[Ref | None] = []
    ups: list[Ref | None] = []
    kind = d.weighted(all=60, some=30, none=10)
    for k, (o, i) in enumerate(shapes):
        given = kind == "all" or (kind == "some" and d.chance(0.5))
        rank = d.size(most=70)
        downs.append(d.parameter(f"downs[{k}]", rank, i, factor=i**-0.5) if given else None)
        ups.append(d.parameter(f"ups[{k}]", o, rank, factor=rank**-0.5) if given else None)
    if kind != "none":
        args |= {"downs": downs, "ups": ups}
    args["scale"] = [d.number() for _ in shapes] if d.chance(0.3) else d.number()
    args |= {"activation": d.pick(*ACTIVATIONS), "recompute": d.chance(0.3)}
    p = d.dropout()
    if p or d.chance(0.1):
        args |= {"dropout": p, "rng": d.state(), "training": not d.chance(0.1)}
    return d.finish([x, *biases, *downs, *ups], [((*lead, out), c.dtype)])
