"""attach(model, config) -> Attachment: adapted layers in one model instance."""

from __future__ import annotations

import dataclasses
import os

from torch import nn

from petal_kernels.hf import files, tensors
from petal_kernels.hf.attachment import NAME, Attachment
from petal_kernels.hf.config import AdapterConfig, AuroraConfig, ExpertConfig, PetalConfig
from petal_kernels.nn.arguments import check_choice

IMPLEMENTATIONS = ("fused", "published")


def attach(
    model: nn.Module,
    config: AdapterConfig | str | os.PathLike[str],
    *,
    implementation: str = "fused",
) -> Attachment:
    """Freezes `model`, adapts its layers in place and returns the handle of what was done.

    `config` is a config of one of the methods, or the directory of a saved adapter.
    `implementation` is "fused" or "published" (the eager form of the papers over the same
    parameters: the reference). Raises ValueError where nothing matches, leaving the model as it
    was.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got a {type(model).__name__}")
    if getattr(model, NAME, None) is not None:
        raise ValueError(
            f"model: want a model without a {NAME!r} module, got one that has it (already "
            "attached? detach it first)"
        )
    for path, part in model.named_modules():
        if path and isinstance(getattr(part, NAME, None), nn.Module):
            raise ValueError(
                f"model: want a model whose parts have no adapter yet, got one at {path!r}, which "
                "would be frozen; attach to the whole model first, then to its part"
            )
    saved = None
    if isinstance(config, (str, os.PathLike)):
        saved = files.read(config)
        config = saved.config
    if not isinstance(config, AdapterConfig):
        raise TypeError(
            f"config: want a PetalConfig, another method's config or a path, got a "
            f"{type(config).__name__}"
        )
    # A copy, checked again: the caller's object may have been changed since it was made, and may be
    # changed for the next run.
    config = dataclasses.replace(config)
    if saved is None:
        return _attach(model, config, implementation)
    try:
        attachment = _attach(model, config, implementation)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        # Not what the caller wrote, but what stands in the file.
        raise ValueError(f"{saved.path}: config: {error}") from error
    try:
        saved.check_base(attachment.signature())
        attachment._load(saved)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _attach(model: nn.Module, config: AdapterConfig, implementation: str) -> Attachment:
    """The attachment; what fails on the way gives the model back as it was."""
    cls = _class_of(config)
    attachment = cls.__new__(cls)
    try:
        attachment.__init__(model, config, implementation)  # type: ignore[misc]
        attachment._shapes = tensors.shapes_of(attachment.state_dict())
    except BaseException:
        if attachment.__dict__.get("_attached"):
            Attachment.detach(attachment)  # the method's own part may not be there yet
        raise
    return attachment


def _class_of(config: AdapterConfig) -> type[Attachment]:
    if isinstance(config, PetalConfig):
        from petal_kernels.hf.petal.attachment import PetalAttachment

        return PetalAttachment
    if isinstance(config, AuroraConfig):
        from petal_kernels.hf.aurora.attachment import AuroraAttachment

        return AuroraAttachment
    if isinstance(config, ExpertConfig):
        from petal_kernels.hf.insertion.experts import ExpertAttachment

        return ExpertAttachment
    from petal_kernels.hf.insertion.attachment import InsertionAttachment

    return InsertionAttachment
