"""Triton's launch tables from outside: which rows a call reads, other tiles in their place, and one
kernel's launches timed or left out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.gpu.stopwatch import Stopwatch
from petal_kernels.tools.operators import Operator

TileFacts = dict[str, Any]  # {"warps": 4, "stages": 2, "blocks": {"BLOCK_M": 64, ..}}
_INTERPRETED = "interpreted"
_LARGEST_BLOCK, _MOST_STAGES = 256, 5
_LEAST_BLOCK = 16  # what a tensor core's product needs


class Row(NamedTuple):
    """One row of an operator's table."""

    kernel: str
    arch: int
    size: str


def configs(op: Operator) -> Any:
    """The operator's tables; None where it has none to tune."""
    return op.module("triton_configs")


def read(module: Any, row: Row) -> TileFacts:
    """The tile that a row ships."""
    rows = module._INTERPRETER if row.arch == 0 else module.TABLE[row.kernel, row.arch]
    found = rows[row.kernel if row.arch == 0 else row.size]
    return {"warps": found.warps, "stages": found.stages, "blocks": dict(found.blocks)}


@contextlib.contextmanager
def using(module: Any, row: Row, facts: TileFacts) -> Iterator[None]:
    """Launch with another tile in this row."""
    from petal_kernels._runtime.triton_lib import tile

    other = tile(facts["warps"], facts["stages"], **facts["blocks"])
    table = module._INTERPRETER if row.arch == 0 else module.TABLE
    key: Any = row.kernel if row.arch == 0 else (row.kernel, row.arch)
    before = table[key]
    table[key] = other if row.arch == 0 else {**before, row.size: other}
    module.choose.cache_clear()
    try:
        yield
    finally:
        table[key] = before
        module.choose.cache_clear()


class _Watched(dict[Any, Any]):
    """A table that notes which keys are read."""

    def __init__(self, items: dict[Any, Any], note: Callable[[Any], None]) -> None:
        super().__init__(items)
        self._note = note

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)


@contextlib.contextmanager
def _launching(module: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Every launch of the module's kernels goes through ``run(original, kernel, args, more)``."""
    kind: Any = type(next(iter(module._KERNELS.values())))
    original = kind.run
    kind.run = lambda self, *args, **more: run(original, self, args, more)
    try:
        yield
    finally:
        kind.run = original


def _erase(original: Any, kernel: Any, args: Any, more: Any) -> None:
    """In place of a launch: zeros, which later steps may take for indices."""
    for argument in (*args, *more.values()):
        if isinstance(argument, Tensor):
            argument.zero_()


def touched(module: Any, step: Callable[[], object]) -> list[Row]:
    """The rows that a step reads, found without compiling or running a kernel; its tensors are
    spoilt."""
    found: dict[Row, None] = {}
    table, interpreter = dict(module.TABLE), dict(module._INTERPRETER)

    def note(kernel: str, arch: int, size: str) -> None:
        found[Row(kernel, arch, size)] = None

    for (kernel, arch), sizes in table.items():
        module.TABLE[kernel, arch] = _Watched(sizes, functools.partial(note, kernel, arch))
    module._INTERPRETER = _Watched(interpreter, lambda kernel: note(kernel, 0, _INTERPRETED))
    module.choose.cache_clear()
    try:
        with _launching(module, _erase):
            step()
    finally:
        module.TABLE.update(table)
        module._INTERPRETER = interpreter
        module.choose.cache_clear()
    return list(found)


class Launches:
    """What was seen of one kernel's launches."""

    def __init__(self) -> None:
        self.times: list[Callable[[], float]] = []
        self.spills = 0

    def milliseconds(self) -> float:
        """All launches together, once the device is done."""
        return sum(time() for time in self.times)


@contextlib.contextmanager
def watching(module: Any, kernel: str, watch: Stopwatch) -> Iterator[Launches]:
    """Time the launches of one kernel, and see whether it spills registers."""
    seen, wanted = Launches(), module._KERNELS[kernel]

    def run(original: Any, self: Any, args: Any, more: Any) -> Any:
        if self is not wanted:
            return original(self, *args, **more)
        compiled: list[Any] = []
        seen.times.append(watch.call(lambda: compiled.append(original(self, *args, **more))))
        seen.spills = max(seen.spills, getattr(compiled[0], "n_spills", 0) or 0)
        return compiled[0]

    with _launching(module, run):
        yield seen


def neighbours(facts: TileFacts) -> list[TileFacts]:
    """Tiles one step away: a block doubled or halved, other warps, a stage more or less."""
    found = []
    for name, value in facts["blocks"].items():
        least = 1 if name == "GROUP_M" else _LEAST_BLOCK
        for other in (value * 2, value // 2):
            if least <= other <= _LARGEST_BLOCK:
                found.append(facts | {"blocks": facts["blocks"] | {name: other}})
    found += [facts | {"warps": w} for w in (4, 8) if w != facts["warps"]]
    stages = facts["stages"]
    found += [facts | {"stages": s} for s in (stages + 1, stages - 1) if 1 <= s <= _MOST_STAGES]
    return found


def label(facts: TileFacts) -> str:
    """A tile in a few characters."""
    blocks = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in facts["blocks"].items())
    return f"{blocks} w{facts['warps']} s{facts['stages']}"
