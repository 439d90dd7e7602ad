"""The C++ CPU kernels of ``gated_mlp`` beyond the common grid: several ragged blocks, strips and
splits, every instruction set, any number of threads, infinities, one pass over the operands."""

from __future__ import annotations

import pytest
import torch

from petal_kernels._runtime import device
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.gated_mlp import native_impl, torch_impl
from tests.ops.gated_mlp.between import Sizes, apart, as_torch_where_not_finite, results

pytestmark = [
    pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library"),
    pytest.mark.usefixtures("poisoned"),
]

# Of 16 kVL columns a strip: three ragged ones at least. Blocks of 64 rows, splits of 512.
SIZES = Sizes(1500, 530, 21)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_many_blocks_agree_with_fp64(name: str, gated: bool, every_isa: list[str]) -> None:
    exact = results(torch_impl, SIZES, name=name, gated=gated, exact=True)
    for isa in every_isa:
        assert torch.ops.petal_native.cpu_isa(isa) == isa
        got = results(native_impl, SIZES, name=name, gated=gated)
        for part, distance in apart(got, exact).items():
            assert distance < 1e-6, f"{isa}: {part}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_are_rounded_once(dtype: torch.dtype, every_isa: list[str]) -> None:
    exact = results(torch_impl, SIZES, dtype, exact=True)
    for isa in every_isa:
        assert torch.ops.petal_native.cpu_isa(isa) == isa
        got = results(native_impl, SIZES, dtype)
        assert got["down"].dtype == torch.float32
        for part, want in exact.items():
            step = 2e-7 if part == "down" else torch.finfo(dtype).eps / 2
            error = (got[part].double() - want).abs()
            least = want.abs().max() * (1e-6 if part == "down" else torch.finfo(dtype).tiny)
            assert (error <= 1.001 * step * want.abs() + least).all(), f"{isa}: {part}"


# Of 2048 columns and more the rows are one split.
@pytest.mark.parametrize("width", [SIZES.width, 2050])
def test_threads_do_not_change_bits(width: int) -> None:
    sizes = SIZES._replace(width=width)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(native_impl, sizes)
        torch.set_num_threads(3)
        three = results(native_impl, sizes)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[part], three[part]) for part in one)


def test_columns_behind_the_last_are_not_read_into_a_sum() -> None:
    """What lies behind a row's end may be NaN."""
    sizes = Sizes(70, 37, 5)
    dense, padded = (results(native_impl, sizes, name="gelu", pad=pad) for pad in (0, 9))
    assert all(torch.equal(dense[part], padded[part]) for part in dense)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinities_and_nan_are_torchs(name: str) -> None:
    as_torch_where_not_finite(native_impl, torch_impl, name)
