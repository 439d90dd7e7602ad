"""``expert_dispatch``'s CUDA sort, executed on the CPU under the emulation of tests/emulation."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.ops.expert_dispatch import routing
from tests.emulation.support import needs_compiler

pytest_plugins = ["tests.emulation.plugin"]
pytestmark = needs_compiler

COUNTS = (1, 5, 127, 1024, 1025, 2500)


def choice(kind: str, n: int, e: int, k: int) -> Tensor:
    """bool [n, e], at most k of a row."""
    g = torch.Generator().manual_seed(n)
    weight = torch.rand(n, e, generator=g)
    if kind == "zipf":
        weight = weight.log() * torch.arange(1, e + 1)
    if kind == "one":
        weight[:, e - 1], k = 2.0, 1
    chosen = torch.zeros(n, e, dtype=torch.bool)
    chosen.scatter_(1, weight.topk(min(k, e)).indices, True)
    if kind == "holes":
        chosen[:, ::2] = False
    return chosen & (kind != "nobody")


def sort(ops: Any, chosen: Tensor, n: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    e = chosen.shape[1]
    order, offsets = (torch.full((m,), -5, dtype=torch.int32) for m in (slots, e + 1))
    inverse = torch.full((n, e), -7, dtype=torch.int32)
    ops.expert_dispatch_fwd_sort(chosen, order, offsets, inverse)
    return order, offsets, inverse


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one", "holes", "nobody", "all"])
def test_sort(kind: str, emulated: Any, lib: ctypes.CDLL) -> None:
    for i, n in enumerate(COUNTS):
        lib.petal_emulation_configure(i, 3 * i, 4)
        e, k = (9, 9) if kind == "all" else (11, 3)
        chosen = choice(kind, n, e, k)
        order, offsets, inverse = sort(emulated, chosen, n, n * k)
        want = routing.sort_by_expert(chosen, n * k)
        assert torch.equal(order, want[0])
        assert torch.equal(offsets, want[1])
        slots = torch.arange(int(offsets[-1]), dtype=torch.int32)
        expert = torch.searchsorted(offsets[1:], slots, right=True)
        want_inverse = torch.full_like(inverse, -7)
        want_inverse[order[: len(slots)].long(), expert] = slots
        assert torch.equal(inverse, want_inverse)
        again = torch.full_like(inverse, -7)
        emulated.expert_dispatch_bwd_invert(order, offsets, again)
        assert torch.equal(again, want_inverse)


def test_sort_of_samples(emulated: Any) -> None:
    rows = choice("uniform", 7, 64, 5)
    order, offsets, _ = sort(emulated, rows, 7 * 150, 7 * 150 * 5)
    want = routing.sort_by_expert(rows.repeat_interleave(150, 0), 7 * 150 * 5)
    assert torch.equal(order, want[0])
    assert torch.equal(offsets, want[1])
