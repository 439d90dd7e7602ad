"""What a run found, as the files that people read: ``summary.md``, the benchmark's result
files ``bench-<dtype>.json`` and the launch table rows worth shipping, ``tuned-<op>.json``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.stages import STAGES, headline, tuning

GOOD = ("pass", "skip")
_ERROR_LINES = 12


def bad(records: list[Record]) -> list[Record]:
    """Those that neither passed nor were declined."""
    return [r for r in records if r["status"] not in GOOD]


def failed(journal: Journal, dry: bool) -> list[Record]:
    """What makes the run's exit code 1: a check that did not pass; in a rehearsal, anything."""
    return [r for r in bad(list(journal)) if dry or STAGES[r["stage"]].CHECKS]


def environment(journal: Journal, commit: str) -> dict[str, Any]:
    """The machine as the worker saw it, with the commit that was asked for."""
    record = journal.get("ceilings/environment") or {}
    found: dict[str, Any] = dict(record.get("environment", {}))
    commits = sorted({r["commit"] for r in journal})
    return found | {"commit": ", ".join(commits) or commit}


def write(out: Path, journal: Journal, commit: str, command: str, left: dict[str, int]) -> None:
    """Write every file anew; ``left`` are the cases of each stage that time did not reach."""
    facts = environment(journal, commit)
    (out / "summary.md").write_text("\n".join(_markdown(journal, facts, command, left)) + "\n")
    for dtype, document in headline.documents(journal.of("headline"), facts, command).items():
        (out / f"bench-{dtype}.json").write_text(json.dumps(document, indent=1) + "\n")
    for op, rows in tuning.winners(journal.of("tuning")).items():
        table = {"environment": facts, "rows": rows}
        (out / f"tuned-{op}.json").write_text(json.dumps(table, indent=1) + "\n")


def _markdown(
    journal: Journal, facts: dict[str, Any], command: str, left: dict[str, int]
) -> list[str]:
    lines = ["# GPU suite", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| stage | pass | skip | fail | error | crash | timeout | not reached |"]
    lines.append("|---|" + "---:|" * 7)
    kinds = ("pass", "skip", "fail", "error", "crash", "timeout")
    for name in STAGES:
        counts = Counter(r["status"] for r in journal.of(name))
        if counts or left.get(name):
            cells = " | ".join(str(counts[k]) for k in kinds)
            lines.append(f"| {name} | {cells} | {left.get(name, 0)} |")
    if wrong := bad(list(journal)):
        lines += ["", "## What did not pass"]
        for r in wrong:
            lines += ["", f"**{r['id']}**: {r['status']} after {r.get('seconds', 0)} s", "```"]
            text = "\n".join(r.get("faults", [])) or r.get("error", "")
            lines += [*text.splitlines()[-_ERROR_LINES:], "```"]
    for name, stage in STAGES.items():
        if records := journal.of(name):
            lines += ["", f"## {name}", *stage.report(records)]
    return lines
