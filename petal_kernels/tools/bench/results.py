"""What a run found: rows and tables, and the files they are written to.

JSON: environment, command, ceilings, what could not be compared and why, and one entry per scenario
and mode; `partial` says why a run did not reach its end. CSV: long format, one line per measured
quantity, as Liger's benchmarks write it, with versions and commit on every line so that files of
several runs can be put one after the other.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.timing import Timing


@dataclass
class Row:
    """One provider in one mode. What was not measured is None."""

    timing: Timing
    ours: bool = False
    chosen: bool = False
    floor: bool = False
    speedup: float | None = None  # over the published form; None also where it is not vouched for
    launches: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    roof: float | None = None
    errors: Errors | None = None
    wall: Timing | None = None
    loss: bool = False
    suspect: bool = False  # faster than the roof
    noise: bool = False  # the speed-up is no farther from 1 than the table's drift
    reproduce: str = ""

    @property
    def wrong(self) -> bool:
        """Whether it computes something else."""
        return self.errors is not None and self.errors.wrong

    @property
    def red(self) -> bool:
        """Whether it is too far from the fp64 reference."""
        return self.errors is not None and self.errors.red

    @property
    def failed(self) -> bool:
        """Whether the run has failed with it: ours are held to the rule of the tests, a baseline
        may sum in a worse order but must compute the same function."""
        return self.red if self.ours else self.wrong

    @property
    def verdict(self) -> str:
        """What is said in place of a speed-up; empty where it is given."""
        if self.red:
            return "WRONG" if self.wrong else "imprecise"
        if self.suspect:
            return "suspect"
        if self.floor:
            return "floor"
        return "within noise" if self.noise else ""

    def as_dict(self) -> dict[str, Any]:
        """For a result file: the timing's fields beside the others."""
        own = {k: v for k, v in asdict(self).items() if k not in ("timing", "errors", "wall")}
        found = self.timing.as_dict() | {
            k: round(v, 4) if isinstance(v, float) else v for k, v in own.items()
        }
        found["verdict"] = self.verdict
        if self.errors is not None:
            found["error_outputs"] = _finite(self.errors.outputs)
            found["error_gradients"] = _finite(self.errors.gradients)
        if self.wall is not None:
            found["wall"] = self.wall.as_dict()
        return found


def _finite(ratio: float) -> float | str:
    return round(ratio, 3) if ratio < 1e6 else "inf"


@dataclass
class Table:
    """All providers of one scenario in one mode."""

    scenario: str
    mode: str
    rows: dict[str, Row]
    drift: float
    best: str | None = None  # the fastest baseline
    shape: str = ""
    swept: float | None = None
    moved: int | None = None
    work: int | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For a result file."""
        found = {k: v for k, v in asdict(self).items() if k != "rows" and v is not None}
        found["drift"] = round(self.drift, 4)
        return found | {"rows": {label: row.as_dict() for label, row in self.rows.items()}}


@dataclass
class Report:
    """One run."""

    environment: dict[str, Any]
    command: str
    dtype: str
    device: str
    axis: str | None
    ceilings: Ceilings | None = None
    absent: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    partial: str | None = None

    def as_json(self, results: Sequence[dict[str, Any]] | None = None) -> str:
        """The result file; of `plans` and `overhead` with results that are no tables."""
        document = {
            "environment": self.environment,
            "command": self.command,
            "dtype": self.dtype,
            "device": self.device,
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "absent": self.absent,
            "partial": self.partial,
            "results": [t.as_dict() for t in self.tables] if results is None else list(results),
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    def as_csv(self) -> str:
        """One line per row and quantity: time, peak memory, saved bytes."""
        out = io.StringIO()
        writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for table in self.tables:
            for label, row in table.rows.items():
                for quantity in _quantities(row):
                    writer.writerow(self._line(table, label, row) | quantity)
        return out.getvalue()

    def _line(self, table: Table, label: str, row: Row) -> dict[str, Any]:
        env, errors = self.environment, row.errors
        return {
            "kernel_name": table.scenario,
            "kernel_provider": label,
            "kernel_operation_mode": table.mode,
            "x_name": self.axis or "",
            "x_value": "" if table.swept is None else int(table.swept),
            "rel_err_vs_torch": "" if errors is None else errors.worst,
            "pct_roofline": "" if row.roof is None else round(100 * row.roof, 2),
            "extra_config": json.dumps({"dtype": self.dtype, "threads": env["threads"]}),
            "machine": env["gpu"] if self.device.startswith("cuda") else env["cpu"],
            "timestamp": env["date"],
            "petal_kernels": env["petal_kernels"],
            "torch": env["torch"],
            "triton": env["triton"] or "",
            "commit": env["commit"],
            "verdict": row.verdict,
            "partial": self.partial or "",
            "reproduce": row.reproduce,
        }


_COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_value",
    "y_value_20",
    "y_value_50",
    "y_value_80",
    "rel_err_vs_torch",
    "pct_roofline",
    "extra_config",
    "machine",
    "timestamp",
    "petal_kernels",
    "torch",
    "triton",
    "commit",
    "verdict",
    "partial",
    "reproduce",
)


def _quantities(row: Row) -> list[dict[str, Any]]:
    t = row.timing
    found: list[dict[str, Any]] = [
        {"metric_name": "speed", "metric_unit": "ms"}
        | {"y_value_20": t.p20, "y_value_50": t.median, "y_value_80": t.p80}
    ]
    for name, value in (("memory", row.peak_bytes), ("saved", row.saved_bytes)):
        if value is not None:
            megabytes = value / 1e6
            values = dict.fromkeys(("y_value_20", "y_value_50", "y_value_80"), megabytes)
            found.append({"metric_name": name, "metric_unit": "MB"} | values)
    return found
