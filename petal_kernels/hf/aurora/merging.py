"""merge of an Aurora attachment: W + its update for every projection whose weight may be read.

A text projection's update is s V M^T U. One block by block is the same per block: blocks of rows of
the weight where the outputs have the modes, blocks of columns where the inputs have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels.hf.aurora.blocks import contract_blocks
from petal_kernels.hf.aurora.layers import BlockLinear
from petal_kernels.hf.aurora.published import PublishedBlocks
from petal_kernels.hf.aurora.specs import Site
from petal_kernels.hf.merging import Merged, MergeReport
from petal_kernels.hf.petal.layers import ModeLinear
from petal_kernels.nn.frozen_linear import FrozenLinear, why_not_plain
from petal_kernels.nn.mode_approximation import ModeApproximation

if TYPE_CHECKING:
    from petal_kernels.hf.aurora.attachment import AuroraAttachment


@torch.no_grad()
def merge(attachment: AuroraAttachment) -> Merged:
    """Folds what can be folded and returns the report with the way back."""
    merged = Merged(MergeReport())
    report, shared = merged.report, attachment.adapter.shared
    for members in _units(attachment):
        reason = next((why for site, _ in members if (why := why_not_plain(site.base))), "")
        if reason:
            report.kept.update({site.path: reason for site, _ in members})
            continue
        for site, wrapper in members:
            weight = wrapper.base._parameters["weight"]
            assert weight is not None
            merged.fold(site.path, wrapper.base, _update(shared, site, wrapper, weight))
        merged.flags.append(_flagged(members[0][1]))
    if not report.kept:
        merged.freeze(shared.parameters())
    _list_kept(attachment, report)
    merged.flags += attachment._states
    for flagged in merged.flags:
        flagged.merged = True
    return merged


def _units(attachment: AuroraAttachment) -> Iterator[list[tuple[Site, FrozenLinear]]]:
    """Sites that must be folded together: a fused group, or one projection."""
    units: dict[int, list[tuple[Site, FrozenLinear]]] = {}
    sites = attachment.found.sites()
    for site, (_, _, wrapper) in zip(sites, attachment._wrapped, strict=True):
        units.setdefault(id(_flagged(wrapper)), []).append((site, wrapper))
    yield from units.values()


def _flagged(wrapper: FrozenLinear) -> Any:
    return wrapper.group if isinstance(wrapper, ModeLinear) else wrapper


def _update(shared: ModeApproximation, site: Site, wrapper: FrozenLinear, weight: Tensor) -> Tensor:
    wide = wide_dtype(weight.dtype)
    if not isinstance(wrapper, (BlockLinear, PublishedBlocks)):
        (up,) = shared.contract(slice(site.modes.start, site.modes.stop), dtype=wide)
        return up @ shared.down.to(wide)
    blocks = wrapper.blocks
    product = contract_blocks(shared, [blocks], masked=False, dtype=wide)[blocks.key]
    if blocks.form == "inputs":
        return shared.up.to(wide) @ product
    return product @ shared.down.to(wide)


def _list_kept(attachment: AuroraAttachment, report: MergeReport) -> None:
    config = attachment.config
    for layer in attachment.found.text_layers():
        if str(layer.index) in attachment.adapter.layers:
            report.kept[f"{layer.path}: scale/shift residual"] = "added after the block's LayerNorm"
    if config.context == "batch":
        report.kept["context"] = "depends on the batch"
    for path in attachment._extra:
        report.kept[path] = "trained whole"
