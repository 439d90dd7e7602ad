"""The benchmark runs end to end on small shapes, and writes what a result file must say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import run
from petal_kernels.tools.bench import scenarios, timing


@pytest.mark.parametrize("what", ["op", "layer", "qformer", "overhead"])
def test_every_verb_writes_a_result_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: f
    )  # compiling is minutes, and not what is tested
    out = tmp_path / "r.json"
    assert run.main([what, "--quick", "--no-gate", "--rounds", "4", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert {"cpu", "torch", "commit", "threads"} <= set(document["environment"])
    assert document["command"] == f"python -m benchmarks.run {what} --quick --no-gate --rounds 4"
    assert document["results"]
    for result in document["results"]:
        if "rows" in result:
            assert result["rows"]["published"]["speedup"] == 1.0
            assert all(row["median"] > 0 for row in result["rows"].values())


def test_unknown_operator_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["op", "nonsense", "--no-gate"])
    said = capsys.readouterr().err
    assert "want some of expert_dispatch, gated_bottleneck, lowrank_linear" in said


def test_drift_is_the_largest_difference_between_halves() -> None:
    rows = {"a": timing._summary([1.0, 1.0, 1.0, 1.0]), "b": timing._summary([1.0, 1.0, 1.1, 1.1])}
    assert timing.drift(rows) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="rounds: want at least 4"):
        timing.compare({}, torch.device("cpu"), rounds=2)


@pytest.mark.parametrize("given", [False, True])
def test_providers_compute_the_same_gradients(given: bool) -> None:
    """Published, well-written and fused forms agree with dropout off: the benchmark compares
    equals."""
    case = scenarios.PetalLayer(rows=96, width=64, rank=16, dropout=0.0, outputs_given=given)
    scenario = scenarios.petal_layer(case, torch.device("cpu"), compiled=False)
    want = scenario.providers["published"]()
    for label, step in scenario.providers.items():
        for a, b in zip(want, step(), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-4, msg=lambda m, label=label: f"{label}: {m}"
            )


def test_saved_bytes_meet_the_published_form() -> None:
    """Self-attention q, k, v, dropout 0.1: at most 0.68x in fp32, and exact integers."""
    case = scenarios.PetalLayer()
    scenario = scenarios.petal_layer(case, torch.device("cpu"), compiled=False)
    saved = {k: scenarios.saved_bytes(f, scenario.parameters) for k, f in scenario.saved.items()}
    assert saved["petal"] <= 0.68 * saved["published"], saved
