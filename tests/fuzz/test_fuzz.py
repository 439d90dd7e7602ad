"""A share of the fuzzer in every run of the suite, and that the fuzzer itself judges by the rule.

``make fuzz CALLS=N SEED=S`` runs as many calls as one likes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_kernels._runtime import device, philox
from petal_kernels.tools import parity
from tests.emulation import build
from tests.fuzz import formulas, masks, worker
from tests.fuzz.__main__ import ROOT, Run, Totals, Worker, parse, reproduction
from tests.fuzz.case import Arena
from tests.fuzz.check import OPERATORS, draw
from tests.fuzz.judge import Judge, Results, flatten
from tests.fuzz.worker import Place
from tests.ops import folders

SEED = 0
CALLS = 2000  # on the torch and native backends, two to a case


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a worker: one thread, fresh memory reads NaN."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with parity.poisoned():
        yield
    torch.set_num_threads(before)


def run(operator: str, profile: str, first: int, count: int) -> dict[str, Any]:
    """Check cases; fails with a script for each that is wrong."""
    found = worker.run_chunk(operator, SEED, first, count, profile)
    shown = []
    for failure in found["failures"][:5]:
        script = reproduction(profile, operator, SEED, failure["index"])
        shown.append("\n".join([*failure["faults"], f"python - <<'E'\n{script}\nE"]))
    assert not shown, f"{len(found['failures'])} failures\n" + "\n\n".join(shown)
    return found


def test_every_operator_is_drawn_and_has_a_formula() -> None:
    assert list(OPERATORS) == list(formulas.FORMULAS) == folders.names()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_and_native(operator: str, half: int, one_thread: None) -> None:
    count = CALLS // len(OPERATORS) // 2 // 2
    calls = run(operator, "cpu", half * count, count)["calls"]
    assert calls["torch"] >= 0.95 * count
    if device.cpu_library_reason() is None:
        assert calls["native"] > 0.8 * count  # all but fp64


@pytest.mark.skipif(
    device.triton_reason() is not None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton(operator: str, one_thread: None) -> None:
    run(operator, "triton", 0, 6)


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_emulated_cuda(tmp_path: Path) -> None:
    """In a process of its own: the emulated kernels take the torch backend's place there."""
    path = tmp_path / "place"
    path.write_bytes(bytes(8))
    common = {"seed": SEED, "first": 0, "count": 30, "profile": "cuda"}
    chunks = "".join(json.dumps(common | {"operator": name}) + "\n" for name in OPERATORS)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.worker", "cuda", str(path)],
        input=chunks, capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()[1:]]
    assert [f["failures"] for f in found] == [[]] * len(OPERATORS)
    assert sum(f["calls"]["torch"] for f in found) == 30 * len(OPERATORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 3.0])
def test_the_rule_is_the_suite_s(dtype: torch.dtype, share: float) -> None:
    """``judge.py`` finds by one pass over all results what ``parity.compare`` finds for each."""
    g = torch.Generator().manual_seed(0)
    shapes = [(40, 3), (2,), (0, 5), (1,), (17, 9)]
    exact = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    step = torch.finfo(dtype).eps
    plain = [(e * (1 + step * torch.randn(e.shape, generator=g))).to(dtype) for e in exact]
    got = [
        (e * (1 + 2 * share * step * torch.randn(e.shape, generator=g))).to(dtype) for e in exact
    ]
    labels = [f"r{i}" for i in range(5)]
    layout = Results(labels, [e.shape for e in exact], [dtype] * 5, 3)
    faults = Judge(layout, flatten(exact), flatten(plain)).faults(flatten(got))
    factors = [parity.OUTPUT_FACTOR] * 3 + [parity.GRADIENT_FACTOR] * 2
    wanted = {
        label
        for label, a, e, p, f in zip(labels, got, exact, plain, factors, strict=True)
        if parity.compare(label, a, e, p, f)[1]
    }
    assert {fault.split(":")[0] for fault in faults} == wanted
    assert bool(wanted) == (share > 1)


def test_masks_are_the_package_s() -> None:
    """Two descriptions of one generator: numpy here, torch there."""
    rng = (0x1234_5678_9ABC_DEF0, 0xFFFF_FFFE)
    own = masks.kept(rng, 0.3, 3, 7, 21)
    assert torch.equal(own, philox.keep_masks(torch.tensor(rng), 0.3, 3, 7, 21))
    assert masks.multiplier(0.3) == torch.tensor(philox.keep_scale(0.3)).item()


# Operators that the recorded run does not know yet; the next one does.
ADDED_SINCE = {"frozen_norm", "gated_mlp"}


def test_the_recorded_run_is_whole_and_found_nothing() -> None:
    """What README and CHANGELOG lean on: a run of this very fuzzer, by operator and backend."""
    (path,) = (ROOT / "benchmarks" / "results").glob("*-fuzz.json")
    record = json.loads(path.read_text())
    assert record["complete"]
    assert record["failure_count"] == len(record["failures"]) == 0
    counts = record["calls_by_operator"]
    assert set(counts) | ADDED_SINCE == set(OPERATORS)
    backends = {"torch", "native", "triton (interpreted)", "cuda (emulated)"}
    assert all(set(calls) == backends for calls in counts.values())
    assert sum(sum(calls.values()) for calls in counts.values()) == record["calls"] >= 1_000_000


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_case_is_fixed_by_seed_and_index(operator: str) -> None:
    one, two = (draw(operator, 3, 11) for _ in range(2))
    assert repr(one) == repr(two)
    assert repr(one) != repr(draw(operator, 3, 12))
    same = zip(Arena.of(one).buffers.values(), Arena.of(two).buffers.values(), strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in same)


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_with_its_case_and_the_run_goes_on() -> None:
    options = parse(["--calls", "300", "--jobs", "1", "--operators", "mode_contract"])
    options.begin, options.spent = time.monotonic(), 0.0
    totals = Totals()
    killed: list[Worker] = []
    run = Run("cpu", options, totals)
    give = Worker.give

    def give_and_kill(worker: Worker, chunk: dict[str, Any]) -> None:
        give(worker, chunk)
        if not killed:
            while Place.read(worker.path) < 5:
                time.sleep(0.001)
            worker.process.kill()
            killed.append(worker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "give", give_and_kill)
        run.run()
    (failure,) = totals.failures
    assert "crash" in failure["faults"][0]
    assert failure["index"] >= 5
    assert totals.total > 250
    done = sum(totals.cases.values())
    assert done == totals.next["mode_contract cpu"] - 1  # every case but the one that ended it
