"""What this machine has to build with and to build for; used by setup.py, imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def package(name: str) -> Path | None:
    """Where a package is installed."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def compiler() -> str | None:
    """The C++ compiler: CXX, or a common one."""
    wanted = os.environ.get("CXX", "").split()
    return next((c for c in (*wanted[:1], "g++", "clang++", "c++") if shutil.which(c)), None)


def ninja() -> str | None:
    """Ninja, the environment's own first."""
    beside = Path(sys.executable).parent / "ninja"
    if package("ninja") is not None and beside.exists():
        return str(beside)
    return shutil.which("ninja")


def nvcc() -> str | None:
    """CUDA's compiler."""
    for home in ("CUDA_HOME", "CUDA_PATH"):
        path = Path(os.environ.get(home, "")) / "bin" / "nvcc"
        if os.environ.get(home) and path.exists():
            return str(path)
    return shutil.which("nvcc")


def visible_archs() -> list[str]:
    """The architectures of the CUDA devices that this machine shows."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^\d+\.\d+$", found.stdout, re.MULTILINE)


def cpu_flags() -> set[str] | None:
    """What this processor can do; None where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return None if found is None else set(found[1].split())


def versions(tool: str) -> str:
    """Everything that a tool says of its version."""
    command = [tool, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def version(tool: str) -> str:
    """The line of it that names the release."""
    lines = [line for line in versions(tool).splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]
    return (release or lines)[0].strip()
