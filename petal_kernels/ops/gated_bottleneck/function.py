"""``gated_bottleneck``: choice of backend, raw operators, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import device
from petal_kernels._runtime.first_order import FirstOrderFunction, own
from petal_kernels._runtime.library import define
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels._runtime.rows import flat_rows
from petal_kernels.ops.gated_bottleneck.arguments import Call, Saved, Settings, Tensors

NAME = "gated_bottleneck"

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.gated_bottleneck.{name}_impl") for name in rt.NAMES
)
_SETTINGS = (
    "str activation, bool add_input, str route, bool route_relu, str gate, bool gate_sees_output, "
    "bool gate_linear, bool add_gate_input, int samples, float scale, float dropout, float norm_eps"
)
_N_SETTINGS = len(Settings._fields)


def select(call: Any, backend: str) -> rt.Backend:
    """The first backend that can run, but the library where products are all there is to do and
    the processor multiplies 16-bit matrices itself: our CPU kernels widen those to fp32."""
    bare = call.tensors.norm_weight is None and call.settings.dropout == 0.0
    if backend == rt.AUTO and bare and call.device.type == "cpu":
        backend = "torch" if device.native_16bit(call.first.dtype) else backend
    return rt.select(NAME, BACKENDS, backend, call)


def explanation(call: Call, backend: str) -> rt.Explanation:
    """What `select` says."""
    s, right = call.settings, call.tensors.right
    notes = [f"gate {s.gate}, route {s.route}"]
    if s.route == "product":
        notes.append(
            "route as one r x r matrix per sample"
            if right is None
            else f"route through {right.shape[1]} vision token(s)"
        )
    return rt.explanation(
        NAME, BACKENDS, backend, lambda: (select(call, backend), None), call, notes=tuple(notes)
    )


def _saved_shapes(call: Call, save: bool) -> list[tuple[int, ...]]:
    """Of z, zg, logits and moments; (0,) for what is absent."""
    t, n = call.tensors, call.first.shape[0]
    none: tuple[int, ...] = (0,)
    if not save:
        return [none] * 4
    return [
        none if t.bottleneck is not None else (n, t.up.shape[1]),
        none if t.gate_down is None else (n, t.gate_down.shape[0]),
        (n,) if call.has_logits else none,
        none if t.norm_weight is None else (n, 2),
    ]


def _saved_dtypes(call: Call) -> list[torch.dtype]:
    dtype = call.first.dtype
    return [dtype, dtype, wide_dtype(dtype), wide_dtype(dtype)]


def _empty_saved(call: Call, save: bool) -> list[Tensor]:
    kinds = zip(_saved_shapes(call, save), _saved_dtypes(call), strict=True)
    return [call.first.new_empty(shape, dtype=dtype) for shape, dtype in kinds]


def _stored(call: Call, found: Saved, save: bool) -> list[Tensor]:
    """What a backend kept, as the fake promises it."""
    return [
        each.contiguous() if save and each is not None else call.first.new_empty(0, dtype=dtype)
        for each, dtype in zip(found, _saved_dtypes(call), strict=True)
    ]


_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fwd(tensors: list[Any], _: Tensor | None, *rest: Any) -> Callable[..., _Forward]:
    *settings, _, backend = rest
    call = Call(Tensors(*tensors), Settings(*settings))
    if call.first.shape[0] == 0:
        return _fwd_fake
    impl = select(call, backend).load()

    def run(tensors: list[Any], rng: Tensor | None, *rest: Any) -> _Forward:
        *settings, save, _ = rest
        call = Call(Tensors(*tensors), Settings(*settings))
        out, found = impl.forward(call, rng, save)
        return out.contiguous(), *_stored(call, found, save)

    return run


def _explain(tensors: list[Any], _: Tensor | None, *rest: Any) -> rt.Explanation | None:
    *settings, _, backend = rest
    call = Call(Tensors(*tensors), Settings(*settings))
    return explanation(call, backend) if call.first.shape[0] else None


def _fwd_fake(tensors: list[Any], rng: Tensor | None, *rest: Any) -> _Forward:
    *settings, save, _ = rest
    call = Call(Tensors(*tensors), Settings(*settings))
    out = call.first.new_empty((call.first.shape[0], call.tensors.up.shape[0]))
    return out, *_empty_saved(call, save)  # type: ignore[return-value]


def _gradient_shape(name: str, t: Tensors, rows: int) -> tuple[int, ...]:
    given: Tensor | None = getattr(t, name)
    if given is not None:
        return tuple(given.shape)
    width = t.up.shape[0]  # of a row tensor that backward does without
    if name == "x" and t.down is not None:
        width = t.down.shape[1]
    if name == "gate_input" and t.gate_down is not None:
        width = t.gate_down.shape[1]
    return (rows, width)


def _gradients(dout: Tensor, t: Tensors, wanted: list[str]) -> list[Tensor]:
    """Unwritten."""
    return [
        (dout if getattr(t, name) is None else getattr(t, name)).new_empty(
            _gradient_shape(name, t, dout.shape[0])
        )
        for name in wanted
    ]


def _bwd(
    dout: Tensor, tensors: list[Any], saved: list[Tensor | None], _: Tensor | None, *rest: Any
) -> Callable[..., list[Tensor]]:
    """What gives the gradients that are needed, in the order of `Tensors`."""
    *settings, _, backend = rest
    if dout.shape[0] == 0:
        return _bwd_nothing
    # A row tensor that backward does without is absent; the selection looks at what is there.
    call = Call(Tensors(*tensors), Settings(*settings))
    impl = select(_Backward(call, dout), backend).load()

    def run(
        dout: Tensor,
        tensors: list[Any],
        saved: list[Tensor | None],
        rng: Tensor | None,
        *rest: Any,
    ) -> list[Tensor]:
        *settings, need, _ = rest
        t = Tensors(*tensors)
        wanted = list(compress(Tensors._fields, need))
        call = Call(t, Settings(*settings))
        found = impl.backward(call, Saved(*saved), dout, rng, frozenset(wanted))
        results = []
        for name in wanted:
            given: Tensor | None = getattr(t, name)
            dtype = dout.dtype if given is None else given.dtype
            shape = _gradient_shape(name, t, dout.shape[0])
            results.append(found[name].to(dtype).contiguous().view(shape))
        return results

    return run


def _bwd_nothing(dout: Tensor, tensors: list[Any], *rest: Any) -> list[Tensor]:
    """Of no rows."""
    wanted = list(compress(Tensors._fields, rest[-2]))
    return [gradient.zero_() for gradient in _gradients(dout, Tensors(*tensors), wanted)]


class _Backward:
    """What ``select`` sees in backward: x itself may not have been kept."""

    def __init__(self, call: Call, dout: Tensor) -> None:
        self.tensors, self.settings, self.first = call.tensors, call.settings, dout
        self.device, self.is_cuda, self.has_logits = dout.device, dout.is_cuda, call.has_logits


def _bwd_fake(
    dout: Tensor,
    tensors: list[Any],
    saved: list[Tensor | None],
    rng: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    return _gradients(dout, Tensors(*tensors), list(compress(Tensors._fields, rest[-2])))


def _update_call(
    base: Tensor, first: int, tensors: list[Any], settings: Sequence[Any]
) -> tuple[Call, Tensor]:
    """The call, whose base is the columns that are overwritten."""
    t = Tensors(*tensors)
    columns = base[:, first : first + t.up.shape[0]]
    return Call(t._replace(base=columns), Settings(*settings)), columns


_Kept = tuple[Tensor, Tensor, Tensor, Tensor]


def _update(
    base: Tensor, first: int, tensors: list[Any], _: Tensor | None, *rest: Any
) -> Callable[..., _Kept]:
    *settings, _, backend = rest
    if base.shape[0] == 0:
        return _update_fake
    call, _ = _update_call(base, first, tensors, settings)
    impl = select(call, backend).load()

    def run(base: Tensor, first: int, tensors: list[Any], rng: Tensor | None, *rest: Any) -> _Kept:
        *settings, save, _ = rest
        call, columns = _update_call(base, first, tensors, settings)
        _, found = impl.forward(call, rng, save, columns)
        return tuple(_stored(call, found, save))  # type: ignore[return-value]

    return run


def _explain_update(
    base: Tensor, first: int, tensors: list[Any], _: Tensor | None, *rest: Any
) -> rt.Explanation | None:
    *settings, _, backend = rest
    call, _ = _update_call(base, first, tensors, settings)
    return explanation(call, backend) if base.shape[0] else None


def _update_fake(
    base: Tensor, first: int, tensors: list[Any], rng: Tensor | None, *rest: Any
) -> _Kept:
    *settings, save, _ = rest
    call = Call(Tensors(*tensors), Settings(*settings))
    return tuple(_empty_saved(call, save))  # type: ignore[return-value]


forward_op = define(
    f"{NAME}_fwd(Tensor?[] tensors, Tensor? rng, {_SETTINGS}, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _explain,
)
_backward_op = define(
    f"{NAME}_bwd(Tensor dout, Tensor?[] tensors, Tensor?[] saved, Tensor? rng, {_SETTINGS}, "
    "bool[] need, str backend) -> Tensor[]",
    _bwd,
    _bwd_fake,
)


update_op = define(
    f"{NAME}_update(Tensor(a!) base, int first, Tensor?[] tensors, Tensor? rng, {_SETTINGS}, "
    "bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _update,
    _update_fake,
    _explain_update,
)


def _wanted(ctx: Any) -> set[str]:
    """The tensors that need a gradient."""
    flags = ctx.needs_input_grad[2 + _N_SETTINGS :]
    return {name for name, flag in zip(Tensors._fields, flags, strict=True) if flag}


def _needed_rows(t: Tensors, s: Settings, wants: set[str]) -> Tensors:
    """The tensors with those row tensors left out whose values backward does not read."""
    values = s.gate != "none" or t.norm_weight is not None  # Y is formed again
    norm = t.norm_weight is not None
    x = ("down" in wants and t.down is not None) or (s.add_input and values)
    gate_input = (
        (s.gate == "large" and "gate_down" in wants)
        or (s.gate in ("middleX", "small") and "gate_weight" in wants)
        or (s.add_gate_input and norm)
    )
    return t._replace(
        x=t.x if x else None,
        base=t.base if values else None,
        gate_input=t.gate_input if gate_input else None,
        residual=t.residual if norm else None,
    )


class GatedBottleneckFunction(FirstOrderFunction):
    """Saves x and gate_input where backward reads them, r-wide pre-activations, one or two numbers
    per row, the generator's state and the parameters."""

    operator = NAME

    @staticmethod
    def forward(ctx: Any, rng: Tensor | None, backend: str, *rest: Any) -> Tensor:
        settings = Settings(*rest[:_N_SETTINGS])
        t = Tensors(*rest[_N_SETTINGS:])
        out, *saved = forward_op(list(t), rng, *settings, True, backend)
        kept = _needed_rows(t, settings, _wanted(ctx))
        ctx.save_for_backward(rng, *saved, *kept)
        ctx.settings, ctx.backend = settings, backend
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rng, z, zg, logits, moments, *kept = ctx.saved_tensors
        settings: Settings = ctx.settings
        t = Tensors(*kept)
        wants = _wanted(ctx)
        saved = [s if s.numel() else None for s in (z, zg, logits, moments)]
        # The residual's gradient, and a plain sum's, is dout; see `own`.
        passed: dict[str, Tensor] = {}
        if t.norm_weight is None:
            if "residual" in wants:
                passed["residual"] = own(dout)
            plain = settings.gate == "none" and settings.scale == 1.0 and rng is None
            if plain and "base" in wants:
                passed["base"] = own(dout)
        need = [name in wants and name not in passed for name in Tensors._fields]
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        if any(need):
            grads = _backward_op(dout, list(t), saved, rng, *settings, need, ctx.backend)
            passed |= zip(compress(Tensors._fields, need), grads, strict=True)
        return (*[None] * (2 + _N_SETTINGS), *map(passed.get, Tensors._fields))


class UpdateFunction(FirstOrderFunction):
    """The sum alone, written into columns of a base that nobody else reads: its gradient passes."""

    operator = NAME
    passes_on = True

    @staticmethod
    def forward(ctx: Any, base: Tensor, first: int, backend: str, *rest: Any) -> Tensor:
        settings = Settings(*rest[:_N_SETTINGS])
        t = Tensors(*rest[_N_SETTINGS:])
        ctx.mark_dirty(base)
        flat = base.view(-1, base.shape[-1])
        saved = update_op(flat, first, list(t), None, *settings, True, backend)
        flags = ctx.needs_input_grad[-len(t) :]
        wants = {name for name, flag in zip(Tensors._fields, flags, strict=True) if flag}
        ctx.save_for_backward(*saved, *_needed_rows(t, settings, wants))
        ctx.settings, ctx.backend, ctx.first = settings, backend, first
        return base

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        z, zg, logits, moments, *kept = ctx.saved_tensors
        t = Tensors(*kept)
        need = list(ctx.needs_input_grad[-len(t) :])
        found: dict[str, Tensor] = {}
        if any(need):
            flat = flat_rows(dout)
            assert flat is not None
            columns = flat[:, ctx.first : ctx.first + t.up.shape[0]]
            saved = [s if s.numel() else None for s in (z, zg, logits, moments)]
            grads = _backward_op(columns, list(t), saved, None, *ctx.settings, need, ctx.backend)
            found |= zip(compress(Tensors._fields, need), grads, strict=True)
        return (own(dout, ctx, 0), *[None] * (2 + _N_SETTINGS), *map(found.get, Tensors._fields))
