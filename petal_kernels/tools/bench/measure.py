"""Everything that is measured of one scenario: errors first, then counts, then times."""

from __future__ import annotations

from collections.abc import Callable

from petal_kernels.tools.bench import counting, cuda_graphs, timing
from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.request import Request
from petal_kernels.tools.bench.results import Row, Table
from petal_kernels.tools.bench.scenarios import Provider, Scenario, by_mode, step
from petal_kernels.tools.bench.timing import Timing

Phase = Callable[[str, int, int], None]  # name of the phase, done, total


def measure(scenario: Scenario, request: Request, ceilings: Ceilings, phase: Phase) -> list[Table]:
    """One table per mode."""
    errors: dict[str, Errors | None] = {}
    for i, (label, provider) in enumerate(scenario.providers.items()):
        phase("compile" if provider.compiled else "check", i, len(scenario.providers))
        errors[label] = None if provider.check is None else provider.check()
    tables = []
    for mode in request.modes:
        tables.append(_table(scenario, mode, request, ceilings, errors, phase))
    return tables


def _times(
    scenario: Scenario, mode: str, request: Request, phase: Phase, notes: list[str]
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Of the device, and on CUDA of the host beside it."""
    phase("warm-up", 0, request.rounds)
    eager = {label: step(p, mode, scenario.inputs) for label, p in scenario.providers.items()}

    def progress(done: int, total: int) -> None:
        phase("timing", done, total)

    if request.device.type != "cuda":
        return timing.compare(eager, request.device, request.rounds, progress=progress), {}
    steps = dict(eager)
    for label, provider in scenario.providers.items():
        if provider.backward is not None:
            continue  # a whole model: launches are a part of what a user waits for
        try:
            steps[label] = cuda_graphs.capture(provider, mode, scenario.inputs)
        except RuntimeError as error:
            notes.append(f"{label}: timed without a CUDA graph ({str(error).splitlines()[0]})")
    device = timing.compare(steps, request.device, request.rounds, progress=progress)
    wall = timing.compare(eager, request.device, request.rounds, progress=progress, wall=True)
    return device, wall


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
    times, wall = _times(scenario, mode, request, phase, notes)
    drift = timing.drift(times)
    first = scenario.first
    comparable = not (errors[first] and errors[first].wrong)  # type: ignore[union-attr]
    rivals = [
        times[label].median
        for label, p in scenario.providers.items()
        if not (p.ours or p.floor) and not (errors[label] and errors[label].wrong)  # type: ignore[union-attr]
    ]
    moved, work = by_mode(scenario.moved, mode), by_mode(scenario.work, mode)
    rows = {}
    for label, provider in scenario.providers.items():
        time, found = times[label], errors[label]
        row = Row(time, provider.ours, provider.chosen, provider.floor, errors=found)
        row.launches, row.saved_bytes, row.peak_bytes = counts[label]
        row.saved_bytes = None if mode == "forward" else row.saved_bytes
        row.wall = wall.get(label)
        if comparable and not row.red and not row.floor:
            row.speedup = times[first].median / time.median
        if moved is not None and work is not None and not row.floor:
            row.roof = ceilings.share(moved, work, time.median)
        if row.ours and row.chosen and rivals:
            row.loss = time.median > min(rivals) * (1 + drift)
        row.reproduce = request.reproduce(scenario.arguments, label, row.ours, mode)
        rows[label] = row
    shape = " ".join(scenario.arguments[1:4:2])  # of ("op", NAME, "--shape", SHAPE)
    return Table(scenario.name, mode, rows, drift, shape, scenario.swept, moved, work, notes)
