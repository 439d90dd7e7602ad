"""The GPU suite without a GPU: its rehearsal survives a kill, its workers a crash, and it stops
where nothing can run."""

from __future__ import annotations

import dataclasses
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

from benchmarks.gpu import command
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.stages import STAGES, preflight
from benchmarks.gpu.suite import Suite, in_turn
from petal_kernels.tools import environment, operators, parity

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


@pytest.mark.slow
def test_a_rehearsal_survives_a_kill(tmp_path: Path) -> None:
    """Killed in the middle, the suite loses the running case alone; the rest of it passes, in
    another folder that got the results so far."""
    words = ["-m", "benchmarks.gpu", "--dry-run", "--minutes", "3"]
    words += ["--commit", "abc1234", "--out"]
    begun, out = tmp_path / "begun", tmp_path / "out"
    journal = begun / "results.jsonl"
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    start: dict[str, Any] = {
        "cwd": environment.ROOT,
        "env": variables,
        "stdout": subprocess.DEVNULL,
    }
    first = subprocess.Popen([sys.executable, *words, str(begun)], **start)
    until(lambda: first.poll() is not None or len(lines(journal)) >= 20)
    (worker,) = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: ended(worker), 20.0)
    before = lines(journal)
    assert 20 <= len(before) < 100
    out.mkdir()
    journal = journal.rename(out / "results.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"id": "torn')  # what a kill in the middle of a write leaves
    done = subprocess.run(
        [sys.executable, *words, str(out)],
        cwd=environment.ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = lines(journal)
    assert after[: len(before)] == before, "a finished case ran again"
    twice = [k for k, n in Counter(r["id"] for r in after).items() if n > 1]
    assert all(k.startswith("preflight/") for k in twice)  # another machine, perhaps
    assert {r["status"] for r in after} <= {"pass", "skip"}
    assert {r["commit"] for r in after} == {"abc1234"}
    expected = {c["id"] for name in STAGES for c in STAGES[name].cases(DRY, Journal(journal))}
    assert {r["id"] for r in after} == expected
    ran = {r["stage"] for r in after if r["status"] == "pass"}
    assert ran >= set(STAGES) - {"compiles"}
    text = (out / "summary.md").read_text()
    assert "abc1234" in text
    assert "What did not pass" not in text
    document = json.loads((out / "bench-float32.json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["commit"] == "abc1234"
    assert document["results"]
    assert len(list(out.iterdir())) <= 8


STAGE = """
import os, subprocess, sys, time
def run(case, settings):
    print("noise on stdout")
    do = case["do"]
    if do == "die":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if do == "hang":
        child = subprocess.Popen(["sleep", "60"])
        open(settings["pid"], "w").write(str(child.pid))
        time.sleep(60)
    if do == "spoil":
        return {"pid": os.getpid(), "status": "fail", "spoilt": True}
    if do == "raise":
        raise ValueError("wrong " + settings["word"])
    return {"pid": os.getpid(), "status": do}
"""


def test_a_crash_or_a_hang_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_in.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found: dict[int, dict[str, Any]] = {}
    cases = [
        {"n": n, "do": do}
        for n, do in enumerate(("pass", "die", "pass", "hang", "raise", "fail", "spoil", "pass"))
    ]
    pool = Pool("stand_in", {"word": "word", "pid": str(tmp_path / "pid")}, {}, 2)
    limits = iter((30.0, 30.0, 30.0, 1.0, *[30.0] * 5))
    pool.run(cases, 1, lambda: next(limits), lambda c, result: found.update({c["n"]: result}))
    assert [found[n]["status"] for n in range(8)] == [
        "pass", "crash", "pass", "timeout", "error", "fail", "fail", "pass",
    ]  # fmt: skip
    until(lambda: ended(int((tmp_path / "pid").read_text())), 5.0)
    assert "last words" in found[1]["error"]
    assert "exit code -9" in found[1]["error"]
    assert "wrong word" in found[4]["error"]
    assert found[0]["pid"] != found[2]["pid"], "the process that died went on"
    assert found[5]["pid"] == found[6]["pid"] != found[7]["pid"], "the spoilt process went on"
    begun: list[int] = []
    pool.run(cases[:1] * 4, 2, lambda: 30.0, lambda case, result: begun.append(result["pid"]))
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
    with pytest.raises(SystemExit) as stopped:
        command.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--dry-run rehearses" in capsys.readouterr().err


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


def test_a_run_on_a_machine_that_can_run_nothing_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library that does not load must not look like a backend that declines."""
    reason = "the compiled CUDA kernels are not here"
    monkeypatch.setattr(parity, "refusal", lambda *_: reason)
    monkeypatch.setattr(Suite, "device", "cpu")
    found = preflight.run({"kind": "cuda"}, REAL)
    assert found == {"status": "fail", "faults": [reason]}

    def pretend(pool: Pool, cases: Any, width: int, limit: Any, done: Any) -> None:
        for case in cases:
            done(case, {"status": "fail", "faults": [reason]})

    monkeypatch.setattr(Pool, "run", pretend)
    words = ["--dry-run", "--minutes", "1", "--only", "headline", "--out", str(tmp_path)]
    for _ in range(2):  # and again in a later run
        assert command.main(words) == 1
        said = capsys.readouterr().out
        assert reason in said
        assert "stopped" in said
    assert {r["stage"] for r in lines(tmp_path / "results.jsonl")} == {"preflight"}


def test_the_gpu_suite_ends_by_the_table(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for words, why in (
        (["--out", str(file)], "it is a file"),
        (["--out", str(tmp_path), "--minutes", "nan"], "want minutes >= 0, got nan"),
        (["--out", str(tmp_path), "--workers", "0"], "want a number >= 1, got 0"),
    ):
        command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert why in run.stderr.splitlines()[-1]


def test_operators_come_in_turn() -> None:
    assert in_turn([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]


def test_stages_say_what_they_are() -> None:
    assert sum(stage.SHARE for stage in STAGES.values()) > 0
    for name, stage in STAGES.items():
        assert stage.__name__.endswith(f".{name}")  # type: ignore[attr-defined]
        assert stage.report([]) is not None
        for case in stage.cases(DRY, Journal(Path("/nonexistent/none")))[:1]:
            died = case | {"stage": name, "status": "crash", "error": "the process died"}
            assert all(isinstance(line, str) for line in stage.report([died]))
    assert dataclasses.asdict(DRY) == {"dry": True}
