"""Argument checks of the public functions: each raises once, naming the argument, what is wanted
and what came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: Any) -> Tensor:
    """Raise TypeError unless ``value`` is a tensor with a stride for each dim: neither sparse nor
    nested."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: want a Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: want a dense Tensor, got one of layout {layout}")
    return value


def check_floating(name: str, value: Any) -> Tensor:
    """Raise unless ``value`` is a floating-point tensor of a supported dtype."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATING:
        wanted = ", ".join(dtype_name(d) for d in FLOATING)
        raise TypeError(f"{name}: want dtype {wanted}, got {dtype_name(tensor.dtype)}")
    return tensor


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], why: str = "") -> None:
    """Raise TypeError unless the dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(dict.fromkeys(dtype_name(d) for d in allowed))
        raise TypeError(f"{name}: want dtype {wanted}{why}, got {dtype_name(tensor.dtype)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor lies on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name}: want device {device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, wanted: Sequence[int | str]) -> None:
    """Raise ValueError unless the shape matches ``wanted``; a string stands for any size and is
    shown as given."""
    ok = tensor.dim() == len(wanted) and all(
        isinstance(w, str) or w == s for w, s in zip(wanted, tensor.shape, strict=False)
    )
    if not ok:
        shown = ", ".join(str(w) for w in wanted)
        raise ValueError(f"{name}: want shape [{shown}], got {list(tensor.shape)}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise TypeError unless ``value`` is a string, ValueError unless it is one of ``allowed``."""
    if not isinstance(value, str):  # an array would compare element by element
        got = type(value).__name__
        raise TypeError(f"{name}: want one of {', '.join(allowed)}, got a {got}")
    if value not in allowed:
        raise ValueError(f"{name}: want one of {', '.join(allowed)}, got {value!r}")


def check_bool(name: str, value: Any) -> bool:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: want a bool, got {type(value).__name__}")
    return value


def check_number(name: str, value: Any) -> float:
    """Raise TypeError unless ``value`` is an int or a float (a tensor is refused: it would need a
    host sync), ValueError unless it is finite: no result is meant to be NaN because a factor is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: want a float, got {type(value).__name__}")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        shown = value if isinstance(value, float) else "an int that no float holds"
        raise ValueError(f"{name}: want a finite number, got {shown}")
    return float(value)


def check_rng(name: str, value: Any, device: torch.device) -> None:
    """Raise unless ``value`` is a state of the dropout generator: int64 ``[2]`` on ``device``."""
    tensor = check_tensor(name, value)
    check_dtype(name, tensor, (torch.int64,))
    check_shape(name, tensor, (2,))
    check_device(name, tensor, device)


def check_mask(name: str, value: Any, wanted: Sequence[int | str]) -> Tensor:
    """Raise unless ``value`` is a padding mask of that shape, "nonzero where a token counts": bool,
    integer or floating."""
    tensor = check_tensor(name, value)
    if tensor.is_complex() or tensor.is_quantized:
        got = dtype_name(tensor.dtype)
        raise TypeError(f"{name}: want dtype bool, an integer or a floating one, got {got}")
    check_shape(name, tensor, wanted)
    return tensor
