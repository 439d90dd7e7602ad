"""Attaching the modules to Hugging Face models; works on objects and imports no model library."""

from petal_kernels.hf.attach import attach, attachment, plan
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.config import (
    AuroraConfig,
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

__all__ = [
    "Attachment",
    "AuroraConfig",
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
