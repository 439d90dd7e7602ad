"""Calls of ``frozen_norm``."""

from __future__ import annotations

from tests.fuzz.case import Case, Draw


def frozen_norm(d: Draw) -> Case:
    """Every kind, with and without weight and bias."""
    d.start()
    c = d.case
    lead, width = d.lead(), d.size(most=300)
    args = c.arguments
    x = args["x"] = d.row("x", *lead, width)
    kind = args["kind"] = d.pick("layer", "rms", "rms_once", "rms_plus_one")
    args["weight"] = d.maybe(0.9, lambda: d.tensor("weight", width, factor=d.scales[1]))
    if kind == "layer":
        args["bias"] = d.maybe(0.7, lambda: d.tensor("bias", width, factor=d.scales[1]))
    args |= {"eps": d.pick(1e-6, 1e-5, 1e-12, 1e-2, 0.5), "recompute": d.chance(0.3)}
    return d.finish([x], [((*lead, width), c.dtype)])
