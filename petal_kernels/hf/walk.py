"""Finding modules by class, over the whole MRO, and a model's family by its config."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn


def family_of(model: nn.Module, families: Collection[str]) -> tuple[str, str, nn.Module]:
    """(model type, path, module) of the first module whose config names one of `families`."""
    seen = []
    for path, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if model_type in families:
            return str(model_type), path, module
        if model_type is not None and model_type not in seen:
            seen.append(model_type)
    raise ValueError(
        f"model: want a module whose config.model_type is one of {sorted(families)}, "
        f"got a {type(model).__name__} with model types {seen}"
    )


def is_a(module: nn.Module, pattern: str) -> bool:
    """Whether a class of `module` fits: engines that swap a class put a subclass in front."""
    return any(fnmatchcase(cls.__name__, pattern) for cls in type(module).__mro__)


def class_name(module: nn.Module, pattern: str) -> str:
    """The name of the most basic class of `module` that fits `pattern`."""
    return [cls.__name__ for cls in type(module).__mro__ if fnmatchcase(cls.__name__, pattern)][-1]
