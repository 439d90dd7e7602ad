"""``expert_dispatch``: raw operators, choice of backend, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import device
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.first_order import FirstOrderFunction, own
from petal_kernels._runtime.library import define
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved, Settings, Tensors

NAME = "expert_dispatch"

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.expert_dispatch.{name}_impl") for name in rt.NAMES
)
_SETTINGS = (
    "str activation, str gate, int top_k, bool renormalize, int tokens_per_gate, bool add_input, "
    "float keep, float mix, str plan"
)
_N_SETTINGS = len(Settings._fields)


# Columns of one product from which the library's 16-bit one wins on a CPU; measured at N = 4096,
# d = 768, E * r 8 .. 384 in both plans.
_LIBRARY_WIDTH = 128


def select(call: Call, backend: str) -> rt.Backend:
    """The first backend that can run, but the library where a product is wide and the processor
    multiplies 16-bit matrices itself: our CPU kernels widen those to fp32."""
    width = call.rank if call.settings.plan == "sorted" else call.experts * call.rank
    if backend == rt.AUTO and call.device.type == "cpu" and width >= _LIBRARY_WIDTH:
        backend = "torch" if device.native_16bit(call.first.dtype) else backend
    return rt.select(NAME, BACKENDS, backend, call)


def explanation(call: Call, backend: str) -> rt.Explanation:
    """What `select` says."""
    s = call.settings
    used = f"{s.top_k} of {call.experts}" if s.top_k else f"all {call.experts}"
    return rt.explanation(
        NAME,
        BACKENDS,
        backend,
        lambda: (select(call, backend), s.plan),
        call,
        notes=(f"gate {s.gate}, {used} experts of rank {call.rank}",),
    )


def _empty_saved(call: Call, save: bool) -> list[Tensor]:
    """z, logits, chosen, order, offsets; (0,) for what is absent."""
    pairs, s = (call.rows, call.experts), call.settings
    sort = save and s.plan == "sorted"
    wanted: list[tuple[tuple[int, ...], torch.dtype]] = [
        (call.z_shape if save else (0,), call.first.dtype),
        (pairs if call.routed else (0,), wide_dtype(call.first.dtype)),
        (pairs if s.gate == "topk" else (0,), torch.bool),
        ((call.slots,) if sort else (0,), torch.int32),
        ((call.experts + 1,) if sort else (0,), torch.int32),
    ]
    return [call.first.new_empty(shape, dtype=dtype) for shape, dtype in wanted]


def _call(tensors: Sequence[Any], settings: Sequence[Any], first: Tensor | None = None) -> Call:
    t = Tensors(*tensors)
    first = t.x if first is None else first
    assert first is not None
    return Call(t, Settings(*settings), first)


def _fwd(tensors: list[Any], *rest: Any) -> Callable[..., tuple[Tensor, ...]]:
    *settings, _, backend = rest
    call = _call(tensors, settings)
    if call.rows == 0:
        return _fwd_nothing
    impl = select(call, backend).load()

    def run(tensors: list[Any], *rest: Any) -> tuple[Tensor, ...]:
        *settings, save, _ = rest
        call = _call(tensors, settings)
        out, found = impl.forward(call, save)
        present = [save, True, True, save, save]
        kept = [
            e if f is None or not p else f.contiguous()
            for e, f, p in zip(_empty_saved(call, False), found, present, strict=True)
        ]
        return out.contiguous(), *kept

    return run


def _fwd_nothing(tensors: list[Any], *rest: Any) -> tuple[Tensor, ...]:
    """Of no rows."""
    *others, offsets = _fwd_fake(tensors, *rest)
    return *others, offsets.zero_()


def _explain(tensors: list[Any], *rest: Any) -> rt.Explanation | None:
    *settings, _, backend = rest
    call = _call(tensors, settings)
    return explanation(call, backend) if call.rows else None


def _fwd_fake(tensors: list[Any], *rest: Any) -> tuple[Tensor, ...]:
    *settings, save, _ = rest
    call = _call(tensors, settings)
    out = call.first.new_empty((call.rows, call.tensors.up.shape[1]))
    return out, *_empty_saved(call, save)


def _gradient_like(name: str, t: Tensors, dout: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    given: Tensor | None = getattr(t, name)
    if given is not None:
        return tuple(given.shape), given.dtype
    return (dout.shape[0], t.down.shape[-1]), dout.dtype  # x, which backward did without


def _gradients(dout: Tensor, t: Tensors, wanted: list[str]) -> list[Tensor]:
    """Unwritten."""
    likes = (_gradient_like(name, t, dout) for name in wanted)
    return [dout.new_empty(shape, dtype=dtype) for shape, dtype in likes]


def _bwd(
    dout: Tensor, _: Tensor | None, tensors: list[Any], saved: Any, *rest: Any
) -> Callable[..., list[Tensor]]:
    """What gives the gradients that are needed, in the order of `Tensors`."""
    *settings, _, backend = rest
    call = _call(tensors, settings, dout)
    if call.rows == 0:
        return _bwd_nothing
    impl = select(call, backend).load()

    def run(
        dout: Tensor,
        dlogits: Tensor | None,
        tensors: list[Any],
        saved: list[Tensor | None],
        *rest: Any,
    ) -> list[Tensor]:
        *settings, need, _ = rest
        call = _call(tensors, settings, dout)
        wanted = list(compress(Tensors._fields, need))
        found = impl.backward(call, Saved(*saved), dout, dlogits, frozenset(wanted))
        results = []
        for name in wanted:
            shape, dtype = _gradient_like(name, call.tensors, dout)
            results.append(found[name].to(dtype).contiguous().view(shape))
        return results

    return run


def _bwd_nothing(*args: Any) -> list[Tensor]:
    """Of no rows."""
    return [gradient.zero_() for gradient in _bwd_fake(*args)]


def _bwd_fake(
    dout: Tensor,
    dlogits: Tensor | None,
    tensors: list[Any],
    saved: list[Tensor | None],
    *rest: Any,
) -> list[Tensor]:
    return _gradients(dout, Tensors(*tensors), list(compress(Tensors._fields, rest[-2])))


def _choice(indices: Tensor, experts: int) -> Tensor:
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= experts:
            wrong = low if low < 0 else high
            raise ValueError(f"indices: want 0 <= index < {experts} experts, got {wrong}")
    all_experts = torch.arange(experts, dtype=indices.dtype, device=indices.device)
    return (indices.unsqueeze(-1) == all_experts).any(-2)


def _choice_fake(indices: Tensor, experts: int) -> Tensor:
    return indices.new_empty((*indices.shape[:-1], experts), dtype=torch.bool)


forward_op = define(
    f"{NAME}_fwd(Tensor?[] tensors, {_SETTINGS}, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _explain,
)
_backward_op = define(
    f"{NAME}_bwd(Tensor dout, Tensor? dlogits, Tensor?[] tensors, Tensor?[] saved, {_SETTINGS}, "
    "bool[] need, str backend) -> Tensor[]",
    _bwd,
    _bwd_fake,
)
choice_op = define(
    f"{NAME}_choice(Tensor indices, int experts) -> Tensor", lambda *_: _choice, _choice_fake
)


class ExpertDispatchFunction(FirstOrderFunction):
    """Saves x where a projection of it is trained, the bottlenecks z of the experts that were used,
    the logits and the choice, and the parameters. Returns out, logits and choice."""

    operator = NAME

    @staticmethod
    def forward(ctx: Any, backend: str, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        settings, t = Settings(*rest[:_N_SETTINGS]), Tensors(*rest[_N_SETTINGS:])
        out, *saved = forward_op(list(t), *settings, True, backend)
        _, logits, chosen, _, _ = saved
        flags = ctx.needs_input_grad[1 + _N_SETTINGS :]
        wants = {name for name, flag in zip(Tensors._fields, flags, strict=True) if flag}
        x = None if wants.isdisjoint(("down", "router")) else t.x
        ctx.save_for_backward(*saved, *t._replace(x=x, base=None))
        ctx.settings, ctx.backend = settings, backend
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        return out, logits, chosen

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlogits: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved, t = tensors[: len(Saved._fields)], Tensors(*tensors[len(Saved._fields) :])
        s: Settings = ctx.settings
        wants = dict(zip(Tensors._fields, ctx.needs_input_grad[1 + _N_SETTINGS :], strict=True))
        if dout is None:
            rows = saved[1].shape[0]
            dout = t.up.new_zeros((rows, t.up.shape[1]), dtype=saved[0].dtype)
        found = {"base": s.keep * dout} if wants["base"] else {}
        need = [want and name != "base" for name, want in wants.items()]
        if any(need):
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            kept = [value if value.numel() else None for value in saved]
            grads = _backward_op(dout, dlogits, list(t), kept, *s, need, ctx.backend)
            found |= zip(compress(Tensors._fields, need), grads, strict=True)
        return (*[None] * (1 + _N_SETTINGS), *map(found.get, Tensors._fields))


class PooledLogitsFunction(FirstOrderFunction):
    """[B, E]: the logits of the mean of a sample's tokens, in fp32. Products of B rows: the
    library's. Saves the means."""

    operator = NAME

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        noise: Tensor | None = None,
    ) -> Tensor:
        wide = wide_dtype(x.dtype)
        kept, pooled = None, None
        with autocast_off(x):
            if mask is None:
                # The mean over no tokens is 0, as in the reference: nothing to tell experts by.
                pooled = x.mean(1, dtype=wide) if x.shape[1] else x.sum(1, dtype=wide)
            else:
                kept = mask.to(wide)
                kept = kept / kept.sum(-1, keepdim=True).clamp_min(1)
                pooled = (kept.unsqueeze(1) @ x.to(wide)).squeeze(1)
            logits = F.linear(pooled, router.to(wide), None if bias is None else bias.to(wide))
            logits = logits if noise is None else logits + noise.to(wide)
        ctx.save_for_backward(pooled, kept, router)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.noise_dtype = None if noise is None else noise.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return logits

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        pooled, kept, router = ctx.saved_tensors
        dx = drouter = dbias = dnoise = None
        with autocast_off(pooled):
            if ctx.needs_input_grad[0]:
                into = (dlogits @ router.to(dlogits.dtype)).unsqueeze(1)
                dx = into / ctx.shape[1] if kept is None else kept.unsqueeze(-1) * into
                dx = dx.to(ctx.dtype).expand(ctx.shape)
            if ctx.needs_input_grad[1]:
                drouter = (dlogits.t() @ pooled).to(router.dtype)
            if ctx.needs_input_grad[2]:
                dbias = dlogits.sum(0).to(ctx.bias_dtype)
            if ctx.noise_dtype is not None and ctx.needs_input_grad[4]:
                dnoise = own(dlogits).to(ctx.noise_dtype)
        return dx, drouter, dbias, None, dnoise
