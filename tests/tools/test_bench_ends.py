"""How a run of the benchmark ends: bounds, interrupts, files.

Kind: a bound that checks nothing; hours of measuring lost by what ended them.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from petal_kernels._runtime.backends import BackendUnavailable
from petal_kernels.tools.bench import measure
from petal_kernels.tools.bench.correctness import Errors
from petal_kernels.tools.bench.request import RequestError
from petal_kernels.tools.bench.results import Table
from tests.tools.known_times import SAMPLES


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--fail-below", "2.5"], 0, ""),
        (["--fail-below", "2.51"], 1, "petal native 2.50x < 2.51x"),
        (["--fail-below", "1.2", "--backend", "torch"], 1, "petal torch 1.01x < 1.2x, which is"),
        (["--fail-below", "1", "--backend", "torch,native"], 0, ""),
    ],
)
def test_a_bound_holds_for_what_was_named_or_chosen(
    words: list[str], code: int, said: str, runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a bound that checks nothing and passes."""
    assert runs(*words) == code
    assert said in capsys.readouterr().err


def test_a_bound_that_no_row_can_be_held_against_is_no_pass(
    runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {k: v for k, v in SAMPLES.items() if k != "petal native"}
    assert runs("--fail-below", "1", samples=ours) == 2
    assert "no row of ours was measured" in capsys.readouterr().err
    assert runs("--fail-below", "1", errors={"petal torch": Errors(2.5, 0.0)}) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("stop", "code", "why"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RequestError("too wide"), 2, "too wide"),
        (BackendUnavailable("cannot run here"), 2, "cannot run here"),
        (MemoryError("full"), None, "MemoryError: full"),
    ],
)
def test_what_was_measured_before_the_end_is_written_and_marked(
    stop: BaseException, code: int | None, why: str, runs: Any, tmp_path: Path
) -> None:
    """Kind: hours of measuring lost by what ended them, or taken for a whole run."""
    files = [tmp_path / f"r.{suffix}" for suffix in ("json", "csv", "html")]
    words = [w for f in files for w in (f"--{f.suffix[1:]}", str(f))]
    if code is None:
        with pytest.raises(MemoryError):
            runs(*words, names=("s", "t"), stop=stop)
    else:
        assert runs(*words, names=("s", "t"), stop=stop) == code
    document = json.loads(files[0].read_text())
    assert [t["scenario"] for t in document["results"]] == ["s"]
    assert document["partial"] == why
    lines = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert {line["partial"] for line in lines} == {why}
    assert f"Partial: {why}." in files[2].read_text()


def test_a_run_that_measured_nothing_leaves_an_older_file_alone(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    out.write_text("older")
    with pytest.raises(KeyboardInterrupt):
        runs("--json", str(out), names=("s",), stop=KeyboardInterrupt())
    assert out.read_text() == "older"


def test_a_mode_that_was_measured_is_written(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.json"
    table = measure._table

    def second(scenario: Any, mode: str, *rest: Any) -> Table:
        if mode == "full":
            raise KeyboardInterrupt
        return table(scenario, mode, *rest)

    monkeypatch.setattr(measure, "_table", second)
    assert runs("--json", str(out), "--mode", "train,full") == 130
    (found,) = json.loads(out.read_text())["results"]
    assert (found["mode"], found["moved"], found["work"]) == ("train", 10_000_000, 100_000_000)


def test_one_file_that_fails_keeps_no_other_from_being_written(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.suffix == ".json":
            raise OSError(28, "No space left on device")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    files = [str(tmp_path / name) for name in ("r.json", "r.csv")]
    assert runs("--json", files[0], "--csv", files[1]) == 2
    assert Path(files[1]).read_text().startswith("kernel_name,")
    assert "r.json is not written" in capsys.readouterr().err


def test_a_reader_who_leaves_costs_no_file_and_says_nothing(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    with pytest.raises(BrokenPipeError):  # `exits.run` makes 141 of it
        runs("--json", str(out), names=("s", "t"), stop=BrokenPipeError())
    assert json.loads(out.read_text())["partial"] == "BrokenPipeError: "
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith("[")] == []  # progress alone
