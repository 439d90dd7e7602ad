"""LoRA linears of one module that run in one call: those that read one tensor, and a whole MLP.

What may be joined is read from the module's own code (`structure.py`), once. A run joins them only
where nothing tells them apart: the very wrappers stand in their places, unmerged and without hooks
that would have to see each of them. Everything else runs as the module's own forward.

The outputs that wait for their linear to be called belong to one run of the module in one thread;
they end with it. A graph that is being compiled, which could not see that, calls one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.autocast import autocast_on
from petal_kernels.hf.context import THREAD, now
from petal_kernels.hf.parts import Part, Run
from petal_kernels.hf.structure import Mlp, mlp_of, one_input
from petal_kernels.hf.twins import base_twin
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.lora_fused import Member, lora_linears, lora_mlp, watched


class Joins:
    """A linear that says by itself what a joined call takes of it."""

    def member(self) -> Member | str:
        """That, as things stand now, or why its own forward must run."""
        raise NotImplementedError


class OneInput(Part):
    """A module whose `members` read one tensor: the first of them to be called runs all."""

    def __init__(self, method: Any, members: dict[str, Any]) -> None:
        self.method, self.members = method, members

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not all(
            module._modules.get(name) is member for name, member in self.members.items()
        ):
            return run(*args, **kwargs)
        before = THREAD.waiting
        THREAD.waiting = Waiting(self, before)
        try:
            return run(*args, **kwargs)
        finally:
            THREAD.waiting = before

    def dry(self, twins: dict[AdaptedLinear, Any], x: Tensor) -> object:
        """The call with twins of the updates, as a report makes it; or why it is none."""
        if any(member.merged is not None for member in twins):
            return "a member is merged"
        return lora_linears(x, [(twin, m.trained_bias()) for m, twin in twins.items()])


class Waiting:
    """One run of such a module: what its members gave for the tensor that they read."""

    def __init__(self, part: OneInput, outer: Waiting | None) -> None:
        self.part, self.outer = part, outer
        self.key: tuple[Any, ...] | None = None
        self.x: Tensor | None = None  # kept while outputs wait: its address is not another's
        self.outputs: dict[nn.Module, Tensor] = {}

    def take(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """The member's output for x; None where it must be computed alone."""
        version = None if x.is_inference() else x._version
        key = (id(x), version, torch.is_grad_enabled(), autocast_on(x.device.type))
        if key != self.key:
            if self.outputs:  # of another tensor, for the other members
                return None
            self.key, self.x = key, x
            members = list(self.part.members.values())
            asked = taking(members)
            found = asked if isinstance(asked, str) else lora_linears(x, asked)
            if not isinstance(found, str):
                self.outputs = dict(zip(members, found, strict=True))
        return self.outputs.pop(member, None)


def taken(member: nn.Module, x: Tensor) -> Tensor | None:
    """The member's output for x from the run that it is in, where that joins it with others."""
    waiting = THREAD.waiting
    while waiting is not None:
        if any(member is each for each in waiting.part.members.values()):
            return waiting.take(member, x)
        waiting = waiting.outer
    return None


class FusedMlp(Part):
    """An MLP in one call."""

    def __init__(
        self,
        method: Any,
        form: Mlp,
        members: Sequence[AdaptedLinear | nn.Module],
        act: nn.Module,
        recompute: bool,
    ) -> None:
        self.method, self.form, self.act, self.recompute = method, form, act, recompute
        names = (form.gate, form.up, form.down)
        self.members = dict(zip((n for n in names if n is not None), members, strict=True))

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        x = self._input(module, args, kwargs)
        if x is None:
            return run(*args, **kwargs)
        asked = taking(self.members.values())
        if isinstance(asked, str):
            return run(*args, **kwargs)
        y = lora_mlp(x, asked, self.form.activation, recompute=self.recompute)
        if isinstance(y, str):
            return run(*args, **kwargs)
        for name in self.form.after:
            y = module._modules[name](y)  # type: ignore[misc]
        return y

    def dry(self, twins: dict[AdaptedLinear, Any], x: Tensor) -> object:
        """The call with twins of the updates, as a report makes it; or why it is none."""
        members = self.members.values()
        if any(watched(m) or getattr(m, "merged", None) is not None for m in (*members, self.act)):
            return "a member is watched or merged"
        given = [
            (twins[m], m.trained_bias()) if isinstance(m, AdaptedLinear) else base_twin(m)
            for m in members
        ]
        return lora_mlp(x, given, self.form.activation, recompute=self.recompute)

    def _input(self, module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """What the MLP reads; None where its own forward must run."""
        given = (*args, *kwargs.values())
        if len(given) != 1 or not isinstance(given[0], Tensor) or not now(self.method).on:
            return None
        own = module._modules
        if own.get(self.form.act) is not self.act or watched(self.act):
            return None
        for name, member in self.members.items():
            if own.get(name) is not member or watched(member):
                return None
            if isinstance(member, AdaptedLinear) and member.merged is not None:
                return None
        return given[0]


def member_of(wrapper: AdaptedLinear) -> Member:
    """What a joined call takes of a wrapper."""
    lora: Any = wrapper.used()
    return lora, wrapper.trained_bias()


def taking(members: Iterable[nn.Module]) -> list[Any] | str:
    """What a joined call takes of its linears, those without an update as they are; or why one of
    them must run its own forward."""
    found: list[Any] = []
    for each in members:
        asked: Any = each
        if isinstance(each, AdaptedLinear):
            asked = member_of(each)
        elif isinstance(each, Joins):
            asked = each.member()
        if isinstance(asked, str):
            return asked
        found.append(asked)
    return found


def fused_mlp(method: Any, module: nn.Module, recompute: bool) -> FusedMlp | None:
    """The part that runs an MLP with adapted linears in one call; None where it is no such MLP."""
    form = mlp_of(module)
    if form is None:
        return None
    names = [name for name in (form.gate, form.up, form.down) if name is not None]
    members: list[AdaptedLinear | nn.Module] = [module.get_submodule(name) for name in names]
    return FusedMlp(method, form, members, module.get_submodule(form.act), recompute)


def one_input_parts(method: Any, module: nn.Module) -> list[OneInput]:
    """A part for every two and more adapted linears of a module that read one tensor."""
    found = []
    for group in one_input(module):
        linears = {name: module.get_submodule(name) for name in group}
        members: dict[str, Any] = {
            n: m for n, m in linears.items() if isinstance(m, (AdaptedLinear, Joins))
        }
        if len(members) > 1 and len({m.in_features for m in members.values()}) == 1:
            found.append(OneInput(method, members))
    return found
