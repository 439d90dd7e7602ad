"""The HTML page and its charts: well-formed, self-contained, and drawn by a real browser."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from petal_kernels.tools import charts, exits, page
from petal_kernels.tools.bench import app, ceilings
from petal_kernels.tools.bench.outputs import Outputs

SVG = "{http://www.w3.org/2000/svg}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ORANGE = (0xB5, 0x65, 0x1D)  # --s1 in the light theme: the second series

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium here: apt-get install chromium"
)


def parse(document: str) -> ElementTree.Element:
    return ElementTree.fromstring(document.removeprefix("<!DOCTYPE html>"))


def tips(chart: ElementTree.Element) -> list[str]:
    return [tip.text or "" for tip in chart.iter(f"{SVG}title")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command itself, with a sweep."""
    path = tmp_path_factory.mktemp("bench") / "report.html"
    before = torch.get_num_threads()
    far = ceilings.Ceilings(1e6, 1e9)  # measured in a bad moment it would make rows suspect
    words = ["op", "mode_contract", "--quick", "--no-gate", "--rounds", "4", "--threads", "1"]
    words += ["--shape", "image tucker", "--sweep", "rank", "--values", "8,16", "--html", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "measure", lambda *_: far)
        assert app.main(words) == 0
    torch.set_num_threads(before)
    return path


def test_the_report_is_well_formed_and_self_contained(report: Path) -> None:
    text = report.read_text()
    root = parse(text)
    # Nothing is fetched: no address but the name space of SVG, no script, no style from elsewhere.
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\((?!#)", text)
    assert not list(root.iter("script"))
    assert all(e.get("href") == "data:," for e in root.iter("link"))
    assert not [e for e in root.iter() if "src" in e.attrib]


def test_the_report_has_environment_plots_and_commands(report: Path) -> None:
    root = parse(report.read_text())
    body = root.find("body")
    assert body is not None
    assert [e.tag for e in body][:2] == ["h1", "table"]  # the environment comes first
    cells = [e.text for e in body[1].iter("td")]
    assert {"cpu", "torch", "commit", "threads"} <= set(cells)
    drawn = list(root.iter(f"{SVG}svg"))
    titles = [chart.get("aria-label") for chart in drawn]
    assert titles[0] == "Times as fast as the published form"
    swept = {"forward as in training", "forward and backward"}
    lines = [c for c in drawn if c.get("aria-label") in swept]
    assert len(lines) == 2  # both modes were swept
    for chart in lines:
        points = tips(chart)
        names = {tip.split(":")[0] for tip in points}
        assert {"published", "eager", "petal torch"} <= names
        assert len(points) == 2 * len(names)
    rows = [r for t in root.iter("tbody") for r in t.iter("tr") if r.find(".//code") is not None]
    commands = [r.find(".//code").text for r in rows]  # type: ignore[union-attr]
    measured = [c for c in commands if c and c.startswith("petal-kernels bench op mode_contract")]
    assert len(measured) >= 2 * 2 * 3  # values, modes, providers at least


def browse(path: Path, tmp_path: Path, size: str = "1000,1400") -> tuple[str, Path]:
    """What chromium wrote of the console, and a screenshot."""
    picture = tmp_path / "picture.png"
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            *(f"--disable-{what}" for what in quiet),
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={size}",
            f"--screenshot={picture}",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x), picture


def coloured(picture: Path) -> int:
    """Pixels of the second series' colour."""
    image = pytest.importorskip("matplotlib.image").imread(picture)
    near = abs(image[..., :3] * 255 - ORANGE).max(-1) < 3
    return int(near.sum())


@needs_browser
def test_a_browser_shows_the_report(report: Path, tmp_path: Path) -> None:
    console, picture = browse(report, tmp_path)
    assert console == ""
    assert coloured(picture) > 500


@needs_browser
def test_what_the_browser_test_would_see(tmp_path: Path) -> None:
    """A page with an error and without a chart is told from a good one."""
    bad = tmp_path / "bad.html"
    bad.write_text(page.document("x", [], environment={}).replace("</body>", _FAULT))
    console, picture = browse(bad, tmp_path)
    assert "no such name" in console
    assert coloured(picture) == 0


_FAULT = "<script>console.error('no such name')</script></body>"


def test_text_is_escaped_and_markup_is_not() -> None:
    text = page.table(["a<b", "n"], [["<i>&", 1.5], [page.code("x>y"), "2.00x"]], ["", "loss"])
    root = ElementTree.fromstring(text)
    assert [c.text for c in root.iter("th")] == ["a<b", "n"]
    assert root.find(".//code").text == "x>y"  # type: ignore[union-attr]
    rows = list(root.find(".//tbody").iter("tr"))  # type: ignore[union-attr]
    assert [r.get("class") for r in rows] == [None, "loss"]
    assert [c.get("class") for c in rows[0]] == [None, "number"]
    long = page.table(["a"], [["a sentence that a phone may break into lines"]])
    assert '<td class="sentence">' in long
    environment = {"gpu": None, "cpu": "<AMD>"}
    document = parse(page.document("t<", [page.section("s&", text)], environment=environment))
    assert [c.text for c in document.iter("td")][:4] == ["gpu", "none", "cpu", "<AMD>"]


def test_a_chart_says_what_its_points_are() -> None:
    series: dict[str, list[tuple[float, float]]]
    series = {"a": [(1, 0), (2, 5), (4, 1.0e6)], "b<": [(1, 2)]}
    figure = charts.lines(series, title="t&", x_label="x", y_label="ms", log_x=True)
    chart = ElementTree.fromstring(charts.inline(figure))
    named = chart.iter(f"{SVG}title")
    assert [t.text for t in named] == [
        "a: 0 ms at 1 x", "a: 5 ms at 2 x", "a: 1M ms at 4 x", "b<: 2 ms at 1 x",
    ]  # fmt: skip
    labels = [t.text for t in chart.iter(f"{SVG}text")]
    assert {"t&", "a", "b<", "x", "ms", "1", "2", "4"} <= set(labels)
    assert "1.5" not in labels  # ticks stand where points are
    assert chart.get("aria-label") == "t&"
    assert "#b5651d" not in charts.inline(figure)  # the theme says what the second colour is


def test_a_number_has_three_digits() -> None:
    said = {0.123456: "0.123", 9999.4: "9999", 12345: "12.3k", -2.5e6: "-2.5M", 3e9: "3G", 0: "0"}
    assert {value: charts.number(value) for value in said} == said


def test_areas_are_stacked() -> None:
    series = {"a": [1.0, 3.0, 3.0], "b": [1.0, 1.0, 0.0]}
    words = {"title": "t", "x_label": "step", "y_label": "MiB"}
    figure = charts.areas([0, 1, 2], series, marks={"backward": 1}, **words)
    drawn: list[Any] = [area.get_paths()[0].vertices for area in figure.axes[0].collections]
    lower, upper = drawn
    assert lower[:, 1].max() == 3.0
    assert upper[:, 1].max() == 4.0  # the second stands on the first
    chart = ElementTree.fromstring(charts.inline(figure))
    assert tips(chart) == ["a: at most 3 MiB", "b: at most 1 MiB"]
    assert "backward" in [t.text for t in chart.iter(f"{SVG}text")]


def test_bars_are_as_long_as_their_values() -> None:
    figure = charts.bars({"g": {"a": 2.0, "b": 8.0}, "": {"a": 1.0}}, title="t", unit="ms")
    drawn: list[Any] = [*figure.axes[0].patches]
    a, b, again = drawn
    assert [bar.get_width() for bar in (a, b, again)] == [2.0, 8.0, 1.0]
    assert a.get_facecolor() == again.get_facecolor() != b.get_facecolor()
    chart = ElementTree.fromstring(charts.inline(figure))
    assert tips(chart) == ["g, a: 2 ms", "g, b: 8 ms", "a: 1 ms"]
    assert "8 ms" in [t.text for t in chart.iter(f"{SVG}text")]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="series: want at least one point, and finite"):
        charts.lines({"a": [(1, 1), (2, float("nan"))]}, title="", x_label="", y_label="")
    with pytest.raises(ValueError, match="series: want at least one point"):
        charts.bars({}, title="", unit="")


def test_without_matplotlib_a_page_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "a.html"
    with pytest.raises(exits.Refusal, match="--html: want matplotlib: pip install"):
        Outputs.of({"json": None, "html": path}, "bench")
    assert not path.exists()
    Outputs.of({"json": path, "html": None}, "bench")
