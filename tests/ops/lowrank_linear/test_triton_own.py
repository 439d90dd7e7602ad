"""``lowrank_linear``'s Triton kernels where every output has a down-projection, a mask and a scale
of its own: traffic of each launch, and what ``test_ops.py``'s cases leave out.

LoRA on q, k and v of one x. Runs in the interpreter, as ``test_triton.py``, whose helpers it uses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import triton_audit
from tests.ops.interpreted import clean, draw, expect
from tests.ops.lowrank_linear import test_triton as one  # skips this without the interpreter too

lowrank: Any = vars(one)["lowrank"]

pytestmark = pytest.mark.usefixtures("poisoned")

N, D = 150, 83
OUTS, RANKS, SCALES = (37, 53, 24, 9), (19, 3, 8, 17), [0.5, -1.5, 2.0, 0.75]


def problem(count: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """The first ``count`` outputs of widths, ranks and scales that all differ."""
    shapes = list(zip(OUTS, RANKS, strict=True))[:count]
    given = {
        "down": [draw(r, D, dtype=dtype) for r in RANKS[:count]],
        "ups": [draw(o, r, dtype=dtype) for o, r in shapes],
        "scale": SCALES[:count],
        "dropout_at": "input",
    }
    return one.problem(dtype, **{**given, **changes})


def given_base(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [draw(N, o, dtype=dtype) for o in OUTS[:count]]


def steps(p: dict[str, Any]) -> triton_audit.Audit:
    """Forward and backward, every launch seen."""
    with triton_audit.Audit() as audit:
        ys, saved = one.forward(p)
        one.backward(p, saved, [draw(*y.shape, seed=3, dtype=y.dtype) for y in ys])
    clean(audit)
    return audit


@pytest.mark.parametrize("site", ["input", "bottleneck"])
def test_traffic(site: str) -> None:
    """x once for all shrinks and once for all dU_k, y_k once, dx once for all K ways to it, dy_k
    twice."""
    dtype, e = torch.float16, 2
    p = problem(3, dtype, base=given_base(3, dtype), dropout_at=site)
    audit = steps(p)
    wide, columns = sum(OUTS[:3]), sum(RANKS[:3])
    factors = sum(o * r for o, r in zip(OUTS[:3], RANKS[:3], strict=True))
    expect(audit, "shrink", (N * D + columns * (D + N)) * e)
    expect(audit, "expand", (2 * N * wide + N * columns + factors) * e)
    expect(audit, "bwd_dh", (N * wide + N * columns + factors) * e)
    expect(audit, "through", (N * D + columns * (D + N)) * e)
    ups = 4 * one.splits_of(audit) * factors
    downs = 4 * one.splits_of(audit, "tn_x") * columns * D
    expect(audit, "tn_kernel", (N * wide + N * columns) * e + ups)
    expect(audit, "tn_x", (N * D + N * columns) * e + downs)
    expect(audit, "bwd_reduce", downs + columns * D * e, ups + factors * e)
    assert all(launch.grid[0] > 1 for launch in audit.launches)


def test_a_tile_of_x_is_loaded_once() -> None:
    """Not once for each down-projection: of what a launch asks of the caches, x is asked for once
    for its rows and columns, whatever the number of down-projections."""
    for fragment in ("shrink", "tn_x"):
        asked = []
        for count in (1, 4):
            launch = steps(problem(count, base=given_base(count, torch.float32))).of(fragment)[0]
            asked.append(launch._bytes(launch.reads, "x_ptr", unique=False))
        assert asked == [N * D * 4] * 2, fragment


@pytest.mark.one_in(2)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("site", ["input", "bottleneck"])
def test_any_number_of_outputs(count: int, site: str) -> None:
    one.check_all(problem(count, dropout_at=site))


def test_without_dropout_and_in_half_precision() -> None:
    one.check_all(problem(rng=None, dropout=0.0))
    p = problem(3, torch.float16, base=given_base(3, torch.float16))
    one.check_all(p, tolerance=2e-3)


@pytest.mark.parametrize("plan", ["update", "extend"])
def test_over_weights(plan: str) -> None:
    """The base's GEMMs in front, or in the same kernel."""
    weights = [draw(o, D) for o in OUTS[:2]]
    one.check_all(problem(2, weights=weights, biases=[draw(OUTS[0]), None]), plan)
    more: dict[str, Any] = {"weights": weights, "biases": [None, None], "dropout_at": "bottleneck"}
    one.check_all(problem(2, **more), plan)


def test_one_pass_dx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no mask of x stands between, the down-projections are one in dx's GEMM."""
    monkeypatch.setattr(lowrank, "_fuses_dx", lambda x, weights: True)
    weights = [draw(o, D) for o in OUTS[:2]]
    for site, fused in (("bottleneck", True), ("input", False)):
        p = problem(2, weights=weights, biases=[None, None], dropout_at=site)
        assert bool(steps(p).of("bwd_dx")) == fused
        one.check_all(p)


def test_more_columns_than_a_program_holds() -> None:
    """Padded ranks of 128 go two to a launch: the second has its own streams and columns."""
    ranks = (100, 65, 70)
    p = problem(
        x=draw(70, 40),
        down=[draw(r, 40) for r in ranks],
        ups=[draw(o, r) for o, r in zip(OUTS[:3], ranks, strict=True)],
    )
    audit = steps(p)
    assert [len(audit.of(name)) for name in ("shrink", "tn_x")] == [2, 2]
    one.check_all(p)


def test_dtypes_and_layouts_mixed() -> None:
    """Down-projections of two layouts and dtypes."""
    downs = [draw(RANKS[0], D), draw(D, RANKS[1]).t(), draw(RANKS[2], D, dtype=torch.float16)]
    p = problem(3, torch.float16, down=downs, base=given_base(3, torch.float16))
    one.check_all(p, tolerance=2e-3)
    one.check_all(problem(2, down=[draw(D, r).t() for r in RANKS[:2]]))


def test_scales_of_a_shared_down_projection() -> None:
    """Every output's own scale, where h is shared, behind a core, and given."""
    r = one.R
    ups = [draw(o, r) for o in OUTS[:2]]
    shared: dict[str, Any] = {"down": draw(r, D), "ups": ups, "scale": [0.5, -1.5]}
    one.check_all(one.problem(**shared))
    one.check_all(one.problem(**shared, core=draw(2, r, r), dropout_at="mode"))
    one.check_all(one.problem(**{**shared, "x": None, "down": None}, hidden=draw(N, r)))
    weights = [draw(o, D) for o in OUTS[:2]]
    one.check_all(one.problem(**shared, weights=weights, biases=[None, None]), "extend")


def test_program_order_and_needs_change_no_bit() -> None:
    p = problem(base=given_base(3, torch.float32))
    _, saved = one.forward(p)
    dys = [draw(N, o, seed=3) for o in OUTS[:3]]
    full = one.backward(p, saved, dys)
    with triton_audit.Audit(reverse=True):
        ys, again = one.forward(p)
        assert torch.equal(saved.h, again.h)
        for need in ("x", "downs", "hidden", "ups"):
            alone = getattr(one.backward(p, again, dys, (need,)), need)
            wanted = getattr(full, need)
            alone, wanted = ([t] if isinstance(t, Tensor) else t for t in (alone, wanted))
            assert all(torch.equal(a, b) for a, b in zip(alone, wanted, strict=True)), need
    assert len(ys) == 3


def test_reasons() -> None:
    """The largest rank counts; own down-projections and scales that differ are no reason."""
    x = draw(4, 300)
    ranks = (8, 300)
    downs, ups = [draw(r, 300) for r in ranks], [draw(5, r) for r in ranks]
    p = one.problem(x=x, down=downs, ups=ups, scale=[1.0, 2.0])
    assert lowrank.unsupported(one.call_of(p), "auto") == ["rank at most 256, got 300"]
    assert lowrank.unsupported(one.call_of(problem(4)), "auto") == []
