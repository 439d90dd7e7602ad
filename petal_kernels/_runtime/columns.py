"""A table as text, and its figures: what reports on a terminal are laid out by."""

from __future__ import annotations

from collections.abc import Sequence


def columns(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int],
    indent: str = "  ",
) -> str:
    """Columns padded to their widest entry, those numbered in `right` to the right."""
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    out = []
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(out)


def rounded(value: float, digits: int) -> str:
    """A figure with that many digits; one that is not zero and would round to it says below what it
    is: `< 0.01`."""
    text = f"{value:.{digits}f}"
    if value == 0 or float(text) != 0:
        return text
    least = f"{10.0**-digits:.{digits}f}"
    return f"< {least}" if value > 0 else f"> -{least}"
