"""The parts of the benchmark: what is checked, counted and timed, and how a run is judged."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.tools import environment
from petal_kernels.tools.bench import (
    console,
    correctness,
    counting,
    cuda_graphs,
    layer,
    op,
    timing,
)
from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.request import Request, swept
from petal_kernels.tools.bench.results import Row, Table
from petal_kernels.tools.bench.scenarios import Inputs, Provider, step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> object:
    """One here; the command sets torch's thread count for good."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, **options: Any) -> Any:
    """The first quick scenario of an operator."""
    return next(iter(op.scenarios([name], Request(quick=True, **options))))()


@pytest.mark.parametrize(
    ("got", "outputs", "gradients"),
    [("plain", 1.0, 1.0), ("doubled", 2.0, 2.0), ("nan", float("inf"), 1.0)],
)
def test_errors_are_ratios_to_plain_torch(got: str, outputs: float, gradients: float) -> None:
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(64, generator=g, dtype=torch.float64)
    noise = 1e-4 * torch.randn(64, generator=g, dtype=torch.float64)
    plain = (exact + noise).float()
    forms = {"plain": plain, "doubled": (exact + 2 * noise).float(), "nan": plain.clone()}
    forms["nan"][3] = float("nan")
    gradient = forms["plain" if got == "nan" else got]
    found = correctness.compare(([forms[got]], [gradient]), ([exact], [exact]), ([plain], [plain]))
    assert found.outputs == pytest.approx(outputs, rel=0.01)
    assert found.gradients == pytest.approx(gradients, rel=0.01)
    assert found.red == (got == "nan")


def test_a_missing_gradient_is_a_zero_one() -> None:
    exact = torch.ones(20, dtype=torch.float64)
    plain = torch.ones(20)
    assert correctness.compare(([], [None]), ([], [None]), ([], [None])).gradients == 0.0
    assert correctness.compare(([], [None]), ([], [exact]), ([], [plain])).wrong
    assert correctness.compare(([], [plain]), ([], [None]), ([], [None])).wrong


@pytest.mark.parametrize("name", op.names())
def test_every_provider_computes_the_operator(name: str) -> None:
    """Baselines of every operator are the same function as ours; one that is not is found."""
    scenario = build(name)
    assert {"published", "eager", "petal torch"} <= set(scenario.providers)
    for label, provider in scenario.providers.items():
        if not provider.floor:
            assert not provider.check().wrong, label
    published = scenario.providers["published"]
    lied = lambda **a: [1.01 * o for o in Provider(published.forward).outputs(Inputs(a))]  # noqa: E731
    oracle = op.Oracle(
        lambda: op.run(published.forward, scenario.inputs.given(dropout=0.0).map(Tensor.double)),
        lambda: op.run(published.forward, scenario.inputs.given(dropout=0.0)),
    )
    if "dropout" in scenario.inputs.arguments:
        dry = scenario.inputs.given(dropout=0.0)
        assert oracle(lambda _: op.run(lied, dry))().wrong


def test_red_tests_stop_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    done = SimpleNamespace(returncode=1, stdout="1 failed", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit) as stopped:
        correctness.tests(["mode_contract"])
    assert stopped.value.code == 2
    done.returncode = 0
    assert correctness.tests(["mode_contract"]) == "1 failed"
    monkeypatch.setattr(environment, "ROOT", tmp_path)  # an installed package
    assert correctness.tests(["mode_contract"]) is None


def test_launches_saved_and_peak_bytes_of_a_known_step() -> None:
    x, w = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
    size = x.nbytes

    def run() -> None:
        y = x @ w  # saves w, a parameter
        z = y.relu()  # saves z
        del y
        z.view(-1).sum()

    assert counting.saved_bytes(lambda: (x @ w).relu(), [w]) == size
    assert counting.launches(run, CPU) == 3  # not the view
    # y and z together, and what the sum needs to add up
    assert 2 * size <= counting.peak_bytes(run, CPU) <= 2 * size + 4096


def test_backward_is_timed_without_its_forward() -> None:
    order: list[str] = []

    def forward(x: Tensor) -> Tensor:
        order.append("forward")
        return x.square()

    x = torch.ones(4, requires_grad=True)
    inputs = Inputs({"x": x}, ("x",), [torch.ones(4)])
    timed = step(Provider(forward), "backward", inputs)
    given = timed.prepare()
    assert order == ["forward"]
    gradients: Any = timed.run(given)
    assert order == ["forward"]
    (gradient,) = gradients
    assert gradient.tolist() == [2.0] * 4
    assert not step(Provider(forward), "forward", inputs).run(None)[0].requires_grad  # type: ignore[index]


def test_a_step_of_many_calls_is_divided() -> None:
    pause = timing.Step(lambda _: time.sleep(0.02), calls=10)
    assert 0.002 <= timing.Clock(CPU)(pause) < 0.02


def test_long_rounds_are_fewer_but_four() -> None:
    assert timing.rounds_for(20, 0.1) == 20
    assert timing.rounds_for(20, timing.LONGEST / 10) == 10
    assert timing.rounds_for(20, timing.LONGEST) == 4


def test_drift_is_the_largest_difference_between_halves() -> None:
    rows = {"a": timing.summary([1.0, 1.0, 1.0, 1.0]), "b": timing.summary([1.0, 1.0, 1.1, 1.1])}
    assert timing.drift(rows) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="rounds: want at least 4"):
        timing.compare({}, CPU, rounds=2)


def test_the_roof_is_the_slower_of_traffic_and_flops() -> None:
    roof = Ceilings(gigabytes=10.0, gigaflops=100.0)
    assert roof.share(10**9, 10**9, milliseconds=200.0) == pytest.approx(0.5)  # 100 ms of traffic
    assert roof.share(10**6, 10**10, milliseconds=200.0) == pytest.approx(0.5)  # 100 ms of flops


@pytest.mark.parametrize(("nbytes", "count"), [(1, 180), (50, 4), (60, 3), (500, 1)])
def test_graphs_read_cold_inputs(nbytes: int, count: int) -> None:
    """Copies fill three times a cache of 60; a replay reads each equally often, in turn."""
    assert cuda_graphs.copies(nbytes, 60) == count
    order = cuda_graphs.rounds(count)
    assert len(order) >= cuda_graphs.LEAST_CALLS
    assert order[:count] == list(range(count))
    assert len({order.count(i) for i in range(count)}) == 1


@pytest.mark.parametrize("mode", ["forward", "train", "backward", "full"])
def test_every_call_of_a_graph_has_its_own_inputs(mode: str) -> None:
    seen: list[int] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.data_ptr())
        return x.square()

    x = torch.ones(4, requires_grad=True)
    inputs = Inputs({"x": x}, ("x",), [torch.ones(4)])
    own = [inputs.map(Tensor.clone) for _ in range(3)]
    calls = cuda_graphs._calls(Provider(forward), mode, own)
    assert len(seen) == (3 if mode == "backward" else 0)
    found = [call() for call in calls for _ in range(2)]  # a backward runs again on one forward
    assert len(set(seen)) == 3
    if mode in ("backward", "full"):
        assert all(gradient.tolist() == [2.0] * 4 for (gradient,) in found)


def test_sweeps_vary_one_size() -> None:
    (case,) = [c for c in op.operator("gated_bottleneck").workload.SHAPES if "small" in c.name]
    found = swept(case, Request(sweep="rank", values=(8, 16)))
    assert [(c.rank, c.lead, v) for c, v in found] == [(8, (50, 128), 8.0), (16, (50, 128), 16.0)]
    assert found[0][0].name == "vl-pet small N=6400 r=8"
    assert [c.lead for c, _ in swept(case, Request(sweep="batch", values=(3,)))] == [(3, 128)]
    assert [v for _, v in swept(case, Request(sweep="tokens"))] == [32.0, 64.0, 128.0, 256.0]
    (small,) = swept(case, Request(quick=True))
    assert small[0].rows <= 256
    contract = op.operator("mode_contract").workload.SHAPES[0]
    with pytest.raises(ValueError, match="has no axis 'tokens', want one of rank"):
        swept(contract, Request(sweep="tokens"))


@pytest.mark.parametrize("sweep", [None, "rank", "tokens"])
@pytest.mark.parametrize("quick", [False, True])
def test_no_two_scenarios_have_one_name(sweep: str | None, quick: bool) -> None:
    """Charts and result files know them by it."""
    request = Request(quick=quick, sweep=sweep)
    for name in op.names():
        if name != "mode_contract" or sweep != "tokens":
            found = [case.name for case, _, _ in op.cases(name, request)]
            assert len(set(found)) == len(found), found


def _table(**rows: Row) -> Table:
    return Table("s", "full", rows, 0.05, moved=10**6, work=10**9)


def _row(median: float, **more: Any) -> Row:
    return Row(timing.Timing(median, median, median, 0.0, 4), **more)


def test_losses_are_red_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(published=_row(1.0, speedup=1.0), petal=_row(2.0, speedup=0.5, loss=True))
    assert "\x1b" not in console.text(table)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    red = [line for line in console.text(table).splitlines() if line.startswith("\x1b[31m")]
    assert len(red) == 1
    assert "petal" in red[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in console.text(table)


def test_progress_names_the_phase_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    now = iter([0.0, 32.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    progress = console.Progress(total=2, modes=1)
    progress.stream = stream
    progress.scenario("adapter")
    progress.phase("compile", 0, 3)
    progress.phase("timing", 1, 2)
    said = stream.getvalue()
    assert "[1/2] adapter: compile 0/3\x1b" in said
    assert "[1/2] adapter: timing 1/2, 2 min left" in said  # a quarter took 32 s


def test_csv_is_one_line_per_quantity() -> None:
    from petal_kernels.tools import environment
    from petal_kernels.tools.bench.results import Report

    report = Report(environment.describe(1), "c", "float32", "cpu", "rank")
    row = _row(2.0, speedup=0.5, peak_bytes=3_000_000, reproduce="again")
    report.tables = [_table(petal=row)]
    lines = list(csv.DictReader(io.StringIO(report.as_csv())))
    assert [(x["metric_name"], x["metric_unit"], x["y_value_50"]) for x in lines] == [
        ("speed", "ms", "2.0"),
        ("memory", "MB", "3.0"),
    ]
    for name in ("machine", "torch", "petal_kernels", "commit", "timestamp", "reproduce"):
        assert all(line[name] for line in lines), name


def test_bytes_by_formula_are_of_the_products_that_are_counted() -> None:
    """Kind: flops of a product whose bytes are left out. By hand, for 10 rows, width 6, rank 2,
    outputs of 3 and 4 columns, in float32."""
    from petal_kernels.ops.lowrank_linear.workload import Case, bytes_moved, flops

    def elements(**changes: Any) -> tuple[int, int]:
        forward, backward = bytes_moved(Case("", (10,), 6, 2, (3, 4), **changes), torch.float32)
        assert forward % 4 == backward % 4 == 0
        return forward // 4, backward // 4

    x, h, y, w, b = 60, 20, 70, 42, 7
    back = 2 * y + 4 * h  # every dy twice; h and dh
    assert elements() == (x + w + b + 2 * h + y, back + x + x + w)
    assert elements(bias=False)[0] == x + w + 2 * h + y
    assert elements(base="outputs") == (x + 2 * h + 2 * y, back + 2 * x)
    assert elements(base="none") == (x + 2 * h + y, back + 2 * x)
    assert elements(frozen_x=True) == (x + w + b + 2 * h + y, back + x)
    assert elements(hidden=True) == (x + w + b + 2 * h + y, back)
    assert elements(hidden=True, base="outputs") == (2 * h + 2 * y, back)
    shrink, expand, base = 2 * 10 * 6 * 2, 2 * 10 * 2 * 7, 2 * 10 * 6 * 7
    given = flops(Case("", (10,), 6, 2, (3, 4)))
    assert given == (shrink + expand + base, 2 * expand + 2 * shrink + base)


def test_a_layer_with_a_base_counts_its_weights() -> None:
    """Of every layer that multiplies by frozen weights, their bytes are in the forward's."""
    for name, (kind, cases) in layer.LAYERS.items():
        made = kind(cases[-1], torch.float32)
        frozen = [p for p in made.parameters() if not p.requires_grad]
        size = sum(p.nbytes for p in frozen)
        forward, _ = made.moved(torch.float32)
        rows = made.case.rows * made.case.width * 4
        outs = {"petal_qkv": 3, "routed_lora": 3, "lora_linear": 1, "lora_qkv": 1.5}.get(name, 0)
        if outs:
            assert abs(size / (4 * made.case.width**2) - outs) < 0.01  # biases apart
            assert forward > size + rows * (1 + outs)  # weights and x read, every output written
        elif name == "lora_mlp":
            assert size == 3 * 2.75 * 4 * made.case.width**2
            assert forward > size + rows * 2
