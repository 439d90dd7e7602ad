"""What a run says of a row that is wrong, suspect, or no rival."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from petal_kernels.tools.bench import app, measure, timing
from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.request import Request
from petal_kernels.tools.bench.results import Report
from tests.tools.known_times import ENVIRONMENT, SAMPLES, Script, rows, scenario


@pytest.mark.parametrize(
    ("ours", "said", "loss"),
    [
        (4.0, "2.50x", False),
        (5.0, "2.00x", False),
        (5.05, "1.98x", False),  # within the drift of the fastest baseline
        (5.2, "1.92x", True),  # faster than published and compile, slower than eager
        (20.0, "0.50x", True),
    ],
)
def test_a_loss_is_one_against_the_fastest_baseline(
    ours: float, said: str, loss: bool, runs: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "r.json"
    runs("--json", str(out), samples=SAMPLES | {"petal native": [ours] * 4})
    assert rows(capsys.readouterr().out)["petal native"] == said
    (table,) = json.loads(out.read_text())["results"]
    assert table["rows"]["petal native"]["loss"] is loss
    assert table["best"] == "eager"


def test_a_form_that_computes_something_else_is_no_rival(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    samples = SAMPLES | {"petal native": [6.0] * 4}
    assert runs("--json", str(out), samples=samples, errors={"eager": Errors(40.0, 1.0)}) == 2
    (table,) = json.loads(out.read_text())["results"]
    assert (table["best"], table["rows"]["petal native"]["loss"]) == ("compile", False)
    assert table["rows"]["eager"]["speedup"] is None


@pytest.mark.parametrize(
    ("errors", "said", "code"),
    [
        (Errors(2.0, 3.0), "2.50x", 0),
        (Errors(2.1, 0.0), "imprecise", 2),
        (Errors(0.0, 3.1), "imprecise", 2),
        (Errors(0.0, 31.0), "WRONG", 2),
        (Errors(31.0, 0.0), "WRONG", 2),
        (Errors(0.0, math.nan), "WRONG", 2),
        (Errors(math.nan, 0.0), "WRONG", 2),
    ],
)
def test_an_error_stands_in_place_of_the_speedup(
    errors: Errors, said: str, code: int, runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs(errors={"petal native": errors}) == code
    assert rows(capsys.readouterr().out)["petal native"] == said


def test_a_wrong_published_form_gives_no_ratios(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs(errors={"published": Errors(50.0, 1.0)}) == 2
    said = capsys.readouterr().out
    assert "x" not in "".join(rows(said).values()).replace("WRONG", "")


@pytest.mark.parametrize(
    ("gigabytes", "said", "code"),
    [
        (10.0, "2.50x", 0),  # 100 %
        (9.53, "2.50x", 0),  # 104.9 %
        (9.52, "suspect", 2),  # 105.04 %
    ],
)
def test_faster_than_the_roof_is_suspect(
    gigabytes: float, said: str, code: int, runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a figure that no device can reach, printed as a speed-up; of a bound it is no pass."""
    assert runs(roof=Ceilings(gigabytes, 100.0)) == 0
    assert rows(capsys.readouterr().out)["petal native"] == said
    assert runs("--fail-below", "2", roof=Ceilings(gigabytes, 100.0)) == code
    assert (said in capsys.readouterr().err) is (code == 2)


def test_a_suspect_published_form_gives_no_ratios(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("--fail-below", "2", roof=Ceilings(1.0, 100.0)) == 2
    assert set(rows(capsys.readouterr().out).values()) == {"suspect", "floor"}


def test_a_published_form_that_alone_is_suspect_gives_no_ratios(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    samples = SAMPLES | {"published": [3.0] * 4}  # a third above the roof
    assert runs("--json", str(out), samples=samples) == 0
    assert runs("--fail-below", "0.1", samples=samples) == 2
    (table,) = json.loads(out.read_text())["results"]
    assert [k for k, row in table["rows"].items() if row["suspect"]] == ["published"]
    assert {row["speedup"] for row in table["rows"].values()} == {None}


def test_the_roof_is_measured_again_before_a_row_is_accused(
    runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter((Ceilings(1.0, 100.0), Ceilings(10.0, 40.0)))
    monkeypatch.setattr("petal_kernels.tools.bench.ceilings.measure", lambda *_: next(found))
    script = Script(SAMPLES)
    monkeypatch.setattr(timing, "Clock", script.clock)
    monkeypatch.setattr(measure, "_counts", lambda *_: (1, 1, 1))
    report = Report(ENVIRONMENT, "c", "float32", "cpu", None)
    args: Any = SimpleNamespace(what="op")
    app._compare(args, [lambda: scenario(script, {})], [], Request(modes=("full",), rounds=4),
                 report)  # fmt: skip
    assert report.ceilings == Ceilings(10.0, 100.0)
    assert rows(capsys.readouterr().out)["petal native"] == "2.50x"
