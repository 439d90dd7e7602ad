"""What was compiled into this installation, and why the rest was not."""

from __future__ import annotations

import functools
import json
from importlib import import_module
from pathlib import Path
from typing import Any

_RECORD = Path(__file__).resolve().parent / "lib" / "build.json"
_NEVER_BUILT = {
    "reasons": dict.fromkeys(("cpu", "cuda", "host"), "the build has not been run"),
    "facts": {},
    "how": "Run `pip install --no-build-isolation -e .` in the source tree",
}


@functools.cache
def _record() -> dict[str, Any]:
    if not _RECORD.exists():
        return _NEVER_BUILT
    found: dict[str, Any] = json.loads(_RECORD.read_text())
    return found


def reason(part: str) -> str | None:
    """Why ``part`` (``cpu``, ``cuda`` or ``host``) was not built, or None."""
    found: str | None = _record()["reasons"][part]
    return found


def how() -> str:
    """What to do to get the compiled parts."""
    return str(_record()["how"])


def facts() -> dict[str, str]:
    """Compiler, flags, instruction sets, architectures, commit; of the compiled module if any."""
    if reason("host") is None:
        return dict(import_module("petal_kernels._host").build_facts())
    return dict(_record()["facts"])


def cpu_capability() -> dict[str, bool]:
    """Instruction sets of this CPU; empty without the compiled module."""
    if reason("host") is None:
        return dict(import_module("petal_kernels._host").cpu_capability())
    return {}
