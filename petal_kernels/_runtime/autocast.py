"""Autocast, looked at and switched off where the dtypes are settled."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast_on(device: str) -> bool:
    """Whether a product on this device type would be cast here."""
    # torch has no autocast for meta tensors and raises when asked about it.
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast casts nothing on x's device."""
    if not autocast_on(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
