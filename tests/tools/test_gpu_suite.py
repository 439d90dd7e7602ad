"""The GPU suite without a GPU: its rehearsal survives a kill, its workers a crash, and its checks
see what they are for."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_kernels.tools import environment, operators, parity
from petal_kernels.tools.gpu import command, summary, tables
from petal_kernels.tools.gpu.clock import Clock
from petal_kernels.tools.gpu.journal import Journal
from petal_kernels.tools.gpu.pool import Pool
from petal_kernels.tools.gpu.stages import (
    STAGES,
    candidates,
    capture,
    correctness,
    large,
    plans,
    rows,
    tuning,
)
from petal_kernels.tools.gpu.suite import Suite, in_turn

DRY, REAL = Suite(dry=True), Suite(dry=False)


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a journal that is being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(p) for task in tasks for p in (task / "children").read_text().split()]


def ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_rehearsal_survives_a_kill(tmp_path: Path) -> None:
    """Killed in the middle, the suite loses the running case alone; the rest of it passes."""
    words = ["-m", "petal_kernels.tools.gpu", "--dry-run", "--minutes", "3", "--out", str(tmp_path)]
    words += ["--commit", "abc1234"]
    journal = tmp_path / "results.jsonl"
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    start = {"cwd": environment.ROOT, "env": variables, "stdout": subprocess.DEVNULL}
    first = subprocess.Popen([sys.executable, *words], **start)
    until(lambda: first.poll() is not None or len(lines(journal)) >= 20)
    (worker,) = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: ended(worker), 20.0)
    before = lines(journal)
    assert 20 <= len(before) < 100
    with journal.open("ab") as file:
        file.write(b'{"id": "torn')  # what a kill in the middle of a write leaves
    done = subprocess.run(
        [sys.executable, *words],
        cwd=environment.ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = lines(journal)
    assert after[: len(before)] == before, "a finished case ran again"
    assert max(Counter(r["id"] for r in after).values()) == 1
    assert {r["status"] for r in after} <= {"pass", "skip"}
    assert {r["commit"] for r in after} == {"abc1234"}
    expected = {c["id"] for name in STAGES for c in STAGES[name].cases(DRY, Journal(journal))}
    assert {r["id"] for r in after} == expected
    ran = {r["stage"] for r in after if r["status"] == "pass"}
    assert ran >= set(STAGES) - {"compiles"}
    text = (tmp_path / "summary.md").read_text()
    assert "abc1234" in text
    assert "What did not pass" not in text
    document = json.loads((tmp_path / "bench-float32.json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["commit"] == "abc1234"
    assert document["results"]
    assert len(list(tmp_path.iterdir())) <= 8


STAGE = """
import os, sys, time
def run(case, settings):
    print("noise on stdout")
    do = case["do"]
    if do == "die":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if do == "hang":
        time.sleep(60)
    if do == "raise":
        raise ValueError("wrong " + settings["word"])
    return {"pid": os.getpid(), "status": do}
"""


def test_a_crash_or_a_hang_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_in.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found: dict[int, dict[str, Any]] = {}
    cases = [
        {"n": n, "do": do} for n, do in enumerate(("pass", "die", "pass", "hang", "raise", "fail"))
    ]
    pool = Pool("stand_in", {"word": "word"}, {}, 2)
    pool.run(cases, 1, lambda: 1.0, lambda case, result: found.update({case["n"]: result}))
    assert [found[n]["status"] for n in range(6)] == [
        "pass", "crash", "pass", "timeout", "error", "fail",
    ]  # fmt: skip
    assert "last words" in found[1]["error"]
    assert "exit code -9" in found[1]["error"]
    assert "wrong word" in found[4]["error"]
    assert found[0]["pid"] != found[2]["pid"], "the process that died went on"
    begun: list[int] = []
    pool.run(cases[:1] * 4, 2, lambda: 5.0, lambda case, result: begun.append(result["pid"]))
    assert len(begun) == 4
    pool.run(cases[:1], 2, lambda: 0.0, lambda case, result: begun.append(0))
    assert len(begun) == 4, "a case began after the end"
    pool.stop()
    assert all(ended(pid) for pid in begun)


def test_a_journal_cuts_a_torn_line_and_keeps_the_last_of_an_id(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    journal.add({"id": "a", "stage": "s", "status": "fail"})
    journal.add({"id": "a", "stage": "s", "status": "pass"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "b", "sta')
    again = Journal(path)
    assert [r["status"] for r in again] == ["pass"]
    assert "b" not in again
    assert path.read_bytes() == whole


def test_time_is_shared_and_unused_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(60.0)
    assert clock.part(1.0, 3.0) == 120.0
    now[0] = 110.0  # a third was not used up
    assert clock.part(1.0, 2.0) == 135.0
    assert clock.show() == " 0:10/ 1:00"
    now[0] = 170.0
    assert clock.part(1.0, 1.0) == 170.0


def test_no_time_means_no_case_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry-run", "--minutes", "0", "--out", str(tmp_path), "--stages", "ceilings"]
    assert command.main(words) == 0
    assert "0 results, 0 failed checks, 5 cases not reached" in capsys.readouterr().out
    assert "| ceilings | 0 | 0 | 0 | 0 | 0 | 0 | 5 |" in (tmp_path / "summary.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_a_real_run_plans_every_operator_and_backend(tmp_path: Path) -> None:
    """What a GPU would be asked, written down without one."""
    cases = [c for stage in STAGES.values() for c in stage.cases(REAL, Journal(tmp_path / "none"))]
    assert max(Counter(c["id"] for c in cases).values()) == 1
    json.dumps(cases)
    for case in cases:
        if "shape" in case:
            REAL.shape(case)  # raises where a name or a change is unknown
    checked = {(c["op"], c["backend"], c["dtype"]) for c in cases if c["id"][:4] == "corr"}
    for op in operators.operators():
        for backend in ("cuda", "triton", "torch"):
            for dtype in ("bfloat16", "float16", "float32"):
                assert (op.name, backend, dtype) in checked
        every = {c["shape"] for c in cases if c["id"].startswith(f"correctness/{op.name}/cuda")}
        assert every == {c.name for c in (*op.workload.SHAPES, *op.workload.CASES)}


def broken(monkeypatch: pytest.MonkeyPatch, change: Any, op: str = "lowrank_linear") -> None:
    """Let ``change`` have the outputs of the torch backend."""
    impl = importlib.import_module(f"petal_kernels.ops.{op}.torch_impl")
    true = impl.forward

    def forward(*args: Any) -> Any:
        ys, saved = true(*args)
        return [change(y) for y in ys], saved

    monkeypatch.setattr(impl, "forward", forward)


def one(stage: Any, *, kind: str | None = None, op: str = "lowrank_linear") -> dict[str, Any]:
    """The first rehearsal case of a stage for an operator, on the torch backend."""
    found = stage.cases(DRY, Journal(Path("/nonexistent/none")))
    case = next(c for c in found if c["op"] == op and kind in (None, c.get("kind")))
    return case | {"backend": "torch"}


def test_checks_pass_on_what_is_right() -> None:
    for case, stage in (
        (one(correctness), correctness),
        (one(large, kind="long"), large),
        (one(large, kind="spread"), large),
        (one(capture, kind="graph"), capture),
    ):
        assert stage.run(case, DRY).get("status", "pass") == "pass"


def test_correctness_sees_a_wrong_element(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y.view(-1)[-1] += 0.1
        return y

    broken(monkeypatch, change)
    found = correctness.run(one(correctness), DRY)
    assert found["status"] == "fail"
    assert found["ratio"] > 1.0
    assert "output" in found["faults"][0]


def test_large_sees_a_period_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = one(large, kind="long")
    period = 16

    def change(y: torch.Tensor) -> torch.Tensor:
        return torch.cat((y[:-period], y[-period:] + 0.1)) if len(y) > period else y

    broken(monkeypatch, change)
    found = large.run(case, DRY)
    assert found["status"] == "fail"
    assert "period 2" in found["faults"][0]


def test_large_spreads_beyond_32_bits() -> None:
    t = torch.randn(3, 5)
    far = large.far_apart(t)
    assert torch.equal(far, t)
    assert far.stride(0) * 2 > 2**31


def test_capture_sees_a_replay_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    def change(y: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return y + calls[0]

    broken(monkeypatch, change)
    found = capture.run(one(capture, kind="graph"), DRY)
    assert found["status"] == "fail"
    assert "is not the eager step's" in found["faults"][0]


def test_the_planner_is_measured_against_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"update": 2.0, "extend": 1.0, "augment": 4.0}
    seen: list[str] = []

    def race(steps: dict[str, Any], *_: Any) -> dict[str, float]:
        seen.extend(steps)
        return {name: taken[name] for name in steps}

    monkeypatch.setattr(plans, "race", race)
    case = next(c for c in plans.cases(DRY, Journal(Path("/none"))) if c["op"] == "lowrank_linear")
    found = plans.run(case, DRY)
    assert "merge" not in seen
    assert found["behind"] == taken[found["chosen"]] / min(taken[s] for s in seen)


def test_operators_come_in_turn() -> None:
    assert in_turn([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]


def triton_row() -> tuple[Any, tables.Row]:
    pytest.importorskip("triton")
    return tables.configs(DRY.operator("gated_bottleneck")), tables.Row("fwd", 90, "large")


def test_neighbours_are_one_step_away() -> None:
    shipped = {"warps": 4, "stages": 1, "blocks": {"BLOCK_M": 16, "GROUP_M": 8}}
    near = tables.neighbours(shipped)
    assert shipped not in near
    assert {"warps": 8, "stages": 1, "blocks": shipped["blocks"]} in near
    assert {n["blocks"]["BLOCK_M"] for n in near} == {16, 32}
    assert {n["blocks"]["GROUP_M"] for n in near} == {4, 8, 16}
    assert {n["stages"] for n in near} == {1, 2}


def test_a_tile_is_used_and_given_back() -> None:
    from petal_kernels._runtime.triton_lib import Machine

    module, row = triton_row()
    shipped = tables.read(module, row)
    other = shipped | {"warps": 2}
    before = module.choose("fwd", Machine(90, 132), 8192, 2, 64, 0)
    with tables.using(module, row, other):
        assert tables.read(module, row) == other
        assert module.choose("fwd", Machine(90, 132), 8192, 2, 64, 0)["num_warps"] == 2
    assert tables.read(module, row) == shipped
    assert module.choose("fwd", Machine(90, 132), 8192, 2, 64, 0) == before


def test_the_rows_that_a_machine_reads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of capability 9.0, whose launches are left out."""
    from petal_kernels._runtime import triton_lib

    module, _ = triton_row()
    monkeypatch.setattr(triton_lib, "machine", lambda _: triton_lib.Machine(90, 132))
    table = dict(module.TABLE)
    found = rows.run({"op": "gated_bottleneck"}, DRY)["rows"]
    assert {(r["kernel"], r["arch"], r["size"]) for r in found} == {
        (kernel, 90, size)
        for kernel in ("fwd", "rows", "weights")
        for size in ("fp32", "fp32_gated")
    }
    for r in found:
        assert r["tile"] == tables.read(module, tables.Row(r["kernel"], 90, r["size"]))
    assert table == module.TABLE
    assert all(type(sizes) is dict for sizes in module.TABLE.values()), "still watched"


def winning(row: tables.Row, tile: dict[str, Any]) -> dict[str, Any]:
    facts = {"shipped_ms": 2.0, "best_ms": 1.0, "speedup": 2.0, "ms": {}, "best": tile}
    about = {"id": "tuning/x", "stage": "tuning", "status": "pass", "commit": "c"}
    return {**about, "op": "gated_bottleneck", **row._asdict(), **facts}


def test_what_tuning_writes_is_what_the_tables_read(tmp_path: Path) -> None:
    from petal_kernels._runtime import triton_tuned

    module, row = triton_row()
    best = tables.read(module, row) | {"stages": 4}
    journal = Journal(tmp_path / "results.jsonl")
    journal.add(winning(row, best))
    journal.add(winning(row, best) | {"id": "tuning/y", "size": "small", "speedup": 1.01})
    summary.write(tmp_path, journal, "c", "command", {})
    written = tmp_path / "tuned-gated_bottleneck.json"
    assert [r["size"] for r in json.loads(written.read_text())["rows"]] == ["large"]
    configs = tmp_path / "triton_configs.py"
    assert triton_tuned.overlay(module.TABLE, str(configs)) is module.TABLE
    written.rename(tmp_path / triton_tuned.FILE)
    table = triton_tuned.overlay(module.TABLE, str(configs))
    assert table["fwd", 90]["large"].stages == 4
    assert table["fwd", 90]["small"] == module.TABLE["fwd", 90]["small"]
    assert module.TABLE["fwd", 90]["large"].stages != 4
    for wrong in ({"size": "huge"}, {"arch": 75}, {"blocks": {"BLOCK_X": 16}}):
        rows = [{**row._asdict(), **best, **wrong}]
        (tmp_path / triton_tuned.FILE).write_text(json.dumps({"rows": rows}))
        with pytest.raises(ValueError, match="no such row"):
            triton_tuned.overlay(module.TABLE, str(configs))


def test_a_candidate_that_computes_something_else_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("rehearses in the interpreter")
    case = {
        "op": "gated_bottleneck", "kernel": "fwd", "arch": 0, "size": "interpreted",
        "shape": DRY.shapes(DRY.operator("gated_bottleneck"))[0].name, "dtype": "float32",
        "changes": {},
    }  # fmt: skip
    module = tables.configs(DRY.operator("gated_bottleneck"))
    case["candidate"] = tables.read(module, tables.Row("fwd", 0, "interpreted")) | {"stages": 2}
    assert candidates.run(case, DRY) == {}
    monkeypatch.setattr(parity, "error", lambda *_: 1e-3)
    assert "differs" in candidates.run(case, DRY)["reason"]
    assert tuning.winners([]) == {}


def test_stages_say_what_they_are() -> None:
    assert sum(stage.SHARE for stage in STAGES.values()) > 0
    for name, stage in STAGES.items():
        assert stage.__name__.endswith(f".{name}")  # type: ignore[attr-defined]
        assert stage.report([]) is not None
        for case in stage.cases(DRY, Journal(Path("/nonexistent/none")))[:1]:
            died = case | {"stage": name, "status": "crash", "error": "the process died"}
            assert all(isinstance(line, str) for line in stage.report([died]))
    assert dataclasses.asdict(DRY) == {"dry": True}
