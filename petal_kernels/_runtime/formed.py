"""Results that an operator may form again in backward, where it would otherwise keep them.

A Function whose result y costs little to compute says so at y's node (`put`): from which of its
inputs, and how. An operator that reads y and needs its values in backward asks (`kept`) what to
save: y, or that input, which the Function itself has kept, beside whatever else forms y. Gradients
are not touched: they reach y, and its node.

Nothing is kept alive by the offer. The node holds its source weakly, for under checkpointing the
node outlives it; where the source is gone, was written since, or y was, y is kept as ever. A
checkpoint that recomputes sees another number of saved tensors where the answer differs between its
runs, and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

Again = Callable[..., Tensor]
Kept = tuple[Tensor | None, ...]


class _Recipe:
    """How one result is formed again."""

    def __init__(self, y: Tensor, again: Again, source: Tensor, others: Kept) -> None:
        self.again, self.others = again, others
        self._source = TensorWeakRef(source)
        self._versions = y._version, source._version

    def parts(self, y: Tensor) -> Kept | None:
        source = self._source()
        if source is None or self._versions != (y._version, source._version):
            return None
        return (source, *self.others)


def put(ctx: Any, y: Tensor, again: Again, source: Tensor, *others: Tensor | None) -> None:
    """In a Function's forward: ``again(source, *others)`` gives its result ``y`` once more. Of the
    others, parameters, at least one is there; without one nothing is offered."""
    # A graph that is being compiled keeps and recomputes as its compiler decides.
    if any(each is not None for each in others) and not torch.compiler.is_compiling():
        ctx.petal_recipe = _Recipe(y, again, source, others)


def kept(y: Tensor | None) -> tuple[Kept, Again | None]:
    """The tensors to save in place of ``y``, and what gives ``y`` of them; None: y is the first."""
    if y is None or torch.compiler.is_compiling():
        return (y,), None
    recipe: _Recipe | None = getattr(y.grad_fn, "petal_recipe", None)
    parts = None if recipe is None else recipe.parts(y)
    return ((y,), None) if recipe is None or parts is None else (parts, recipe.again)


def again(parts: Sequence[Any], form: Again | None) -> Tensor | None:
    """In backward: what `kept` stood for."""
    x: Tensor | None = parts[0] if form is None else form(*parts)
    return x
