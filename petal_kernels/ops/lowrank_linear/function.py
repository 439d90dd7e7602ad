"""``lowrank_linear``: choice of backend and plan, raw operators, autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import device, formed
from petal_kernels._runtime.first_order import FirstOrderFunction, own
from petal_kernels._runtime.library import define
from petal_kernels._runtime.rows import flat_rows, result_of
from petal_kernels.ops.lowrank_linear import planner
from petal_kernels.ops.lowrank_linear.arguments import Call, Gradients, Saved, Settings, Tensors

NAME = "lowrank_linear"

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.lowrank_linear.{name}_impl") for name in rt.NAMES
)
_LIBRARY = BACKENDS[-1]  # torch: also lends its plans to the other backends


def problem(call: Call, inference: bool) -> planner.Problem:
    """The sizes that the planner looks at."""
    t, first = call.tensors, call.first
    kind = first.device.type
    if kind == "cpu" and device.native_16bit(first.dtype):
        kind = "cpu native"
    elif kind == "cpu" and first.dtype == torch.float32 and device.library_leads():
        kind = "cpu mkl"
    return planner.Problem(
        rows=first.shape[:-1].numel(),
        width=t.x.shape[-1] if t.x is not None else 0,
        rank=max(up.shape[1] for up in t.ups),
        middle=call.middle,
        outs=tuple(up.shape[0] for up in t.ups),
        itemsize=first.element_size(),
        device=kind,
        has_weights=bool(t.weights),
        shares_hidden=t.hidden is not None,
        dropout=call.settings.dropout > 0.0,
        has_core=t.core is not None,
        inference=inference,
    )


def choose(call: Call, inference: bool, plan: str, backend: str) -> tuple[rt.Backend, str]:
    """The backend and the concrete plan.

    A plan asked for by name runs on the first backend that has it. ``auto`` takes the cheapest plan
    of the selected backend; for inference the library's ``merge`` competes with them.
    """
    sizes = problem(call, inference)
    if plan != "auto":
        reason = planner.not_applicable(plan, sizes)
        if reason is not None:
            raise ValueError(f"plan: {plan!r} does not apply: {reason}")
        return rt.select(NAME, BACKENDS, backend, call, plan), plan
    chosen = rt.select(NAME, BACKENDS, backend, call, plan)
    own = planner.rank_plans(chosen.load().PLANS, sizes)
    if backend == rt.AUTO and inference and chosen is not _LIBRARY:
        merge = planner.rank_plans(("merge",), sizes)
        if merge and merge[0].seconds < own[0].seconds:
            return _LIBRARY, "merge"
    return chosen, own[0].plan


def explanation(call: Call, inference: bool, plan: str, backend: str) -> rt.Explanation:
    """What `choose` says, with the modelled cost of every plan."""
    sizes = problem(call, inference)
    return rt.explanation(
        NAME,
        BACKENDS,
        backend,
        lambda: choose(call, inference, plan, backend),
        call,
        plan,
        notes=tuple(str(planner.estimate(each, sizes)) for each in planner.PLANS),
    )


def _asked(*args: Any) -> tuple[Call, bool, str, str] | None:
    """What a forward asks of `choose`; None where there is nothing to compute."""
    *tensors, _, scales, dropout, dropout_at, save, plan, backend = args
    x, downs, hidden, ups, weights, biases, base, core = tensors
    if (x if x is not None else hidden).numel() == 0:
        return None
    t = Tensors(
        flat_rows(x),
        downs,
        flat_rows(hidden),
        ups,
        weights,
        biases,
        [flat_rows(b) for b in base],
        core,
    )
    inference = not save and hidden is None
    return Call(t, Settings(scales, dropout, dropout_at)), inference, plan, backend


def _fwd(*args: Any) -> Callable[..., tuple[list[Tensor], Tensor]]:
    asked = _asked(*args)
    if asked is None:
        return _fwd_fake
    chosen, concrete = choose(*asked)
    impl = chosen.load()

    def run(
        x: Tensor | None,
        downs: list[Tensor],
        hidden: Tensor | None,
        ups: list[Tensor],
        weights: list[Tensor],
        biases: list[Tensor | None],
        base: list[Tensor],
        core: Tensor | None,
        rng: Tensor | None,
        scales: list[float],
        dropout: float,
        dropout_at: str,
        save: bool,
        *_: Any,
    ) -> tuple[list[Tensor], Tensor]:
        bases = [flat_rows(b) for b in base]
        t = Tensors(flat_rows(x), downs, flat_rows(hidden), ups, weights, biases, bases, core)
        ys, saved = impl.forward(Call(t, Settings(scales, dropout, dropout_at)), rng, concrete)
        first: Tensor = x if x is not None else hidden  # type: ignore[assignment]
        if first.dim() == 2:
            outputs = [y.contiguous() for y in ys]
        else:
            lead = first.shape[:-1]
            outputs = [result_of(y, (*lead, y.shape[1])) for y in ys]
        return outputs, saved.h if save and hidden is None else first.new_empty(0)

    return run


def _explain(*args: Any) -> rt.Explanation | None:
    asked = _asked(*args)
    return None if asked is None else explanation(*asked)


def for_compiled(*args: Any) -> tuple[Any, ...] | None:
    """What compiled code must know to run a forward of these arguments; None: it does not."""
    asked = _asked(*args)
    if asked is None:
        return None
    chosen, concrete = choose(*asked)
    impl = chosen.load()
    found: tuple[Any, ...] | None = (
        impl.compiled(asked[0], concrete) if hasattr(impl, "compiled") else None
    )
    return found


def _fwd_fake(*args: Any) -> tuple[list[Tensor], Tensor]:
    *tensors, _, scales, dropout, dropout_at, save, _, _ = args
    call = Call(Tensors(*tensors), Settings(scales, dropout, dropout_at))
    t, first = call.tensors, call.first
    lead = first.shape[:-1]
    # Not lead.numel(): of a size that may change it makes this one.
    kept = (math.prod(lead), call.middle) if save and t.hidden is None else (0,)
    return [first.new_empty((*lead, up.shape[0])) for up in t.ups], first.new_empty(kept)


_Results = tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor]


def _bwd(*args: Any) -> Callable[..., _Results]:
    if args[2].numel() == 0:
        return _bwd_fake
    call, _, _ = _backward_call(*args)
    impl = rt.select(NAME, BACKENDS, args[-1], call, "auto").load()

    def run(dys: list[Tensor], *args: Any) -> _Results:
        call, given, wanted = _backward_call(dys, *args)
        assert given.hidden is not None
        found = impl.backward(
            call, Saved(flat_rows(given.hidden)), [flat_rows(dy) for dy in dys], args[6], wanted
        )
        return _results(given, args[-2], found)

    return run


def _backward_call(
    dys: list[Tensor],
    x: Tensor | None,
    h: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    weights: list[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    *rest: Any,
) -> tuple[Call, Gradients, frozenset[str]]:
    *settings, need, _ = rest
    wanted = frozenset(compress(Gradients._fields, need))
    given = Gradients(x, downs, h, ups, core)
    if x is not None:
        x = flat_rows(x) if "downs" in wanted else x.reshape(-1, x.shape[-1])
    hidden = None if downs else flat_rows(h)
    t = Tensors(x, downs, hidden, ups, weights, (), (), core)
    return Call(t, Settings(*settings)), given, wanted


def _bwd_fake(
    dys: list[Tensor],
    x: Tensor | None,
    h: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    weights: list[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    *rest: Any,
) -> _Results:
    return _results(Gradients(x, downs, h, ups, core), rest[-2], Gradients())


def _results(given: Gradients, need: Sequence[bool], found: Gradients) -> _Results:
    """Gradients as the fake promises them: contiguous, shaped like their tensors, empty where not
    needed, zero where there is nothing to sum."""
    x, downs, h, ups, core = given
    need_x, need_downs, need_hidden, need_ups, need_core = need
    assert h is not None
    return (
        _grad(x if need_x else None, found.x, h),
        _grads(downs if need_downs else (), found.downs, h),
        _grad(h if need_hidden else None, found.hidden, h),
        _grads(ups if need_ups else (), found.ups, h),
        _grad(core if need_core else None, found.core, h),
    )


def _grad(of: Tensor | None, value: Tensor | None, like: Tensor) -> Tensor:
    if of is None:
        return like.new_empty(0)
    if value is None:
        return of.new_zeros(of.shape)
    value = value.contiguous()
    return value if value.shape == of.shape else value.view(of.shape)


def _grads(
    of: Sequence[Tensor] | None, values: Sequence[Tensor | None] | None, like: Tensor
) -> list[Tensor]:
    of = of or ()
    values = values or [None] * len(of)
    return [_grad(each, value, like) for each, value in zip(of, values, strict=True)]


_SETTINGS = "float[] scales, float dropout, str dropout_at"
_N_SETTINGS = len(Settings._fields)

forward_op = define(
    f"{NAME}_fwd(Tensor? x, Tensor[] downs, Tensor? hidden, Tensor[] ups, Tensor[] weights, "
    f"Tensor?[] biases, Tensor[] base, Tensor? core, Tensor? rng, {_SETTINGS}, bool save, "
    "str plan, str backend) -> (Tensor[], Tensor)",
    _fwd,
    _fwd_fake,
    _explain,
    for_compiled,
)
_backward_op = define(
    f"{NAME}_bwd(Tensor[] dys, Tensor? x, Tensor h, Tensor[] downs, Tensor[] ups, "
    f"Tensor[] weights, Tensor? core, Tensor? rng, {_SETTINGS}, bool[] need, str backend) "
    "-> (Tensor, Tensor[], Tensor, Tensor[], Tensor)",
    _bwd,
    _bwd_fake,
)


def flatten(t: Tensors) -> tuple[Tensor | None, ...]:
    """One argument of ``apply`` for each tensor, since autograd does not look into sequences."""
    return (t.x, t.hidden, t.core, *t.downs, *t.ups, *t.weights, *t.biases, *t.base)


class Counts(NamedTuple):
    """How many tensors of each kind `apply` is given."""

    downs: int
    ups: int
    weights: int


def _unflatten(flat: Sequence[Any], counts: Counts) -> Tensors:
    """Of tensors or of flags."""
    x, hidden, core, *lists = flat
    ups = counts.downs
    weights = ups + counts.ups
    biases = weights + counts.weights
    base = biases + counts.weights
    return Tensors(
        x,
        lists[:ups],
        hidden,
        lists[ups:weights],
        lists[weights:biases],
        lists[biases:base],
        lists[base:],
        core,
    )


class LowRankLinearFunction(FirstOrderFunction):
    """Saves x (where a down-projection is trained) or what it is formed of again, h or the given
    hidden, the generator's state and the parameters."""

    operator = NAME

    @staticmethod
    def forward(
        ctx: Any, rng: Tensor | None, plan: str, backend: str, counts: Counts, *rest: Any
    ) -> tuple[Tensor, ...]:
        settings = rest[:_N_SETTINGS]
        t = _unflatten(rest[_N_SETTINGS:], counts)
        ys, h = forward_op(*t, rng, *settings, True, plan, backend)
        first = FIXED + _SINGLE
        trains_downs = True in ctx.needs_input_grad[first : first + counts.downs]
        x_parts, ctx.form_x = formed.kept(t.x if trains_downs else None)
        ctx.save_for_backward(
            h if t.hidden is None else t.hidden,
            t.core,
            rng,
            *t.downs,
            *t.ups,
            *t.weights,
            *x_parts,
        )
        ctx.x_shape = None if t.x is None else t.x.shape
        ctx.settings, ctx.backend, ctx.counts = settings, backend, counts
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        h, core, rng, *rest = ctx.saved_tensors
        counts: Counts = ctx.counts
        x = formed.again(rest[sum(counts) :], ctx.form_x)
        wants = _unflatten(ctx.needs_input_grad[FIXED:], counts)
        if x is None and ctx.x_shape is not None:
            # With every down-projection frozen nothing reads a value of x, only its shape: an
            # expanded scalar occupies nothing.
            x = dys[0].new_empty(()).expand(ctx.x_shape)
        need = [wants.x, True in wants.downs, wants.hidden, True in wants.ups, wants.core]
        downs, rest = rest[: counts.downs], rest[counts.downs :]
        ups, weights = rest[: counts.ups], rest[counts.ups :][: counts.weights]
        dx, ddowns, dhidden, dups, dcore = _backward_op(
            dys, x, h, downs, ups, weights, core, rng, *ctx.settings, need, ctx.backend
        )
        return (
            *_NOTHING,
            dx if wants.x else None,
            dhidden if wants.hidden else None,
            dcore if wants.core else None,
            *_wanted(ddowns, wants.downs),
            *_wanted(dups, wants.ups),
            *[None] * counts.weights,
            *[_column_sum(dy) if w else None for dy, w in zip(dys, wants.biases, strict=False)],
            *[
                own(dy, ctx, k - counts.ups) if want else None
                for k, (dy, want) in enumerate(zip(dys, wants.base, strict=False))
            ],
        )


_SINGLE = 3  # tensors before the sequences, as `flatten` gives them
FIXED = 4 + _N_SETTINGS  # arguments of LowRankLinearFunction.forward before the tensors
_NOTHING = (None,) * FIXED


def _wanted(grads: Sequence[Tensor], wants: Sequence[Any]) -> list[Tensor | None]:
    """No gradient where none is wanted; of none there is none."""
    if not grads:
        return [None] * len(wants)
    return [grad if want else None for grad, want in zip(grads, wants, strict=True)]


def _column_sum(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0)
