"""What the general suite cannot see in ``gated_mlp``'s Triton kernels: traffic, double writes,
program order, ranks beyond one slice, rows of any stride.

Runs in the interpreter; numerics over the shape grid are in ``test_ops.py``.
"""

from __future__ import annotations

import pytest
import torch

from petal_kernels._runtime import device, philox
from petal_kernels._runtime.numerics import ACTIVATIONS
from tests.ops import triton_audit

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from petal_kernels.ops.gated_mlp import torch_impl, triton_impl
from petal_kernels.ops.gated_mlp.arguments import Call, Product
from tests.ops.gated_mlp.between import (
    DROPOUT,
    RNG,
    Sizes,
    apart,
    as_torch_where_not_finite,
    results,
)
from tests.ops.interpreted import clean, draw, expect

triton_audit.hasten_interpreter()

pytestmark = pytest.mark.usefixtures("poisoned")

# Three splits of 64 rows, three tiles of 32 columns, two slices of 64 ranks; all ragged.
SIZES = Sizes(150, 83, 67)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("rank", [21, 67])
def test_traffic(rank: int, dropout: float, gated: bool) -> None:
    n, f = 150, 83
    g, dp, dh = draw(n, f), draw(n, f, seed=2), draw(n, rank)
    call = Call(g, draw(n, f, seed=1) if gated else None, "silu")
    product = Product(dh, draw(rank, f).half(), RNG, dropout)
    with triton_audit.Audit() as audit:
        triton_impl.forward(call)
        triton_impl.backward(call, dp, None)
        triton_impl.backward(call, dp, product)
        triton_impl.backward(call, None, product)
    clean(audit)
    rows = (5 if gated else 3) * n * f * 4
    read = (2 if gated else 1) * n * f * 4
    expect(audit, "_fwd", (3 if gated else 2) * n * f * 4)
    splits = audit.of("act_bwd_kernel")[1].grid[0] // 3
    assert splits == 3
    sums, dhs = splits * rank * f * 4, n * rank * 4
    expect(audit, "act_bwd_kernel", rows, rows + dhs + sums, read + dhs + sums)
    expect(audit, "reduce", *[sums + rank * f * 2] * 2)
    # g and u once more for the second slice, and a tile of dh for each tile of columns.
    slices = 1 if rank <= 64 else 2
    issued = rows + (slices - 1) * read + 3 * dhs + sums
    seeds = 16 * 3 * splits * slices if dropout else 0
    assert audit.of("act_bwd_kernel")[1].issued() == issued + seeds


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_many_tiles_agree_with_fp64(name: str, gated: bool) -> None:
    exact = results(torch_impl, SIZES, name=name, gated=gated, exact=True)
    got = results(triton_impl, SIZES, name=name, gated=gated)
    for part, distance in apart(got, exact).items():
        assert distance < 2e-6, part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_program_order_and_padding_change_no_bit(dtype: torch.dtype) -> None:
    """With NaN between the rows."""
    first = results(triton_impl, SIZES, dtype)
    with triton_audit.Audit(reverse=True):
        second = results(triton_impl, SIZES, dtype, pad=5)
    assert all(torch.equal(first[part], second[part]) for part in first)


def test_16_bit_results_are_rounded_once() -> None:
    dtype = torch.float16
    exact = results(torch_impl, SIZES, dtype, exact=True)
    for part, got in results(triton_impl, SIZES, dtype).items():
        want = exact[part]
        if part == "down":  # whose operand p is rounded too
            assert float((got.double() - want).abs().max() / want.abs().max()) < 1e-3
            continue
        least = want.abs().max() * torch.finfo(dtype).tiny
        assert ((got.double() - want).abs() <= 5.01e-4 * want.abs() + least).all(), part


def test_the_mask_of_every_split_is_the_generators() -> None:
    rows, width = 150, 83
    product = Product(torch.eye(rows), torch.empty(rows, width), RNG, DROPOUT)
    call = Call(torch.ones(rows, width), None, "identity")
    found = triton_impl.backward(call, None, product)
    want = philox.scaled_mask(RNG, DROPOUT, 0, rows, width, torch.float32)
    assert found.down is not None
    assert torch.equal(found.down, want)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinities_and_nan_are_torchs(name: str) -> None:
    as_torch_where_not_finite(triton_impl, torch_impl, name)


def test_reasons() -> None:
    bf16 = draw(4, 4).bfloat16()
    assert "bfloat16" in triton_impl.unsupported(Call(bf16, None, "silu"))[0]
    assert "float64" in triton_impl.unsupported(Call(bf16.double(), None, "silu"))[0]
