"""What an attachment did, as rows and as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from petal_kernels._runtime.backends import Explanation
from petal_kernels._runtime.dry_run import dry_run
from petal_kernels.hf.whole import Copies
from petal_kernels.nn.frozen_linear import why_not_plain, why_not_readable

if TYPE_CHECKING:
    from petal_kernels.hf.method import Method
    from petal_kernels.hf.wrappers import AdaptedLinear


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
    notes: list[str] = field(default_factory=list)  # what is left as it is

    @property
    def percent(self) -> float:
        """Trainable parameters in per cent of the base model's."""
        return 100.0 * self.trainable / max(self.base_parameters, 1)

    def __str__(self) -> str:
        header = ("module", "role", "shape", "backend", "trainable")
        notes = {
            why: i for i, why in enumerate(dict.fromkeys(r.why for r in self.rows if r.why), 1)
        }
        table = [header]
        for row in self.rows:
            mark = f"[{notes[row.why]}]" if row.why else ""
            backend = f"{row.backend} {mark}".strip()
            table.append((row.module, row.role, row.shape, backend, f"{row.trainable:,}"))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = []
        for line in table:
            cells = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=False)]
            lines.append("  ".join([*cells, line[-1].rjust(widths[-1])]))
        lines.insert(1, "-" * len(lines[0]))
        lines += [f"[{number}] {why}" for why, number in notes.items()]
        lines += [f"base called, not read: {path} ({why})" for path, why in self.declined.items()]
        lines += self.notes
        lines.append(
            f"{self.implementation}: {self.trainable:,} trainable parameters ({self.stored:,} "
            f"stored), {self.percent:.3f} % of the model's {self.base_parameters:,}"
        )
        return "\n".join(lines)


_EAGER = "eager: the published form, one step at a time"


def make_report(
    model: nn.Module,
    method: Method,
    wrappers: Mapping[str, AdaptedLinear],
    whole: Sequence[str],
    implementation: str,
) -> Report:
    """The report of an attachment, as it would run now; `whole`: paths of what is trained whole."""
    rows, seen = [], set()
    known: dict[Any, tuple[str, str]] = {}
    for place in method.found.places:
        row = method.place_row(place)
        backend, why = "eager", _EAGER
        if not method.published:
            key, sample = method.sample(place, wrappers.get(place.path))
            if key not in known:
                known[key] = _asked(sample, getattr(wrappers.get(place.path), "base", None))
            backend, why = known[key]
        count = row.trainable
        module = method.trains(place)
        if module is not None:
            count = 0 if id(module) in seen else count
            seen.add(id(module))
        rows.append(replace(row, backend=backend, why=why, trainable=count))
    for row in method.shared_rows():
        call = method.shared_sample(row)
        backend, why = ("", "") if call is None else ("eager", _EAGER)
        if call is not None and not method.published:
            backend, why = choice_in_words(dry_run(call))
        rows.append(replace(row, backend=backend, why=why))
    copies = method.adapter._modules.get("modules_to_save")
    held = dict(copies.named()) if isinstance(copies, Copies) else {}
    for path in whole:
        inside = [own for own in held if own == path or own.startswith(path + ".")]
        count = sum(p.numel() for own in inside for p in held.pop(own).parameters())
        rows.append(Row(path, "modules_to_save", "trained whole", "", "", count))
    own = {id(p) for p in method.adapter.parameters()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in own)
    trainable = sum(p.numel() for p in method.adapter.parameters() if p.requires_grad)
    stored = sum(p.numel() for p in method.adapter.parameters())
    declined = {path: why for path, w in wrappers.items() if (why := why_not_plain(w.base))}
    return Report(rows, implementation, base, trainable, stored, declined, method.found.notes)


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


def _asked(sample: Callable[[], object], base: nn.Module | None) -> tuple[str, str]:
    """What a dry run of a place says. A base of somebody else's may not run without values."""
    try:
        return choice_in_words(dry_run(sample))
    except Exception as error:
        if base is None or not why_not_readable(base):
            raise
        return "not known", f"a {type(base).__name__} does not run dry: {type(error).__name__}"
