"""``lowrank_linear``'s small calls in compiled code (``csrc/lowrank_linear/front``)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import front
from petal_kernels._runtime.rows import is_large
from petal_kernels.ops.lowrank_linear.arguments import Call, Settings
from petal_kernels.ops.lowrank_linear.function import (
    FIXED,
    Counts,
    LowRankLinearFunction,
    for_compiled,
)


def prepared(call: Call, trains: bool, plan: str, backend: str) -> Callable[..., Any] | None:
    """What runs the small calls of one signature in compiled code, gradients included: of (x, down,
    ups, weights, biases, rng), the outputs, or None for one that must go the whole way.

    None where there is none: elsewhere than on the C++ kernels, and with arguments that it does not
    know.
    """
    short = front.load()
    t, settings = call
    unknown = t.hidden is not None or t.core is not None or t.base
    if short is None or t.x is None or unknown or t.x.numel() == 0:
        return None
    if is_large(t.x, *t.ups):
        return None
    wanted = for_compiled(*t, None, *settings, trains, plan, backend)
    if wanted is None:
        return None
    counts = Counts(len(t.downs), len(t.ups), len(t.weights))
    biased = [bias is not None for bias in t.biases]
    whole = _whole_backward(settings, backend, counts, biased)
    made: Callable[..., Any] = short.lowrank_linear(wanted, *counts, biased, whole)
    return made


def _whole_backward(
    settings: Settings, backend: str, counts: Counts, biased: list[bool]
) -> Callable[..., list[Any]]:
    def run(node: Any, dys: list[Tensor], saved: list[Any], needs: list[bool]) -> list[Any]:
        h, rng, *rest = saved
        of_x, of_factors = needs[0], needs[1 : 1 + counts.downs + counts.ups]
        of_biases = iter(needs[1 + len(of_factors) :])
        flags = (
            *(False,) * FIXED,
            *(of_x, False, False),
            *of_factors,
            *(False,) * counts.weights,
            *(each and next(of_biases) for each in biased),
        )
        ctx = front.context(
            *(node, (h, None, rng, *rest), flags),
            x_shape=torch.Size((*dys[0].shape[:-1], rest[0].shape[1])),
            settings=settings,
            backend=backend,
            counts=counts,
        )
        dx, _, _, *grads = LowRankLinearFunction.backward(ctx, *dys)[FIXED:]
        frozen = len(of_factors) + counts.weights
        return [dx, *grads[: len(of_factors)], *compress(grads[frozen:], biased)]

    return run
