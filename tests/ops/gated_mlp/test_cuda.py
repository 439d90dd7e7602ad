"""``gated_mlp``'s CUDA kernels, executed on the CPU under the emulation of tests/emulation.

The whole operator with cuda_impl in the torch backend's place, and the kernels by themselves where
several tiles, ranks and splits, alignment or equality are the measure.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from petal_kernels._runtime import philox
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.gated_mlp import cuda_impl, torch_impl, workload
from petal_kernels.ops.gated_mlp.arguments import Call, Product
from tests.emulation.guarded import Guarded
from tests.emulation.operator import Emulated, bad, with_dtypes
from tests.emulation.support import DTYPES, assert_close, needs_compiler, pad_rows
from tests.ops.gated_mlp.between import (
    DROPOUT,
    RNG,
    Sizes,
    apart,
    as_torch_where_not_finite,
    results,
)

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

Case = workload.Case
EMULATED = Emulated("gated_mlp")
# Two tiles of columns and one more column, three splits of 32 rows, two tiles of 64 ranks.
RAGGED = Sizes(81, 129, 67)
ALIGNED = Sizes(70, 136, 40)
IDENTITY = ACTIVATIONS.index("identity")


@pytest.fixture(autouse=True)
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_impl, "ROWS_PER_SPLIT", 32)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(workload.CASES))
def test_cases(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    EMULATED.replace(monkeypatch)
    EMULATED.compare(case, dtype, recompute=case.recompute)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_many_tiles_agree_with_fp64(name: str, gated: bool) -> None:
    exact = results(torch_impl, RAGGED, name=name, gated=gated, exact=True)
    for part, distance in apart(results(cuda_impl, RAGGED, name=name, gated=gated), exact).items():
        assert distance < 2e-6, part


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [RAGGED, ALIGNED], ids=["ragged", "aligned"])
@pytest.mark.parametrize("pad", [0, 8, 3])
def test_rows_of_any_stride(sizes: Sizes, pad: int, dtype: torch.dtype) -> None:
    """Errors next to plain torch's, with NaN between the rows."""
    exact = results(torch_impl, sizes, dtype, exact=True)
    plain = results(torch_impl, sizes, dtype)
    got = results(cuda_impl, sizes, dtype, pad=pad)
    for part, want in exact.items():
        assert_close(part, got[part], plain[part], want, 2.0 if part == "p" else 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [0, 3])
def test_the_mask_of_every_split_is_the_generators(pad: int, dtype: torch.dtype) -> None:
    rows, width = 77, 131
    ones = pad_rows(torch.ones(rows, width, dtype=dtype), pad)
    product = Product(torch.eye(rows, dtype=dtype), torch.empty(rows, width), RNG, DROPOUT)
    found = cuda_impl.backward(Call(ones, None, "identity"), None, product)
    want = philox.scaled_mask(RNG, DROPOUT, 0, rows, width, torch.float32)
    assert found.down is not None
    assert torch.equal(found.down, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_blocks_and_threads_does_not_matter(dtype: torch.dtype, lib: ctypes.CDLL) -> None:
    natural = results(cuda_impl, RAGGED, dtype)
    for blocks, threads in ((1, 0), (0, 2), (3, 4)):
        lib.petal_emulation_configure(blocks, threads, 12)
        other = results(cuda_impl, RAGGED, dtype)
        assert all(torch.equal(natural[part], other[part]) for part in natural)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("width", [136, 131])
def test_guard_zones(width: int, pad: int, dtype: torch.dtype, emulated: Any) -> None:
    rows, rank = 41, 19
    guard = Guarded()
    g, u, dp = (torch.randn(rows, width).to(dtype) for _ in range(3))
    dh = torch.randn(rows, rank).to(dtype)
    emulated.gated_mlp_act_fwd(g, u, IDENTITY, guard.matrix(rows, width, dtype, pad))
    for product in (True, False):
        dg, du = (guard.matrix(rows, width, dtype, pad) for _ in range(2))
        dg.copy_(dp)
        ddown = guard.flat(rank, width, dtype=dtype) if product else None
        given = (dg, g, u, dh if product else None, None, 0.0, IDENTITY)
        emulated.gated_mlp_act_bwd(*given, du, ddown, 2)
    guard.check()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinities_and_nan_are_torchs(name: str) -> None:
    as_torch_where_not_finite(cuda_impl, torch_impl, name)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_column(value: float, dtype: torch.dtype) -> None:
    g, dh = torch.ones(40, 70, dtype=dtype), torch.ones(40, 5, dtype=dtype)
    g[33, 66] = value
    product = Product(dh, torch.empty(5, 70), None, 0.0)
    down = cuda_impl.backward(Call(g, None, "identity"), None, product).down
    assert down is not None
    hit = ~torch.isfinite(down)
    assert hit[:, 66].all()
    assert hit.sum() == 5


def test_a_refusal_names_the_argument(emulated: Any) -> None:
    g, dh = torch.randn(8, 16), torch.randn(8, 4)
    half, backward = g.half(), emulated.gated_mlp_act_bwd
    bad(lambda: emulated.gated_mlp_act_fwd(g, half, 0, g.clone()), "u: want the dtype")
    bad(lambda: emulated.gated_mlp_act_fwd(g, g[:, :8], 0, g.clone()), "u: want ")
    bad(lambda: emulated.gated_mlp_act_fwd(g, None, 5, g.clone()), "activation: want 0 to 4")
    bad(lambda: emulated.gated_mlp_act_fwd(g.t(), None, 0, g.t()), "want unit stride")
    none = (None, None, 0.0, 0)
    bad(lambda: backward(None, g, None, *none, None, None, 1), "want dp or dh")
    bad(lambda: backward(g, g, g, *none, None, None, 1), "du beside dp and u")
    given = (None, g, None, dh, None, 0.0, 0, None)
    bad(lambda: backward(*given, None, 1), "ddown beside dh")
    bad(lambda: backward(*given, torch.empty(4, 16), 0), "splits: want 1 to")
    bad(lambda: backward(*given, torch.empty(16, 4).t(), 1), "ddown: want a contiguous")
    bad(lambda: backward(*given, torch.empty(5, 16), 1), "ddown: want ")


def test_unsupported_says_everything() -> None:
    g = torch.randn(3, 4, dtype=torch.float64)
    reasons = cuda_impl.unsupported(Call(g, None, "silu"))
    for part in ("CUDA", "float32, float16 or bfloat16"):
        assert any(part in reason for reason in reasons), part
