"""A call's settings as the compiled libraries take them (``csrc/gated_bottleneck/arguments.h``): a
list of integers and one of floats."""

from __future__ import annotations

from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.gated_bottleneck.arguments import GATES, Settings

_ROUTES = ("none", "add", "mul", "product")


def codes(s: Settings, route: str) -> tuple[list[int], list[float]]:
    """In the libraries' order; ``route`` is the one that their kernels are to form."""
    whole = [
        ACTIVATIONS.index(s.activation),
        _ROUTES.index(route),
        int(s.route_relu),
        GATES.index(s.gate),
        int(s.gate_linear),
        int(s.gate_sees_output),
        int(s.add_input),
        int(s.add_gate_input),
        s.samples,
    ]
    return whole, [s.scale, s.dropout, s.norm_eps]
