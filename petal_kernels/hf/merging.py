"""Folding updates into frozen weights, and back.

Only what is a linear map of a module's own input is folded, and only into weights that may be read.
The original Parameter objects are kept aside, so that undoing is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
        self.flags: list[Any] = []  # objects whose `merged` says that their update is in the base
        self.frozen: list[nn.Parameter] = []

    def fold(self, path: str, base: nn.Module, update: Tensor) -> None:
        """Replaces base.weight by weight + update, summed in fp32 (fp64) and rounded once."""
        weight = base._parameters["weight"]
        assert weight is not None
        self.originals.append((base, weight))
        exact = weight.to(update.dtype) + update.to(weight.device)
        stored = exact.to(weight.dtype)
        base._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
        self.report.folded.append(path)
        self.report.dtype = weight.dtype
        norm = 0.0 if weight.is_meta else _norm(update)
        lost = _norm(stored.to(update.dtype) - exact) / norm if norm > 0 else 0.0
        self.report.rounding[path] = lost

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Parameters whose gradient would miss what is folded."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self.frozen.append(parameter)

    def undo(self) -> None:
        for base, weight in self.originals:
            base._parameters["weight"] = weight
        for flagged in self.flags:
            flagged.merged = False
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))
