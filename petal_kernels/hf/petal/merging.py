"""merge of a PETAL attachment: W_k + s P_k U for every projection whose weight may be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petal_kernels._runtime.numerics import wide_dtype
from petal_kernels.hf.merging import Merged, MergeReport
from petal_kernels.hf.petal.layers import ModeLinear
from petal_kernels.nn.frozen_linear import FrozenLinear, why_not_plain
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import PublishedModeLinear

if TYPE_CHECKING:
    from petal_kernels.hf.petal.attachment import PetalAttachment


@torch.no_grad()
def merge(attachment: PetalAttachment) -> Merged:
    """Folds what can be folded and returns the report with the way back."""
    merged = Merged(MergeReport())
    report, state = merged.report, attachment._state
    folded_branches, open_branches = set(), set()
    for members in _units(attachment):
        reasons = [why_not_plain(site.base) for site, _ in members]
        branch = members[0][0].row.branch
        reason = next((why for why in reasons if why), "")
        if reason:
            open_branches.add(branch)
            report.kept.update({site.path: reason for site, _ in members})
            continue
        folded_branches.add(branch)
        for site, wrapper in members:
            factors = attachment.adapter.branch(branch)
            weight = wrapper.base._parameters["weight"]
            assert weight is not None
            merged.fold(site.path, wrapper.base, _update(weight, factors, site.mode))
        merged.flags.append(_flagged(members[0][1]))
    for branch in folded_branches - open_branches:
        merged.freeze(attachment.adapter.branch(branch).parameters())
    _list_kept(attachment, report)
    merged.flags.append(state)
    for flagged in merged.flags:
        flagged.merged = True
    return merged


def _units(attachment: PetalAttachment) -> Iterator[list[tuple[Any, FrozenLinear]]]:
    """Sites that must be folded together: a fused group, or one published linear."""
    units: dict[int, list[tuple[Any, FrozenLinear]]] = {}
    sites = attachment.found.sites()
    for site, (_, _, wrapper) in zip(sites, attachment._wrapped, strict=True):
        units.setdefault(id(_flagged(wrapper)), []).append((site, wrapper))
    yield from units.values()


def _flagged(wrapper: FrozenLinear) -> Any:
    if isinstance(wrapper, ModeLinear):
        return wrapper.group
    assert isinstance(wrapper, PublishedModeLinear)
    return wrapper


def _update(weight: Tensor, factors: ModeApproximation, mode: int) -> Tensor:
    """s V M^T U of one mode."""
    wide = wide_dtype(weight.dtype)
    (up,) = factors.contract([mode], dtype=wide)
    return up @ factors.down.to(wide)


def _list_kept(attachment: PetalAttachment, report: MergeReport) -> None:
    config = attachment.config
    for layer in attachment.found.layers:
        if config.scale_shift:
            report.kept[f"{layer.path}: scale/shift residual"] = "added after the block's LayerNorm"
        if config.context == "batch" and layer.cross_block is not None:
            report.kept[f"{layer.path}: batch context"] = "depends on the batch"
    if attachment.found.embeddings is not None:
        report.kept[f"{attachment.found.embeddings.path}: experts"] = "no linear precedes them"
    for path in attachment._extra:
        report.kept[path] = "trained whole"
