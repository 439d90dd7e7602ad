"""merge: W + s P U into the frozen weights, and back.

Only what is a linear map of a projection's own input is folded, and only into weights that may be
read. The sum is formed in float32 (float64 for a float64 base) and rounded once to the base's
dtype; the original Parameter objects are kept aside, so that undoing is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.layers import ModeLinear
from petal_kernels.nn.frozen_linear import FrozenLinear, why_not_plain
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import PublishedModeLinear

if TYPE_CHECKING:
    from petal_kernels.hf.attach import Attachment


@dataclass
class MergeReport:
    """What merge folded, what stays as modules and why, and what rounding cost.

    `rounding` is, per folded module, the Frobenius norm of (stored - exact) weight over that of the
    update: how much of the update a narrow base dtype lost (0 where the update itself is zero).
    """

    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def worst_rounding(self) -> float:
        return max(self.rounding.values(), default=0.0)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"folded {len(self.folded)} projections into {dtype} weights",
            f"rounding took at most {self.worst_rounding:.2e} of an update",
        ]
        lines += [f"kept as a module: {name} ({why})" for name, why in self.kept.items()]
        return "\n".join(lines)


class Merged:
    """A merge that can be undone."""

    def __init__(self, report: MergeReport) -> None:
        self.report = report
        self.originals: list[tuple[nn.Module, nn.Parameter]] = []
        self.flags: list[Any] = []
        self.frozen: list[nn.Parameter] = []
        self.state: Any = None

    def undo(self) -> None:
        for base, weight in self.originals:
            base._parameters["weight"] = weight
        for flagged in self.flags:
            flagged.merged = False
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.state.merged = False


@torch.no_grad()
def merge(attachment: Attachment) -> Merged:
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
            merged.originals.append((wrapper.base, weight))
            report.dtype = weight.dtype
            report.rounding[site.path] = _fold(wrapper.base, weight, factors, site.mode)
            report.folded.append(site.path)
        merged.flags.append(_flagged(members[0][1]))
    for branch in folded_branches - open_branches:
        for parameter in attachment.adapter.branch(branch).parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                merged.frozen.append(parameter)
    _list_kept(attachment, report)
    for flagged in merged.flags:
        flagged.merged = True
    state.merged = True
    merged.state = state
    return merged


def _units(attachment: Attachment) -> Iterator[list[tuple[Any, FrozenLinear]]]:
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


def _fold(base: nn.Module, weight: nn.Parameter, factors: ModeApproximation, mode: int) -> float:
    """Replaces base.weight by W + P U; the share of the update that rounding took."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    (up,) = factors.contract([mode], dtype=wide)
    update = (up @ factors.down.to(wide)).to(weight.device)
    exact = weight.to(wide) + update
    stored = exact.to(weight.dtype)
    base._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
    if weight.is_meta:
        return 0.0
    norm = _norm(update)
    return _norm(stored.to(wide) - exact) / norm if norm > 0 else 0.0


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


def _list_kept(attachment: Attachment, report: MergeReport) -> None:
    config = attachment.config
    for layer in attachment.found.layers:
        if config.scale_shift:
            report.kept[f"{layer.path}: scale/shift residual"] = "added after the block's LayerNorm"
        if config.context == "batch" and layer.cross_block is not None:
            report.kept[f"{layer.path}: batch context"] = "depends on the batch"
    for path in attachment._extra:
        report.kept[path] = "trained whole"
