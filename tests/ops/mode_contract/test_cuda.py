"""``mode_contract``'s CUDA kernels, executed: csrc compiled as C++ against tests/emulation.

Errors against fp64 next to plain torch's; order of blocks and threads, guard zones and refusals,
where equality is the measure.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.ops.mode_contract import cuda_impl as contract
from petal_kernels.ops.mode_contract import torch_impl as contract_torch
from petal_kernels.ops.mode_contract.arguments import Call, Gradients
from tests.emulation.guarded import Guarded
from tests.emulation.operator import bad
from tests.emulation.support import DTYPES, assert_close, needs_compiler, wider

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

ALL = frozenset(Gradients._fields)


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
        call = Call(core, modes, up, 0.3, out_dtype)
        exact_call = Call(wider(core), wider(modes), wider(up), 0.3, torch.float64)
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
    call, dout = Call(core, modes, up, 1.0, torch.float32), torch.randn(3, 8, 9)
    every = contract.backward(call, dout, ALL)
    for count in range(4):
        for need in itertools.combinations(Gradients._fields, count):
            some = contract.backward(call, dout, frozenset(need))
            for name, s, e in zip(Gradients._fields, some, every, strict=True):
                assert (s is None) == (name not in need)
                assert s is None or (e is not None and torch.equal(s, e))


def every_kernel(dtype: torch.dtype) -> list[Tensor]:
    """Outputs of all kernels on ragged problems with several blocks along every axis."""
    found: list[Tensor] = []
    torch.manual_seed(1)
    for core in (torch.randn(9, 9, 9), torch.randn(9)):
        modes, up = torch.randn(5, 9).to(dtype), torch.randn(131, 9).to(dtype)
        call = Call(core.to(dtype), modes, up, 0.3, dtype)
        out = contract.forward(call)
        grads = contract.backward(call, out, frozenset(("core", "modes", "up")))
        found += [out, *[g for g in grads if g is not None]]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_blocks_and_threads_does_not_matter(dtype: torch.dtype, lib: ctypes.CDLL) -> None:
    lib.petal_emulation_configure(0, 0, 12)
    natural = every_kernel(dtype)
    for blocks, threads in ((1, 0), (0, 2), (3, 4)):
        lib.petal_emulation_configure(blocks, threads, 12)
        for a, b in zip(natural, every_kernel(dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guard_zones(dtype: torch.dtype, emulated: Any) -> None:
    guard = Guarded()
    for shape in ((7, 7, 7), (7,)):
        core, modes = torch.randn(shape).to(dtype), torch.randn(5, 7).to(dtype)
        up = torch.randn(70, 7).to(dtype)
        out = guard.flat(5, 7, 70, dtype=dtype)
        emulated.mode_contract_fwd(core, modes, up, out, 1.0)
        sizes = (shape, (5, 7), (70, 7))
        emulated.mode_contract_bwd(
            torch.randn(5, 7, 70).to(dtype),
            core,
            modes,
            up,
            *[guard.flat(*s, dtype=dtype) for s in sizes],
            1.0,
        )
    guard.check()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_slab(value: float, dtype: torch.dtype) -> None:
    core, modes = torch.rand(6, 6, 6).to(dtype), torch.rand(4, 6).to(dtype)
    core[2, 1, 3] = value
    up = torch.rand(9, 6).to(dtype) + 0.1
    out = contract.forward(Call(core, modes, up, 1.0, dtype))
    bad = ~torch.isfinite(out)
    assert bad[:, 2].all()
    assert not bad[:, [0, 1, 3, 4, 5]].any()


def test_a_refusal_names_the_limit(emulated: Any) -> None:
    core, modes = torch.randn(8, 8, 8), torch.randn(300, 8)
    bad(
        lambda: emulated.mode_contract_fwd(core, modes, None, torch.empty(300, 8, 8), 1.0),
        "is above 4",
    )


def test_unsupported_says_everything() -> None:
    core = torch.randn(300, 300, 300, dtype=torch.half)
    call = Call(core, torch.randn(300, 300), None, 1.0, torch.float32)
    reasons = contract.unsupported(call)
    for part in ("CUDA", "float32 factors", "at most 256", "<= 4"):
        assert any(part in reason for reason in reasons), part
