"""Aurora attached: projections by wrappers that share the original parameters, layers by a subclass
of their own class, residuals and context by hooks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.aurora import merging
from petal_kernels.hf.aurora.blocks import Blocks
from petal_kernels.hf.aurora.layers import (
    AuroraAdapter,
    BlockLinear,
    Context,
    StackState,
    TextSlot,
    VisionSlot,
    add_context,
    capture_cross,
    capture_self,
    enter_text,
    enter_vision,
)
from petal_kernels.hf.aurora.published import PublishedBlocks
from petal_kernels.hf.aurora.report import make_report
from petal_kernels.hf.aurora.specs import (
    MATCHING_HEAD,
    MLP_BLOCKS,
    Found,
    LayerSite,
    Site,
    Stack,
    base_signature,
    find,
)
from petal_kernels.hf.config import AuroraConfig
from petal_kernels.hf.dropped_mask import DroppedMask
from petal_kernels.hf.embeddings import guard_embeddings
from petal_kernels.hf.merging import Merged
from petal_kernels.hf.petal.layers import ModeGroup, ModeLinear, leave_stack
from petal_kernels.hf.report import Report
from petal_kernels.hf.stack import adapted_class
from petal_kernels.nn.arguments import check_values
from petal_kernels.nn.frozen_linear import FrozenLinear
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import PublishedLinear, PublishedModeLinear
from petal_kernels.nn.residual import ScaleShift


class AuroraAttachment(Attachment):
    """Aurora on one model."""

    adapter: AuroraAdapter
    config: AuroraConfig

    def __init__(self, model: nn.Module, config: AuroraConfig, implementation: str) -> None:
        self.found = find(model, config)
        if config.context == "batch" and self.found.head is None:
            raise ValueError(
                f"context: want 'none' for a {type(model).__name__}, which has no "
                f"{MATCHING_HEAD!r}, got 'batch'"
            )
        adapter = _build_adapter(self.found, config)
        bases = [site.base for site in self.found.sites()]
        super().__init__(model, config, adapter, implementation, bases)
        self._states: list[StackState] = []
        self._context = Context()
        self._dropped = DroppedMask()
        for stack in self.found.stacks:
            self._install_stack(stack)
        self._hooks += guard_embeddings(model)
        if config.context == "batch":
            assert self.found.head is not None
            self._mark(self.found.head, "_petal_context", self._context)
            self._hooks.append(self.found.head.register_forward_pre_hook(add_context))

    def signature(self) -> dict[str, Any]:
        return base_signature(self.found)

    def report(self) -> Report:
        self._need_attached("report")
        return make_report(self.model, self.adapter, self._extra, self.found, self.implementation)

    @contextlib.contextmanager
    def context(self, features: Tensor) -> Iterator[None]:
        """Inside, what the matching head reads gains 0.1 times the mean of `features`.

        `features` are the text encoder's outputs without image features, [B, T, d] (their first
        token counts) or [B, d]. Run the matching pairs inside and the others outside.
        """
        self._need_attached("context")
        if self.config.context != "batch":
            raise ValueError(
                "context: want an adapter attached with context='batch', got "
                f"{self.config.context!r}"
            )
        checks.check_floating("features", features)
        width = self.found.width
        if features.dim() not in (2, 3) or features.shape[-1] != width:
            raise ValueError(
                f"features: want shape [B, T, {width}] or [B, {width}], got {list(features.shape)}"
            )
        if not features.numel():
            raise ValueError(f"features: want at least one token, got {list(features.shape)}")
        check_values("features", features, self.adapter.shared.down)
        before = self._context.features
        self._context.features = features
        try:
            yield
        finally:
            self._context.features = before

    def _merge(self) -> Merged:
        return merging.merge(self)

    def _enable(self, enabled: bool) -> None:
        self._context.enabled = enabled
        for state in self._states:
            state.enabled = enabled
        for _, _, wrapper in self._wrapped:
            if isinstance(wrapper, PublishedLinear):
                wrapper.enabled = enabled

    # -- installing ---------------------------------------------------------------------------

    def _install_stack(self, stack: Stack) -> None:
        sites = stack.sites()
        vision = stack.kind.name == "vision"
        state = StackState(
            self.adapter,
            published=self.implementation == "published",
            modes=stack.modes,
            blocks=[blocks_of(site, self.config) for site in sites] if vision else (),
            reads_image=any(site.row.branch == "image" for site in sites),
            dropped=self._dropped if any("cross." in s.row.role for s in sites) else None,
        )
        self._states.append(state)
        if sites:
            self._mark(stack.module, "_petal_state", state)
            enter = enter_vision if vision else enter_text
            hook = stack.module.register_forward_pre_hook(enter, with_kwargs=True)
            self._hooks.append(hook)
            hook = stack.module.register_forward_hook(leave_stack, always_call=True)
            self._hooks.append(hook)
        for layer in stack.layers:
            if vision:
                self._install_vision(layer, state)
            else:
                self._install_text(layer, state)

    def _install_layer(self, layer: LayerSite, slot: TextSlot | VisionSlot) -> None:
        self._mark(layer.layer, "_petal_slot", slot)
        self._change_class(layer.layer, adapted_class(type(layer.layer)))

    def _install_vision(self, layer: LayerSite, state: StackState) -> None:
        slot = VisionSlot(state, layer.index, {})
        shared = self.adapter.shared
        for site in layer.sites:
            blocks = blocks_of(site, self.config)
            if state.published:
                wrapper: FrozenLinear = PublishedBlocks(site.base, shared, blocks)
            else:
                wrapper = BlockLinear(site.base, slot, blocks)
            self._wrap(site.parent, site.row.child, wrapper)
        if layer.sites:
            self._install_layer(layer, slot)

    def _install_text(self, layer: LayerSite, state: StackState) -> None:
        slot = TextSlot(state, layer.index, _mode_slices(layer))
        groups: dict[str, ModeGroup] = {}
        for site in layer.sites:
            row, mode = site.row, site.modes.start
            if state.published:
                wrapper: FrozenLinear = PublishedModeLinear(site.base, self.adapter.shared, mode)
            else:
                if row.group not in groups:
                    groups[row.group] = ModeGroup(slot, row.group, row.branch)
                wrapper = ModeLinear(site.base, groups[row.group], mode)
            self._wrap(site.parent, row.child, wrapper)
        if self.config.scale_shift and _has_pairs(layer):
            assert layer.self_block is not None
            assert layer.cross_block is not None
            slot.pairs = True
            self._mark(layer.self_block, "_petal_slot", slot)
            self._hooks.append(layer.self_block.register_forward_hook(capture_self))
            self._mark(layer.cross_block, "_petal_slot", slot)
            self._hooks.append(layer.cross_block.register_forward_hook(capture_cross))
        if layer.sites or slot.pairs:
            self._install_layer(layer, slot)


def blocks_of(site: Site, config: AuroraConfig) -> Blocks:
    """The modes of a projection of the image encoder, as the layout wants them."""
    mixed = config.layout == "aurora_release" and site.row.block in MLP_BLOCKS
    return Blocks(site.path, site.row.form, site.modes, mixed)


def _has_pairs(layer: LayerSite) -> bool:
    return layer.self_block is not None and layer.cross_block is not None


def _mode_slices(layer: LayerSite) -> dict[str, slice]:
    slices = {}
    for branch in ("text", "image"):
        modes = [site.modes.start for site in layer.sites if site.row.branch == branch]
        if modes:
            assert modes == list(range(modes[0], modes[0] + len(modes)))
            slices[branch] = slice(modes[0], modes[0] + len(modes))
    return slices


def _build_adapter(found: Found, config: AuroraConfig) -> AuroraAdapter:
    sites = found.sites()
    device = next((p.device for p in sites[0].base.parameters()), torch.device("cpu"))
    shared = ModeApproximation(
        found.width,
        found.width,
        config.r,
        sum(len(site.modes) for site in sites),
        core=str(config.core),
        scale=config.scale,
        dropout=config.dropout,
        device=device,
        dtype=config.dtype,
    )
    _reset_modes(shared, found)
    adapter = AuroraAdapter(shared)
    if config.scale_shift:
        for layer in found.text_layers():
            if _has_pairs(layer):
                pair = {
                    name: ScaleShift(found.width, device=device, dtype=config.dtype)
                    for name in ("self", "cross")
                }
                adapter.layers[str(layer.index)] = nn.ModuleDict(pair)
    return adapter


@torch.no_grad()
def _reset_modes(shared: ModeApproximation, found: Found) -> None:
    """Xavier-uniform on the matrix [R, n] of a block's n modes; in text every mode is its own."""
    for stack in found.stacks:
        if stack.kind.name != "vision":
            continue
        for layer in stack.layers:
            columns: dict[str, int] = {}
            for site in layer.sites:
                columns[site.row.block] = columns.get(site.row.block, 0) + len(site.modes)
            for site in layer.sites:
                bound = math.sqrt(6.0 / (shared.r + columns[site.row.block]))
                shared.modes[site.modes.start : site.modes.stop].uniform_(-bound, bound)
