"""Several adapters on one model, by name: one is active, the others wait outside of it.

What waits is in no module of the model: it costs its own memory and nothing else, and the active
adapter runs as if it were alone. So any method may stand beside any other.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from petal_kernels.hf import tensors
from petal_kernels.hf.asked import asked, in_file
from petal_kernels.hf.combining import combined
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.files import path_of
from petal_kernels.hf.holders import check_holders
from petal_kernels.hf.installed import Installed
from petal_kernels.hf.methods import method_of
from petal_kernels.hf.stored import Stored
from petal_kernels.nn.arguments import check_choice

if TYPE_CHECKING:
    from petal_kernels.hf.asked import Read

DEFAULT = "default"
IMPLEMENTATIONS = ("fused", "published")


class Several(Stored):
    """The part of an `Attachment` that concerns adapters by name.

    Switching is the model's, for every thread and task: call it between forwards. `disabled()` is a
    thread's or task's own, whichever adapter is active. `parameters()`, `state_dict()`, `save`,
    `load`, `merge`, the model's own `parameters()` and `state_dict()` and an engine's checkpoint
    mean the active adapter; the others keep values, gradients and `requires_grad`. So give every
    adapter an optimizer of its own, made while it is active.
    """

    active: str  # the name of the active adapter
    installed: Installed
    _adapters: dict[str, Installed]

    @abstractmethod
    def _use(self, name: str, installed: Installed) -> None:
        """Makes an adapter the active one of this handle."""

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they came."""
        return list(self._adapters)

    def add(
        self,
        name: str,
        config: AdapterConfig | str | os.PathLike[str] | Any,
        *,
        implementation: str = "fused",
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        """Makes another adapter of the base model, by any method, from what `attach` takes. The
        active one stays active; `switch(name)` changes that.

        Raises what `attach` raises, and ValueError where the name is taken; nothing is changed
        then. RuntimeError where the adapter is merged, ValueError where an engine holds the model.
        """
        check_name(name)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        self._check_changeable("add")
        if name in self._adapters:
            raise ValueError(f"name: want a new one, got {name!r}, which is one of {self.names}")
        before, own = self.active, self.installed
        own.take_out()
        try:
            wanted, saved = asked(config, self.model, checkpoint)
            if saved is None:
                made = self._install(name, wanted, implementation)
                if checkpoint is not None:
                    self.load_checkpoint(checkpoint)
            else:
                made = self._install_saved(name, saved, wanted, implementation)
            self._adapters[name] = made
        finally:
            if self.installed is not own:
                self.installed.take_out()
            own.put_back(self)
            self._use(before, own)
        for note in made.method.found.notes:
            warnings.warn(f"add: {note}", stacklevel=2)

    def switch(self, name: str) -> None:
        """Makes the adapter of that name the active one, for every thread and task.

        Outputs and gradients are from then on those of a model that has this adapter alone. A
        backward of an earlier forward still goes to the adapter that ran; where checkpointing would
        have to run a layer of it again, it raises RuntimeError. Hooks on an adapted linear belong
        to the adapter under which they were registered.
        """
        self._check_changeable("switch")
        made = self._known(name)
        if made is self.installed:
            return
        self._swap(name, made)
        for each in self._adapters.values():
            each.method.switched = True
            if each is not made:
                made.mark_gone(each)

    def remove(self, name: str) -> None:
        """Forgets an adapter that is not active: its parameters are freed with it."""
        self._need_attached("remove")
        if self._known(name) is self.installed:
            raise ValueError(f"name: want one that is not active, got {name!r}; switch first")
        del self._adapters[name]

    def combine(self, name: str, weights: Mapping[str, float]) -> None:
        """Adds the LoRA adapter whose update is the weighted sum of others', by their names.

        It is exact: the factors stand beside one another, so that its rank is the sum of theirs.
        Combined are adapters of `LoraConfig` whose update is all that they train: ValueError names
        one with magnitudes (DoRA), biases, rows of tokens or modules trained whole, and one of
        another method.
        """
        check_name(name)
        self._check_changeable("combine")
        ok = isinstance(weights, Mapping) and len(weights) > 0
        if not ok:
            raise TypeError(f"weights: want a dict of names and weights, got {weights!r}")
        members = {each: self._known(each, "weights") for each in weights}
        config, state = combined(self.model, members, weights)
        self.add(name, config)
        with self._as(name):
            self.load_state_dict(state)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        format: str = "petal",
        name: str | None = None,
    ) -> None:
        if name is not None:
            check_name(name)
        if name is None or name == self.active:
            super().save(directory, format=format)
            return
        self._check_changeable("save")
        with self._as(name):
            super().save(directory, format=format)

    save.__doc__ = f"{Stored.save.__doc__}\n        `name`: of that adapter, not of the active one."

    def save_all(self, directory: str | os.PathLike[str], *, format: str = "petal") -> None:
        """Saves every adapter into a folder of its name in `directory`: `add(name, folder)` or
        `attach` load it."""
        self._check_changeable("save_all")
        folder = path_of(directory)
        for name in self.names:
            with self._as(name):
                self.save(folder / name, format=format)

    # -- inside -----------------------------------------------------------------------------------

    def _known(self, name: str, argument: str = "name") -> Installed:
        if not isinstance(name, str) or name not in self._adapters:
            raise ValueError(f"{argument}: want one of {self.names}, got {name!r}")
        return self._adapters[name]

    def _check_changeable(self, what: str) -> None:
        self._need_attached(what)
        self._check_places(what)
        if self._merged is not None:
            raise RuntimeError(f"{what}: the adapter is merged; call unmerge() first")
        self.installed.check_taken(what)
        self.installed.check_forwards(what)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            check_holders(self.model)

    def _swap(self, name: str, made: Installed) -> None:
        own = self.installed
        own.take_out()
        try:
            made.put_back(self)
        except BaseException:
            own.put_back(self)
            raise
        self._use(name, made)

    @contextlib.contextmanager
    def _as(self, name: str) -> Iterator[None]:
        """Inside, that adapter is the active one, and no forward runs."""
        before, own = self.active, self.installed
        if name != before:
            self._swap(name, self._known(name))
        try:
            yield
        finally:
            if name != before:
                self._swap(before, own)

    def _install(
        self, name: str, config: AdapterConfig, implementation: str, *, loads: bool = False
    ) -> Installed:
        published = implementation == "published"
        method = method_of(config)(self.model, config, published=published, loads=loads)
        made = Installed(self.model, method, implementation)
        self._use(name, made)  # what fails from here on is taken out by `add`
        made.install(self)
        made.shapes.update(tensors.shapes_of(self.state_dict()))
        return made

    def _install_saved(
        self, name: str, saved: Read, config: AdapterConfig, implementation: str
    ) -> Installed:
        with in_file(saved):
            made = self._install(name, config, implementation, loads=True)
        saved.check_base(self.signature())
        self._load(saved)
        return made

    def _said(self) -> list[str]:
        """The report's line of the adapters by name."""
        if len(self._adapters) == 1:
            return []
        others = ", ".join(name for name in self._adapters if name != self.active)
        return [f"active adapter: {self.active}; waiting: {others}"]


def check_name(name: object) -> None:
    """TypeError or ValueError unless it can name an adapter and a folder."""
    if not isinstance(name, str):
        raise TypeError(f"name: want a string, got a {type(name).__name__}")
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError(f"name: want letters, digits, '_' and '-', got {name!r}")
