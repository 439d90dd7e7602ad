"""What LoRA adapts in a model, by path."""

from __future__ import annotations

from typing import Any

from torch import nn

import petal_kernels as pk

ALL = ("language", "projector", "vision")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def places(model: nn.Module, **config: Any) -> list[str]:
    """The paths that are adapted; the model is given back."""
    attachment = pk.attach(model, pk.LoraConfig(**config))
    found = [place.path for place in attachment.found.places]
    attachment.detach()
    return found


def ends(paths: list[str]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
