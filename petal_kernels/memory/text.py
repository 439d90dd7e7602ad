"""A profile as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from petal_kernels._runtime.columns import columns, rounded
from petal_kernels.memory.advice import advise
from petal_kernels.memory.reasons import display_name
from petal_kernels.memory.records import MODEL, Saved, mib

if TYPE_CHECKING:
    from petal_kernels.memory.profile import Profile, Row

HEADERS = ("kept", "%", "tensors", "", "module", "kept by", "largest", "why")
_WIDEST = 48
_WIDTH = 110  # of sentences where there is no terminal


def shape_of(record: Saved) -> str:
    """`4 x 1024 float32`, and `of a larger one` where the whole storage is more than that."""
    dtype = str(record.dtype).removeprefix("torch.")
    shape = "x".join(map(str, record.shape)) or "scalar"
    return f"{shape} {dtype}" + (" (a view)" if record.is_view else "")


def cells(row: Row, whole: bool = False) -> list[str]:
    """A row of the table: `HEADERS`; `whole` leaves long paths as they are."""
    largest = row.largest
    place = row.place or MODEL
    if len(place) > _WIDEST and not whole:
        place = "..." + place[3 - _WIDEST :]
    return [
        mib(row.bytes),
        rounded(100 * row.share, 1),
        str(row.count) + (f" (+{row.also})" if row.also else ""),
        row.role,
        place,
        display_name(largest.operation, largest.argument),
        shape_of(largest),
        largest.why,
    ]


def totals(profile: Profile) -> list[tuple[str, str]]:
    """What is in memory, with and without the activations."""
    sizes = profile.sizes
    roles = profile.by("role")
    lines = [("saved for backward", mib(profile.saved_bytes))]
    if profile.saved:
        parts = [
            f"{mib(size)} by {role or 'parameter-free'} modules" for role, size in roles.items()
        ]
        lines.append(("  of that", ", ".join(parts)))
    batch = sum(r.bytes for r in profile.saved if r.of_batch)
    if batch:
        lines.append(("  of that", f"{mib(batch)} are the batch's own tensors"))
    if profile.shared:
        lines.append(("  shared", f"{profile.shared} more saves of the same tensors, counted once"))
    if sizes.saved_parameters:
        own = sum(sizes.saved_parameters.values())
        lines.append(("  not counted", f"{mib(own)} of parameters and buffers: they stay anyway"))
    lines.append(
        (
            "parameters",
            f"{mib(sizes.parameters)}, of which trained {mib(sizes.trainable)} "
            f"({sizes.trainable_numbers:,} numbers)",
        )
    )
    if sizes.outputs or sizes.elsewhere:
        text = f"{mib(sizes.outputs)} returned by the model"
        if sizes.elsewhere:
            text += f", {mib(sizes.elsewhere)} held elsewhere (by Python: caches)"
        lines.append(("also alive", f"{text}, at the end of the forward"))
    if sizes.gradients:
        text = mib(sizes.gradients)
        if sizes.earlier_gradients:
            text += f", of which {mib(sizes.earlier_gradients)} are there before the step"
        lines.append(("gradients", text))
    if profile.optimizer:
        lines.append(("optimizer", f"{profile.optimizer}, {mib(sizes.states)} of states"))
    if profile.live:
        only = "" if profile.backward else "; the backward was not run"
        lines.append(("peak", f"{mib(profile.peak_bytes)}, in {profile.peak_phase}{only}"))
    if sizes.gradients and not profile.optimizer:
        step = profile.with_optimizer("adamw")
        text = f"{mib(step.peak_bytes)}, in {step.peak_phase}; {mib(step.sizes.states)} of states"
        lines.append((f"  with {step.optimizer}", text))
    if profile.recomputed:
        most = max(profile.recomputed, key=lambda r: r.bytes)
        lines.append(
            (
                "recomputed",
                f"{len(profile.recomputed)} regions in backward, at most {mib(most.bytes)} at once"
                f" ({most.module})",
            )
        )
    if profile.rule:
        lines.append(("rule", profile.rule))
    lines += [("note", note) for note in profile.notes]
    return lines


def report(profile: Profile, limit: int = 20, width: int | None = None) -> str:
    """Totals, the table, why each operation keeps what it keeps, what was alive at the peak,
    advice. Sentences wrap at `width`, tables are cut there.
    """
    head = totals(profile)
    longest = max(len(name) for name, _ in head)
    lines = []
    for name, text in head:
        lines += _wrapped(f"{name.ljust(longest)}  {text}", width, "", (longest + 2) * " ")
    rows = profile.rows()
    shown = rows[:limit]
    if rows:
        lines += ["", "Kept for backward, by module (* : all layers; (+n) : saved n times more)"]
        # What is said of an operation is said once, below, for all rows.
        table = columns(HEADERS[:-1], [cells(row)[:-1] for row in shown], right=(0, 1, 2))
        lines += [line[:width] for line in table.split("\n")]
        if rows[limit:]:
            rest = sum(row.bytes for row in rows[limit:])
            lines.append(f"  and {len(rows) - limit} more, {mib(rest)} together")
        lines += ["", "Why"]
        for keeper, reason in {cells(row)[-3]: row.largest.why for row in shown}.items():
            lines += _wrapped(f"{keeper}: {reason}", width, "  ", "    ")
    else:
        lines += ["", "Nothing is kept: no output requires a gradient."]
    if profile.live:
        lines += ["", f"Alive at the peak, in {profile.peak_phase}"]
        alive = [[mib(size), category, where] for category, where, size in profile.at_peak()]
        table = columns(alive[0], alive[1:], right=(0,))
        lines += [line[:width] for line in table.split("\n")]
    advice = advise(profile)
    if advice:
        lines += ["", "What to do"]
    for each in advice:
        lines += _wrapped(f"{mib(each.bytes)}: {each.text}", width, "  ", "    ")
        lines += _wrapped(f"-> {each.remedy}", width, "    ", "       ")
    return "\n".join(lines)


def _wrapped(text: str, width: int | None, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, width or _WIDTH, initial_indent=first, subsequent_indent=rest, drop_whitespace=True
    )
