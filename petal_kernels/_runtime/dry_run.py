"""Which backends a call would take: the very call, run on fake tensors.

What runs is the caller's own Python code: checks, casts and the way through autograd, on tensors of
the same dtypes, devices, shapes, strides and `requires_grad` that have no storage. Where it comes
to a raw operator, that operator's own choice of backend is asked with the very arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from petal_kernels._runtime import library
from petal_kernels._runtime.backends import Explanation


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
    mode = _mode_of(function, inputs, keywords) or FakeTensorMode(allow_non_fake_inputs=True)
    witness = _Witness()
    with _without_autocast_cache(), mode, witness:
        given, named = tree_map(lambda v: _fake(v, mode), (inputs, keywords))
        function(*given, **named)
    return witness.found


class _Witness(TorchDispatchMode):
    """Asks each raw operator that it sees for its choice."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Explanation] = []

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
        return func(*args, **(kwargs or {}))


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    return mode.from_tensor(value)


def _mode_of(*given: Any) -> FakeTensorMode | None:
    """The mode of a model or of inputs that are fake already: two modes do not mix."""
    for value in tree_leaves(given):
        owner = getattr(value, "__self__", value)
        parts = owner.parameters() if isinstance(owner, nn.Module) else (value,)
        for part in parts:
            if isinstance(part, FakeTensor):
                return part.fake_mode
    return None


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
