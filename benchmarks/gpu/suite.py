"""What every stage needs to know: a real run or a rehearsal, its device, backends and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.gpu.journal import Journal, Record
from petal_kernels.tools import operators
from petal_kernels.tools.operators import Operator

Case = dict[str, Any]
Item = TypeVar("Item")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_REHEARSED = (0, 4)  # which small cases stand for the real shapes in a rehearsal


@dataclass(frozen=True)
class Suite:
    """One run. A rehearsal (``dry``) does everything on the CPU with tiny shapes: ``native`` stands
    for CUDA, Triton runs in its interpreter."""

    dry: bool

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.dry else "cuda"

    @property
    def kernels(self) -> tuple[str, ...]:
        """The backends that are ours, the most valuable first."""
        return ("native", "triton") if self.dry else ("cuda", "triton")

    @property
    def backends(self) -> tuple[str, ...]:
        """All that are checked."""
        return (*self.kernels, "torch")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that are checked; the interpreter's bfloat16 is wrong."""
        return ("float32",) if self.dry else tuple(DTYPES)

    @property
    def dtype(self) -> str:
        """The dtype of a stage that takes one."""
        return "float32" if self.dry else "bfloat16"

    def operators(self) -> list[Operator]:
        """Every operator, by folder."""
        return operators.operators()

    def operator(self, name: str) -> Operator:
        """One operator."""
        return next(op for op in self.operators() if op.name == name)

    def shapes(self, op: Operator) -> list[Any]:
        """The operator's real shapes; in a rehearsal two small cases with few rows."""
        if not self.dry:
            return list(op.workload.SHAPES)
        found = []
        for i in _REHEARSED:
            case = op.workload.CASES[i]
            lead = (2, 8) if len(getattr(case, "lead", ())) == 2 else (16,)
            few = changes(case, lead=lead, modes=3)
            found.append(dataclasses.replace(case, name=f"tiny {case.name}", **few))
        return found

    def shape(self, case: Case) -> tuple[Operator, Any]:
        """The operator and workload case that a case of the suite names, with its changes."""
        op = self.operator(case["op"])
        known = {c.name: c for c in (*op.workload.CASES, *self.shapes(op))}
        changes = {k: tuple(v) if isinstance(v, list) else v for k, v in _changes(case).items()}
        return op, dataclasses.replace(known[case["shape"]], **changes)

    def inputs(self, case: Case, seed: int = 0) -> dict[str, Any]:
        """The inputs of a case, on the device."""
        op, shape = self.shape(case)
        dtype = DTYPES[case["dtype"]]
        found: dict[str, Any] = op.workload.make_inputs(shape, dtype, self.device, seed)
        return found


def _changes(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = case.get("changes", {})
    return found


def changes(shape: Any, **wanted: Any) -> dict[str, Any]:
    """Of the wanted changes, those that this operator's shapes know."""
    return {k: v for k, v in wanted.items() if hasattr(shape, k)}


def in_turn(groups: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of every group, then the second of every group, and so on: time that runs out has
    seen something of each."""
    rounds = zip_longest(*groups, fillvalue=None)
    return [item for each in rounds for item in each if item is not None]


class Stage(Protocol):
    """A module of ``stages``. ``SHARE`` is its part of the time, ``LIMIT`` a case's seconds,
    ``PARALLEL`` whether cases may run side by side, ``CHECKS`` whether a case that does not pass
    fails the run."""

    SHARE: float
    LIMIT: float
    PARALLEL: bool
    CHECKS: bool

    def cases(self, suite: Suite, journal: Journal) -> list[Case]:
        """The cases in order of value; each has an ``id`` that no other stage's case has."""

    def run(self, case: Case, suite: Suite) -> dict[str, Any]:
        """Run one; ``status`` is pass (the default), fail or skip."""

    def report(self, records: list[Record]) -> list[str]:
        """Lines of markdown on what was found."""
