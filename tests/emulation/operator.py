"""A whole operator over its emulated CUDA kernels: cuda_impl takes the torch backend's place, so
plumbing and kernels are tested together."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels.tools import parity
from tests.emulation.support import DTYPES
from tests.ops import discovery


class Emulated:
    """One operator, found by its folder's name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.op, self.cuda, self.torch, self.reference, self.workload = (
            importlib.import_module(f"petal_kernels.ops.{name}.{module}")
            for module in ("op", "cuda_impl", "torch_impl", "reference", "workload")
        )

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Backend "cuda" in place of backend "torch"; a split for every 32 rows."""
        monkeypatch.setattr(self.cuda, "ROWS_PER_SPLIT", 32, raising=False)
        monkeypatch.setattr(self.torch, "forward", self.cuda.forward)
        monkeypatch.setattr(self.torch, "backward", self.cuda.backward)

    def trained(self, case: Any) -> tuple[str, ...]:
        """The inputs that need a gradient."""
        return tuple(n for n in self.workload.DIFFERENTIABLE if n not in case.frozen)

    def run(
        self,
        inputs: dict[str, Any],
        names: tuple[str, ...],
        douts: list[Tensor] | None = None,
        **given: Any,
    ) -> dict[str, Tensor]:
        """The output and the gradients by name."""
        public = getattr(self.op, self.name)
        outs, grads = discovery.run(public, inputs, names, douts, backend="torch", **given)
        return {"out": outs[0], **dict(grads)}

    def compare(self, case: Any, dtype: torch.dtype, **given: Any) -> None:
        """Output and gradients against the fp64 reference, by the rule of every backend."""
        inputs, names = self.workload.make_inputs(case, dtype), self.trained(case)
        exact_in = discovery.map_tensors(inputs, lambda _, t: t.double())
        forward = self.reference.forward
        outs, _ = discovery.run(forward, exact_in, names)
        douts = [d.to(dtype) for d in discovery.output_gradients(outs)]
        exact, exact_grads = discovery.run(forward, exact_in, names, douts)
        plain, plain_grads = discovery.run(forward, inputs, names, douts)
        got = self.run(inputs, names, douts, **given)
        rows = [("out", exact[0], plain[0], parity.OUTPUT_FACTOR)]
        for (name, e), (_, p) in zip(exact_grads, plain_grads, strict=True):
            rows.append((name, e, p, parity.GRADIENT_FACTOR))
        faults = [parity.compare(name, got[name], e, p, factor)[1] for name, e, p, factor in rows]
        assert not any(faults), [fault for fault in faults if fault]


def with_dtypes(cases: Sequence[Any]) -> list[Any]:
    """Every case in every dtype; in one of them, by turns, in the quick run too."""
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case.name}-{str(dtype)[6:]}",
            marks=[] if i % 3 == j else [pytest.mark.slow],
        )
        for i, case in enumerate(cases)
        for j, dtype in enumerate(DTYPES)
    ]


def bad(call: Callable[[], object], text: str) -> None:
    """The call refuses with this text."""
    with pytest.raises(RuntimeError, match=text):
        call()
