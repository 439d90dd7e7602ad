"""What an attachment did, as rows and as a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from petal_kernels._runtime.backends import Explanation
from petal_kernels._runtime.columns import columns, rounded
from petal_kernels._runtime.dry_run import dry_run
from petal_kernels.hf.context import given
from petal_kernels.hf.merging import ALL
from petal_kernels.hf.parts import runs_twice
from petal_kernels.hf.twins import NotDry
from petal_kernels.hf.whole import Copies
from petal_kernels.nn.frozen_linear import why_not_readable

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method
    from petal_kernels.hf.wrappers import AdaptedLinear


Rows = tuple[int, int]  # samples and tokens of an input
SHARED_FACTORS = "shared factors"  # a role
# Of an operator that a stack's forward calls once for all its places.
_ONCE = "mode_contract"


@dataclass(frozen=True)
class Row:
    """One replaced module or one shared part of the adapter."""

    module: str
    role: str
    shape: str
    backend: str
    why: str
    trainable: int


@dataclass(frozen=True)
class Report:
    """`rows` and the counts; str() is a table."""

    rows: list[Row] = field(repr=False)
    implementation: str
    base_parameters: int
    trainable: int
    stored: int
    declined: dict[str, str]
    tokens: Rows = (8, 128)
    notes: list[str] = field(default_factory=list)  # what is left as it is
    grouped: bool = False  # the table joins equal rows of a stack's layers

    @property
    def percent(self) -> float:
        """Trainable parameters in per cent of the base model's."""
        return 100.0 * self.trainable / max(self.base_parameters, 1)

    def __str__(self) -> str:
        header = ("module", "role", "shape", "backend", "trainable")
        notes = {
            why: i for i, why in enumerate(dict.fromkeys(r.why for r in self.rows if r.why), 1)
        }
        table = []
        for row in joined_rows(self.rows) if self.grouped else self.rows:
            mark = f"[{notes[row.why]}]" if row.why else ""
            backend = f"{row.backend} {mark}".strip()
            table.append((row.module, row.role, row.shape, backend, f"{row.trainable:,}"))
        lines = columns(header, table, right=(4,), indent="").split("\n")
        lines.insert(1, "-" * len(lines[0]))
        lines += [f"[{number}] {why}" for why, number in notes.items()]
        declined = _joined_paths(self.declined) if self.grouped else self.declined
        lines += [f"base called, not read: {path} ({why})" for path, why in declined.items()]
        if any(row.why for row in self.rows):
            lines.append("backends and plans: of inputs [{}, {}, features]".format(*self.tokens))
        lines += self.notes
        lines.append(
            f"{self.implementation}: {self.trainable:,} trainable parameters ({self.stored:,} "
            f"stored), {rounded(self.percent, 3)} % of the model's {self.base_parameters:,}"
        )
        return "\n".join(lines)


def joined_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that are alike but for the numbers in their paths, as one: `layers.* x 32`."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        alike = replace(row, module=_NUMBER.sub("*", row.module), trainable=0)
        groups.setdefault(alike, []).append(row)
    return [
        own[0]
        if len(own) == 1
        else replace(
            alike, module=f"{alike.module} x {len(own)}", trainable=sum(r.trainable for r in own)
        )
        for alike, own in groups.items()
    ]


def _joined_paths(declined: Mapping[str, str]) -> dict[str, str]:
    rows = [Row(path, why, "", "", "", 0) for path, why in declined.items()]
    return {row.module: row.role for row in joined_rows(rows)}


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a name that is one
_EAGER = ("eager", "eager: the published form, one step at a time")
_OFF = ("off", "off: inside disabled() the model computes what it did before attach")
_MERGED = ("merged", "merged: the update lies in the weight")


def make_report(
    model: nn.Module,
    method: Method,
    wrappers: Mapping[str, AdaptedLinear],
    whole: Sequence[str],
    implementation: str,
    tokens: Rows,
) -> Report:
    """The report of an attachment, as it would run here and now; `whole`: paths of what
    is trained whole."""
    check_tokens(tokens)
    rows, seen = [], set()
    known: dict[Hashable, tuple[str, str]] = {}
    instead = _instead(method)
    for place in method.found.places:
        row, wrapper = method.place_row(place), wrappers.get(place.path)
        backend, why = instead or _MERGED
        if not instead and getattr(wrapper, "merged", None) is None:
            key, sample = method.sample(place, wrapper, tokens)
            twice = torch.is_grad_enabled() and runs_twice(place.layer.module)
            if (key, twice) not in known:
                known[key, twice] = asked_dry(sample, getattr(wrapper, "base", None), twice)
            backend, why = known[key, twice]
            why = "; ".join(each for each in (why, row.why) if each)
        count = row.trainable
        module = method.trains(place)
        if module is not None:
            count = 0 if id(module) in seen else count
            seen.add(id(module))
        rows.append(replace(row, backend=backend, why=why, trainable=count))
    for row in method.shared_rows():
        call = method.shared_sample(row, tokens)
        backend, why = ("", "") if call is None else instead or choice_in_words(dry_run(call))
        rows.append(replace(row, backend=backend, why=why))
    copies = method.adapter._modules.get("modules_to_save")
    held = dict(copies.named()) if isinstance(copies, Copies) else {}
    for path in whole:
        inside = [own for own in held if own == path or own.startswith(path + ".")]
        count = sum(p.numel() for own in inside for p in held.pop(own).parameters())
        rows.append(Row(path, "modules_to_save", "trained whole", "", "", count))
    own = {id(p) for p in method.adapter.parameters()}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in own)
    trainable = sum(p.numel() for p in method.adapter.parameters() if p.requires_grad)
    stored = sum(t.numel() for t in method.adapter.state_dict(prefix=ALL).values())
    declined = {path: why for path, w in wrappers.items() if (why := method.why_called(w.base))}
    counts = (parameters, trainable, stored)
    grouped = method.groups_rows
    notes = [*method.found.notes, *method.found.outside]
    return Report(rows, implementation, *counts, declined, tokens, notes, grouped)


def check_tokens(tokens: Any) -> None:
    """ValueError unless `tokens` is the size of an input."""
    sized = isinstance(tokens, (tuple, list)) and len(tokens) == 2
    if not sized or not all(type(size) is int and size >= 0 for size in tokens):
        raise ValueError(f"tokens: want (samples, tokens of each), got {tokens!r}")


def choice_in_words(found: Sequence[Explanation]) -> tuple[str, str]:
    """The backend that a call takes, and why not a preferred one; of several calls each once."""
    backends = dict.fromkeys(each.backend for each in found)
    whys = dict.fromkeys(
        part
        for each in found
        for part in (f"{each.backend}: plan {each.plan}" if each.plan else "", each.why)
        if part
    )
    return " + ".join(backends) or "none", "; ".join(whys)


def asked_dry(sample: Callable[[], object], base: nn.Module | None, twice: bool) -> tuple[str, str]:
    """What a dry run of a place says, `twice` where a layer runs without gradients first. A base of
    somebody else's may not run without values."""
    found: list[Explanation] = []
    try:
        if twice:
            with torch.no_grad():
                found += dry_run(sample)
        found += dry_run(sample)
        return choice_in_words([each for each in found if each.operator != _ONCE])
    except Exception as error:
        if base is None or not why_not_readable(base):
            raise
        why = str(error) if isinstance(error, NotDry) else type(error).__name__
        return "not known", f"not known: a {type(base).__name__} does not run dry ({why})"


def _instead(method: Method) -> tuple[str, str] | None:
    """What every place runs on where no operator does."""
    if not given(method).on:
        return _OFF
    return _EAGER if method.published else None
