"""The command `petal-kernels bench`: what is refused and why, what is kept, how a run ends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_kernels.ops.gated_bottleneck import native_impl, torch_impl
from petal_kernels.tools import environment, exits
from petal_kernels.tools.bench import app, arguments, ceilings, op, timing
from petal_kernels.tools.bench.request import Request, RequestError
from petal_kernels.tools.bench.results import Row, Table

QUICK = ["--quick", "--no-gate", "--rounds", "4", "--threads", "1", "--mode", "train"]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> object:
    """One here; the command sets torch's thread count for good. The roof is far away: measured in
    a bad moment of a busy machine it would make rows suspect."""
    monkeypatch.setattr(ceilings, "measure", lambda *_: ceilings.Ceilings(1e6, 1e9))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_wrong_kernel_gets_no_speedup_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (native_impl, torch_impl):
        forward = module.forward

        def wrong(*args: Any, forward: Callable[..., Any] = forward) -> Any:
            out, *rest = forward(*args)
            return (out * 1.001, *rest)

        monkeypatch.setattr(module, "forward", wrong)
    words = ["op", "gated_bottleneck", *QUICK, "--shape", "large N=6400", "--against", "eager"]
    assert app.main(words) == 2
    said = capsys.readouterr()
    rows = [line for line in said.out.splitlines() if line.startswith("  petal")]
    assert rows
    assert all("WRONG" in row for row in rows)
    assert "petal native computes something else, error ratio" in said.err


def test_a_row_is_reproduced_by_its_command() -> None:
    """The command of a row asks for that row: the shape, the mode, the provider, nothing else."""
    request = Request(quick=True, modes=("full",), rounds=6, threads=1, sweep="rank", values=(4,))
    scenario = next(iter(op.scenarios(["gated_bottleneck"], request)))()
    for label, provider in scenario.providers.items():
        command = request.reproduce(scenario.arguments, label, provider.ours, "full")
        words = shlex.split(command)
        assert words[:2] == ["petal-kernels", "bench"]
        args = arguments.parser("x", "").parse_args(words[2:])
        again = arguments.request(args)
        (make,) = op.scenarios(args.names, again)
        found = make()
        assert found.name == scenario.name
        assert label in found.providers
        assert (again.modes, again.rounds, again.threads) == (("full",), 6, 1)
        assert provider.ours or {k for k, p in found.providers.items() if not p.ours} == {
            "published",
            label,
        }


def test_where_results_go_is_no_part_of_the_command() -> None:
    words = ["op", "--json", "a.json", "--quick", "--html", "--csv=b", "--rounds", "4"]
    assert arguments.command("p bench", words) == "p bench op --quick --rounds 4"


def test_a_backend_that_cannot_run_is_refused_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(["op", "mode_contract", *QUICK, "--backend", "cuda"])
    assert stopped.value.code == 2
    assert "backend 'cuda' cannot run: needs tensors on cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["op", "mode_contract", "--sweep", "tokens"], "has no axis 'tokens', want one of rank"),
        (["op", "mode_contract", "--shape", "nonsense"], "want a part of a shape's name"),
        (["op", "--rounds", "2"], "rounds: want at least 4, got 2"),
        (["layer", "gated_adapter", "--backend", "cuda"], "cannot run here: needs tensors on cuda"),
        (["op", "--against", "magic"], "want some of published, eager"),
        (["overhead", "mode_contract"], "names: want none"),
        (["overhead", "--html"], "overhead: has no --html"),
        (["op", "--html", "mode_contract"], "--html: want a file, got the name mode_contract"),
        (["op", "--threads", "0"], "--threads: want a number >= 1, got 0"),
        (["op", "--device", "mps"], "want cpu or cuda[:N], got mps"),
        (["op", "--device", "cuda:99"], "no CUDA device 99 here"),
        (["op", "--sweep", "rank", "--values", "8,-1"], "want a number >= 1, got -1"),
        (["op", "--values", "8"], "values: want --sweep"),
        (["op", "--fail-below", "0"], "--fail-below: want a number > 0, got 0"),
        (["op", "--fail-below", "nan"], "--fail-below: want a number > 0, got nan"),
        (["op", "--size", "small"], "op: has no --size"),
        (["plans", "--fail-below", "1"], "plans: has no --fail-below"),
        (["op", "mode_contract", "nonsense"], "names: want some of"),
    ],
)
def test_a_mistake_is_named(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main([*QUICK, *words])
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Any, monkeypatch: Any) -> None:
    measured: list[Any] = []

    def measure(scenario: Any, *_: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(scenario)
        time = timing.Timing(1.0, 1.0, 1.0, 0.0, 4)
        return [Table("s", "full", {"published": Row(time, speedup=1.0)}, 0.05)]

    monkeypatch.setattr(app, "measure", measure)
    out = tmp_path / "r.json"
    assert app.main(["op", "mode_contract", *QUICK, "--json", str(out)]) == 130
    assert len(json.loads(out.read_text())["results"]) == 1


def test_a_refusal_in_the_middle_keeps_what_it_has(tmp_path: Any, monkeypatch: Any) -> None:
    refusals = iter(([], ["too wide"]))

    def backends(*_: Any) -> Any:
        if next(refusals):
            raise RequestError("backend 'native' cannot run: too wide")
        return ["torch"], "torch"

    monkeypatch.setattr(op, "backends", backends)
    out = tmp_path / "r.json"
    words = ["op", "mode_contract", *QUICK, "--against", "published", "--json", str(out)]
    assert app.main(words) == 2
    assert len(json.loads(out.read_text())["results"]) == 1


def test_a_named_default_that_cannot_run_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, reason in (("cuda", "cannot run here: needs tensors on cuda"), ("x", "want one of")):
        monkeypatch.setenv("PETAL_BACKEND", name)
        with pytest.raises(SystemExit) as stopped:
            app.main(["layer", "lora_linear", *QUICK])
        assert stopped.value.code == 2
        assert reason in capsys.readouterr().err


def test_a_threshold_sets_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["op", "mode_contract", *QUICK, "--shape", "image tucker", "--against", "published"]
    assert app.main([*words, "--fail-below", "0.001"]) == 0
    assert app.main([*words, "--fail-below", "1000"]) == 1
    assert "< 1000.0x" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["op", "mode_contract", "--threads", "1"],
        ["op", "--threads", "1", "mode_contract"],
        ["--threads", "1", "op", "mode_contract"],
        ["--threads", "1", "op", "--rounds", "5", "mode_contract", "--no-gate"],
    ],
)
def test_names_may_stand_before_options_or_after(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: one order of words refused in one place and taken in another."""
    seen: list[Any] = []
    monkeypatch.setattr(app, "_compare", lambda args, *_: seen.append(args))
    assert app.main([*QUICK, *words]) == 0
    assert (seen[0].what, seen[0].names, seen[0].threads) == ("op", ["mode_contract"], 1)


@pytest.mark.parametrize("suffix", ["json", "csv", "html"])
def test_where_results_go_is_looked_at_before_measuring(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: everything measured, and then nowhere to write it."""
    monkeypatch.setattr(app, "_gate", lambda *_: pytest.fail("began its work"))
    file = tmp_path / "file"
    file.write_text("kept")
    for path, why in ((tmp_path, "it is a folder"), (file / "x", "Not a directory|File exists")):
        with pytest.raises(exits.Refusal, match=why):
            app.main(["op", "mode_contract", f"--{suffix}", str(path)])
    assert file.read_text() == "kept"
    with pytest.raises(exits.Refusal, match=f"--{suffix}: want two files|want two files"):
        app.main(["op", "--json", str(tmp_path / "x"), "--csv", str(tmp_path / "." / "x")])
    if suffix == "json":
        with pytest.raises(exits.Refusal, match="it is a folder"):
            app.main(["overhead", "--json", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "axis"),
    [(["op"], "batch"), (["op"], "tokens"), (["layer"], "batch"), (["model"], "rank")],
)
def test_a_sweep_leaves_out_the_shapes_without_its_axis(
    words: list[str], axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: one shape of many that refuses for all. What is left out is said."""
    found: list[Any] = []
    monkeypatch.setattr(
        app, "_compare", lambda _a, makers, _n, _r, rep: found.extend((makers, rep))
    )
    assert app.main([*words, *QUICK, "--sweep", axis, "--values", "2"]) == 0
    makers, report = found
    assert makers
    known = {s.name for name in op.names() for s in op.operator(name).workload.SHAPES}
    if words == ["op"]:
        lost = {n for n in report.absent if n in known}
        assert lost
        assert all(f"has no axis '{axis}'" in report.absent[n] for n in lost)
        assert any("gated" in m.args[0] for m in makers)


def test_plans_that_are_interrupted_keep_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(_: Any) -> Any:
        yield {"scenario": "p", "drift": 0.0, "milliseconds": {"a": 1.0}}
        raise KeyboardInterrupt

    for what in ("plans", "overhead"):
        monkeypatch.setattr(getattr(app, what), "bench", bench)
        out = tmp_path / f"{what}.json"
        words = [what, "--no-gate", "--rounds", "4", "--threads", "1", "--json", str(out)]
        assert app.main(words) == 130
        document = json.loads(out.read_text())
        assert document["partial"] == "interrupted"
        assert [r["scenario"] for r in document["results"]] == ["p"]


def test_results_carry_a_time_and_the_gpu_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a machine described by what happens to be first on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: f"GPU of {d}")
    assert environment.describe(1)["gpu"] == "GPU of None"  # the current one
    assert environment.describe(1, torch.device("cuda:1"))["gpu"] == "GPU of cuda:1"
    assert environment.describe(1, "cuda:2")["gpu"] == "GPU of cuda:2"
    assert environment.describe(1, "cpu")["gpu"] == "GPU of None"
    when = datetime.fromisoformat(environment.describe(1)["date"])
    assert when.tzinfo is not None
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60


def test_the_device_of_a_run_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []

    def describe(_: Any, on: Any) -> dict[str, Any]:
        chosen.append(on)
        return {}

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(app, "_compare", lambda *_: None)
    monkeypatch.setattr(environment, "describe", describe)
    assert app.main(["op", "mode_contract", *QUICK, "--device", "cuda:1"]) == 0
    assert chosen == [torch.device("cuda:1")] * 2
