"""A call's settings as the compiled libraries take them (``csrc/expert_dispatch/arguments.h``): a
list of integers and one of floats."""

from __future__ import annotations

from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.expert_dispatch.arguments import Call

_GATES = ("mean", "softmax", "topk", "given")


def codes(call: Call) -> tuple[list[int], list[float]]:
    """In the libraries' order."""
    s = call.settings
    whole = [
        ACTIVATIONS.index(s.activation),
        _GATES.index(s.gate),
        call.experts,
        call.rank,
        s.top_k,
        int(s.renormalize),
        s.tokens_per_gate,
        int(s.add_input),
        int(call.shared_down),
        int(s.plan == "sorted"),
    ]
    return whole, [s.keep, s.mix]
