"""Every operator x backend x case x dtype: outputs and all gradients against the fp64 reference.

The rule and its check of one case are ``petal_kernels/tools/parity.py``, which users run too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.tools import parity
from tests.ops import discovery
from tests.ops.discovery import CASES, OPERATORS

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRID = [
    pytest.param(
        op.name, case, backend, dtype, id=f"{op.name}-{backend}-{case.name}-{str(dtype)[6:]}"
    )
    for op in OPERATORS.values()
    for case in op.workload.CASES
    for backend in discovery.backend_names(op)
    for dtype in DTYPES
]


def check(label: str, got: Tensor, exact: Tensor, plain: Tensor, factor: float) -> None:
    """Raise unless ``got`` is as near to ``exact`` as the rule wants."""
    _, fault = parity.compare(label, got, exact, plain, factor)
    assert fault is None, fault


@pytest.mark.one_in(9, of="-triton-")
@pytest.mark.parametrize(("name", "case", "backend", "dtype"), GRID)
def test_against_fp64(name: str, case: Any, backend: str, dtype: torch.dtype) -> None:
    found = parity.verify(OPERATORS[name], case, backend, dtype, DEVICE)
    if found.refused is not None:
        pytest.skip(found.refused)
    assert found.faults == []


@pytest.mark.parametrize(("name", "case"), CASES)
def test_reference_backward(name: str, case: Any) -> None:
    """The reference's written-out gradients are autograd's, in fp64."""
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float64)
    names = discovery.trainable(op, case)
    outs, grads = discovery.run(op.reference.forward, inputs, names)
    if not outs or outs[0].numel() == 0:
        pytest.skip("nothing to compare")
    douts = [d.to(o) for d, o in zip(discovery.output_gradients(outs), outs, strict=True)]
    explicit = op.reference.backward(
        douts if len(douts) > 1 or name == "lowrank_linear" else douts[0], **inputs
    )
    found = discovery.leaves(explicit, names)
    assert [n for n, _ in found] == [n for n, _ in grads]
    for (label, want), (_, got) in zip(grads, found, strict=True):
        torch.testing.assert_close(got, want, msg=discovery.labelled(label))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_inference_equals_training_forward(name: str, case: Any) -> None:
    """Without gradients (and with it another plan, perhaps) the outputs are the same function."""
    op = OPERATORS[name]
    inputs = op.workload.make_inputs(case, torch.float32, DEVICE)
    with torch.no_grad():
        quiet = op.public(**inputs)
        exact = op.reference.forward(**discovery.map_tensors(inputs, lambda _, t: t.double()))
        plain = op.reference.forward(**inputs)
    quiet = [quiet] if isinstance(quiet, Tensor) else quiet
    for i, (g, e, p) in enumerate(zip(quiet, exact, plain, strict=True)):
        check(f"output {i}", g, e, p, 3.0)
