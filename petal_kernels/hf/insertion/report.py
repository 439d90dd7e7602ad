"""The rows of an insertion method's report."""

from __future__ import annotations

import torch
from torch import nn

from petal_kernels._runtime.backends import explain
from petal_kernels.hf.experts import expert_row
from petal_kernels.hf.insertion.layers import InsertionAdapter
from petal_kernels.hf.insertion.specs import Found
from petal_kernels.hf.report import Report, Row, choice_in_words, finish
from petal_kernels.nn.experts import LowRankExperts
from petal_kernels.nn.gated_adapter import GatedAdapter
from petal_kernels.nn.routed_lora import RoutedLoRALinear
from petal_kernels.ops.gated_bottleneck import gated_bottleneck

_TYPICAL_ROWS = 1024


def make_report(
    model: nn.Module,
    adapter: InsertionAdapter,
    extra: dict[str, nn.Module],
    found: Found,
    modules: dict[str, nn.Module],
    implementation: str,
) -> Report:
    """The report of an attachment, as it would run now; `modules` are the adapters by path."""
    backend, why = "eager", "eager: the published form, one step at a time"
    if implementation == "fused":
        backend, why = _backend(adapter)
    rows, seen = [], set()
    for insertion in found.insertions:
        module = modules.get(insertion.path)
        if isinstance(module, LowRankExperts):
            at = insertion.path, insertion.role
            rows.append(expert_row(*at, module, implementation, insertion.module))
            continue
        count = 0
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        shape = _shape(module)
        rows.append(Row(insertion.path, insertion.role, shape, backend, why, count))
    if adapter.value is not None:
        value = adapter.value
        count = sum(p.numel() for p in value.parameters() if p.requires_grad)
        shape = f"{value.layers} x {value.in_features} -> {value.out_features}, r {value.r}"
        rows.append(Row("petal.value", "value adapters", shape, "", "", count))
    return finish(rows, model, adapter, extra, implementation, {})


def _shape(module: nn.Module | None) -> str:
    if isinstance(module, GatedAdapter):
        parts = [f"{module.features}, r {module.r}"]
        parts += [f"gate {module.gate}"] if module.gate != "none" else []
        parts += [f"route {module.route}"] if module.route != "none" else []
        return ", ".join(parts)
    if isinstance(module, RoutedLoRALinear):
        return f"{module.in_features} -> {module.out_features}, r {module.r}, {module.route}"
    return "shared product"


def _backend(adapter: InsertionAdapter) -> tuple[str, str]:
    """The backend that a typical call runs on, and why not a preferred one."""
    some = next(adapter.parameters())
    x = torch.empty(_TYPICAL_ROWS, 64, device=some.device)
    down, up = (torch.empty(s, device=some.device) for s in ((16, 64), (64, 16)))
    try:
        return choice_in_words(explain(gated_bottleneck, x, down, up))
    except RuntimeError as error:  # a backend asked for by name that cannot run here
        return "none", str(error)
