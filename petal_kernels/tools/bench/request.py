"""What was asked for on the command line, and how a row of it is asked for again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from petal_kernels.tools.bench.timing import LEAST_ROUNDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AXES = ("tokens", "batch", "rank")
QUICK_ROWS = 256  # at most so many tokens in all
_LETTERS = {"tokens": "NBL", "batch": "NBL", "rank": "Rr"}  # of the sizes in a shape's name

Case = TypeVar("Case")


class RequestError(ValueError):
    """Something that was asked for cannot be had, with the reason."""


@dataclass(frozen=True)
class Request:
    """Options of a run. `against` and `backends` are empty where all that can run are wanted."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    against: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("train", "full")
    rounds: int = 20
    threads: int = 2
    sweep: str | None = None
    values: tuple[int, ...] = ()
    shape: str = ""
    quick: bool = False
    skipped: dict[str, str] = field(default_factory=dict, compare=False)  # shapes, and why

    def wants(self, baseline: str) -> bool:
        """Whether a baseline is asked for: all are by default, but none that compiles in a quick
        run."""
        if not self.against:
            return not (self.quick and baseline == "compile")
        return baseline in self.against or baseline == "published"

    def matches(self, name: str) -> bool:
        """Whether `--shape` picks this one: its whole name if that exists, else a part of it."""
        return self.shape.lower() in name.lower()

    def reproduce(self, arguments: Sequence[str], provider: str, ours: bool, mode: str) -> str:
        """The command that measures one row again (with what it is compared to)."""
        words = ["petal-kernels", "bench", *arguments, "--mode", mode, "--against"]
        words += ["published" if ours or provider == "published" else f"published,{provider}"]
        backend = provider.removeprefix("petal").strip()
        words += ["--backend", backend] if ours and backend else []
        words += ["--dtype", str(self.dtype)[6:], "--device", str(self.device)]
        words += ["--rounds", str(self.rounds), "--threads", str(self.threads)]
        words += ["--quick"] if self.quick else []
        return shlex.join(words)

    def __post_init__(self) -> None:
        if self.rounds < LEAST_ROUNDS:
            raise RequestError(f"rounds: want at least {LEAST_ROUNDS}, got {self.rounds}")
        if self.values and self.sweep is None:
            raise RequestError("values: want --sweep beside them")


def _sizes(case: Any) -> dict[str, int]:
    """What can be swept in a case: its axes and their present values."""
    names = {f.name for f in fields(case)}
    found: dict[str, int] = {}
    if "lead" in names:
        found["tokens"] = case.lead[-1]
        if len(case.lead) > 1:
            found["batch"] = case.lead[0]
    for axis, name in (("tokens", "tokens"), ("batch", "batch"), ("rank", "rank")):
        if name in names:
            found[axis] = getattr(case, name)
    return found


def _with(case: Case, axis: str, value: int) -> Case:
    """The case with one size replaced, in its name too."""
    at: Any = case
    if hasattr(at, "lead") and axis != "rank":
        lead = (*at.lead[:-1], value) if axis == "tokens" else (value, *at.lead[1:])
        changed: Any = replace(at, lead=lead)
    else:
        changed = replace(at, **{axis: value})
    sizes = _sizes(changed)
    letters = (("r", "rank"),) if axis == "rank" else (("B", "batch"), ("L", "tokens"))
    said = [f"{letter}={sizes[name]}" for letter, name in letters if name in sizes]
    plain = re.sub(rf",?\s*\b[{_LETTERS[axis]}]=\d+\b", "", at.name)
    new: Case = replace(changed, name=" ".join((plain, *said)))
    return new


def swept(case: Case, request: Request) -> list[tuple[Case, float | None]]:
    """The cases of a sweep over one axis around `case`, or the case alone; with the axis' value.

    Raises RequestError where the case has no such axis.
    """
    sizes = _sizes(case)
    if request.sweep is None:
        return [(_smaller(case, sizes) if request.quick else case, None)]
    name: str = case.name  # type: ignore[attr-defined]
    if request.sweep not in sizes:
        axes = ", ".join(sizes) or "none"
        raise RequestError(f"sweep: {name!r} has no axis {request.sweep!r}, want one of {axes}")
    now = sizes[request.sweep]
    values = request.values or tuple(dict.fromkeys(max(1, now * k // 4) for k in (1, 2, 4, 8)))
    if request.quick:
        case = _smaller(case, {k: v for k, v in sizes.items() if k != request.sweep})
    return [(_with(case, request.sweep, v), float(v)) for v in values]


def covered(case: Case, request: Request) -> list[tuple[Case, float | None]]:
    """`swept`, of a shape among others: one that has no such axis is left out and noted."""
    try:
        return swept(case, request)
    except RequestError as error:
        name: str = case.name  # type: ignore[attr-defined]
        request.skipped[name] = str(error)
        return []


def _smaller(case: Case, sizes: dict[str, int]) -> Case:
    """The case with so few tokens that it only shows that everything runs."""
    for axis in ("batch", "tokens"):
        rows = sizes.get("batch", 1) * sizes.get("tokens", 1)
        if axis in sizes and rows > QUICK_ROWS:
            value = max(2, sizes[axis] * QUICK_ROWS // rows)
            case, sizes = _with(case, axis, value), sizes | {axis: value}
    return case
