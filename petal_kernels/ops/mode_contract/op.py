"""``mode_contract``: raw operators, choice of backend, autograd, public function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime.first_order import FirstOrderFunction, check_transforms
from petal_kernels._runtime.library import define
from petal_kernels._runtime.rows import result_of
from petal_kernels.ops.mode_contract.arguments import Call, Given, Gradients, check

_NAME = "mode_contract"
_FUSED_MODES = 12

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.mode_contract.{name}_impl") for name in rt.NAMES
)


def _select(call: Call, backend: str) -> rt.Backend:
    return rt.select(_NAME, BACKENDS, preferred(call) if backend == rt.AUTO else backend, call)


def preferred(call: Call) -> str:
    """What ``auto`` means for these inputs: the library where it was measured faster, else the
    first backend.

    On a CPU, few Tucker modes are two small library GEMMs that no fused loop beats; from a dozen
    modes on the fused one is level in forward and ahead in backward. The diagonal core has no GEMM
    and always runs fused (``python -m benchmarks.run op mode_contract``).
    """
    few = call.core.dim() == 3 and call.modes.shape[0] < _FUSED_MODES
    if few and call.device.type == "cpu":
        return "torch"
    return rt.AUTO


def _explanation(call: Call, backend: str) -> rt.Explanation:
    library = backend == rt.AUTO and preferred(call) == "torch"
    note = "plan: the library's GEMM, measured faster than a fused loop on this device"
    return rt.explanation(
        _NAME,
        BACKENDS,
        backend,
        lambda: (_select(call, backend), None),
        call,
        notes=(note,) if library else (),
    )


def _explain_raw(*args: Any) -> rt.Explanation | None:
    *given, backend = args
    call = Call(*given)
    return None if 0 in call.shape else _explanation(call, backend)


def _fwd(*args: Any) -> Callable[..., Tensor]:
    *given, backend = args
    call = Call(*given)
    if 0 in call.shape:
        return _fwd_fake
    impl = _select(call, backend).load()

    def run(*args: Any) -> Tensor:
        out: Tensor = impl.forward(Call(*args[:-1]))
        return result_of(out, out.shape)

    return run


def _fwd_fake(*args: Any) -> Tensor:
    call = Call(*args[:-1])
    return call.core.new_empty(call.shape, dtype=call.dtype)


_Results = tuple[Tensor, Tensor, Tensor]


def _bwd(
    dout: Tensor, core: Tensor, modes: Tensor, up: Tensor | None, scale: float, *rest: Any
) -> Callable[..., _Results]:
    if dout.numel() == 0:
        return _bwd_fake
    impl = _select(Call(core, modes, up, scale, dout.dtype), rest[-1]).load()

    def run(
        dout: Tensor,
        core: Tensor,
        modes: Tensor,
        up: Tensor | None,
        scale: float,
        need: list[bool],
        _: str,
    ) -> _Results:
        wanted = frozenset(compress(Gradients._fields, need))
        call = Call(core, modes, up, scale, dout.dtype)
        found = impl.backward(call, dout.contiguous(), wanted)
        return _results(Gradients(core, modes, up), need, found)

    return run


def _bwd_fake(
    dout: Tensor,
    core: Tensor,
    modes: Tensor,
    up: Tensor | None,
    scale: float,
    need: list[bool],
    backend: str,
) -> _Results:
    return _results(Gradients(core, modes, up), need, Gradients())


def _results(given: Gradients, need: Sequence[bool], found: Gradients) -> _Results:
    """Gradients as the fake promises them: contiguous, shaped like their tensors, empty where not
    needed, zero where there is nothing to sum."""
    like = given.core
    assert like is not None

    def grad(of: Tensor | None, value: Tensor | None, needed: bool) -> Tensor:
        if of is None or not needed:
            return like.new_empty(0)
        return of.new_zeros(of.shape) if value is None else value.contiguous()

    core, modes, up = (grad(*each) for each in zip(given, found, need, strict=True))
    return core, modes, up


_forward_op = define(
    "mode_contract_fwd(Tensor core, Tensor modes, Tensor? up, float scale, ScalarType dtype, "
    "str backend) -> Tensor",
    _fwd,
    _fwd_fake,
    _explain_raw,
)
_backward_op = define(
    "mode_contract_bwd(Tensor dout, Tensor core, Tensor modes, Tensor? up, float scale, "
    "bool[] need, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class ModeContractFunction(FirstOrderFunction):
    """Saves core, modes and up; the mode matrices are recomputed in backward."""

    operator = _NAME

    @staticmethod
    def forward(
        ctx: Any,
        core: Tensor,
        modes: Tensor,
        up: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(core, modes, up)
        ctx.scale, ctx.backend = scale, backend
        out: Tensor = _forward_op(core, modes, up, scale, dtype, backend)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        core, modes, up = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        grads = _backward_op(dout, core, modes, up, ctx.scale, need, ctx.backend)
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), None, None, None)


def mode_contract(
    core: Tensor,
    modes: Tensor,
    up: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contract the core with every mode vector of a model at once and fold the result into the
    up-projection.

    ``M_k = core x_3 p_k`` (Tucker) or ``diag(core * p_k)`` (CP), then ``P_k = scale * up M_k^T``.
    Call it once per forward and hand ``P[k]`` to ``lowrank_linear``.

    Dims: K modes, R rank, O output width.

    Args:
        core: ``[R, R, R]`` (Tucker core, released PETAL and Aurora) or ``[R]`` (CP's lambda, the
            papers).
        modes: ``[K, R]``, row k is p_k.
        up: ``[O, R]``, V; without it the mode matrices themselves are returned.
        scale: multiplies the result; finite.
        dtype: of the result; default core's. Products accumulate in fp32 and are rounded once.
        backend: a backend's name; default ``use_backend``'s, ``PETAL_BACKEND``'s or the planner's
            choice.

    Returns:
        ``P [K, O, R]`` (a transposed view of ``[K, R, O]``), or ``scale * M [K, R, R]`` without
        ``up``.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
        RuntimeError: a named backend that cannot run here, with its reasons.

    Differentiable once, in core, modes and up; nothing but the inputs is saved. Deterministic.
    Source: PETAL arXiv 2312.12458, Aurora arXiv 2305.08381.
    """
    given = Given(**locals())
    check_transforms(_NAME, given)
    call = check(given)
    name = rt.name_of(backend)
    trained = any(t is not None and t.requires_grad for t in (core, modes, up))
    if trained and torch.is_grad_enabled():
        out = ModeContractFunction.apply(*call, name)
    else:
        out = _forward_op(*call, name)
    result: Tensor = out if up is None else out.transpose(1, 2)
    return result


def _explain(given: Given) -> rt.Explanation:
    return _explanation(check(given), rt.name_of(given.backend))


rt.register_explainer(mode_contract, Given, _explain)
