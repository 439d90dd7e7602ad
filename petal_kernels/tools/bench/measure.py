"""Everything that is measured of one scenario: errors, then counts, then times, then errors again
on inputs that came after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from petal_kernels.tools.bench import counting, cuda_graphs, fresh, timing
from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.fresh import Fresh
from petal_kernels.tools.bench.judge import judge
from petal_kernels.tools.bench.request import Request
from petal_kernels.tools.bench.results import Row, Table
from petal_kernels.tools.bench.scenarios import Provider, Scenario, by_mode, step
from petal_kernels.tools.bench.timing import Step, Timing

Phase = Callable[[str, int, int], None]  # name of the phase, done, total
Timed = tuple[Step, Fresh]  # a step and the inputs that it reads
_REPLAYED = Errors(math.inf, math.inf)


def measure(
    scenario: Scenario, request: Request, ceilings: Ceilings, phase: Phase
) -> Iterator[Table]:
    """One table per mode, when it is there."""
    errors: dict[str, Errors | None] = {}
    for i, (label, provider) in enumerate(scenario.providers.items()):
        phase("compile" if provider.compiled else "check", i, len(scenario.providers))
        errors[label] = None if provider.check is None else provider.check()
    for mode in request.modes:
        yield _table(scenario, mode, request, ceilings, errors, phase)


def _errors_after(
    scenario: Scenario,
    mode: str,
    timed: Mapping[str, Timed],
    errors: dict[str, Errors | None],
    notes: list[str],
) -> dict[str, Errors | None]:
    """The worst of the errors before and of those after the clock: a form that answered from
    memory while it was timed has not computed what the clock says."""
    found = dict(errors)
    for label, before in errors.items():
        scenario.fresh.go_to(1)
        provider = scenario.providers[label]
        try:
            if before is not None and provider.check is not None:
                found[label] = before | provider.check(mode != "forward")
            same = fresh.replays(*timed[label])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it ran before the clock: torch found a graph used twice
            found[label] = _REPLAYED
            notes.append(f"{label} fails after the timing ({str(error).splitlines()[0]})")
            continue
        if same:
            found[label] = _REPLAYED
            notes.append(f"{label} gives one answer for two inputs")
    return found


def _times(
    scenario: Scenario, mode: str, request: Request, phase: Phase, notes: list[str]
) -> tuple[dict[str, Timing], dict[str, Timing], dict[str, Timed]]:
    """Of the device, and on CUDA of the host beside it; and what was timed."""
    phase("warm-up", 0, request.rounds)
    eager: dict[str, Timed] = {
        label: (step(p, mode, scenario.inputs), scenario.fresh)
        for label, p in scenario.providers.items()
    }

    def compare(timed: Mapping[str, Timed], wall: bool = False) -> dict[str, Timing]:
        steps = {label: inputs.before(one) for label, (one, inputs) in timed.items()}
        return timing.compare(
            steps,
            request.device,
            request.rounds,
            progress=lambda done, total: phase("timing", done, total),
            wall=wall,
        )

    if request.device.type != "cuda":
        return compare(eager), {}, eager
    timed = dict(eager)
    for label, provider in scenario.providers.items():
        if provider.backward is not None:
            continue  # a whole model: launches are a part of what a user waits for
        try:
            timed[label] = cuda_graphs.capture(provider, mode, scenario.inputs)
        except RuntimeError as error:
            notes.append(f"{label}: timed without a CUDA graph ({str(error).splitlines()[0]})")
    return compare(timed), compare(eager, wall=True), timed


def _counts(
    provider: Provider, scenario: Scenario, mode: str, request: Request
) -> tuple[int | None, int | None, int]:
    """Launches (of a compiled graph they are no measure), saved bytes, peak bytes."""
    timed = step(provider, mode, scenario.inputs)
    timed()  # what a first call sets up is no part of it
    given = timed.prepare()
    peak = counting.peak_bytes(lambda: timed.run(given), request.device)
    given = timed.prepare()
    if provider.compiled:
        return None, None, peak
    saved = counting.saved_bytes(lambda: provider.outputs(scenario.inputs), scenario.parameters)
    return counting.launches(lambda: timed.run(given), request.device), saved, peak


def _table(
    scenario: Scenario,
    mode: str,
    request: Request,
    ceilings: Ceilings,
    errors: dict[str, Errors | None],
    phase: Phase,
) -> Table:
    notes = list(scenario.notes)
    phase("counting", 0, 1)
    counts = {label: _counts(p, scenario, mode, request) for label, p in scenario.providers.items()}
    times, wall, timed = _times(scenario, mode, request, phase, notes)
    phase("check", 0, 1)
    errors = _errors_after(scenario, mode, timed, errors, notes)
    rows = {}
    for label, provider in scenario.providers.items():
        row = Row(times[label], provider.ours, provider.chosen, provider.floor)
        row.errors = errors[label]
        row.launches, row.saved_bytes, row.peak_bytes = counts[label]
        row.saved_bytes = None if mode == "forward" else row.saved_bytes
        row.wall = wall.get(label)
        row.reproduce = request.reproduce(scenario.arguments, label, row.ours, mode)
        rows[label] = row
    table = Table(scenario.name, mode, rows, timing.drift(times), notes=notes)
    table.shape = " ".join(scenario.arguments[1:4:2])  # of ("op", NAME, "--shape", SHAPE)
    table.swept = scenario.swept
    table.moved, table.work = by_mode(scenario.moved, mode), by_mode(scenario.work, mode)
    judge(table, ceilings)
    return table
