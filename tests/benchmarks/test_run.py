"""The benchmark from a checkout: every verb end to end on small shapes, and README's figures."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import run, tables
from petal_kernels.tools.bench import ceilings, counting, layer
from petal_kernels.tools.bench.request import Request
from tests.ops import folders

QUICK = ["--quick", "--no-gate", "--rounds", "4", "--threads", "1", "--mode", "full"]
VERBS = (
    ["op", "gated_bottleneck"],
    ["layer", "gated_adapter"],
    ["model", "bart", "--shape", "VL-PET"],
)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> object:
    """One here; the command sets torch's thread count for good. The roof is far away: measured in
    a bad moment of a busy machine it would make rows suspect."""
    monkeypatch.setattr(ceilings, "measure", lambda *_: ceilings.Ceilings(1e6, 1e9))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("what", VERBS, ids=lambda words: words[0])
def test_every_verb_writes_a_result_file(what: list[str], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert run.main([*what, *QUICK, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert {"cpu", "torch", "petal_kernels", "commit", "threads"} <= set(document["environment"])
    assert document["command"] == " ".join(("python -m benchmarks.run", *what, *QUICK))
    assert document["ceilings"]["gigabytes"] > 0
    for result in document["results"]:
        rows = result["rows"]
        assert result["mode"] == "full"
        assert rows["published"]["speedup"] == 1.0
        assert all(row["median"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
        ours = next(row for row in rows.values() if row["chosen"])
        assert ours["saved_bytes"] <= rows["published"]["saved_bytes"]
        assert ours["error_outputs"] <= 2.0
        assert ours["reproduce"].startswith(f"petal-kernels bench {' '.join(what[:2])} --shape ")


@pytest.mark.parametrize("what", ["plans", "overhead"])
def test_the_other_verbs_keep_their_meaning(what: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert run.main([what, *QUICK, "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    key = {"plans": "milliseconds", "overhead": "microseconds"}[what]
    assert results
    assert all(value > 0 for result in results for value in result[key].values())


def test_unknown_operator_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["op", "nonsense", "--no-gate"])
    said = capsys.readouterr().err
    assert f"want some of {', '.join(folders.names())}" in said


def test_saved_bytes_meet_the_published_form() -> None:
    """Self-attention q, k, v, dropout 0.1: at most 0.68x in fp32."""
    request = Request(shape="whole layer", against=("published",))
    (make,) = layer.scenarios(["petal_qkv"], request)
    scenario = make()
    saved = {
        label: counting.saved_bytes(partial(p.outputs, scenario.inputs), scenario.parameters)
        for label, p in scenario.providers.items()
    }
    assert saved["petal"] <= 0.68 * saved["published"], saved


def test_the_pages_say_what_the_result_files_say() -> None:
    for path, (old, new) in tables.rendered().items():
        assert old == new, f"{path.name}: python -m benchmarks.tables --write"


def test_a_changed_figure_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tables.ROOT / "README.md", tmp_path)
    shutil.copytree(tables.ROOT / "docs", tmp_path / "docs")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    changed = tmp_path / "docs" / "benchmark.md"
    text = changed.read_text()
    row = next(x for x in text.splitlines() if x.startswith("| VL-PET large"))
    changed.write_text(text.replace(row, re.sub(r"\d", "7", row, count=1)))
    assert tables.main(["--check"]) == 1
    assert f"+{row}" in capsys.readouterr().out
    assert tables.main(["--write"]) == 0
    assert changed.read_text() == text
    with pytest.raises(ValueError, match="want some of"):
        tables.render(text.replace("figures: petal_layer", "figures: other"))


def test_tables_read_the_present_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new result file can take an old one's place, and a loss is not bold."""
    rows = {"published": 8.0, "eager": 5.0, "compile": 6.0, "petal": 4.0}
    entry = {
        "scenario": "s",
        "mode": "full",
        "drift": 0.02,
        "rows": {k: {"median": v} for k, v in rows.items()},
    }
    # The frozen layer alone is no rival.
    entry["rows"]["base"] = {"median": 1.0, "floor": True}  # type: ignore[index]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "won.json").write_text(json.dumps({"results": [entry]}))
    entry["drift"] = 0.3
    (tmp_path / "even.json").write_text(json.dumps({"results": [entry]}))
    won, even = (tables._line(tables.Row("x", file, "s")) for file in ("won", "even"))
    assert won == "| x | 8.0 ms | 5.0 | 6.0 | **4.0 (2.00x)** | 2.0 % |"
    step = {"base": {"median": 100.0, "floor": True}, "published": {"median": 120.0}}
    entry |= {"scenario": "qformer step, PETAL, full, B=16 L=32 r=64"}
    entry |= {"rows": step | {"petal": {"median": 107.0}}}
    (tmp_path / "step.json").write_text(json.dumps({"results": [entry]}))
    host = {"raw native": 1.0, "public, no grad": 2.0, "public, grad": 3.0}
    overhead = {"scenario": "host overhead", "microseconds": host}
    (tmp_path / "host.json").write_text(json.dumps({"results": [overhead]}))
    monkeypatch.setattr(tables, "_QFORMER", "step")
    monkeypatch.setattr(tables, "_OVERHEAD", "host")
    said = tables._whole_step()
    assert "(B=16 L=32, release" in said
    assert "add 20.0 % to the frozen step in the published form and 7.0 % fused" in said
    assert even == "| x | 8.0 ms | 5.0 | 6.0 | 4.0 (2.00x) | 30.0 % |"
