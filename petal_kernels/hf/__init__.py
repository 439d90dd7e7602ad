"""Attaching the modules to Hugging Face models; works on objects and imports no model library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petal_kernels.hf.attach import attach, attachment, plan
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.config import (
    AuroraConfig,
    CompacterConfig,
    ExpertConfig,
    LoraConfig,
    PetalConfig,
    RoutingConfig,
    VLAdapterConfig,
    VLPetConfig,
)
from petal_kernels.hf.fuse import fuse, unfuse
from petal_kernels.hf.merging import MergeReport
from petal_kernels.hf.report import Report

if TYPE_CHECKING:
    from petal_kernels.hf.trainer import AdapterCheckpoint as AdapterCheckpoint

__all__ = [
    "AdapterCheckpoint",
    "Attachment",
    "AuroraConfig",
    "CompacterConfig",
    "ExpertConfig",
    "LoraConfig",
    "MergeReport",
    "PetalConfig",
    "Report",
    "RoutingConfig",
    "VLAdapterConfig",
    "VLPetConfig",
    "attach",
    "attachment",
    "fuse",
    "plan",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name == "AdapterCheckpoint":  # it imports transformers
        from petal_kernels.hf.trainer import AdapterCheckpoint

        return AdapterCheckpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
