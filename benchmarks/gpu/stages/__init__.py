"""The stages in order of value. Adding one is adding a module and its line here."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.stages import (
    candidates,
    capture,
    ceilings,
    compiles,
    correctness,
    headline,
    large,
    memory,
    plans,
    preflight,
    rows,
    sanitizer,
    tuning,
)
from benchmarks.gpu.suite import Case, Stage, Suite

STAGES: dict[str, Stage] = {
    "preflight": preflight,
    "ceilings": ceilings,
    "correctness": correctness,
    "capture": capture,
    "compiles": compiles,
    "large": large,
    "headline": headline,
    "rows": rows,
    "candidates": candidates,
    "tuning": tuning,
    "plans": plans,
    "memory": memory,
    "sanitizer": sanitizer,
}


def run(case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one case of whichever stage: what the worker calls."""
    return STAGES[case["stage"]].run(case, Suite(**settings))
