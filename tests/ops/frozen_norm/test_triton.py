"""What the general suite cannot see in ``frozen_norm``'s Triton kernels: traffic, double writes,
program order.

Runs in the interpreter; numerics over the shape grid are in ``test_ops.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from petal_kernels._runtime import device
from tests.ops import triton_audit

if device.triton_reason() is not None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from petal_kernels.ops.frozen_norm import torch_impl, triton_configs, triton_impl
from petal_kernels.ops.frozen_norm.arguments import KINDS, Call, moments_per_row
from tests.ops.interpreted import clean, expect, normal

triton_audit.hasten_interpreter()

pytestmark = pytest.mark.usefixtures("poisoned")

N, D = 70, 150  # ragged tiles of both


def call(kind: str) -> Call:
    bias = normal(D, seed=3) if kind == "layer" else None
    return Call(normal(N, D), normal(D, seed=2), bias, kind, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_traffic(kind: str) -> None:
    """Each row once each way, the moments once."""
    with triton_audit.Audit() as audit:
        y, moments = triton_impl.forward(call(kind))
        triton_impl.backward(call(kind), moments, y)
    clean(audit)
    rows, few = N * D * 4, N * moments_per_row(kind) * 4
    vectors = (2 if kind == "layer" else 1) * D * 4
    expect(audit, "_fwd", 2 * rows + few + vectors)
    expect(audit, "_bwd", 3 * rows + few + D * 4)
    assert audit.of("_fwd")[0].grid[0] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_rounds_where_torch_does(kind: str) -> None:
    """A rounding more or less would move a tenth of the bits and no error much."""
    x, weight, bias, _, eps = call(kind)
    assert weight is not None
    of = Call(x.half(), weight.half(), None if bias is None else bias.half(), kind, eps)
    same = triton_impl.forward(of)[0] == torch_impl.forward(of)[0]
    assert float(same.float().mean()) > 0.99


def test_a_large_mean_leaves_no_trace_behind_the_last_column() -> None:
    """Where nothing is read, zero less the mean, by the deviation, is beyond float32."""
    of = Call(torch.full((5, D), 2.0**117), normal(D), None, "layer", 1e-12)
    y, moments = triton_impl.forward(of)
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(triton_impl.backward(of, moments, normal(5, D))).all())


def everything(kind: str) -> list[Tensor]:
    y, moments = triton_impl.forward(call(kind))
    return [y, moments, triton_impl.backward(call(kind), moments, normal(N, D, seed=4))]


@pytest.mark.parametrize("kind", KINDS)
def test_program_order_changes_no_bit(kind: str) -> None:
    first = everything(kind)
    with triton_audit.Audit(reverse=True):
        second = everything(kind)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_kind_is_in_the_table() -> None:
    """With the switches that a call of it has."""
    for kind in KINDS:
        of = call(kind)
        want = {"CENTERED": of.centered, "ROUNDED": of.rounded, "OFFSET": of.offset}
        forms = [s for s in triton_configs.shipped_configs() if s.name.split()[-1] == kind]
        assert len(forms) == 2 * 2 * 3
        for form in forms:
            assert (
                form.constexprs.items()
                >= {k: v for k, v in want.items() if k in form.kernel.arg_names}.items()
            )
