"""``frozen_norm``: raw operators, choice of backend, autograd, public function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import formed
from petal_kernels._runtime.first_order import FirstOrderFunction, check_transforms
from petal_kernels._runtime.library import define
from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels._runtime.rows import flat_rows, result_of
from petal_kernels.ops.frozen_norm.arguments import Call, Given, check, moments_per_row

_NAME = "frozen_norm"

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.frozen_norm.{name}_impl") for name in rt.NAMES
)


def _call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float = 0.0
) -> Call:
    """With rows and vectors as backends want them."""
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    return Call(flat_rows(x), weight, bias, kind, eps)


def _explanation(call: Call, backend: str) -> rt.Explanation:
    def choose() -> tuple[rt.Backend, None]:
        return rt.select(_NAME, BACKENDS, backend, call), None

    return rt.explanation(_NAME, BACKENDS, backend, choose, call)


def _fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, backend: str
) -> Callable[..., tuple[Tensor, Tensor]]:
    if x.numel() == 0:
        return _fwd_fake
    impl = rt.select(_NAME, BACKENDS, backend, _call(x, weight, bias, kind, eps)).load()

    def run(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, moments = impl.forward(_call(x, *rest[:-1]))
        return result_of(y, x.shape), moments

    return run


def _fwd_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).shape[0]
    moments = x.new_empty((rows, moments_per_row(kind)), dtype=wide_dtype(x.dtype))
    return x.new_empty(x.shape), moments


def _explain_raw(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, backend: str
) -> rt.Explanation | None:
    return _explanation(_call(x, weight, bias, kind, eps), backend) if x.numel() else None


def _bwd(
    dy: Tensor, x: Tensor, moments: Tensor, weight: Tensor | None, kind: str, backend: str
) -> Callable[..., Tensor]:
    if x.numel() == 0:
        return _bwd_fake
    impl = rt.select(_NAME, BACKENDS, backend, _call(x, weight, None, kind)).load()

    def run(
        dy: Tensor, x: Tensor, moments: Tensor, weight: Tensor | None, kind: str, _: str
    ) -> Tensor:
        dx = impl.backward(_call(x, weight, None, kind), moments, flat_rows(dy))
        return result_of(dx, x.shape)

    return run


def _bwd_fake(
    dy: Tensor, x: Tensor, moments: Tensor, weight: Tensor | None, kind: str, backend: str
) -> Tensor:
    return x.new_empty(x.shape)


_forward_op = define(
    f"{_NAME}_fwd(Tensor x, Tensor? weight, Tensor? bias, str kind, float eps, str backend) "
    "-> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _explain_raw,
)
_backward_op = define(
    f"{_NAME}_bwd(Tensor dy, Tensor x, Tensor moments, Tensor? weight, str kind, str backend) "
    "-> Tensor",
    _bwd,
    _bwd_fake,
)


def _again(
    kind: str, eps: float, backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y once more: the same bits."""
    y: Tensor = _forward_op(x, weight, bias, kind, eps, backend)[0]
    return y


class FrozenNormFunction(FirstOrderFunction):
    """Saves x itself, one or two numbers of each row and the weight; never a normalised row."""

    operator = _NAME

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        kind: str,
        eps: float,
        recompute: bool,
        backend: str,
    ) -> Tensor:
        y: Tensor
        y, moments = _forward_op(x, weight, bias, kind, eps, backend)
        ctx.save_for_backward(x, moments, weight)
        ctx.kind, ctx.backend = kind, backend
        if recompute:
            again = functools.partial(_again, kind, eps, backend)
            formed.put(ctx, y, again, x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight = ctx.saved_tensors
        return (_backward_op(dy, x, moments, weight, ctx.kind, ctx.backend), *[None] * 6)


def frozen_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm or RMSNorm of the rows of x, by a weight that is not trained.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``; None: ones, of any kind.
        bias: ``[D]``, with kind "layer" only.
        kind: ``"layer"`` (LayerNorm), ``"rms"`` (RMSNorm as Llama writes it: the normalised row is
            rounded to x's dtype, then multiplied), ``"rms_once"`` (rounded once, behind the weight,
            as torch.nn.RMSNorm does) or ``"rms_plus_one"`` (Gemma's: times 1 + weight, rounded
            once).
        eps: under the root, at least 0.
        recompute: ``lowrank_linear`` and ``gated_mlp`` that read the result keep x in its place,
            and form it again in backward: the same bits. Where x itself is kept anyway, as by the
            norm, it then costs nothing. Gradients take their way through the result as ever.
        backend: a backend's name; default ``use_backend``'s, ``PETAL_BACKEND``'s or the first that
            can run.

    Returns:
        ``[..., D]`` in x's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. weight and bias have x's
            dtype, and may not require grad where gradients are recorded.
        RuntimeError: a named backend that cannot run here, with its reasons.

    Differentiable once, in x. Saved for backward: x itself, one fp32 number of each row (of
    "layer" two), and the weight. Deterministic. Source: see ``reference.py``.
    """
    given = Given(**locals())
    check_transforms(_NAME, given)
    call = check(given)
    name = rt.name_of(backend)
    if x.requires_grad and torch.is_grad_enabled():
        out: Tensor = FrozenNormFunction.apply(*call, recompute, name)
        return out
    y: Tensor = _forward_op(*call, name)[0]
    return y


def _explain(given: Given) -> rt.Explanation:
    call = check(given)
    return _explanation(_call(*call), rt.name_of(given.backend))


rt.register_explainer(frozen_norm, Given, _explain)
