"""The C++ CPU kernels of ``gated_mlp`` beyond the common grid: several ragged blocks, strips and
splits, every instruction set, any number of threads, infinities, one pass over the operands."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from petal_kernels._runtime import device
from petal_kernels._runtime.numerics import ACTIVATIONS
from petal_kernels.ops.gated_mlp import native_impl, torch_impl
from petal_kernels.ops.gated_mlp.arguments import Call, Product

pytestmark = [
    pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library"),
    pytest.mark.usefixtures("poisoned"),
]

# Of 16 kVL columns a strip: three ragged ones at least. Blocks of 64 rows, splits of 512.
N, F, R = 1500, 530, 21
DROPOUT, RNG = 0.3, torch.tensor([5, 6])


def results(
    impl: ModuleType,
    dtype: torch.dtype = torch.float32,
    name: str = "silu",
    gated: bool = True,
    width: int = F,
    exact: bool = False,
) -> dict[str, Tensor]:
    """Everything there is to compute, of numbers that ``dtype`` holds."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=g).to(dtype)
        return t.double() if exact else t

    call = Call(draw(N, width), draw(N, width) if gated else None, name)
    dp, dh, down = draw(N, width), draw(N, R), draw(R, width)
    product = Product(dh, down if exact else down.float(), RNG, DROPOUT)
    found = impl.backward(call, dp, product)
    kept = {"p": impl.forward(call), **found._asdict()}
    alone = impl.backward(call, None, product)
    assert torch.equal(alone.down, found.down)
    assert alone.g is alone.u is None
    for part, t in impl.backward(call, dp, None)._asdict().items():
        assert t is None if part == "down" or kept[part] is None else torch.equal(t, kept[part])
    return {part: t for part, t in kept.items() if t is not None}


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {
        part: float((got[part].double() - t.double()).abs().max() / t.double().abs().max())
        for part, t in want.items()
    }


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_many_blocks_agree_with_fp64(name: str, gated: bool, every_isa: list[str]) -> None:
    exact = results(torch_impl, name=name, gated=gated, exact=True)
    for isa in every_isa:
        assert torch.ops.petal_native.cpu_isa(isa) == isa
        for part, distance in apart(results(native_impl, name=name, gated=gated), exact).items():
            assert distance < 1e-6, f"{isa}: {part}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_are_rounded_once(dtype: torch.dtype, every_isa: list[str]) -> None:
    exact = results(torch_impl, dtype, exact=True)
    for isa in every_isa:
        assert torch.ops.petal_native.cpu_isa(isa) == isa
        got = results(native_impl, dtype)
        assert got["down"].dtype == torch.float32
        for part, want in exact.items():
            step = 2e-7 if part == "down" else torch.finfo(dtype).eps / 2
            error = (got[part].double() - want).abs()
            least = want.abs().max() * (1e-6 if part == "down" else torch.finfo(dtype).tiny)
            assert (error <= 1.001 * step * want.abs() + least).all(), f"{isa}: {part}"


# Of 2048 columns and more the rows are one split.
@pytest.mark.parametrize("width", [F, 2050])
def test_threads_do_not_change_bits(width: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(native_impl, width=width)
        torch.set_num_threads(3)
        three = results(native_impl, width=width)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[part], three[part]) for part in one)


def test_columns_behind_the_last_are_not_read_into_a_sum() -> None:
    """What lies behind a row's end may be NaN."""
    rows, width = 70, 37

    def beside(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[0], t.shape[1] + 9), float("nan"))
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    g, u, dp, dh = (torch.randn(rows, n) for n in (width, width, width, 5))
    kept = []
    for change in (Tensor.clone, beside):
        call = Call(change(g), change(u), "gelu")
        product = Product(change(dh), torch.empty(5, width), RNG, DROPOUT)
        kept.append([native_impl.forward(call), *native_impl.backward(call, change(dp), product)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinities_and_nan_are_torchs(name: str) -> None:
    """-inf left out: torch's own silu of it is NaN, now and then."""
    g = torch.tensor([[float("inf"), float("nan"), 0.0, 88.0, -88.0, 200.0, -200.0, 1e-30]])
    dp = torch.ones(1, 8)
    call = Call(g, torch.full((1, 8), 2.0), name)
    got, want = native_impl.backward(call, dp, None), torch_impl.backward(call, dp, None)
    pairs = [(native_impl.forward(call), torch_impl.forward(call))]
    for a, b in (*pairs, (got.g, want.g), (got.u, want.u)):
        assert a is not None
        assert b is not None
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-5, atol=1e-35)
        assert not a.isfinite()[b.isnan()].any()
