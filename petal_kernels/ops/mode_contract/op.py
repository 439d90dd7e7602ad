"""``mode_contract``: checks, raw operators, backends, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petal_kernels._runtime import backends as rt
from petal_kernels._runtime import checks
from petal_kernels._runtime.library import define

_NAME = "mode_contract"
_FUSED_MODES = 12

BACKENDS = tuple(
    rt.Backend(name, f"petal_kernels.ops.mode_contract.{name}_impl") for name in rt.NAMES
)


def _out_shape(core: Tensor, modes: Tensor, up: Tensor | None) -> tuple[int, int, int]:
    rank = core.shape[0]
    return modes.shape[0], rank, rank if up is None else up.shape[0]


def _select(
    core: Tensor, modes: Tensor, up: Tensor | None, dtype: torch.dtype, backend: str
) -> rt.Backend:
    if backend == rt.AUTO:
        backend = preferred(core, modes, up)
    return rt.select(_NAME, BACKENDS, backend, core, modes, up, dtype)


def preferred(core: Tensor, modes: Tensor, up: Tensor | None) -> str:
    """What ``auto`` means for these inputs: the library where it was measured faster, else the
    first backend.

    On a CPU, few Tucker modes are two small library GEMMs that no fused loop beats; from a dozen
    modes on the fused one is level in forward and ahead in backward. The diagonal core has no GEMM
    and always runs fused (``python -m benchmarks.run op mode_contract``).
    """
    if core.device.type == "cpu" and core.dim() == 3 and modes.shape[0] < _FUSED_MODES:
        return "torch"
    return rt.AUTO


def _fwd(
    core: Tensor, modes: Tensor, up: Tensor | None, scale: float, dtype: torch.dtype, backend: str
) -> Tensor:
    if modes.shape[0] == 0 or (up is not None and up.shape[0] == 0):
        return core.new_zeros(_out_shape(core, modes, up), dtype=dtype)
    impl = _select(core, modes, up, dtype, backend).load()
    out: Tensor = impl.forward(core, modes, up, scale, dtype)
    return out.contiguous()


def _fwd_fake(
    core: Tensor, modes: Tensor, up: Tensor | None, scale: float, dtype: torch.dtype, backend: str
) -> Tensor:
    return core.new_empty(_out_shape(core, modes, up), dtype=dtype)


def _bwd(
    dout: Tensor,
    core: Tensor,
    modes: Tensor,
    up: Tensor | None,
    scale: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if dout.numel() == 0:
        return (
            _grad(core, None, need[0]),
            _grad(modes, None, need[1]),
            _grad(up, None, need[2], core),
        )
    impl = _select(core, modes, up, dout.dtype, backend).load()
    dcore, dmodes, dup = impl.backward(dout.contiguous(), core, modes, up, scale, *need)
    return _grad(core, dcore, need[0]), _grad(modes, dmodes, need[1]), _grad(up, dup, need[2], core)


def _grad(
    of: Tensor | None, value: Tensor | None, needed: bool, like: Tensor | None = None
) -> Tensor:
    """A gradient as the fake promises it: contiguous, shaped like its tensor; empty where it is not
    needed."""
    if of is None or not needed:
        placed = of if of is not None else like
        assert placed is not None
        return placed.new_empty(0)
    return of.new_zeros(of.shape) if value is None else value.contiguous()


def _bwd_fake(
    dout: Tensor,
    core: Tensor,
    modes: Tensor,
    up: Tensor | None,
    scale: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [
        core.new_empty(0) if t is None or not n else t.new_empty(t.shape)
        for t, n in zip((core, modes, up), need, strict=True)
    ]
    return grads[0], grads[1], grads[2]


_forward_op = define(
    "mode_contract_fwd(Tensor core, Tensor modes, Tensor? up, float scale, ScalarType dtype, "
    "str backend) -> Tensor",
    _fwd,
    _fwd_fake,
)
_backward_op = define(
    "mode_contract_bwd(Tensor dout, Tensor core, Tensor modes, Tensor? up, float scale, "
    "bool[] need, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class ModeContractFunction(torch.autograd.Function):
    """Saves core, modes and up; the mode matrices are recomputed in backward."""

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
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        core, modes, up = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        grads = _backward_op(dout, core, modes, up, ctx.scale, need, ctx.backend)
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), None, None, None)


def _check(core: Tensor, modes: Tensor, up: Tensor | None, dtype: torch.dtype | None) -> None:
    checks.check_floating("core", core)
    checks.check_floating("modes", modes)
    if core.dim() == 3:
        rank = core.shape[0]
        checks.check_shape("core", core, (rank, rank, rank))
    elif core.dim() != 1:
        raise ValueError(f"core: want shape [R] (CP) or [R, R, R] (Tucker), got {list(core.shape)}")
    rank = core.shape[0]
    if rank < 1:
        raise ValueError(f"core: want rank R >= 1, got {list(core.shape)}")
    checks.check_shape("modes", modes, ("K", rank))
    others = [("modes", modes)]
    if up is not None:
        checks.check_floating("up", up)
        checks.check_shape("up", up, ("O", rank))
        others.append(("up", up))
    for name, tensor in others:
        checks.check_dtype(name, tensor, (core.dtype,), " like core")
        checks.check_device(name, tensor, core.device)
    if dtype is not None and dtype not in checks.FLOATING:
        raise TypeError(f"dtype: want a floating dtype, got {dtype}")


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
        scale: multiplies the result.
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
    _check(core, modes, up, dtype)
    scale = checks.check_number("scale", scale)
    name = rt.default_backend() if backend is None else rt.check_name(backend)
    out_dtype = core.dtype if dtype is None else dtype
    tensors = (core, modes) if up is None else (core, modes, up)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out = ModeContractFunction.apply(core, modes, up, scale, out_dtype, name)  # type: ignore[no-untyped-call]
    else:
        out = _forward_op(core, modes, up, scale, out_dtype, name)
    result: Tensor = out if up is None else out.transpose(1, 2)
    return result


def _explain(
    core: Tensor,
    modes: Tensor,
    up: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> rt.Explanation:
    _check(core, modes, up, dtype)
    out_dtype = core.dtype if dtype is None else dtype
    rows = rt.candidates(BACKENDS, core, modes, up, out_dtype)
    name = rt.default_backend() if backend is None else backend
    choice = _select(core, modes, up, out_dtype, name)
    notes = []
    if name == rt.AUTO and preferred(core, modes, up) == "torch":
        notes.append("plan: the library's GEMM, measured faster than a fused loop on this device")
    return rt.Explanation(
        _NAME,
        tuple((c.backend.name, c.reasons) for c in rows),
        choice.name,
        notes=tuple(notes),
    )


rt.register_explainer(mode_contract, _explain)
