"""What was compiled into this installation, and why the rest was not."""

from __future__ import annotations

import functools
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_RECORD = Path(__file__).resolve().parent / "lib" / "build.json"
_NEVER_BUILT = {
    "reasons": dict.fromkeys(("cpu", "cuda", "host", "front"), "the build has not been run"),
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
    """Why ``part`` (``cpu``, ``cuda``, ``host`` or ``front``) was not built, or None."""
    found: str | None = _record()["reasons"].get(part, "it was built before there was one")
    return found


def how() -> str:
    """What to do to get the compiled parts."""
    return str(_record()["how"])


@functools.cache
def _host() -> ModuleType | None:
    """The compiled module; None where there is none for this Python. The libraries, on torch's
    stable ABI, do not mind which Python it is."""
    if reason("host") is not None:
        return None
    try:
        return import_module("petal_kernels._host")
    except ModuleNotFoundError:
        return None


def facts() -> dict[str, str]:
    """Compiler, flags, instruction sets, architectures, commit; of the compiled module if any."""
    host = _host()
    return dict(_record()["facts"] if host is None else host.build_facts())


def cpu_capability() -> dict[str, bool]:
    """Instruction sets of this CPU; empty without the compiled module."""
    host = _host()
    return {} if host is None else dict(host.cpu_capability())


def front(torch_version: str) -> ModuleType | None:
    """The short ways for small calls; None where they were not built for this torch and Python:
    what they take of torch is no stable interface."""
    if reason("front") is not None or _record()["facts"].get("torch") != torch_version:
        return None
    try:
        return import_module("petal_kernels._front")
    except ModuleNotFoundError:
        return None
