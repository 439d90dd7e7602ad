"""What every method does to a model: freeze, install, report, save, merge, and give it back.

Nothing is patched but the instance. One module named `petal` on the model holds the adapter;
`detach()` gives back the very objects.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf import files, tensors
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.merging import Merged, MergeReport
from petal_kernels.hf.names import canonical, prefixes_of
from petal_kernels.hf.report import Report
from petal_kernels.nn.frozen_linear import FrozenLinear

NAME = "petal"


class Attachment(ABC):
    """What `attach` did to one model: report it, save it, merge it, take it back."""

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        adapter: nn.Module,
        implementation: str,
        adapted: Sequence[nn.Module],
        trained: dict[str, nn.Module] | None = None,
    ) -> None:
        """`adapted`: the base's modules that this method reads or replaces; `trained`: those that
        it trains whole, by path."""
        self.model, self.config, self.implementation = model, config, implementation
        self.adapter = adapter
        extra = extra_modules(model, config.modules_to_save, adapted)
        self._extra = (trained or {}) | extra
        self._kept = [(p, p.detach().clone()) for m in self._extra.values() for p in m.parameters()]
        self._required = [(p, p.requires_grad) for p in model.parameters()]
        self._wrapped: list[tuple[nn.Module, str, FrozenLinear]] = []
        self._classes: list[tuple[nn.Module, type, type]] = []
        self._hooks: list[Any] = []
        self._marked: list[tuple[nn.Module, str]] = []
        self._merged: Merged | None = None
        self._attached = True
        self._on = True
        self._shapes: dict[str, torch.Size] = {}  # of all that is stored, once it is all there
        model.requires_grad_(False)
        for module in self._extra.values():
            module.requires_grad_(True)
        adapter.train(model.training)
        model.add_module(NAME, adapter)

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """What the adapter needs of its base, as stored with it."""

    @abstractmethod
    def report(self) -> Report:
        """A table of what was replaced, on which backend it runs and what it trains."""

    @abstractmethod
    def _merge(self) -> Merged: ...

    @abstractmethod
    def _enable(self, enabled: bool) -> None: ...

    def _switch(self, on: bool) -> None:
        self._on = on
        self._enable(on)

    def _mark(self, module: nn.Module, name: str, value: object) -> None:
        module.__dict__[name] = value
        self._marked.append((module, name))

    def _wrap(self, parent: nn.Module, child: str, wrapper: FrozenLinear) -> None:
        setattr(parent, child, wrapper)
        self._wrapped.append((parent, child, wrapper))

    def _change_class(self, module: nn.Module, cls: type) -> None:
        self._classes.append((module, type(module), cls))
        module.__class__ = cls

    # -- parameters ---------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters: the adapter's and those of modules_to_save."""
        for name, parameter in self.adapter.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
        for path, module in self._extra.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{tensors.EXTRA}.{path}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """All stored tensors, shared factors once; the very storages, not copies."""
        state = dict(self.adapter.state_dict())
        for path, module in self._extra.items():
            for name, tensor in module.state_dict().items():
                state[f"{tensors.EXTRA}.{path}.{name}"] = tensor
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` in; ValueError on any missing, unexpected or mis-shaped tensor."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: want a dict of tensors, got a {type(state).__name__}")
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.is_meta:
                got = "one on device meta" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"state: want tensors with values, got {got} as {name!r}")
        own = self._loadable()
        tensors.check_tensors("state_dict", state, own)
        self._copy_in(own, state)

    def _loadable(self) -> dict[str, Tensor]:
        state = self.state_dict()
        tensors.check_loadable("load", state, self._shapes)
        return state

    def _copy_in(self, own: dict[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self._need_attached("load")
        if self._merged is not None:
            raise RuntimeError("load: the adapter is merged; call unmerge() first")
        tensors.copy_in("load", own, state)

    # -- files --------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes adapter.safetensors and petal_config.json into `directory`, as one step.

        Whatever interrupts it, the directory loads as the adapter that was there or as this one.
        A model under `fully_shard` is gathered: then every process calls this.
        """
        self._need_attached("save")
        files.write(directory, self.config, self.signature(), self.state_dict(), self._shapes)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Loads a saved adapter of the same configuration into this attachment."""
        saved = files.read(directory)
        saved.check_config(self.config)
        saved.check_base(self.signature())
        self._load(saved)

    def _load(self, saved: files.Saved) -> None:
        own = self._loadable()
        self._copy_in(own, saved.tensors_for(own, prefixes_of(self.model)))

    # -- switching, merging, detaching ----------------------------------------------------------

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it did before `attach`."""
        self._need_attached("disabled")
        was_merged, was_on = self._merged is not None, self._on
        if was_merged:
            self.unmerge()
        trained = [parameter.detach().clone() for parameter, _ in self._kept]
        self._switch(False)
        _copy_back(self._kept)
        try:
            yield
        finally:
            self._switch(was_on)
            with torch.no_grad():
                for (parameter, _), value in zip(self._kept, trained, strict=True):
                    parameter.copy_(value)
            if was_merged:
                self.merge()

    def merge(self) -> MergeReport:
        """Folds every update into its base weight where that is exact; the originals are kept.

        What is not a linear map of a module's own input stays as a module and is listed in the
        result, with the rounding of a 16-bit base.
        """
        self._need_attached("merge")
        if self._merged is not None:
            raise RuntimeError("merge: already merged")
        self._merged = self._merge()
        return self._merged.report

    def unmerge(self) -> None:
        """Puts the original weights back: the very Parameter objects."""
        if self._merged is None:
            raise RuntimeError("unmerge: not merged")
        self._merged.undo()
        self._merged = None

    def detach(self) -> nn.Module:
        """Gives back the model as it came in: modules, classes, weights and requires_grad."""
        self._need_attached("detach")
        changed = [m for m, _, ours in self._classes if type(m) is not ours]
        if changed:
            raise RuntimeError(
                f"detach: the class of {len(changed)} layers was changed since attach (first: "
                f"{type(changed[0]).__name__}); undo that first"
            )
        if self._merged is not None:
            self.unmerge()
        _copy_back(self._kept)
        for handle in self._hooks:
            handle.remove()
        for module, own, _ in self._classes:
            module.__class__ = own
        for parent, child, wrapper in self._wrapped:
            setattr(parent, child, wrapper.base)
        for module, name in self._marked:
            module.__dict__.pop(name, None)
        delattr(self.model, NAME)
        for parameter, flag in self._required:
            parameter.requires_grad_(flag)
        self._attached = False
        return self.model

    def _need_attached(self, what: str) -> None:
        if not self._attached:
            raise RuntimeError(f"{what}: this attachment was detached")


def extra_modules(
    model: nn.Module, names: Sequence[str] | None, adapted: Sequence[nn.Module]
) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names, by path; none may hold an adapted one."""
    extra: dict[str, nn.Module] = {}
    for name in names or []:
        matches = {
            path: module
            for path, module in model.named_modules()
            if path == name or path.endswith("." + name)
        }
        matches = matches or _elsewhere(model, name)
        if not matches:
            raise ValueError(f"modules_to_save: want names of modules of the model, got {name!r}")
        extra.update(matches)
    taken = {id(module) for module in adapted}
    for path, module in extra.items():
        if any(id(child) in taken for child in module.modules()):
            raise ValueError(
                f"modules_to_save: want modules without adapted projections, got {path!r}"
            )
    return extra


def _elsewhere(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The module of that name in a model with a head, or without one, or in wrappers."""
    prefixes = prefixes_of(model)
    root = canonical(name, prefixes)
    found = model.named_modules()
    return {path: module for path, module in found if root and canonical(path, prefixes) == root}


@torch.no_grad()
def _copy_back(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in kept:
        parameter.copy_(value)
