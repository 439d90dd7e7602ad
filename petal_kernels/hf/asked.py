"""What a user asks to be attached: a config, PEFT's or ours, or what was saved."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from petal_kernels.hf import formats
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.files import Saved, path_of
from petal_kernels.hf.peft_config import from_peft, is_peft
from petal_kernels.hf.peft_files import PeftSaved
from petal_kernels.hf.released.load import check_config as check_released

Read = Saved | PeftSaved


def asked(
    config: Any, model: nn.Module, checkpoint: str | os.PathLike[str] | None
) -> tuple[AdapterConfig, Read | None]:
    """The config, and what was read where a folder or a repository was named."""
    saved = None
    if checkpoint is not None:
        path_of(checkpoint, "checkpoint")
    if checkpoint is not None and isinstance(config, (str, os.PathLike)):
        raise ValueError("checkpoint: want None beside a saved adapter, which has its own values")
    if isinstance(config, (str, os.PathLike)):
        saved = formats.read(config)
        config = saved.config_for(model)
    config = checked(config, model)
    if checkpoint is not None:
        check_released(config)
    return config, saved


def checked(config: Any, model: nn.Module) -> AdapterConfig:
    """A copy, checked again: the caller's object may have been changed since it was made, and may
    be changed for the next run."""
    if is_peft(config):
        return from_peft(config, model)
    if not isinstance(config, AdapterConfig):
        got = f"a {type(config).__name__}"
        if isinstance(config, type):
            got = f"the class {config.__name__}; call it: {config.__name__}(...)"
        raise TypeError(
            f"config: want a PetalConfig, another method's config or a path, got {got}"
        )
    return dataclasses.replace(config)


@contextlib.contextmanager
def in_file(saved: Read) -> Iterator[None]:
    """Errors of a config that no caller wrote, but that stands in a file."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{saved.path}: config: {error}") from error
