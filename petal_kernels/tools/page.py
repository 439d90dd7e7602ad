"""The HTML page of a report: one self-contained file, light and dark, readable on a phone.

Nothing in it refers to anything outside it: no script, no font, no image. Charts are the inline SVG
of `charts`, which takes its colours from the variables set here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

# In the light theme; a chart is drawn in these, which are then replaced by their variables.
SERIES = (
    "#60656c", "#b5651d", "#7a4fb5", "#1668c7", "#18794e", "#b0186f", "#0f7b86", "#8a6d00",
)  # fmt: skip
FAINT, LINE = SERIES[0], "#d9dce1"
_LIGHT = f"""--back:#fff; --text:#1c2024; --faint:{FAINT}; --line:{LINE}; --panel:#f5f6f8;
--loss:#c62a2f; --win:#18794e; {" ".join(f"--s{i}:{c};" for i, c in enumerate(SERIES))}"""
_DARK = """--back:#15171a; --text:#e8eaed; --faint:#a0a6ad; --line:#363b41; --panel:#1e2125;
--loss:#ff7b7f; --win:#4cc38a; --s0:#a0a6ad; --s1:#f0a35e; --s2:#b99af0; --s3:#6cb2ff; --s4:#4cc38a;
--s5:#f582c4; --s6:#52c7d3; --s7:#e2c044;"""
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
body {{ margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
p {{ margin: .4rem 0; max-width: 48rem; }}
h1, h2, p {{ overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }}
th, td {{ padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
th {{ color: var(--faint); font-weight: 600; }}
th.number, td.number {{ text-align: right; }}
td.sentence {{ white-space: normal; min-width: 11rem; }}
tr.loss td, .loss {{ color: var(--loss); }}
tr.win td, .win {{ color: var(--win); }}
.environment {{ background: var(--panel); border-radius: 8px; padding: .5rem .4rem; }}
.environment td {{ border: 0; padding: .1rem .6rem; white-space: normal; }}
.environment td:first-child, .faint {{ color: var(--faint); }}
code {{ font: 12.5px ui-monospace, monospace; user-select: all; }}
svg {{ display: block; width: 100%; min-width: 420px; max-width: 720px; height: auto;
  margin: .8rem 0; }}
svg text {{ fill: var(--text); }}
"""
_SENTENCE = 30  # characters from which a cell may be broken into lines
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?\s*(%|x|\w{1,5})?")


class Html(str):
    """Text that is markup already: a cell of this type is not escaped."""


def escape(text: object) -> str:
    """Any value as HTML text; Html stays as it is."""
    return text if isinstance(text, Html) else html.escape(str(text))


def code(text: str) -> Html:
    """A command or a name in fixed pitch; one click selects it whole."""
    return Html(f"<code>{escape(text)}</code>")


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph, of class `kind` ("loss", "win" or "faint") if given."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return Html(f"<p{attribute}>{escape(text)}</p>")


def _numeric(cell: object) -> bool:
    if isinstance(cell, Html):
        return False
    return isinstance(cell, (int, float)) or _NUMBER.fullmatch(str(cell).strip()) is not None


def table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], classes: Sequence[str] | None = None
) -> Html:
    """A table; a column of numbers is right-aligned. `classes` holds one class per row ("", "loss"
    or "win")."""
    numeric = []
    for i in range(len(headers)):
        cells = [row[i] for row in rows if row[i] not in ("", None)]
        numeric.append(bool(cells) and all(_numeric(c) for c in cells))

    def cell(tag: str, i: int, value: object) -> str:
        kind = ' class="number"' if numeric[i] else ""
        if not isinstance(value, Html) and len(str(value)) > _SENTENCE and " " in str(value):
            kind = ' class="sentence"'
        return f"<{tag}{kind}>{'' if value is None else escape(value)}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(headers))
    body = []
    for row, kind in zip(rows, classes or [""] * len(rows), strict=True):
        mark = f' class="{escape(kind)}"' if kind else ""
        inside = "".join(cell("td", i, c) for i, c in enumerate(row))
        body.append(f"<tr{mark}>{inside}</tr>")
    return Html(
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def section(title: str, *parts: str) -> Html:
    """A heading and what is under it: markup of this module and of `charts`."""
    inside = "\n".join(f'<div class="wide">{p}</div>' if p.startswith("<svg") else p for p in parts)
    return Html(f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>")


def _environment(environment: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(k.replace('_', ' '))}</td><td>{escape('none' if v is None else v)}</td>"
        "</tr>"
        for k, v in environment.items()
    )
    return f'<table class="environment"><tbody>{rows}</tbody></table>'


def document(title: str, sections: Sequence[str], *, environment: Mapping[str, Any]) -> str:
    """The whole page: title, where it was measured, then the sections."""
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        # An empty icon, else a browser asks the server for /favicon.ico.
        '<link rel="icon" href="data:,"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{_environment(environment)}\n{body}\n</body>\n</html>\n"
    )
