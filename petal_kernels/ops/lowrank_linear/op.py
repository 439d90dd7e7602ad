"""``lowrank_linear``: raw operators, choice of backend and plan, autograd, public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import checks, device, philox
from petal_kernels._runtime.library import define
from petal_kernels.ops.lowrank_linear import planner
from petal_kernels.ops.lowrank_linear.arguments import Call, check

_NAME = "lowrank_linear"

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.lowrank_linear.{name}_impl") for name in rt.NAMES
)
_LIBRARY = BACKENDS[-1]  # torch: also lends its plans to the other backends


def _problem(call: Call, inference: bool) -> planner.Problem:
    first = call.activations
    kind = first.device.type
    if kind == "cpu" and device.native_16bit(first.dtype):
        kind = "cpu native"
    return planner.Problem(
        rows=first.shape[:-1].numel(),
        width=call.x.shape[-1] if call.x is not None else 0,
        rank=call.ups[0].shape[1],
        outs=tuple(up.shape[0] for up in call.ups),
        itemsize=first.element_size(),
        device=kind,
        has_weights=bool(call.weights),
        shares_hidden=call.hidden is not None,
        dropout=philox.threshold(call.dropout) > 0,
        has_core=call.core is not None,
        inference=inference,
    )


def _choose(call: Call, inference: bool, plan: str, backend: str) -> tuple[rt.Backend, str]:
    """The backend and the concrete plan.

    A plan asked for by name runs on the first backend that has it. ``auto`` takes the cheapest plan
    of the selected backend; for inference the library's ``merge`` competes with them.
    """
    problem = _problem(call, inference)
    if plan != "auto":
        reason = planner.not_applicable(plan, problem)
        if reason is not None:
            raise ValueError(f"plan: {plan!r} does not apply: {reason}")
        return rt.select(_NAME, BACKENDS, backend, *call.supported(plan)), plan
    chosen = rt.select(_NAME, BACKENDS, backend, *call.supported(plan))
    own = planner.rank_plans(chosen.load().PLANS, problem)
    if backend == rt.AUTO and inference and chosen is not _LIBRARY:
        merge = planner.rank_plans(("merge",), problem)
        if merge and merge[0].seconds < own[0].seconds:
            return _LIBRARY, "merge"
    return chosen, own[0].plan


def _rows(t: Tensor) -> Tensor:
    """Flatten the leading dims; copies only where no view has unit stride in the last dim and one
    row stride."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _shapes(call: Call) -> list[tuple[int, ...]]:
    lead = tuple(call.activations.shape[:-1])
    return [(*lead, up.shape[0]) for up in call.ups]


def _hidden_shape(call: Call, keep_hidden: bool) -> tuple[int, ...]:
    if call.hidden is not None or not keep_hidden:
        return (0,)
    return (call.activations.shape[:-1].numel(), call.ups[0].shape[1])


def _fwd(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    base: list[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    keep_hidden: bool,
    plan: str,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    call = Call(x, down, hidden, ups, weights, biases, base, core, scale, dropout, dropout_at)
    like, shapes = call.activations, _shapes(call)
    if like.numel() == 0:
        return [like.new_zeros(s) for s in shapes], like.new_zeros(_hidden_shape(call, keep_hidden))
    chosen, concrete = _choose(call, not keep_hidden and hidden is None, plan, backend)
    ys, h = chosen.load().forward(
        None if x is None else _rows(x),
        down,
        None if hidden is None else _rows(hidden),
        ups,
        weights,
        biases,
        [_rows(b) for b in base],
        core,
        rng,
        scale,
        dropout,
        dropout_at,
        concrete,
    )
    kept = h if hidden is None and keep_hidden else like.new_empty(0)
    return [y.contiguous().view(shape) for y, shape in zip(ys, shapes, strict=True)], kept


def _fwd_fake(
    x: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    ups: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    base: list[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    keep_hidden: bool,
    plan: str,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    call = Call(x, down, hidden, ups, weights, biases, base, core, scale, dropout, dropout_at)
    like = call.activations
    return [like.new_empty(s) for s in _shapes(call)], like.new_empty(
        _hidden_shape(call, keep_hidden)
    )


def _bwd(
    dys: list[Tensor],
    x: Tensor | None,
    h: Tensor,
    down: Tensor | None,
    ups: list[Tensor],
    weights: list[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    need_dx, need_ddown, need_dhidden, need_dups, need_dcore = need
    if h.numel() == 0:
        return (
            _grad(x, None, h, need_dx),
            _grad(down, None, h, need_ddown),
            _grad(h, None, h, need_dhidden),
            [up.new_zeros(up.shape) for up in ups] if need_dups else [],
            _grad(core, None, h, need_dcore),
        )
    hidden = None if down is not None else h
    call = Call(x, down, hidden, ups, weights, [], [], core, scale, dropout, dropout_at)
    impl = rt.select(_NAME, BACKENDS, backend, *call.supported("auto")).load()
    dx, dh, ddown, dups, dcore = impl.backward(
        [_rows(dy) for dy in dys],
        None if x is None else _rows(x) if need_ddown else x.reshape(-1, x.shape[-1]),
        _rows(h),
        down,
        ups,
        weights,
        core,
        rng,
        scale,
        dropout,
        dropout_at,
        need_dx,
        need_ddown,
        need_dups,
        need_dcore,
    )
    return (
        _grad(x, dx, h, need_dx),
        _grad(down, ddown, h, need_ddown),
        _grad(h, dh, h, need_dhidden),
        [dup.contiguous() for dup in dups] if need_dups else [],
        _grad(core, dcore, h, need_dcore),
    )


def _grad(of: Tensor | None, value: Tensor | None, like: Tensor, needed: bool) -> Tensor:
    """A gradient as the fake promises it: contiguous, shaped like its tensor; empty where it is not
    needed."""
    if of is None or not needed:
        return like.new_empty(0)
    return of.new_zeros(of.shape) if value is None else value.contiguous().view(of.shape)


def _bwd_fake(
    dys: list[Tensor],
    x: Tensor | None,
    h: Tensor,
    down: Tensor | None,
    ups: list[Tensor],
    weights: list[Tensor],
    core: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    def grad(t: Tensor | None, wanted: bool) -> Tensor:
        return h.new_empty(0) if t is None or not wanted else t.new_empty(t.shape)

    need_dx, need_ddown, need_dhidden, need_dups, need_dcore = need
    return (
        grad(x, need_dx),
        grad(down, need_ddown),
        grad(h, need_dhidden),
        [up.new_empty(up.shape) for up in ups] if need_dups else [],
        grad(core, need_dcore),
    )


_forward_op = define(
    "lowrank_linear_fwd(Tensor? x, Tensor? down, Tensor? hidden, Tensor[] ups, "
    "Tensor[] weights, Tensor?[] biases, Tensor[] base, Tensor? core, Tensor? rng, float scale, "
    "float dropout, str dropout_at, bool keep_hidden, str plan, str backend) "
    "-> (Tensor[], Tensor)",
    _fwd,
    _fwd_fake,
)
_backward_op = define(
    "lowrank_linear_bwd(Tensor[] dys, Tensor? x, Tensor h, Tensor? down, Tensor[] ups, "
    "Tensor[] weights, Tensor? core, Tensor? rng, float scale, float dropout, str dropout_at, "
    "bool[] need, str backend) -> (Tensor, Tensor, Tensor, Tensor[], Tensor)",
    _bwd,
    _bwd_fake,
)


class LowRankLinearFunction(torch.autograd.Function):
    """Saves x (where U is trained), h or the given hidden, the generator's state and the
    parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        down: Tensor | None,
        hidden: Tensor | None,
        core: Tensor | None,
        rng: Tensor | None,
        scale: float,
        dropout: float,
        dropout_at: str,
        plan: str,
        backend: str,
        outputs: int,
        weighted: int,
        *lists: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ups = lists[:outputs]
        weights = lists[outputs : outputs + weighted]
        biases = lists[outputs + weighted : outputs + 2 * weighted]
        base = lists[outputs + 2 * weighted :]
        ys, h = _forward_op(
            x,
            down,
            hidden,
            ups,
            weights,
            biases,
            base,
            core,
            rng,
            scale,
            dropout,
            dropout_at,
            True,
            plan,
            backend,
        )
        kept_x = x if down is not None and ctx.needs_input_grad[1] else None
        kept_h = h if hidden is None else hidden
        ctx.save_for_backward(kept_x, kept_h, down, core, rng, *ups, *weights)
        ctx.x_shape = None if x is None else x.shape
        ctx.settings = (scale, dropout, dropout_at, backend)
        ctx.outputs, ctx.weighted = outputs, weighted
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, h, down, core, rng, *rest = ctx.saved_tensors
        outputs, weighted = ctx.outputs, ctx.weighted
        scale, dropout, dropout_at, backend = ctx.settings
        wants = ctx.needs_input_grad
        lists = wants[_FIXED_ARGUMENTS:]
        want_biases = lists[outputs + weighted : outputs + 2 * weighted]
        want_base = lists[outputs + 2 * weighted :]
        if x is None and wants[0]:
            # With U frozen dx needs no value of x, only its shape: an expanded scalar occupies
            # nothing.
            x = dys[0].new_empty(()).expand(ctx.x_shape)
        dx, ddown, dhidden, dups, dcore = _backward_op(
            dys,
            x,
            h,
            down,
            rest[:outputs],
            rest[outputs:],
            core,
            rng,
            scale,
            dropout,
            dropout_at,
            [wants[0], wants[1], wants[2], any(lists[:outputs]), wants[3]],
            backend,
        )
        grads = [dx, ddown, dhidden, dcore, *[None] * (_FIXED_ARGUMENTS - 4)]
        grads += [dups[k] if lists[k] else None for k in range(outputs)]
        grads += [None] * weighted
        grads += [_column_sum(dy) if w else None for dy, w in zip(dys, want_biases, strict=False)]
        grads += [dy if w else None for dy, w in zip(dys, want_base, strict=False)]
        return tuple(g if w else None for g, w in zip(grads, wants, strict=True))


_FIXED_ARGUMENTS = 12  # of LowRankLinearFunction.forward, before *lists


def _column_sum(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0)


def lowrank_linear(
    x: Tensor | None,
    down: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    base: Sequence[Tensor] | None = None,
    hidden: Tensor | None = None,
    core: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "bottleneck",
    training: bool = True,
    rng: Tensor | None = None,
    plan: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """K frozen linears and their low-rank updates, which share one down-projection.

    ``y_k = base_k + scale * drop_k(x down^T) ups[k]^T`` with ``base_k = x weights[k]^T +
    biases[k]``, or the given ``base[k]``, or nothing. K = 3 serves q, k and v of one attention in
    one call; K = 1 is LoRA.

    Dims: D input width, R rank, K outputs, O_k width of output k, any leading dims.

    Args:
        x: ``[..., D]``; None when ``hidden`` is given without ``weights``.
        down: ``[R, D]``, shared by all outputs; None when ``hidden`` is given.
        ups: K tensors ``[O_k, R]``, or one ``[K, O, R]`` such as ``mode_contract`` returns.
        weights, biases: the frozen base, K tensors ``[O_k, D]`` (any strides) and K of ``[O_k]`` or
            None.
        base: instead of weights, the base's outputs, K tensors ``[..., O_k]``.
        hidden: ``[..., R]``, an ``x down^T`` already computed, to share it between calls; gradients
            flow to it.
        core: ``[K, R, R]``, only with ``dropout_at="mode"``: output k uses ``drop_k(x down^T
            core[k])``.
        scale: of the update.
        dropout: probability, rounded to a multiple of 1/65536; applied where ``training`` is true.
        dropout_at: ``"bottleneck"`` (PETAL: one mask per output on x down^T), ``"input"`` (LoRA:
            one mask on x, for the update only) or ``"mode"`` (Aurora's ViT: after the core).
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

    Differentiable once (not in weights). Saved for backward: x where down is trained, N x R values,
    the state of the generator and the parameters. Deterministic. Source: see ``reference.py``.
    """
    call = check(x, down, ups, weights, biases, base, hidden, core, scale, dropout, dropout_at, rng)
    checks.check_choice("plan", plan, ("auto", *planner.PLANS))
    name = rt.default_backend() if backend is None else rt.check_name(backend)
    p = call.dropout if training and philox.threshold(call.dropout) > 0 else 0.0
    state = None
    if p > 0.0:
        state = philox.draw(call.activations.device) if rng is None else rng
    lists = (*call.ups, *call.weights, *call.biases, *call.base)
    trained = (x, down, hidden, core, *lists)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        ys: tuple[Tensor, ...] = LowRankLinearFunction.apply(  # type: ignore[no-untyped-call]
            x,
            down,
            hidden,
            core,
            state,
            call.scale,
            p,
            dropout_at,
            plan,
            name,
            len(call.ups),
            len(call.weights),
            *lists,
        )
        return ys
    outputs, _ = _forward_op(
        x,
        down,
        hidden,
        call.ups,
        call.weights,
        call.biases,
        call.base,
        core,
        state,
        call.scale,
        p,
        dropout_at,
        False,
        plan,
        name,
    )
    return tuple(outputs)


def _explain(
    x: Tensor | None,
    down: Tensor | None,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    base: Sequence[Tensor] | None = None,
    hidden: Tensor | None = None,
    core: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    dropout_at: str = "bottleneck",
    training: bool = True,
    rng: Tensor | None = None,
    plan: str = "auto",
    backend: str | None = None,
) -> rt.Explanation:
    call = check(x, down, ups, weights, biases, base, hidden, core, scale, dropout, dropout_at, rng)
    name = rt.default_backend() if backend is None else rt.check_name(backend)
    inference = not torch.is_grad_enabled()
    chosen, concrete = _choose(call, inference, plan, name)
    rows = rt.candidates(BACKENDS, *call.supported(plan))
    problem = _problem(call, inference)
    return rt.Explanation(
        _NAME,
        tuple((c.backend.name, c.reasons) for c in rows),
        chosen.name,
        concrete,
        tuple(str(planner.estimate(each, problem)) for each in planner.PLANS),
    )


rt.register_explainer(lowrank_linear, _explain)
