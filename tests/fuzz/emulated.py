"""The CUDA kernels under the emulation in the torch backend's place, for a process of its own."""

from __future__ import annotations

import importlib
from typing import Any

from tests.emulation import build
from tests.ops import folders


def replace() -> None:
    """Backend "torch" of every operator is its CUDA implementation on the emulated kernels."""
    import ctypes

    import torch

    _, lib = build.library()
    lib.petal_emulation_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    lib.petal_emulation_configure(0, 0, 4)
    kernels = torch.ops.petal_cuda_emulated
    for name in folders.names("cuda_impl"):
        cuda, plain = (
            importlib.import_module(f"petal_kernels.ops.{name}.{module}_impl")
            for module in ("cuda", "torch")
        )
        _replace_one(cuda, plain, kernels)


def _replace_one(cuda: Any, plain: Any, kernels: Any) -> None:
    cuda._ops = lambda: kernels
    if hasattr(cuda, "ROWS_PER_SPLIT"):
        cuda.ROWS_PER_SPLIT = 32
    plain.forward, plain.backward = cuda.forward, cuda.backward
    if hasattr(plain, "PLANS"):
        plain.PLANS = cuda.PLANS
    states = cuda.unsupported

    def unsupported(*given: Any) -> list[str]:
        return [r for r in states(*given) if "wants CUDA tensors" not in r]

    plain.unsupported = unsupported
