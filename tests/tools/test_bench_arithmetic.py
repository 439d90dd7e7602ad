"""The benchmark's arithmetic: known samples in; table, JSON, CSV, HTML and exit code out, exactly.

Kind: a headline that can be inverted with every test green. Nothing here is timed: the clock gives
the samples that a test names.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from petal_kernels.ops.gated_bottleneck import native_impl, torch_impl
from petal_kernels.tools.bench import console, counting, judge, model, timing
from petal_kernels.tools.bench.correctness import Errors, compare, pooled
from petal_kernels.tools.bench.request import Request
from petal_kernels.tools.bench.results import Row, Table
from petal_kernels.tools.bench.scenarios import by_mode
from tests.tools.known_times import COUNTS, ENVIRONMENT, ROOF, SAMPLES

TEXT = """
s: forward and backward
  provider          ms     p20     p80  x published  launches  saved MB  peak MB  % of roof  \
error ratio
  published     10.000   9.200  10.800        1.00x        30      5.25     9.00         40  \
1.00 / 1.50
  eager          5.000   5.000   5.000        2.00x        20      4.50     8.00         80  \
1.00 / 1.50
  compile        8.000   8.000   8.000        1.25x                         7.00         50  \
1.00 / 1.50
  base           1.000   1.000   1.000        floor         1      0.00     1.00
  petal native   4.000   4.000   4.000        2.50x         2      2.25     3.50        100  \
1.00 / 1.50
  petal torch    9.900   9.800  10.000  within noise         9      2.25     4.00         40  \
1.00 / 1.50
  drift 2.0 %; fastest baseline eager; by formula 40.0 MB moved, 0.30 GFLOP; auto runs on native"""


def test_the_table(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs() == 0
    said = capsys.readouterr().out
    table = said[said.index("\ns: forward") :].rstrip()
    assert [line.split() for line in table.splitlines()] == [x.split() for x in TEXT.splitlines()]


def test_the_json(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert runs("--json", str(out)) == 0
    document = json.loads(out.read_text())
    (table,) = document.pop("results")
    assert document.pop("command").startswith("petal-kernels bench op mode_contract --no-gate")
    assert document == {
        "environment": ENVIRONMENT,
        "dtype": "float32",
        "device": "cpu",
        "ceilings": {"gigabytes": 10.0, "gigaflops": 100.0},
        "absent": {},
        "partial": None,
    }
    found = table.pop("rows")
    assert table == {
        "scenario": "s",
        "mode": "full",
        "drift": 0.0204,
        "best": "eager",
        "shape": "mode_contract a shape",
        "swept": 8.0,
        "moved": 40_000_000,
        "work": 300_000_000,
        "notes": ["auto runs on native"],
    }
    assert list(found) == list(SAMPLES)
    reproduce = [row.pop("reproduce") for row in found.values()]
    assert all(r.startswith("petal-kernels bench op mode_contract --shape") for r in reproduce)
    keys = ("median", "p20", "p80", "drift", "speedup", "roof", "verdict", "loss", "noise")
    exact = {
        "published": (10.0, 9.2, 10.8, 0.0, 1.0, 0.4, "", False, False),
        "eager": (5.0, 5.0, 5.0, 0.0, 2.0, 0.8, "", False, False),
        "compile": (8.0, 8.0, 8.0, 0.0, 1.25, 0.5, "", False, False),
        "base": (1.0, 1.0, 1.0, 0.0, None, None, "floor", False, False),
        "petal native": (4.0, 4.0, 4.0, 0.0, 2.5, 1.0, "", False, False),
        "petal torch": (9.9, 9.8, 10.0, 0.02041, 1.0101, 0.404, "within noise", False, True),
    }
    assert {label: tuple(row[k] for k in keys) for label, row in found.items()} == exact
    counts = ("launches", "saved_bytes", "peak_bytes")
    assert {label: tuple(row[k] for k in counts) for label, row in found.items()} == COUNTS
    flags = {label: (row["ours"], row["chosen"], row["floor"]) for label, row in found.items()}
    assert [k for k, v in flags.items() if v[0]] == ["petal native", "petal torch"]
    assert [k for k, v in flags.items() if v[1]] == ["petal native"]
    assert [k for k, v in flags.items() if v[2]] == ["base"]
    errors = [(row.get("error_outputs"), row.get("error_gradients")) for row in found.values()]
    assert errors == [(1.0, 1.5)] * 3 + [(None, None)] + [(1.0, 1.5)] * 2
    assert all(row["samples"] == 4 and row["suspect"] is False for row in found.values())


def test_the_csv(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    errors = {"compile": Errors(1.0, 7.0), "eager": Errors(math.inf, 0.5)}
    assert runs("--csv", str(out), errors=errors) == 2
    lines = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [(x["kernel_provider"], x["metric_name"]) for x in lines] == [
        (label, quantity)
        for label in SAMPLES
        for quantity in ("speed", "memory", "saved")
        if (label, quantity) != ("compile", "saved")
    ]
    quantiles = ("y_value_20", "y_value_50", "y_value_80")
    first = {x["metric_name"]: x for x in lines if x["kernel_provider"] == "published"}
    assert [float(first["speed"][k]) for k in quantiles] == pytest.approx([9.2, 10.0, 10.8])
    assert [float(first["memory"][k]) for k in quantiles] == [9.0] * 3
    assert [float(first["saved"][k]) for k in quantiles] == [5.25] * 3
    speed = {x["kernel_provider"]: x for x in lines if x["metric_name"] == "speed"}
    worst = {label: x["rel_err_vs_torch"] for label, x in speed.items()}
    assert worst["published"] == "1.5"  # of outputs and gradients
    assert worst["compile"] == "7.0"
    assert worst["eager"] == "inf"
    assert worst["base"] == ""
    assert [x["pct_roofline"] for x in speed.values()] == ["40.0", "80.0", "50.0", "", "100.0",
                                                           "40.4"]  # fmt: skip
    verdicts = {label: x["verdict"] for label, x in speed.items()}
    assert verdicts == {
        "published": "",
        "eager": "WRONG",
        "compile": "imprecise",
        "base": "floor",
        "petal native": "",
        "petal torch": "within noise",
    }
    given = {k: first["speed"][k] for k in ("x_name", "x_value", "machine", "timestamp", "partial")}
    assert given == {
        "x_name": "",
        "x_value": "8",
        "machine": "a CPU",
        "timestamp": "2026-01-02T03:04:05Z",
        "partial": "",
    }


def test_the_html(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    assert runs("--html", str(out)) == 0
    page = out.read_text()
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    cells = {}
    for line in (r for t in root.iter("tbody") for r in t.iter("tr")):
        texts = ["".join(c.itertext()) for c in line.iter("td")]
        if texts[0] in SAMPLES:
            cells[texts[0]] = (texts[1:5], line.get("class"))
    assert cells == {
        "published": (["10.000", "9.200", "10.800", "1.00x"], None),
        "eager": (["5.000", "5.000", "5.000", "2.00x"], None),
        "compile": (["8.000", "8.000", "8.000", "1.25x"], None),
        "base": (["1.000", "1.000", "1.000", "floor"], None),
        "petal native": (["4.000", "4.000", "4.000", "2.50x"], None),
        "petal torch": (["9.900", "9.800", "10.000", "within noise"], None),
    }
    svg = "{http://www.w3.org/2000/svg}"
    charts = {c.get("aria-label"): c for c in root.iter(f"{svg}svg")}
    bars = [t.text for t in charts["Times as fast as the published form"].iter(f"{svg}text")]
    assert "2.5 x" in bars
    noisy = SAMPLES | {"petal native": [9.8, 9.8, 10.0, 10.0]}
    assert runs("--html", str(out), samples=noisy) == 0
    root = ElementTree.fromstring(out.read_text().removeprefix("<!DOCTYPE html>"))
    charts = {c.get("aria-label"): c for c in root.iter(f"{svg}svg")}
    bars = [t.text for t in charts["Times as fast as the published form"].iter(f"{svg}text")]
    assert "1 x" in bars
    assert not any(text and text.startswith("1.01") for text in bars)
    assert "Partial" not in page


@pytest.mark.parametrize(
    ("ours", "drift", "noise"),
    [(10.0, 0.0, True), (9.5, 0.05, False), (9.6, 0.05, True), (10.4, 0.05, True),
     (10.51, 0.05, False), (5.0, 1.1, True), (20.0, 1.1, True)],
)  # fmt: skip
def test_a_ratio_inside_the_drift_is_noise(ours: float, drift: float, noise: bool) -> None:
    """As far below 1 as above it: 1.05 and 1/1.05."""
    mine = Row(timing.Timing(ours, ours, ours, 0.0, 4), ours=True, chosen=True)
    first = Row(timing.Timing(10.0, 10.0, 10.0, 0.0, 4))
    table = Table("s", "full", {"published": first, "petal": mine}, drift)
    judge.judge(table, ROOF)
    assert mine.noise is noise
    assert mine.speedup == pytest.approx(10.0 / ours)
    assert first.noise is False
    assert console.speedup(mine) == ("within noise" if noise else f"{10.0 / ours:.2f}x")
    assert console.speedup(first) == "1.00x"


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        ([3.0, 1.0, 2.0, 4.0], (2.5, 1.6, 3.4, 0.5)),
        ([1.0, 2.0, 3.0, 4.0, 5.0], (3.0, 1.8, 4.2, 4.0 / 1.5 - 1.0)),
        ([2.0, 2.0, 1.0, 1.0], (1.5, 1.0, 2.0, 1.0)),  # falling drifts as rising does
        ([7.0] * 6, (7.0, 7.0, 7.0, 0.0)),
    ],
)
def test_a_summary_of_samples(values: list[float], exact: tuple[float, ...]) -> None:
    found = timing.summary(values)
    assert (found.median, found.p20, found.p80, found.drift) == pytest.approx(exact)
    assert found.samples == len(values)


def test_the_drift_of_a_table_is_the_largest_of_its_rows() -> None:
    timings = {k: timing.summary(v) for k, v in SAMPLES.items()}
    assert timing.drift(timings) == pytest.approx(0.2 / 9.8)


def test_the_clock_leaves_preparation_out_and_divides_by_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = timing.Clock(torch.device("cpu"))
    evicted = []
    clock.buffer = SimpleNamespace(add_=lambda _: evicted.append(1) or spend(100.0))  # type: ignore[assignment, func-returns-value]
    step = timing.Step(lambda _: spend(6.0), lambda: spend(1000.0), calls=3)
    assert clock(step) == 2.0
    assert evicted == [1]


def test_rounds_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample of a round in another place: no provider is always behind the same one."""
    order: list[str] = []
    monkeypatch.setattr(timing, "Clock", lambda *_: lambda step: step.run(None) or 1.0)
    steps = {k: timing.Step(lambda _, k=k: order.append(k)) for k in "abc"}  # type: ignore[misc]
    found = timing.compare(steps, torch.device("cpu"), rounds=4, warmup=0)
    assert "".join(order) == "abcbcacababc"
    assert {t.samples for t in found.values()} == {4}
    assert {t.median for t in found.values()} == {1000.0}  # milliseconds of a second


@pytest.mark.parametrize(
    ("mode", "figure"), [("forward", 1), ("train", 1), ("backward", 2), ("full", 3)]
)
def test_bytes_and_flops_belong_to_the_mode(mode: str, figure: int) -> None:
    assert by_mode((1, 2), mode) == figure
    assert by_mode(None, mode) is None


def test_the_tax_of_a_step_is_over_the_frozen_one() -> None:
    assert model.tax({"base": 100.0, "published": 120.0, "petal": 107.0}) == pytest.approx(
        {"published": 0.2, "petal": 0.07}
    )


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Exact, plain torch's, and ours with twice plain torch's error."""
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(64, generator=g, dtype=torch.float64)
    noise = 1e-4 * torch.randn(64, generator=g, dtype=torch.float64)
    return exact, (exact + noise).float(), (exact + 2 * noise).float()


@pytest.mark.parametrize("rule", [compare, pooled])
def test_outputs_and_gradients_are_judged_apart(rule: Callable[..., Errors]) -> None:
    """Kind: an error that counts no gradient."""
    exact, plain, ours = _tensors()
    out = rule(([ours], [plain]), ([exact], [exact]), ([plain], [plain]))
    assert (out.outputs, out.gradients) == pytest.approx((2.0, 1.0), rel=0.01)
    gradient = rule(([plain], [ours]), ([exact], [exact]), ([plain], [plain]))
    assert (gradient.outputs, gradient.gradients) == pytest.approx((1.0, 2.0), rel=0.01)
    assert gradient.worst == gradient.gradients
    for wrong in (None, -plain, torch.full_like(plain, math.nan), plain[:-1]):
        assert rule(([plain], [wrong]), ([exact], [exact]), ([plain], [plain])).wrong
    # One of many is enough.
    many = rule(([plain], [plain, -plain]), ([exact], [exact] * 2), ([plain], [plain] * 2))
    assert many.wrong
    assert rule(([], [plain]), ([], [None]), ([], [None])).wrong
    assert rule(([], [None]), ([], [None]), ([], [None])).worst == 0.0
    infinite = torch.full_like(plain, math.inf)
    assert rule(([plain], []), ([exact], []), ([infinite], [])).wrong  # the case shows nothing


def test_the_worst_of_two_checks() -> None:
    assert Errors(1.0, 5.0) | Errors(2.0, 3.0) == Errors(2.0, 5.0)
    assert (Errors(1.0, 1.0) | Errors(math.nan, 1.0)).wrong


def test_a_models_gradients_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: a whole model of which only the outputs count."""
    request = Request(quick=True, shape="VL-Adapter", against=("published",))
    check = next(iter(model.scenarios(["bart"], request)))().providers["petal"].check
    assert check is not None
    good = check()
    assert not good.red
    assert good.gradients > 0.0
    assert check(False).gradients == 0.0  # of the outputs alone
    for module in (native_impl, torch_impl):
        backward = module.backward

        def scaled(*args: Any, backward: Callable[..., Any] = backward) -> Any:
            return tree_map(lambda t: 1.5 * t if isinstance(t, Tensor) else t, backward(*args))

        monkeypatch.setattr(module, "backward", scaled)
    bad = check()
    assert bad.outputs == good.outputs
    assert bad.wrong


def test_saved_bytes_leave_parameters_out_and_count_a_storage_once() -> None:
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)

    def forward() -> Tensor:
        y = x @ w  # keeps x and w
        return (y * y).sum()  # keeps y once

    assert counting.saved_bytes(forward, [w]) == x.nbytes + x.nbytes
    assert counting.saved_bytes(forward, [w, x]) == x.nbytes
