"""What this machine has: compiled extensions, Triton, CUDA. Looked up when first asked for, cached, never at import."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

_LIBRARIES = Path(__file__).resolve().parent.parent / "lib"


@functools.cache
def _load(name: str) -> str | None:
    path = _LIBRARIES / name
    if not path.exists():
        return f"the compiled library {name} is not built"
    torch.ops.load_library(str(path))
    return None


def load_cpu_library() -> None:
    """Load the C++ CPU kernels; raises RuntimeError with the reason if they are not there."""
    reason = cpu_library_reason()
    if reason is not None:
        raise RuntimeError(reason)


def load_cuda_library() -> None:
    """Load the CUDA kernels; raises RuntimeError with the reason if they cannot be used."""
    reason = cuda_library_reason()
    if reason is not None:
        raise RuntimeError(reason)


def cpu_library_reason() -> str | None:
    """Why the C++ CPU kernels cannot be used, or None."""
    return _load("libpetal_cpu.so")


@functools.cache
def cuda_library_reason() -> str | None:
    """Why the CUDA kernels cannot be used, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _load("libpetal_cuda.so")


@functools.cache
def triton_reason() -> str | None:
    """Why Triton cannot be used, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"
