"""What this machine has: compiled extensions, Triton, CUDA. Looked up when first asked for, cached,
never at import."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import torch

from petal_kernels import _build_info

_LIBRARIES = Path(__file__).resolve().parent.parent / "lib"


def _load(part: str) -> str | None:
    path = _LIBRARIES / f"libpetal_{part}.so"
    if not path.exists():
        why = _build_info.reason(part) or f"{path.name} is missing"
        return f"the compiled {part.upper()} kernels are not here: {why}. {_build_info.how()}"
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


@functools.cache
def cpu_library_reason() -> str | None:
    """Why the C++ CPU kernels cannot be used, or None; loads them on the first call."""
    return _load("cpu")


@functools.cache
def cuda_library_reason() -> str | None:
    """Why the CUDA kernels cannot be used, or None; loads them on the first call."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not (_LIBRARIES / "libpetal_cuda.so").exists():
        return _load("cuda")
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _load("cuda")


@functools.cache
def triton_reason() -> str | None:
    """Why Triton cannot be used, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def library_leads() -> bool:
    """Whether torch's fp32 matrix product is well ahead of generated code on this CPU: MKL on an
    Intel processor with AVX-512. On others the two are level."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (wide and torch.backends.mkl.is_available()):
        return False
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def native_16bit(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype natively, as oneDNN sees it."""
    if dtype != torch.bfloat16:
        return False
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return bool(has) and not limit.startswith(("SSE", "AVX2", "AVX512_CORE_VNNI"))
