"""What one adapter puts into a model's modules, and how it is taken out and put back.

Taking out leaves every module as it was before; putting back restores the very parts, wrappers and
classes. So an adapter that waits while another one is active costs nothing but its memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petal_kernels.hf import tensors
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.found import Place
from petal_kernels.hf.frozen import Watch
from petal_kernels.hf.merging import HANDLE, NAME, leave_merged_out, need_all, need_no_merged
from petal_kernels.hf.method import Method
from petal_kernels.hf.parts import (
    Adapted,
    Both,
    FrozenVectors,
    Gone,
    LayerPart,
    Part,
    PatchedForward,
    Readable,
    adapted_class,
    own_class,
    within,
)
from petal_kernels.hf.unloading import GuardedSave, guard_saves
from petal_kernels.hf.walk import is_a, joined, parent_of, uses_of
from petal_kernels.hf.whole import Copies, CopyPart, extra_modules
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.frozen_linear import FrozenLinear


class Installed:
    """One adapter of a model: its method, its module, and what it did to the model's own."""

    def __init__(self, model: nn.Module, method: Method, implementation: str) -> None:
        self.model, self.method, self.implementation = model, method, implementation
        self.config: AdapterConfig = method.config
        self.adapter = method.adapter
        self.wrapped: list[tuple[Place, nn.Module, str, AdaptedLinear]] = []
        self.again: list[tuple[nn.Module, str, AdaptedLinear]] = []  # other uses of these
        self.taken: list[tuple[nn.Module, type, Any]] = []  # with its class and own `forward`
        self.guards: set[int] = set()  # of those, modules that may be replaced: nothing is lost
        self.saves: list[GuardedSave] = []
        self.shapes: dict[str, torch.Size] = {}  # of all that is stored, once it is all there
        adapted = [place.module for place in method.found.places]
        self.named = extra_modules(model, self.config.modules_to_save, adapted)
        self.loaded = ""  # a digest of the file's values that it was last given
        # Of `taken`, while it is out: the mixins, and what the modules' dictionaries held.
        self._out: list[tuple[type, dict[str, Any]]] | None = None
        self._device: torch.device | None = None  # of the model's first parameter, then

    def install(self, handle: object) -> None:
        """Puts everything in for the first time; the model is frozen already."""
        self._train_whole()
        self._uses = uses_of(self.model)
        self.method.install(self)
        self._uses = {}
        self._bind_copies()
        self._watch()
        self._guard_embeddings()
        self.adapter._register_state_dict_hook(leave_merged_out)
        for hook in (need_no_merged, need_all):
            self.adapter.register_load_state_dict_pre_hook(hook)
        self._register(handle)

    def places(self) -> list[nn.Module]:
        """All modules that compute something else than they did."""
        taken = [m for m, _, _ in self.taken if type(m.__dict__["_petal"]) is not FrozenVectors]
        return [*(wrapper for _, _, _, wrapper in self.wrapped), *taken]

    # -- installing (what a method's `install` calls) ---------------------------------------------

    def take(self, module: nn.Module, part: Part, mixin: type = Adapted) -> None:
        """Lets `module` take part, around the parts that it has from this adapter."""
        before = module.__dict__.get("_petal")
        if before is not None:
            if not any(module is own for own, _, _ in self.taken):
                raise ValueError(
                    f"model: want layers without an adapter, got a {type(module).__name__} that "
                    "another attachment or pk.fuse runs; detach that, or pk.unfuse the model, first"
                )
            module.__dict__["_petal"] = Both(part, before)
            if mixin is not Adapted:
                module.__class__ = adapted_class(own_class(module), mixin)
            return
        forward = module.__dict__.get("forward")
        self.taken.append((module, type(module), forward))
        self.guards |= set() if part.needed else {id(module)}
        module.__dict__["_petal"] = part
        module.__class__ = adapted_class(type(module), mixin)
        if forward is not None:
            module.__dict__["forward"] = PatchedForward(module, forward)

    def wrap(self, place: Place, wrapper: AdaptedLinear) -> None:
        """Puts `wrapper` where the place's linear stands."""
        if isinstance(place.module, FrozenLinear):
            raise ValueError(
                f"model: want linears without an adapter, got one at {place.path}; detach that "
                "first (pk.attachment(model) of the model that has it is its handle)"
            )
        if any(map(tensors.is_sharded, place.module._parameters.values())):
            raise ValueError(
                f"model: want linears whose inputs and outputs are whole, got one at {place.path} "
                "that tensor parallelism splits (its weight is a DTensor); adapt layers that are "
                "not split, or let PEFT adapt the model and call pk.fuse"
            )
        parent, child = parent_of(self.model, place.path)
        setattr(parent, child, wrapper)
        self.wrapped.append((place, parent, child, wrapper))
        # Wherever else the same module is used.
        for other, name in self._uses[id(place.module)]:
            if (other, name) != (parent, child):
                setattr(other, name, wrapper)
                self.again.append((other, name, wrapper))

    def _train_whole(self) -> None:
        """Copies of everything that is trained whole, wherever its parameters are used."""
        copies = Copies()
        wanted: dict[int, tuple[str, nn.Module]] = {}
        for path, root in (self.method.trained() | self.named).items():
            for name, module in root.named_modules(prefix=path):
                wanted.setdefault(id(module), (name, module))
        trained = {id(p) for _, m in wanted.values() for p in m._parameters.values()}
        for path, module in self.model.named_modules():
            if any(id(p) in trained for p in module._parameters.values() if p is not None):
                wanted.setdefault(id(module), (path, module))
        for path, module in wanted.values():
            names = [n for n, p in module._parameters.items() if p is not None and id(p) in trained]
            if names or module._buffers:
                self._read(module, copies.hold(path, module, names))
        self._train_biases(copies)
        if copies.paths:
            self.adapter.add_module(tensors.EXTRA, copies)

    def _train_biases(self, copies: Copies) -> None:
        """Copies of biases: an adapted linear's wrapper adds them, other modules read them."""
        adapted = {id(place.module) for place in self.method.found.places}
        for path, module in self.method.trained_biases().items():
            if id(module) in adapted:
                part = copies.hold(path, module, ["bias"], buffers=False)
                self.method.biases[path] = part.held("bias")[0]
                continue
            parameters = module._parameters.items()
            names = [n for n, p in parameters if p is not None and "bias" in joined(path, n)]
            self._read(module, copies.hold(path, module, names, buffers=False))

    def _read(self, module: nn.Module, part: CopyPart) -> None:
        """Lets a module run with its copies."""
        part.method = self.method
        module.__dict__["_petal_copy"] = part
        self.take(module, part, Readable)

    def _bind_copies(self) -> None:
        """Layers that hold a trained copy bind their call too, where nothing else of them is
        adapted: their recompute must know whether the copy ran."""
        copies = self.adapter._modules.get(tensors.EXTRA)
        for path in copies.paths if isinstance(copies, Copies) else ():
            while path:
                module = self.model.get_submodule(path)
                # Whether or not checkpointing is on yet.
                layered = is_a(module, "GradientCheckpointingLayer")
                if layered and within(module.__dict__.get("_petal"), LayerPart) is None:
                    self.take(module, LayerPart(self.method, -1, -1))
                path = path.rpartition(".")[0]

    def _watch(self) -> None:
        """Lets the first layer look whether somebody froze the adapter."""
        parts = (within(module.__dict__["_petal"], LayerPart) for module, _, _ in self.taken)
        first = next((part for part in parts if part is not None), None)
        if first is not None:
            first.watch = Watch(self.method)

    def _guard_embeddings(self) -> None:
        """Lets checkpointed models compile: see `FrozenVectors`."""
        find = getattr(self.method.found.root, "get_input_embeddings", None)
        try:
            embeddings = None if find is None else find()
        except (AttributeError, NotImplementedError):
            return  # a model without words
        if isinstance(embeddings, nn.Module) and not isinstance(embeddings, Adapted):
            self.take(embeddings, FrozenVectors())

    def _register(self, handle: object) -> None:
        """The adapter at the model's root, with the handle of it."""
        self.adapter.train(self.model.training)
        self.adapter.__dict__[HANDLE] = handle
        self.model.add_module(NAME, self.adapter)
        self.saves = guard_saves(self.model, self.adapter, self.places())

    # -- taking out and putting back --------------------------------------------------------------

    def check_taken(self, what: str) -> None:
        """RuntimeError where somebody changed the class of a module that takes part."""
        ours = {m: (adapted_class(own), adapted_class(own, Readable)) for m, own, _ in self.taken}
        changed = [module for module, classes in ours.items() if type(module) not in classes]
        if changed:
            raise RuntimeError(
                f"{what}: the class of {len(changed)} layers was changed since attach (first: "
                f"{type(changed[0]).__name__}); undo that first"
            )

    def check_forwards(self, what: str) -> None:
        """RuntimeError where somebody put a forward on a module that takes part: it calls what was
        there, the adapter's."""
        for module, own, forward in self.taken:
            now = module.__dict__.get("forward")
            if now is not None and not (forward is not None and isinstance(now, PatchedForward)):
                raise RuntimeError(
                    f"{what}: the forward of a {own.__name__} was replaced since the adapter is "
                    "active; undo that first, and replace it before attach"
                )

    def take_out(self) -> None:
        """Leaves every module as it was. It may be called on what is installed in part."""
        out = []
        for module, own, forward in self.taken:
            mixin, module.__class__ = type(module).__mro__[1], own
            held = {k: v for k, v in module.__dict__.items() if k.startswith("_petal")}
            for name in held:
                del module.__dict__[name]
            if forward is not None and isinstance(module.__dict__["forward"], PatchedForward):
                module.__dict__["forward"] = forward
            out.append((mixin, held))
        places = [(parent, child, wrapper) for _, parent, child, wrapper in self.wrapped]
        for parent, child, wrapper in (*places, *self.again):
            if parent._modules.get(child) is wrapper:  # else somebody put another one there
                setattr(parent, child, wrapper.base)
        for save in self.saves:
            save.take_back()
        if NAME in self.model._modules:
            delattr(self.model, NAME)
        self._out, self._device = out, self._first_device()

    def put_back(self, handle: object) -> None:
        """Undoes `take_out`; RuntimeError, and nothing changed, where the model is no longer the
        one that it was taken out of."""
        assert self._out is not None
        self._check_free()
        for (module, own, forward), (mixin, held) in zip(self.taken, self._out, strict=True):
            module.__dict__.update(held)
            module.__class__ = adapted_class(own, mixin)
            if forward is not None:
                module.__dict__["forward"] = PatchedForward(module, forward)
        self._out = None
        places = [(parent, child, wrapper) for _, parent, child, wrapper in self.wrapped]
        for parent, child, wrapper in (*places, *self.again):
            setattr(parent, child, wrapper)
            wrapper.train(wrapper.base.training)
        device = self._first_device()
        if device is not None and device != self._device:
            self.adapter.to(device)  # where `.to` brought the model meanwhile
        self._register(handle)

    def _first_device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.model.parameters()), None)

    def _check_free(self) -> None:
        places = [(parent, child, wrapper) for _, parent, child, wrapper in self.wrapped]
        there = {id(module) for module in self.model.modules()}
        gone = [
            type(wrapper.base).__name__
            for parent, child, wrapper in (*places, *self.again)
            if parent._modules.get(child) is not wrapper.base
        ]
        gone += [
            own.__name__
            for module, own, forward in self.taken
            if type(module) is not own
            or module.__dict__.get("forward") is not forward
            or id(module) not in there | self.guards
        ]
        if gone:
            raise RuntimeError(
                f"switch: {len(gone)} modules that the adapter changes were replaced or changed "
                f"since it was active (first: a {gone[0]}); undo that, or add the adapter again"
            )

    def mark_gone(self, other: Installed) -> None:
        """Lets the layers whose recompute `other` serves, and that this one leaves alone, refuse to
        be run again without it."""
        for module, _, _ in other.taken:
            if "_petal" not in module.__dict__ and is_a(module, "GradientCheckpointingLayer"):
                self.take(module, Gone())
