"""Checks of what users give to the profiler; each names the argument, the want and what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from petal_kernels._runtime.checks import check_bool


def check_count(name: str, value: object, least: int = 0) -> None:
    """ValueError unless `value` is an integer that large."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: want an integer >= {least}, got {value!r}")


def check_step(
    model: Any,
    loss: Any,
    backward: Any,
    module: Any,
    parameters: Any,
    cuda_rules: Any,
    accumulate: Any = None,
) -> list[Tensor]:
    """Raise TypeError, naming the argument; or the parameters, each a tensor."""
    for name, value in (("model", model), ("loss", loss)):
        if not callable(value) and not (name == "loss" and value is None):
            want = "a torch.nn.Module or a function" if name == "model" else "None or a function"
            raise TypeError(f"{name}: want {want}, got a {type(value).__name__}")
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"module: want None or a torch.nn.Module, got a {type(module).__name__}")
    check_bool("backward", backward)
    for name, value in (("cuda_rules", cuda_rules), ("accumulate", accumulate)):
        if value is not None:
            check_bool(name, value)
    if isinstance(parameters, (str, Tensor)) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters: want tensors, got a {type(parameters).__name__}")
    found = list(parameters)
    for value in found:
        if not isinstance(value, Tensor):
            raise TypeError(f"parameters: want tensors, got a {type(value).__name__} among them")
    return found
