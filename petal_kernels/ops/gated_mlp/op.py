"""``gated_mlp``: the public function, and what ``explain`` says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import front, philox
from petal_kernels._runtime.first_order import check_transforms
from petal_kernels.ops.gated_mlp.arguments import (
    Call,
    Given,
    Settings,
    Tensors,
    check,
    listed,
)
from petal_kernels.ops.gated_mlp.compiled import prepared
from petal_kernels.ops.gated_mlp.function import BACKENDS as BACKENDS
from petal_kernels.ops.gated_mlp.function import (
    NAME,
    GatedMlpFunction,
    explanation,
    flatten,
    notes,
    run,
)


def gated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    downs: Sequence[Tensor | None] | None = None,
    ups: Sequence[Tensor | None] | None = None,
    scale: float | Sequence[float] = 1.0,
    activation: str = "silu",
    dropout: float = 0.0,
    training: bool = True,
    recompute: bool = False,
    rng: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen MLP, gated or plain, with low-rank updates of its linears.

    ``y = down(act(gate(x)) * up(x))``, or ``y = down(act(up(x)))`` without a gate; each linear is
    ``t weights[k]^T + biases[k] + scale_k * drop_k(t) downs[k]^T ups[k]^T`` of its input t.

    Dims: D input width, F width between the linears, O output width, R_k rank of an update.

    Args:
        x: ``[..., D]``.
        weights: the frozen weights in the order of the linears: gate ``[F, D]``, up ``[F, D]``,
            down ``[O, F]``; or up and down. Any strides.
        biases: as many, ``[F]``, ``[F]``, ``[O]`` or None each.
        downs, ups: as many pairs of factors, A ``[R_k, in]`` and B ``[out, R_k]``; None and None
            where a linear has no update.
        scale: of the updates, one number or as many; finite.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "identity".
        dropout: probability of LoRA's masks, each linear's own, on what its update reads; rounded
            to a multiple of 1/65536, applied where ``training`` is true.
        recompute: form gate and up again in backward instead of keeping them.
        rng: int64 ``[2]`` = (seed, offset); default: drawn from torch's default generator of the
            device.
        backend: a backend's name; default ``use_backend``'s, ``PETAL_BACKEND``'s or the first that
            can run. It computes what lies between the linears; those are ``lowrank_linear``'s,
            which takes torch where that is named and chooses for itself otherwise.

    Returns:
        ``[..., O]``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. x, weights and biases share
            one dtype; ``downs`` and ``ups`` have the same or float32, and get their gradients in
            their own.
        RuntimeError: a named backend that cannot run here, with its reasons.

    Differentiable once (not in weights). Saved for backward: x itself, the outputs of gate and up
    (not with ``recompute``), N x R_k values of each update, the state of the generator and the
    parameters. Deterministic. Source: see ``reference.py``.
    """
    given = Given(**locals())
    name = rt.name_of(backend)
    key = front.signature((given, name))
    found = (None if key is None else _KNOWN.get(key)) or _found(given, name, key)
    y = None if found.short is None else found.short(x, weights, biases, downs, ups, rng)
    return _whole(listed(given), found, rng, name) if y is None else y


class _Found(NamedTuple):
    """Of a call that was checked."""

    settings: Settings
    apply: Callable[..., Tensor] | None  # none where nothing is trained
    short: Callable[..., Tensor | None] | None = None  # see `compiled.py`


def _whole(t: Tensors, found: _Found, rng: Tensor | None, name: str) -> Tensor:
    state, s, apply = None, found.settings, found.apply
    if s.dropout > 0.0:
        state = philox.draw(t.x.device) if rng is None else rng.contiguous()
    out: Tensor
    out = run(t, s, state, False, name)[0] if apply is None else apply(state, name, *s, *flatten(t))
    return out


_KNOWN: front.Known[_Found] = front.Known()


def _found(given: Given, name: str, key: bytes | None) -> _Found:
    check_transforms(NAME, given)
    t, s = check(given)
    trains = _trains(t)
    if key is None:  # a graph that sees the dict is bound to its length
        return _Found(s, GatedMlpFunction.apply if trains else None)
    plain = GatedMlpFunction.apply_plain if trains else None
    return _KNOWN.keep(key, _Found(s, plain, prepared(t, s, trains, name)))


def _trains(t: Tensors) -> bool:
    wanted = (each is not None and each.requires_grad for each in flatten(t))
    return torch.is_grad_enabled() and any(wanted)


def _explain(given: Given) -> rt.Explanation:
    t, s = check(given)
    name, rows = rt.name_of(given.backend), t.x.new_empty((0, t.weights[0].shape[0]))
    call = Call(rows, rows if len(t.weights) == 3 else None, s.activation)
    return explanation(call, name, notes(t, s, _trains(t), name))


rt.register_explainer(gated_mlp, Given, _explain)
