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
    Backward has neither biases nor base, and reads x for the gradients of downs alone: otherwise
    only its shape is real.
    """

    x: Tensor | None  # [N, D]
    downs: Sequence[Tensor]  # U [R, D], shared, or A_k [R_k, D] of every output; none with hidden
    hidden: Tensor | None  # [N, R], in place of x U^T
    ups: Sequence[Tensor]  # P_k [O_k, R], or [O_k, R_k]
    weights: Sequence[Tensor]  # W_k [O_k, D], any strides
    biases: Sequence[Tensor | None]  # [O_k], one for each weight
    base: Sequence[Tensor]  # [N, O_k], in place of weights
    core: Tensor | None  # [K, R, R], with dropout_at "mode" only


class Settings(NamedTuple):
    """Everything that is no tensor, in the order of the raw operators' schemas."""

    scales: Sequence[float]  # one for each output
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
    def own_downs(self) -> bool:
        """Whether every output has a down-projection of its own, of a rank of its own."""
        return len(self.tensors.downs) > 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First column and rank of every output's part of h."""
        ranks = [up.shape[1] for up in self.tensors.ups]
        if not self.own_downs:
            return [(0, rank) for rank in ranks]
        return [(sum(ranks[:k]), rank) for k, rank in enumerate(ranks)]

    @property
    def middle(self) -> int:
        """Columns of h."""
        ranks = [up.shape[1] for up in self.tensors.ups]
        return sum(ranks) if self.own_downs else ranks[0]

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

    # [N, R] before cores and masks, in x's dtype; the given one where hidden is given. With own
    # down-projections [N, sum of R_k], side by side; a mask on x has acted.
    h: Tensor


class Gradients(NamedTuple):
    """What a backward returns, in the order of the raw operator's ``need``; None where it was not
    asked for."""

    x: Tensor | None = None
    downs: Sequence[Tensor] | None = None
    hidden: Tensor | None = None  # of h as it is saved, whether it was given or not
    ups: Sequence[Tensor] | None = None
    core: Tensor | None = None


def _check_sequence(name: str, value: Any, length: int | None = None) -> Sequence[Any]:
    if isinstance(value, Tensor):
        checks.check_tensor(name, value)
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


def _check_downs(down: Any, ups: Sequence[Any], width: int) -> tuple[list[Tensor], list[int]]:
    """The down-projections, one or every output's own, and the rank of each output."""
    if isinstance(down, Tensor) and down.dim() != 3:
        checks.check_floating("down", down)
        checks.check_shape("down", down, ("R", width))
        if down.shape[0] < 1 or width < 1:
            raise ValueError(f"down: want R >= 1 and D >= 1, got {list(down.shape)}")
        return [down], [down.shape[0]] * len(ups)
    if not isinstance(down, (Tensor, list, tuple)):
        raise TypeError(f"down: want a Tensor or a sequence of them, got {type(down).__name__}")
    downs = _check_sequence("down", down, len(ups))
    for k, each in enumerate(downs):
        checks.check_floating(f"down[{k}]", each)
        checks.check_shape(f"down[{k}]", each, ("R", width))
        if each.shape[0] < 1 or width < 1:
            raise ValueError(f"down[{k}]: want R >= 1 and D >= 1, got {list(each.shape)}")
    return list(downs), [each.shape[0] for each in downs]


def _check_source(
    x: Any, down: Any, hidden: Any, ups: Sequence[Any], weights: Sequence[Any]
) -> tuple[Tensor, list[Tensor], list[int]]:
    """The activations that carry dtype and device, the down-projections, each output's rank."""
    if hidden is None:
        if x is None or down is None:
            missing = "x" if x is None else "down"
            raise TypeError(f"{missing}: want a Tensor (or hidden instead of x and down), got None")
        checks.check_floating("x", x)
        if x.dim() < 1:
            raise ValueError(f"x: want shape [..., D], got {list(x.shape)}")
        downs, ranks = _check_downs(down, ups, x.shape[-1])
        return x, downs, ranks
    if down is not None:
        raise ValueError(
            "down: want None when hidden is given (hidden is already x down^T), got "
            f"{'a Tensor' if isinstance(down, Tensor) else type(down).__name__}"
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
    return hidden, [], [hidden.shape[-1]] * len(ups)


def _check_scales(scale: Any, outputs: int) -> tuple[float, ...]:
    if not isinstance(scale, (list, tuple)):
        return (checks.check_number("scale", scale),) * outputs
    if len(scale) != outputs:
        raise ValueError(
            f"scale: want one number or {outputs}, one for each of ups, got {len(scale)}"
        )
    return tuple(checks.check_number(f"scale[{k}]", each) for k, each in enumerate(scale))


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


def _check_core(core: Any, dropout_at: str, ups: Sequence[Tensor], downs: Sequence[Tensor]) -> None:
    if core is not None:
        rank = ups[0].shape[1]
        checks.check_shape("core", checks.check_tensor("core", core), (len(ups), rank, rank))
        if len(downs) > 1:
            raise ValueError("down: want one Tensor, which the outputs share, beside core")
    if (core is not None) != (dropout_at == "mode"):
        want = "[K, R, R]" if core is None else "None"
        raise ValueError(
            f"core: want {want} with dropout_at={dropout_at!r}, got "
            f"{'None' if core is None else 'a Tensor'}; elsewhere fold it into ups with "
            "mode_contract"
        )


def listed(given: Given) -> Tensors:
    """The tensors of a call whose like has been checked."""
    x, down, ups, weights, biases, base, hidden, core = given[:8]
    downs = [down] if isinstance(down, Tensor) and down.dim() == 2 else _list(down)
    weights = _list(weights)
    biases = [None] * len(weights) if biases is None else biases
    return Tensors(x, downs, hidden, _list(ups), weights, biases, _list(base), core)


def _list(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value.unbind(0) if isinstance(value, Tensor) else value


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
    first, downs, ranks = _check_source(x, down, hidden, ups, weights)
    same: list[tuple[str, Tensor]] = [] if x is None or first is x else [("x", x)]
    one = len(downs) == 1
    parameters = [("down" if one else f"down[{k}]", each) for k, each in enumerate(downs)]
    for k, (up, rank) in enumerate(zip(ups, ranks, strict=True)):
        checks.check_shape(f"ups[{k}]", checks.check_tensor(f"ups[{k}]", up), ("O", rank))
        if up.shape[0] < 1:
            raise ValueError(f"ups[{k}]: want O >= 1, got {list(up.shape)}")
        parameters.append((f"ups[{k}]", up))
    same += _check_base(first, x, ups, weights, biases, base)
    checks.check_choice("dropout_at", given.dropout_at, DROPOUT_SITES)
    philox.check_probability(given.dropout)
    _check_core(core, given.dropout_at, ups, downs)
    if core is not None:
        parameters.append(("core", core))
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
    scales = _check_scales(given.scale, len(ups))
    checks.check_choice("plan", given.plan, ("auto", *PLANS))
    drops = given.training and philox.threshold(given.dropout) > 0
    return Call(
        Tensors(x, downs, hidden, ups, weights, biases, base, core),
        Settings(scales, float(given.dropout) if drops else 0.0, given.dropout_at),
    )
