"""What a frozen vision tower costs, and what stops that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from petal_kernels import memory
from petal_kernels.hf.linears import walk
from petal_kernels.memory.modules import inside
from petal_kernels.memory.records import mib


@dataclass(frozen=True)
class Tower:
    """A tower of which nothing is trained: where it is, bytes of its weights, and what it keeps for
    backward."""

    path: str
    weights: int
    keeps: int

    def __str__(self) -> str:
        weights = f"The frozen tower {self.path} has {mib(self.weights)} of weights"
        precomputed = "with its features precomputed, once for all epochs, it need not be loaded"
        if not self.keeps:
            return f"{weights} and keeps nothing for backward; {precomputed}."
        return (
            f"{weights} and keeps {mib(self.keeps)} for backward, which no gradient needs: run it "
            "under torch.no_grad(), or detach() its features (enable_input_require_grads() is the "
            f"usual cause: give gradient_checkpointing_kwargs={{'use_reentrant': False}} and leave "
            f"it out); {precomputed}."
        )


def tower(profile: memory.Profile, model: nn.Module | None) -> Tower | None:
    """The part of a model that its config calls the vision's, where nothing of it is trained."""
    for seen in walk(model) if model is not None else ():
        weights = sum(p.numel() * p.itemsize for p in seen.module.parameters())
        if seen.part == "vision" and weights:
            if not any(inside(seen.path, each) for each in profile.frozen):
                return None
            kept = [r.bytes for r in profile.saved if inside(r.module, seen.path)]
            return Tower(seen.path, weights, sum(kept))
    return None
