"""A profile as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from petal_kernels import memory
from petal_kernels._runtime.columns import rounded
from petal_kernels.memory.advice import advise
from petal_kernels.memory.optimizer import Settings
from petal_kernels.memory.records import MODEL, mib
from petal_kernels.memory.text import HEADERS, cells, totals
from petal_kernels.tools import charts, page
from petal_kernels.tools.memory import plot, whatif
from petal_kernels.tools.memory.compare import Kept

_BARS = 12


def report(
    title: str,
    profile: memory.Profile,
    answers: Sequence[whatif.Answer],
    command: str,
    environment: Mapping[str, Any],
    optimizer: Settings,
) -> str:
    """The page: totals, advice, modules, timeline, what was alive at the peak, what if."""
    sections = [
        page.section(
            "One training step",
            page.table(("", ""), [(name.strip(), text) for name, text in totals(profile)]),
            page.paragraph(f"Reproduce: {command}", "faint"),
        )
    ]
    advice = advise(profile)
    if advice:
        rows = [(mib(a.bytes), a.text, a.remedy) for a in advice]
        # Sentences: each in a paragraph of its own, so that they wrap on a phone.
        parts = [page.paragraph(f"{size}: {text}. {do.capitalize()}.") for size, text, do in rows]
        sections.append(page.section("What to do", *parts))
    if profile.saved:
        table = page.table(
            (HEADERS[0], "%", "tensors", "role", *HEADERS[4:]),
            [cells(row, whole=True) for row in profile.rows()],
        )
        sections.append(page.section("Kept for backward, by module", _bars(profile), table))
    if profile.live:
        sections.append(page.section("Live bytes over the step", *_timeline(profile)))
    if len(answers) > 1:
        table = page.table(whatif.headers(optimizer), whatif.rows(answers))
        sections.append(page.section("What if", table))
    return page.document(title, sections, environment=environment)


def comparison(title: str, kept: Sequence[Kept], command: str, environment: Any) -> str:
    """The page of `--compare`."""
    largest = {k.name: {"kept": k.bytes / 2**20} for k in kept}
    table = page.table(
        ("form", "kept", "times x"),
        [(k.name, mib(k.bytes), f"{rounded(k.times_x, 2)}x") for k in kept],
    )
    bars = charts.inline(charts.bars(largest, title="Kept for backward", unit="MiB"))
    sections = [page.section(title, bars, table, page.paragraph(f"Reproduce: {command}", "faint"))]
    return page.document(title, sections, environment=environment)


def _bars(profile: memory.Profile) -> str:
    groups: dict[str, dict[str, float]] = {}
    for row in profile.rows()[:_BARS]:
        group = groups.setdefault(row.place or MODEL, {})
        role = row.role or "no parameters"
        group[role] = group.get(role, 0.0) + row.bytes / 2**20
    title = "Kept for backward by the largest modules"
    return charts.inline(charts.bars(groups, title=title, unit="MiB"))


def _timeline(profile: memory.Profile) -> list[str]:
    alive = [(mib(size), category, where) for category, where, size in profile.at_peak(12)]
    return [
        *(charts.inline(figure) for figure in plot.changes(profile)),
        page.paragraph(f"Alive at the peak ({mib(profile.peak_bytes)}):"),
        page.table(("bytes", "what", "where"), alive),
    ]
