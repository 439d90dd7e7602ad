"""Fused kernels for parameter-efficient tuning of vision-language models.

Importing this package imports torch and nothing else: no GPU is queried, no extension is loaded and
neither Triton nor transformers is imported before a call needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from petal_kernels._runtime.backends import explain, use_backend
from petal_kernels.ops.expert_dispatch import expert_dispatch
from petal_kernels.ops.frozen_norm import frozen_norm
from petal_kernels.ops.gated_bottleneck import gated_bottleneck
from petal_kernels.ops.gated_mlp import gated_mlp
from petal_kernels.ops.lowrank_linear import lowrank_linear
from petal_kernels.ops.mode_contract import mode_contract

if TYPE_CHECKING:
    from petal_kernels import memory as memory
    from petal_kernels import nn as nn
    from petal_kernels import peft as peft
    from petal_kernels.hf import Attachment as Attachment
    from petal_kernels.hf import AuroraConfig as AuroraConfig
    from petal_kernels.hf import CompacterConfig as CompacterConfig
    from petal_kernels.hf import ExpertConfig as ExpertConfig
    from petal_kernels.hf import LoraConfig as LoraConfig
    from petal_kernels.hf import PetalConfig as PetalConfig
    from petal_kernels.hf import RoutingConfig as RoutingConfig
    from petal_kernels.hf import VLAdapterConfig as VLAdapterConfig
    from petal_kernels.hf import VLPetConfig as VLPetConfig
    from petal_kernels.hf.attach import attach as attach
    from petal_kernels.hf.attach import attachment as attachment
    from petal_kernels.hf.attach import plan as plan
    from petal_kernels.hf.fuse import fuse as fuse
    from petal_kernels.hf.fuse import unfuse as unfuse

_CONFIGS = (
    "AuroraConfig",
    "CompacterConfig",
    "ExpertConfig",
    "LoraConfig",
    "PetalConfig",
    "RoutingConfig",
    "VLAdapterConfig",
    "VLPetConfig",
)
_HF = ("attach", "attachment", "fuse", "plan", "unfuse", "Attachment")
_LAZY = dict.fromkeys((*_HF, *_CONFIGS), "hf")

__all__ = [
    "Attachment",
    "AuroraConfig",
    "CompacterConfig",
    "ExpertConfig",
    "LoraConfig",
    "PetalConfig",
    "RoutingConfig",
    "VLAdapterConfig",
    "VLPetConfig",
    "__version__",
    "attach",
    "attachment",
    "expert_dispatch",
    "explain",
    "frozen_norm",
    "fuse",
    "gated_bottleneck",
    "gated_mlp",
    "lowrank_linear",
    "memory",
    "mode_contract",
    "nn",
    "peft",
    "plan",
    "unfuse",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("nn", "hf", "memory", "peft", "tools"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    said = f"module {__name__!r} has no attribute {name!r}"
    if not name.startswith("_"):  # what Python and its tools ask every module for
        from petal_kernels._runtime.keywords import closest

        near = closest(name, __all__)
        said += f"; did you mean {near!r}?" if near else ""
    raise AttributeError(said, name=name)
