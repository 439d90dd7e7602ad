"""The C++ CPU kernels of ``frozen_norm`` beyond the common grid: ragged rows of every length about
a vector's, every instruction set's own width, any number of threads, rows far from zero."""

from __future__ import annotations

import pytest
import torch

from petal_kernels._runtime import device
from petal_kernels.ops.frozen_norm import native_impl, torch_impl
from petal_kernels.ops.frozen_norm.arguments import KINDS, Call

pytestmark = [
    pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library"),
    pytest.mark.usefixtures("poisoned"),
]


def call(width: int, kind: str, dtype: torch.dtype, rows: int = 37, shift: float = 0.0) -> Call:
    g = torch.Generator().manual_seed(width)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((rows, width), (width,), (width,)))
    own = bias.to(dtype) if kind == "layer" else None
    return Call((x + shift).to(dtype), weight.to(dtype), own, kind, 1e-5)


def double(c: Call) -> Call:
    weight, bias = (None if t is None else t.double() for t in (c.weight, c.bias))
    return c._replace(x=c.x.double(), weight=weight, bias=bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 260])
def test_ragged_rows(width: int, kind: str) -> None:
    c = call(width, kind, torch.float32)
    dy = torch.randn(c.x.shape, generator=torch.Generator().manual_seed(1))
    y, moments = native_impl.forward(c)
    want, exact = torch_impl.forward(double(c))
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(moments.double(), exact, rtol=1e-5, atol=1e-6)
    dx = native_impl.backward(c, moments, dy)
    right = torch_impl.backward(double(c), exact, dy.double())
    torch.testing.assert_close(dx.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_number_of_threads_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    c = call(515, kind, dtype, rows=700)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, moments = native_impl.forward(c)
            found.append([y, moments, native_impl.backward(c, moments, y)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_kind_rounds_where_torch_does(kind: str, dtype: torch.dtype) -> None:
    """A rounding more or less would move a tenth of the bits and no error much."""
    c = call(260, kind, dtype)
    same = native_impl.forward(c)[0] == torch_impl.forward(c)[0]
    assert float(same.float().mean()) > 0.99


def test_rows_far_from_zero_keep_their_deviation() -> None:
    """The mean of squares less the squared mean would have none of it left."""
    c = call(300, "layer", torch.float32, shift=3000.0)
    y, _ = native_impl.forward(c)
    want, _ = torch_impl.forward(double(c))
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-3)


def test_large_results_go_past_the_caches() -> None:
    c = call(1024, "rms", torch.float32, rows=1100)
    y, moments = native_impl.forward(c)
    want, _ = torch_impl.forward(c)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(
        native_impl.backward(c, moments, want), torch_impl.backward(c, moments, want)
    )
