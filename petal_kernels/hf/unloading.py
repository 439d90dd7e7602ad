"""Plain models from adapted ones: merged, unloaded, saved.

A model's own `save_pretrained` writes what its own class loads. Of an adapted model that is the
base, with keys beside it that the class does not know: so it is refused, unless every update lies
in the weights.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.files import path_of
from petal_kernels.hf.merging import HANDLE, NAME, WHOLE, Merged, MergeReport, merge
from petal_kernels.hf.wrappers import AdaptedLinear

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method
    from petal_kernels.hf.whole import Copies, Slot

_SAVE = "save_pretrained"
_BEFORE_STATE = 2  # its arguments in front of `state_dict`


class Unloading:
    """The part of an `Attachment` that makes a plain model of the adapted one."""

    model: nn.Module
    method: Method
    adapter: nn.Module
    _merged: Merged | None

    @abstractmethod
    def _need_attached(self, what: str) -> None:
        """RuntimeError where it was detached."""

    @abstractmethod
    def _check_places(self, what: str) -> None:
        """RuntimeError where a module that was adapted is no longer in the model."""

    @abstractmethod
    def wrappers(self) -> list[tuple[str, AdaptedLinear]]:
        """What stands in the linears' places, by path."""

    @abstractmethod
    def whole(self) -> list[str]:
        """The paths of what is trained whole."""

    @abstractmethod
    def copies(self) -> Copies | None:
        """What is trained whole, biases among it."""

    @abstractmethod
    def detach(self) -> nn.Module:
        """The model as it came in."""

    def merge(self) -> MergeReport:
        """Folds every update into its base weight where that is exact; the originals are kept.

        What is not a linear map of a module's own input stays as a module and is listed in the
        result, with the rounding of a 16-bit base. `unmerge` and `detach` give the originals back;
        `merge_and_unload` and `save_merged` make a plain model of it.
        """
        self._need_attached("merge")
        self._check_places("merge")
        if self._merged is not None:
            raise RuntimeError("merge: already merged")
        why = self.method.why_not_merge()
        if why:
            raise ValueError(f"merge: {why}")
        self._merged = merge(self.method, self.wrappers())
        report = self._merged.report
        report.kept = dict.fromkeys(self.whole(), WHOLE) | report.kept
        report.kept.update(self.method.fold_rest(self._merged))
        for each in self._merged.folded:
            each.owner.__dict__["partly"] = not self._merged.is_whole
        return report

    def unmerge(self) -> None:
        """Puts the original weights back: the very Parameter objects."""
        if self._merged is None:
            raise RuntimeError("unmerge: not merged")
        self._merged.undo()
        self._merged = None

    def merge_and_unload(self) -> nn.Module:
        """The model with every update in its weights and nothing of the adapter left.

        What was trained whole takes its base's place, in the base's dtype. What `detach` gives is
        the model that came in. ValueError, and nothing changed, where the method keeps modules that
        no weight can hold (`merge` lists them).
        """
        self._merge_all("merge_and_unload")
        plain = list(self._trained_values())
        self._merged = None  # its weights stay
        model = self.detach()
        for slots, value in plain:
            values, name = slots[0]
            old = values[name]
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value, requires_grad=old.requires_grad)
            for values, name in slots:
                values[name] = value
        return model

    def save_merged(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes the model that `merge_and_unload` would leave, as a plain model of its class: by
        its own `save_pretrained`, which gets `options` (`max_shard_size`, ...). The model stays
        adapted, merged or not as it was.
        """
        self._need_attached("save_merged")
        path_of(directory)
        save = getattr(self.model, _SAVE, None)
        if not callable(save):
            raise TypeError(
                f"save_merged: want a model with {_SAVE}, as transformers' have it, got a "
                f"{type(self.model).__name__}; merge_and_unload() gives the plain model"
            )
        merged = self._merged is not None
        self._merge_all("save_merged")
        try:
            save(directory, **options, state_dict=self._plain_state())
        finally:
            if not merged:
                self.unmerge()

    def _merge_all(self, what: str) -> None:
        """Merges unless that was done; ValueError where a part is not of a plain model."""
        merged = self._merged is not None
        if not merged:
            self.merge()
        assert self._merged is not None
        kept = [(name, why) for name, why in self._merged.report.kept.items() if why != WHOLE]
        if kept:
            if not merged:
                self.unmerge()
            raise ValueError(
                f"{what}: want a method whose updates all fold into weights, got {len(kept)} parts "
                f"that stay (first: {kept[0][0]}, {kept[0][1]})"
            )

    def _trained_values(self) -> Iterator[tuple[list[Slot], Tensor]]:
        """What is trained whole, in the dtype of its base, with the places that take it."""
        copies = self.copies()
        for slots, value in () if copies is None else copies.values(self.model):
            values, name = slots[0]
            yield slots, value.detach().to(values[name].dtype)

    @torch.no_grad()
    def _plain_state(self) -> dict[str, Tensor]:
        """The state of the plain model, while the updates are merged."""
        taken = {
            (id(values), name): value
            for slots, value in self._trained_values()
            for values, name in slots
        }
        state: dict[str, Tensor] = self.model.state_dict()
        for path, module in self.model.named_modules(remove_duplicate=False):
            for values in (module._parameters, module._buffers):
                for name, own in values.items():
                    key = f"{path}.{name}" if path else name
                    if key in state and own is not None:
                        # A wrapper's parameters are its base's: the weight with the update.
                        state[key] = taken.get((id(values), name), own).detach()
        for name in [name for name in state if name.partition(".")[0] == NAME]:
            del state[name]
        return state


class GuardedSave:
    """Stands for the `save_pretrained` of an adapted model, or of a model in it."""

    def __init__(self, module: nn.Module, adapter: nn.Module) -> None:
        self.module, self.adapter = module, adapter
        self.own: Callable[..., Any] | None = module.__dict__.get(_SAVE)
        module.__dict__[_SAVE] = self

    def take_back(self) -> None:
        """Leaves the module as it was."""
        if self.module.__dict__.get(_SAVE) is self:
            del self.module.__dict__[_SAVE]
            if self.own is not None:
                self.module.__dict__[_SAVE] = self.own

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Who says which state is to be written knows what it is: Trainer's checkpoints, which load
        into an adapted model, say so."""
        handle = self.adapter.__dict__.get(HANDLE)  # none: it was detached out of order
        merged = handle is None or (handle._merged is not None and handle._merged.is_whole)
        if not merged and "state_dict" not in options and len(args) <= _BEFORE_STATE:
            raise ValueError(
                f"{_SAVE}: want a model without an adapter, or with all of it merged, got a "
                f"{type(self.module).__name__} that would load as its base alone; call att.save("
                "directory) for the adapter, att.save_merged(directory) for a plain model with the "
                "updates in its weights, or give state_dict=model.state_dict() for a checkpoint "
                "that an adapted model loads (att = pk.attachment(model))"
            )
        if handle is not None and not merged and handle._writes_alone(self.module):
            if options.get("is_main_process", True):
                state = args[_BEFORE_STATE] if len(args) > _BEFORE_STATE else options["state_dict"]
                handle._write_checkpoint(args[0] if args else options["save_directory"], state)
            return None
        own = self.own or getattr(type(self.module), _SAVE).__get__(self.module)
        return own(*args, **options)


def guard_saves(
    model: nn.Module, adapter: nn.Module, places: Sequence[nn.Module]
) -> list[GuardedSave]:
    """Guards the model and every model in it that holds an adapted module."""
    known = {id(module) for module in places}
    return [
        GuardedSave(module, adapter)
        for module in model.modules()
        if callable(getattr(module, _SAVE, None))
        and (module is model or any(id(part) in known for part in module.modules()))
    ]
