"""Colours of a terminal, for every command alike."""

from __future__ import annotations

import os
import sys
from typing import TextIO

RED, GREEN, YELLOW, BOLD, FAINT = "31", "32", "33", "1", "2"


def painted(text: str, colour: str, stream: TextIO | None = None) -> str:
    """`text` in a colour where `stream` (stdout) is a terminal, unless NO_COLOR holds anything."""
    stream = sys.stdout if stream is None else stream
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"
