"""PETAL attached: projections by wrappers that share the original parameters, layers by a subclass
of their own class, blocks by hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petal_kernels.hf.config import PetalConfig
from petal_kernels.hf.experts import RoutedAttachment, Routings
from petal_kernels.hf.merging import Merged
from petal_kernels.hf.petal import merging
from petal_kernels.hf.petal.experts import (
    build_experts,
    enter_model,
    leave_model,
    serve_embeddings,
)
from petal_kernels.hf.petal.layers import (
    LayerSlot,
    ModeGroup,
    ModeLinear,
    PetalAdapter,
    State,
    capture_cross,
    capture_self,
    enter_stack,
    leave_stack,
)
from petal_kernels.hf.petal.report import make_report
from petal_kernels.hf.petal.specs import (
    Embeddings,
    Found,
    LayerSite,
    base_signature,
    find,
    norm_width,
)
from petal_kernels.hf.report import Report
from petal_kernels.hf.stack import adapted_class
from petal_kernels.hf.tokens import reader_of
from petal_kernels.nn.experts import LowRankExperts
from petal_kernels.nn.frozen_linear import FrozenLinear
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import PublishedModeLinear
from petal_kernels.nn.residual import ScaleShift


class PetalAttachment(RoutedAttachment):
    """PETAL on one model."""

    adapter: PetalAdapter
    config: PetalConfig

    def __init__(self, model: nn.Module, config: PetalConfig, implementation: str) -> None:
        self.found = find(model, config)
        adapter = _build_adapter(self.found, config)
        bases = [site.base for site in self.found.sites()]
        super().__init__(model, config, adapter, implementation, bases)
        published = implementation == "published"
        self._state = State(adapter, published=published, context=config.context == "batch")
        self._groups: list[ModeGroup] = []
        self._install()

    @property
    def _routings(self) -> Routings:
        return self._state.routings

    def _experts(self) -> dict[str, LowRankExperts]:
        experts = self.adapter.experts
        return {} if experts is None else {self._state.embeddings: experts}

    def signature(self) -> dict[str, Any]:
        return base_signature(self.found)

    def report(self) -> Report:
        self._need_attached("report")
        return make_report(self.model, self.adapter, self._extra, self.found, self.implementation)

    def _merge(self) -> Merged:
        return merging.merge(self)

    def _enable(self, enabled: bool) -> None:
        self._state.enabled = enabled
        for _, _, wrapper in self._wrapped:
            if isinstance(wrapper, PublishedModeLinear):
                wrapper.enabled = enabled

    def _install(self) -> None:
        self._mark(self.found.stack, "_petal_state", self._state)
        hook = self.found.stack.register_forward_pre_hook(enter_stack, with_kwargs=True)
        self._hooks.append(hook)
        hook = self.found.stack.register_forward_hook(leave_stack, always_call=True)
        self._hooks.append(hook)
        for site in self.found.layers:
            self._install_layer(site)
        if self.found.embeddings is not None:
            self._install_experts(self.found.embeddings)

    def _install_experts(self, found: Embeddings) -> None:
        self._state.embeddings, self._state.reader = found.path, reader_of(self.config)
        self._mark(found.owner, "_petal_state", self._state)
        self._mark(found.module, "_petal_state", self._state)
        self._hooks += [
            found.owner.register_forward_pre_hook(enter_model, with_kwargs=True),
            found.owner.register_forward_hook(leave_model, always_call=True),
            found.module.register_forward_hook(serve_embeddings, with_kwargs=True),
        ]

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
            self._wrap(found.parent, row.child, wrapper)
        self._groups += groups.values()
        self._mark(site.layer, "_petal_slot", slot)
        self._mark(site.self_block, "_petal_slot", slot)
        self._hooks.append(site.self_block.register_forward_hook(capture_self))
        if site.cross_block is not None:
            self._mark(site.cross_block, "_petal_slot", slot)
            self._hooks.append(site.cross_block.register_forward_hook(capture_cross))
        self._change_class(site.layer, adapted_class(type(site.layer)))
        self._state.layers.append(site.layer)


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
    if found.embeddings is not None:
        adapter.experts = build_experts(found.embeddings, config)
    return adapter


def _pairs(
    layer: LayerSite, found: Found, config: PetalConfig, device: torch.device
) -> nn.ModuleDict:
    """The scale/shift pairs of a layer; those that never act are stored, frozen, in "release"."""
    first = found.layers[0]
    width = norm_width(first.self_block, first.path)
    pairs = nn.ModuleDict({"self": ScaleShift(width, device=device, dtype=config.dtype)})
    live = bool(config.use_cross_residual) and layer.cross_block is not None
    if live or config.variant == "release":
        pairs["cross"] = ScaleShift(width, device=device, dtype=config.dtype)
        pairs["cross"].requires_grad_(live)
    return pairs


def _mode_slices(site: LayerSite) -> dict[str, slice]:
    slices = {}
    for branch in ("text", "image"):
        modes = [found.mode for found in site.sites if found.row.branch == branch]
        if modes:
            assert modes == list(range(modes[0], modes[0] + len(modes)))
            slices[branch] = slice(modes[0], modes[0] + len(modes))
    return slices
