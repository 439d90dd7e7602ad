"""What the general suite cannot see in ``lowrank_linear``'s Triton kernels: traffic, stray
accesses, double writes, program order.

Runs in the interpreter; numerics over the shape grid are in ``test_ops.py``. Here: every launch's
compulsory bytes against the module docstring's formulas, every access inside an argument, every
output element stored once, the same bits with the programs run backwards, and inputs that the
public operator normalises away or rarely sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels._runtime import device
from tests.ops import triton_audit

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from petal_kernels.ops.lowrank_linear import reference
from petal_kernels.ops.lowrank_linear import triton_impl as lowrank
from petal_kernels.ops.lowrank_linear.arguments import Call, Saved, Settings, Tensors
from tests.ops.interpreted import clean, close, draw, expect

triton_audit.hasten_interpreter()

pytestmark = pytest.mark.usefixtures("poisoned")

N, D, R, OUTS = 150, 83, 19, (37, 53)
WIDE = sum(OUTS)
RNG = torch.tensor([0x1234_5678_9ABC_DEF0, 0xFFFF_FFFF])  # stream 1 wraps around


def problem(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "x": draw(N, D, dtype=dtype), "down": draw(R, D, dtype=dtype), "hidden": None,
        "ups": [draw(o, R, dtype=dtype) for o in OUTS], "weights": [], "biases": [], "base": [],
        "core": None, "rng": RNG, "scale": 0.5, "dropout": 0.25, "dropout_at": "bottleneck",
    }  # fmt: skip
    return {**given, **changes}


def call_of(p: dict[str, Any]) -> Call:
    down, scale = p["down"], p["scale"]
    lists = {
        "downs": down if isinstance(down, list) else [] if down is None else [down],
        "scales": scale if isinstance(scale, list) else [scale] * len(p["ups"]),
    }
    q = p | lists
    return Call(
        Tensors(*(q[n] for n in Tensors._fields)), Settings(*(q[n] for n in Settings._fields))
    )


def forward(p: dict[str, Any], plan: str = "update") -> tuple[list[Tensor], Saved]:
    return lowrank.forward(call_of(p), p["rng"], plan)


def backward(
    p: dict[str, Any], saved: Saved, dys: list[Tensor], need: Iterable[str] | None = None
) -> Any:
    if need is None:
        inputs = {"x": "x", "down": "downs", "ups": "ups", "core": "core"}
        need = {field for name, field in inputs.items() if p[name] is not None} | {"hidden"}
    return lowrank.backward(call_of(p), saved, dys, p["rng"], frozenset(need))


def exact(p: dict[str, Any], dys: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    def wide(v: Any) -> Any:
        if isinstance(v, Tensor):
            return v.double() if v.is_floating_point() else v
        if isinstance(v, list):
            return [wide(t) for t in v] or None
        return v

    q = {k: wide(v) for k, v in p.items()}
    outs = [d.double() for d in dys]
    return reference.forward(**q), reference.backward(outs, **q)


def check_all(p: dict[str, Any], plan: str = "update", tolerance: float = 2e-6) -> None:
    ys, saved = forward(p, plan)
    dys = [draw(*y.shape, seed=7, dtype=y.dtype) for y in ys]
    want, grads = exact(p, dys)
    for y, w in zip(ys, want, strict=True):
        close(y, w, tolerance)
    found = backward(p, saved, dys)
    for name in ("x", "core", "hidden"):
        if name in grads:
            close(getattr(found, name), grads[name], 2 * tolerance)
    downs = grads.get("down", [])
    downs = downs if isinstance(downs, list) else [downs]
    for g, w in zip([*found.ups, *(found.downs or [])], [*grads["ups"], *downs], strict=True):
        close(g, w, 2 * tolerance)


def splits_of(audit: triton_audit.Audit, kernel: str = "tn_kernel") -> int:
    return audit.of(kernel)[0].grid[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("site", ["bottleneck", "input"])
def test_traffic_update(site: str, dtype: torch.dtype) -> None:
    """Base outputs given: shrink, expand, dh, tn, reduce, through."""
    e = dtype.itemsize
    p = problem(dtype, base=[draw(N, o, dtype=dtype) for o in OUTS], dropout_at=site)
    with triton_audit.Audit() as audit:
        _, saved = forward(p)
        backward(p, saved, [draw(N, o, seed=3, dtype=dtype) for o in OUTS])
    clean(audit)
    expect(audit, "shrink", (N * D + R * D + N * R) * e)
    expect(audit, "expand", (2 * N * WIDE + N * R + WIDE * R) * e)
    expect(audit, "through", (N * D + N * R + R * D) * e)
    expect(audit, "bwd_dh", (N * WIDE + WIDE * R + N * R) * e)
    if site == "input":
        s = splits_of(audit)
        ups, downs = 4 * s * R * WIDE, 4 * splits_of(audit, "tn_x") * R * D
        expect(audit, "tn_kernel", (N * WIDE + N * R) * e + ups)
        expect(audit, "tn_x", (N * D + N * R) * e + downs)
        expect(audit, "bwd_reduce", downs + R * D * e, ups + R * WIDE * e)
    else:
        s = splits_of(audit)
        part = 4 * s * R * (WIDE + D)
        expect(audit, "bwd_tn", (N * WIDE + N * D + 2 * N * R) * e + part)
        expect(audit, "bwd_reduce", part + R * (WIDE + D) * e)
    assert s > 1
    for launch in audit.launches:
        assert launch.grid[0] > 1, f"{launch.kernel}: one program on axis 0"


def test_traffic_extend_and_one_pass_dx() -> None:
    dtype, e = torch.float16, 2
    weights = [draw(o, D, dtype=dtype) for o in OUTS]
    p = problem(dtype, weights=weights, biases=[draw(o, dtype=dtype) for o in OUTS])
    with triton_audit.Audit() as audit:
        _, saved = forward(p, "extend")
        backward(p, saved, [draw(N, o, seed=3, dtype=dtype) for o in OUTS])
    clean(audit)
    expect(audit, "gemm_ext", (N * D + D * WIDE + N * WIDE + N * R + WIDE * R + WIDE) * e)
    expect(audit, "bwd_dx", (N * WIDE + D * WIDE + N * D + N * R + R * D) * e)


def everything() -> list[Tensor]:
    """Outputs and gradients of one odd problem."""
    p = problem(base=[draw(N, o) for o in OUTS])
    ys, saved = forward(p)
    grads = backward(p, saved, [draw(N, o, seed=3) for o in OUTS])
    found = [*ys, saved.h, grads.x, grads.hidden, *(grads.downs or []), *grads.ups]
    return [t for t in found if t is not None]


def test_program_order_changes_no_bit() -> None:
    first = everything()
    with triton_audit.Audit(reverse=True):
        second = everything()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plan", ["update", "extend"])
def test_weights_any_stride(plan: str) -> None:
    """Conv1D views (unit stride in the other dim), and a column slice."""
    for weights in ([draw(D, o).t() for o in OUTS], [draw(o, 2 * D)[:, :D] for o in OUTS]):
        check_all(problem(weights=weights, biases=[draw(OUTS[0]), None]), plan)


def test_one_pass_dx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated dx GEMM in fp32, which the launcher reserves for 16-bit, at each dropout
    site."""
    monkeypatch.setattr(lowrank, "_fuses_dx", lambda x, weights: True)
    for site in ("bottleneck", "input"):
        for weights in ([draw(o, D) for o in OUTS], [draw(D, o).t() for o in OUTS]):
            check_all(problem(weights=weights, biases=[None, None], dropout_at=site))


def test_layouts_mixed() -> None:
    """Up-projections of two layouts and dtypes, a transposed and a strided down, a broadcast dy."""
    ups = [draw(OUTS[0], R), draw(R, OUTS[1]).t()]
    check_all(problem(ups=ups, down=draw(D, R).t()))
    check_all(problem(ups=[draw(R, o).t() for o in OUTS]))
    p = problem(torch.float16, ups=[ups[0], ups[1].half()], down=draw(R, 2 * D)[:, ::2])
    check_all(p, tolerance=2e-3)
    p = problem(base=[draw(N, o) for o in OUTS])
    _, saved = forward(p)
    dys = [draw(1, o).expand(N, o) for o in OUTS]
    same = [dy.contiguous() for dy in dys]
    a, b = backward(p, saved, dys), backward(p, saved, same)
    for name in ("x", "downs", "hidden"):
        for one, other in zip(*(torch.stack([*getattr(g, name)]) for g in (a, b)), strict=True):
            assert torch.equal(one, other)


def test_mode_and_hidden() -> None:
    core = draw(2, R, R)
    check_all(problem(core=core, dropout_at="mode"))
    hidden = draw(N, 2 * R)[:, :R]
    check_all(problem(x=None, down=None, hidden=hidden))


def test_partial_needs() -> None:
    """Gradients that are not asked for are not computed, and the others do not change."""
    p = problem(base=[draw(N, o) for o in OUTS])
    _, saved = forward(p)
    dys = [draw(N, o, seed=3) for o in OUTS]
    full = backward(p, saved, dys)
    only = backward(p, saved, dys, ("downs",))
    assert only.x is None
    assert only.ups is None
    assert only.downs is not None
    assert torch.equal(only.downs[0], full.downs[0])
    with triton_audit.Audit() as audit:
        only = backward(p, saved, dys, ("ups",))
    assert not audit.of("bwd_dh")
    assert all(torch.equal(a, b) for a, b in zip(only.ups, full.ups, strict=True))


def test_ups_alone_trained() -> None:
    """Backward then has no value of x, but still its dtype and device to choose a backend by."""
    x, down, up = draw(N, D), draw(R, D), draw(OUTS[0], R).requires_grad_()
    (y,) = pk.lowrank_linear(x, down, [up], backend="triton")
    (dup,) = torch.autograd.grad(y.sum(), up)
    close(dup, (x.double() @ down.double().t()).sum(0).expand_as(up), 4e-6)


def test_reasons() -> None:
    """Each limit is a reason of its own, and all are given at once."""
    x = draw(4, 300).double()
    p = problem(x=x, down=draw(300, 300), ups=[draw(5, 300)] * 5)
    reasons = lowrank.unsupported(call_of(p), "augment")
    text = "; ".join(reasons)
    limits = ("at most 4 outputs, got 5", "rank at most 256, got 300", "no plan 'augment'")
    for part in ("float64", *limits):
        assert part in text
    odd = draw(20, 20, 2)[..., 0]
    p = problem(x=draw(4, 20), down=draw(4, 20), ups=[draw(20, 4)], weights=[odd], biases=[None])
    reasons = lowrank.unsupported(call_of(p), "extend")
    assert reasons == ["plan 'extend' needs weights with a unit stride, all in the same dim"]
