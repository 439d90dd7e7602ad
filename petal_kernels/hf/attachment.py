"""What every method does to a model: freeze, install, report, save, merge, and give it back.

Nothing is patched but the instance. One module named `petal` on the model holds the adapter;
`detach()` gives back the very objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf import files, tensors
from petal_kernels.hf.blocks import Blocks
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.found import Found, Place
from petal_kernels.hf.merging import (
    ALL,
    HANDLE,
    Merged,
    MergeReport,
    leave_merged_out,
    merge,
    need_no_merged,
)
from petal_kernels.hf.method import Method
from petal_kernels.hf.names import prefixes_of
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
from petal_kernels.hf.walk import is_a, joined, parent_of, uses_of
from petal_kernels.hf.whole import Copies, CopyPart, extra_modules, offloaded
from petal_kernels.hf.wrappers import AdaptedLinear
from petal_kernels.nn.frozen_linear import FrozenLinear

NAME = "petal"


class Attachment(Blocks, Routed):
    """What `attach` did to one model: report it, save it, merge it, take it back."""

    def __init__(self, model: nn.Module, method: Method, implementation: str) -> None:
        self.model, self.method, self.implementation = model, method, implementation
        self.config: AdapterConfig = method.config
        self.adapter = method.adapter
        self._wrapped: list[tuple[Place, nn.Module, str, AdaptedLinear]] = []
        self._again: list[tuple[nn.Module, str, AdaptedLinear]] = []  # other uses of these
        self._taken: list[tuple[nn.Module, type, Any]] = []  # with its class and own `forward`
        self._guards: set[int] = set()  # of those, modules that may be replaced: nothing is lost
        self._merged: Merged | None = None
        adapted = [place.module for place in method.found.places]
        self._named = extra_modules(model, self.config.modules_to_save, adapted)
        self._required = {
            name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)
        }
        self._shapes: dict[str, torch.Size] = {}  # of all that is stored, once it is all there
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

    @property
    def found(self) -> Found:
        """The places that are adapted."""
        return self.method.found

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
                self._again.append((other, name, wrapper))

    def _train_whole(self) -> None:
        """Copies of everything that is trained whole, wherever its parameters are used."""
        copies = Copies()
        wanted: dict[int, tuple[str, nn.Module]] = {}
        for path, root in (self.method.trained() | self._named).items():
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
        adapted = {id(place.module) for place in self.found.places}
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
            self._guards.add(id(embeddings))

    # -- parameters -------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters: the adapter's and those of modules trained whole."""
        self._check_places("named_parameters")
        for name, parameter in self.adapter.named_parameters():
            if parameter.requires_grad:
                yield self._stored(name), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """All stored tensors, shared ones once; the very storages, not copies."""
        state = {
            name.removeprefix(ALL): value
            for name, value in self.adapter.state_dict(prefix=ALL).items()
        }
        for name, value in state.items():
            if value.is_meta:
                state[name] = offloaded(value, *parent_of(self.adapter, name))
        return {self._stored(name): value for name, value in state.items()}

    def _stored(self, name: str) -> str:
        """A tensor's name in files, from that in the adapter."""
        prefix, _, rest = name.partition(".")
        copies = self.adapter._modules.get(tensors.EXTRA)
        if prefix != tensors.EXTRA or not isinstance(copies, Copies):
            return name
        holder, _, rest = rest.partition(".")
        path = next(path for path, own in copies.paths.items() if own == holder)
        return f"{tensors.EXTRA}.{path}.{rest}"

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
        self._check_places("load")
        if self._merged is not None:
            raise RuntimeError("load: the adapter is merged; call unmerge() first")
        tensors.copy_in("load", own, state)

    # -- files ------------------------------------------------------------------------------------

    def signature(self) -> dict[str, Any]:
        """What the adapter needs of its base, as stored with it."""
        return self.method.signature()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes adapter.safetensors and petal_config.json into `directory`, as one step.

        Whatever interrupts it, the directory loads as the adapter that was there or as this one.
        A model under `fully_shard` is gathered: then every process calls this.
        """
        self._need_attached("save")
        self._check_places("save")
        files.write(directory, self.config, self.signature(), self.state_dict(), self._shapes)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Loads a saved adapter of the same configuration into this attachment."""
        saved = files.read(directory)
        saved.check_config(self.config)
        saved.check_base(self.signature())
        self._load(saved)

    def _load(self, saved: files.Saved) -> None:
        own = self._loadable()
        wanted, prefixes = own | self._aliases(own), prefixes_of(self.model)
        values = saved.tensors_for(wanted, prefixes, mirrors=self.method.mirrors)
        self._copy_in(own, values)

    def _aliases(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Other names of shared tensors, under which older files hold them once more."""
        return {}

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

    def merge(self) -> MergeReport:
        """Folds every update into its base weight where that is exact; the originals are kept.

        What is not a linear map of a module's own input stays as a module and is listed in the
        result, with the rounding of a 16-bit base.
        """
        self._need_attached("merge")
        self._check_places("merge")
        if self._merged is not None:
            raise RuntimeError("merge: already merged")
        why = self.method.why_not_merge()
        if why:
            raise ValueError(f"merge: {why}")
        self._merged = merge(
            self.method, [(place.path, wrapper) for place, _, _, wrapper in self._wrapped]
        )
        self._merged.report.kept.update(dict.fromkeys(self.whole(), "trained whole"))
        for each in self._merged.folded:
            each.wrapper.__dict__["partly"] = not self._merged.is_whole
        return self._merged.report

    def unmerge(self) -> None:
        """Puts the original weights back: the very Parameter objects."""
        if self._merged is None:
            raise RuntimeError("unmerge: not merged")
        self._merged.undo()
        self._merged = None

    def merge_and_unload(self) -> nn.Module:
        """The model with every update in its weights and nothing of the adapter left.

        What `detach` gives is the model that came in. ValueError, and nothing changed, where the
        method keeps modules that no weight can hold (`merge` lists them).
        """
        merged = self._merged is not None
        if not merged:
            self.merge()
        assert self._merged is not None
        if not self._merged.is_whole:
            kept = list(self._merged.report.kept.items())
            if not merged:
                self.unmerge()
            raise ValueError(
                f"merge_and_unload: want a method whose updates all fold into weights, got "
                f"{len(kept)} parts that stay (first: {kept[0][0]}, {kept[0][1]})"
            )
        self._merged = None  # its weights stay
        return self.detach()

    def whole(self) -> list[str]:
        """The paths of what is trained whole, as it was named or as the method chose it."""
        return list(self.method.trained() | self.method.trained_biases() | self._named)

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
        for parent, child, wrapper in (*places, *self._again):
            if parent._modules.get(child) is wrapper:  # else somebody put another one there
                setattr(parent, child, wrapper.base)
        if NAME in self.model._modules:
            delattr(self.model, NAME)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._required:
                parameter.requires_grad_(self._required[name])
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
            if id(module) not in there and id(module) not in self._guards
        ]
        if gone:
            raise RuntimeError(
                f"{what}: {len(gone)} adapted modules were replaced since attach (first: "
                f"{gone[0]}); detach and attach again after a new head or resized embeddings"
            )
