"""``gated_mlp``'s small calls in compiled code (``csrc/gated_mlp/front``)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import front
from petal_kernels._runtime.rows import flat_rows, is_large
from petal_kernels.ops.gated_mlp import products
from petal_kernels.ops.gated_mlp.arguments import Call, Settings, Tensors
from petal_kernels.ops.gated_mlp.function import BACKENDS, FIXED, NAME, GatedMlpFunction, places_of
from petal_kernels.ops.gated_mlp.products import Dropout


def prepared(t: Tensors, s: Settings, trains: bool, backend: str) -> Callable[..., Any] | None:
    """What runs the small calls of one signature in compiled code, gradients included: of (x,
    weights, biases, downs, ups, rng), the output, or None for one that must go the whole way.

    None where there is none: elsewhere than on the C++ kernels, and with arguments that it does not
    know.
    """
    short = front.load()
    if short is None or s.recompute or t.x.numel() == 0 or is_large(t.x, *t.weights):
        return None
    places, by = places_of(t, s.scales), products.backend_of(backend)
    last, rows = len(places) - 1, t.x.shape[:-1].numel()
    g = t.x.new_empty((rows, t.weights[0].shape[0]))
    call = Call(g, g if last == 2 else None, s.activation)
    impl = rt.select(NAME, BACKENDS, backend, call).load()
    drop = Dropout(None, s.dropout)
    inner, end = (
        products.compiled(given, here, drop, trains, by)
        for given, here in ((flat_rows(t.x), places[:last]), (g, places[last:]))
    )
    if inner is None or end is None or not hasattr(impl, "ACTIVATION_OF"):
        return None
    biased = [bias is not None for bias in t.biases]
    whole = _whole_backward(s, backend, biased)
    made: Callable[..., Any] = short.gated_mlp(
        inner, end, impl.ACTIVATION_OF[s.activation], biased, whole
    )
    return made


def _whole_backward(s: Settings, backend: str, biased: list[bool]) -> Callable[..., list[Any]]:
    n = len(biased)

    def run(node: Any, dys: list[Tensor], saved: list[Any], needs: list[bool]) -> list[Any]:
        kept = [*saved[: 2 + 2 * n], *[None] * n, *saved[2 + 2 * n :]]  # no biases
        of_biases = iter(needs[1 + 2 * n :])
        flags = (
            *(False,) * FIXED,
            needs[0],
            *(False,) * n,
            *(each and next(of_biases) for each in biased),
            *needs[1 : 1 + 2 * n],
        )
        shape = torch.Size((*dys[0].shape[:-1], saved[2 + n].shape[1]))
        ctx = front.context(
            *(node, tuple(kept), flags), x_shape=shape, settings=s, backend=backend
        )
        dx, *grads = GatedMlpFunction.backward(ctx, *dys)[FIXED:]
        return [dx, *grads[2 * n :], *compress(grads[n : 2 * n], biased)]

    return run
