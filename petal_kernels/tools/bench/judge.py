"""How a table is judged, from its times alone: ratios, losses, and which of them say nothing.

speed-up   published median / own median; > 1 is faster
noise      a ratio r with max(r, 1/r) - 1 <= the table's drift is equal, not faster or slower
suspect    above 105 % of the roof: faster than this device can be, so no ratio is given
loss       slower than the fastest baseline by more than the drift
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petal_kernels.tools.bench.ceilings import Ceilings
    from petal_kernels.tools.bench.results import Row, Table

SUSPECT = 1.05  # of the roof, which is measured too


def change(ratio: float) -> float:
    """How far a ratio is from 1, the same for r and 1/r: 0.25 for 1.25 and for 0.8."""
    return max(ratio, 1.0 / ratio) - 1.0


def fastest_baseline(rows: dict[str, Row]) -> str | None:
    """Label of the best other form: no row of ours, no floor, and none that computes something
    else."""
    rivals = {
        label: row.timing.median
        for label, row in rows.items()
        if not (row.ours or row.floor or row.wrong)
    }
    return min(rivals, key=lambda label: rivals[label]) if rivals else None


def judge(table: Table, ceilings: Ceilings) -> None:
    """Set what follows from the rows' times and errors, bytes, flops and the roof; the first row is
    what the others are compared to."""
    if table.moved is not None and table.work is not None:
        for row in table.rows.values():
            if not row.floor:  # it does less than the formula says
                row.roof = ceilings.share(table.moved, table.work, row.timing.median)
    reference = next(iter(table.rows.values()))
    table.best = fastest_baseline(table.rows)
    for row in table.rows.values():
        row.suspect = row.roof is not None and not row.roof <= SUSPECT
    for row in table.rows.values():
        row.speedup, row.noise = None, False
        vouched = not (row.red or row.suspect or row.floor)
        if vouched and not (reference.wrong or reference.suspect):
            row.speedup = reference.timing.median / row.timing.median
            row.noise = row is not reference and change(row.speedup) <= table.drift
        if row.ours and row.chosen and table.best is not None:
            least = table.rows[table.best].timing.median
            row.loss = row.timing.median > least * (1.0 + table.drift)
