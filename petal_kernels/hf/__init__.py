"""Attaching the modules to Hugging Face models; works on objects and imports no model library."""

from petal_kernels.hf.attach import Attachment, attach
from petal_kernels.hf.config import PetalConfig
from petal_kernels.hf.merging import MergeReport
from petal_kernels.hf.report import Report

__all__ = ["Attachment", "MergeReport", "PetalConfig", "Report", "attach"]
