"""``gated_mlp``: raw operators, choice of backend, autograd.

A composite: the products are ``lowrank_linear``'s (``products.py``); only what lies between them is
this operator's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import formed
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.first_order import FirstOrderFunction
from petal_kernels._runtime.library import define
from petal_kernels._runtime.rows import flat_rows, result_of
from petal_kernels.ops.gated_mlp import products
from petal_kernels.ops.gated_mlp.arguments import (
    PLACES,
    Call,
    Gradients,
    Product,
    Settings,
    Tensors,
)
from petal_kernels.ops.gated_mlp.products import Dropout, Need, Place

NAME = "gated_mlp"

BACKENDS = tuple(rt.Backend(name, f"petal_kernels.ops.gated_mlp.{name}_impl") for name in rt.NAMES)


def explanation(call: Call, backend: str, notes: tuple[str, ...] = ()) -> rt.Explanation:
    """Which backend computes what lies between the linears."""
    return rt.explanation(
        NAME,
        BACKENDS,
        backend,
        lambda: (rt.select(NAME, BACKENDS, backend, call), None),
        call,
        notes=notes,
    )


_Results = tuple[Tensor, Tensor]


def _fwd(g: Tensor, u: Tensor | None, activation: str, backend: str) -> Callable[..., Tensor]:
    if g.numel() == 0:
        return _fwd_fake
    call = Call(flat_rows(g), flat_rows(u), activation)
    impl = rt.select(NAME, BACKENDS, backend, call).load()

    def run(g: Tensor, u: Tensor | None, activation: str, _: str) -> Tensor:
        p: Tensor = impl.forward(Call(flat_rows(g), flat_rows(u), activation))
        return p.contiguous()

    return run


def _fwd_fake(g: Tensor, u: Tensor | None, activation: str, backend: str) -> Tensor:
    return g.new_empty(g.shape)


def _explain(g: Tensor, u: Tensor | None, activation: str, backend: str) -> rt.Explanation | None:
    return explanation(Call(g, u, activation), backend) if g.numel() else None


def _bwd(_: Any, g: Tensor, u: Tensor | None, *rest: Any) -> Callable[..., _Results]:
    if g.numel() == 0:
        return _bwd_fake
    *_, activation, backend = rest
    call = Call(flat_rows(g), flat_rows(u), activation)
    impl = rt.select(NAME, BACKENDS, backend, call).load()

    def run(
        dp: Tensor | None,
        g: Tensor,
        u: Tensor | None,
        dh: Tensor | None,
        down: Tensor | None,
        rng: Tensor | None,
        dropout: float,
        activation: str,
        _: str,
    ) -> _Results:
        product = None
        if dh is not None:
            assert down is not None
            product = Product(flat_rows(dh), down, rng, dropout)
        rows = flat_rows(dp)
        found = impl.backward(Call(flat_rows(g), flat_rows(u), activation), rows, product)
        if dp is not None and rows is not None and rows.data_ptr() != dp.data_ptr():
            dp.copy_(rows.view(dp.shape))
        return _results(dp, g, u, down, found)

    return run


def _bwd_fake(
    dp: Tensor | None,
    g: Tensor,
    u: Tensor | None,
    dh: Tensor | None,
    down: Tensor | None,
    *_: Any,
) -> _Results:
    return _results(dp, g, u, down, Gradients())


def _results(
    dp: Tensor | None, g: Tensor, u: Tensor | None, down: Tensor | None, found: Gradients
) -> _Results:
    """du and dA; empty where not needed, zero where there is nothing to sum."""
    of = (None if dp is None else u, down)
    du, ddown = (
        g.new_empty(0)
        if each is None
        else each.new_zeros(each.shape)
        if value is None
        else value.contiguous()
        for each, value in zip(of, found, strict=True)
    )
    return du, ddown


act_op = define(
    f"{NAME}_act_fwd(Tensor g, Tensor? u, str activation, str backend) -> Tensor",
    _fwd,
    _fwd_fake,
    _explain,
)
_act_backward_op = define(
    f"{NAME}_act_bwd(Tensor(a!)? dp, Tensor g, Tensor? u, Tensor? dh, Tensor? down, Tensor? rng, "
    "float dropout, str activation, str backend) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def places_of(t: Tensors, scales: Sequence[float]) -> list[Place]:
    """Gate (if there is one), up and down."""
    return [Place(*each) for each in zip(t.weights, t.biases, t.downs, t.ups, scales, strict=True)]


def flatten(t: Tensors) -> tuple[Tensor | None, ...]:
    """One argument of ``apply`` for each tensor, since autograd does not look into sequences."""
    return (t.x, *t.weights, *t.biases, *t.downs, *t.ups)


def _unflatten(flat: Sequence[Any]) -> Tensors:
    """Of tensors or of flags."""
    x, *rest = flat
    n = len(rest) // 4
    return Tensors(x, *(rest[k * n : (k + 1) * n] for k in range(4)))


def run(
    t: Tensors, s: Settings, rng: Tensor | None, save: bool, backend: str
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor | None]:
    """y, the outputs of the linears before the activation, their middles and the last linear's."""
    places, by = places_of(t, s.scales), products.backend_of(backend)
    last = len(places) - 1
    with autocast_off(t.x):
        drop = Dropout(rng, s.dropout)
        inner, h = products.forward(flat_rows(t.x), places[:last], drop, save, by)
        p = act_op(inner[0], inner[1] if last == 2 else None, s.activation, backend)
        if places[last].up is not None:
            drop = drop.after(last)
        (y,), middle = products.forward(p, places[last:], drop, save, by)
    return result_of(y, (*t.x.shape[:-1], y.shape[-1])), inner, h, middle


def notes(t: Tensors, s: Settings, save: bool, backend: str) -> tuple[str, ...]:
    """Which backend and plan of ``lowrank_linear`` the updated linears take."""
    places, by = places_of(t, s.scales), products.backend_of(backend)
    last, names = len(places) - 1, PLACES[-len(places) :]
    x = flat_rows(t.x)
    p = x.new_empty((x.shape[0], places[last].weight.shape[1]))
    found = []
    for what, given, here in ((names[:last], x, places[:last]), (names[last:], p, places[last:])):
        drop = Dropout(None, s.dropout)
        said = products.explanation(given, here, drop, save, by) if x.numel() else None
        if said is not None:
            found.append(f"{', '.join(what)}: {said.operator} {said.choice}")
    return tuple(found)


class GatedMlpFunction(FirstOrderFunction):
    """Saves x itself or what it is formed of again, g and u (with ``recompute`` they are formed
    again), the middles, the generator's state and the parameters; never act(g), p or a mask."""

    operator = NAME

    @staticmethod
    def forward(ctx: Any, rng: Tensor | None, backend: str, *rest: Any) -> Tensor:
        s, t = Settings(*rest[:_N_SETTINGS]), _unflatten(rest[_N_SETTINGS:])
        y, inner, h, middle = run(t, s, rng, True, backend)
        wants = _unflatten(ctx.needs_input_grad[FIXED:])
        between = _through(wants) or wants.downs[-1]  # something before or at p is trained
        reads_x = any(wants.downs[:-1]) or (between and s.recompute)
        x_parts, ctx.form_x = formed.kept(t.x if reads_x else None)
        ctx.save_for_backward(
            h if between else None,
            middle,
            rng,
            *(inner if between and not s.recompute else [None] * len(inner)),
            *t.weights,
            *(t.biases if s.recompute else [None] * len(t.biases)),
            *t.downs,
            *t.ups,
            *x_parts,
        )
        ctx.x_shape, ctx.settings, ctx.backend = t.x.shape, s, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, middle, rng, *rest = ctx.saved_tensors
        flags = ctx.needs_input_grad[FIXED:]
        wants = _unflatten(flags)
        last = len(wants.weights) - 1
        ends = last + 4 * (last + 1)
        x = formed.again(rest[ends:], ctx.form_x)
        inner, t = rest[:last], _unflatten([x, *rest[last:ends]])
        with autocast_off(dy):
            grads = _backward(ctx, flat_rows(dy), t, inner, h, middle, rng, wants)
        if grads.x is not None:
            grads = grads._replace(x=grads.x.view(ctx.x_shape))
        found = zip(flatten(grads), flags, strict=True)
        return (*[None] * FIXED, *(g if want else None for g, want in found))


_N_SETTINGS = len(Settings._fields)
FIXED = 2 + _N_SETTINGS  # arguments of GatedMlpFunction.forward before the tensors


def _through(wants: Tensors) -> bool:
    """Whether a gradient has to pass p."""
    before = (*wants.biases[:-1], *wants.downs[:-1], *wants.ups[:-1])
    return bool(wants.x) or any(before)


def _backward(
    ctx: Any,
    dy: Tensor,
    t: Tensors,
    inner: Sequence[Tensor],
    h: Tensor | None,
    middle: Tensor | None,
    rng: Tensor | None,
    wants: Tensors,
) -> Tensors:
    """The last linear first, which needs no p; what lies between; then the others."""
    s: Settings = ctx.settings
    places, by, last = places_of(t, s.scales), products.backend_of(ctx.backend), len(t.weights) - 1
    through, trained = _through(wants), bool(wants.downs[last])
    drop = Dropout(rng, s.dropout)
    behind = drop if places[last].up is None else drop.after(last)
    need = Need(through, False, trained, bool(wants.ups[last]))
    end = products.backward([dy], None, middle, places[last:], behind, need, by)
    x = flat_rows(t.x)
    if s.recompute and (through or trained):
        assert x is not None
        inner = products.again(x, h, places[:last], by)
    begin = products.nothing(last)
    dbiases: list[Tensor | None] = [None] * (last + 1)
    ddown = None
    if through or trained:
        du, ddown = _act_backward_op(
            end.x,  # dp, read by nothing else: becomes dg
            inner[0],
            inner[1] if last == 2 else None,
            end.hidden if trained else None,
            places[last].down if trained else None,
            behind.rng,
            s.dropout,
            s.activation,
            ctx.backend,
        )
    if through:
        assert end.x is not None
        dys = [end.x, du][:last]
        need = Need(bool(wants.x), any(wants.downs[:last]), False, any(wants.ups[:last]))
        begin = products.backward(dys, x, h, places[:last], drop, need, by)
        dbiases[:last] = [d.sum(0) if w else None for d, w in zip(dys, wants.biases, strict=False)]
    if wants.biases[last]:
        dbiases[last] = dy.sum(0)
    return Tensors(
        begin.x,  # type: ignore[arg-type]
        [None] * (last + 1),  # type: ignore[list-item]
        dbiases,
        [*begin.downs, ddown],
        [*begin.ups, *end.ups],
    )
