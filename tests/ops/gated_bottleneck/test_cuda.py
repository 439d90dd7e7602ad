"""``gated_bottleneck``'s CUDA kernels, executed on the CPU under the emulation of tests/emulation.

The whole operator runs with cuda_impl in the torch backend's place, so plumbing and kernels are
tested together. Timing and hardware are a GPU's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels._runtime.backends import bound
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.gated_bottleneck import cuda_impl, op, settings, workload
from petal_kernels.ops.gated_bottleneck.arguments import GATES, ROUTES, Tensors
from tests.emulation.operator import Emulated, bad, with_dtypes
from tests.emulation.support import DTYPES, RNG, needs_compiler, pad_rows
from tests.ops.gated_bottleneck import traffic

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("replaced")]

Case = workload.Case
EMULATED = Emulated("gated_bottleneck")
run, compare, names_of = EMULATED.run, EMULATED.compare, EMULATED.trained


@pytest.fixture
def replaced(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    EMULATED.replace(monkeypatch)
    return emulated


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("case", "dtype"), with_dtypes(workload.CASES))
def test_cases(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


def combination(gate: str, route: str, activation: str, variant: str) -> Case:
    return Case(
        f"{gate}-{route}-{activation}-{variant}",
        (3, 37),
        75,
        20,
        gate=gate,
        gate_rank=27,
        route=route,
        vision=4 if variant == "paper" or "gram" in route else 1,
        activation=activation,
        variant=variant,
        dropout=0.2,
        residual="gate_input",
        norm=True,
        scale=0.7,
        bias=route != "expand",  # whose bias gradients are one number
    )


# Every gate with every route; activations and variants take turns.
COMBINATIONS = [
    combination(
        gate, route, ACTIVATIONS[(i + j) % 5], "release" if (i + j // 2) % 2 and i else "paper"
    )
    for i, gate in enumerate(GATES)
    for j, route in enumerate(ROUTES)
]


@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda c: c.name)
def test_combinations(case: Case) -> None:
    compare(case, DTYPES[COMBINATIONS.index(case) % 3])


RANKS = (
    Case("two pieces", (70,), 72, 100, gate="large", gate_rank=40, norm=True),
    Case("gate wider", (70,), 40, 9, gate="large", gate_rank=128, residual="given"),
    Case("widest", (50,), 136, 256, gate="large", gate_rank=200),
    Case("wide, plain", (50,), 136, 193, base="none", out=70, route="none"),
    Case("wide, small", (2, 40), 72, 136, gate="small", norm=True, variant="release"),
    Case("wide, token", (5, 13), 72, 150, gate="large", gate_rank=9, route="gram_relu"),
    Case("token, small", (3, 21), 40, 70, gate="small", route="gram_relu", variant="release"),
)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(RANKS))
def test_ranks(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


# Where equality is the measure.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_the_generators(dtype: torch.dtype) -> None:
    """With Y = 1 the output, dH and the column sums are the mask's."""
    rows, outs, p = 70, 83, 0.5
    mask = philox.scaled_masks(RNG, p, 1, rows, outs, dtype)[0]
    ones = torch.ones(rows, outs, dtype=dtype)
    inputs = {
        "x": None,
        "down": None,
        "bottleneck": torch.ones(rows, 1, dtype=dtype),
        "up": torch.zeros(outs, 1, dtype=dtype),
        "up_bias": torch.zeros(outs, dtype=dtype),
        "base": ones,
        "activation": "identity",
        "dropout": p,
        "rng": RNG,
    }
    got = run(inputs, ("base", "up", "up_bias"), [ones])
    assert torch.equal(got["out"], mask)
    assert torch.equal(got["base"], mask)
    assert torch.equal(got["up_bias"], mask.float().sum(0).to(dtype))
    assert torch.equal(got["up"], mask.float().sum(0).to(dtype).unsqueeze(1))
    for gate in ("middleX", "middleY"):
        # Y = 2 where the logits are 0 and the curve is symmetric: G is 1/2 or 3/2.
        gated = {
            **inputs,
            "gate": gate,
            "gate_weight": torch.zeros(outs, dtype=dtype),
            "gate_input": ones if gate == "middleX" else None,
        }
        factor = 0.5 if gate == "middleX" else 1.5
        got = run(gated, ("base", "gate_weight"), [ones])
        assert torch.equal(got["out"], factor * mask)
        assert torch.equal(got["base"], factor * mask)
        if gate == "middleY":
            assert torch.equal(got["gate_weight"], (mask.float().sum(0) / 4).to(dtype))


ORDER = [c for c in (*workload.CASES, *COMBINATIONS, *RANKS) if c.name in (
    "large-odd", "small-mask-odd", "gram-relu", "middleX-release", "mul-small", "two pieces",
    "value-odd", "wide, plain", "middleY-add-identity-paper", "wide, token",
)]  # fmt: skip


@pytest.mark.parametrize("case", ORDER, ids=lambda c: c.name)
def test_order_of_blocks_and_threads_does_not_matter(case: Case, lib: ctypes.CDLL) -> None:
    dtype = DTYPES[ORDER.index(case) % 3]
    inputs = workload.make_inputs(case, dtype)
    natural = run(inputs, names_of(case))
    for blocks, threads, processors in ((1, 0, 4), (0, 2, 1), (3, 4, 132)):
        lib.petal_emulation_configure(blocks, threads, processors)
        permuted = run(inputs, names_of(case))
        for name, value in natural.items():
            assert torch.equal(value, permuted[name]), name


@pytest.mark.parametrize(
    "name", ["large", "middleX-odd", "small-mask-odd", "middleY", "gram-tokens", "mul-tokens"]
)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(name: str) -> None:
    case = next(c for c in workload.CASES if c.name == name)
    inputs = workload.make_inputs(case, torch.float32)
    every = run(inputs, names_of(case))
    for wanted in every.keys() - {"out"}:
        assert torch.equal(run(inputs, (wanted,))[wanted], every[wanted]), wanted


@pytest.mark.parametrize("pad", [3, 8])
def test_what_lies_between_rows_is_not_read(pad: int) -> None:
    case = Case("padded", (70,), 72, 20, gate="large", norm=True, residual="given")
    inputs = workload.make_inputs(case, torch.bfloat16)
    douts = [torch.randn(70, 72).bfloat16()]
    want = run(inputs, names_of(case), douts)
    padded = {**inputs, **{n: pad_rows(inputs[n], pad) for n in ("x", "gate_input", "residual")}}
    got = run(padded, names_of(case), [pad_rows(douts[0], pad)])
    for name, value in want.items():
        assert torch.equal(value, got[name]), name


def test_parameters_in_any_layout() -> None:
    case = Case("layouts", (70,), 72, 20, gate="large", norm=True)
    inputs = workload.make_inputs(case, torch.float16)
    want = run(inputs, names_of(case))
    turned = dict(inputs)
    for name in ("down", "up", "gate_down", "gate_up"):
        turned[name] = inputs[name].t().contiguous().t()
    for name in ("up_bias", "gate_up_bias", "down_bias", "norm_weight"):
        turned[name] = inputs[name].repeat_interleave(3)[::3]
    for name, value in run(turned, names_of(case)).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(value: float, dtype: torch.dtype) -> None:
    case = Case("bad", (50,), 72, 20, gate="large", norm=True, activation="relu")
    inputs = workload.make_inputs(case, dtype)
    inputs["x"][3, 5] = value
    got = run(inputs, ("x", "gate_input"))
    for name in ("out", "x", "gate_input"):
        bad = ~torch.isfinite(got[name])
        assert bad[3].any(), name
        assert not bad[torch.arange(50) != 3].any(), name
    assert torch.isnan(got["out"][3]).all()


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    """Rows so far apart that 32-bit offsets would wrap; only touched pages exist."""
    torch.use_deterministic_algorithms(False)
    stride, rows = (1 << 30) + 8, 3
    case = Case("far", (rows,), 16, 4, gate="middleX", norm=True)
    inputs = workload.make_inputs(case, torch.bfloat16)
    want = run(inputs, names_of(case))
    for name in ("x", "gate_input"):
        buffer = torch.empty(stride * (rows - 1) + 16, dtype=torch.bfloat16)
        far = buffer.as_strided((rows, 16), (stride, 1))
        inputs[name] = far.copy_(inputs[name])
    for name, value in run(inputs, names_of(case)).items():
        assert torch.equal(value, want[name]), name


# Refusals.


def test_refusals_name_the_argument(replaced: Any) -> None:
    n, d, r = 6, 8, 4
    x, down, up, out = (
        torch.randn(n, d),
        torch.randn(r, d),
        torch.randn(d, r),
        torch.empty(n, d),
    )
    codes, numbers = [0, 0, 0, 0, 0, 0, 1, 0, 1], [1.0, 0.0, 1e-5]

    def forward(**changed: Any) -> None:
        names = Tensors._fields
        tensors = {**dict.fromkeys(names), "x": x, "down": down, "up": up} | changed
        given = [tensors[name] for name in names]
        work = list(cuda_impl.Work())
        replaced.gated_bottleneck_fwd(given, work, out, None, codes, numbers, True, False, False)

    forward()
    bad(lambda: forward(up=torch.randn(d, 5)), r"down: want \[5, 8\], got \[4, 8\]")
    bad(lambda: forward(down=down.half()), "down: want the dtype of the activations")
    bad(lambda: forward(x=x.double()), "want float32, float16 or bfloat16")
    bad(lambda: forward(up_bias=torch.randn(7)), r"up_bias: want \[8\]")
    wide = {"down": torch.randn(300, d), "up": torch.randn(d, 300)}
    bad(lambda: forward(**wide), "ranks of at most 256, got 300")
    codes[1] = settings._ROUTES.index("product")
    bad(lambda: forward(left=torch.randn(1, r)), "right: want a tensor, got none")
    codes[1] = 0
    codes[-1] = 4
    bad(forward, "samples: want a divisor of 6, got 4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_memory_of_the_shipped_architectures(dtype: torch.dtype, replaced: Any) -> None:
    like = torch.empty(0, dtype=dtype)
    found = [
        replaced.gated_bottleneck_shared_bytes(like, r, g)
        for r, g in ((64, 0), (96, 96), (256, 256))
    ]
    assert found == sorted(found)
    assert found[-1] <= 163 * 1024


def test_unsupported_says_everything() -> None:
    case = Case("wide", (5,), 8, 300, gate="large", gate_rank=400)
    inputs = workload.make_inputs(case, torch.float64)
    call, *_ = op.prepare(bound(op.gated_bottleneck, **inputs))
    reasons = cuda_impl.unsupported(call)
    for part in ("CUDA", "float64", "a rank of at most 256, got 300", "gate rank"):
        assert any(part in reason for reason in reasons), part


@pytest.mark.parametrize("route", ["none", "mul", "gram"])
def test_a_sum_overwrites_columns_of_its_base(route: str) -> None:
    """Between untouched columns: the very bits of the sum by itself."""
    case = Case("columns", (3, 37), 64, 20, out=77, base="given", route=route, bias=False)
    inputs = workload.make_inputs(case, torch.float32) | {"activation": "identity"}
    wide = torch.full((3, 37, 100), 5.0)
    wide[..., 8:85] = inputs["base"]
    want = op.gated_bottleneck(**inputs, backend="torch")
    got = op.gated_bottleneck(**inputs | {"base": wide}, update_at=8, backend="torch")
    assert got is wide
    assert torch.equal(wide[..., 8:85], want)
    assert bool((wide[..., :8] == 5.0).all() and (wide[..., 85:] == 5.0).all())


@pytest.mark.parametrize("route", ["add", "mul", "expand", "gram"])
def test_traffic_of_routed_lora(route: str) -> None:
    """GPT-2's c_attn: x, the middle and q and v where they lie, beyond the base."""
    call = traffic.RoutedProjection(route)

    def kernel(
        tensors: list[Tensor | None], work: list[Tensor | None], out: Tensor, *rest: Any
    ) -> tuple[Any, Any]:
        given = dict(zip(Tensors._fields, tensors, strict=True))
        return [*(given | {"bottleneck": None}).values(), work[0]], [out]

    with pk.use_backend("torch"):
        moved = call.count({"petal_cuda_emulated::gated_bottleneck_fwd": kernel})
    call.check(moved)
