"""The HTML page and its charts: well-formed, self-contained, and drawn by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from petal_kernels.tools import page, svg
from petal_kernels.tools.bench import app, ceilings

SVG = "{http://www.w3.org/2000/svg}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ORANGE = (0xB5, 0x65, 0x1D)  # --s1 in the light theme: the second series

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium here: apt-get install chromium"
)


def parse(document: str) -> ElementTree.Element:
    return ElementTree.fromstring(document.removeprefix("<!DOCTYPE html>"))


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
    assert not re.search(r"@import|url\(", text)
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
    charts = list(root.iter(f"{SVG}svg"))
    titles = [chart.get("aria-label") for chart in charts]
    assert titles[0] == "Times as fast as the published form"
    lines = [c for c in charts if list(c.iter(f"{SVG}polyline"))]
    assert len(lines) == 2  # both modes were swept
    assert [c.get("aria-label") for c in lines] == [
        "forward as in training",
        "forward and backward",
    ]
    for chart in lines:
        points = list(chart.iter(f"{SVG}circle"))
        names = {p.find(f"{SVG}title").text.split(":")[0] for p in points}  # type: ignore[union-attr]
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
    rows = list(root.find(".//tbody").iter("tr"))  # type: ignore[union-attr, arg-type]
    assert [r.get("class") for r in rows] == [None, "loss"]
    assert [c.get("class") for c in rows[0]] == [None, "number"]
    long = page.table(["a"], [["a sentence that a phone may break into lines"]])
    assert '<td class="sentence">' in long
    environment = {"gpu": None, "cpu": "<AMD>"}
    document = parse(page.document("t<", [page.section("s&", text)], environment=environment))
    assert [c.text for c in document.iter("td")][:4] == ["gpu", "none", "cpu", "<AMD>"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 27.0, [0, 10, 20, 30]),
        (0.3, 0.9, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 4.0, [-4, -2, 0, 2, 4]),
        (5.0, 5.0, [5, 6, 7, 8, 9, 10]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low: float, high: float, ticks: list[float]) -> None:
    assert svg.round_ticks(low, high) == ticks


def test_logarithmic_ticks() -> None:
    assert svg.log_ticks(512, 4096) == [500, 1000, 2000, 5000]
    assert svg.log_ticks(1, 27000) == [1, 10, 100, 1000, 10000, 100000]
    assert svg.log_ticks(7, 7) == [5, 10]


def test_points_lie_where_the_axes_say() -> None:
    chart = ElementTree.fromstring(
        svg.lines({"a": [(0, 0), (10, 5), (20, 10)]}, title="t", x_label="x", y_label="ms")
    )
    points = [(float(p.get("cx", 0)), float(p.get("cy", 0))) for p in chart.iter(f"{SVG}circle")]
    (left, bottom), (middle, half), (right, top) = points
    assert middle == pytest.approx((left + right) / 2)
    assert half == pytest.approx((bottom + top) / 2)
    assert left < right
    assert top < bottom
    labels = [t.text for t in chart.iter(f"{SVG}text")]
    assert {"t", "a", "x", "ms", "0", "20"} <= set(labels)


def test_areas_are_stacked() -> None:
    series = {"a": [(0.0, 1.0), (1.0, 3.0)], "b": [(0.0, 1.0), (1.0, 1.0)]}
    chart = ElementTree.fromstring(svg.areas(series, title="t", x_label="step", y_label="MiB"))
    lower, upper = (p.get("points", "").split() for p in chart.iter(f"{SVG}polygon"))
    assert upper[2:] == lower[:2][::-1]  # the second stands on the first
    tips = [t.text for t in chart.iter(f"{SVG}title")]
    assert "b: 1 of 4 MiB at 1 step" in tips
    with pytest.raises(ValueError, match="the same x values"):
        svg.areas({"a": [(0, 1)], "b": [(1, 1)]}, title="", x_label="", y_label="")


def test_bars_are_as_long_as_their_values() -> None:
    rows = {"g": {"a": 2.0, "b": 8.0}}
    chart = ElementTree.fromstring(svg.bars(rows, title="t", unit="ms"))
    a, b = (float(r.get("width", 0)) for r in chart.iter(f"{SVG}rect"))
    assert b == pytest.approx(4 * a, rel=0.01)
    assert "8 ms" in [t.text for t in chart.iter(f"{SVG}text")]


@pytest.mark.parametrize("y", [float("nan"), float("inf"), -1.0])
def test_what_cannot_be_drawn_is_refused(y: float) -> None:
    with pytest.raises(ValueError, match="series: want"):
        svg.lines({"a": [(1, 1), (2, y)]}, title="", x_label="", y_label="", log_y=True)
    with pytest.raises(ValueError, match="series: want at least one point"):
        svg.bars({}, title="", unit="")
