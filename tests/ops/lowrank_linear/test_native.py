"""The C++ CPU kernels of ``lowrank_linear`` beyond one block of rows: several ragged blocks per
split, several splits, every instruction set, any number of threads."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from petal_kernels._runtime import device, philox
from petal_kernels.ops.lowrank_linear import native_impl, torch_impl
from petal_kernels.ops.lowrank_linear.arguments import Call, Settings, Tensors

pytestmark = pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library")


# Ranks, dropout and its place: one down-projection for all outputs, or every output's own.
SHARED = ((20,), 0.3, "bottleneck")
PLAIN = ((20,), 0.0, "input")
OWN = ((20, 7), 0.3, "input")
STACKED = ((20, 7), 0.0, "input")
FORMS = [
    pytest.param(form, id=name)
    for name, form in (("shared", SHARED), ("plain", PLAIN), ("own", OWN), ("stacked", STACKED))
]
Form = tuple[tuple[int, ...], float, str]


def _forward_and_backward(
    dtype: torch.dtype, form: Form, impl: ModuleType = native_impl, plan: str = "extend"
) -> list[torch.Tensor]:
    """Several blocks of rows and several splits of the weight gradients, both ragged."""
    torch.manual_seed(0)
    ranks, dropout, dropout_at = form
    rows, width, outs = 1500, 270, (40, 130)
    x = torch.randn(rows, width).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    downs = [torch.randn(rank, width).to(wide) for rank in ranks]
    ups = [torch.randn(o, ranks[k % len(ranks)]).to(wide) for k, o in enumerate(outs)]
    weights = [torch.randn(o, width).to(dtype) for o in outs]
    dys = [torch.randn(rows, o).to(dtype) for o in outs]
    rng = torch.tensor([5, 6]) if dropout else None
    none = [None] * len(outs)
    call = Call(
        Tensors(x, downs, None, ups, weights, none, [], None),
        Settings([0.5, -0.75], dropout, dropout_at),
    )
    ys, saved = impl.forward(call, rng, plan)
    call = call._replace(tensors=call.tensors._replace(weights=[], biases=[]))
    grads = impl.backward(call, saved, dys, rng, frozenset(("x", "downs", "hidden", "ups")))
    assert grads.x is not None
    assert grads.downs is not None
    assert grads.hidden is not None
    assert grads.ups is not None
    return [*ys, saved.h, grads.x, *grads.downs, grads.hidden, *grads.ups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_instruction_sets_agree(every_isa: list[str], form: Form, dtype: torch.dtype) -> None:
    results = []
    for name in every_isa:
        assert torch.ops.petal_native.cpu_isa(name) == name
        results.append(_forward_and_backward(dtype, form))
    # h may be rounded the other way in 16 bits, and one unit of h moves what follows.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            apart = (one.double() - two.double()).abs().max() / one.double().abs().max()
            assert apart < tolerance


@pytest.mark.parametrize("plan", native_impl.PLANS)
@pytest.mark.parametrize("form", FORMS)
def test_many_splits_agree_with_fp64(form: Form, plan: str) -> None:
    exact = _forward_and_backward(torch.float64, form, torch_impl, "update")
    found = _forward_and_backward(torch.float32, form, native_impl, plan)
    for one, two in zip(exact, found, strict=True):
        assert (one - two.double()).abs().max() / one.abs().max() < 3e-6


@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_change_bits(form: Form) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _forward_and_backward(torch.float32, form)
        torch.set_num_threads(3)
        three = _forward_and_backward(torch.float32, form)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_masks_are_those_of_the_generator() -> None:
    """Every bit, read off products with ones: of x, and of a bottleneck."""
    rows, width, outs, p = 200, 300, 3, 0.4
    rng = torch.tensor([0x1234_5678_9ABC_DEF0, 0xFFFF_FFFE])
    masks = philox.scaled_masks(rng, p, outs, rows, width, torch.float32)
    eye, ones = torch.eye(width), torch.ones(rows, width)
    none: list[torch.Tensor] = []
    for site, x, downs, hidden in (
        ("input", ones, [eye] * outs, None),
        ("bottleneck", None, none, ones),
    ):
        call = Call(
            Tensors(x, downs, hidden, [eye] * outs, none, none, none, None),
            Settings([1.0] * outs, p, site),
        )
        ys, _ = native_impl.forward(call, rng, "update")
        assert torch.equal(torch.stack(ys), masks)
