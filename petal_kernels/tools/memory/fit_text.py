"""What is said of needs: a short table, a sentence, the changes; the same as JSON and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petal_kernels._runtime.columns import columns as table
from petal_kernels._runtime.columns import rounded
from petal_kernels.memory.optimizer import Settings
from petal_kernels.memory.records import mib
from petal_kernels.tools import charts, page
from petal_kernels.tools.memory.budget import PARTS
from petal_kernels.tools.memory.fit import MOST_SAMPLES, Tried, Verdict

if TYPE_CHECKING:
    from petal_kernels.tools.memory.planner import Column

SCHEMA = 1


def _gib(size: float) -> str:
    return rounded(size / 2**30, 2)


def _there(found: Sequence[Column]) -> list[Column]:
    return [c for c in found if c.budget is not None]


def rows(found: Sequence[Column]) -> list[list[str]]:
    """Parts by method, in GiB; then what a method needs, and the largest batch."""
    there = _there(found)
    budgets = [c.budget for c in there if c.budget is not None]
    cells = [[name, *(_gib(b.parts[name]) for b in budgets)] for name in PARTS]
    cells.append(["needed", *(_gib(b.need) for b in budgets)])
    if all(c.verdict for c in there):
        verdicts = [c.verdict for c in there if c.verdict is not None]
        cells.append(["fits", *("yes" if v.fits else "no" for v in verdicts)])
        cells.append(["largest batch", *(_batch(v.largest_batch) for v in verdicts)])
    return cells


def _batch(count: int | None) -> str:
    if count is None:
        return "not asked"
    return f"{count} or more" if count >= MOST_SAMPLES else str(count)


def verdict(found: Verdict, batch: int | None) -> str:
    """Whether it fits, in a sentence."""
    what = f"Batch {batch}" if batch else "The step"
    most = ""
    if found.largest_batch is not None:
        most = f"; the largest batch is {_batch(found.largest_batch)}"
    if found.largest_batch == 0:
        most = "; not one sample does"
    if found.fits:
        return f"{what} fits {found.gpu} with {mib(found.spare)} to spare{most}."
    text = f"{what} does not fit {found.gpu}: {mib(-found.spare)} too much{most}."
    if found.answer is None:
        return f"{text} None of the changes is enough."
    need = mib(found.answer.budget.need)
    how = f": {found.answer.code}" if found.answer.code else ""
    return f"{text} The cheapest way: {found.answer.label} ({need}){how}."


def _changes(found: Verdict) -> list[list[str]]:
    def row(tried: Tried) -> list[str]:
        saved = found.budget.need - tried.budget.need
        sign = "-" if saved >= 0 else "+"
        fits = "yes" if tried.fits else "no"
        size = f"{sign}{_gib(abs(saved))}"
        return [tried.label, _gib(tried.budget.need), size, fits, tried.cost]

    return [row(tried) for tried in found.changes]


def _how(found: Verdict) -> list[list[str]]:
    """How each change is made."""
    answer = [] if found.answer is None or found.answer in found.changes else [found.answer]
    pairs = dict.fromkeys(pair for tried in (*found.changes, *answer) for pair in tried.how)
    return [list(pair) for pair in pairs]


_HOW = ("of this command", "in your code")
_CHANGES = ("change", "GiB", "", "fits", "cost in time")


def _headers(found: Sequence[Column]) -> tuple[str, ...]:
    return ("GiB at the peak", *(c.method for c in _there(found)))


def sentences(found: Sequence[Column]) -> list[str]:
    """What the tables do not say."""
    lines = []
    several = len(found) > 1
    for column in found:
        before = f"{column.method}: " if several else ""
        if column.why_not:
            lines.append(f"{before}not here: {column.why_not}")
        if column.verdict is not None:
            lines.append(before + verdict(column.verdict, column.options.batch))
    towers = [c.tower for c in found if c.tower is not None]
    # The same for all methods that leave it alone; the one that keeps most says most.
    lines += [str(max(towers, key=lambda t: t.keeps))] if towers else []
    return lines


def report(found: Sequence[Column], optimizer: Settings) -> str:
    """For a terminal."""
    there = _there(found)
    lines = list(dict.fromkeys([*(c.title for c in there), *(s for c in there for s in c.said)]))
    lines += [f"optimizer: {optimizer}", ""]
    lines += [table(_headers(found), rows(found), right=tuple(range(1, len(there) + 1))), ""]
    lines += sentences(found)
    for column in there:
        if column.verdict is not None and column.verdict.changes:
            name = f" ({column.method})" if len(there) > 1 else ""
            lines += ["", f"Changes by their cost in time{name}"]
            lines += [table(_CHANGES, _changes(column.verdict), right=(1, 2))]
            how = _how(column.verdict)
            lines += ["", f"How to make them{name}", table(_HOW, how, right=())] if how else []
    return "\n".join(lines)


def document(
    found: Sequence[Column], optimizer: Settings, command: str, where: Mapping[str, Any]
) -> dict[str, Any]:
    """As plain data; bytes."""
    return {
        "schema": SCHEMA,
        "command": command,
        "environment": dict(where),
        "optimizer": str(optimizer),
        "methods": [_plain(column) for column in found],
    }


def _plain(column: Column) -> dict[str, Any]:
    found = column.verdict
    values: dict[str, Any] = {
        "method": column.method,
        "title": column.title,
        "batch": column.said,
        "options": dataclasses.asdict(column.options),
        "why_not": column.why_not,
        "tower": None if column.tower is None else dataclasses.asdict(column.tower),
        "budget": None if column.budget is None else column.budget.to_dict(),
    }
    if found is None:
        return values
    return values | {
        "gpu": dataclasses.asdict(found.gpu),
        "fits": found.fits,
        "spare": found.spare,
        "largest_batch": found.largest_batch,
        "changes": [_change(tried) for tried in found.changes],
        "answer": None if found.answer is None else _change(found.answer),
        "verdict": verdict(found, column.options.batch),
    }


def _change(tried: Tried) -> dict[str, Any]:
    return {
        "label": tried.label,
        "cost": tried.cost,
        "need": tried.budget.need,
        "fits": tried.fits,
        "parts": tried.budget.parts,
        "how": [{"option": option, "code": code} for option, code in tried.how],
    }


def page_of(
    found: Sequence[Column], optimizer: Settings, command: str, where: Mapping[str, Any]
) -> str:
    """One self-contained page."""
    there = _there(found)
    said = [s for c in there for s in c.said]
    title = there[0].title if len(there) == 1 else "What methods need"
    bars = {
        c.method: {n: size / 2**30 for n, size in c.budget.parts.items() if size}
        for c in there
        if c.budget is not None
    }
    figure = charts.inline(charts.bars(bars, title="At the peak of a step", unit="GiB"))
    texts = list(dict.fromkeys([*(c.title for c in there), *said, f"optimizer: {optimizer}"]))
    sections = [
        page.section(
            "One training step",
            *(page.paragraph(text) for text in [*texts, *sentences(found)]),
            page.table(_headers(found), rows(found)),
            figure,
            page.paragraph(f"Reproduce: {command}", "faint"),
        )
    ]
    for column in there:
        if column.verdict is not None and column.verdict.changes:
            tables = [page.table(_CHANGES, _changes(column.verdict))]
            how = _how(column.verdict)
            tables += [page.table(_HOW, how)] if how else []
            sections.append(
                page.section(f"Changes by their cost in time: {column.method}", *tables)
            )
    return page.document(title, sections, environment=where)
