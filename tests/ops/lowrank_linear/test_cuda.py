"""``lowrank_linear``'s CUDA kernels, executed: csrc compiled as C++ against tests/emulation.

cuda_impl calls them on CPU tensors, as it would call the device's on CUDA tensors. Here: errors
against fp64 next to plain torch's. Indexing, masks, memory and order: test_cuda_exact.py. Timing
and hardware are a GPU's.
"""

from __future__ import annotations

import pytest
import torch

from petal_kernels.ops.lowrank_linear import cuda_impl as linear
from petal_kernels.ops.lowrank_linear import torch_impl as linear_torch
from tests.emulation.support import (
    DTYPES,
    FLOOR,
    Linear,
    assert_close,
    error,
    needs_compiler,
    pad_rows,
    run_linear,
    wider,
)

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

LINEAR_CASES = {
    "fused, element copies": Linear(fused=True, p=0.0),
    "fused, bottleneck": Linear(fused=True, width=136, rank=64, outs=(72, 300, 40), pad=8),
    "fused, input": Linear(fused=True, transposed=True, site="input", rank=24, pad=0, width=72),
    "apart, bottleneck": Linear(small=False, rows=150, rank=72, transposed=True, source="base"),
    "apart, input": Linear(small=False, rows=150, width=131, site="input", source="none"),
    "apart, mode": Linear(rank=40, site="mode", pad=8, width=96),
    "apart, four outputs": Linear(rows=33, outs=(64, 7, 1, 130), p=0.5, source="base"),
    "hidden given": Linear(source="hidden", rank=33, p=0.3, transposed=True),
    "rank one": Linear(rank=1, rows=20, width=9, outs=(5,), p=0.0),
    "scales that differ": Linear(scales=(0.5, -1.5), p=0.0),
    "scales that differ, bottleneck": Linear(scales=(0.5, -1.5), small=False, fused=True),
}
# A down-projection of every output's own; 16-bit tiles hold 64 columns of ranks, fp32 ones 32.
OWN_CASES = {
    "fused, input": Linear(
        fused=True, site="input", ranks=(19, 8, 33), outs=(70, 21, 300), scales=(0.5, -1.5, 2.0)
    ),
    "fused, bottleneck": Linear(fused=True, ranks=(16, 64), pad=8, width=136, source="base"),
    "input, grouped-query widths": Linear(
        small=False, rows=150, width=136, site="input", ranks=(16,) * 3, outs=(144, 40, 40), pad=8
    ),
    "input, given bases": Linear(site="input", ranks=(8, 8), outs=(70, 23), source="base"),
    "input, two tiles of ranks": Linear(
        small=False,
        rows=70,
        site="input",
        ranks=(40, 7, 70, 1),
        outs=(20, 133, 9, 64),
        scales=(1.0, 0.5, -0.25, 3.0),
        source="none",
    ),
    "bottleneck": Linear(
        ranks=(5, 40, 72), outs=(70, 9, 33), scales=(1.0, 2.0, -0.5), transposed=True, p=0.4
    ),
    "no mask": Linear(rows=70, width=136, ranks=(24, 8, 8), outs=(70, 24, 24), p=0.0, pad=8),
    "no mask, odd": Linear(small=False, rows=150, ranks=(1, 130), scales=(2.0, 0.5), p=0.0),
    "one output": Linear(site="input", ranks=(19,), outs=(70,), scales=(-0.5,)),
}
MORE_LINEAR_CASES = {
    "widest rank": Linear(rows=130, width=200, rank=256, outs=(200, 129), pad=8, small=False),
    "long rows": Linear(rows=600, width=520, rank=64, outs=(520,), pad=8, site="input"),
    "mode, wide": Linear(rows=140, rank=130, site="mode", outs=(130, 70, 65), small=False),
    "own, several splits": Linear(rows=600, width=200, ranks=(16, 8, 8), outs=(64,) * 3, pad=8),
    "own, input, several splits": Linear(
        rows=600, width=77, site="input", ranks=(33, 8), outs=(64, 24), small=False
    ),
    "own, widest ranks": Linear(rows=70, site="input", ranks=(256, 200), outs=(70, 20)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *[pytest.param(c, id=n) for n, c in LINEAR_CASES.items()],
        *[pytest.param(c, id=f"own, {n}") for n, c in OWN_CASES.items()],
        *[pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in MORE_LINEAR_CASES.items()],
    ],
)
def test_linear(case: Linear, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FUSED_ROWS", 1 << 30 if case.fused else 0)
    monkeypatch.setattr(linear, "SMALL_ROWS", 1 << 30 if case.small else 0)
    args = case.inputs(dtype)
    dys = [pad_rows(torch.randn(case.rows, o).to(dtype), case.pad) for o in case.outs]
    got = run_linear(linear, args, dys)
    plain = run_linear(linear_torch, args, dys)
    exact = run_linear(linear_torch, {k: wider(v) for k, v in args.items()}, wider(dys))
    assert got.keys() == plain.keys()
    for name in got:
        assert got[name].dtype == plain[name].dtype
        factor = 2.0 if name[0] in "yh" else 3.0
        assert_close(name, got[name], plain[name], exact[name], factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Linear(wide_parameters=True, site="mode", rank=24),
        Linear(wide_parameters=True, site="input", ranks=(24, 8)),
    ],
    ids=("mode", "own"),
)
def test_float32_factors_next_to_16_bit_activations(case: Linear, dtype: torch.dtype) -> None:
    args = case.inputs(dtype)
    dys = [torch.randn(case.rows, o).to(dtype) for o in case.outs]
    got = run_linear(linear, args, dys)
    plain = run_linear(linear_torch, args, dys)
    # The factors are rounded to the activations' dtype first: that is where exact starts.
    rounded = args | {"ups": [up.to(dtype) for up in args["ups"]]}
    for name in ("down", "core"):
        v = args[name]
        if v is not None:
            rounded[name] = [t.to(dtype) for t in v] if isinstance(v, list) else v.to(dtype)
    exact = run_linear(linear_torch, {k: wider(v) for k, v in rounded.items()}, wider(dys))
    for name in got:
        assert got[name].dtype == (torch.float32 if name[:3] in ("ddo", "dup", "dco") else dtype)
        bound = 3 * error(plain[name], exact[name]) + FLOOR[dtype]
        assert error(got[name], exact[name]) <= bound, name


@pytest.mark.parametrize("turned", [(0,), (1,), (0, 1)])
def test_factors_that_lie_in_memory_each_its_own_way(turned: tuple[int, ...]) -> None:
    """Also where one has a single row, which is in both layouts."""
    case = Linear(outs=(1, 70), source="none", p=0.0)
    args = case.inputs(torch.float32)
    dys = [torch.randn(case.rows, o) for o in case.outs]
    plain = run_linear(linear, args, dys)
    ups = [up.t().contiguous().t() if k in turned else up for k, up in enumerate(args["ups"])]
    other = run_linear(linear, args | {"ups": ups}, dys)
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], msg=name)
