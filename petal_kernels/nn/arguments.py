"""Argument checks of the modules: each raises once, naming the argument, what is wanted and what
came, before anything is drawn or computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        got = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise ValueError(f"{name}: want one of {tuple(choices)}, got {got}")


def check_size(name: str, value: object) -> int:
    """ValueError unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: want an integer >= 1, got {value!r}")
    return value


def check_index(name: str, value: object, count: int) -> int:
    """ValueError unless `value` is an integer from 0 to `count` - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise ValueError(f"{name}: want an integer from 0 to {count - 1}, got {value!r}")
    return value


def check_storage(device: object, dtype: object) -> None:
    """Raise unless parameters can be kept so: a device torch knows, a floating dtype (None: torch's
    defaults)."""
    if device is not None and (
        isinstance(device, bool) or not isinstance(device, (str, int, torch.device))
    ):
        raise TypeError(f"device: want a torch.device or its name, got a {type(device).__name__}")
    if isinstance(device, str):
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device: want a device's name, got {device!r}") from error
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: want a torch.dtype, got a {type(dtype).__name__}")
    if dtype is not None and dtype not in checks.FLOATING:
        raise TypeError(f"dtype: want a floating dtype, got {checks.dtype_name(dtype)}")


def check_module(name: str, value: object) -> nn.Module:
    """TypeError unless `value` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: want a torch.nn.Module, got a {type(value).__name__}")
    return value


def check_rows(
    name: str, value: Any, width: int, like: Tensor | None = None, lead: tuple[str, ...] = ()
) -> Tensor:
    """Raise unless `value` is a floating tensor [..., width]: with the leading dims of `like`, and
    with values where it has some; with exactly the leading dims that `lead` names."""
    tensor = checks.check_floating(name, value)
    wanted: tuple[int | str, ...] = (*lead, width)
    if like is not None:
        wanted = (*like.shape[:-1], width)
        if tensor.is_meta and not like.is_meta:
            raise ValueError(f"{name}: want a tensor with values, got one on device meta")
    if like is not None or lead:
        checks.check_shape(name, tensor, wanted)
    elif tensor.dim() < 1 or tensor.shape[-1] != width:
        raise ValueError(f"{name}: want shape [..., {width}], got {list(tensor.shape)}")
    return tensor


def check_values(name: str, value: Tensor, parameter: Tensor) -> None:
    """ValueError where one of the two has no values to compute with."""
    if value.is_meta != parameter.is_meta:
        raise ValueError(f"{name}: want a tensor on {parameter.device}, got one on {value.device}")


def check_range(name: str, value: Tensor, low: int, high: int) -> None:
    """ValueError unless the values of an integer tensor are in low .. high; looked at on a CPU
    alone, outside compiled graphs: elsewhere that would synchronise."""
    if type(value) is not Tensor or value.device.type != "cpu" or not value.numel():
        return  # fake tensors have no values
    if torch.compiler.is_compiling():
        return
    least, most = int(value.min()), int(value.max())
    if least < low or most > high:
        raise ValueError(f"{name}: want {low} to {high}, got {least} to {most}")
