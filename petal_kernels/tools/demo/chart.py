"""The demo in one small picture: what was learnt, what it costs and what it keeps."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from petal_kernels.tools.demo.report import draw_accuracy, draw_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Text stays text, and the same figures give the same file.
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "petal_kernels"}


def chart(figures: dict[str, Any]) -> str:
    """SVG of a run's report (`report.json`): accuracy on held-out pictures by step, milliseconds of
    a step, megabytes kept for backward."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "font.size": 9}):
        figure = Figure(figsize=(10.5, 3.1), layout="constrained")
        _draw(figure, figures)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Digits that no screen shows.
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", text.getvalue())


def _draw(figure: Figure, figures: dict[str, Any]) -> None:
    accuracy, time, memory = figure.subplots(1, 3)
    draw_accuracy(accuracy, figures)
    draw_bars(time, figures["comparison"]["milliseconds"], "ms per step", 1.0)
    draw_bars(memory, figures["comparison"]["saved_bytes"], "MB kept for backward", 1e-6)
