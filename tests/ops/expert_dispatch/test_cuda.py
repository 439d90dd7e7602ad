"""``expert_dispatch``'s CUDA kernels, executed on the CPU under the emulation of tests/emulation.

The whole operator runs with cuda_impl in the torch backend's place, so plumbing and kernels are
tested together. Timing and hardware are a GPU's.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels._runtime.backends import bound
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.expert_dispatch import (
    cuda_impl,
    op,
    reference,
    routing,
    torch_impl,
    workload,
)
from petal_kernels.ops.expert_dispatch.arguments import Tensors
from tests.emulation.operator import Emulated, bad, with_dtypes
from tests.emulation.support import DTYPES, needs_compiler, pad_rows
from tests.ops import discovery

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("replaced")]

Case = workload.Case
PLAIN = torch_impl.forward, torch_impl.backward
EMULATED = Emulated("expert_dispatch")
run, compare, names_of = EMULATED.run, EMULATED.compare, EMULATED.trained


@pytest.fixture
def replaced(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    EMULATED.replace(monkeypatch)
    return emulated


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(workload.CASES))
def test_cases(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, plan=case.plan)


def both_plans(case: Case) -> list[Case]:
    return [
        dataclasses.replace(case, name=f"{case.name}, {plan}", plan=plan)
        for plan in ("stationary", "sorted")
    ]


def topk(name: str, lead: tuple[int, ...], width: int, e: int, r: int, **more: Any) -> list[Case]:
    return both_plans(workload._topk(name, lead, width, e, r, **more))


# An operand wider than a block keeps, every expert of a choice, several pieces of one expert.
WIDE = (
    Case("wider than is kept", (40,), 48, 9, 128, activation="gelu"),
    *topk("wider, chosen", (70,), 40, 9, 130, top_k=3, activation="silu", renormalize=False),
    *topk("most experts", (70,), 24, 64, 20, top_k=5, activation="gelu_tanh", skew="zipf"),
    *topk("widest rank", (50,), 40, 2, 256, top_k=1, base="none", out=70),
    Case("given to most", (2, 35), 24, 64, 9, **workload._GIVEN, pooled=True, base="given"),
)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(WIDE))
def test_widths(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, plan=case.plan)


# Every activation with every gate and plan, over routings that leave experts without tokens.
COMBINATIONS = [
    case
    for i, activation in enumerate(ACTIVATIONS)
    for case in (
        Case(f"mean, {activation}", (3, 23), 40, 5, 9, gate="mean", activation=activation),
        Case(f"softmax, {activation}", (69,), 40, 5, 9, noise=True, activation=activation),
        *topk(f"zipf, {activation}", (69,), 40, 7, 9, activation=activation, skew="zipf"),
        *topk(f"one, {activation}", (69,), 40, 7, 8, top_k=1, activation=activation, skew="one"),
        *both_plans(
            Case(
                f"samples, {activation}",
                (3, 23),
                40,
                5,
                9,
                pooled=True,
                activation=activation,
                shared_down=i % 2 == 1,
                **workload._PICKED,
            )
        ),
    )
]


@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda c: c.name)
def test_combinations(case: Case) -> None:
    compare(case, DTYPES[COMBINATIONS.index(case) % 3], plan=case.plan)


# Where equality is the measure.


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(dtype: torch.dtype, plan: str) -> None:
    """Gates of 1: one rounding of an exact sum, in either plan."""
    n, d, e, r, o = 70, 37, 5, 9, 70
    g = torch.Generator().manual_seed(0)

    def small(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=g).to(dtype)

    inputs: dict[str, Any] = {"x": small(n, d), "down": small(e, r, d), "up": small(e, o, r)}
    inputs |= {"down_bias": small(e, r), "up_bias": small(e, o), "base": small(n, o)}
    inputs["indices"] = torch.rand(n, e, generator=g).topk(2).indices
    inputs |= {"gate": "given", "activation": "relu", "keep": 3.0, "mix": 2.0}
    names = ("x", "down", "up", "down_bias", "up_bias", "base")
    dout = small(n, o)
    wide = {k: v.double() if k in (*names, "router") else v for k, v in inputs.items()}
    exact, grads = discovery.run(reference.forward, wide, names, [dout.double()])
    got = run(inputs, names, [dout], plan=plan)
    for name, value in {"out": exact[0], **dict(grads)}.items():
        assert torch.equal(got[name], value.to(dtype)), name


def test_choice_of_ties_and_nan(replaced: Any) -> None:
    """The noise alone: of equal logits the first experts, NaN above everything."""
    nan, inf = float("nan"), float("inf")
    noise = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],
            [1.0, 2.0, 2.0, 1.0],
            [inf, nan, 1.0, nan],
            [-inf, -inf, -inf, 0.0],
            [0.0, -0.0, 5.0, 0.0],
        ]
    )
    case = workload._topk("ties", (5,), 16, 4, 8, plan="stationary")
    inputs = workload.make_inputs(case, torch.float32) | {"noise": noise}
    inputs["router"].zero_()
    inputs.pop("router_bias")
    found: Any
    for plan in ("stationary", "sorted"):
        _, found = op.expert_dispatch(**inputs, backend="torch", plan=plan, return_routing=True)
        assert torch.equal(found.chosen, routing.choose(noise, 2))
        assert torch.equal(found.logits, noise) or bool(noise.isnan().any())


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
def test_losses_of_the_logits(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradient is added to the gates': as with plain torch in the backend's place."""
    case = workload._topk("losses", (69,), 40, 5, 9, renormalize=False)
    given = workload.make_inputs(case, torch.float32)
    names = ("x", "router", "router_bias", "noise")

    def gradients() -> tuple[Tensor, ...]:
        inputs = discovery.require_grad(given, names)
        out, found = op.expert_dispatch(**inputs, backend="torch", plan=plan, return_routing=True)
        loss = out.sum() + 30 * (found.load_balance_loss() + found.z_loss())
        return torch.autograd.grad(loss, [inputs[name] for name in names])

    got = gradients()
    monkeypatch.setattr(torch_impl, "forward", PLAIN[0])
    monkeypatch.setattr(torch_impl, "backward", PLAIN[1])
    for name, mine, want in zip(names, got, gradients(), strict=True):
        torch.testing.assert_close(mine, want, msg=discovery.labelled(name))


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
def test_nobody_chooses(plan: str) -> None:
    """As with indices out of range on a GPU: the base alone, and no gradient but its own."""
    inputs = {"x": torch.randn(70, 24), "down": torch.randn(5, 9, 24), "up": torch.randn(5, 24, 9)}
    given: dict[str, Any] = inputs | {"down_bias": torch.randn(5, 9), "up_bias": torch.randn(5, 24)}
    indices = torch.zeros(70, 2, dtype=torch.int64)
    given |= {"gate": "given", "indices": indices, "plan": plan, "keep": 0.5}
    call, *_ = op.prepare(bound(op.expert_dispatch, **given))
    call = call._replace(tensors=call.tensors._replace(chosen=torch.zeros(70, 5, dtype=torch.bool)))
    out, saved = cuda_impl.forward(call, True)
    assert torch.equal(out, 0.5 * inputs["x"])
    need = frozenset(("x", "down", "up", "down_bias", "up_bias", "gates"))
    dout = torch.randn(70, 24)
    grads = cuda_impl.backward(call, saved, dout, None, need)
    assert torch.equal(grads.pop("x"), 0.5 * dout)
    assert all(not grad.any() for grad in grads.values())


ORDER = [c for c in (*workload.CASES, *WIDE) if c.name in (
    "softmax-odd", "topk-odd", "topk-many", "given-samples", "shared-down-stationary",
    "rank-wide-topk", "wider, chosen, stationary", "most experts, sorted",
)]  # fmt: skip


@pytest.mark.parametrize("case", ORDER, ids=lambda c: c.name)
def test_order_of_blocks_and_threads_does_not_matter(case: Case, lib: ctypes.CDLL) -> None:
    dtype = DTYPES[ORDER.index(case) % 3]
    inputs = workload.make_inputs(case, dtype)
    natural = run(inputs, names_of(case), plan=case.plan)
    for blocks, threads, processors in ((1, 0, 4), (3, 4, 132)):
        lib.petal_emulation_configure(blocks, threads, processors)
        permuted = run(inputs, names_of(case), plan=case.plan)
        for name, value in natural.items():
            assert torch.equal(value, permuted[name]), name


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(plan: str) -> None:
    case = workload._topk("each", (69,), 40, 5, 9, activation="gelu", plan=plan)
    inputs = workload.make_inputs(case, torch.float32)
    every = run(inputs, names_of(case), plan=plan)
    for wanted in every.keys() - {"out"}:
        assert torch.equal(run(inputs, (wanted,), plan=plan)[wanted], every[wanted]), wanted


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
@pytest.mark.parametrize("pad", [3, 8])
def test_layouts(pad: int, plan: str) -> None:
    """What lies between rows is not read; parameters come in any layout."""
    case = workload._topk("padded", (70,), 72, 5, 24, base="given", plan=plan)
    inputs = workload.make_inputs(case, torch.bfloat16)
    douts = [torch.randn(70, 72).bfloat16()]
    want = run(inputs, names_of(case), douts, plan=plan)
    turned = {**inputs, **{n: pad_rows(inputs[n], pad) for n in ("x", "base", "noise", "router")}}
    for name in ("down", "up"):
        turned[name] = inputs[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for name in ("down_bias", "up_bias"):
        turned[name] = inputs[name].t().contiguous().t()
    got = run(turned, names_of(case), [pad_rows(douts[0], pad)], plan=plan)
    for name, value in want.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("plan", ["stationary", "sorted"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value: float, plan: str) -> None:
    case = workload._topk("bad", (50,), 72, 5, 20, activation="relu", plan=plan)
    inputs = workload.make_inputs(case, torch.float16)
    inputs["x"][3, 5] = value
    got = run(inputs, ("x",), plan=plan)
    for name in ("out", "x"):
        bad = ~torch.isfinite(got[name])
        assert bad[3].any(), name
        assert not bad[torch.arange(50) != 3].any(), name


def test_an_expert_that_was_not_chosen_adds_nothing() -> None:
    """Its activations are infinite and its gate 0."""
    case = workload._topk("overflow", (50,), 64, 4, 16, activation="relu", plan="stationary")
    inputs = workload.make_inputs(case, torch.float16)
    inputs["down_bias"][0] = float("inf")
    inputs["noise"][:, 0] = -10.0
    got = run(inputs, ("x", "noise", "router_bias"), plan="stationary")
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["stationary", "sorted"])
def test_more_than_2_31_elements(plan: str) -> None:
    """Rows so far apart that 32-bit offsets would wrap; only touched pages exist."""
    torch.use_deterministic_algorithms(False)
    stride, rows = (1 << 30) + 8, 3
    case = workload._topk("far", (rows,), 16, 4, 8, base="given", plan=plan)
    inputs = workload.make_inputs(case, torch.bfloat16)
    want = run(inputs, names_of(case), plan=plan)
    for name in ("x", "base"):
        buffer = torch.empty(stride * (rows - 1) + 16, dtype=torch.bfloat16)
        far = buffer.as_strided((rows, 16), (stride, 1))
        inputs[name] = far.copy_(inputs[name])
    for name, value in run(inputs, names_of(case), plan=plan).items():
        assert torch.equal(value, want[name]), name


# Traffic.


class Counted:
    """The kernels, with the bytes of the row tensors that each launch is given."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.bytes, self.largest = ops, 0, 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        names = Tensors._fields

        def launch(*args: Any) -> None:
            found = []
            for arg in args:
                tensors = arg if isinstance(arg, list) else [arg]
                if len(tensors) == len(names):
                    given = dict(zip(names, tensors, strict=True))
                    tensors = [given[n] for n in ("x", "base", "noise", "gates", "chosen")]
                found += [t for t in tensors if isinstance(t, Tensor)]
            self.bytes += sum({t.data_ptr(): t.nbytes for t in found}.values())
            self.largest = max([self.largest, *(t.numel() for t in found)])
            getattr(self.ops, name)(*args)

        return launch


def test_traffic(replaced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stationary: x read, out, z and the logits written in one launch; backward as it says."""
    case = Case("petal", (48,), 768, 6, 64)
    inputs = workload.make_inputs(case, torch.bfloat16)
    counted = Counted(replaced)
    monkeypatch.setattr(cuda_impl, "_ops", lambda: counted)
    inputs = discovery.require_grad(inputs, names_of(case))
    out: Any = op.expert_dispatch(**inputs, backend="torch")
    unit, middle, forward = 48 * 768 * 2, 48 * 384 * 2, counted.bytes
    assert forward <= 2.2 * unit + middle
    want = workload.bytes_moved(case, torch.bfloat16)[0]
    assert abs(forward - want) <= 0.02 * want
    out.backward(torch.ones_like(out))
    backward = counted.bytes - forward
    gradients = sum(inputs[n].nbytes for n in ("up", "down", "up_bias", "router"))
    want = 4 * unit + 5 * middle + gradients
    assert abs(backward - want) <= 0.02 * want


def test_nothing_as_large_as_every_slots_row(
    replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel reads or writes N k d numbers at once."""
    case = workload._topk("slots", (96,), 64, 6, 8, top_k=4, plan="sorted")
    counted = Counted(replaced)
    monkeypatch.setattr(cuda_impl, "_ops", lambda: counted)
    run(workload.make_inputs(case, torch.float32), names_of(case), plan="sorted")
    assert counted.largest == 96 * 64


# Refusals.


def test_refusals_name_the_argument(replaced: Any) -> None:
    n, d, e, r = 6, 8, 3, 4
    given = {"x": torch.randn(n, d), "down": torch.randn(e * r, d), "up": torch.randn(d, e * r)}
    work = cuda_impl.Work(z=torch.empty(n, e * r), out=torch.empty(n, d))
    codes = {"activation": 0, "gate": 0, "experts": e, "rank": r, "top_k": 0, "renormalize": 1}
    codes |= {"tokens_per_gate": 1, "add_input": 1, "shared": 0, "sorted": 0}

    def forward(work: cuda_impl.Work = work, **changed: Any) -> None:
        numbers = [changed.pop(name, value) for name, value in codes.items()]
        tensors = {**dict.fromkeys(Tensors._fields), **given} | changed
        replaced.expert_dispatch_fwd(
            list(tensors.values()), list(work), numbers, [1.0, 1.0], False, True, False
        )

    forward()
    bad(lambda: forward(down=torch.randn(e * r, 5)), r"x: want \[6, 5\], got \[6, 8\]")
    bad(lambda: forward(up=torch.randn(d, 5)), r"up: want \[8, 12\], got \[8, 5\]")
    bad(lambda: forward(down=given["down"].half()), "down: want the dtype of the activations")
    bad(lambda: forward(x=given["x"].double()), "want float32, float16 or bfloat16")
    bad(lambda: forward(up_bias=torch.randn(e, 7)), "up_bias: want 24 contiguous elements")
    bad(lambda: forward(rank=300), "rank: want 1 to 256, got 300")
    bad(lambda: forward(experts=65), "experts: want 1 to 64, got 65")
    bad(lambda: forward(tokens_per_gate=4), "tokens_per_gate: want a divisor of 6, got 4")
    bad(lambda: forward(gate=3), "gates: want a tensor, got none")
    bad(lambda: forward(gate=1), "logits: want a tensor, got none")
    bad(lambda: forward(work._replace(z=None)), "z: want a tensor, got none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_memory_of_the_shipped_architectures(dtype: torch.dtype, replaced: Any) -> None:
    like = torch.empty(0, dtype=dtype)
    found = [
        replaced.expert_dispatch_shared_bytes(like, e, r) for e, r in ((6, 16), (6, 64), (64, 256))
    ]
    assert found == sorted(found)
    assert found[-1] <= 163 * 1024


def test_unsupported_says_everything() -> None:
    case = Case("wide", (5,), 8, 70, 300)
    inputs = workload.make_inputs(case, torch.float64)
    call, *_ = op.prepare(bound(op.expert_dispatch, **inputs))
    reasons = cuda_impl.unsupported(call)
    for part in ("CUDA", "float64", "a rank of at most 256, got 300", "64 experts, got 70"):
        assert any(part in reason for reason in reasons), part
