"""``frozen_norm``'s CUDA kernels, executed: csrc compiled as C++ against tests/emulation."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from petal_kernels.ops.frozen_norm import cuda_impl, torch_impl, workload
from petal_kernels.ops.frozen_norm.arguments import KINDS, Call, moments_per_row
from tests.emulation.guarded import Guarded
from tests.emulation.operator import Emulated, bad, with_dtypes
from tests.emulation.support import DTYPES, needs_compiler, pad_rows

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = needs_compiler

EMULATED = Emulated("frozen_norm")


@pytest.fixture
def replaced(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    EMULATED.replace(monkeypatch)
    return emulated


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize(("case", "dtype"), with_dtypes(workload.CASES))
def test_cases(case: workload.Case, dtype: torch.dtype) -> None:
    EMULATED.compare(case, dtype)


def call(kind: str, dtype: torch.dtype, rows: int, width: int, pad: int) -> Call:
    g = torch.Generator().manual_seed(width)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((rows, width), (width,), (width,)))
    own = bias.to(dtype) if kind == "layer" else None
    return Call(pad_rows(x.to(dtype), pad), weight.to(dtype), own, kind, 1e-5)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", KINDS)
def test_order_changes_no_bit(kind: str, lib: ctypes.CDLL) -> None:
    """Of blocks and of threads."""
    found = []
    for seed in (0, 1):
        lib.petal_emulation_configure(seed, seed, 4)
        results = []
        for width in (77, 1029):
            of = call(kind, torch.float32, 7, width, 3)
            y, moments = cuda_impl.forward(of)
            results += [y, moments, cuda_impl.backward(of, moments, y)]
        found.append(results)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_kind_rounds_where_torch_does(kind: str, dtype: torch.dtype) -> None:
    """A rounding more or less would move a tenth of the bits and no error much."""
    of = call(kind, dtype, 30, 77, 3)
    same = cuda_impl.forward(of)[0] == torch_impl.forward(of)[0]
    assert float(same.float().mean()) > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "pad"), [(77, 3), (72, 8), (1029, 0), (1032, 8)])
def test_guard_zones(width: int, pad: int, dtype: torch.dtype, emulated: Any) -> None:
    guard = Guarded()
    for kind in KINDS:
        x, weight, bias, _, _ = call(kind, dtype, 6, width, pad)
        y, dx = (guard.matrix(6, width, dtype, pad) for _ in range(2))
        moments = guard.flat(6, moments_per_row(kind), dtype=torch.float32)
        number = KINDS.index(kind)
        emulated.frozen_norm_fwd(x, weight, bias, number, 1e-5, y, moments)
        emulated.frozen_norm_bwd(x, x, moments, weight, number, dx)
    guard.check()


def test_a_refusal_names_the_argument(emulated: Any) -> None:
    x, weight = torch.randn(6, 20), torch.randn(20)
    y, moments = torch.empty(6, 20), torch.empty(6, 1)

    def forward(**given: Any) -> None:
        values: dict[str, Any] = {"x": x, "weight": weight, "bias": None, "kind": 1, "eps": 1e-5}
        values |= {"y": y, "moments": moments} | given
        emulated.frozen_norm_fwd(*values.values())

    bad(lambda: forward(weight=weight[:3]), "weight: want")
    bad(lambda: forward(weight=weight.half()), "weight: want x's dtype")
    bad(lambda: forward(y=y[:5]), "y: want")
    bad(lambda: forward(moments=torch.empty(6, 2)), "moments: want")
    bad(lambda: forward(kind=4), "kind: want 0 .. 3")


def test_what_it_does_not_run() -> None:
    of = call("rms", torch.float64, 6, 20, 0)
    assert cuda_impl.unsupported(of) == [
        "wants CUDA tensors, got cpu",
        "wants float32, float16 or bfloat16, got torch.float64",
    ]
