"""The CUDA kernels, executed: csrc/*.cu compiled as C++ against tests/emulation.

cuda_impl calls them on CPU tensors, as it would call the device's on CUDA tensors. Here: errors
against fp64 next to plain torch's. Indexing, masks, memory and order: test_cuda_emulation_exact.py.
Timing and hardware are a GPU's.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.ops.lowrank_linear import cuda_impl as linear
from petal_kernels.ops.lowrank_linear import torch_impl as linear_torch
from petal_kernels.ops.mode_contract import cuda_impl as contract
from petal_kernels.ops.mode_contract import torch_impl as contract_torch
from petal_kernels.ops.mode_contract.arguments import Call as Contraction
from petal_kernels.ops.mode_contract.arguments import Gradients
from tests.emulation.support import (
    DTYPES,
    Linear,
    needs_compiler,
    pad_rows,
    run_linear,
    wider,
)

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

ALL = frozenset(Gradients._fields)
# What another order of a sum may cost beyond the stated multiples of torch's own error.
FLOOR = {torch.float32: 1e-7, torch.float16: 2e-5, torch.bfloat16: 2e-4}


def error(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def assert_close(name: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float) -> None:
    bound = factor * error(plain, exact) + FLOOR[plain.dtype]
    assert error(got, exact) <= bound, f"{name}: {error(got, exact):.2e} > {bound:.2e}"


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
}
MORE_LINEAR_CASES = {
    "widest rank": Linear(rows=130, width=200, rank=256, outs=(200, 129), pad=8, small=False),
    "long rows": Linear(rows=600, width=520, rank=64, outs=(520,), pad=8, site="input"),
    "mode, wide": Linear(rows=140, rank=130, site="mode", outs=(130, 70, 65), small=False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *[pytest.param(c, id=n) for n, c in LINEAR_CASES.items()],
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
def test_float32_factors_next_to_16_bit_activations(dtype: torch.dtype) -> None:
    case = Linear(wide_parameters=True, site="mode", rank=24)
    args = case.inputs(dtype)
    dys = [torch.randn(case.rows, o).to(dtype) for o in case.outs]
    got = run_linear(linear, args, dys)
    plain = run_linear(linear_torch, args, dys)
    # The factors are rounded to the activations' dtype first: that is where exact starts.
    rounded = {
        k: [t.to(dtype) for t in v] if k == "ups" else v.to(dtype) if k in ("down", "core") else v
        for k, v in args.items()
    }
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


CONTRACT_CASES = {
    "odd": (5, 19, 131, True, True),
    "two mode tiles": (70, 12, 80, True, True),
    "aligned": (6, 16, 264, True, True),
    "no up": (7, 21, 0, True, False),
    "diagonal": (11, 37, 131, False, True),
    "diagonal, no up": (9, 40, 0, False, False),
    "two rank tiles": (3, 66, 72, True, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=n, marks=[pytest.mark.slow] if n == "two rank tiles" else [])
        for n, c in CONTRACT_CASES.items()
    ],
)
def test_contract(case: tuple[int, int, int, bool, bool], dtype: torch.dtype) -> None:
    count, rank, columns, tucker, has_up = case
    core = (torch.randn(rank, rank, rank) / rank**0.5 if tucker else torch.randn(rank)).to(dtype)
    modes = torch.randn(count, rank).to(dtype)
    up = torch.randn(columns, rank).to(dtype) if has_up else None
    for out_dtype in DTYPES if dtype == torch.float32 else [dtype]:
        call = Contraction(core, modes, up, 0.3, out_dtype)
        exact_call = Contraction(wider(core), wider(modes), wider(up), 0.3, torch.float64)
        got = contract.forward(call)
        plain = contract_torch.forward(call)
        exact = contract_torch.forward(exact_call)
        assert got.dtype == out_dtype
        assert got.is_contiguous()
        assert_close("out", got, plain, exact, 2.0)
        dout = torch.randn(got.shape).to(out_dtype)
        grads = contract.backward(call, dout, ALL)
        plain_grads = contract_torch.backward(call, dout, ALL)
        exact_grads = contract_torch.backward(exact_call, wider(dout), ALL)
        for name, g, p, e in zip(Gradients._fields, grads, plain_grads, exact_grads, strict=True):
            assert (g is None) == (p is None)
            if g is not None and p is not None and e is not None:
                assert g.dtype == dtype
                assert_close(name, g, p, e, 3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mode_matrices_keep_more_than_16_bits(dtype: torch.dtype, emulated: Any) -> None:
    """M enters the second product as two halves: integers beyond the mantissa come through."""
    count, rank, columns = 4, 10, 20
    core = torch.randint(-100, 101, (rank, rank, rank)).to(dtype)
    modes = torch.randint(-60, 61, (count, rank)).to(dtype)
    up = torch.eye(columns, rank).to(dtype)
    out = torch.empty(count, rank, columns)
    emulated.mode_contract_fwd(core, modes, up, out, 1.0)
    want = torch.einsum("abc,kc->kab", core.float(), modes.float())
    assert 2 * 2048 < want.abs().max() < 1 << 16
    assert torch.equal(out[..., :rank], want)


def test_contract_computes_only_what_is_needed() -> None:
    core, modes, up = torch.randn(8, 8, 8), torch.randn(3, 8), torch.randn(9, 8)
    call, dout = Contraction(core, modes, up, 1.0, torch.float32), torch.randn(3, 8, 9)
    every = contract.backward(call, dout, ALL)
    for count in range(4):
        for need in itertools.combinations(Gradients._fields, count):
            some = contract.backward(call, dout, frozenset(need))
            for name, s, e in zip(Gradients._fields, some, every, strict=True):
                assert (s is None) == (name not in need)
                assert s is None or (e is not None and torch.equal(s, e))
