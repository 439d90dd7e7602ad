"""``gated_bottleneck``: the public function, and what ``explain`` says of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import philox
from petal_kernels._runtime.autocast import autocast_off
from petal_kernels._runtime.first_order import check_transforms
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels._runtime.rows import distinct, flat_rows
from petal_kernels.ops.gated_bottleneck.arguments import (
    Call,
    Given,
    Settings,
    Tensors,
    check,
    columns_to_update,
)
from petal_kernels.ops.gated_bottleneck.function import BACKENDS as BACKENDS
from petal_kernels.ops.gated_bottleneck.function import (
    NAME,
    GatedBottleneckFunction,
    UpdateFunction,
    explanation,
    forward_op,
    update_op,
)


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
            with autocast_off(vision):
                return "product", relu, vision.transpose(1, 2) @ left, None
        return "product", relu, left.contiguous(), vision.contiguous()
    pooled = (vision if tokens == 1 else vision.mean(1, keepdim=True)).contiguous()
    if route == "expand":
        return "product", False, torch.ones_like(pooled), pooled
    return route, False, pooled, None


def _token_weights(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    kept = mask.to(wide_dtype(dtype))
    return (kept / kept.sum(-1, keepdim=True).clamp_min(1)).reshape(-1)


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
        scale: of the gated sum; finite.
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
    masks are formed again. NaN and infinities reach what depends on them; on triton and cuda an
    infinite number may make its whole row NaN where a saturated gate or relu would be finite.
    Deterministic. Source: see ``reference.py``.
    """
    given = Given(**locals())
    check_transforms(NAME, given)
    call, state, name, lead = prepare(given)
    if update_at is not None:
        return _update_columns(call, base, update_at, name)
    grads = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors)
    if grads:
        out: Tensor = GatedBottleneckFunction.apply(state, name, *call.settings, *call.tensors)
    else:
        out = forward_op(list(call.tensors), state, *call.settings, False, name)[0]
    return out.view(*lead, out.shape[-1])


def _update_columns(call: Call, base: Any, first: int, backend: str) -> Tensor:
    trained = (base, *call.tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        out: Tensor = UpdateFunction.apply(base, first, backend, *call.settings, *call.tensors)
        return out
    flat = base.view(-1, base.shape[-1])
    update_op(flat, first, list(call.tensors), None, *call.settings, False, backend)
    return base  # type: ignore[no-any-return]


def prepare(given: Given) -> tuple[Call, Tensor | None, str, tuple[int, ...]]:
    """Check, flatten and reduce: the call, the generator's state, the backend's name, the leading
    dims."""
    if given.update_at is None:
        check(given)
    else:
        check(given._replace(base=columns_to_update(given)))
        given = given._replace(base=None)
    name = rt.name_of(given.backend)
    first: Tensor = given.x if given.x is not None else given.bottleneck
    drops = given.training and philox.threshold(given.dropout) > 0
    state = None
    if drops:
        state = philox.draw(first.device) if given.rng is None else given.rng.contiguous()
    length = first.shape[1] if first.dim() == 3 else 0
    kind, relu, left, right = _route_factors(given.route, given.vision, length, given.variant)
    release = given.variant == "release"
    gate, base, residual = given.gate, given.base, given.residual
    per_sample = kind != "none" or gate == "small"
    settings = Settings(
        given.activation,
        isinstance(base, str),
        kind,
        relu,
        gate,
        release,
        release,
        isinstance(residual, str),
        first.shape[0] if per_sample else 1,
        float(given.scale),
        float(given.dropout) if drops else 0.0,
        float(given.norm_eps),
    )
    tensors = Tensors(
        flat_rows(given.x),
        given.down,
        given.down_bias,
        flat_rows(given.bottleneck),
        given.up,
        given.up_bias,
        None if isinstance(base, str) else flat_rows(base),
        left,
        right,
        flat_rows(given.gate_input),
        given.gate_down,
        given.gate_down_bias,
        given.gate_up,
        given.gate_up_bias,
        given.gate_weight,
        given.gate_bias,
        _token_weights(given.mask, first.dtype),
        None if isinstance(residual, str) else flat_rows(residual),
        given.norm_weight,
        given.norm_bias,
    )
    call = Call(Tensors(*distinct(tensors)), settings)
    return call, state, name, tuple(first.shape[:-1])


def _explain(given: Given) -> rt.Explanation:
    if given.rng is None:  # an explanation draws nothing from the generator
        first = given.bottleneck if given.x is None else given.x
        nothing = torch.zeros(2, dtype=torch.int64, device=getattr(first, "device", None))
        given = given._replace(rng=nothing)
    call, _, name, _ = prepare(given)
    return explanation(call, name)


rt.register_explainer(gated_bottleneck, Given, _explain)
