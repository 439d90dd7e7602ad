"""docs/tools, which mkdocs loads as files beside each other."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_FOLDER = str(Path(__file__).resolve().parents[2] / "docs" / "tools")


def load(name: str) -> Any:
    """A module of docs/tools."""
    if _FOLDER not in sys.path:
        sys.path.append(_FOLDER)
    return importlib.import_module(name)


messages, refusals, pictures, hooks = map(load, ("messages", "refusals", "pictures", "hooks"))
