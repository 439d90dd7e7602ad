"""Bytes kept for backward by self-attention's q, k and v, fused against published, parameters
excluded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from petal_kernels.nn.frozen_linear import frozen_lowrank
from petal_kernels.nn.mode_approximation import ModeApproximation
from petal_kernels.nn.published import published_mode
from petal_kernels.tools.bench.counting import saved_bytes

N, D, R = 4096, 768, 64


def q_k_v(
    dtype: torch.dtype, autocast: bool
) -> tuple[dict[str, Callable[[], object]], Sequence[Tensor]]:
    torch.manual_seed(0)
    factors = ModeApproximation(D, D, R, 3, core="tucker", dropout=0.1)
    bases = [nn.Linear(D, D).to(dtype).requires_grad_(False) for _ in range(3)]
    drop = nn.Dropout(0.1)
    # A LayerNorm's output under autocast: float32, with a graph behind it.
    x = torch.randn(1, D, requires_grad=True).expand(N, D) * torch.ones(N, 1)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    def fused() -> object:
        with context:
            ups = factors.contract(dtype=torch.bfloat16 if autocast else dtype)
            return frozen_lowrank(x, bases, factors.down, ups, dropout=0.1, training=True)

    def eager() -> object:
        with context:
            return [base(x) + published_mode(factors, k, x, drop) for k, base in enumerate(bases)]

    parameters = [*factors.parameters(), *(p for b in bases for p in b.parameters())]
    return {"fused": fused, "published": eager}, parameters


@pytest.mark.parametrize(
    ("dtype", "autocast", "limit"),
    [(torch.float32, False, 0.68), (torch.bfloat16, True, 0.4)],
    ids=["float32", "bfloat16-autocast"],
)
def test_against_the_published_form(dtype: torch.dtype, autocast: bool, limit: float) -> None:
    forwards, parameters = q_k_v(dtype, autocast)
    saved = {name: saved_bytes(forward, parameters) for name, forward in forwards.items()}
    assert saved["fused"] <= limit * saved["published"], saved


def test_the_fused_form_keeps_x_once_h_and_the_folded_projections() -> None:
    forwards, parameters = q_k_v(torch.bfloat16, True)
    x, h, folded, state = N * D, N * R, 3 * D * R, 16
    # Under autocast the bf16 copies of x and of U are kept; V, C and p are parameters.
    assert saved_bytes(forwards["fused"], parameters) == 2 * (x + h + folded) + state
