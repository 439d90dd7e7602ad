"""What the general suite cannot see in ``expert_dispatch``'s Triton kernels: traffic, stray
accesses, double writes, program order, and routings made to break a sort.

Runs in the interpreter; numerics over the shape grid are in ``test_ops.py``. A launch's compulsory
bytes leave out what it reads of its own stores (its own rows, from L2), which are checked apart.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels._runtime import device
from petal_kernels._runtime.backends import bound
from tests.ops import triton_audit

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from petal_kernels.ops.expert_dispatch import op, reference, routing, torch_impl, workload
from petal_kernels.ops.expert_dispatch import triton_impl as experts
from petal_kernels.ops.expert_dispatch import triton_launch as launch
from petal_kernels.ops.expert_dispatch.arguments import Call, Saved
from tests.ops.interpreted import normal

triton_audit.hasten_interpreter()

pytestmark = pytest.mark.usefixtures("poisoned")

# Two tiles of rows and more, the last ragged, on every axis; three splits.
N, D, E, R = 141, 83, 5, 19
DENSE = workload.Case("dense", (N,), D, E, R, activation="gelu", noise=True)
TOPK = workload._topk(
    "topk", (N,), D, E, R, activation="silu", skew="zipf", plan="stationary", renormalize=False
)
SORTED = replace(TOPK, name="sorted", plan="sorted")
LORA = replace(SORTED, name="lora", base="given", out=56, bias=False, keep=1.0)
SAMPLES = workload.Case(
    "samples", (3, 47), D, E, R, gate="given", choice="indices", top_k=2, pooled=True,
    plan="stationary",
)  # fmt: skip
SHARED = replace(TOPK, name="shared", shared_down=True)
SHARED_SORTED = replace(SORTED, name="shared-sorted", shared_down=True)
ALL = [DENSE, TOPK, SORTED, LORA, SAMPLES, SHARED, SHARED_SORTED]
named = attrgetter("name")


def prepare(case: workload.Case, dtype: torch.dtype = torch.float32, **changes: Any) -> Call:
    """What the backend receives for a case."""
    inputs = workload.options(case) | workload.make_inputs(case, dtype) | changes
    call: Call = op.prepare(bound(op.expert_dispatch, **inputs))[0]
    return call


def needs(call: Call) -> frozenset[str]:
    """Every gradient there is to ask for."""
    found = {n for n, v in call.tensors._asdict().items() if v is not None}
    return frozenset(found - {"base", "chosen"})


def run(
    call: Call,
    need: frozenset[str] | None = None,
    dout: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> tuple[Tensor, Saved, dict[str, Tensor]]:
    out, saved = experts.forward(call, True)
    dout = normal(*out.shape, dtype=out.dtype) if dout is None else dout
    need = needs(call) if need is None else need
    return out, saved, experts.backward(call, saved, dout, dlogits, need)


def audited(call: Call) -> triton_audit.Audit:
    with triton_audit.Audit() as audit:
        run(call)
    return audit


def expect(audit: triton_audit.Audit, fragment: str, *wanted: tuple[int, int]) -> None:
    """Compulsory bytes within 2 % and bytes read back exactly, launch by launch; several programs
    on the first axis, no element stored twice."""
    launches = audit.of(fragment)
    assert len(launches) == len(wanted)
    for found, (want, again) in zip(launches, wanted, strict=True):
        assert found.readback() == again, f"{found.kernel} reads back {found.readback()}"
        moved = found.moved() - again
        assert abs(moved - want) <= 0.02 * want, f"{found.kernel}: {moved} bytes, not {want}"
        assert not found.rewritten(), f"{found.kernel}: {found.rewritten()} stored twice"
        assert found.grid[0] > 1


def splits(audit: triton_audit.Audit) -> int:
    grids = [found.grid for found in audit.of("bwd_weights")]
    assert all(min(grid) > 1 for grid in grids)
    return grids[0][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traffic_stationary(dtype: torch.dtype) -> None:
    e = dtype.itemsize
    audit = audited(prepare(DENSE, dtype))
    wide, middle, pairs, matrix = N * D * e, N * E * R * e, N * E, E * R * D * e
    biases, router = E * (D + R) * e, E * (D + 1) * e
    route = pairs * (4 + e) + router  # logits, noise
    expect(audit, "_fwd", (2 * wide + middle + 2 * matrix + biases + route, middle))
    rows = 2 * wide + 2 * middle + 2 * matrix + E * D * e + 8 * pairs + router
    expect(audit, "bwd_rows", (rows, middle))
    part = 4 * splits(audit) * E
    expect(
        audit,
        "bwd_weights",
        (wide + middle + 4 * pairs + part * D * (R + 1), 0),
        (wide + middle + 4 * pairs + part * (D * R + D + R), 0),
    )
    expect(audit, "bwd_reduce", (part * (2 * D * R + 2 * D + R) + 2 * matrix + biases + router, 0))
    assert len(audit.launches) == 5


def test_traffic_of_petal() -> None:
    """E = 6, r = 64, d = 768: beyond the parameters, at most 2.2 N d + N E r numbers."""
    n, d, middle = 130, 768, 6 * 64
    call = prepare(workload.Case("petal", (n,), d, 6, 64), torch.float16)
    with triton_audit.Audit() as audit:
        experts.forward(call, True)
    (found,) = audit.launches
    parameters = sum(
        v.numel() * v.element_size() for m, v in call.tensors._asdict().items() if v is not None
        and m != "x"
    )  # fmt: skip
    assert found.grid[0] > 2
    assert not found.rewritten()
    assert found.readback() == 2 * n * middle
    moved = found.moved() - found.readback() - parameters
    assert 2 * n * (2 * d + middle) <= moved <= 2 * n * (2.2 * d + middle)


def test_traffic_sorted() -> None:
    """Beyond the stationary plan's: x once more for the sort, dout and x in another order; z of the
    slots that are used."""
    call = prepare(SORTED)
    audit = audited(call)
    wide, slots, pairs, matrix = 4 * N * D, 2 * N, N * E, 4 * E * R * D
    middle, biases, router, slot_of = 4 * slots * R, 4 * E * D, 4 * E * (D + 1), 4 * 2 * N
    expect(audit, "route", (wide + router + 9 * pairs, 0))
    expect(audit, "shrink", (wide + matrix + 4 * E * R + middle + 4 * slots, 0))
    expect(audit, "_fwd", (2 * wide + middle + matrix + biases + slot_of + 5 * pairs, 0))
    rest = 4 * slots + 5 * pairs + 4 * slots  # order, logits and choice, dg
    expect(audit, "bwd_slots", (wide + 2 * middle + matrix + biases + rest, 0))
    rows = 2 * wide + middle + matrix + router + slot_of + 9 * pairs + 4 * slots
    expect(audit, "bwd_rows", (rows, 0))
    part = 4 * splits(audit) * E
    expect(
        audit,
        "bwd_weights",
        (wide + middle + 5 * pairs + 4 * slots + part * D * (R + 1), 0),
        (wide + middle + 4 * pairs + 4 * slots + part * (D * R + D + R), 0),
    )
    assert len(audit.launches) == 8


def test_a_tile_passes_by_the_experts_nobody_chose() -> None:
    """Samples of a tile that choose alike: the others' weights are not even read."""
    inputs = workload.make_inputs(replace(SAMPLES, lead=(3, 64)), torch.float32)
    call = prepare(replace(SAMPLES, lead=(3, 64)), indices=torch.full_like(inputs["indices"], 3))
    audit = audited(call)
    for fragment, name in (("_fwd", "down_ptr"), ("_fwd", "up_ptr"), ("bwd_rows", "up_ptr")):
        (found,) = audit.of(fragment)
        assert found._bytes(found.reads, name, True) == 4 * R * D, f"{fragment} {name}"
    (found,) = audit.of("_fwd")
    assert found._bytes(found.writes, "z_ptr", True) == 4 * 3 * 64 * R


def everything(case: workload.Case) -> list[Tensor]:
    out, saved, grads = run(prepare(case))
    # What nobody chose is not written, nor what lies behind the last slot.
    return [out, *(s for s in saved[1:] if s is not None), *grads.values()]


@pytest.mark.parametrize("case", ALL, ids=named)
def test_program_order_changes_no_bit(case: workload.Case) -> None:
    """Nor does any active lane lie outside its tensors: the audit refuses those."""
    first = everything(case)
    with triton_audit.Audit(reverse=True) as audit:
        second = everything(case)
    assert all(found.grid[0] > 1 for found in audit.launches)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def close(got: Tensor, want: Tensor, label: str) -> None:
    assert bool(torch.isfinite(got).all()), label
    worst = float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))
    assert worst <= 1e-5, f"{label}: error {worst:.2e} of the largest value"


def compare(case: workload.Case, **changes: Any) -> None:
    """Outputs and all gradients against the reference in fp64."""
    call = prepare(case, **changes)
    out, _, grads = run(call)
    inputs = workload.make_inputs(case, torch.float32) | changes
    exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
             for k, v in inputs.items()}  # fmt: skip
    want = reference.forward(**exact)[0]
    close(out.view(want.shape), want, "out")
    wanted = reference.backward(normal(*out.shape).double().view(want.shape), **exact)
    for name, grad in grads.items():
        if name in wanted and grad.shape == wanted[name].shape:
            close(grad, wanted[name], name)


@pytest.mark.parametrize("case", ALL, ids=named)
def test_against_reference(case: workload.Case) -> None:
    compare(case)


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
@pytest.mark.parametrize(
    ("n", "experts_", "k", "skew"),
    [(199, 8, 1, "one"), (199, 8, 2, "one"), (259, 16, 3, "zipf"), (3, 16, 2, "uniform"),
     (1, 7, 7, "uniform"), (65, 17, 2, "zipf"), (96, 3, 1, "uniform")],
)  # fmt: skip
def test_adversarial_routings(n: int, experts_: int, k: int, skew: str, plan: str) -> None:
    """All tokens to one expert, experts without a token, fewer tokens than experts, a long tail,
    more experts than a tensor core is wide."""
    compare(workload._topk("", (n,), 33, experts_, 5, top_k=k, skew=skew, plan=plan, bias=True))


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
def test_whole_tiles_of_one_expert(plan: str) -> None:
    """Two experts of exactly one tile's tokens each, in turn; a third has none."""
    case = workload.Case(
        "", (64,), 33, 3, 5, gate="given", choice="indices", top_k=1, plan=plan, bias=True
    )
    compare(case, indices=torch.arange(64).remainder(2).mul(2).view(64, 1))


def _by_noise(logits: Tensor, k: int, **changes: Any) -> Call:
    """A call whose logits are the given ones exactly."""
    case = workload._topk("", (logits.shape[0],), 32, logits.shape[1], 5, top_k=k, plan="sorted")
    zero: dict[str, Any] = {"router": torch.zeros(logits.shape[1], 32), "router_bias": None}
    return prepare(case, noise=logits, **zero, **changes)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_choice_of_ties_zeros_infinities_and_nan(k: int) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, float("inf"), float("-inf"), float("nan")])
    special = torch.cat((special, -special[-1:]))
    g = torch.Generator().manual_seed(k)
    logits = special[torch.randint(0, len(special), (300, 6), generator=g)]
    for plan in ("stationary", "sorted"):
        call = _by_noise(logits, k)
        call = call._replace(settings=call.settings._replace(plan=plan))
        _, saved = experts.forward(call, True)
        assert saved.chosen is not None
        assert torch.equal(saved.chosen, routing.choose(logits, k))
        assert saved.logits is not None
        assert torch.equal(saved.logits.isnan(), logits.isnan())


def test_the_sort_is_the_definitions() -> None:
    call = prepare(SORTED)
    saved: Any = experts.forward(call, True)[1]
    assert saved.chosen is not None
    order, offsets = routing.sort_by_expert(saved.chosen, call.slots)
    assert torch.equal(saved.order, order)
    assert torch.equal(saved.offsets, offsets)
    slot_of = launch.Problem.of(call).slot_of(saved.chosen)
    assert slot_of is not None
    for slot, token in enumerate(order.tolist()):
        e = int((offsets[1:] <= slot).sum())
        assert int(slot_of[e * N + token]) == slot


def test_fewer_slots_than_the_bound() -> None:
    """The same index twice is one slot; what lies behind the last is never touched."""
    case = replace(SORTED, gate="given", choice="indices", noise=False)
    inputs = workload.make_inputs(case, torch.float32)
    indices = inputs["indices"].clone()
    indices[::3, 1] = indices[::3, 0]
    compare(case, indices=indices)
    _, saved, _ = run(prepare(case, indices=indices))
    assert saved.offsets is not None
    assert int(saved.offsets[-1]) == 2 * N - 47
    assert saved.z is not None
    assert bool(saved.z[2 * N - 47 :].isnan().all())


def test_the_router_is_not_rounded() -> None:
    """Two experts whose rows agree in fp16: their logits differ all the same."""
    case = workload._topk("", (70,), 32, 2, 5, top_k=1, noise=False, float_parameters=True)
    x = torch.ones(70, 32, dtype=torch.float16)
    router = torch.full((2, 32), 1.0)
    router[1] += 2.0**-13
    for plan in ("stationary", "sorted"):
        call = prepare(
            replace(case, plan=plan), torch.float16, x=x, router=router, router_bias=None
        )
        _, saved = experts.forward(call, False)
        assert saved.chosen is not None
        assert bool(saved.chosen[:, 1].all())


@pytest.mark.parametrize("case", [DENSE, TOPK, SORTED], ids=named)
def test_gradient_of_the_logits_from_losses(case: workload.Case) -> None:
    """What comes in from the losses reaches x, the router, its bias and the noise."""
    call, extra = prepare(case), normal(N, E, seed=11)
    got = run(call, dlogits=extra)[2]
    plain = call._replace(settings=call.settings._replace(plan="stationary"))
    out, saved = torch_impl.forward(plain, True)
    want = torch_impl.backward(plain, saved, normal(*out.shape), extra, needs(call))
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name].to(value.dtype), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ALL, ids=named)
def test_small_tensors_of_any_stride(case: workload.Case) -> None:
    """Strided parameters, gates and choices, a broadcast gradient of the output."""
    call = prepare(case)

    def strided(v: Tensor) -> Tensor:
        return torch.stack((v, v), -1)[..., 0]

    small = {
        n: strided(v) for n, v in call.tensors._asdict().items()
        if v is not None and n not in ("x", "base")
    }  # fmt: skip
    other = call._replace(tensors=call.tensors._replace(**small))
    dout = normal(1, call.tensors.up.shape[1]).expand(N, -1)
    first, second = run(call, dout=dout.contiguous()), run(other, dout=dout)
    assert torch.equal(first[0], second[0])
    for name, grad in first[2].items():
        assert torch.equal(grad, second[2][name]), name


@pytest.mark.parametrize("case", [DENSE, SORTED, SAMPLES], ids=named)
def test_partial_needs(case: workload.Case) -> None:
    """Gradients that are not asked for are not computed, and the others do not change."""
    call = prepare(case)
    full = run(call)[2]
    for name in needs(call):
        only = run(call, frozenset({name}))[2]
        assert set(only) == {name}
        assert torch.equal(only[name], full[name]), name
    with triton_audit.Audit() as audit:
        run(call, frozenset({"up"}))
    assert not audit.of("bwd_rows")
    assert not audit.of("bwd_slots")
    with triton_audit.Audit() as audit:
        run(call, frozenset({"x"}))
    assert not audit.of("bwd_weights")


@pytest.mark.parametrize("case", [DENSE, SORTED], ids=named)
def test_inference_keeps_the_routing_alone(case: workload.Case) -> None:
    call = prepare(case)
    out, saved = experts.forward(call, False)
    assert saved.z is None
    assert saved.order is None
    assert saved.offsets is None
    assert (saved.chosen is None) == (case.top_k == 0)
    assert saved.logits is not None
    assert torch.equal(out, experts.forward(call, True)[0])


def test_a_backward_without_x() -> None:
    """Frozen projections: op.py does not keep x."""
    call = prepare(SORTED)
    _, saved, want = run(call)
    bare = Call(call.tensors._replace(x=None), call.settings, normal(N, D))
    need = frozenset({"x", "up", "noise"})
    got = experts.backward(bare, saved, normal(N, D), None, need)
    for name in need:
        assert torch.equal(got[name], want[name]), name


def test_gradients_of_parameters_in_their_own_dtype() -> None:
    grads = run(prepare(replace(DENSE, float_parameters=True), torch.float16))[2]
    assert {grads[n].dtype for n in ("down", "up", "down_bias", "up_bias", "router")} == {
        torch.float32
    }
    assert grads["x"].dtype == torch.float16


def test_reasons() -> None:
    """Every limit is a reason of its own, and all are given at once."""
    call = prepare(workload.Case("wide", (3,), 8, 65, 300, gate="mean"), torch.float64)
    assert experts.unsupported(call) == [
        "has no float64 kernels",
        "rank at most 256, got 300",
        "experts at most 64, got 65",
    ]
    assert "bfloat16" in experts.unsupported(prepare(DENSE, torch.bfloat16))[0]
    for case in workload.CASES:
        assert not experts.unsupported(prepare(case))
