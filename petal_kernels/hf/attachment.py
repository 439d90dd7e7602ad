"""What every method does to a model: freeze, install, report, save, merge, and give it back.

Nothing is patched but the instance. One module named `petal` on the model holds the adapter;
`detach()` gives back the very objects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petal_kernels.hf import tensors
from petal_kernels.hf.blocks import Blocks
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.found import Found, Place
from petal_kernels.hf.merging import (
    HANDLE,
    NAME,
    Merged,
    leave_merged_out,
    need_no_merged,
)
from petal_kernels.hf.method import Method
from petal_kernels.hf.parts import (
    Adapted,
    Both,
    FrozenVectors,
    LayerPart,
    Part,
    PatchedForward,
    Readable,
    adapted_class,
    holds,
    own_class,
)
from petal_kernels.hf.report import Report, make_report
from petal_kernels.hf.routing import Routed
from petal_kernels.hf.stored import Stored
from petal_kernels.hf.unloading import GuardedSave, Unloading, guard_saves
from petal_kernels.hf.walk import is_a, joined, parent_of, uses_of
from petal_kernels.hf.whole import Copies, CopyPart, extra_modules
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.frozen_linear import FrozenLinear


class Attachment(Blocks, Routed, Stored, Unloading):
    """What `attach` did to one model: report it, save it, merge it, take it back."""

    def __init__(self, model: nn.Module, method: Method, implementation: str) -> None:
        self.model, self.method, self.implementation = model, method, implementation
        self.config: AdapterConfig = method.config
        self.adapter = method.adapter
        self._wrapped: list[tuple[Place, nn.Module, str, AdaptedLinear]] = []
        self._other_uses: list[tuple[nn.Module, str, AdaptedLinear]] = []  # where these stand, too
        self._taken: list[tuple[nn.Module, type, Any]] = []  # its class, `forward` of its own
        self._replaceable: set[int] = set()  # ids of those taken that may be lost
        self._saves: list[GuardedSave] = []
        self._merged: Merged | None = None
        adapted = [place.module for place in method.found.places]
        self._modules_to_save = extra_modules(model, self.config.modules_to_save, adapted)
        self._requires_grad = {
            name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)
        }
        self.shapes: dict[str, torch.Size] = {}  # of all that is stored, once it is all there
        self._attached = True
        model.requires_grad_(False)
        self._train_whole()
        self._uses = uses_of(model)
        method.install(self)
        self._uses = {}
        self._bind_copies()
        self._guard_embeddings()
        self.adapter.train(model.training)
        self.adapter.__dict__[HANDLE] = self
        self.adapter._register_state_dict_hook(leave_merged_out)
        self.adapter.register_load_state_dict_pre_hook(need_no_merged)
        model.add_module(NAME, self.adapter)
        self._saves = guard_saves(model, self.adapter, self._changed())

    @property
    def found(self) -> Found:
        """The places that are adapted."""
        return self.method.found

    def wrappers(self) -> list[tuple[str, AdaptedLinear]]:
        """What stands in the linears' places, by path."""
        return [(place.path, wrapper) for place, _, _, wrapper in self._wrapped]

    def _changed(self) -> list[nn.Module]:
        """All modules that compute something else than they did."""
        taken = [m for m, _, _ in self._taken if type(m.__dict__["_petal"]) is not FrozenVectors]
        return [*(wrapper for _, _, _, wrapper in self._wrapped), *taken]

    # -- installing (what a method's `install` calls) ---------------------------------------------

    def take(self, module: nn.Module, part: Part, mixin: type = Adapted) -> None:
        """Lets `module` take part, around the parts that it has from this attachment."""
        before = module.__dict__.get("_petal")
        if before is not None:
            if not any(module is own for own, _, _ in self._taken):
                raise ValueError(
                    f"model: want layers without an adapter, got a {type(module).__name__} that "
                    "another attachment or pk.fuse runs; detach that, or pk.unfuse the model, first"
                )
            module.__dict__["_petal"] = Both(part, before)
            if mixin is not Adapted:
                module.__class__ = adapted_class(own_class(module), mixin)
            return
        forward = module.__dict__.get("forward")
        self._taken.append((module, type(module), forward))
        self._replaceable |= set() if part.needed else {id(module)}
        module.__dict__["_petal"] = part
        module.__class__ = adapted_class(type(module), mixin)
        if forward is not None:
            module.__dict__["forward"] = PatchedForward(module, forward)

    def wrap(self, place: Place, wrapper: AdaptedLinear) -> None:
        """Puts `wrapper` where the place's linear stands."""
        if isinstance(place.module, FrozenLinear):
            raise ValueError(
                f"model: want linears without an adapter, got one at {place.path}; detach that "
                "first"
            )
        parent, child = parent_of(self.model, place.path)
        setattr(parent, child, wrapper)
        self._wrapped.append((place, parent, child, wrapper))
        # Wherever else the same module is used.
        for other, name in self._uses[id(place.module)]:
            if (other, name) != (parent, child):
                setattr(other, name, wrapper)
                self._other_uses.append((other, name, wrapper))

    def _train_whole(self) -> None:
        """Copies of everything that is trained whole, wherever its parameters are used."""
        copies = Copies()
        wanted: dict[int, tuple[str, nn.Module]] = {}
        for path, root in (self.method.trained() | self._modules_to_save).items():
            for name, module in root.named_modules(prefix=path):
                wanted.setdefault(id(module), (name, module))
        trained = {id(p) for _, m in wanted.values() for p in m._parameters.values()}
        for path, module in self.model.named_modules():
            if any(id(p) in trained for p in module._parameters.values() if p is not None):
                wanted.setdefault(id(module), (path, module))
        for path, module in wanted.values():
            names = [n for n, p in module._parameters.items() if p is not None and id(p) in trained]
            if names or module._buffers:
                self._run_with_copies(module, copies.hold(path, module, names))
        self._train_biases(copies)
        if copies.paths:
            self.adapter.add_module(tensors.EXTRA, copies)

    def _train_biases(self, copies: Copies) -> None:
        """Copies of biases: an adapted linear's wrapper adds them, other modules read them."""
        adapted = {id(place.module) for place in self.found.places}
        for path, module in self.method.trained_biases().items():
            if id(module) in adapted:
                part = copies.hold(path, module, ["bias"], buffers=False)
                self.method.biases[path] = part.held("bias")[0]
                continue
            parameters = module._parameters.items()
            names = [n for n, p in parameters if p is not None and "bias" in joined(path, n)]
            self._run_with_copies(module, copies.hold(path, module, names, buffers=False))

    def _run_with_copies(self, module: nn.Module, part: CopyPart) -> None:
        """Lets a module run with its copies."""
        part.method = self.method
        module.__dict__["_petal_copy"] = part
        self.take(module, part, Readable)

    def _bind_copies(self) -> None:
        """Layers that hold a trained copy bind their call too, where nothing else of them is
        adapted: their recompute must know whether the copy ran."""
        copies = self.copies()
        for path in () if copies is None else copies.paths:
            while path:
                module = self.model.get_submodule(path)
                # Whether or not checkpointing is on yet.
                layered = is_a(module, "GradientCheckpointingLayer")
                if layered and not holds(module.__dict__.get("_petal"), LayerPart):
                    self.take(module, LayerPart(self.method, -1, -1))
                path = path.rpartition(".")[0]

    def _guard_embeddings(self) -> None:
        """Lets checkpointed models compile: see `FrozenVectors`."""
        find = getattr(self.found.root, "get_input_embeddings", None)
        try:
            embeddings = None if find is None else find()
        except (AttributeError, NotImplementedError):
            return  # a model without words
        if isinstance(embeddings, nn.Module) and not isinstance(embeddings, Adapted):
            self.take(embeddings, FrozenVectors())

    # -- report, merge, detach --------------------------------------------------------------------

    def report(self, tokens: tuple[int, int] = (8, 128)) -> Report:
        """A table of what was replaced, on which backend it runs and what it trains.

        Backends are those of a call made here: in this grad mode, under this autocast and backend,
        with `tokens` (samples, tokens of each) as input. Nothing runs, and hooks of the adapted
        linears see nothing.
        """
        self._need_attached("report")
        self._check_places("report")
        wrappers = {place.path: wrapper for place, _, _, wrapper in self._wrapped}
        whole, how = self.whole(), self.implementation
        return make_report(self.model, self.method, wrappers, whole, how, tokens)

    def named_whole(self) -> list[str]:
        """The paths of what `modules_to_save` means, without what lies in another of them."""
        return [
            path
            for path in self._modules_to_save
            if not any(path.startswith(f"{p}.") for p in self._modules_to_save)
        ]

    def used_again(self) -> list[str]:
        """The paths of adapted linears that the model uses in several places."""
        again = {id(wrapper) for _, _, wrapper in self._other_uses}
        return [place.path for place, _, _, wrapper in self._wrapped if id(wrapper) in again]

    def whole(self) -> list[str]:
        """The paths of what is trained whole, as it was named or as the method chose it."""
        return list(self.method.trained() | self.method.trained_biases() | self._modules_to_save)

    def detach(self) -> nn.Module:
        """Gives back the model as it came in: modules, classes, weights and requires_grad.

        A merged adapter is unmerged first; `merge_and_unload` gives the merged model.
        """
        self._need_attached("detach")
        ours = {m: (adapted_class(own), adapted_class(own, Readable)) for m, own, _ in self._taken}
        changed = [module for module, classes in ours.items() if type(module) not in classes]
        if changed:
            raise RuntimeError(
                f"detach: the class of {len(changed)} layers was changed since attach (first: "
                f"{type(changed[0]).__name__}); undo that first"
            )
        if self._merged is not None:
            self.unmerge()
        for module, own, forward in self._taken:
            module.__class__ = own
            for name in [name for name in module.__dict__ if name.startswith("_petal")]:
                del module.__dict__[name]
            if forward is not None and isinstance(module.__dict__["forward"], PatchedForward):
                module.__dict__["forward"] = forward
        places = [(parent, child, wrapper) for _, parent, child, wrapper in self._wrapped]
        for parent, child, wrapper in (*places, *self._other_uses):
            if parent._modules.get(child) is wrapper:  # else somebody put another one there
                setattr(parent, child, wrapper.base)
        for save in self._saves:
            save.take_back()
        if NAME in self.model._modules:
            delattr(self.model, NAME)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        self.adapter.__dict__.pop(HANDLE, None)
        self.method.routings.clear()
        self._attached = False
        return self.model

    def _need_attached(self, what: str) -> None:
        if not self._attached:
            raise RuntimeError(f"{what}: this attachment was detached")

    def _check_places(self, what: str) -> None:
        """RuntimeError where a module that was adapted is no longer in the model."""
        there = {id(module) for module in self.model.modules()}
        gone = [place.path for place, _, _, wrapper in self._wrapped if id(wrapper) not in there]
        gone += [
            own.__name__
            for module, own, _ in self._taken
            if id(module) not in there and id(module) not in self._replaceable
        ]
        if gone:
            raise RuntimeError(
                f"{what}: {len(gone)} adapted modules were replaced since attach (first: "
                f"{gone[0]}); detach and attach again after a new head or resized embeddings"
            )
