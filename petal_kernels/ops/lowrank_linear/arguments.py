"""The arguments of ``lowrank_linear``: what backends receive and give back, and the checks of what
users give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import checks, philox
from petal_kernels.ops.lowrank_linear.planner import PLANS

DROPOUT_SITES = ("bottleneck", "input", "mode")


class Given(NamedTuple):
    """The public function's arguments, as they came."""

    x: Any
    down: Any
    ups: Any
    weights: Any
    biases: Any
    base: Any
    hidden: Any
    core: Any
    scale: Any
    dropout: Any
    dropout_at: Any
    training: Any
    rng: Any
    plan: Any
    backend: Any


class Tensors(NamedTuple):
    """Every tensor argument; None or an empty sequence where it is not given.

    In a backend's hands x, hidden and base are [N, width] with unit stride in the last dim.
    Backward has neither biases nor base, and reads x for dU alone: otherwise only its shape is
    real.
    """

    x: Tensor | None  # [N, D]
    down: Tensor | None  # U [R, D]
    hidden: Tensor | None  # [N, R], in place of x U^T
    ups: Sequence[Tensor]  # P_k [O_k, R]
    weights: Sequence[Tensor]  # W_k [O_k, D], any strides
    biases: Sequence[Tensor | None]  # [O_k], one for each weight
    base: Sequence[Tensor]  # [N, O_k], in place of weights
    core: Tensor | None  # [K, R, R], with dropout_at "mode" only


class Settings(NamedTuple):
    """Everything that is no tensor, in the order of the raw operators' schemas."""

    scale: float
    dropout: float  # 0 where no mask is drawn
    dropout_at: str  # of DROPOUT_SITES


class Call(NamedTuple):
    """One call as a backend gets it."""

    tensors: Tensors
    settings: Settings

    @property
    def first(self) -> Tensor:
        """The tensor whose leading dims, dtype and device the outputs have."""
        t = self.tensors
        first = t.x if t.x is not None else t.hidden
        assert first is not None
        return first

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.first.device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.first.is_cuda


class Saved(NamedTuple):
    """What a forward leaves for backward besides its inputs."""

    h: Tensor  # [N, R] before cores and masks, in x's dtype; the given one where hidden is given


class Gradients(NamedTuple):
    """What a backward returns, in the order of the raw operator's ``need``; None where it was not
    asked for."""

    x: Tensor | None = None
    down: Tensor | None = None
    hidden: Tensor | None = None
    ups: Sequence[Tensor] | None = None
    core: Tensor | None = None


def _check_sequence(name: str, value: Any, length: int | None = None) -> Sequence[Any]:
    if isinstance(value, Tensor):
        if value.dim() == 3:
            value = value.unbind(0)
        else:
            raise TypeError(f"{name}: want a sequence of tensors, got a {value.dim()}-D Tensor")
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: want a sequence of tensors, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name}: want {length} entries, one for each of ups, got {len(value)}")
    for k, each in enumerate(value):
        if each is not None:  # whether None will do is for the caller to say
            checks.check_tensor(f"{name}[{k}]", each)
    return value


def _check_source(x: Any, down: Any, hidden: Any, weights: Sequence[Any]) -> tuple[Tensor, int]:
    """The activations that carry dtype and device, and the rank."""
    if hidden is None:
        if x is None or down is None:
            missing = "x" if x is None else "down"
            raise TypeError(f"{missing}: want a Tensor (or hidden instead of x and down), got None")
        checks.check_floating("x", x)
        checks.check_floating("down", down)
        if x.dim() < 1:
            raise ValueError(f"x: want shape [..., D], got {list(x.shape)}")
        checks.check_shape("down", down, ("R", x.shape[-1]))
        rank = down.shape[0]
        if rank < 1 or x.shape[-1] < 1:
            raise ValueError(f"down: want R >= 1 and D >= 1, got {list(down.shape)}")
        return x, rank
    if down is not None:
        raise ValueError(
            "down: want None when hidden is given (hidden is already x down^T), got a Tensor"
        )
    checks.check_floating("hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: want shape [..., R] with R >= 1, got {list(hidden.shape)}")
    if x is not None:
        checks.check_floating("x", x)
        checks.check_shape("x", x, (*hidden.shape[:-1], "D"))
        if not weights:
            raise ValueError("x: want None when hidden is given without weights, got a Tensor")
    elif weights:
        raise TypeError("x: want a Tensor, the base's input, since weights are given, got None")
    return hidden, hidden.shape[-1]


def _check_base(
    first: Tensor,
    x: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Any],
    biases: Sequence[Any],
    base: Sequence[Any],
) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for k, up in enumerate(ups):
        out = up.shape[0]
        if weights:
            assert x is not None
            name = f"weights[{k}]"
            checks.check_shape(name, checks.check_tensor(name, weights[k]), (out, x.shape[-1]))
            if weights[k].requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}: want a frozen weight, got one that requires grad; "
                    "give the base's outputs as base= to train it"
                )
            found.append((name, weights[k]))
            if biases[k] is not None:
                name = f"biases[{k}]"
                checks.check_shape(name, checks.check_tensor(name, biases[k]), (out,))
                found.append((name, biases[k]))
        if base:
            name = f"base[{k}]"
            checks.check_shape(name, checks.check_tensor(name, base[k]), (*first.shape[:-1], out))
            found.append((name, base[k]))
    return found


def check(given: Given) -> Call:
    """Raise TypeError or ValueError, naming the argument, or return the call."""
    x, down, ups, weights, biases, base, hidden, core = given[:8]
    ups = _check_sequence("ups", ups)
    if not ups:
        raise ValueError("ups: want at least one tensor, got none")
    weights = () if weights is None else _check_sequence("weights", weights, len(ups))
    if biases is not None and not weights:
        raise ValueError("biases: want None unless weights are given, got a sequence")
    biases = (
        (None,) * len(weights) if biases is None else _check_sequence("biases", biases, len(ups))
    )
    base = () if base is None else _check_sequence("base", base, len(ups))
    if base and weights:
        raise ValueError("base: want either weights or base, got both")
    first, rank = _check_source(x, down, hidden, weights)
    same: list[tuple[str, Tensor]] = [] if x is None or first is x else [("x", x)]
    parameters: list[tuple[str, Tensor]] = [] if down is None else [("down", down)]
    for k, up in enumerate(ups):
        checks.check_shape(f"ups[{k}]", checks.check_tensor(f"ups[{k}]", up), ("O", rank))
        if up.shape[0] < 1:
            raise ValueError(f"ups[{k}]: want O >= 1, got {list(up.shape)}")
        parameters.append((f"ups[{k}]", up))
    same += _check_base(first, x, ups, weights, biases, base)
    checks.check_choice("dropout_at", given.dropout_at, DROPOUT_SITES)
    philox.check_probability(given.dropout)
    if core is not None:
        checks.check_shape("core", checks.check_tensor("core", core), (len(ups), rank, rank))
        parameters.append(("core", core))
    if (core is not None) != (given.dropout_at == "mode"):
        want = "[K, R, R]" if core is None else "None"
        raise ValueError(
            f"core: want {want} with dropout_at={given.dropout_at!r}, got "
            f"{'None' if core is None else 'a Tensor'}; elsewhere fold it into ups with "
            "mode_contract"
        )
    if hidden is not None and given.dropout_at == "input":
        raise ValueError(
            "dropout_at: want 'bottleneck' or 'mode' when hidden is given, got 'input'"
        )
    for name, t in same:
        checks.check_dtype(name, t, (first.dtype,), " like the activations")
    for name, t in parameters:
        checks.check_dtype(name, t, (first.dtype, torch.float32), " (the activations' or float32)")
    for name, t in same + parameters:
        checks.check_device(name, t, first.device)
    if given.rng is not None:
        checks.check_rng("rng", given.rng, first.device)
    checks.check_bool("training", given.training)
    number = checks.check_number("scale", given.scale)
    checks.check_choice("plan", given.plan, ("auto", *PLANS))
    drops = given.training and philox.threshold(given.dropout) > 0
    return Call(
        Tensors(x, down, hidden, ups, weights, biases, base, core),
        Settings(number, float(given.dropout) if drops else 0.0, given.dropout_at),
    )
