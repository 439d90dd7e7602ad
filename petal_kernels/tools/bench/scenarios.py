"""What is timed: providers of one computation over the same inputs.

A provider is a forward and how its gradients are taken; every mode of timing, counting and checking
follows from the two. The first provider is the published eager form, to which all are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.fresh import Fresh
from petal_kernels.tools.bench.timing import Step

MODES = ("forward", "train", "backward", "full")
Forward = Callable[..., Any]  # of the arguments: a tensor, or several
Check = Callable[..., Errors]  # check(gradients=True), or of the outputs alone
IN_WORDS = {
    "forward": "forward without gradients",
    "train": "forward as in training",
    "backward": "backward",
    "full": "forward and backward",
}


@dataclass
class Inputs:
    """Arguments of a forward, which of them are trained, and the gradients of its outputs."""

    arguments: dict[str, Any]
    trained: tuple[str, ...] = ()
    douts: Sequence[Tensor] = ()

    def leaves(self) -> list[Tensor]:
        """The trained tensors, in a fixed order."""
        found: list[Tensor] = []
        for name in self.trained:
            value = self.arguments.get(name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [v for v in values if isinstance(v, Tensor)]
        return found

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with `f` of every floating tensor, those of `trained` being leaves again."""

        def each(name: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [each(name, v) for v in value]
            if not isinstance(value, Tensor):
                return value
            new = f(value.detach()) if value.is_floating_point() else value
            return new.detach().requires_grad_(name in self.trained)

        arguments = {name: each(name, value) for name, value in self.arguments.items()}
        return Inputs(arguments, self.trained, [f(d) for d in self.douts])

    def given(self, **arguments: Any) -> Inputs:
        """The same tensors with some arguments replaced; None takes an argument away."""
        taken = {name for name, value in arguments.items() if value is None}
        new = self.arguments | arguments
        return replace(self, arguments={k: v for k, v in new.items() if k not in taken})

    def nbytes(self) -> int:
        """Bytes of all tensors."""

        def each(value: Any) -> int:
            if isinstance(value, (list, tuple)):
                return sum(map(each, value))
            return value.nbytes if isinstance(value, Tensor) else 0

        return sum(map(each, self.arguments.values())) + each(list(self.douts))


@dataclass
class Provider:
    """One way to compute it.

    leaves      what is trained, of given inputs (default: those that the inputs name)
    backward    for a whole model: runs the step's rest on the outputs (autograd.grad otherwise)
    check       errors against fp64 beside plain torch's, of the inputs as they are then, with
                gradients or of the forward without them; None: it computes something else (a floor)
    ours        a row of this package; `chosen` if it is what `auto` takes
    floor       the frozen base alone: less work than what it is compared to
    """

    forward: Forward
    leaves: Callable[[Inputs], Sequence[Tensor]] = Inputs.leaves
    backward: Callable[[Sequence[Tensor]], Sequence[Tensor | None]] | None = None
    check: Check | None = None
    ours: bool = False
    chosen: bool = False
    compiled: bool = False
    floor: bool = False

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """Outputs as a list."""
        out = self.forward(**inputs.arguments)
        return [out] if isinstance(out, Tensor) else list(out)

    def gradients(
        self, outs: Sequence[Tensor], inputs: Inputs, retain: bool = False
    ) -> Sequence[Tensor | None]:
        """Gradients of everything trained."""
        if self.backward is not None:
            return self.backward(outs)
        leaves = list(self.leaves(inputs))
        return torch.autograd.grad(
            outs, leaves, list(inputs.douts), allow_unused=True, retain_graph=retain
        )


def step(provider: Provider, mode: str, inputs: Inputs) -> Step:
    """What is timed in `mode`; in "backward" the forward is prepared outside the clock."""

    def forward() -> object:
        with torch.no_grad():
            return provider.outputs(inputs)

    def full() -> object:
        return provider.gradients(provider.outputs(inputs), inputs)

    if mode == "backward":
        return Step(lambda outs: provider.gradients(outs, inputs), lambda: provider.outputs(inputs))
    runs = {"forward": forward, "train": lambda: provider.outputs(inputs), "full": full}
    return Step(lambda _: runs[mode]())


@dataclass
class Scenario:
    """Providers of one computation; what a table is made of.

    arguments    of the command that reproduces it, after `bench`
    moved, work  bytes and flops of (forward, backward) by the operator's own formulas, or None
    parameters   frozen or trained tensors that are not counted as saved
    swept        the value of the axis that is swept
    fresh        the inputs whose values are new at every timed call
    """

    name: str
    inputs: Inputs
    providers: dict[str, Provider]
    arguments: Sequence[str] = ()
    moved: tuple[int, int] | None = None
    work: tuple[int, int] | None = None
    parameters: Sequence[Tensor] = ()
    swept: float | None = None
    notes: list[str] = field(default_factory=list)
    fresh: Fresh = field(default_factory=Fresh)

    @property
    def first(self) -> str:
        """The provider that the others are compared to."""
        return next(iter(self.providers))


def by_mode(pair: tuple[int, int] | None, mode: str) -> int | None:
    """The (forward, backward) figure that belongs to `mode`."""
    if pair is None:
        return None
    return {"backward": pair[1], "full": pair[0] + pair[1]}.get(mode, pair[0])
