"""The GPU suite's stages without a GPU: their checks see what they are for, and tuning writes what
the launch tables read."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import summary, tables
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.stages import (
    candidates,
    capture,
    compiles,
    correctness,
    headline,
    large,
    plans,
    rows,
    sanitizer,
    tuning,
)
from benchmarks.gpu.stopwatch import Stopwatch
from benchmarks.gpu.suite import Suite
from petal_kernels.tools import parity

DRY, REAL = Suite(dry=True), Suite(dry=False)


def test_what_tells_most_for_its_time_comes_first() -> None:
    cases = correctness.cases(REAL, Journal(Path("/nonexistent/none")))
    turns = [(c["backend"], c["planned"], c["dtype"]) for c in cases]
    first = {turn: turns.index(turn) for turn in turns}
    order = sorted(first, key=first.__getitem__)
    assert {backend for backend, *_ in order[:6]} == {"cuda"}, "needs no compiler"
    assert order[6:9] == [("triton", True, d) for d in ("bfloat16", "float32", "float16")]
    assert order[9] == ("triton", False, "bfloat16")
    assert order[-1] == ("triton", False, "float16")


class Event:
    """Of a device that is at once where the host is."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def test_the_device_is_kept_busy_for_as_long_as_the_host_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    watch = Stopwatch("cpu")
    watch.cuda = True
    for _ in range(7):
        watch.queue()
        assert watch.call(lambda: None)() == 1.0
    assert waits[1] == 2 * waits[0]
    assert waits[-1] == waits[-2] == 16 * waits[0]


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
    case: dict[str, Any] = next(c for c in found if c["op"] == op and kind in (None, c.get("kind")))
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


def test_a_step_that_cannot_be_captured_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed capture leaves torch's generator capturing: no later case may meet it."""

    def refuse(error: Exception) -> dict[str, Any]:
        def captured(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(capture, "_captured", captured)
        return capture.run(one(capture, kind="graph"), DRY)

    found = refuse(capture.CaptureError("operation not permitted when stream is capturing"))
    assert (found["status"], found["spoilt"]) == ("fail", True)
    found = refuse(RuntimeError("called a synchronizing CUDA operation"))
    assert (found["status"], "spoilt" in found) == ("fail", False)
    with pytest.raises(RuntimeError, match="another"):
        refuse(RuntimeError("another"))


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


def test_a_row_is_tuned_once_all_its_candidates_are_tried(tmp_path: Path) -> None:
    row = {"op": "gated_bottleneck", "kernel": "fwd", "arch": 90, "size": "large"}
    row |= {"shape": "s", "dtype": "bfloat16", "changes": {}}
    row |= {"tile": {"warps": 4, "stages": 2, "blocks": {"BLOCK_M": 16}}}
    journal = Journal(tmp_path / "results.jsonl")
    of = {"stage": "rows", "status": "pass", "op": row["op"]}
    journal.add(of | {"id": "rows/gated_bottleneck", "rows": [row]})
    tried = candidates.cases(REAL, journal)
    assert len(tried) > 2
    for case in tried:
        assert tuning.cases(REAL, journal) == []
        journal.add(case | {"stage": "candidates", "status": "pass"})
    (case,) = tuning.cases(REAL, journal)
    assert case["tiles"] == [row["tile"], *(c["candidate"] for c in tried)]


def test_what_torch_compile_could_not_do_is_not_waited_for_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    case = headline.cases(REAL, journal)[0]
    assert headline._against(case, REAL) == ()
    assert compiles.cases(REAL, journal)
    compiled = case["id"].replace("headline", "compiles", 1)
    journal.add({"id": compiled, "stage": "compiles", "status": "timeout"})
    case = headline.cases(REAL, journal)[0]
    baselines = headline._against(case, REAL)
    assert "eager" in baselines
    assert "compile" not in baselines
    journal.add({"id": "preflight/torch.compile", "stage": "preflight", "status": "error"})
    assert all(c["uncompiled"] for c in headline.cases(REAL, journal))
    assert compiles.cases(REAL, journal) == []


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at {}+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f0000000000 is out of bounds
ran a bfloat16
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("code", "text", "ran", "status"),
    [
        (0, "ran a\n========= ERROR SUMMARY: 0 errors", 1, "pass"),
        (0, "ran a\n========= RACECHECK SUMMARY: 0 hazards displayed", 1, "pass"),
        (0, "========= ERROR SUMMARY: 0 errors", 0, "skip"),
        (0, "ran a", 1, "skip"),
        (0, "========= Error: Target application terminated before first instrumented API call\n"
            "========= ERROR SUMMARY: 0 errors", 1, "skip"),
        (1, "========= Error: Unable to attach", 0, "skip"),
        (1, "Traceback (most recent call last)", 0, "error"),
        (99, MEMCHECK.format("void petal::expand_kernel<float>(Params)"), 1, "fail"),
        (99, MEMCHECK.format("_lowrank_linear_shrink_kernel"), 1, "fail"),
        (99, MEMCHECK.format("void at::native::reduce_kernel<512>(Op)"), 1, "skip"),
        (99, "========= ERROR SUMMARY: 1 error", 1, "fail"),
    ],
)  # fmt: skip
def test_the_sanitizer_is_believed_where_it_attached(
    code: int, text: str, ran: int, status: str
) -> None:
    found = sanitizer.verdict({"op": "lowrank_linear"}, code, text, ran)
    assert found.get("status", "pass") == status
