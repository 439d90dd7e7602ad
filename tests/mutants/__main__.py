"""``python -m tests.mutants [FAMILY ...]``: plant each fault, run the family's tests, demand red,
take it back.

A family is a module of this folder with ``MUTANTS = [(file, old text, new text), ...]``, the pytest
arguments ``TESTS`` that must fail on each, and ``REBUILD = True`` where the fault lies in compiled
code that the tests load. The working tree must be clean of changes in the files touched, because
they are restored from memory.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent


def families() -> list[str]:
    """Every module of this folder that lists mutants."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("__"))


def build() -> bool:
    """Compile the extension in place; a fault that does not compile counts as caught."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def red(tests: list[str]) -> bool:
    """Whether the tests fail, or crash."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    code = subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
    return code == 1 or code < 0


def survivors(family: ModuleType) -> list[str]:
    """Plant every fault of a family; the ones no test noticed."""
    alive = []
    rebuild = getattr(family, "REBUILD", False)
    for file, old, new in family.MUTANTS:
        path = ROOT / file
        text = path.read_text()
        label = f"{file}: {old!r} -> {new!r}"
        if text.count(old) < 1:
            alive.append(f"{label} (the old text is not there)")
            continue
        try:
            path.write_text(text.replace(old, new, 1))
            caught = (rebuild and not build()) or red(family.TESTS)
        finally:
            path.write_text(text)
        print(f"  {'caught' if caught else 'SURVIVED'}  {label}", flush=True)
        if not caught:
            alive.append(label)
    if rebuild:
        build()
    return alive


def main() -> int:
    """Exit 1 if any fault survived."""
    alive: list[str] = []
    for name in sys.argv[1:] or families():
        family = importlib.import_module(f"tests.mutants.{name}")
        print(f"{name}: {len(family.MUTANTS)} faults")
        if red(family.TESTS):
            print("  the tests are red before any fault is planted")
            return 2
        alive += survivors(family)
    print(f"{len(alive)} survived" if alive else "every fault was caught")
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main())
