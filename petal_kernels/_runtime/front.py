"""The compiled module through which small calls go (``csrc/front_module.cpp``): it is built for one
torch and one Python, and nothing needs it but time.

``signature`` says what about a call's arguments its checks and its choice of backend look at. Two
calls of one signature pass the same checks and take the same way, so that what was found for one
serves the other: nothing about the process may decide besides, but the name of a backend, which is
an argument wherever one is chosen. There is no signature where somebody watches what a call does (a
mode, a transform, a profiler, a compiler, a tangent, a tensor's own class): such a call runs the
whole way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch

from petal_kernels import _build_info
from petal_kernels._runtime import device

T = TypeVar("T")

_MOST = 4096  # signatures of one kind of call


@functools.cache
def load() -> ModuleType | None:
    """The module, or None where it was not built for this torch and this Python."""
    return _build_info.front(torch.__version__)


def signature(values: tuple[Any, ...]) -> bytes | None:
    """The signature of a call's arguments; None for one that must run the whole way."""
    if torch.compiler.is_compiling():
        return None
    front = load()
    found: bytes | None = None if front is None else front.signature(values)
    return found


class Known(dict[bytes, T]):
    """What was found for calls, by their signatures: shared by threads, never changed in place."""

    def keep(self, key: bytes, value: T) -> T:
        """Remember it."""
        if len(self) >= _MOST:
            self.clear()
        self[key] = value
        return value


@functools.cache
def native(name: str) -> Callable[..., Any]:
    """An operator of the C++ CPU kernels, called with every argument by position."""
    device.load_cpu_library()
    front = load()
    if front is None:
        found: Callable[..., Any] = getattr(torch.ops.petal_native, name).default
        return found
    made: Callable[..., Any] = front.Op(f"petal_native::{name}")
    return made


def context(node: Any, saved: tuple[Any, ...], needs: tuple[bool, ...], **more: Any) -> Any:
    """What a Function's own ``backward`` reads of its ``ctx``, for a node of compiled code."""
    return SimpleNamespace(
        next_functions=node.next_functions,
        saved_tensors=saved,
        needs_input_grad=needs,
        form_x=None,
        **more,
    )
