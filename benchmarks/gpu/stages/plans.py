"""Every plan of the operators that have several, against the planner's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import petal_kernels as pk
from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.stopwatch import race
from benchmarks.gpu.suite import Case, Suite
from petal_kernels.tools import operators

SHARE, LIMIT, PARALLEL, CHECKS = 4.0, 120.0, False, False
BEHIND = 1.10  # the planner's choice is to be within this of the best plan
_ROUNDS = 20


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """Per operator with a planner, shape, dtype, and training or inference."""
    found = []
    for op in suite.operators():
        if op.module("planner") is None:
            continue
        for dtype in dict.fromkeys((suite.dtype, "float32")):
            for shape in suite.shapes(op):
                for mode in ("training", "inference"):
                    found.append(
                        {
                            "id": f"plans/{op.name}/{dtype}/{mode}/{shape.name}",
                            "op": op.name,
                            "shape": shape.name,
                            "dtype": dtype,
                            "mode": mode,
                        }
                    )
    return found


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """Milliseconds of every plan that applies: a forward for inference, else a training step."""
    op, shape = suite.shape(case)
    planner = op.module("planner")
    assert planner is not None
    inputs = suite.inputs(case)
    training = case["mode"] == "training"
    if not training and "dropout" in inputs:
        inputs |= {"dropout": 0.0, "rng": None}
    names = operators.trainable(op, shape) if training else ()
    grown = operators.require_grad(inputs, names)
    with torch.set_grad_enabled(training):
        chosen = pk.explain(op.public, **grown).plan
        outs, _ = operators.run(op.public, inputs, ())
    douts = [d.to(o) for d, o in zip(operators.output_gradients(outs), outs, strict=True)]

    def step(plan: str) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(training):
                return operators.run(op.public, inputs, names, douts, plan=plan)

        return call

    steps, declined = {}, {}
    for plan in planner.PLANS:
        if training and plan == "merge":
            continue  # forms the merged weights anew each step; the planner never takes it
        try:
            step(plan)()
        except (ValueError, RuntimeError) as e:
            if "CUDA error" in str(e):
                raise
            declined[plan] = str(e)[:200]
            continue
        steps[plan] = step(plan)
    ms = race(steps, suite.device, 2 if suite.dry else _ROUNDS)
    behind = ms[chosen] / min(ms.values()) if chosen in ms else None
    return {
        "chosen": chosen,
        "behind": None if behind is None else round(behind, 4),
        "ms": {plan: round(value, 5) for plan, value in ms.items()},
        "declined": declined,
    }


def report(records: list[Record]) -> list[str]:
    """How often the planner is right, and where it is not."""
    found = [r for r in records if r.get("behind") is not None]
    off = sorted((r for r in found if r["behind"] > BEHIND), key=lambda r: -r["behind"])
    lines = [f"The planner's choice is within {BEHIND:.2f} of the best plan in "
             f"{len(found) - len(off)} of {len(found)} cases."]  # fmt: skip
    for r in off:
        best = min(r["ms"], key=r["ms"].__getitem__)
        lines.append(
            f"- {r['op']}, {r['shape']}, {r['dtype']}, {r['mode']}: takes {r['chosen']} "
            f"{r['ms'][r['chosen']]} ms, {best} needs {r['ms'][best]} ms"
        )
    return lines
