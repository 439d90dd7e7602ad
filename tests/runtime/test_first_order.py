"""Whoever asks a fused operator for more than first derivatives in reverse mode is told so, by name
and with what to use instead, whichever call he asks by; or gets the right value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import petal_kernels as pk
from petal_kernels.memory.cuda_rules import KeptAttentionFunction
from petal_kernels.ops.expert_dispatch.function import PooledLogitsFunction
from tests.ops import discovery
from tests.ops.discovery import OPERATORS, SMALL

Call = Callable[[Tensor], Tensor]


def penalty(f: Call, t: Tensor) -> Any:
    """A gradient penalty; autograd visits only what leads to the tensors that are named."""
    (first,) = torch.autograd.grad(f(t.requires_grad_()), t, create_graph=True)
    return torch.autograd.grad(first.square().sum(), t, allow_unused=True)


def penalty_of_an_earlier_layer(f: Call, t: Tensor) -> Any:
    s = torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(f(s * t), s, create_graph=True)
    return torch.autograd.grad(first, s, allow_unused=True)


def penalty_backward(f: Call, t: Tensor) -> Any:
    f(t.requires_grad_()).backward(create_graph=True)
    assert t.grad is not None
    return t.grad.square().sum().backward()


def is_grads_batched(f: Call, t: Tensor) -> Any:
    return torch.autograd.grad(f(t.requires_grad_()), t, torch.ones(3), is_grads_batched=True)


def vmap_of_gradients(f: Call, t: Tensor) -> Any:
    out = f(t.requires_grad_())
    return torch.vmap(lambda g: torch.autograd.grad(out, t, g, retain_graph=True))(torch.ones(3))


def hessian(f: Call, t: Tensor) -> Any:
    return torch.autograd.functional.hessian(f, t)


def hvp(f: Call, t: Tensor) -> Any:
    return torch.autograd.functional.hvp(f, t, torch.ones_like(t))


def vectorised_jacobian(f: Call, t: Tensor) -> Any:
    return torch.autograd.functional.jacobian(f, t, vectorize=True)


def dual_level(f: Call, t: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(t, torch.ones_like(t)))).tangent


def dual_level_and_gradients(f: Call, t: Tensor) -> Any:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(t.clone().requires_grad_(), torch.ones_like(t)))


def func_grad(f: Call, t: Tensor) -> Any:
    return torch.func.grad(f)(t)


def func_vjp(f: Call, t: Tensor) -> Any:
    return torch.func.vjp(f, t)


def func_jvp(f: Call, t: Tensor) -> Any:
    return torch.func.jvp(f, (t,), (torch.ones_like(t),))


def func_linearize(f: Call, t: Tensor) -> Any:
    return torch.func.linearize(f, t)


def jacrev(f: Call, t: Tensor) -> Any:
    return torch.func.jacrev(f)(t)


def jacfwd(f: Call, t: Tensor) -> Any:
    return torch.func.jacfwd(f)(t)


def func_hessian(f: Call, t: Tensor) -> Any:
    return torch.func.hessian(f)(t)


def vmap(f: Call, t: Tensor) -> Any:
    return torch.vmap(f, randomness="different")(torch.stack((t, t)))


def vmap_without_randomness(f: Call, t: Tensor) -> Any:
    return torch.vmap(f)(torch.stack((t, t)))


def vmap_of_func_grad(f: Call, t: Tensor) -> Any:
    return torch.vmap(torch.func.grad(f), randomness="same")(torch.stack((t, t)))


ASKING = [
    penalty, penalty_of_an_earlier_layer, penalty_backward, is_grads_batched, vmap_of_gradients,
    hessian, hvp, vectorised_jacobian, dual_level, dual_level_and_gradients, func_grad, func_vjp,
    func_jvp, func_linearize, jacrev, jacfwd, func_hessian, vmap, vmap_without_randomness,
    vmap_of_func_grad,
]  # fmt: skip


def square(t: Tensor) -> Tensor:
    return t.square().sum()


def summed(outs: Any, loss: Callable[[Tensor], Tensor] = square) -> Tensor:
    return torch.stack([loss(o) for o in ([outs] if isinstance(outs, Tensor) else outs)]).sum()


def with_leaf(inputs: dict[str, Any], label: str, value: Tensor) -> dict[str, Any]:
    """The inputs with the tensor called ``label``, perhaps one of a sequence, exchanged."""
    name = label.split("[")[0]
    if not isinstance(inputs[name], (list, tuple)):
        return inputs | {name: value}
    place = int(label[len(name) + 1 : -1]) if label != name else 0
    values = list(inputs[name])
    values[place] = value
    return inputs | {name: values}


@pytest.mark.parametrize("ask", ASKING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_operator_refuses_by_name(name: str, ask: Callable[..., Any]) -> None:
    """Also where dropout would draw first; where the others need gradients, too; the loss is
    linear, so that the upstream gradient depends on nothing."""
    op = OPERATORS[name]
    for case, others in zip(op.workload.CASES[:2], (False, True), strict=True):
        inputs = op.workload.make_inputs(case, torch.float32)
        inputs.pop("rng", None)
        names = discovery.trainable(op, case)
        inputs = discovery.require_grad(inputs, names if others else ())
        for label, leaf in discovery.leaves(inputs, names):

            def f(t: Tensor, label: str = label, inputs: Any = inputs) -> Tensor:
                return summed(op.public(**with_leaf(inputs, label, t)), Tensor.sum)

            with pytest.raises(NotImplementedError, match=rf"^{name}: .*published.*{name}\."):
                ask(f, leaf.detach().clone())


@pytest.mark.parametrize("ask", ASKING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("function", ["update", "pooled", "attention"])
def test_every_other_function_refuses_by_name(function: str, ask: Callable[..., Any]) -> None:
    """Those that no case of an operator reaches directly, and the memory profiler's stand-in."""
    up, x = torch.randn(4, 3), torch.randn(2, 3, 6)

    def update(middle: Tensor) -> Tensor:
        base = torch.zeros(5, 12)
        out = pk.gated_bottleneck(
            None, None, up, base=base, bottleneck=middle, activation="identity", update_at=4
        )
        return out.square().sum()

    def pooled(router: Tensor) -> Tensor:
        logits: Tensor = PooledLogitsFunction.apply(x, router, None, None)
        return logits.square().sum()

    def attention(q: Tensor) -> Tensor:
        out: Tensor = KeptAttentionFunction.apply(q, q.detach(), q.detach(), None, 0.0)
        return out.square().sum()

    f, shape, message = {
        "update": (update, (5, 3), "^gated_bottleneck: .*published"),
        "pooled": (pooled, (4, 6), "^expert_dispatch: .*published"),
        "attention": (attention, (1, 2, 3, 4), "^scaled_dot_product_attention: .*eager"),
    }[function]
    with pytest.raises(NotImplementedError, match=message):
        ask(f, torch.randn(shape))


def second_derivatives(function: Any, inputs: dict[str, Any], by: list[Tensor]) -> list[list[Any]]:
    """Of the gradient by each of ``by``, by each: a tensor, None, or "refused"."""
    try:
        out = summed(function(**inputs), Tensor.sum)
        first = torch.autograd.grad(out, by, create_graph=True, allow_unused=True)
    except NotImplementedError:
        return [["refused"] * len(by)] * len(by)
    rows: list[list[Any]] = []
    for gradient in first:
        rows.append([])
        for t in by:
            try:
                found: tuple[Tensor | None, ...] = (None,)
                if gradient is not None and gradient.requires_grad:
                    found = torch.autograd.grad(
                        gradient.square().sum(), t, retain_graph=True, allow_unused=True
                    )
                rows[-1].append(found[0])
            except NotImplementedError:
                rows[-1].append("refused")
    return rows


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_no_second_derivative_is_wrong(name: str, case: Any) -> None:
    """Of every gradient, by every input, for a linear loss: refused, or there is none indeed.
    Inputs are leaves, or results of an earlier layer whose parameter is asked for."""
    op = OPERATORS[name]
    names = discovery.trainable(op, case)
    inputs = discovery.require_grad(op.workload.make_inputs(case, torch.float32), names)
    leaves = dict(discovery.leaves(inputs, names))
    scales = {label: torch.ones((), requires_grad=True) for label in leaves}
    earlier = inputs
    for label, leaf in leaves.items():
        earlier = with_leaf(earlier, label, leaf.detach() * scales[label])
    for given, by in ((inputs, leaves), (earlier, scales)):
        got = second_derivatives(op.public, given, list(by.values()))
        want = second_derivatives(op.reference.forward, given, list(by.values()))
        for one, row, exact in zip(by, got, want, strict=True):
            for other, found, value in zip(by, row, exact, strict=True):
                absent = value is None or not value.any()
                assert found == "refused" or (found is None and absent), (one, other, found)
        assert any(found == "refused" for row in got for found in row)


def test_gradients_that_nobody_differentiates_are_given() -> None:
    """Kind: create_graph=True alone refused, where inputs are results of an earlier layer."""
    scale = torch.ones((), requires_grad=True)
    x, down, up = (scale * torch.randn(s) for s in ((5, 8), (4, 8), (8, 4)))
    out = pk.gated_bottleneck(x, down, up).sum()
    (want,) = torch.autograd.grad(out, scale, retain_graph=True)
    (got,) = torch.autograd.grad(out, scale, create_graph=True)
    assert torch.equal(got, want)


def test_a_transform_of_something_else_passes_by() -> None:
    """What a transform does not see is computed as always."""
    x, down, up = torch.randn(5, 8), torch.randn(4, 8), torch.randn(8, 4)
    want = pk.gated_bottleneck(x, down, up)
    scaled = torch.vmap(lambda s: s * pk.gated_bottleneck(x, down, up))(torch.ones(3))
    assert torch.equal(scaled, want.expand(3, 5, 8))
    with forward_ad.dual_level():
        assert torch.equal(pk.gated_bottleneck(x, down.clone().requires_grad_(), up), want)


@pytest.mark.parametrize("ask", [func_grad, func_jvp, vmap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_compiled_transform_refuses_by_name(name: str, ask: Callable[..., Any]) -> None:
    """Traced, the raw operators would give zeros for derivatives."""
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(op.workload.CASES[0], torch.float32)
    label, leaf = discovery.leaves(inputs, op.workload.DIFFERENTIABLE)[0]

    def f(t: Tensor) -> Tensor:
        return summed(op.public(**with_leaf(inputs, label, t)))

    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match=rf"^{name}: .*published"):
        torch.compile(lambda t: ask(f, t), backend="eager")(leaf)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="published"):
        torch.compile(lambda t: ask(f, t), backend="eager", fullgraph=True)(leaf)


def test_a_compiled_call_has_no_second_derivative() -> None:
    """torch's own refusal, which is on the way to every input."""
    down, up = (torch.randn(s, requires_grad=True) for s in ((4, 8), (8, 4)))
    x = torch.randn(5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(pk.gated_bottleneck, fullgraph=True, backend="aot_eager")
    out = compiled(x, down, up)

    def twice() -> None:
        first = torch.autograd.grad(out.sum(), (down, up), create_graph=True)
        torch.autograd.grad(first[0].square().sum(), (down, up))

    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        twice()


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_the_reference_that_is_named_instead_has_them(name: str, case: Any) -> None:
    """Second derivatives and a tangent of what the error names, in fp64 against differences."""
    op = OPERATORS[name]
    names = discovery.trainable(op, case)
    inputs = discovery.require_grad(op.workload.make_inputs(case, torch.float64), names)
    leaves = [t for _, t in discovery.leaves(inputs, names)]
    towards = [torch.randn_like(t) / t.numel() ** 0.5 for t in leaves]

    def slope(step: float) -> Tensor:
        """Along ``towards``, at ``step`` along it."""
        moved = [
            (t + step * d).detach().requires_grad_() for t, d in zip(leaves, towards, strict=True)
        ]
        there = iter(moved)
        given = {
            n: [next(there) if isinstance(v, Tensor) else v for v in value]
            if isinstance(value, (list, tuple)) else next(there)
            for n in names if discovery.leaves(inputs, (n,)) for value in [inputs[n]]
        }  # fmt: skip
        out = summed(op.reference.forward(**(inputs | given)))
        grads = torch.autograd.grad(out, moved, allow_unused=True)
        return sum((g * d).sum() for g, d in zip(grads, towards, strict=True) if g is not None)

    first = torch.autograd.grad(
        summed(op.reference.forward(**inputs)), leaves, create_graph=True, allow_unused=True
    )
    along = sum((g * d).sum() for g, d in zip(first, towards, strict=True) if g is not None)
    second = torch.autograd.grad(along, leaves, allow_unused=True)
    got = sum((g * d).sum() for g, d in zip(second, towards, strict=True) if g is not None)
    want = (slope(1e-5) - slope(-1e-5)) / 2e-5
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
