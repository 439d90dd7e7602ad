"""`petal-kernels bench plans` measures every operator that has a planner, found by its folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petal_kernels.tools import operators
from petal_kernels.tools.bench import plans, timing
from petal_kernels.tools.bench.request import Request


def test_operators_with_a_planner_are_found_by_folder() -> None:
    folders = {p.parent.name for p in operators.OPS.glob("*/planner.py")}
    assert {op.name for op in plans.planned()} == folders
    assert {"lowrank_linear", "expert_dispatch"} <= folders


def test_every_planner_is_held_against_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mode of each operator, the chosen plan among them; the slowest is what is chosen."""
    called: list[tuple[str, ...]] = []

    def compare(steps: dict[str, Any], *_: Any) -> dict[str, timing.Timing]:
        called.append(tuple(steps))
        for turn, step in enumerate(steps.values()):
            out = step.run(turn)
            first = out[0] if isinstance(out, (list, tuple)) else out
            assert first.requires_grad == (len(called) % 2 == 0)  # inference, then training
        return {name: timing.Timing(1.0 + i, 1.0, 1.0, 0.0, 4) for i, name in enumerate(steps)}

    monkeypatch.setattr(timing, "compare", compare)
    found = list(plans.bench(Request(quick=True, rounds=4)))
    names = [op.workload.SHAPES[0].name.split(" N=")[0] for op in plans.planned()]
    assert len(found) == len(called) == 2 * len(names)
    for i, (row, steps) in enumerate(zip(found, called, strict=True)):
        assert row["scenario"].startswith(f"plans {names[i // 2]}")
        assert row["scenario"].endswith("training" if i % 2 else "inference")
        assert row["choice"] in steps
        assert row["behind_best"] == steps.index(row["choice"])
        known = set(plans.planned()[i // 2].module("planner").PLANS)  # type: ignore[union-attr]
        assert {s.split()[1] for s in steps} <= known
        assert any(s.startswith("torch ") for s in steps)


def test_a_plan_that_does_not_apply_is_left_out() -> None:
    """Experts that are all used have nothing to sort by."""
    op = next(o for o in plans.planned() if o.name == "expert_dispatch")
    dense = next(s for s in op.workload.CASES if not s.top_k and s.plan == "auto")
    inputs = op.workload.make_inputs(dense, torch.float32, torch.device("cpu"))
    assert list(plans._providers(op, inputs, False, "torch")) == ["torch stationary"]
    chosen = next(s for s in op.workload.CASES if s.top_k and s.plan == "auto")
    inputs = op.workload.make_inputs(chosen, torch.float32, torch.device("cpu"))
    assert list(plans._providers(op, inputs, False, "torch")) == [
        "torch stationary",
        "torch sorted",
    ]
