"""The HTML report of a run: environment, charts, and every table with a command per row."""

from __future__ import annotations

from collections.abc import Iterator

from petal_kernels.tools import charts, page
from petal_kernels.tools.bench import console
from petal_kernels.tools.bench.results import Report, Table
from petal_kernels.tools.bench.scenarios import IN_WORDS


def render(report: Report) -> str:
    """The whole page."""
    environment = report.environment | {"dtype": report.dtype, "device": report.device}
    environment["command"] = page.code(report.command)
    if report.ceilings is not None:
        c = report.ceilings
        environment["roof, measured in this run"] = (
            f"copy {c.gigabytes:.1f} GB/s, product {c.gigaflops:.0f} GFLOP/s"
        )
    sections = [_summary(report), *_sweeps(report), *_scenarios(report)]
    return page.document("petal_kernels benchmark", sections, environment=environment)


def _summary(report: Report) -> str:
    gains: dict[str, dict[str, float]] = {}
    for table in report.tables:
        for label, row in table.rows.items():
            if row.chosen and row.speedup is not None:
                name = ", ".join((table.mode, *label.split()[1:]))
                gains.setdefault(table.scenario, {})[name] = 1.0 if row.noise else row.speedup
    parts = [
        page.paragraph(
            "Medians of interleaved cold-cache rounds. Drift is a table's own noise: a ratio "
            "closer to 1 than it is within noise, and drawn as 1. A row is red where it is slower "
            "than the fastest baseline, too far from fp64 (error ratio above 2 for outputs, 3 for "
            "gradients) or suspect (above 105 % of the roof); the last two get no speed-up."
        )
    ]
    if report.partial is not None:
        parts.insert(0, page.paragraph(f"Partial: {report.partial}."))
    parts += [page.paragraph(f"{name}: {why}", "faint") for name, why in report.absent.items()]
    if gains:
        title = "Times as fast as the published form"
        parts.append(charts.inline(charts.bars(gains, title=title, unit="x")))
    return page.section("Summary", *parts)


def _sweeps(report: Report) -> Iterator[str]:
    """Of every shape that was swept a chart per mode: time against the axis."""
    shapes: dict[str, dict[str, list[Table]]] = {}
    for table in report.tables:
        if table.swept is not None:
            shapes.setdefault(table.shape, {}).setdefault(table.mode, []).append(table)
    for shape, modes in shapes.items():
        parts = []
        for mode, tables in modes.items():
            series: dict[str, list[tuple[float, float]]] = {}
            for table in sorted(tables, key=lambda t: t.swept or 0.0):
                for label, row in table.rows.items():
                    series.setdefault(label, []).append((table.swept or 0.0, row.timing.median))
            chart = charts.lines(
                series,
                title=IN_WORDS[mode],
                x_label=str(report.axis),
                y_label="ms",
                log_x=len(tables) > 1,
            )
            parts.append(charts.inline(chart))
        yield page.section(f"Sweep over {report.axis}: {shape}", *parts)


def _scenarios(report: Report) -> Iterator[str]:
    groups: dict[str, list[Table]] = {}
    for table in report.tables:
        groups.setdefault(table.scenario, []).append(table)
    for scenario, tables in groups.items():
        times = {
            IN_WORDS[t.mode]: {label: row.timing.median for label, row in t.rows.items()}
            for t in tables
        }
        kept = {
            label: row.saved_bytes / 1e6
            for t in tables
            for label, row in t.rows.items()
            if row.saved_bytes is not None
        }
        figures = [charts.bars(times, title="Median milliseconds", unit="ms")]
        if kept:
            figures.append(charts.bars({"": kept}, title="Saved for backward", unit="MB"))
        parts: list[str] = [charts.inline(figure) for figure in figures]
        for table in tables:
            parts += [page.paragraph(IN_WORDS[table.mode]), _table(table)]
            parts.append(page.paragraph(console.notes(table), "faint"))
        yield page.section(scenario, *parts)


def _table(table: Table) -> str:
    parts = console.columns(table)
    headers = [*(name for name, _ in parts), "to reproduce"]
    rows: list[list[object]] = []
    classes = []
    for i, row in enumerate(table.rows.values()):
        rows.append([*(cells[i] for _, cells in parts), page.code(row.reproduce)])
        classes.append("loss" if row.loss or row.red or row.suspect else "")
    return page.table(headers, rows, classes)
