"""Which backends a call would take: the very call, run on fake tensors.

What runs is the caller's own Python code: checks, casts and the way through autograd, on tensors of
the same dtypes, devices, shapes, strides and `requires_grad` that have no storage. Where it comes
to a raw operator, that operator's own choice of backend is asked with the very arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from petal_kernels._runtime import library
from petal_kernels._runtime.backends import Explanation, default_backend

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, type)


def dry_run(function: Callable[..., Any], *inputs: Any, **keywords: Any) -> list[Explanation]:
    """The explanation of every forward of this package's operators that `function(*inputs,
    **keywords)` would make, in order; an operator's call without rows runs no backend and is left
    out.

    Nothing is computed, and no generator of random numbers moves. Tensors among the inputs (in
    lists, tuples and dicts too) are replaced by fake ones; what else the function reads, such as a
    module's parameters, becomes fake where an operation meets it. Tensors that the function itself
    creates are fake from the start: `dry_run(lambda: layer(torch.empty(1024, 4096)))` allocates
    nothing.

    What decides is as in a real call made here: grad mode, autocast, `use_backend` and
    `PETAL_BACKEND`. A backend asked for by name that cannot run is told (`refusal`), not raised.
    What the function raises propagates, torch's refusal to run code on tensors without values
    among it. Effects of the function's Python code stay: a module that keeps its last output keeps
    a fake one.
    """
    # Inside somebody's own mode its tensors are met, which no other mode takes.
    mode = active_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True)
    witness = _Witness(mode)
    with _without_autocast_cache(), mode, witness:
        given, named = tree_map(witness.fake, (inputs, keywords))
        function(*given, **named)
    return witness.found


def signature(*values: Any, ignore: Collection[str] = ()) -> Hashable:
    """A key: calls of equal signatures, made here, have equal dry runs.

    Of modules, tensors, containers and plain values everything that is no number in a tensor
    counts: a module's class, attributes, hooks, children and parameters by their kind, and which of
    them are one object. Anything else, a function say, equals itself alone. The mode of gradients,
    autocast and the default backend count too. `ignore`: names of attributes that decide nothing,
    such as a layer's number.
    """
    devices = ("cpu", "cuda")
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
        default_backend(),
    )
    seen: dict[int, int] = {}
    return state, tuple(_kind(value, frozenset(ignore), seen) for value in values)


def _kind(value: Any, ignore: frozenset[str], seen: dict[int, int]) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        seen[id(value)] = len(seen)
        strides = value.stride() if value.layout is torch.strided else value.layout
        facts = (value.dtype, value.device, value.requires_grad, value.is_leaf)
        return type(value), value.shape, strides, facts
    if isinstance(value, nn.Module):
        seen[id(value)] = len(seen)
        return type(value), _kind(vars(value), ignore, seen)
    if isinstance(value, dict):
        kept = (item for item in value.items() if item[0] not in ignore)
        return tuple((_kind(k, ignore, seen), _kind(v, ignore, seen)) for k, v in kept)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_kind(each, ignore, seen) for each in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_kind(each, ignore, seen) for each in value)
    return _Itself(value)


class _Itself:
    """Equal to itself alone, and alive as long as a key holds it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


class _Witness(TorchDispatchMode):
    """Asks each raw operator that it sees for its choice, and hands `mode` nothing real."""

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self.found: list[Explanation] = []

    def fake(self, value: Any) -> Any:
        """The twin of a tensor in this mode, one for all its uses; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, FakeTensor) and value.fake_mode is self.mode:
            return value
        return self.mode.from_tensor(value, static_shapes=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        explain = library.explainers.get(func)
        found = None if explain is None else explain(*args)
        if found is not None:
            self.found.append(found)
        if func not in _CONSTANTS:
            # Of some operations on real tensors alone, a parameter's cast among them, the fake
            # mode computes the values.
            args = tuple([self._fake_or_list(a) for a in args])
            kwargs = {name: self._fake_or_list(a) for name, a in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _fake_or_list(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.fake(each) for each in value]
        return self.fake(value)


# Of a tensor's literal: the fake mode keeps its values.
_CONSTANTS = (
    torch.ops.aten.lift.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast keeps what it casts of a trained parameter until its block ends; a fake one would
    reach the real calls after this."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
