"""Calls of ``frozen_norm``."""

from __future__ import annotations

from tests.fuzz.case import LAYOUTS, Case, Draw


def frozen_norm(d: Draw) -> Case:
    """Every kind, with and without weight and bias. Of LayerNorm no rows of equal numbers: what is
    left of them is the rounding of their mean, which nothing but eps divides."""
    d.start()
    c = d.case
    args = c.arguments
    kind = args["kind"] = d.pick("layer", "rms", "rms_once", "rms_plus_one")
    lead, width = d.lead(), d.size(2 if kind == "layer" else 1, most=300)
    layouts = [each for each in LAYOUTS if kind != "layer" or each != "expanded"]
    x = args["x"] = d.tensor("x", *lead, width, factor=d.scales[0], layouts=layouts)
    args["weight"] = d.maybe(0.9, lambda: d.tensor("weight", width, factor=d.scales[1]))
    if kind == "layer":
        args["bias"] = d.maybe(0.7, lambda: d.tensor("bias", width, factor=d.scales[1]))
    args |= {"eps": d.pick(1e-6, 1e-5, 1e-12, 1e-2, 0.5), "recompute": d.chance(0.3)}
    return d.finish([x], [((*lead, width), c.dtype)])
