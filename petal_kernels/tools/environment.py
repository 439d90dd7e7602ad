"""What a report says about where its figures were measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import petal_kernels
from petal_kernels._runtime import device

ROOT = Path(__file__).resolve().parent.parent.parent


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where files differ from it."""
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


def describe(threads: int) -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "petal_kernels": petal_kernels.__version__,
        "native": device.cpu_library_reason() or "available",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
