"""A training step as a CUDA graph, replayed on new values; and that a step never waits for the
device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.suite import Case, Suite
from petal_kernels.tools import operators, parity

SHARE, LIMIT, PARALLEL, CHECKS = 4.0, 120.0, True, True
_WARM = 3
_TEXT = 300


class CaptureError(RuntimeError):
    """The step cannot be captured; torch's generator still believes that it is."""


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """Per operator, shape and backend of ours: a graph, and a step that may not synchronise."""
    found = []
    every = suite.operators()
    for kind in ("sync", "graph"):
        for op in every:
            few = suite.dry and (kind == "sync" or op is not every[-1])  # the interpreter is slow
            for backend in suite.kernels[:1] if few else suite.kernels:
                shapes = suite.shapes(op)
                for shape in shapes[:1] if suite.dry else shapes:
                    found.append(
                        {
                            "id": f"capture/{kind}/{op.name}/{backend}/{shape.name}",
                            "kind": kind,
                            "op": op.name,
                            "shape": shape.name,
                            "backend": backend,
                            "dtype": suite.dtype,
                        }
                    )
    return found


def _step(case: Case, suite: Suite, inputs: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """Forward and backward over these tensors, every result in one list."""
    op, shape = suite.shape(case)
    names = operators.trainable(op, shape)
    given = operators.options(op, shape) | {"backend": case["backend"]}
    outs, _ = operators.run(op.public, inputs, (), **given)
    douts = [d.to(o) for d, o in zip(operators.output_gradients(outs), outs, strict=True)]

    def run() -> list[Tensor]:
        results, grads = operators.run(op.public, inputs, names, douts, **given)
        return results + [g for _, g in grads]

    return run


@contextlib.contextmanager
def _without_sync(suite: Suite) -> Iterator[None]:
    """Waiting for the device raises."""
    if not suite.dry:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not suite.dry:
            torch.cuda.set_sync_debug_mode("default")


def _captured(step: Callable[[], list[Tensor]], suite: Suite) -> Callable[[], list[Tensor]]:
    """The step as a graph; in a rehearsal the step itself."""
    if suite.dry:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            step()
        with _without_sync(suite):  # seen here it spoils nothing, in a capture the process
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = step()
    except RuntimeError as e:
        raise CaptureError(str(e)) from e

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def _graph(case: Case, suite: Suite) -> list[str]:
    faults = []
    inputs, other = suite.inputs(case), suite.inputs(case, seed=1)
    names = tuple(inputs)
    replay = _captured(_step(case, suite, inputs), suite)
    first = [t.clone() for t in replay()]
    with torch.no_grad():
        for (_, old), (_, new) in zip(
            operators.leaves(inputs, names), operators.leaves(other, names), strict=True
        ):
            old.copy_(new)
    replayed, eager = replay(), _step(case, suite, other)()
    for i, (a, b) in enumerate(zip(replayed, eager, strict=True)):
        if not torch.equal(a, b):
            faults.append(f"result {i} of the replay is not the eager step's")
    if all(torch.equal(a, b) for a, b in zip(first, eager, strict=True)):
        faults.append("other inputs gave the same results: the check shows nothing")
    if inputs.pop("rng", None) is not None:  # drawn inside: each replay draws its own mask
        redraw = _captured(_step(case, suite, inputs), suite)
        before = [t.clone() for t in redraw()]
        if all(torch.equal(a, b) for a, b in zip(before, redraw(), strict=True)):
            faults.append("two replays drew the same dropout mask")
    return faults


def _sync(case: Case, suite: Suite) -> list[str]:
    inputs = suite.inputs(case)
    inputs.pop("rng", None)
    step = _step(case, suite, inputs)
    step()
    with _without_sync(suite):
        step()
    return []


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """One case; skipped where the backend declines."""
    op, shape = suite.shape(case)
    reason = parity.refusal(op, shape, case["backend"], suite.inputs(case))
    if reason is not None:
        return {"status": "skip", "reason": reason}
    try:
        faults = (_sync if case["kind"] == "sync" else _graph)(case, suite)
    except CaptureError as e:
        return {"status": "fail", "faults": [str(e)[:_TEXT]], "spoilt": True}
    except RuntimeError as e:
        if "synchroniz" not in str(e):
            raise
        faults = [str(e)[:_TEXT]]
    return {"status": "fail" if faults else "pass", "faults": faults}


def report(records: list[Record]) -> list[str]:
    """How many of each passed."""
    lines = []
    for kind, name in (("graph", "captured and replayed"), ("sync", "without a host sync")):
        found = [r for r in records if r["kind"] == kind and r["status"] != "skip"]
        passed = sum(r["status"] == "pass" for r in found)
        lines.append(f"- {name}: {passed} of {len(found)} steps")
    return lines
