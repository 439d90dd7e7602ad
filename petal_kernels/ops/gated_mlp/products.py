"""The linears of ``gated_mlp``: those with an update by the raw operators of ``lowrank_linear``,
looked up by name, so that its backends serve here; those without by the
library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import library

_PLAN = "auto"


class Place(NamedTuple):
    """A frozen linear [out, in] and its update, if it has one."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None  # A [R, in]
    up: Tensor | None  # B [out, R]
    scale: float


class Dropout(NamedTuple):
    """The masks on what the updates of some linears read: of linear k, stream k."""

    rng: Tensor | None  # None: none
    p: float

    def after(self, streams: int) -> Dropout:
        """The same from another stream on."""
        if self.rng is None or streams == 0:
            return self
        ahead = torch.arange(0, 2 * streams, streams, device=self.rng.device)
        return Dropout(self.rng + ahead, self.p)


class Need(NamedTuple):
    """Which gradients a backward is asked for, in the order of ``lowrank_linear``'s."""

    x: bool
    downs: bool
    hidden: bool
    ups: bool


class Found(NamedTuple):
    """And what it gives: of linears without an update nothing but x's part."""

    x: Tensor | None
    downs: list[Tensor | None]
    hidden: Tensor | None
    ups: list[Tensor | None]


def nothing(count: int) -> Found:
    """Of so many linears."""
    return Found(None, [None] * count, None, [None] * count)


def backend_of(name: str) -> str:
    """``lowrank_linear``'s backend where this operator's has that name: ``torch`` is torch
    throughout; otherwise it chooses for itself."""
    return "torch" if name == "torch" else rt.AUTO


@functools.cache
def _overload(name: str) -> Any:
    return getattr(torch.ops.petal, f"lowrank_linear_{name}").default


@functools.cache
def _raw(name: str) -> Callable[..., Any]:
    return library.calls[_overload(name)]


def _updated(places: Sequence[Place]) -> list[int]:
    """The linears with an update. Of at most two these are neighbours, so that their masks are
    streams in a row."""
    return [k for k, place in enumerate(places) if place.up is not None]


def _arguments(
    x: Tensor, places: Sequence[Place], drop: Dropout, save: bool, backend: str
) -> tuple[Any, ...]:
    """Of ``lowrank_linear_fwd``, for linears that all have an update."""
    weights, biases, downs, ups, scales = (list(each) for each in zip(*places, strict=True))
    setting = (scales, drop.p, "input", save, _PLAN, backend)
    return (x, downs, None, ups, weights, biases, [], None, drop.rng, *setting)


def forward(
    x: Tensor, places: Sequence[Place], drop: Dropout, save: bool, backend: str
) -> tuple[list[Tensor], Tensor | None]:
    """Each linear's output of x [N, in], and with ``save`` the middles h [N, sum of R] of those
    that have an update."""
    updated = _updated(places)
    outs: list[Tensor | None] = [None] * len(places)
    h = None
    if updated:
        mine = [places[k] for k in updated]
        given = _arguments(x, mine, drop.after(updated[0]), save, backend)
        found, h = _raw("fwd")(*given)
        for k, y in zip(updated, found, strict=True):
            outs[k] = y
    ys = [
        F.linear(x, place.weight, place.bias) if y is None else y
        for place, y in zip(places, outs, strict=True)
    ]
    return ys, h


def again(x: Tensor, h: Tensor | None, places: Sequence[Place], backend: str) -> list[Tensor]:
    """The outputs once more, from the kept middles: no mask is drawn."""
    outs, at = [], 0
    for place in places:
        if place.up is None:
            outs.append(F.linear(x, place.weight, place.bias))
            continue
        assert h is not None
        middle = h[:, at : at + place.up.shape[1]]
        at += middle.shape[1]
        setting = ([place.scale], 0.0, "bottleneck", False, _PLAN, backend)
        linear = ([place.up], [place.weight], [place.bias])
        (y,), _ = _raw("fwd")(x, [], middle, *linear, [], None, None, *setting)
        outs.append(y)
    return outs


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    places: Sequence[Place],
    drop: Dropout,
    need: Need,
    backend: str,
) -> Found:
    """The gradients that are needed; x is read for those of the downs alone."""
    updated = _updated(places)
    downs: list[Tensor | None] = [None] * len(places)
    ups: list[Tensor | None] = [None] * len(places)
    dx = dh = None
    if updated and any(need):
        if x is None:  # of which only the shape is read: an expanded scalar occupies nothing
            x = dys[0].new_empty(()).expand(dys[0].shape[0], places[0].weight.shape[1])
        weights, _, a, b, scales = zip(*(places[k] for k in updated), strict=True)
        setting = (list(scales), drop.p, "input", [*need, False], backend)
        given = ([dys[k] for k in updated], x, h, list(a), list(b), list(weights))
        dx, ddowns, dh, dups, _ = _raw("bwd")(*given, None, drop.after(updated[0]).rng, *setting)
        for k, each in zip(updated, ddowns, strict=False):
            downs[k] = each
        for k, each in zip(updated, dups, strict=False):
            ups[k] = each
    if not need.x:
        return Found(None, downs, dh, ups)
    for k, (dy, place) in enumerate(zip(dys, places, strict=True)):
        if k not in updated:
            dx = dy @ place.weight if dx is None else dx.addmm_(dy, place.weight)
    return Found(dx, downs, dh, ups)


def compiled(
    x: Tensor, places: Sequence[Place], drop: Dropout, save: bool, backend: str
) -> Any | None:
    """What a compiled call must know to form these products, which all have an update; None where
    it could not."""
    if len(_updated(places)) < len(places):
        return None
    return library.compiled[_overload("fwd")](*_arguments(x, places, drop, save, backend))


def explanation(
    x: Tensor, places: Sequence[Place], drop: Dropout, save: bool, backend: str
) -> rt.Explanation | None:
    """What ``lowrank_linear`` says of its part; None where it has none."""
    mine = [places[k] for k in _updated(places)]
    if not mine:
        return None
    explain = library.explainers[_overload("fwd")]
    return explain(*_arguments(x, mine, drop, save, backend))
