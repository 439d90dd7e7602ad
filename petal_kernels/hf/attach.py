"""attach(model, config) -> Attachment: adapted layers in one model instance."""

from __future__ import annotations

import os

from torch import nn

from petal_kernels.hf import files
from petal_kernels.hf.attachment import NAME, Attachment
from petal_kernels.hf.config import AdapterConfig, AuroraConfig, ExpertConfig, PetalConfig

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
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: want one of {IMPLEMENTATIONS}, got {implementation!r}")
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
    attachment = _attach(model, config, implementation)
    if saved is not None:
        try:
            saved.check_base(attachment.signature())
            attachment._load(saved)
        except BaseException:
            attachment.detach()
            raise
    return attachment


def _attach(model: nn.Module, config: AdapterConfig, implementation: str) -> Attachment:
    if isinstance(config, PetalConfig):
        from petal_kernels.hf.petal.attachment import PetalAttachment

        return PetalAttachment(model, config, implementation)
    if isinstance(config, AuroraConfig):
        from petal_kernels.hf.aurora.attachment import AuroraAttachment

        return AuroraAttachment(model, config, implementation)
    if isinstance(config, ExpertConfig):
        from petal_kernels.hf.insertion.experts import ExpertAttachment

        return ExpertAttachment(model, config, implementation)
    from petal_kernels.hf.insertion.attachment import InsertionAttachment

    return InsertionAttachment(model, config, implementation)
