"""Every backend of every operator against the fp64 reference, on small cases, on this machine; and
what ``auto`` takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import petal_kernels as pk
from petal_kernels import _build_info
from petal_kernels.tools import operators, parity
from petal_kernels.tools.operators import Operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = 8  # of each operator, spread over its list
INTERPRETED_CASES = 2  # Triton's interpreter takes seconds for each


@dataclass
class Line:
    """One backend of one operator: ``status`` is pass, fail or refused; ``ratio`` the worst error
    as a share of what is allowed."""

    operator: str
    backend: str
    status: str = "refused"
    device: str = "cpu"
    checks: int = 0
    dtypes: list[str] = field(default_factory=list)
    ratio: float = 0.0
    faults: list[str] = field(default_factory=list)
    reason: str | None = None
    remedy: str | None = None


def spread(cases: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` cases, evenly over the list."""
    if count >= len(cases):
        return list(cases)
    step = (len(cases) - 1) / max(count - 1, 1)
    return [cases[round(i * step)] for i in range(count)]


def check_all(count: int | None, interpret: bool) -> Iterator[Line]:
    """A line per operator and backend, as they come; ``count`` None means every case."""
    for op in operators.operators():
        for backend in operators.backend_names(op):
            yield check(op, backend, count, interpret)


def check(op: Operator, backend: str, count: int | None, interpret: bool) -> Line:
    """Run one backend's cases in every dtype it takes."""
    gpu = torch.cuda.is_available() and backend != "native"
    line = Line(op.name, backend, device="cuda" if gpu else "cpu")
    row = next(b for b in op.backends if b.name == backend)
    line.reason = row.missing()
    interpreted = backend == "triton" and not gpu
    if line.reason is None and interpreted and not interpret:
        line.reason = "no CUDA device"
    if line.reason is None:
        wanted = len(op.workload.CASES) if count is None else count
        cases = spread(op.workload.CASES, INTERPRETED_CASES if interpreted else wanted)
        for dtype in DTYPES:
            for case in cases:
                _add(line, op, case, dtype)
        if line.checks:
            line.status, line.reason = ("fail" if line.faults else "pass"), None
    if line.reason is not None:
        line.reason, line.remedy = _remedy(backend, line.reason)
    return line


def _add(line: Line, op: Operator, case: Any, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    try:
        found = parity.verify(op, case, line.backend, dtype, line.device)
    except Exception as e:
        # A kernel that raises is as broken as one that is wrong, and must not hide the others.
        found = parity.Verdict(float("inf"), [f"{type(e).__name__}: {e}"])
    if found.refused is not None:
        line.reason = line.reason or found.refused
        return
    line.checks += 1
    line.ratio = max(line.ratio, found.ratio)
    line.faults += [f"{case.name}, {name}: {fault}" for fault in found.faults]
    if name not in line.dtypes:
        line.dtypes.append(name)


def _remedy(backend: str, reason: str) -> tuple[str, str]:
    """The reason without advice, and what to install, build or run."""
    how = _build_info.how()
    if reason.endswith(how):
        return reason.removesuffix(how).rstrip(". "), how
    if "built without CUDA" in reason:
        return reason, "install a torch built for CUDA: https://pytorch.org/get-started/locally"
    if "not installed" in reason:
        return reason, f"pip install 'petal-kernels[{backend}]'"
    if reason == "no CUDA device" and backend == "triton":
        return reason, "`petal-kernels doctor --interpret` runs it in Triton's interpreter (slow)"
    return reason, "run on a machine with an NVIDIA GPU of compute capability 8.0 or newer"


def choices() -> Iterator[dict[str, str]]:
    """What ``auto`` takes at each operator's first benchmark shape, in training, with the device's
    usual dtype."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    for op in operators.operators():
        shape = op.workload.SHAPES[0]
        inputs = op.workload.make_inputs(shape, dtype, "cuda" if gpu else "cpu")
        explained = pk.explain(op.public, **inputs)
        yield {
            "operator": op.name,
            "shape": shape.name,
            "dtype": str(dtype).removeprefix("torch."),
            "choice": explained.choice,
        }
