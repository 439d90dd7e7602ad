"""Bytes that an eager call moves, operator by operator; and the call of routing LoRA on GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petal_kernels.nn.routed_lora import RoutedLoRALinear
from petal_kernels.ops.gated_bottleneck import function, workload

# A kernel's arguments to the tensors that it reads and those that it writes.
Operands = Callable[..., tuple[Iterable[Any], Iterable[Any]]]


def _storages(values: Iterable[Any]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in values if isinstance(t, Tensor)}


class Traffic(TorchDispatchMode):
    """Sums the bytes of every tensor that an operator reads or writes, once per operator.

    Views move nothing, parameters are left out, and so is what reads the frozen `base`. Inside
    `gated_bottleneck`'s update the operators are seen where `kernels` says what they read and
    write; without it nothing inside is counted.
    """

    def __init__(self, module: nn.Module, base: nn.Module, kernels: Mapping[str, Operands]) -> None:
        super().__init__()
        self.bytes, self.kernels = 0, kernels
        self.parameters, self.frozen = (_storages(m.parameters()) for m in (module, base))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is function.update_op and self.kernels:
            with self:
                return function._update(*args)(*args)
        out = func(*args, **(kwargs or {}))
        if func is not function.update_op:
            operands = self.operands(func._schema, args, tree_leaves((args, kwargs)), out)
            tensors = [t for t in operands if isinstance(t, Tensor)]
            self.bytes += sum(t.nbytes for t in tensors if not _storages([t]) & self.parameters)
        return out

    def operands(self, schema: Any, args: Any, given: list[Any], out: Any) -> list[Any]:
        """What one operator reads, then what it writes."""
        if schema.name in self.kernels:
            reads, writes = self.kernels[schema.name](*args)
            return [*reads, *writes]
        found = tree_leaves(out)
        view = not schema.is_mutable and _storages(given) & _storages(found)
        if view or "empty" in schema.name or self.frozen & _storages(given):
            return []
        return [*given, *found]


class RoutedProjection:
    """GPT-2's fused c_attn, q and v updated in place, rank and width as published; V = 1."""

    samples, length, width, rank = 2, 51, 768, 128

    def __init__(self, route: str) -> None:
        self.route = route
        torch.manual_seed(0)
        base = nn.Linear(self.width, 3 * self.width).requires_grad_(False)
        self.lora = RoutedLoRALinear(base, self.rank, route, parts=3, targets=(0, 2))
        nn.init.normal_(self.lora.up)
        self.x = torch.randn(self.samples, self.length, self.width, requires_grad=True)
        with torch.no_grad():
            self.vision = self.lora.project(torch.randn(self.samples, 1, self.width))

    def count(self, kernels: Mapping[str, Operands]) -> int:
        """Bytes that forward moves beyond the base, by library operators and `kernels`."""
        with Traffic(self.lora, self.lora.base, kernels) as traffic:
            self.lora(self.x, self.vision)
        return traffic.bytes

    def check(self, moved: int) -> None:
        """At most 6 N d, and as the workload says."""
        assert moved <= 6 * self.unit, f"{moved / self.unit:.2f} N d"
        want = self.least
        assert abs(moved - want) <= 0.02 * want, f"{moved} bytes, not {want}"

    @property
    def unit(self) -> int:
        """N d values."""
        return self.samples * self.length * self.width * self.x.itemsize

    @property
    def least(self) -> int:
        """x once, the middle of both updates written, then what the operator says of each."""
        case = workload.Case(
            "c_attn",
            (self.samples, self.length),
            self.width,
            self.rank,
            base="given",
            bottleneck=True,
            activation="identity",
            route=self.route,
            bias=False,
        )
        middle = 2 * case.rows * self.rank * self.x.itemsize
        return self.unit + middle + 2 * workload.bytes_moved(case, self.x.dtype)[0]
