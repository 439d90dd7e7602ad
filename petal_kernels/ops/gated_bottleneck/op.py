"""``gated_bottleneck``: raw operators, choice of backend, autograd, public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import device, philox
from petal_kernels._runtime.library import define
from petal_kernels.ops.gated_bottleneck.arguments import (
    Call,
    Saved,
    Settings,
    Tensors,
    check,
    columns_to_update,
)

_NAME = "gated_bottleneck"

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.gated_bottleneck.{name}_impl") for name in rt.NAMES
)
_SETTINGS = (
    "str activation, bool add_input, str route, bool route_relu, str gate, bool gate_sees_output, "
    "bool gate_linear, bool add_gate_input, int samples, float scale, float dropout, float norm_eps"
)
_N_SETTINGS = len(Settings._fields)


def _select(call: Any, backend: str) -> rt.Backend:
    """The first backend that can run, but the library where products are all there is to do and
    the processor multiplies 16-bit matrices itself: our CPU kernels widen those to fp32."""
    bare = call.tensors.norm_weight is None and call.settings.dropout == 0.0
    if backend == rt.AUTO and bare and call.device.type == "cpu":
        backend = "torch" if device.native_16bit(call.first.dtype) else backend
    return rt.select(_NAME, BACKENDS, backend, call)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of logits, moments and token weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _saved_shapes(call: Call, keep: bool) -> list[tuple[int, ...]]:
    """Of z, zg, logits and moments; (0,) for what is absent."""
    t, n = call.tensors, call.first.shape[0]
    none: tuple[int, ...] = (0,)
    if not keep:
        return [none] * 4
    return [
        none if t.bottleneck is not None else (n, t.up.shape[1]),
        none if t.gate_down is None else (n, t.gate_down.shape[0]),
        (n,) if call.has_logits else none,
        none if t.norm_weight is None else (n, 2),
    ]


def _empty_saved(call: Call, keep: bool) -> list[Tensor]:
    first = call.first
    shapes = _saved_shapes(call, keep)
    dtypes = [first.dtype, first.dtype, _wide(first.dtype), _wide(first.dtype)]
    return [first.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]


def _fwd(
    tensors: list[Any], rng: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *settings, keep, backend = rest
    call = Call(Tensors(*tensors), Settings(*settings))
    first = call.first
    if first.shape[0] == 0:
        saved = _empty_saved(call, keep)
        return first.new_empty((0, call.tensors.up.shape[0])), *saved  # type: ignore[return-value]
    impl = _select(call, backend).load()
    out, found = impl.forward(call, rng, keep)
    kept = _empty_saved(call, False)
    if keep:
        kept = [e if f is None else f.contiguous() for e, f in zip(kept, found, strict=True)]
    return out.contiguous(), *kept


def _fwd_fake(
    tensors: list[Any], rng: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *settings, keep, _ = rest
    call = Call(Tensors(*tensors), Settings(*settings))
    out = call.first.new_empty((call.first.shape[0], call.tensors.up.shape[0]))
    return out, *_empty_saved(call, keep)  # type: ignore[return-value]


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


def _bwd(
    dout: Tensor,
    tensors: list[Any],
    saved: list[Tensor | None],
    rng: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *settings, need, backend = rest
    t = Tensors(*tensors)
    call = Call(t, Settings(*settings))
    if dout.shape[0] == 0:
        return [
            (given if given is not None else dout).new_zeros(
                _gradient_shape(name, t, 0) if want else (0,)
            )
            for name, given, want in zip(Tensors._fields, t, need, strict=True)
        ]
    wanted = frozenset(name for name, want in zip(Tensors._fields, need, strict=True) if want)
    # A row tensor that backward does without is absent; the selection looks at what is there.
    impl = _select(_Backward(call, dout), backend).load()
    found = impl.backward(call, Saved(*saved), dout, rng, wanted)
    results = []
    for name, given in zip(Tensors._fields, t, strict=True):
        if name not in wanted:
            results.append(dout.new_empty(0))
            continue
        shape, grad = _gradient_shape(name, t, dout.shape[0]), found[name]
        results.append(
            grad.to(dout.dtype if given is None else given.dtype).contiguous().view(shape)
        )
    return results


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
    need = rest[-2]
    t = Tensors(*tensors)
    return [
        (given if given is not None else dout).new_empty(
            _gradient_shape(name, t, dout.shape[0]) if want else (0,)
        )
        for name, given, want in zip(Tensors._fields, t, need, strict=True)
    ]


def _update(
    base: Tensor, first: int, tensors: list[Any], rng: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *settings, keep, backend = rest
    t = Tensors(*tensors)
    columns = base[:, first : first + t.up.shape[0]]
    call = Call(t._replace(base=columns), Settings(*settings))
    if base.shape[0] == 0:
        return tuple(_empty_saved(call, keep))  # type: ignore[return-value]
    impl = _select(call, backend).load()
    _, found = impl.forward(call, rng, keep, columns)
    kept = _empty_saved(call, False)
    if keep:
        kept = [e if f is None else f.contiguous() for e, f in zip(kept, found, strict=True)]
    return tuple(kept)  # type: ignore[return-value]


def _update_fake(
    base: Tensor, first: int, tensors: list[Any], rng: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *settings, keep, _ = rest
    call = Call(Tensors(*tensors), Settings(*settings))
    return tuple(_empty_saved(call, keep))  # type: ignore[return-value]


_forward_op = define(
    f"{_NAME}_fwd(Tensor?[] tensors, Tensor? rng, {_SETTINGS}, bool keep, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_backward_op = define(
    f"{_NAME}_bwd(Tensor dout, Tensor?[] tensors, Tensor?[] saved, Tensor? rng, {_SETTINGS}, "
    "bool[] need, str backend) -> Tensor[]",
    _bwd,
    _bwd_fake,
)


_update_op = define(
    f"{_NAME}_update(Tensor(a!) base, int first, Tensor?[] tensors, Tensor? rng, {_SETTINGS}, "
    "bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _update,
    _update_fake,
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


class GatedBottleneckFunction(torch.autograd.Function):
    """Saves x and gate_input where backward reads them, r-wide pre-activations, one or two numbers
    per row, the generator's state and the parameters."""

    @staticmethod
    def forward(ctx: Any, rng: Tensor | None, backend: str, *rest: Any) -> Tensor:
        settings = Settings(*rest[:_N_SETTINGS])
        t = Tensors(*rest[_N_SETTINGS:])
        out, *saved = _forward_op(list(t), rng, *settings, True, backend)
        kept = _needed_rows(t, settings, _wanted(ctx))
        ctx.save_for_backward(rng, *saved, *kept)
        ctx.settings, ctx.backend = settings, backend
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rng, z, zg, logits, moments, *kept = ctx.saved_tensors
        settings: Settings = ctx.settings
        t = Tensors(*kept)
        wants = _wanted(ctx)
        saved = [s if s.numel() else None for s in (z, zg, logits, moments)]
        # The residual's gradient, and a plain sum's, is dout itself.
        passed: dict[str, Tensor] = {}
        if t.norm_weight is None:
            if "residual" in wants:
                passed["residual"] = dout
            plain = settings.gate == "none" and settings.scale == 1.0 and rng is None
            if plain and "base" in wants:
                passed["base"] = dout
        need = [name in wants and name not in passed for name in Tensors._fields]
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        grads: Sequence[Tensor | None] = [None] * len(t)
        if any(need):
            grads = _backward_op(dout, list(t), saved, rng, *settings, need, ctx.backend)
        return (
            *[None] * (2 + _N_SETTINGS),
            *[
                passed.get(name, grad) if name in wants else None
                for name, grad in zip(Tensors._fields, grads, strict=True)
            ],
        )


class UpdateFunction(torch.autograd.Function):
    """The sum alone, written into columns of a base that nobody else reads: its gradient passes."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, first: int, backend: str, *rest: Any) -> Tensor:
        settings = Settings(*rest[:_N_SETTINGS])
        t = Tensors(*rest[_N_SETTINGS:])
        ctx.mark_dirty(base)
        flat = base.view(-1, base.shape[-1])
        saved = _update_op(flat, first, list(t), None, *settings, True, backend)
        flags = ctx.needs_input_grad[-len(t) :]
        wants = {name for name, flag in zip(Tensors._fields, flags, strict=True) if flag}
        ctx.save_for_backward(*saved, *_needed_rows(t, settings, wants))
        ctx.settings, ctx.backend, ctx.first = settings, backend, first
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        z, zg, logits, moments, *kept = ctx.saved_tensors
        t = Tensors(*kept)
        need = list(ctx.needs_input_grad[-len(t) :])
        grads: Sequence[Tensor | None] = [None] * len(t)
        if any(need):
            flat = _rows(dout)
            assert flat is not None
            columns = flat[:, ctx.first : ctx.first + t.up.shape[0]]
            saved = [s if s.numel() else None for s in (z, zg, logits, moments)]
            grads = _backward_op(columns, list(t), saved, None, *ctx.settings, need, ctx.backend)
        found = [g if w else None for g, w in zip(grads, need, strict=True)]
        return (dout, *[None] * (2 + _N_SETTINGS), *found)


def _rows(t: Tensor | None) -> Tensor | None:
    """Flatten the leading dims; copies only where no view has unit stride in the last dim and one
    row stride."""
    if t is None:
        return None
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _route_factors(
    route: str, vision: Tensor | None, length: int, variant: str
) -> tuple[str, bool, Tensor | None, Tensor | None]:
    """Kind, relu, left and right: every routing function in three kinds.

    A product with V tokens goes through [L, V] or through one [r, r] matrix per sample, whichever
    costs less.
    """
    if vision is None:
        return "none", False, None, None
    batch, tokens, rank = vision.shape
    if route in ("gram", "gram_relu"):
        left = vision
        if variant == "release" and tokens > 1:
            left = vision.reshape(batch, rank, tokens).transpose(1, 2)
        relu = route == "gram_relu"
        left = left.relu() if relu else left
        if tokens > 1 and rank * (length + tokens) < 2 * length * tokens:
            if vision.is_meta:  # autocast knows no such device
                return "product", relu, vision.transpose(1, 2) @ left, None
            with torch.autocast(vision.device.type, enabled=False):
                return "product", relu, vision.transpose(1, 2) @ left, None
        return "product", relu, left.contiguous(), vision.contiguous()
    pooled = (vision if tokens == 1 else vision.mean(1, keepdim=True)).contiguous()
    if route == "expand":
        return "product", False, torch.ones_like(pooled), pooled
    return route, False, pooled, None


def _token_weights(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    kept = mask.to(_wide(dtype))
    return (kept / kept.sum(-1, keepdim=True).clamp_min(1)).view(-1)


def gated_bottleneck(
    x: Tensor | None,
    down: Tensor | None,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    base: Tensor | str | None = "input",
    bottleneck: Tensor | None = None,
    activation: str = "gelu_tanh",
    route: str = "none",
    vision: Tensor | None = None,
    gate: str = "none",
    gate_input: Tensor | None = None,
    gate_down: Tensor | None = None,
    gate_down_bias: Tensor | None = None,
    gate_up: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    residual: Tensor | str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    variant: str = "paper",
    update_at: int | None = None,
    training: bool = True,
    rng: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A bottleneck adapter with routing, a multiplicative gate, and what follows it.

    ``out = norm(residual + drop(scale * G * (H + act(route(x down^T + down_bias)) up^T +
    up_bias)))`` with H = ``base`` and G by ``gate``; ``reference.py`` writes out every gate and
    route.

    Dims: B samples, L tokens, D input width, r rank, O output width, rg rank of the gate, Dg width
    of its input, V vision tokens.

    Args:
        x: ``[..., D]``, the frozen module's output that is adapted; ``[B, L, D]`` with a route or
            gate "small". None with ``bottleneck`` unless H is x.
        down, up, down_bias, up_bias: ``[r, D]``, ``[O, r]``, ``[r]``, ``[O]``.
        base: H: ``"input"`` (x itself: a sequential adapter, O = D), ``[..., O]`` (a parallel one),
            or None.
        bottleneck: ``[..., r]``, x down^T + down_bias already computed (value adapters of all
            layers share one product); gradients flow to it.
        activation: "identity", "relu", "gelu" (erf), "gelu_tanh" (gelu_new) or "silu"; also that of
            the large gate.
        route: "none", "add", "mul", "expand", "gram" or "gram_relu", before the activation.
        vision: ``[B, V, r]``, the vision features through the same down-projection. "add", "mul"
            and "expand" take its mean over V.
        gate: "none", "large", "middleX", "middleY" or "small".
        gate_input: ``[..., O]`` (large: ``[..., Dg]``), the frozen module's input.
        gate_down, gate_down_bias, gate_up, gate_up_bias: large: ``[rg, Dg]``, ``[rg]``, ``[O,
            rg]``, ``[O]``.
        gate_weight: middleX and middleY ``[O]``, small ``[2 O]`` (gate_input's half first).
        gate_bias: middleX and small, ``[1]``.
        mask: small: ``[B, L]``, nonzero where a token counts; default all.
        scale: of the gated sum.
        dropout: probability on the gated sum, rounded to a multiple of 1/65536; applied where
            ``training`` is true.
        residual: ``[..., O]``, or ``"gate_input"``, read once for both.
        norm_weight, norm_bias, norm_eps: LayerNorm over the result.
        variant: "paper", or "release" for the authors' checkpoints.
        update_at: with a contiguous ``base`` ``[..., W]``: its columns ``update_at .. update_at +
            O`` are overwritten by the result and the whole base is returned (fused projections).
            For plain sums (no gate, scale, dropout, residual or norm), and only where nobody else
            reads base or has saved it.
        rng: int64 ``[2]`` = (seed, offset); default: drawn from torch's default generator of the
            device.
        backend: a backend's name; default ``use_backend``'s, ``PETAL_BACKEND``'s or the first that
            can run.

    Returns:
        ``[..., O]``, or ``base`` with ``update_at``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. Row tensors share one dtype;
            parameters have the same or float32, and get their gradients in their own.
        RuntimeError: a named backend that cannot run here, with its reasons.

    Differentiable once. Saved for backward: x, gate_input, N x r values per projection, at most
    three numbers per row, the state of the generator and the parameters; gates, activations and
    masks are formed again. Deterministic. Source: see ``reference.py``.
    """
    call, state, name, lead = _prepare(**locals())
    if update_at is not None:
        return _update_columns(call, base, update_at, name)
    grads = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors)
    if grads:
        out: Tensor = GatedBottleneckFunction.apply(  # type: ignore[no-untyped-call]
            state, name, *call.settings, *call.tensors
        )
    else:
        out = _forward_op(list(call.tensors), state, *call.settings, False, name)[0]
    return out.view(*lead, out.shape[-1])


def _update_columns(call: Call, base: Any, first: int, backend: str) -> Tensor:
    trained = (base, *call.tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        out: Tensor = UpdateFunction.apply(  # type: ignore[no-untyped-call]
            base, first, backend, *call.settings, *call.tensors
        )
        return out
    flat = base.view(-1, base.shape[-1])
    _update_op(flat, first, list(call.tensors), None, *call.settings, False, backend)
    return base  # type: ignore[no-any-return]


def _prepare(
    *,
    update_at: int | None = None,
    training: bool,
    rng: Tensor | None,
    backend: str | None,
    **given: Any,
) -> tuple[Call, Tensor | None, str, tuple[int, ...]]:
    """Check, flatten and reduce: the call, the generator's state, the backend's name, the leading
    dims."""
    if update_at is None:
        check(**given, rng=rng)
    else:
        check(**given | {"base": columns_to_update(update_at, given)}, rng=rng)
        given["base"] = None
    name = rt.default_backend() if backend is None else rt.check_name(backend)
    x, bottleneck, vision = given["x"], given["bottleneck"], given["vision"]
    first: Tensor = x if x is not None else bottleneck
    p = float(given["dropout"]) if training and philox.threshold(given["dropout"]) > 0 else 0.0
    state = None
    if p > 0.0:
        state = philox.draw(first.device) if rng is None else rng
    length = first.shape[1] if first.dim() == 3 else 0
    kind, relu, left, right = _route_factors(given["route"], vision, length, given["variant"])
    release = given["variant"] == "release"
    gate, base, residual = given["gate"], given["base"], given["residual"]
    per_sample = kind != "none" or gate == "small"
    settings = Settings(
        given["activation"],
        isinstance(base, str),
        kind,
        relu,
        gate,
        release,
        release,
        isinstance(residual, str),
        first.shape[0] if per_sample else 1,
        float(given["scale"]),
        p,
        float(given["norm_eps"]),
    )
    tensors = Tensors(
        _rows(x),
        given["down"],
        given["down_bias"],
        _rows(bottleneck),
        given["up"],
        given["up_bias"],
        None if isinstance(base, str) else _rows(base),
        left,
        right,
        _rows(given["gate_input"]),
        given["gate_down"],
        given["gate_down_bias"],
        given["gate_up"],
        given["gate_up_bias"],
        given["gate_weight"],
        given["gate_bias"],
        _token_weights(given["mask"], first.dtype),
        None if isinstance(residual, str) else _rows(residual),
        given["norm_weight"],
        given["norm_bias"],
    )
    return Call(tensors, settings), state, name, tuple(first.shape[:-1])


def _explain(
    x: Tensor | None,
    down: Tensor | None,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    **options: Any,
) -> rt.Explanation:
    given = _DEFAULTS | options
    call, _, name, _ = _prepare(
        x=x, down=down, up=up, down_bias=down_bias, up_bias=up_bias, **given
    )
    rows = rt.candidates(BACKENDS, call)
    chosen = _select(call, name)
    s = call.settings
    notes = [f"gate {s.gate}, route {s.route}"]
    if s.route == "product":
        right = call.tensors.right
        notes.append(
            "route as one r x r matrix per sample"
            if right is None
            else f"route through {right.shape[1]} vision token(s)"
        )
    return rt.Explanation(
        _NAME,
        tuple((c.backend.name, c.reasons) for c in rows),
        chosen.name,
        None,
        tuple(notes),
    )


_DEFAULTS: dict[str, Any] = gated_bottleneck.__kwdefaults__ or {}
rt.register_explainer(gated_bottleneck, _explain)
