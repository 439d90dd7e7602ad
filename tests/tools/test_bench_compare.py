"""`bench compare`: what changed between two result files, and its exit code."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run as benchmarks_run
from benchmarks import tables
from petal_kernels.tools import cli
from petal_kernels.tools.bench import compared

ROW = {"median": 10.0, "ours": True, "verdict": "", "error_outputs": 1.0, "error_gradients": 1.0}
ENVIRONMENT = {
    "cpu": "x", "cpu_capability": "AVX2", "threads": 2, "gpu": None, "system": "Linux",
    "commit": "abc", "torch": "2.13", "date": "2026-01-02T03:04:05Z",
}  # fmt: skip
DOCUMENT: dict[str, Any] = {
    "environment": ENVIRONMENT,
    "command": "c",
    "dtype": "float32",
    "device": "cpu",
    "partial": None,
    "results": [
        {
            "scenario": "s",
            "mode": "full",
            "drift": 0.05,
            "rows": {"published": ROW | {"ours": False}, "petal": ROW},
        }
    ],
}


def row(document: dict[str, Any], label: str = "petal") -> dict[str, Any]:
    found: dict[str, Any] = document["results"][0]["rows"][label]
    return found


@pytest.fixture
def compare(tmp_path: Path) -> Any:
    def run(a: dict[str, Any], b: dict[str, Any], *words: str) -> int:
        paths = []
        for name, document in (("a", a), ("b", b)):
            paths.append(str(tmp_path / f"{name}.json"))
            Path(paths[-1]).write_text(json.dumps(document))
        return cli.main(["bench", "compare", *words, *paths])

    return run


def changed(median: float, drift: float = 0.05, **more: Any) -> dict[str, Any]:
    found = copy.deepcopy(DOCUMENT)
    row(found).update(median=median, **more)
    found["results"][0]["drift"] = drift
    return found


@pytest.mark.parametrize(
    ("median", "drift", "code", "said"),
    [
        (10.0, 0.05, 0, "0 slower, 0 faster, 2 within noise"),
        (10.4, 0.05, 0, "0 slower, 0 faster, 2 within noise"),
        (10.6, 0.05, 1, "1 slower, 0 faster, 1 within noise"),
        (10.6, 0.10, 0, "0 slower, 0 faster, 2 within noise"),  # inside B's drift, not A's
        (10.6, 0.01, 1, "1 slower, 0 faster, 1 within noise"),
        (10.4, 0.01, 0, "0 slower, 0 faster, 2 within noise"),  # inside A's drift, not B's
        (9.6, 0.05, 0, "0 slower, 0 faster, 2 within noise"),
        (9.4, 0.05, 0, "0 slower, 1 faster, 1 within noise"),
        (20.0, 0.05, 1, "1 slower, 0 faster, 1 within noise"),
    ],
)
def test_a_change_is_beyond_both_drifts(
    median: float, drift: float, code: int, said: str, compare: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert compare(DOCUMENT, changed(median, drift)) == code
    out = capsys.readouterr().out
    assert f"2 rows in both: {said}" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("  s ")]
    real = "within noise" not in said.split(", ")[0] and not said.startswith("0 slower, 0 faster")
    wanted = ["s", "full", "petal", "10.000", f"{median:.3f}", f"{median / 10:.2f}x",
              f"{100 * max(drift, 0.05):.1f}", "%"]  # fmt: skip
    assert lines == ([wanted] if real else [])


def test_the_other_way_round_is_faster(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(changed(20.0), DOCUMENT) == 0
    assert "0 slower, 1 faster" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("cpu", "y"), ("threads", 4), ("gpu", "H200"), ("cpu_capability", "AVX512")]
)
def test_another_machine_is_refused_by_name(
    name: str, value: object, compare: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: two machines compared as if they were two commits."""
    other = changed(20.0)
    other["environment"] = ENVIRONMENT | {name: value}
    assert compare(DOCUMENT, other) == 2
    said = capsys.readouterr().err
    assert f"{name}: {ENVIRONMENT[name]} and {value}" in said
    assert compare(DOCUMENT, other, "--anyway") == 1
    assert f"not the same machine: {name}: " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("dtype", "bfloat16"), ("device", "cuda")])
def test_another_kind_of_run_is_refused(name: str, value: str, compare: Any) -> None:
    assert compare(DOCUMENT, DOCUMENT | {name: value}) == 2


def test_another_commit_or_torch_is_what_one_compares(
    compare: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = DOCUMENT | {"environment": ENVIRONMENT | {"commit": "def", "torch": "2.14"}}
    assert compare(DOCUMENT, newer | {"partial": "interrupted"}) == 0
    said = capsys.readouterr().out
    assert "commit abc, torch 2.13" in said
    assert "commit def, torch 2.14" in said
    assert "partial: interrupted" in said


@pytest.mark.parametrize(
    "doubt",
    [
        {"verdict": "WRONG"},
        {"verdict": "suspect"},
        {"verdict": "imprecise"},
        {"verdict": "", "error_gradients": 4.0},  # files of before `verdict`
        {"verdict": "", "error_outputs": "inf"},
    ],
)
def test_what_is_wrong_in_b_is_no_pass(
    doubt: dict[str, Any], compare: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a kernel that became wrong, and fast by it, taken for an improvement."""
    assert compare(DOCUMENT, changed(1.0, **doubt)) == 2
    said = capsys.readouterr().out
    assert "1 rows in both: 0 slower, 0 faster" in said
    assert "s, full, petal: " in said
    assert compare(changed(1.0, **doubt), DOCUMENT) == 0  # repaired since


def test_an_imprecise_baseline_is_compared(compare: Any) -> None:
    slow = copy.deepcopy(DOCUMENT)
    row(slow, "published").update(median=20.0, verdict="imprecise", error_gradients=4.0)
    assert compare(DOCUMENT, slow) == 1


def test_rows_of_one_file_only_are_counted(
    compare: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    more = copy.deepcopy(DOCUMENT)
    more["results"][0]["rows"]["eager"] = ROW
    assert compare(DOCUMENT, more) == 0
    assert "1 rows in B only" in capsys.readouterr().out
    for entry in more["results"]:
        entry["mode"] = "train"
    assert compare(DOCUMENT, more) == 2
    assert "no row in common" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "factor"), [("milliseconds", 1.0), ("microseconds", 1000.0)])
def test_plans_and_overhead_are_compared_too(
    key: str, factor: float, compare: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def document(value: float) -> dict[str, Any]:
        entry = {"scenario": "p", "drift": 0.01, key: {"native update": value * factor}}
        return DOCUMENT | {"results": [entry]}

    assert compare(document(1.0), document(1.2)) == 1
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  p "))
    assert line.split()[-5:] == ["1.000", "1.200", "1.20x", "1.0", "%"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "indices"),
        ("{}", "no 'environment'"),
        (json.dumps(DOCUMENT | {"results": [{"scenario": "s"}]}), "no 'drift'"),
        (json.dumps(changed(0.0)), "petal has no time"),
        (json.dumps(changed(float("nan"))), "petal has no time"),
    ],
)
def test_what_is_no_result_file_is_refused(
    text: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(DOCUMENT))
    if text is not None:
        bad.write_text(text)
    for pair in ((good, bad), (bad, good)):
        assert cli.main(["bench", "compare", *map(str, pair)]) == 2
        said = capsys.readouterr().err
        assert f"got {bad}" in said
        assert why in said
        assert "Traceback" not in said


def test_words_and_options_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(DOCUMENT))
    for words in (["--anyway", str(path), str(path)], [str(path), "--anyway", str(path)]):
        assert cli.main(["bench", "compare", *words]) == 0
        assert benchmarks_run.main(["compare", *words]) == 0
    for words in (["--quick", "compare", "a", "b"], ["compare", "a"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", *words])
        assert stopped.value.code == 2
    assert "compare: want it first" in capsys.readouterr().err


OTHERS = ("-demo", "-fuzz", "-memory")  # of other commands
FILES = sorted(p for p in tables.RESULTS.glob("*.json") if not any(o in p.name for o in OTHERS))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_committed_result_file_loads(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every schema there has been; with itself nothing has changed."""
    run = compared.load(path)
    assert run.cells
    assert compared.differences(run, run) == []
    assert compared.compare(run, run) == 0
    said = capsys.readouterr().out
    assert " 0 slower, 0 faster" in said
    assert tables.results(path.stem)
