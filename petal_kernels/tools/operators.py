"""Operators found by folder, their cases, and one call of an operator with its gradients.

Nothing lists the operators: a folder below ``ops/`` with an ``op.py`` is one. Tests, the benchmark,
the doctor and the GPU suite all walk this.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OPS = Path(__file__).resolve().parent.parent / "ops"


@dataclass(frozen=True)
class Operator:
    """The modules of one operator folder."""

    name: str
    op: ModuleType
    reference: ModuleType
    workload: ModuleType

    @property
    def public(self) -> Any:
        """The function that users call."""
        return getattr(self.op, self.name)

    @property
    def backends(self) -> tuple[Any, ...]:
        """The operator's ``Backend`` rows, in order of preference."""
        found: tuple[Any, ...] = self.op.BACKENDS
        return found

    def module(self, name: str) -> ModuleType | None:
        """A further module of the folder, None where the operator has none of that name."""
        if not (OPS / self.name / f"{name}.py").exists():
            return None
        return importlib.import_module(f"petal_kernels.ops.{self.name}.{name}")


def operators() -> list[Operator]:
    """Every operator, by name."""
    found = []
    for folder in sorted(p.parent for p in OPS.glob("*/op.py")):
        package = f"petal_kernels.ops.{folder.name}"
        modules = (
            importlib.import_module(f"{package}.{m}") for m in ("op", "reference", "workload")
        )
        found.append(Operator(folder.name, *modules))
    return found


def cases() -> list[tuple[Operator, Any]]:
    """Every operator with each of its small cases."""
    return [(op, case) for op in operators() for case in op.workload.CASES]


def backend_names(op: Operator) -> list[str]:
    """Names of the operator's backends."""
    return [b.name for b in op.backends]


def options(op: Operator, case: Any) -> dict[str, Any]:
    """Arguments of the public function that a case asks for and the reference does not know."""
    return dict(getattr(op.workload, "options", lambda _: {})(case))


def map_tensors(inputs: dict[str, Any], f: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """Apply ``f(name, tensor)`` to every floating tensor, inside sequences too."""

    def each(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return f(name, value) if value.is_floating_point() else value
        if isinstance(value, (list, tuple)):
            return [each(name, v) for v in value]
        return value

    return {name: each(name, value) for name, value in inputs.items()}


def leaves(inputs: dict[str, Any], names: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    """The tensors under ``names`` with a label each, in a fixed order."""
    found = []
    for name in names:
        value = inputs.get(name)
        values = value if isinstance(value, (list, tuple)) else [value]
        for i, v in enumerate(values):
            if isinstance(v, Tensor):
                found.append((f"{name}[{i}]" if len(values) > 1 else name, v))
    return found


def trainable(op: Operator, case: Any) -> tuple[str, ...]:
    """The differentiable inputs that this case trains."""
    frozen = getattr(op.workload, "frozen", lambda _: ())(case)
    return tuple(n for n in op.workload.DIFFERENTIABLE if n not in frozen)


def require_grad(inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Make the named tensors leaves that need a gradient; strides are kept."""

    def leaf(name: str, t: Tensor) -> Tensor:
        return t.detach().requires_grad_(name in names)

    return map_tensors(inputs, leaf)


def run(
    function: Any,
    inputs: dict[str, Any],
    names: tuple[str, ...],
    douts: Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[tuple[str, Tensor]]]:
    """Outputs, and the gradients of the named inputs for the output gradients ``douts`` (drawn if
    None)."""
    inputs = require_grad(inputs, names)
    out = function(**inputs, **options)
    outs = [out] if isinstance(out, Tensor) else list(out)
    wanted = leaves(inputs, names)
    if not wanted:
        return outs, []
    if douts is None:
        douts = output_gradients(outs)
    grads = torch.autograd.grad(
        outs,
        [t for _, t in wanted],
        [d.to(o) for d, o in zip(douts, outs, strict=True)],
        allow_unused=True,
    )
    named = [
        (n, torch.zeros_like(t) if g is None else g)
        for (n, t), g in zip(wanted, grads, strict=True)
    ]
    return [o.detach() for o in outs], named


def output_gradients(outs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients to pull back, drawn in fp64 on the CPU: the same for every dtype and device."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outs]
