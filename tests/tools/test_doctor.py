"""The doctor: every backend of every operator with a verdict or a reason, and a wrong kernel
found."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch

from petal_kernels import _build_info
from petal_kernels._runtime import backends, device
from petal_kernels.tools import cli, operators
from petal_kernels.tools.doctor import report, selfcheck

GRID = [(op.name, b) for op in operators.operators() for b in operators.backend_names(op)]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "CASES", 2)


def plant(monkeypatch: pytest.MonkeyPatch, op: str, backend: str, what: str, change: Any) -> None:
    """Let ``change`` have the results of one function of a backend."""
    impl = importlib.import_module(f"petal_kernels.ops.{op}.{backend}_impl")
    true = getattr(impl, what)
    monkeypatch.setattr(impl, what, lambda *args: change(true(*args)))


def test_every_backend_of_every_operator_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for op, backend in GRID:
        (found,) = [w for w in lines if w[:2] == [op, backend]]
        if backend == "torch" or (backend == "native" and device.cpu_library_reason() is None):
            assert found[2] == "pass"
            assert found[found.index("worst") + 1] <= "1.00"
        elif not torch.cuda.is_available():
            assert found[2] == "no"
            reason = " ".join(found[3:])
            assert f"  {backend}: {reason}\n      -> " in out, "a refusal without a remedy"
    assert torch.__version__ in out
    for choice in ("plan", "runs on"):
        assert choice in out


def test_json_holds_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(c))
    assert found["ok"] is True
    assert [(line["operator"], line["backend"]) for line in found["parity"]] == GRID
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert set(found["built"]["parts"]) == {"cpu", "cuda"}
    assert [c["operator"] for c in found["choices"]] == list(dict.fromkeys(op for op, _ in GRID))
    for line in found["parity"]:
        assert (line["status"] == "refused") == (line["checks"] == 0)


def test_a_named_default_answers_for_no_other_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PETAL_BACKEND", "cuda")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    passed = [
        line.split()[0] for line in out.splitlines() if line.split()[1:3] == ["torch", "pass"]
    ]
    assert passed == [op.name for op in operators.operators()]
    assert "PETAL_BACKEND=cuda takes its place here" in out


def off(t: torch.Tensor) -> torch.Tensor:
    """One element wrong by an eighth of the largest."""
    t = t.clone()
    if t.numel():
        t.view(-1)[-1] += t.abs().max() / 8
    return t


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_a_planted_fault_is_found(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an output, or in the last of the gradients alone."""

    def change(result: Any) -> Any:
        if what == "forward":
            return off(result)
        return result._replace(up=None if result.up is None else off(result.up))

    plant(monkeypatch, "mode_contract", "torch", what, change)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG RESULTS: mode_contract torch." in out
    assert ("output 0" if what == "forward" else "gradient of up") in out
    assert out.count(" fail ") == 1


def test_a_kernel_that_raises_is_a_fault_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(_: Any) -> Any:
        raise RuntimeError("no such kernel image")

    plant(monkeypatch, "expert_dispatch", "torch", "forward", change)
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(c))
    status = {(x["operator"], x["backend"]): x for x in found["parity"]}
    assert status["expert_dispatch", "torch"]["status"] == "fail"
    assert "no such kernel image" in status["expert_dispatch", "torch"]["faults"][0]
    assert status["mode_contract", "torch"]["status"] == "pass"


def test_results_that_change_from_call_to_call_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def change(result: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return torch.nextafter(result, result + calls[0] % 2)

    plant(monkeypatch, "mode_contract", "torch", "forward", change)
    (op,) = [op for op in operators.operators() if op.name == "mode_contract"]
    line = selfcheck.check(op, "torch", 1, interpret=False)
    assert any("other bits" in fault for fault in line.faults)


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = f"the compiled CPU kernels are not here: no compiler. {_build_info.how()}"
    monkeypatch.setitem(backends._MISSING, "native", lambda: reason)
    monkeypatch.setitem(backends._MISSING, "triton", lambda: "triton is not installed")
    op = operators.operators()[0]
    line = selfcheck.check(op, "native", 1, interpret=False)
    assert line.status == "refused"
    assert line.reason == "the compiled CPU kernels are not here: no compiler"
    assert line.remedy == _build_info.how()
    line = selfcheck.check(op, "triton", 1, interpret=False)
    assert line.remedy == "pip install 'petal-kernels[triton]'"
    assert "triton is not installed" in report.line(line)
    assert report.remedies([line, line]).count("-> pip install") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs without the interpreter")
def test_the_interpreter_checks_triton_on_request() -> None:
    pytest.importorskip("triton")
    (op,) = [op for op in operators.operators() if op.name == "mode_contract"]
    line = selfcheck.check(op, "triton", None, interpret=True)
    assert (line.status, line.dtypes) == ("pass", ["float32", "float16"])
    assert line.checks == 2 * selfcheck.INTERPRETED_CASES
    assert "--interpret" in (selfcheck.check(op, "triton", 1, interpret=False).remedy or "")


def test_a_selection_reaches_both_ends_of_the_list() -> None:
    assert selfcheck.spread(range(10), 4) == [0, 3, 6, 9]
    assert selfcheck.spread(range(3), 8) == [0, 1, 2]
