"""torch.compile of the headline's baselines, side by side: what the timed stage then finds in the
compiler's cache."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.stages import headline, preflight
from benchmarks.gpu.suite import Case, Suite
from petal_kernels.tools.bench.scenarios import step

SHARE, LIMIT, PARALLEL, CHECKS = 6.0, 180.0, True, False


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """The headline's; none in a rehearsal, whose headline compiles nothing, nor where nothing
    compiles."""
    if suite.dry or not preflight.compiles(journal):
        return []
    return [
        case | {"id": case["id"].replace("headline", "compiles", 1)}
        for case in headline.cases(suite, journal)
    ]


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """One compiled step in each mode that is timed, and the one that is checked."""
    scenario, _ = headline.build(case, suite, against=("compile",))
    provider = scenario.providers["compile"]
    if provider.check is not None:
        provider.check()  # without dropout: another graph
    for mode in headline.MODES:
        step(provider, mode, scenario.inputs)()
    return {}


def report(records: list[Record]) -> list[str]:
    """What it took."""
    seconds = sum(r.get("seconds", 0.0) for r in records)
    return [f"- torch.compile of {len(records)} baselines: {seconds:.0f} s of processor time"]
