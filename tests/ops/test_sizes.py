"""Sizes at their least: dimensions of one, whose stride says nothing, and of zero; and parameters
narrower than fp64 activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.tools import operators, parity
from tests.ops import discovery
from tests.ops.discovery import OPERATORS


def meaningless_strides(t: Tensor) -> Tensor:
    """The same values in the same memory; every dim of one gets another stride."""
    strides = [5 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides, t.storage_offset())


def tensors_of(inputs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []

    def seen(_: str, t: Tensor) -> Tensor:
        found.append(t)
        return t

    discovery.map_tensors(inputs, seen)
    return found


def ones() -> list[Any]:
    found = []
    for op in OPERATORS.values():
        for case in op.workload.CASES:
            tensors = tensors_of(op.workload.make_inputs(case, torch.float32))
            if any(t.dim() > 1 and 1 in t.shape for t in tensors):
                found.append(pytest.param(op.name, case, id=f"{op.name}-{case.name}"))
    return found


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize(("name", "case"), ones())
def test_the_stride_of_a_dimension_of_one_says_nothing(name: str, case: Any, backend: str) -> None:
    """``is_contiguous`` does not look at it, so no kernel may."""
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float32)
    reason = parity.refusal(op, case, backend, inputs)
    if backend == "triton" and "rank-1" not in case.name:
        reason = "enough of the interpreter"
    if reason is not None:
        pytest.skip(reason)
    names, given = discovery.trainable(op, case), operators.options(op, case)
    plain = discovery.run(op.public, inputs, names, backend=backend, **given)
    strange = discovery.map_tensors(inputs, lambda _, t: meaningless_strides(t))
    other = discovery.run(op.public, strange, names, backend=backend, **given)
    wanted = [*plain[0], *(t for _, t in plain[1])]
    for want, got in zip(wanted, [*other[0], *(t for _, t in other[1])], strict=True):
        near = 1e-5 * float(want.abs().max())  # the library may take another of its kernels
        torch.testing.assert_close(got, want, rtol=1e-5, atol=near)


def activations(op: discovery.Operator) -> set[str]:
    """The inputs that have rows, and what is frozen, which has their dtype; all others are
    parameters."""
    frozen = ("weights", "biases", "weight", "bias")
    return set(getattr(op.workload, "ACTIVATIONS", ("x", "hidden", "base", *frozen)))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, op in OPERATORS.items()
        if activations(op) & op.workload.make_inputs(op.workload.CASES[0], torch.float32).keys()
    ],
)
def test_fp64_activations_take_fp32_parameters(name: str) -> None:
    """Widened exactly: the result is the fp64 reference's."""
    op = OPERATORS[name]
    rows = activations(op)
    for case in op.workload.CASES:
        inputs = op.workload.make_inputs(case, torch.float32)
        if parity.refusal(op, case, "torch", inputs) is not None:
            continue
        mixed = discovery.map_tensors(inputs, lambda n, t: t.double() if n in rows else t)
        exact = discovery.map_tensors(inputs, lambda _, t: t.double())
        names, given = discovery.trainable(op, case), operators.options(op, case)
        outs, grads = discovery.run(op.public, mixed, names, backend="torch", **given)
        wanted, wanted_grads = discovery.run(op.reference.forward, exact, names)
        narrow, _ = discovery.run(op.reference.forward, mixed, names)
        assert [o.dtype for o in outs] == [o.dtype for o in narrow] == [torch.float64] * len(outs)
        for got, want in zip(outs, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        inputs_of = dict(discovery.leaves(mixed, names))
        for (label, got), (_, want) in zip(grads, wanted_grads, strict=True):
            assert got.dtype == inputs_of[label].dtype, label
            near = 1e-10 if got.dtype == torch.float64 else 1e-5
            scale = float(want.abs().max()) if want.numel() else 1.0
            torch.testing.assert_close(got.double(), want, rtol=near, atol=near * scale)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_mean_over_no_tokens_is_zero(backend: str) -> None:
    """The logits of samples without tokens are the bias, and nothing flows into the router."""
    router, bias = torch.randn(3, 8, requires_grad=True), torch.randn(3, requires_grad=True)
    x, down, up = torch.randn(2, 0, 8), torch.randn(3, 4, 8), torch.randn(3, 8, 4)
    out, routing = pk.expert_dispatch(
        x, down, up, router=router, router_bias=bias, router_input="pooled", return_routing=True,
        backend=backend,
    )  # fmt: skip
    assert out.shape == (2, 0, 8)
    assert routing.logits is not None
    assert torch.equal(routing.logits, bias.expand(2, 3))
    grads = torch.autograd.grad(routing.logits.sum(), [router, bias])
    assert torch.equal(grads[0], torch.zeros_like(router))
    assert torch.equal(grads[1], torch.full_like(bias, 2.0))
