"""``lowrank_linear``: the public function, and what ``explain`` says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import front, philox
from petal_kernels._runtime.first_order import check_transforms
from petal_kernels.ops.lowrank_linear.arguments import Given, Settings, Tensors, check, listed
from petal_kernels.ops.lowrank_linear.compiled import prepared
from petal_kernels.ops.lowrank_linear.function import BACKENDS as BACKENDS
from petal_kernels.ops.lowrank_linear.function import (
    NAME,
    Counts,
    LowRankLinearFunction,
    explanation,
    flatten,
    forward_op,
)


def lowrank_linear(
    x: Tensor | None,
    down: Tensor | Sequence[Tensor] | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    base: Sequence[Tensor] | None = None,
    hidden: Tensor | None = None,
    core: Tensor | None = None,
    scale: float | Sequence[float] = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "bottleneck",
    training: bool = True,
    rng: Tensor | None = None,
    plan: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """K frozen linears of one x and their low-rank updates, which share one down-projection or
    have each their own.

    ``y_k = base_k + scale_k * drop_k(x down^T) ups[k]^T`` with ``base_k = x weights[k]^T +
    biases[k]``, or the given ``base[k]``, or nothing. K = 3 serves q, k and v of one attention in
    one call; LoRA is K = 1, or down-projections of their own and ``dropout_at="input"``: then
    ``y_k = base_k + scale_k * drop_k(x) down[k]^T ups[k]^T``.

    Dims: D input width, R rank, K outputs, O_k width of output k, any leading dims.

    Args:
        x: ``[..., D]``; None when ``hidden`` is given without ``weights``.
        down: ``[R, D]``, shared by all outputs, or K tensors ``[R_k, D]``, one for each; None when
            ``hidden`` is given.
        ups: K tensors ``[O_k, R]`` (``[O_k, R_k]`` where every output has its own down), or one
            ``[K, O, R]`` such as ``mode_contract`` returns.
        weights, biases: the frozen base, K tensors ``[O_k, D]`` (any strides) and K of ``[O_k]`` or
            None.
        base: instead of weights, the base's outputs, K tensors ``[..., O_k]``.
        hidden: ``[..., R]``, an ``x down^T`` already computed, to share it between calls; gradients
            flow to it.
        core: ``[K, R, R]``, only with ``dropout_at="mode"``: output k uses ``drop_k(x down^T
            core[k])``.
        scale: of the update, one number or K; finite.
        dropout: probability, rounded to a multiple of 1/65536; applied where ``training`` is true.
        dropout_at: ``"bottleneck"`` (PETAL: one mask per output on x down^T), ``"input"`` (LoRA:
            on x, for the update only, one mask per down-projection) or ``"mode"`` (Aurora's ViT:
            after the core).
        rng: int64 ``[2]`` = (seed, offset); default: drawn from torch's default generator of the
            device.
        plan: ``"auto"``, ``"update"``, ``"extend"``, ``"augment"`` or ``"merge"``; see
            ``planner.py``.
        backend: a backend's name; default ``use_backend``'s, ``PETAL_BACKEND``'s or the first that
            can run.

    Returns:
        K tensors ``[..., O_k]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. Activations, weights and base
            share one dtype; ``down``, ``ups`` and ``core`` have the same or float32, and get their
            gradients in their own.
        RuntimeError: a named backend that cannot run here, with its reasons.

    Differentiable once (not in weights). Saved for backward: x itself where down is trained, N x R
    values (N x R_k for each down), the state of the generator and the parameters. Deterministic.
    Source: see ``reference.py``.
    """
    given = Given(**locals())
    name = rt.name_of(backend)
    key = front.signature((given, name))
    found = (None if key is None else _KNOWN.get(key)) or _found(given, name, key)
    ys: tuple[Tensor, ...] | None = None
    if found.short is not None:
        ys = found.short(x, down, ups, weights, biases, rng)
    return _whole(listed(given), found, given, name) if ys is None else ys


class _Found(NamedTuple):
    """Of a call that was checked."""

    settings: Settings
    apply: Callable[..., tuple[Tensor, ...]] | None  # none where nothing is trained
    short: Callable[..., tuple[Tensor, ...] | None] | None = None  # see `compiled.py`


def _whole(t: Tensors, found: _Found, given: Given, name: str) -> tuple[Tensor, ...]:
    state, settings, rng = None, found.settings, given.rng
    if settings.dropout > 0.0:
        state = philox.draw(t.ups[0].device) if rng is None else rng.contiguous()
    if found.apply is None:
        return tuple(forward_op(*t, state, *settings, False, given.plan, name)[0])
    counts = Counts(len(t.downs), len(t.ups), len(t.weights))
    return found.apply(state, given.plan, name, counts, *settings, *flatten(t))


_KNOWN: front.Known[_Found] = front.Known()


def _found(given: Given, name: str, key: bytes | None) -> _Found:
    check_transforms(NAME, given)
    call = check(given)
    trains = torch.is_grad_enabled() and _any_trained(flatten(call.tensors))
    if key is None:  # a graph that sees the dict is bound to its length
        return _Found(call.settings, LowRankLinearFunction.apply if trains else None)
    plain = LowRankLinearFunction.apply_plain if trains else None
    lists = not isinstance(given.ups, Tensor)
    short = prepared(call, trains, given.plan, name) if lists else None
    return _KNOWN.keep(key, _Found(call.settings, plain, short))


def _any_trained(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _explain(given: Given) -> rt.Explanation:
    call = check(given)
    trains = torch.is_grad_enabled() and _any_trained(flatten(call.tensors))
    inference = not trains and call.tensors.hidden is None
    return explanation(call, inference, given.plan, rt.name_of(given.backend))


rt.register_explainer(lowrank_linear, Given, _explain)
