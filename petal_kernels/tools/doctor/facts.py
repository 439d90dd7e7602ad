"""What this installation and this machine are: versions, devices, compiled parts."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import petal_kernels
from petal_kernels import _build_info
from petal_kernels._runtime import device
from petal_kernels.tools import environment

PACKAGES = ("triton", "transformers", "peft", "accelerate", "safetensors", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")
_LIBRARIES = Path(petal_kernels.__file__).resolve().parent / "lib"


def versions() -> dict[str, str | None]:
    """Of Python, torch and what works with it; None where a package is not installed."""
    found: dict[str, str | None] = {
        "petal_kernels": petal_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
    }
    return found | {name: environment.version(name) for name in PACKAGES}


def devices() -> dict[str, Any]:
    """The CPU with what it can do, every GPU with capability and memory, the driver."""
    able = [name for name, has in _build_info.cpu_capability().items() if has]
    if device.native_16bit(torch.bfloat16):
        able.append("bfloat16 products")
    cpu = {
        "name": environment.processor(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": able,
        "threads": torch.get_num_threads(),
    }
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "processors": properties.multi_processor_count,
            }
        )
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else None
    return {"cpu": cpu, "gpus": gpus, "driver": driver}


def built() -> dict[str, Any]:
    """The compiled parts: each library with its size or why it is not here, and the build's
    facts."""
    parts: dict[str, Any] = {}
    for part in ("cpu", "cuda"):
        path = _LIBRARIES / f"libpetal_{part}.so"
        here = path.exists()
        parts[part] = {
            "library": path.name,
            "mib": round(path.stat().st_size / 2**20, 2) if here else None,
            "missing": None if here else _build_info.reason(part) or "it was removed",
        }
    return {"parts": parts, "facts": _build_info.facts()}
