"""What fused operators do not do, refused by name whichever call asks for it.

Their backward is a kernel, not a graph: it has no derivative of its own, no tangent and no batch
rule. Torch alone would say so in some calls only. ``once_differentiable`` raises where its node is
reached, but ``torch.autograd.grad`` visits no node that leads to none of its inputs, so that terms
of a second derivative fell away; and a tangent that meets a raw operator is dropped.

* second derivatives: grad mode is on in a backward exactly where ``create_graph=True``. The
  gradients then hang on a node that raises and leads to everything they depend on, so that no call
  can pass by it. Where an input was not kept and cannot be found from its node, they are refused at
  once;
* batched gradients (``is_grads_batched=True``): the gradients that arrive are batched tensors;
* forward mode, ``torch.func`` and ``vmap``: looked for where an operator is called.

What ``torch.compile`` traces is refused by torch itself; there the checks are not traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

INSTEAD = (
    'run the layers in plain torch, pk.attach(..., implementation="published"), or this operator '
    "alone by petal_kernels.ops.{operator}.reference.forward"
)


def refuse(operator: str, what: str, instead: str = INSTEAD) -> NoReturn:
    """Raise NotImplementedError (a RuntimeError): what the operator lacks, and what to use."""
    raise NotImplementedError(
        f"{operator}: fused operators are once_differentiable, in reverse mode, and this call "
        f"wants a {what}: {instead.format(operator=operator)}"
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def check_transforms(operator: str, values: Iterable[Any], instead: str = INSTEAD) -> None:
    """Raise NotImplementedError if one of the arguments ``values``, in sequences too, carries a
    tangent or is seen by a transform of ``torch.func``."""
    functorch = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():
        if functorch:
            refuse(operator, "transform of torch.func (vmap, grad, vjp, jvp, jacrev, ...)", instead)
        return
    level: int = forward_ad._current_level
    if functorch or level >= 0:
        _refuse_transformed(operator, values, functorch, instead)


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is at work here, on whatever tensors: a
    caller that can do without a fused operator asks before."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _refuse_transformed(
    operator: str, values: Iterable[Any], functorch: bool, instead: str
) -> None:
    for t in _tensors(values):
        if functorch and torch._C._functorch.is_batchedtensor(t):
            refuse(operator, "vmap", instead)
        if functorch and torch._C._functorch.is_functorch_wrapped_tensor(t):
            refuse(operator, "transform of torch.func (grad, vjp, jvp, jacrev, ...)", instead)
        # torch.func differentiates by Functions of another kind, even where it watches others.
        if functorch and t.requires_grad and torch.is_grad_enabled():
            refuse(operator, "transform of torch.func (grad, vjp, jvp, jacrev, ...)", instead)
        if not functorch and forward_ad.unpack_dual(t).tangent is not None:
            refuse(operator, "forward-mode derivative", instead)


def _batched(t: Tensor) -> bool:
    """Whether ``t`` is a batch of tensors of vmap's, or of ``is_grads_batched=True``, an older
    one."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(t) or functorch.is_batchedtensor(t)


class FirstOrderFunction(torch.autograd.Function):
    """The base of every Function here; ``operator`` is the name that its errors give.

    ``backward`` runs without grad mode and on plain tensors, and its results cannot be
    differentiated.
    """

    operator: str
    instead: str = INSTEAD
    passes_on = False  # backward reads its gradient and passes it to the first tensor by `own`

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.backward = staticmethod(_guarded(cls.backward, cls.operator, cls.instead))  # type: ignore[method-assign]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's, after the check of the arguments."""
        check_transforms(cls.operator, args, cls.instead)
        return super().apply(*args)  # type: ignore[no-untyped-call]

    @classmethod
    def apply_plain(cls, *args: Any) -> Any:
        """Of arguments that have a signature: none is what torch would look for in each first."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def _guarded(backward: Callable[..., Any], operator: str, instead: str) -> Callable[..., Any]:
    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        for grad in grads:
            if grad is not None and _batched(grad):
                refuse(operator, "batch of gradients (is_grads_batched=True)", instead)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        sources = _sources(ctx, grads)
        if sources is None:
            refuse(operator, _SECOND, instead)
        with torch.no_grad():
            results = backward(ctx, *grads)
        found = [r for r in results if r is not None]
        tensors = (*found, *sources)
        refused = iter(
            _RefusalFunction.apply(operator, instead, len(found), *tensors)  # type: ignore[no-untyped-call]
        )
        return tuple(None if r is None else next(refused) for r in results)

    return checked


_SECOND = "second derivative (create_graph=True)"


def _sources(ctx: Any, grads: Iterable[Any]) -> list[Tensor] | None:
    """Tensors that lead to whatever a backward's results depend on; None if they cannot be had."""
    kept = (*grads, *ctx.saved_tensors)
    found = [t for t in kept if t is not None and t.requires_grad]
    edges = {tuple(torch.autograd.graph.get_gradient_edge(t)[:2]) for t in found}
    for node, number in ctx.next_functions:
        if node is None or (node, number) in edges:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is None:  # of an earlier operation, whose result is nobody's any more
            return None
        found.append(leaf)
    return found


class _RefusalFunction(torch.autograd.Function):
    """The first ``count`` tensors as they are; differentiating them raises."""

    @staticmethod
    def forward(
        ctx: Any, operator: str, instead: str, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.refusal = operator, instead
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        operator, instead = ctx.refusal
        refuse(operator, _SECOND, instead)


# Nodes whose backward reads the gradient and hands nothing of it on, and views on the way to them.
_PRODUCTS = ("AddmmBackward0", "MmBackward0", "BmmBackward0")
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


def own(dout: Tensor, ctx: Any = None, index: int = 0) -> Tensor:
    """A gradient that passes through unchanged, in storage of its own; ``index`` counts the tensor
    arguments of the Function whose ``ctx`` is given, to the one that it passes to.

    torch's own sum hands on the very tensor: ``AccumulateGrad`` copies what others hold. But it
    counts the holders of a tensor, not of its storage, and what reaches an operator is mostly a
    view (rows are flattened), so that two leaves, or a leaf and the caller, would end in one
    buffer; and ``torch.autograd.grad`` and hooks hand it to users as it is. One copy is right for
    each of them. Only a frozen linear's product takes the gradient itself: it forms another and
    nobody sees this one.
    """
    if ctx is None or torch.compiler.is_compiling():
        return dout.clone()
    return dout if _is_consumed(ctx.next_functions[index][0]) else dout.clone()


def _is_consumed(node: Any) -> bool:
    while node is not None and (node.name() in _VIEWS or _passes_on(node)):
        node = node.next_functions[0][0]
    if node is None or node.name() not in _PRODUCTS:
        return False
    # A summand of addmm that is trained would get the gradient itself.
    return node.name() != "AddmmBackward0" or node.next_functions[0][0] is None


def _passes_on(node: Any) -> bool:
    return getattr(getattr(node, "_forward_cls", None), "passes_on", False)
