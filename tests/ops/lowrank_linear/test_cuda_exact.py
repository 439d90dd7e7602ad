"""``lowrank_linear``'s CUDA kernels under the emulation where equality is the measure.

Dropout masks, order of blocks and threads, guard zones, exact sums of integers, refusals.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels.ops.lowrank_linear import cuda_impl as linear
from tests.emulation.guarded import Guarded
from tests.emulation.operator import bad
from tests.emulation.support import (
    DTYPES,
    RNG,
    Linear,
    linear_call,
    needs_compiler,
    pad_rows,
    run_linear,
)

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

# Masks, bit for bit: products with an identity matrix let every mask through to an output.


def keep_mask(stream: int, rows: int, cols: int, p: float) -> Tensor:
    return philox.keep_masks(RNG, p, 4, rows, cols)[stream]


def scaled_mask(stream: int, rows: int, cols: int, p: float) -> Tensor:
    return philox.scaled_masks(RNG, p, 4, rows, cols, torch.float32)[stream]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_masks_of_the_bottleneck(fused: bool, small: bool, emulated: Any) -> None:
    rows, rank, p = 70, 40, 0.3
    eye, ones = torch.eye(rank), torch.ones(rows, rank)
    want = [scaled_mask(k, rows, rank, p) for k in range(3)]
    ys = [torch.empty(rows, rank) for _ in range(3)]
    if fused:
        h = torch.empty(rows, rank)
        emulated.lowrank_linear_fwd_update(
            ones, [eye], [h], [eye] * 3, [], ys, RNG, [1.0] * 3, p, False, True
        )
        assert torch.equal(h, ones)
    else:
        emulated.lowrank_linear_expand([ones], [eye] * 3, [], ys, RNG, [1.0] * 3, p, True, False)
    for y, mask in zip(ys, want, strict=True):
        assert torch.equal(y, mask)
    apart = torch.empty(rows, 3 * rank)
    emulated.lowrank_linear_shrink(
        [ones] * 3, [eye] * 3, apart, RNG, [1.0] * 3, p, False, True, True, small
    )
    assert torch.equal(apart, torch.cat(want, 1))
    total = torch.empty(rows, rank)
    emulated.lowrank_linear_shrink(
        [ones] * 3, [eye] * 3, total, RNG, [1.0] * 3, p, False, True, False, small
    )
    kept = sum(keep_mask(k, rows, rank, p).float() for k in range(3))
    assert torch.equal(total, kept * torch.tensor(philox.keep_scale(p)))
    outs = [torch.empty(rows, rank) for _ in range(3)]
    eye_rows = torch.eye(rows)
    emulated.lowrank_linear_bwd_weights(
        [eye_rows] * 3, [ones] * 3, outs, RNG, [1.0] * 3, p, [2, 2, 2], [0, 1, 2], 2
    )
    for out, mask in zip(outs, want, strict=True):
        assert torch.equal(out, mask)


@pytest.mark.parametrize("small", [False, True])
def test_masks_of_the_input(small: bool, emulated: Any) -> None:
    rows, width, p = 70, 51, 0.3
    eye, ones, want = torch.eye(width), torch.ones(rows, width), scaled_mask(0, rows, width, p)
    h = torch.empty(rows, width)
    emulated.lowrank_linear_shrink([ones], [eye], h, RNG, [1.0], p, True, False, False, small)
    assert torch.equal(h, want)
    fused, y = torch.empty(rows, width), torch.empty(rows, 3)
    emulated.lowrank_linear_fwd_update(
        ones, [eye], [fused], [torch.ones(3, width)], [], [y], RNG, [1.0], p, True, False
    )
    assert torch.equal(fused, want)
    dx = torch.empty(rows, width)
    emulated.lowrank_linear_expand([ones], [eye], [], [dx], RNG, [1.0], p, False, True)
    assert torch.equal(dx, want)
    ddown = torch.empty(rows, width)
    emulated.lowrank_linear_bwd_weights(
        [ones], [torch.eye(rows)], [ddown.t()], RNG, [1.0], p, [1], [0], 2
    )
    assert torch.equal(ddown, want)


# Order and memory.


def every_kernel(dtype: torch.dtype) -> list[Tensor]:
    """Outputs of all kernels on ragged problems with several blocks along every axis."""
    found: list[Tensor] = []
    for case in (
        Linear(fused=True, rows=40, rank=24, outs=(70, 300)),
        Linear(rank=72 if dtype != torch.float32 else 40, rows=70, site="mode"),
        Linear(site="input", small=False, transposed=True),
        Linear(site="input", ranks=(19, 40, 7), outs=(70, 20, 133), small=False),
        Linear(ranks=(8, 40), source="base"),
    ):
        torch.manual_seed(1)
        linear.FUSED_ROWS = 1 << 30 if case.fused else 0
        linear.SMALL_ROWS = 1 << 30 if case.small else 0
        args = case.inputs(dtype)
        dys = [torch.randn(case.rows, o).to(dtype) for o in case.outs]
        found += run_linear(linear, args, dys).values()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_blocks_and_threads_does_not_matter(
    dtype: torch.dtype, lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "FUSED_ROWS", 0)
    monkeypatch.setattr(linear, "SMALL_ROWS", 0)
    lib.petal_emulation_configure(0, 0, 12)
    natural = every_kernel(dtype)
    for blocks, threads in ((1, 0), (0, 2), (3, 4)):
        lib.petal_emulation_configure(blocks, threads, 12)
        for a, b in zip(natural, every_kernel(dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [3, 8])
def test_guard_zones(dtype: torch.dtype, pad: int, emulated: Any) -> None:
    guard = Guarded()
    rows, width, rank, outs = 35, 40, 24, (72, 9)

    def given(n: int, c: int) -> Tensor:
        return pad_rows(torch.randn(n, c).to(dtype), pad)

    x, down, ups = given(rows, width), given(rank, width), [given(o, rank) for o in outs]
    h = guard.matrix(rows, rank, dtype, pad)
    emulated.lowrank_linear_shrink([x], [down.t()], h, None, [1.0], 0.0, False, False, False, True)
    again = guard.matrix(rows, rank, dtype, pad)
    ys = [guard.matrix(rows, o, dtype, pad) for o in outs]
    emulated.lowrank_linear_fwd_update(
        x, [down], [again], ups, [], ys, None, [1.0] * 2, 0.0, False, False
    )
    apart = [guard.matrix(rows, o, dtype, pad) for o in outs]
    emulated.lowrank_linear_expand([h], ups, [], apart, None, [1.0] * 2, 0.0, False, False)
    # The two paths round at the same places and differ in the order of the sum over D only.
    torch.testing.assert_close(ys, apart, rtol=2e-2, atol=2e-2)
    assert all(torch.isfinite(y).all() for y in ys)
    dys = [given(rows, o) for o in outs]
    separate = guard.matrix(rows, 2 * rank, dtype, pad)
    emulated.lowrank_linear_shrink(
        dys, ups, separate, None, [1.0] * 2, 0.0, False, False, True, False
    )
    grads = [guard.flat(o, rank, dtype=dtype) for o in outs] + [
        guard.flat(rank, width, dtype=dtype)
    ]
    emulated.lowrank_linear_bwd_weights(
        [*dys, x],
        [h.clone()] * 3,
        [*grads[:2], grads[2].t()],
        None,
        [1.0] * 3,
        0.0,
        [0] * 3,
        [0] * 3,
        3,
    )
    guard.check()


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_add_up(splits: int, dtype: torch.dtype, emulated: Any) -> None:
    """Integers have exact sums: any number of splits gives them, even with nothing to share."""
    big = torch.randint(-2, 3, (150, 70)).to(dtype)
    small = torch.randint(-2, 3, (150, 9)).to(dtype)
    for out in (torch.empty(70, 9), torch.empty(9, 70).t()):
        emulated.lowrank_linear_bwd_weights(
            [big], [small], [out], None, [0.5], 0.0, [0], [0], splits
        )
        assert torch.equal(out, 0.5 * (big.float().t() @ small.float()))


def test_no_rows(emulated: Any) -> None:
    x, down, up = torch.empty(0, 8), torch.randn(4, 8), torch.randn(6, 4)
    call = linear_call(x=x, down=down, ups=[up])
    ys, saved = linear.forward(call, None, "update")
    assert ys[0].shape == (0, 6)
    assert saved.h.shape == (0, 4)
    grads = linear.backward(call, saved, ys, None, frozenset(("x", "downs", "ups")))
    assert grads.x is not None
    assert grads.x.shape == (0, 8)
    assert grads.downs is not None
    assert torch.equal(grads.downs[0], torch.zeros(4, 8))
    assert grads.ups is not None
    assert torch.equal(grads.ups[0], torch.zeros(6, 4))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(value: float, dtype: torch.dtype) -> None:
    x, down = torch.rand(20, 24).to(dtype), torch.rand(8, 24).to(dtype)
    up = torch.rand(10, 8).to(dtype)
    x[3, 5] = value
    ys, saved = linear.forward(linear_call(x=x, down=down, ups=[up]), None, "update")
    for t in (saved.h, ys[0]):
        bad = ~torch.isfinite(t)
        assert bad[3].all()
        assert not bad[torch.arange(20) != 3].any()


@pytest.mark.slow
def test_more_than_2_31_elements(emulated: Any) -> None:
    """Rows so far apart that 32-bit offsets would wrap; only touched pages exist."""
    torch.use_deterministic_algorithms(False)
    stride, rows, width = (1 << 30) + 8, 3, 16

    def far() -> Tensor:
        return torch.empty(stride * (rows - 1) + width, dtype=torch.bfloat16).as_strided(
            (rows, width), (stride, 1)
        )

    x, y = far(), far()
    x.copy_(torch.randint(-2, 3, (rows, width)))
    down, up = (
        torch.randint(-2, 3, (4, width)).bfloat16(),
        torch.randint(-2, 3, (width, 4)).bfloat16(),
    )
    h = torch.empty(rows, 4, dtype=torch.bfloat16)
    emulated.lowrank_linear_fwd_update(
        x, [down], [h], [up], [], [y], None, [1.0], 0.0, False, False
    )
    assert torch.equal(h, x @ down.t())
    assert torch.equal(y, h @ up.t())
    emulated.lowrank_linear_expand(
        [h], [down.t()], [x.clone()], [y], None, [1.0], 0.0, False, False
    )
    assert torch.equal(y, (x.float() + h.float() @ down.float()).bfloat16())
    out = torch.empty(width, 4)
    emulated.lowrank_linear_bwd_weights([x], [h], [out], None, [1.0], 0.0, [0], [0], 2)
    assert torch.equal(out, x.float().t() @ h.float())


# Refusals.


def test_refusals_name_the_argument(emulated: Any) -> None:
    x, out = torch.randn(5, 8), torch.empty(5, 4)

    def shrink(a: Tensor, factor: Tensor, to: Tensor, p: float = 0.0) -> None:
        emulated.lowrank_linear_shrink([a], [factor], to, RNG, [1.0], p, True, False, False, True)

    down = torch.randn(4, 8)
    own, wide = [torch.randn(4, 8).t(), torch.randn(3, 8).t()], torch.empty(5, 7)

    def of_own(a: list[Tensor], scales: list[float], to: Tensor) -> None:
        emulated.lowrank_linear_shrink(a, own, to, RNG, scales, 0.0, True, False, len(a) == 1, True)

    bad(lambda: of_own([x], [1.0], wide), "want 2 scales, got 1")
    bad(lambda: of_own([x], [1.0, 1.0], out), r"out: want \[5, 7\], got \[5, 4\]")
    bad(lambda: of_own([x, x], [1.0, 1.0], out), "want factors of one rank, got 4 and 3")
    bad(
        lambda: emulated.lowrank_linear_expand([out], own, [], [x], RNG, [1.0], 0.0, False, False),
        "want as many bottlenecks as factors",
    )
    bad(lambda: shrink(x, torch.randn(4, 7).t(), out), r"factor: want \[8, 4\]")
    bad(lambda: shrink(x, down.half().t(), out), "factor: want the dtype of the activations")
    bad(lambda: shrink(x.double(), down.double().t(), out), "want float32, float16 or bfloat16")
    bad(lambda: shrink(x, torch.randn(300, 8).t(), torch.empty(5, 300)), "rank from 1 to 256")
    bad(lambda: shrink(x, down.t(), torch.empty(6, 4)), r"out: want \[5, 4\], got \[6, 4\]")
    bad(lambda: shrink(x, down.t(), out, p=1.0), "dropout: want 0 <= dropout < 1")


def test_unsupported_says_everything() -> None:
    x, ups = torch.randn(3, 8, dtype=torch.float64), [torch.randn(4, 300)] * 5
    reasons = linear.unsupported(linear_call(x=x, down=torch.randn(300, 8), ups=ups), "merge")
    for part in ("CUDA", "float64", "merge", "4 outputs", "rank"):
        assert any(part in reason for reason in reasons), part
    downs = [torch.randn(4, 8), torch.randn(257, 8)]
    ups = [torch.randn(9, 4), torch.randn(9, 257)]
    own = linear_call(x=torch.randn(3, 8), down=downs, ups=ups, scale=[1.0, 2.0])
    reasons = linear.unsupported(own, "update")
    assert reasons[1:] == ["wants a rank of at most 256, got 257"]
