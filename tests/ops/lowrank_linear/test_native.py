"""The C++ CPU kernels of ``lowrank_linear`` beyond one block of rows: several ragged blocks per
split, several splits, every instruction set, any number of threads."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from petal_kernels._runtime import device
from petal_kernels.ops.lowrank_linear import native_impl, torch_impl
from petal_kernels.ops.lowrank_linear.arguments import Call, Settings, Tensors

pytestmark = pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library")


def _forward_and_backward(
    dtype: torch.dtype, impl: ModuleType = native_impl, plan: str = "extend"
) -> list[torch.Tensor]:
    """Several blocks of rows and several splits of the weight gradients, both ragged."""
    torch.manual_seed(0)
    rows, width, rank, outs = 1500, 70, 20, (40, 130)
    x = torch.randn(rows, width).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    down, ups = torch.randn(rank, width).to(wide), [torch.randn(o, rank).to(wide) for o in outs]
    weights = [torch.randn(o, width).to(dtype) for o in outs]
    dys = [torch.randn(rows, o).to(dtype) for o in outs]
    rng = torch.tensor([5, 6])
    none = [None] * len(outs)
    call = Call(
        Tensors(x, [down], None, ups, weights, none, [], None),
        Settings([0.5, 0.5], 0.3, "bottleneck"),
    )
    ys, saved = impl.forward(call, rng, plan)
    call = call._replace(tensors=call.tensors._replace(weights=[], biases=[]))
    grads = impl.backward(call, saved, dys, rng, frozenset(("x", "downs", "ups")))
    assert grads.x is not None
    assert grads.downs is not None
    assert grads.ups is not None
    return [*ys, saved.h, grads.x, *grads.downs, *grads.ups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_instruction_sets_agree(every_isa: list[str], dtype: torch.dtype) -> None:
    results = []
    for name in every_isa:
        assert torch.ops.petal_native.cpu_isa(name) == name
        results.append(_forward_and_backward(dtype))
    # h may be rounded the other way in 16 bits, and one unit of h moves what follows.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            apart = (one.double() - two.double()).abs().max() / one.double().abs().max()
            assert apart < tolerance


def test_many_splits_agree_with_fp64() -> None:
    exact = _forward_and_backward(torch.float64, torch_impl, "update")
    for one, two in zip(exact, _forward_and_backward(torch.float32), strict=True):
        assert (one - two.double()).abs().max() / one.abs().max() < 3e-6


def test_threads_do_not_change_bits() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _forward_and_backward(torch.float32)
        torch.set_num_threads(3)
        three = _forward_and_backward(torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
