"""What the Triton kernels share, in the interpreter: the dropout generator beyond its first rows,
and the precision of fp32 products."""

from __future__ import annotations

import pytest
import torch

from petal_kernels._runtime import device, philox
from tests.ops import triton_audit

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from petal_kernels._runtime import triton_lib
from petal_kernels._runtime.triton_lib import dropout_keep

triton_audit.hasten_interpreter()

RNG = torch.tensor([0x1234_5678_9ABC_DEF0, 0xFFFF_FFFF])  # stream 1 wraps around


@triton.jit
def _mask_kernel(  # type: ignore[no-untyped-def]
    out_ptr, rng_ptr, first, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The keep mask of rows first .. and columns 8 .. of stream 0."""
    offs = tl.arange(0, ROWS)
    seed = tl.load(rng_ptr)
    stream = tl.load(rng_ptr + 1)
    keep = dropout_keep(seed, stream, first + offs.to(tl.int64), 8, COLS, threshold)
    tl.store(out_ptr + offs[:, None] * COLS + tl.arange(0, COLS)[None, :], keep)


def test_large_rows_of_the_generator() -> None:
    """The mask depends on the row's high word: rows beyond 2^32 (of the counter, not of memory)."""
    out = torch.empty(16, 16, dtype=torch.bool)
    _mask_kernel[(1,)](out, RNG, (5 << 32) - 8, philox.threshold(0.5), 16, 16)
    row = torch.arange(16).view(16, 1) + (5 << 32) - 8
    c = [(row & 0xFFFFFFFF).expand(16, 2), (row >> 32).expand(16, 2),
         torch.tensor([[1, 2]]).expand(16, 2), (RNG[1] & 0xFFFFFFFF).expand(16, 2)]  # fmt: skip
    k0, k1 = RNG[0] & 0xFFFFFFFF, RNG[0] >> 32
    for _ in range(philox.ROUNDS):
        c = philox._round(c, k0, k1)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack(c, -1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), -1).view(16, 16)
    assert torch.equal(out, lanes >= philox.threshold(0.5))


def test_precision_follows_torch() -> None:
    """fp32 products are TF32 only where torch's own are, whichever interface was used to say so."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, want in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            assert triton_lib.precision() == want
    finally:
        matmul.fp32_precision = before
