"""attach(model, config) -> Attachment: adapted layers in one model instance, and back.

Nothing is patched but the instance: projections are replaced by wrappers that share the original
parameters, layers get a subclass of their own class, and one module named `petal` holds the
adapter. `detach()` gives back the very objects.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf import files, merging
from petal_kernels.hf.config import PetalConfig
from petal_kernels.hf.layers import (
    LayerSlot,
    ModeGroup,
    ModeLinear,
    PetalAdapter,
    State,
    adapted_class,
    capture_cross,
    capture_self,
    enter_stack,
    leave_stack,
)
from petal_kernels.hf.report import Report, make_report
from petal_kernels.hf.specs import Found, LayerSite, find
from petal_kernels.nn.frozen_linear import FrozenLinear
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import PublishedModeLinear
from petal_kernels.nn.residual import ScaleShift

IMPLEMENTATIONS = ("fused", "published")
NAME = "petal"


def attach(
    model: nn.Module,
    config: PetalConfig | str | os.PathLike[str],
    *,
    implementation: str = "fused",
) -> Attachment:
    """Freezes `model`, adapts its layers in place and returns the handle of what was done.

    `config` is a PetalConfig, or the directory of a saved adapter. `implementation` is "fused" or
    "published" (the eager form of the papers over the same parameters: the reference).
    Raises ValueError where nothing matches, leaving the model as it was.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: want one of {IMPLEMENTATIONS}, got {implementation!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got a {type(model).__name__}")
    if getattr(model, NAME, None) is not None:
        raise ValueError(
            f"model: want a model without a {NAME!r} module, got one that has it (already "
            "attached? detach it first)"
        )
    saved = None
    if isinstance(config, (str, os.PathLike)):
        saved = files.read(config)
        config = saved.config
    if not isinstance(config, PetalConfig):
        raise TypeError(f"config: want a PetalConfig or a path, got a {type(config).__name__}")
    found = find(model, config)
    if saved is not None:
        saved.check_base(files.base_signature(found))
    attachment = Attachment(model, config, found, implementation)
    if saved is not None:
        try:
            attachment._load(saved)
        except BaseException:
            attachment.detach()
            raise
    return attachment


class Attachment:
    """What `attach` did to one model: report it, save it, merge it, take it back."""

    def __init__(
        self, model: nn.Module, config: PetalConfig, found: Found, implementation: str
    ) -> None:
        self.model, self.config, self.implementation = model, config, implementation
        self.found = found
        self.adapter = _build_adapter(found, config)
        published = implementation == "published"
        self._state = State(self.adapter, published=published, context=config.context == "batch")
        self._extra = _extra_modules(model, config, found)
        self._kept = [(p, p.detach().clone()) for m in self._extra.values() for p in m.parameters()]
        self._required = [(p, p.requires_grad) for p in model.parameters()]
        self._wrapped: list[tuple[nn.Module, str, FrozenLinear]] = []
        self._classes: list[tuple[nn.Module, type, type]] = []
        self._hooks: list[Any] = []
        self._marked: list[tuple[nn.Module, str]] = []
        self._groups: list[ModeGroup] = []
        self._merged: merging.Merged | None = None
        self._attached = True
        self._install()

    def _install(self) -> None:
        self.model.requires_grad_(False)
        for module in self._extra.values():
            module.requires_grad_(True)
        self.adapter.train(self.model.training)
        self.model.add_module(NAME, self.adapter)
        self._mark(self.found.stack, "_petal_state", self._state)
        hook = self.found.stack.register_forward_pre_hook(enter_stack, with_kwargs=True)
        self._hooks.append(hook)
        hook = self.found.stack.register_forward_hook(leave_stack, always_call=True)
        self._hooks.append(hook)
        for site in self.found.layers:
            self._install_layer(site)

    def _install_layer(self, site: LayerSite) -> None:
        slot = LayerSlot(self._state, site.index, _mode_slices(site))
        slot.self_pair = self.config.scale_shift
        slot.cross_pair = (
            self.config.scale_shift
            and bool(self.config.use_cross_residual)
            and site.cross_block is not None
        )
        groups: dict[str, ModeGroup] = {}
        for found in site.sites:
            row = found.row
            if self._state.published:
                factors = self.adapter.branch(row.branch)
                wrapper: FrozenLinear = PublishedModeLinear(found.base, factors, found.mode)
            else:
                if row.group not in groups:
                    groups[row.group] = ModeGroup(slot, row.group, row.branch)
                wrapper = ModeLinear(found.base, groups[row.group], found.mode)
            setattr(found.parent, row.child, wrapper)
            self._wrapped.append((found.parent, row.child, wrapper))
        self._groups += groups.values()
        self._mark(site.layer, "_petal_slot", slot)
        self._mark(site.self_block, "_petal_slot", slot)
        self._hooks.append(site.self_block.register_forward_hook(capture_self))
        if site.cross_block is not None:
            self._mark(site.cross_block, "_petal_slot", slot)
            self._hooks.append(site.cross_block.register_forward_hook(capture_cross))
        own = type(site.layer)
        site.layer.__class__ = adapted_class(own)
        self._classes.append((site.layer, own, type(site.layer)))
        self._state.layers.append(site.layer)

    def _mark(self, module: nn.Module, name: str, value: object) -> None:
        module.__dict__[name] = value
        self._marked.append((module, name))

    # -- parameters ---------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters: the adapter's and those of modules_to_save."""
        for name, parameter in self.adapter.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
        for path, module in self._extra.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{files.EXTRA}.{path}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """All stored tensors, shared factors once; the very storages, not copies."""
        state = dict(self.adapter.state_dict())
        for path, module in self._extra.items():
            for name, tensor in module.state_dict().items():
                state[f"{files.EXTRA}.{path}.{name}"] = tensor
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` in; ValueError on any missing, unexpected or mis-shaped tensor."""
        files.check_tensors("state_dict", state, self.state_dict())
        self._copy_in(state)

    def _copy_in(self, state: dict[str, Tensor]) -> None:
        self._need_attached("load")
        if self._merged is not None:
            raise RuntimeError("load: the adapter is merged; call unmerge() first")
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(state[name])

    # -- files --------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes adapter.safetensors and adapter_config.json into `directory`, each atomically."""
        self._need_attached("save")
        files.write(directory, self.config, files.base_signature(self.found), self.state_dict())

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Loads a saved adapter of the same configuration into this attachment."""
        saved = files.read(directory)
        saved.check_base(files.base_signature(self.found))
        saved.check_config(self.config)
        self._load(saved)

    def _load(self, saved: files.Saved) -> None:
        saved.check_tensors(self.state_dict())
        self._copy_in(saved.tensors)

    # -- report -------------------------------------------------------------------------------

    def report(self) -> Report:
        """A table of what was replaced, on which backend it runs and what it trains."""
        self._need_attached("report")
        return make_report(self.model, self.adapter, self._extra, self.found, self.implementation)

    # -- switching, merging, detaching ----------------------------------------------------------

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it did before `attach`."""
        self._need_attached("disabled")
        was_merged, enabled = self._merged is not None, self._state.enabled
        if was_merged:
            self.unmerge()
        trained = [parameter.detach().clone() for parameter, _ in self._kept]
        self._state.enabled = False
        _set_enabled(self._wrapped, False)
        _copy_back(self._kept)
        try:
            yield
        finally:
            self._state.enabled = enabled
            _set_enabled(self._wrapped, enabled)
            with torch.no_grad():
                for (parameter, _), value in zip(self._kept, trained, strict=True):
                    parameter.copy_(value)
            if was_merged:
                self.merge()

    def merge(self) -> merging.MergeReport:
        """Folds every update into its base weight where that is exact; the originals are kept.

        The scale/shift residual and the context are not linear maps of a projection's input: they
        stay as modules and are listed in the result, with the rounding of a 16-bit base.
        """
        self._need_attached("merge")
        if self._merged is not None:
            raise RuntimeError("merge: already merged")
        self._merged = merging.merge(self)
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


def _build_adapter(found: Found, config: PetalConfig) -> PetalAdapter:
    adapter = PetalAdapter()
    first = found.sites()[0].base
    device = next((p.device for p in first.parameters()), torch.device("cpu"))
    for branch in ("text", "image"):
        sites = found.sites(branch)
        if not sites:
            continue
        shapes = {site.shape for site in sites}
        if len(shapes) != 1:
            raise ValueError(
                f"model: want one (in, out) shape for all {branch} projections, which share their "
                f"factors, got {sorted(shapes)}"
            )
        d_in, d_out = shapes.pop()
        adapter.branches[branch] = ModeApproximation(
            d_in,
            d_out,
            config.r,
            len(sites),
            core=str(config.core),
            scale=config.scale,
            dropout=config.dropout,
            device=device,
            dtype=config.dtype,
        )
    if config.scale_shift:
        for layer in found.layers:
            adapter.layers[str(layer.index)] = _pairs(layer, found, config, device)
    return adapter


def _pairs(
    layer: LayerSite, found: Found, config: PetalConfig, device: torch.device
) -> nn.ModuleDict:
    """The scale/shift pairs of a layer; those that never act are stored, frozen, in "release"."""
    width = _hidden_width(found)
    pairs = nn.ModuleDict({"self": ScaleShift(width, device=device, dtype=config.dtype)})
    live = bool(config.use_cross_residual) and layer.cross_block is not None
    if live or config.variant == "release":
        pairs["cross"] = ScaleShift(width, device=device, dtype=config.dtype)
        pairs["cross"].requires_grad_(live)
    return pairs


def _hidden_width(found: Found) -> int:
    """Width of the blocks' outputs: what the LayerNorm at the end of the self block normalises."""
    for module in reversed(list(found.layers[0].self_block.modules())):
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[0])
    raise ValueError(
        f"{found.layers[0].path}: want a LayerNorm in the self-attention block, got none"
    )


def _mode_slices(site: LayerSite) -> dict[str, slice]:
    slices = {}
    for branch in ("text", "image"):
        modes = [found.mode for found in site.sites if found.row.branch == branch]
        if modes:
            assert modes == list(range(modes[0], modes[0] + len(modes)))
            slices[branch] = slice(modes[0], modes[0] + len(modes))
    return slices


def _extra_modules(model: nn.Module, config: PetalConfig, found: Found) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names, by path."""
    extra: dict[str, nn.Module] = {}
    for name in config.modules_to_save or []:
        matches = {
            path: module
            for path, module in model.named_modules()
            if path == name or path.endswith("." + name)
        }
        if not matches:
            raise ValueError(f"modules_to_save: want names of modules of the model, got {name!r}")
        extra.update(matches)
    adapted = {id(site.base) for site in found.sites()}
    for path, module in extra.items():
        if any(id(child) in adapted for child in module.modules()):
            raise ValueError(
                f"modules_to_save: want modules without adapted projections, got {path!r}"
            )
    return extra


def _set_enabled(wrapped: list[tuple[nn.Module, str, FrozenLinear]], enabled: bool) -> None:
    for _, _, wrapper in wrapped:
        if isinstance(wrapper, PublishedModeLinear):
            wrapper.enabled = enabled


@torch.no_grad()
def _copy_back(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in kept:
        parameter.copy_(value)
