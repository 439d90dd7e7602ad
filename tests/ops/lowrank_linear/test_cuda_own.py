"""``lowrank_linear``'s CUDA kernels under the emulation where every output has a down-projection, a
mask and a scale of its own, and equality is the measure: the masks of every kernel bit for bit,
columns that belong to a neighbour, splits.

Errors against fp64 are test_cuda.py's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels._runtime import philox
from petal_kernels.ops.lowrank_linear import cuda_impl as linear
from tests.emulation.guarded import Guarded
from tests.emulation.support import DTYPES, RNG, linear_call, needs_compiler, pad_rows

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]

# Seven slots of 16 columns, so two tiles of 64; an item within both; ranks that end within a slot.
RANKS = (19, 40, 3, 7)
ROWS, WIDTH, P = 70, 83, 0.3
FACTORS = (1.0, -0.5, 2.0, 0.25)


def masks(count: int, rows: int = ROWS, cols: int = WIDTH) -> list[Tensor]:
    """Of the streams 0 to ``count``, as multipliers in float32."""
    return list(philox.scaled_masks(RNG, P, count, rows, cols, torch.float32))


def pick(rank: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns of x, and the down-projection that picks them."""
    g = torch.Generator().manual_seed(seed)
    columns = torch.randperm(WIDTH, generator=g)[:rank]
    return columns, torch.eye(WIDTH)[columns].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("small", [False, True])
def test_every_shrink_has_its_mask_of_x(
    small: bool, count: int, dtype: torch.dtype, emulated: Any
) -> None:
    picks = [pick(rank, k, dtype) for k, rank in enumerate(RANKS[:count])]
    h = torch.empty(ROWS, sum(RANKS[:count]), dtype=dtype)
    emulated.lowrank_linear_shrink(
        [torch.ones(ROWS, WIDTH, dtype=dtype)],
        [down.t() for _, down in picks],
        h,
        RNG,
        FACTORS[:count],
        P,
        True,
        False,
        False,
        small,
    )
    want = [
        f * mask[:, columns]
        for (columns, _), mask, f in zip(picks, masks(count), FACTORS, strict=False)
    ]
    assert torch.equal(h, torch.cat(want, 1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_update_has_every_mask_of_x(dtype: torch.dtype, emulated: Any) -> None:
    picks = [pick(rank, k, dtype) for k, rank in enumerate(RANKS)]
    h = torch.full((ROWS, sum(RANKS)), float("nan"), dtype=dtype)
    hiddens = list(h.split(RANKS, 1))
    ups = [torch.eye(rank, dtype=dtype) for rank in RANKS]
    ys = [torch.empty(ROWS, rank, dtype=dtype) for rank in RANKS]
    emulated.lowrank_linear_fwd_update(
        torch.ones(ROWS, WIDTH, dtype=dtype),
        [down for _, down in picks],
        hiddens,
        ups,
        [],
        ys,
        RNG,
        FACTORS,
        P,
        True,
        False,
    )
    for (columns, _), mask, part, y, f in zip(picks, masks(4), hiddens, ys, FACTORS, strict=True):
        want = mask[:, columns].to(dtype)
        assert torch.equal(part, want)
        assert torch.equal(y, f * want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_every_bottleneck_has_its_mask(fused: bool, dtype: torch.dtype, emulated: Any) -> None:
    x = torch.ones(ROWS, 1, dtype=dtype)
    downs = [torch.ones(rank, 1, dtype=dtype) for rank in RANKS]
    h = torch.empty(ROWS, sum(RANKS), dtype=dtype)
    hiddens = list(h.split(RANKS, 1))
    ups = [torch.eye(rank, dtype=dtype) for rank in RANKS]
    ys = [torch.empty(ROWS, rank, dtype=dtype) for rank in RANKS]
    if fused:
        emulated.lowrank_linear_fwd_update(
            x, downs, hiddens, ups, [], ys, RNG, FACTORS, P, False, True
        )
    else:
        h.fill_(1.0)
        emulated.lowrank_linear_expand(hiddens, ups, [], ys, RNG, FACTORS, P, True, False)
    assert torch.equal(h, torch.ones_like(h))
    dh = torch.empty_like(h)
    dys = [torch.ones(ROWS, rank, dtype=dtype) for rank in RANKS]
    emulated.lowrank_linear_shrink(dys, ups, dh, RNG, FACTORS, P, False, True, True, fused)
    for mask, y, part, f in zip(masks(4), ys, dh.split(RANKS, 1), FACTORS, strict=True):
        want = (f * mask[:, : y.shape[1]]).to(dtype)
        assert torch.equal(y, want)
        assert torch.equal(part, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("based", [False, True])
def test_every_term_of_dx_has_its_mask(
    based: bool, masked: bool, dtype: torch.dtype, emulated: Any
) -> None:
    """Term k is 4^k where it is kept: every sum of them says which were."""
    ranks, width = (3, 70, 1, 8), 150
    downs = [torch.zeros(rank, width, dtype=dtype) for rank in ranks]
    for k, down in enumerate(downs):
        down[-1] = 4.0**k
    dh = torch.ones(ROWS, sum(ranks), dtype=dtype)
    dx = torch.full((ROWS, width), 2.0, dtype=dtype)
    emulated.lowrank_linear_expand(
        list(dh.split(ranks, 1)),
        [down.t() for down in downs],
        [dx] if based else [],
        [dx],
        RNG,
        [1.0],
        P,
        False,
        masked,
    )
    kept = philox.keep_masks(RNG, P, 4, ROWS, width).float() if masked else torch.ones(4, 1, 1)
    total = sum(4.0**k * kept[k] for k in range(4))
    scale = torch.tensor(philox.keep_scale(P) if masked else 1.0)
    assert torch.equal(dx, (total * scale + (2.0 if based else 0.0)).expand(dx.shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("splits", [1, 3])
def test_every_reduction_over_x_has_its_mask(
    splits: int, count: int, dtype: torch.dtype, emulated: Any
) -> None:
    """Rows of an identity pick rows of the mask. Before them comes a reduction of another kind."""
    rows, ranks = 150, RANKS[:count]
    x = torch.ones(rows, WIDTH, dtype=dtype)
    picked = [torch.randperm(rows)[:rank] for rank in ranks]
    dh = torch.cat([torch.eye(rows)[:, each] for each in picked], 1).to(dtype)
    first = torch.eye(rows, dtype=dtype)[:, :21]
    outs = [torch.empty(rank, WIDTH) for rank in ranks]
    before = torch.empty(21, 5)
    emulated.lowrank_linear_bwd_weights(
        [first, *[x] * count],
        [x[:, :5], *dh.split(ranks, 1)],
        [before, *[out.t() for out in outs]],
        RNG,
        [0.5, *FACTORS[:count]],
        P,
        [2, *[1] * count],
        [1, *range(count)],
        splits,
    )
    assert torch.equal(before, 0.5 * masks(2, rows, 5)[1][:21])
    for out, each, mask, f in zip(outs, picked, masks(count, rows), FACTORS, strict=False):
        assert torch.equal(out, f * mask[each])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad", [3, 8])
@pytest.mark.parametrize("ranks", [(8, 24, 16), (5, 40, 1)])
def test_guard_zones(ranks: tuple[int, ...], pad: int, dtype: torch.dtype, emulated: Any) -> None:
    """Nothing is written outside, and no neighbour's columns are read: they are not finite."""
    guard = Guarded()
    rows, width, outs = 35, 40, (72, 9, 20)
    count, total = len(ranks), sum(ranks)

    def given(n: int, c: int) -> Tensor:
        return pad_rows(torch.randn(n, c).to(dtype), pad)

    x, downs = given(rows, width), [given(rank, width) for rank in ranks]
    ups = [given(o, rank) for o, rank in zip(outs, ranks, strict=True)]
    dys = [given(rows, o) for o in outs]
    ones = [1.0] * count
    for masked in (False, True):
        h = guard.matrix(rows, total, dtype, pad)
        emulated.lowrank_linear_shrink(
            [x], [d.t() for d in downs], h, RNG, ones, P, masked, False, False, masked
        )
        again = guard.matrix(rows, total, dtype, pad)
        ys = [guard.matrix(rows, o, dtype, pad) for o in outs]
        parts = list(again.split(ranks, 1))
        emulated.lowrank_linear_fwd_update(
            x, downs, parts, ups, [], ys, RNG, ones, P, masked, False
        )
        torch.testing.assert_close(h, again, rtol=2e-2, atol=2e-2)
        dh = guard.matrix(rows, total, dtype, pad)
        emulated.lowrank_linear_shrink(dys, ups, dh, RNG, ones, P, False, not masked, True, masked)
        dx = guard.matrix(rows, width, dtype, pad)
        emulated.lowrank_linear_expand(
            list(dh.split(ranks, 1)), [d.t() for d in downs], [], [dx], RNG, [1.0], P, False, masked
        )
        grads = [guard.flat(rank, width, dtype=dtype) for rank in ranks]
        emulated.lowrank_linear_bwd_weights(
            [x] * count,
            list(dh.clone().split(ranks, 1)),
            [grad.t() for grad in grads],
            RNG,
            ones,
            P,
            [int(masked)] * count,
            range(count),
            3,
        )
        assert all(torch.isfinite(t).all() for t in (h, dh, dx, *ys, *grads))
    guard.check()


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_add_up(splits: int, dtype: torch.dtype, emulated: Any) -> None:
    """Integers have exact sums: also where only some of the reductions read one operand."""
    x = torch.randint(-2, 3, (150, 70)).to(dtype)
    dys = [torch.randint(-2, 3, (150, o)).to(dtype) for o in (33, 9)]
    dh = torch.randint(-2, 3, (150, 50)).to(dtype)
    smalls = [*dh.split((17, 33), 1), *dh.split((33, 17), 1)]
    bigs = [*dys, x, x]
    outs = [torch.empty(b.shape[1], s.shape[1]) for b, s in zip(bigs, smalls, strict=True)]
    emulated.lowrank_linear_bwd_weights(
        bigs, smalls, outs, None, [1.0] * 4, 0.0, [0] * 4, [0] * 4, splits
    )
    for big, small, out in zip(bigs, smalls, outs, strict=True):
        assert torch.equal(out, big.float().t() @ small.float())


def test_no_rows() -> None:
    downs, ups = [torch.randn(4, 8), torch.randn(3, 8)], [torch.randn(6, 4), torch.randn(5, 3)]
    call = linear_call(x=torch.empty(0, 8), down=downs, ups=ups)
    ys, saved = linear.forward(call, None, "update")
    assert [y.shape for y in ys] == [(0, 6), (0, 5)]
    assert saved.h.shape == (0, 7)
    grads = linear.backward(call, saved, ys, None, frozenset(("x", "downs", "ups", "hidden")))
    assert grads.x is not None
    assert grads.x.shape == (0, 8)
    assert grads.hidden is not None
    assert grads.hidden.shape == (0, 7)
    assert grads.downs is not None
    for ddown, down in zip(grads.downs, downs, strict=True):
        assert torch.equal(ddown, torch.zeros_like(down))
