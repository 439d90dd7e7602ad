"""What a report says about where its figures were measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import petal_kernels
from petal_kernels._runtime import device
from petal_kernels._runtime.backends import AUTO, ENVIRONMENT_VARIABLE

ROOT = Path(__file__).resolve().parent.parent.parent


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where files differ from it; of an installed package
    "unknown": it may lie inside somebody else's checkout."""
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")),
        platform.machine(),
    )


def version(package: str) -> str | None:
    """Of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def most_resident() -> int:
    """Bytes of memory that this program has had at most; 0 where the system does not say. Not
    `ru_maxrss` on Linux: a process inherits there what the one that started it had."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def describe(threads: int, on: torch.device | str | None = None) -> dict[str, Any]:
    """Machine, versions, the backend of calls that name none, commit, and the time (ISO, UTC). The
    GPU is that of `on`; of "cuda" without an index, or of nothing, the current one."""
    gpu = on if on is not None and torch.device(on).type == "cuda" else None
    return {
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "peft": version("peft"),
        "petal_kernels": petal_kernels.__version__,
        "native": device.cpu_library_reason() or "available",
        "backend": os.environ.get(ENVIRONMENT_VARIABLE, AUTO),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
