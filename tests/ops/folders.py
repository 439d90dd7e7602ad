"""What operators and kernel sources there are, by the names of their folders and files alone:
nothing is imported, so that processes without torch may ask."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = ROOT / "petal_kernels" / "ops"
CSRC = ROOT / "csrc"


def names(module: str = "op") -> list[str]:
    """The operators with a module of this name, all by default."""
    return sorted(p.parent.name for p in OPS.glob(f"*/{module}.py"))


def cpu_kernels() -> dict[str, Path]:
    """Each operator's CPU kernel, which is compiled once per instruction set."""
    return {p.parent.parent.name: p for p in sorted(CSRC.glob("*/cpu/kernel.cpp"))}
