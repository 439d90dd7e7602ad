"""What the general suite cannot see in ``gated_bottleneck``'s Triton kernels: traffic, stray
accesses, double writes, program order.

Runs in the interpreter; numerics over the shape grid are in ``test_ops.py``. A launch's compulsory
bytes leave out what it reads of its own stores (its own rows, from L2), which are checked apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels._runtime import device
from petal_kernels._runtime.backends import bound
from tests.ops import triton_audit
from tests.ops.gated_bottleneck import traffic

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from petal_kernels.ops.gated_bottleneck import op, reference, workload
from petal_kernels.ops.gated_bottleneck import triton_impl as gated
from petal_kernels.ops.gated_bottleneck import triton_launch as launch
from petal_kernels.ops.gated_bottleneck.arguments import Call, Saved
from tests.ops.interpreted import normal

triton_audit.hasten_interpreter()

pytestmark = pytest.mark.usefixtures("poisoned")

B, L, D, R, RG = 3, 47, 83, 19, 13
N = B * L
LARGE = workload._bart("large", (B, L), D, R, "large", gate_rank=RG, scale=0.5)
SMALL = workload._bart("small", (B, L), D, R, "small", mask=True)
ADAPTER = workload.Case("adapter", (B, L), D, R)
PARALLEL = workload.Case(
    "parallel", (B, L), D, R, base="given", out=56, gate="large", gate_rank=RG, gate_width=40
)
# Two tiles of tokens; and cheaper as one matrix per sample, of two slices.
GRAM = workload.Case("gram", (B, L), D, 48, route="gram", vision=40)
SQUARE = replace(GRAM, name="square", rank=40, vision=60)


def prepare(case: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Call, Any]:
    """What the backend receives for a case, and the generator's state."""
    inputs = workload.make_inputs(case, dtype) | changes
    call, rng, _, _ = op.prepare(bound(op.gated_bottleneck, **inputs))
    return call, rng


def needs(call: Call) -> frozenset[str]:
    """Every gradient there is to ask for."""
    found = {n for n, v in call.tensors._asdict().items() if v is not None}
    found -= {"token_weights"}
    return frozenset(found - ({"residual"} if call.tensors.norm_weight is None else set()))


def run(
    call: Call, rng: Any, need: frozenset[str] | None = None, dout: Tensor | None = None
) -> tuple[Tensor, Saved, dict[str, Tensor]]:
    out, saved = gated.forward(call, rng, True)
    dout = normal(*out.shape, dtype=out.dtype) if dout is None else dout
    return out, saved, gated.backward(call, saved, dout, rng, needs(call) if need is None else need)


def expect(audit: triton_audit.Audit, fragment: str, *wanted: tuple[int, int]) -> None:
    """Compulsory bytes within 2 % and bytes read back exactly, launch by launch."""
    launches = audit.of(fragment)
    assert len(launches) == len(wanted)
    for found, (want, again) in zip(launches, wanted, strict=True):
        assert found.readback() == again, (
            f"{found.kernel} reads back {found.readback()}, not {again}"
        )
        moved = found.moved() - again
        assert abs(moved - want) <= 0.02 * want, f"{found.kernel}: {moved} bytes, not {want}"
        twice = {"out_ptr", "dx_ptr", "dh_ptr", "dgate_input_ptr"} if again else set()
        assert set(found.rewritten()) <= twice, f"{found.kernel}: {found.rewritten()} stored twice"


def splits(audit: triton_audit.Audit) -> int:
    grid = audit.of("bwd_weights")[0].grid
    assert min(grid[:2]) > 1
    return grid[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traffic_large(dtype: torch.dtype) -> None:
    e = dtype.itemsize
    call, rng = prepare(LARGE, dtype)
    with triton_audit.Audit() as audit:
        run(call, rng)
    matrices, vectors = 2 * D * (R + RG), 4 * D
    middle = N * (R + RG)
    expect(audit, "_fwd", ((3 * N * D + middle + matrices + vectors) * e + 8 * N, N * D * e))
    rows = (5 * N * D + 3 * middle + matrices + vectors - D) * e + 8 * N + 8 * N
    expect(audit, "bwd_rows", (rows, 2 * N * D * e))
    part = 4 * splits(audit) * (matrices + vectors)
    up = (matrices // 2 + 3 * D) * e
    expect(audit, "bwd_weights", ((3 * N * D + 2 * middle) * e + up + 16 * N + part, 0))
    expect(audit, "bwd_reduce", (part + (matrices + vectors) * e, 0))
    for found in audit.launches:
        assert found.grid[0] > 1, f"{found.kernel}: one program on axis 0"


def test_traffic_small() -> None:
    """Two launches of fwd and rows: the numbers of a row, then the rows."""
    call, rng = prepare(SMALL)
    with triton_audit.Audit() as audit:
        run(call, rng)
    numbers = 4 * N
    wide, middle, up, down = 4 * N * D, 4 * N * R, 4 * (D * R + D), 4 * D * R
    expect(
        audit,
        "_fwd",
        (2 * wide + middle + down + 8 * D + numbers, 0),
        (3 * wide + middle + up + 8 * D + 4 * numbers, wide),
    )
    expect(
        audit,
        "bwd_rows",
        (3 * wide + middle + up + 4 * D + 8 * numbers, 0),
        (5 * wide + 3 * middle + up + down + 12 * D + 9 * numbers, wide),
    )
    part = 4 * splits(audit) * (2 * D * R + 5 * D)
    expect(audit, "bwd_weights", (3 * wide + 2 * middle + up + 4 * D + 6 * numbers + part, 0))


def test_traffic_adapter() -> None:
    """Without a gate and a norm, backward does not form Y again."""
    call, rng = prepare(ADAPTER)
    with triton_audit.Audit() as audit:
        run(call, rng)
    wide, middle, up = 4 * N * D, 4 * N * R, 4 * D * R
    expect(audit, "_fwd", (2 * wide + middle + 2 * up + 4 * D, 0))
    expect(audit, "bwd_rows", (2 * wide + 3 * middle + 2 * up, wide))
    part = 4 * splits(audit) * (2 * D * R + D)
    expect(audit, "bwd_weights", (2 * wide + 2 * middle + part, 0))


def test_traffic_unequal_widths() -> None:
    """x, gate_input and the output of three widths: a launch of partial sums for each."""
    call, rng = prepare(PARALLEL)
    with triton_audit.Audit() as audit:
        run(call, rng)
    o, g = PARALLEL.out, PARALLEL.gate_width
    middle, matrices = N * (R + RG), (D + o) * R + (o + g) * RG
    expect(audit, "_fwd", (4 * (N * (D + g + 2 * o) + middle + matrices + 2 * o), 0))
    rows = N * (3 * o + D + g) + 3 * middle + matrices + 2 * o
    expect(audit, "bwd_rows", (4 * rows, 0))
    s = splits(audit)
    up = o * (R + RG) + 2 * o
    expect(
        audit,
        "bwd_weights",
        (4 * (2 * N * o + middle + (s + 1) * up), 0),
        (4 * (N * (D + R) + s * D * R), 0),
        (4 * (N * (g + RG) + s * g * RG), 0),
    )


@pytest.mark.parametrize("route", ["add", "mul", "expand", "gram"])
def test_traffic_of_routed_lora(route: str) -> None:
    """GPT-2's c_attn: x, the middle and q and v where they lie, beyond the base."""
    call = traffic.RoutedProjection(route)
    with pk.use_backend("triton"), triton_audit.Audit() as audit:
        library = call.count({})
    launches = audit.of("_fwd")
    assert len(launches) == len(audit.launches) == 2
    assert all(found.grid[0] > 1 and not found.rewritten() for found in launches)
    moved = [found.moved(ignore=("rng_ptr", "up_ptr")) for found in launches]
    call.check(library + sum(moved))


def everything(case: Any) -> list[Tensor]:
    call, rng = prepare(case)
    out, saved, grads = run(call, rng)
    return [out, *(s for s in saved if s is not None), *grads.values()]


@pytest.mark.parametrize("case", [LARGE, SMALL, GRAM, SQUARE], ids=lambda c: c.name)
def test_program_order_changes_no_bit(case: Any) -> None:
    """Nor does any active lane lie outside its tensors: the audit refuses those."""
    first = everything(case)
    with triton_audit.Audit(reverse=True):
        second = everything(case)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def close(got: Tensor, want: Tensor, label: str) -> None:
    worst = float((got.double() - want).abs().max() / want.abs().max())
    assert worst <= 1e-5, f"{label}: error {worst:.2e} of the largest value"


@pytest.mark.parametrize("case", [LARGE, SMALL, GRAM, SQUARE], ids=lambda c: c.name)
def test_small_tensors_of_any_stride(case: Any) -> None:
    """Transposed and strided parameters and factors, a broadcast gradient of the output."""
    call, rng = prepare(case)
    t = call.tensors

    def strided(v: Tensor) -> Tensor:
        return torch.stack((v, v), -1)[..., 0]

    rows = ("x", "bottleneck", "base", "gate_input", "residual")
    small = {n: strided(v) for n, v in t._asdict().items() if v is not None and n not in rows}
    other = call._replace(tensors=t._replace(**small | {"up": t.up.t().contiguous().t()}))
    dout = normal(1, t.up.shape[0]).expand(N, -1)
    first, second = run(call, rng, dout=dout.contiguous()), run(other, rng, dout=dout)
    assert torch.equal(first[0], second[0])
    for name, grad in first[2].items():
        assert torch.equal(grad, second[2][name]), name


@pytest.mark.parametrize("case", [PARALLEL, SQUARE], ids=lambda c: c.name)
def test_partial_needs(case: Any) -> None:
    """Gradients that are not asked for are not computed, and the others do not change."""
    call, rng = prepare(case)
    full = run(call, rng)[2]
    for name in needs(call) & {"x", "up", "gate_down", "left"}:
        only = run(call, rng, frozenset({name}))[2]
        assert set(only) <= {name, "left", "right"}
        assert torch.equal(only[name], full[name]), name
    with triton_audit.Audit() as audit:
        run(call, rng, frozenset({"down_bias"}))
    assert not audit.of("bwd_weights")


NAMED = {case.name: case for case in workload.CASES}
EXACT = [
    *(replace(case, route=route) for case in (GRAM, SQUARE) for route in ("gram", "gram_relu")),
    *(NAMED[n] for n in ("middleX-odd", "middleX-release", "middleY", "expand-tokens")),
    *(NAMED[n] for n in ("small-release", "mul-small", "silu-large", "large-odd", "value-odd")),
]


@pytest.mark.parametrize("case", EXACT, ids=lambda c: f"{c.name}-{c.route}")
def test_against_reference(case: Any) -> None:
    """Also more vision tokens than one step takes, on either plan of the product."""
    call, rng = prepare(case)
    out, _, grads = run(call, rng)
    inputs = workload.make_inputs(case, torch.float32)
    exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
             for k, v in inputs.items()}  # fmt: skip
    want = reference.forward(**exact)[0]
    close(out.view(want.shape), want, "out")
    wanted = reference.backward(normal(*out.shape).double().view(want.shape), **exact)
    for name, grad in grads.items():
        if name in wanted:
            close(grad.view(wanted[name].shape), wanted[name], name)


def test_inference_stores_nothing_else() -> None:
    """No z, no logits, no moments where nobody asked to keep them."""
    for case in (LARGE, GRAM):
        call, rng = prepare(case)
        with triton_audit.Audit() as audit:
            out, saved = gated.forward(call, rng, False)
        assert all(s is None for s in saved)
        assert set(audit.launches[0].writes) == {"out_ptr"}
        assert torch.equal(out, gated.forward(call, rng, True)[0])


def test_gradients_of_parameters_in_their_own_dtype() -> None:
    call, rng = prepare(replace(LARGE, float_parameters=True), torch.float16)
    grads = run(call, rng)[2]
    assert grads["up"].dtype == torch.float32
    assert grads["x"].dtype == torch.float16


def test_reasons() -> None:
    """Every limit is a reason of its own, and all are given at once."""
    wide = workload.Case("wide", (2, 3), 8, 300, gate="large", gate_rank=257)
    call, _ = prepare(wide, torch.float64)
    assert gated.unsupported(call) == [
        "has no float64 kernels",
        "rank at most 256, got 300",
        "gate's rank at most 256, got 257",
    ]
    assert "bfloat16" in gated.unsupported(prepare(ADAPTER, torch.bfloat16)[0])[0]
    for case in workload.CASES:
        assert not gated.unsupported(prepare(case)[0])


def test_one_launch_where_all_widths_agree() -> None:
    p = launch.Problem.of(prepare(LARGE)[0], N)
    assert len(launch._jobs(p, list(launch.SECTIONS))) == 1
    p = launch.Problem.of(prepare(PARALLEL)[0], N)
    assert [width for _, width in launch._jobs(p, list(launch.SECTIONS))] == [56, D, 40]


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_a_derivative_far_out_is_its_limit(activation: str) -> None:
    """0 or 1; gelu_tanh's as far as its cube times q can be formed."""
    far = 1e12 if activation == "gelu_tanh" else 1e15
    z = torch.tensor([[-far, far, -3e4, 3e4]]).repeat(3, 1).requires_grad_()
    up = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    out = pk.gated_bottleneck(
        None, None, up, base=None, bottleneck=z, activation=activation, backend="triton"
    )
    dout = torch.ones_like(out)
    (dz,) = torch.autograd.grad(out, z, dout)
    want = (dout @ up) * torch.tensor([0.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(dz, want, rtol=1e-5, atol=1e-5)
