"""What the general suite cannot see in the Triton kernels: traffic, stray accesses, double writes,
program order.

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
from petal_kernels._runtime import device, philox
from tests.ops import triton_audit

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from petal_kernels._runtime import triton_lib
from petal_kernels._runtime.triton_lib import dropout_keep
from petal_kernels.ops.lowrank_linear import reference as lowrank_reference
from petal_kernels.ops.lowrank_linear import triton_impl as lowrank
from petal_kernels.ops.lowrank_linear.arguments import Call, Gradients, Saved, Settings, Tensors
from petal_kernels.ops.mode_contract import reference as mode_reference
from petal_kernels.ops.mode_contract import triton_impl as mode
from petal_kernels.ops.mode_contract.arguments import Call as Contraction

triton_audit.hasten_interpreter()

N, D, R, OUTS = 150, 83, 19, (37, 53)
WIDE = sum(OUTS)
RNG = torch.tensor([0x1234_5678_9ABC_DEF0, 0xFFFF_FFFF])  # stream 1 wraps around


@triton.jit
def _mask_kernel(  # type: ignore[no-untyped-def]
    out_ptr, rng_ptr, first, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The keep mask of rows first .. and columns 8 .. of stream 0."""
    offs = tl.arange(0, ROWS)
    seed = tl.load(rng_ptr)
    stream = tl.load(rng_ptr + 1)
    keep = dropout_keep(seed, stream, first + offs.to(tl.int64), 8, COLS, threshold)
    tl.store(out_ptr + offs[:, None] * COLS + tl.arange(0, COLS)[None, :], keep)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)


@pytest.fixture(autouse=True)
def poison() -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "x": draw(N, D, dtype=dtype), "down": draw(R, D, dtype=dtype), "hidden": None,
        "ups": [draw(o, R, dtype=dtype) for o in OUTS], "weights": [], "biases": [], "base": [],
        "core": None, "rng": RNG, "scale": 0.5, "dropout": 0.25, "dropout_at": "bottleneck",
    }  # fmt: skip
    return {**given, **changes}


def call_of(p: dict[str, Any]) -> Call:
    return Call(
        Tensors(*(p[n] for n in Tensors._fields)), Settings(*(p[n] for n in Settings._fields))
    )


def forward(p: dict[str, Any], plan: str = "update") -> tuple[list[Tensor], Saved]:
    return lowrank.forward(call_of(p), p["rng"], plan)


def backward(
    p: dict[str, Any], saved: Saved, dys: list[Tensor], need: Iterable[str] | None = None
) -> Gradients:
    if need is None:
        need = (n for n in ("x", "down", "ups", "core") if p[n] is not None)
    return lowrank.backward(call_of(p), saved, dys, p["rng"], frozenset(need))


def contraction(
    core: Tensor, modes: Tensor, up: Tensor | None, dtype: torch.dtype = torch.float32
) -> Contraction:
    return Contraction(core, modes, up, 0.5, dtype)


def exact(p: dict[str, Any], dys: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    def wide(v: Any) -> Any:
        if isinstance(v, Tensor):
            return v.double() if v.is_floating_point() else v
        if isinstance(v, list):
            return [wide(t) for t in v] or None
        return v

    q = {k: wide(v) for k, v in p.items()}
    outs = [d.double() for d in dys]
    return lowrank_reference.forward(**q), lowrank_reference.backward(outs, **q)


def close(got: Tensor | None, want: Tensor, tolerance: float) -> None:
    assert got is not None
    assert got.shape == want.shape
    worst = float((got.double() - want).abs().max() / want.abs().max())
    assert worst <= tolerance, f"error {worst:.2e} of the largest value"


def check_all(p: dict[str, Any], plan: str = "update", tolerance: float = 2e-6) -> None:
    ys, saved = forward(p, plan)
    dys = [draw(*y.shape, seed=7, dtype=y.dtype) for y in ys]
    want, grads = exact(p, dys)
    for y, w in zip(ys, want, strict=True):
        close(y, w, tolerance)
    found = backward(p, saved, dys)
    for name in ("x", "down", "core", "hidden"):
        if name in grads:
            close(getattr(found, name), grads[name], 2 * tolerance)
    for g, w in zip(found.ups, grads["ups"], strict=True):
        close(g, w, 2 * tolerance)


def clean(audit: triton_audit.Audit) -> None:
    for launch in audit.launches:
        assert not launch.rewritten(), f"{launch.kernel}: stored twice: {launch.rewritten()}"


def expect(audit: triton_audit.Audit, fragment: str, *wanted: int) -> None:
    launches = audit.of(fragment)
    assert [launch.kernel for launch in launches], f"no launch of {fragment}"
    for launch, want in zip(launches, wanted, strict=True):
        moved = launch.moved()
        assert abs(moved - want) <= 0.02 * want, f"{launch.kernel}: {moved} bytes, not {want}"


def splits_of(audit: triton_audit.Audit, index: int = 0) -> int:
    return audit.of("bwd_tn")[index].grid[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("site", ["bottleneck", "input"])
def test_lowrank_traffic_update(site: str, dtype: torch.dtype) -> None:
    """Base outputs given: shrink, expand, dh, tn, reduce, and dx by expand."""
    e = dtype.itemsize
    p = problem(dtype, base=[draw(N, o, dtype=dtype) for o in OUTS], dropout_at=site)
    with triton_audit.Audit() as audit:
        _, saved = forward(p)
        backward(p, saved, [draw(N, o, seed=3, dtype=dtype) for o in OUTS])
    clean(audit)
    expect(audit, "shrink", (N * D + R * D + N * R) * e)
    dx = (N * D + N * R + R * D) * e
    expect(audit, "expand", (2 * N * WIDE + N * R + WIDE * R) * e, dx)
    expect(audit, "bwd_dh", (N * WIDE + WIDE * R + N * R) * e)
    if site == "input":
        s, t = splits_of(audit, 0), splits_of(audit, 1)
        parts = (4 * s * R * WIDE, 4 * t * R * D)
        expect(audit, "bwd_tn", (N * WIDE + N * R) * e + parts[0], (N * D + N * R) * e + parts[1])
        expect(audit, "bwd_reduce", parts[0] + R * WIDE * e, parts[1] + R * D * e)
    else:
        s = splits_of(audit)
        part = 4 * s * R * (WIDE + D)
        expect(audit, "bwd_tn", (N * WIDE + N * D + 2 * N * R) * e + part)
        expect(audit, "bwd_reduce", part + R * (WIDE + D) * e)
    assert s > 1
    for launch in audit.launches:
        assert launch.grid[0] > 1, f"{launch.kernel}: one program on axis 0"


def test_lowrank_traffic_extend_and_one_pass_dx() -> None:
    dtype, e = torch.float16, 2
    weights = [draw(o, D, dtype=dtype) for o in OUTS]
    p = problem(dtype, weights=weights, biases=[draw(o, dtype=dtype) for o in OUTS])
    with triton_audit.Audit() as audit:
        _, saved = forward(p, "extend")
        backward(p, saved, [draw(N, o, seed=3, dtype=dtype) for o in OUTS])
    clean(audit)
    expect(audit, "gemm_ext", (N * D + D * WIDE + N * WIDE + N * R + WIDE * R + WIDE) * e)
    expect(audit, "bwd_dx", (N * WIDE + D * WIDE + N * D + N * R + R * D) * e)


@pytest.mark.parametrize(
    ("fold", "k", "r", "o"), [(True, 70, 19, 140), (False, 70, 19, 19), (True, 5, 35, 20)]
)
def test_mode_contract_traffic(fold: bool, k: int, r: int, o: int) -> None:
    core, modes = draw(r, r, r), draw(k, r)
    up = draw(o, r) if fold else None
    out = k * r * (o if fold else r) * 4
    v = o * r * 4 if fold else 0
    with triton_audit.Audit() as audit:
        call = contraction(core, modes, up)
        mode.forward(call)
        mode.backward(call, draw(*call.shape), frozenset(("core", "modes", "up")))
    clean(audit)
    expect(audit, "_fwd", (r**3 + k * r) * 4 + v + out)
    part = r * -(-r // 32) * k * r * 4  # a share of every dp_k from each slab and b tile
    expect(audit, "bwd_slab", out + (2 * r**3 + k * r) * 4 + v + part)
    if fold:
        groups = audit.of("bwd_up")[0].grid[1]
        assert groups > 1
        expect(audit, "bwd_up", out + (r**3 + k * r) * 4 + groups * v)
        expect(audit, "bwd_sum", part + k * r * 4, groups * v + v)


def test_mode_contract_cp_traffic() -> None:
    k, r, o = 5, 35, 140
    core, modes, up = draw(r), draw(k, r), draw(o, r)
    with triton_audit.Audit() as audit:
        call = contraction(core, modes, up)
        mode.forward(call)
        mode.backward(call, draw(k, r, o), frozenset(("core", "modes", "up")))
    clean(audit)
    expect(audit, "cp_fwd", (r + k * r + o * r + k * r * o) * 4)
    backward_bytes = sum(launch.moved() for launch in audit.of("bwd"))
    stated = (2 * k * r * o + 2 * o * r + 3 * k * r + 3 * r) * 4 + 8 * k * r
    assert abs(backward_bytes - stated) <= 0.02 * stated


def everything() -> list[Tensor]:
    """Outputs and gradients of both operators on one odd problem."""
    p = problem(base=[draw(N, o) for o in OUTS])
    ys, saved = forward(p)
    grads = backward(p, saved, [draw(N, o, seed=3) for o in OUTS])
    core, modes, up = draw(19, 19, 19), draw(70, 19), draw(140, 19)
    contract = contraction(core, modes, up)
    pt = mode.forward(contract)
    more = mode.backward(contract, draw(*contract.shape), frozenset(("core", "modes", "up")))
    found = [*ys, saved.h, grads.x, grads.hidden, grads.down, *grads.ups, pt, *more]
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
    for a, b in zip(backward(p, saved, dys)[:3], backward(p, saved, same)[:3], strict=True):
        assert torch.equal(a, b)


def test_mode_and_hidden() -> None:
    core = draw(2, R, R)
    check_all(problem(core=core, dropout_at="mode"))
    hidden = draw(N, 2 * R)[:, :R]
    check_all(problem(x=None, down=None, hidden=hidden))


def test_large_rows_of_the_generator() -> None:
    """The mask depends on the row's high word: rows beyond 2^32 (of the counter, not of memory)."""
    out = torch.empty(16, 16, dtype=torch.bool)
    _mask_kernel[(1,)](out, RNG, (5 << 32) - 8, philox.threshold(0.5), 16, 16)
    row = torch.arange(16).view(16, 1) + (5 << 32) - 8
    c = [(row & 0xFFFFFFFF).expand(16, 2), (row >> 32).expand(16, 2),
         torch.tensor([[1, 2]]).expand(16, 2), (RNG[1] & 0xFFFFFFFF).expand(16, 2)]  # fmt: skip
    k0, k1 = RNG[0] & 0xFFFFFFFF, RNG[0] >> 32
    for _ in range(philox.ROUNDS):
        c = philox._round(c, k0, k1)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack(c, -1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), -1).view(16, 16)
    assert torch.equal(out, lanes >= philox.threshold(0.5))


@pytest.mark.parametrize("core_dims", [3, 1])
def test_mode_contract_dtypes(core_dims: int) -> None:
    """Output of another dtype than the parameters, and gradients that come back in it."""
    core, modes, up = draw(*[19] * core_dims), draw(70, 19), draw(140, 19)
    for store, given in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        c, p, v = core.to(given), modes.to(given), up.to(given)
        call = contraction(c, p, v, store)
        pt = mode.forward(call)
        want = mode_reference.forward(c.double(), p.double(), v.double(), scale=0.5)[0]
        assert pt.dtype == store
        close(pt.transpose(1, 2), want, 6e-4 if store == torch.float16 else 2e-6)
        dout = draw(70, 19, 140).to(store)
        grads = mode.backward(call, dout, frozenset(("core", "modes", "up")))
        exact_grads = mode_reference.backward(
            dout.double().transpose(1, 2), c.double(), p.double(), v.double(), scale=0.5
        )
        for name in ("core", "modes", "up"):
            g = getattr(grads, name)
            assert g is not None
            assert g.dtype == given
            close(g, exact_grads[name], 1e-3 if given == torch.float16 else 4e-6)


def test_partial_needs() -> None:
    """Gradients that are not asked for are not computed, and the others do not change."""
    p = problem(base=[draw(N, o) for o in OUTS])
    _, saved = forward(p)
    dys = [draw(N, o, seed=3) for o in OUTS]
    full = backward(p, saved, dys)
    only = backward(p, saved, dys, ("down",))
    assert only.x is None
    assert only.ups is None
    assert only.down is not None
    assert torch.equal(only.down, full.down)
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
    bf16 = draw(4, 4).bfloat16()
    assert "bfloat16" in mode.unsupported(contraction(bf16, bf16, None))[0]


def test_precision_follows_torch() -> None:
    """fp32 products are TF32 only where torch's own are, whichever interface was used to say so."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, want in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            assert triton_lib.precision() == want
    finally:
        matmul.fp32_precision = before
