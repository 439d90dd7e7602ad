"""What every method does to a model: freeze, install, report, save, merge, and give it back.

Nothing is patched but the instance. One module named `petal` on the model holds the adapter;
`detach()` gives back the very objects.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from petal_kernels.hf.blocks import Blocks
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.found import Found
from petal_kernels.hf.installed import Installed
from petal_kernels.hf.merging import HANDLE, Merged
from petal_kernels.hf.method import Method
from petal_kernels.hf.report import Report, make_report
from petal_kernels.hf.routing import Routed
from petal_kernels.hf.several import DEFAULT, Several
from petal_kernels.hf.unloading import Unloading
from petal_kernels.hf.wrappers import AdaptedLinear


class Attachment(Blocks, Routed, Several, Unloading):
    """What `attach` did to one model: report it, save it, merge it, take it back.

    It may hold several adapters by name, one of which is active (`add`, `switch`): everything else
    here means that one.
    """

    config: AdapterConfig
    implementation: str
    shapes: dict[str, torch.Size]

    def __init__(
        self, model: nn.Module, method: Method, implementation: str, name: str = DEFAULT
    ) -> None:
        self.model = model
        self._merged: Merged | None = None
        self._use(name, Installed(model, method, implementation))
        self._adapters = {name: self.installed}
        self._required = {
            name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)
        }
        self._attached = True
        model.requires_grad_(False)
        self.installed.install(self)

    def __repr__(self) -> str:
        if not self.__dict__.get("_attached"):
            return "Attachment(detached)"
        trained = sum(p.numel() for p in self.adapter.parameters() if p.requires_grad)
        names = [f"{name} (active)" if name == self.active else name for name in self._adapters]
        merged = "" if self._merged is None else ", merged"
        return (
            f"Attachment({self.config.method} on a {type(self.model).__name__}: "
            f"{len(self.found.places)} places, {trained:,} trained parameters{merged}; "
            f"adapters: {', '.join(names)})"
        )

    if not TYPE_CHECKING:  # else every name would be one

        def __getattr__(self, name: str) -> Any:
            said = f"{type(self).__name__!r} object has no attribute {name!r}"
            model = None if name.startswith("_") else self.__dict__.get("model")
            if name == "print_trainable_parameters":
                said += "; print(att.report()) says it"
            elif model is not None and hasattr(model, name):
                said += f"; it is the handle, the model has it: att.model.{name}"
            raise AttributeError(said, name=name, obj=self)

    def _use(self, name: str, installed: Installed) -> None:
        """Makes an adapter the active one of this handle."""
        self.active, self.installed = name, installed
        self.method, self.config = installed.method, installed.config
        self.adapter, self.implementation = installed.adapter, installed.implementation
        self.shapes = installed.shapes

    @property
    def found(self) -> Found:
        """The places that are adapted."""
        return self.method.found

    def wrappers(self) -> list[tuple[str, AdaptedLinear]]:
        """What stands in the linears' places, by path."""
        return [(place.path, wrapper) for place, _, _, wrapper in self.installed.wrapped]

    # -- report, merge, detach --------------------------------------------------------------------

    def report(self, tokens: tuple[int, int] = (8, 128)) -> Report:
        """A table of what was replaced, on which backend it runs and what it trains.

        Backends are those of a call made here: in this grad mode, under this autocast and backend,
        with `tokens` (samples, tokens of each) as input. Nothing runs, and hooks of the adapted
        linears see nothing.
        """
        self._need_attached("report")
        self._check_places("report")
        wrappers = dict(self.wrappers())
        whole, how = self.whole(), self.implementation
        made = make_report(self.model, self.method, wrappers, whole, how, tokens)
        return dataclasses.replace(made, notes=[*made.notes, *self._said()])

    def named_whole(self) -> list[str]:
        """The paths of what `modules_to_save` means, without what lies in another of them."""
        named = self.installed.named
        return [path for path in named if not any(path.startswith(f"{p}.") for p in named)]

    def used_again(self) -> list[str]:
        """The paths of adapted linears that the model uses in several places."""
        again = {id(wrapper) for _, _, wrapper in self.installed.again}
        return [path for path, wrapper in self.wrappers() if id(wrapper) in again]

    def whole(self) -> list[str]:
        """The paths of what is trained whole, as it was named or as the method chose it."""
        return list(self.method.trained() | self.method.trained_biases() | self.installed.named)

    def detach(self) -> nn.Module:
        """Gives back the model as it came in: modules, classes, weights and requires_grad.

        A merged adapter is unmerged first; `merge_and_unload` gives the merged model.
        """
        self._need_attached("detach")
        self.installed.check_taken("detach")
        if self._merged is not None:
            self.unmerge()
        self.installed.take_out()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._required:
                parameter.requires_grad_(self._required[name])
        for each in self._adapters.values():
            each.adapter.__dict__.pop(HANDLE, None)
            each.method.routings.clear()
        self._attached = False
        return self.model

    def _need_attached(self, what: str) -> None:
        if not self._attached:
            raise RuntimeError(f"{what}: this attachment was detached")

    def _check_places(self, what: str) -> None:
        """RuntimeError where a module that was adapted is no longer in the model."""
        there = {id(module) for module in self.model.modules()}
        gone = [path for path, wrapper in self.wrappers() if id(wrapper) not in there]
        gone += [
            own.__name__
            for module, own, _ in self.installed.taken
            if id(module) not in there and id(module) not in self.installed.guards
        ]
        if gone:
            raise RuntimeError(
                f"{what}: {len(gone)} adapted modules were replaced since attach (first: "
                f"{gone[0]}); detach and attach again after a new head or resized embeddings"
            )
