"""What mkdocs does beside rendering: the refusals are read from the source of the package, and the
scripts from examples/."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from messages import ROOT, messages
from refusals import MARK, page

SCRIPTS = "<!-- examples -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the places that a page marks."""
    if MARK in markdown:
        markdown = markdown.replace(MARK, page(messages()))
    return markdown.replace(SCRIPTS, scripts()) if SCRIPTS in markdown else markdown


def scripts(root: Path = ROOT) -> str:
    """Every script of examples/ with the first sentence of its docstring, as a table."""
    lines = ["| script | what it does |", "|---|---|"]
    for path in sorted((root / "examples").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(text.split("\n\n")[0].split())
        if not first:
            raise ValueError(f"{path.name}: want a docstring that says what it does, got none")
        lines.append(f"| `examples/{path.name}` | {first} |")
    return "\n".join(lines)
