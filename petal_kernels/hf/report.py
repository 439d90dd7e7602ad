"""What an attachment did, as rows and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from petal_kernels._runtime.backends import Explanation


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
        lines.append(
            f"{self.implementation}: {self.trainable:,} trainable parameters ({self.stored:,} "
            f"stored), {self.percent:.3f} % of the model's {self.base_parameters:,}"
        )
        return "\n".join(lines)


def extra_rows(extra: dict[str, nn.Module]) -> list[Row]:
    """The modules that are trained whole."""
    rows = []
    for path, module in extra.items():
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        rows.append(Row(path, "modules_to_save", "trained whole", "", "", count))
    return rows


def finish(
    rows: list[Row],
    model: nn.Module,
    adapter: nn.Module,
    extra: dict[str, nn.Module],
    implementation: str,
    declined: dict[str, str],
) -> Report:
    """The report of these rows, with the model's counts."""
    own = {id(p) for p in adapter.parameters()}
    base = sum(p.numel() for p in model.parameters() if id(p) not in own)
    trainable = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    stored = sum(p.numel() for p in adapter.parameters())
    for module in extra.values():
        trainable += sum(p.numel() for p in module.parameters() if p.requires_grad)
        stored += sum(p.numel() for p in module.parameters())
    return Report(rows + extra_rows(extra), implementation, base, trainable, stored, declined)


def choice_in_words(found: Explanation) -> tuple[str, str]:
    """The backend that is taken, and why not a preferred one."""
    plan = f"{found.backend}: plan {found.plan}" if found.plan else ""
    return found.backend, "; ".join(part for part in (plan, found.why) if part)
