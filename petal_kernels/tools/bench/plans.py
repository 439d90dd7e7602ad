"""Every plan of `lowrank_linear` against the planner's choice, inference and training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import petal_kernels as pk
from petal_kernels.ops.lowrank_linear import workload
from petal_kernels.tools.bench import op, timing
from petal_kernels.tools.bench.request import Request, swept
from petal_kernels.tools.bench.timing import Step


def bench(request: Request) -> Iterator[dict[str, Any]]:
    """Print and give one entry per shape, inference and training, when it is there."""
    worst = 0.0
    plain = replace(request, sweep=None)
    for shape in workload.SHAPES[:1] if request.quick else workload.SHAPES:
        ((case, _),) = swept(shape, plain)
        for training in (False, True):
            inputs = workload.make_inputs(case, request.dtype, request.device)
            if not training:
                inputs["dropout"] = 0.0
                inputs.pop("rng", None)
            found = _plans_of(case.name, inputs, training, request)
            worst = max(worst, found["behind_best"])
            yield found
    print(f"\nthe planner is at most {100 * worst:.1f} % behind the best plan")


def _providers(inputs: dict[str, Any], training: bool, chosen: str) -> dict[str, Step]:
    def run(plan: str, backend: str) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(training):
                return pk.lowrank_linear(**inputs, plan=plan, backend=backend)

        return call

    found: dict[str, Step] = {}
    for name in dict.fromkeys((chosen, "torch")):
        backend = next(b for b in op.operator("lowrank_linear").backends if b.name == name)
        for plan in backend.load().PLANS:
            if training and plan == "merge":
                continue  # never chosen in training: it would form the merged weights each step
            call = run(plan, backend.name)
            with contextlib.suppress(ValueError):  # a plan that does not apply to this case
                call()
                found[f"{backend.name} {plan}"] = Step(lambda _, call=call: call())  # type: ignore[misc]
    return found


def _plans_of(
    name: str, inputs: dict[str, Any], training: bool, request: Request
) -> dict[str, Any]:
    if training:
        inputs["down" if inputs["down"] is not None else "hidden"].requires_grad_()
    with torch.set_grad_enabled(training):
        choice = pk.explain(pk.lowrank_linear, **inputs)
    steps = _providers(inputs, training, choice.backend)
    rows = timing.compare(steps, request.device, request.rounds)
    label = f"{choice.backend} {choice.plan}"
    behind = rows[label].median / min(t.median for t in rows.values()) - 1.0
    print(f"\n{name}, {'training' if training else 'inference'}: planner takes {label}")
    for provider, t in rows.items():
        print(f"  {provider:<18}{t.median:10.3f} ms")
    noise = timing.drift(rows)
    print(f"  behind the best {100 * behind:.1f} %, drift {100 * noise:.1f} %", flush=True)
    return {
        "scenario": f"plans {name} {'training' if training else 'inference'}",
        "choice": label,
        "behind_best": round(behind, 4),
        "drift": round(noise, 4),
        "milliseconds": {k: round(t.median, 4) for k, t in rows.items()},
    }
