"""Who writes into whose memory: no operator into its inputs; whoever gets a result, into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import discovery
from tests.ops.discovery import OPERATORS, SMALL, runnable


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_a_result_may_be_written_in_place(name: str, case: Any) -> None:
    """As models do with what a linear gives (`q *= scale`): autograd refuses it for views that a
    Function made."""
    op = OPERATORS[name]
    names = discovery.trainable(op, case)
    for backend in runnable(op, case):
        grads = []
        for in_place in (False, True):
            inputs = discovery.require_grad(op.workload.make_inputs(case, torch.float32), names)
            out = op.public(**inputs, backend=backend)
            outs = [o for o in ([out] if isinstance(out, Tensor) else out) if o.requires_grad]
            scaled = [o.mul_(0.5) if in_place else o * 0.5 for o in outs]
            wanted = [t for _, t in discovery.leaves(inputs, names)]
            grads.append(torch.autograd.grad([o.square().sum() for o in scaled], wanted))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b), backend


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_inputs_are_not_written(name: str, case: Any) -> None:
    op = OPERATORS[name]
    for backend in runnable(op, case):
        inputs = op.workload.make_inputs(case, torch.float32)
        before = discovery.map_tensors(inputs, lambda _, t: t.clone())
        discovery.run(op.public, inputs, discovery.trainable(op, case), backend=backend)
        everything = tuple(inputs)
        for (label, a), (_, b) in zip(
            discovery.leaves(inputs, everything), discovery.leaves(before, everything), strict=True
        ):
            assert torch.equal(a, b), f"{backend} wrote into {label}"
