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


def operator_of(source: Path) -> str | None:
    """The operator whose name is in a source's path below csrc/; None: shared."""
    place = str(source.relative_to(CSRC))
    return next((name for name in names() if name in place), None)


def cpu_kernels() -> dict[str, Path]:
    """Each operator's CPU kernel, which is compiled once per instruction set."""
    found = {}
    for path in sorted(CSRC.rglob("*kernel.h")):
        name = operator_of(path)
        if name is not None and "cpu" in str(path.relative_to(CSRC)):
            found[name] = path
    return found
