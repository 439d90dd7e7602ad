"""The arguments of ``gated_mlp``: what backends receive and give back, and the checks of what users
give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import checks, philox
from petal_kernels._runtime.numerics import ACTIVATIONS

PLACES = ("gate", "up", "down")


class Given(NamedTuple):
    """The public function's arguments, as they came."""

    x: Any
    weights: Any
    biases: Any
    downs: Any
    ups: Any
    scale: Any
    activation: Any
    dropout: Any
    training: Any
    recompute: Any
    rng: Any
    backend: Any


class Tensors(NamedTuple):
    """Every tensor argument; of the sequences an entry for each linear, gate (if any), up, down."""

    x: Tensor  # [..., D]
    weights: Sequence[Tensor]  # [F, D] twice or once, then [O, F]; any strides
    biases: Sequence[Tensor | None]
    downs: Sequence[Tensor | None]  # A_k [R_k, in]; None where a linear has no update
    ups: Sequence[Tensor | None]  # B_k [out, R_k]


class Settings(NamedTuple):
    """Everything that is no tensor."""

    scales: Sequence[float]  # one for each linear
    activation: str  # of ACTIVATIONS
    dropout: float  # 0 where no mask is drawn
    recompute: bool  # g and u are formed again in backward


class Call(NamedTuple):
    """The rows between the linears, as a backend gets them: [N, F], unit stride in the last dim."""

    g: Tensor  # what the activation reads
    u: Tensor | None  # what its result is multiplied by; None: nothing, the plain MLP
    activation: str

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.g.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.g.is_cuda


class Product(NamedTuple):
    """What dA = dh^T drop(p) of the last linear's update is formed from, besides p."""

    dh: Tensor  # [N, R], unit stride in the last dim
    down: Tensor  # A [R, F]: dA has its dtype
    rng: Tensor | None  # of stream 0; None: no mask
    dropout: float


class Gradients(NamedTuple):
    """What a backward returns besides dg, which it writes over dp; None where it was not asked
    for."""

    u: Tensor | None = None
    down: Tensor | None = None


def _sequence(name: str, value: Any, length: int) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        got = "a Tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: want a sequence of tensors, got {got}")
    if len(value) != length:
        raise ValueError(f"{name}: want {length} entries, one for each weight, got {len(value)}")
    for k, each in enumerate(value):
        if each is not None:
            checks.check_tensor(f"{name}[{k}]", each)
    return value


def _check_weights(weights: Any, width: int) -> Sequence[Tensor]:
    if not isinstance(weights, (list, tuple)):
        got = "a Tensor" if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: want (gate, up, down) or (up, down), got {got}")
    if len(weights) not in (2, 3):
        raise ValueError(
            f"weights: want 3 tensors (gate, up, down) or 2 (up, down), got {len(weights)}"
        )
    for k, each in enumerate(weights):
        checks.check_tensor(f"weights[{k}]", each)
    inner: int | str = "F"
    for k, each in enumerate(weights[:-1]):
        checks.check_shape(f"weights[{k}]", each, (inner, width))
        inner = each.shape[0]
    last = len(weights) - 1
    checks.check_shape(f"weights[{last}]", weights[last], ("O", inner))
    for k, each in enumerate(weights):
        if min(each.shape) < 1:
            raise ValueError(f"weights[{k}]: want no empty dimension, got {list(each.shape)}")
        if each.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"weights[{k}]: want a frozen weight, got one that requires grad; this operator "
                "trains its updates and biases"
            )
    return weights


def _check_updates(given: Given, weights: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Any]]:
    count, nothing = len(weights), (None,) * len(weights)
    if (given.downs is None) != (given.ups is None):
        missing, present = ("downs", "ups") if given.downs is None else ("ups", "downs")
        raise TypeError(f"{missing}: want a sequence, as {present} are given, got None")
    if given.downs is None:
        return nothing, nothing
    downs, ups = (_sequence(name, getattr(given, name), count) for name in ("downs", "ups"))
    for k, (weight, down, up) in enumerate(zip(weights, downs, ups, strict=True)):
        rank: int | str = "R"
        if down is not None:
            checks.check_shape(f"downs[{k}]", down, (rank, weight.shape[1]))
            rank = down.shape[0]
            if down.shape[0] < 1:
                raise ValueError(f"downs[{k}]: want R >= 1, got {list(down.shape)}")
        if up is not None:
            checks.check_shape(f"ups[{k}]", up, (weight.shape[0], rank))
        if (down is None) != (up is None):
            missing, present = ("downs", "ups") if down is None else ("ups", "downs")
            raise TypeError(f"{missing}[{k}]: want a Tensor, as {present}[{k}] is given, got None")
    return downs, ups


def _check_scales(scale: Any, count: int) -> tuple[float, ...]:
    if not isinstance(scale, (list, tuple)):
        return (checks.check_number("scale", scale),) * count
    if len(scale) != count:
        raise ValueError(
            f"scale: want one number or {count}, one for each weight, got {len(scale)}"
        )
    return tuple(checks.check_number(f"scale[{k}]", each) for k, each in enumerate(scale))


def _named(name: str, tensors: Sequence[Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(f"{name}[{k}]", t) for k, t in enumerate(tensors) if t is not None]


def listed(given: Given) -> Tensors:
    """The tensors of a call whose like has been checked."""
    nothing = (None,) * len(given.weights)
    several = (given.biases, given.downs, given.ups)
    return Tensors(given.x, given.weights, *(nothing if t is None else t for t in several))


def check(given: Given) -> tuple[Tensors, Settings]:
    """Raise TypeError or ValueError, naming the argument, or return the call."""
    x = checks.check_floating("x", given.x)
    if x.dim() < 1:
        raise ValueError(f"x: want shape [..., D], got {list(x.shape)}")
    weights = _check_weights(given.weights, x.shape[-1])
    biases: Sequence[Tensor | None] = (None,) * len(weights)
    if given.biases is not None:
        biases = _sequence("biases", given.biases, len(weights))
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if bias is not None:
            checks.check_shape(f"biases[{k}]", bias, (weight.shape[0],))
    downs, ups = _check_updates(given, weights)
    base = _named("weights", weights) + _named("biases", biases)
    factors = _named("downs", downs) + _named("ups", ups)
    for name, t in base:
        checks.check_dtype(name, t, (x.dtype,), " like x")
    for name, t in factors:
        checks.check_dtype(name, t, (x.dtype, torch.float32), " (x's or float32)")
    for name, t in base + factors:
        checks.check_device(name, t, x.device)
    scales = _check_scales(given.scale, len(weights))
    checks.check_choice("activation", given.activation, ACTIVATIONS)
    philox.check_probability(given.dropout)
    checks.check_bool("training", given.training)
    checks.check_bool("recompute", given.recompute)
    if given.rng is not None:
        checks.check_rng("rng", given.rng, x.device)
    drops = given.training and philox.threshold(given.dropout) > 0 and bool(factors)
    dropout = float(given.dropout) if drops else 0.0
    return (
        Tensors(x, weights, biases, downs, ups),
        Settings(scales, given.activation, dropout, given.recompute),
    )
