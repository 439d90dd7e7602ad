"""Every plan of the operators that have a `planner.py` against what it chooses, inference and
training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import petal_kernels as pk
from petal_kernels.tools import operators
from petal_kernels.tools.bench import timing
from petal_kernels.tools.bench.request import Request, swept
from petal_kernels.tools.bench.timing import Step
from petal_kernels.tools.operators import Operator


def planned() -> list[Operator]:
    """The operators that have several plans, found by their folder's ``planner.py``."""
    return [op for op in operators.operators() if op.module("planner") is not None]


def bench(request: Request) -> Iterator[dict[str, Any]]:
    """Print and give one entry per operator and shape, inference and training, when it is there."""
    worst = 0.0
    plain = replace(request, sweep=None)
    for op in planned():
        shapes = op.workload.SHAPES
        for shape in shapes[:1] if request.quick else shapes:
            ((case, _),) = swept(shape, plain)
            for training in (False, True):
                found = _plans_of(op, case, training, request)
                worst = max(worst, found["behind_best"])
                yield found
    print(f"\nthe planner is at most {100 * worst:.1f} % behind the best plan")


def _inputs(op: Operator, case: Any, training: bool, request: Request) -> dict[str, Any]:
    """A call's arguments; inference drops nothing out and trains nothing."""
    inputs = dict(op.workload.make_inputs(case, request.dtype, request.device))
    if not training and "dropout" in inputs:
        inputs["dropout"] = 0.0
        inputs.pop("rng", None)
    names = operators.trainable(op, case) if training else ()
    return operators.require_grad(inputs, names)


def _plans(op: Operator, backend: Any) -> tuple[str, ...]:
    """A backend's own plans, or the planner's, where every backend has them all."""
    planner = op.module("planner")
    assert planner is not None
    found: tuple[str, ...] = getattr(backend.load(), "PLANS", planner.PLANS)
    return found


def _providers(
    op: Operator, inputs: dict[str, Any], training: bool, chosen: str
) -> dict[str, Step]:
    def run(plan: str, backend: str) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(training):
                return op.public(**inputs, plan=plan, backend=backend)

        return call

    found: dict[str, Step] = {}
    for name in dict.fromkeys((chosen, "torch")):
        backend = next(b for b in op.backends if b.name == name)
        for plan in _plans(op, backend):
            if training and plan == "merge":
                continue  # never chosen in training: it would form the merged weights each step
            call = run(plan, backend.name)
            with contextlib.suppress(ValueError):  # a plan that does not apply to this case
                call()
                found[f"{backend.name} {plan}"] = Step(lambda _, call=call: call())  # type: ignore[misc]
    return found


def _plans_of(op: Operator, case: Any, training: bool, request: Request) -> dict[str, Any]:
    inputs = _inputs(op, case, training, request)
    with torch.set_grad_enabled(training):
        choice = pk.explain(op.public, **inputs)
    steps = _providers(op, inputs, training, choice.backend)
    rows = timing.compare(steps, request.device, request.rounds)
    label = f"{choice.backend} {choice.plan}"
    behind = rows[label].median / min(t.median for t in rows.values()) - 1.0
    scenario = f"{case.name} {'training' if training else 'inference'}"
    print(f"\n{op.name}, {scenario}: planner takes {label}")
    for provider, t in rows.items():
        print(f"  {provider:<18}{t.median:10.3f} ms")
    noise = timing.drift(rows)
    print(f"  behind the best {100 * behind:.1f} %, drift {100 * noise:.1f} %", flush=True)
    return {
        "scenario": f"plans {scenario}",
        "choice": label,
        "behind_best": round(behind, 4),
        "drift": round(noise, 4),
        "milliseconds": {k: round(t.median, 4) for k, t in rows.items()},
    }
