"""The memory profiler's estimate against the allocator: a training step of each operator, and of
plain attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.journal import Journal, Record
from benchmarks.gpu.suite import Case, Suite
from petal_kernels import memory
from petal_kernels.tools import operators

SHARE, LIMIT, PARALLEL, CHECKS = 2.0, 120.0, False, False
_PLAIN = "transformer layer"


def cases(suite: Suite, journal: Journal) -> list[Case]:
    """Per operator the first shape, published form and ours; a transformer layer."""
    found = []
    for op in suite.operators():
        shape = suite.shapes(op)[0]
        for form in ("published", "fused"):
            of = {"op": op.name, "shape": shape.name, "dtype": suite.dtype, "form": form}
            found.append({"id": f"memory/{op.name}/{form}/{shape.name}", **of})
    return [*found, {"id": f"memory/{_PLAIN}", "form": _PLAIN}]


def _operator(case: Case, suite: Suite) -> tuple[Callable[[], Any], list[Tensor]]:
    op, shape = suite.shape(case)
    names = operators.trainable(op, shape)
    inputs = operators.require_grad(suite.inputs(case), names)
    inputs.pop("rng", None)
    forward = op.public if case["form"] == "fused" else op.workload.BASELINES["published"]
    return lambda: forward(**inputs), [t for _, t in operators.leaves(inputs, tuple(inputs))]


def _layer(suite: Suite) -> tuple[Callable[[], Any], list[Tensor]]:
    width, rows = (32, (2, 8)) if suite.dry else (768, (32, 128))
    layer = nn.TransformerEncoderLayer(width, 4, batch_first=True).to(suite.device)
    x = torch.randn(*rows, width, device=suite.device)
    return lambda: layer(x), [x, *layer.parameters()]


def run(case: Case, suite: Suite) -> dict[str, Any]:
    """The profiler's figures beside the allocator's for the same step without it."""
    forward, own = _layer(suite) if case["form"] == _PLAIN else _operator(case, suite)
    found = memory.profile(forward, parameters=own)
    result: dict[str, Any] = {"saved_bytes": found.saved_bytes, "peak_bytes": found.peak_bytes}
    if suite.dry:
        return result
    _backward(forward, own)  # library workspaces are allocated once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    fixed = sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}.values()
    )
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    result["held_after_forward"] = torch.cuda.memory_allocated() - before
    del out
    _backward(forward, own)
    result["allocator_peak"] = torch.cuda.max_memory_allocated() - before + fixed
    result["margin"] = round(found.peak_bytes / result["allocator_peak"] - 1.0, 4)
    return result


def _backward(forward: Callable[[], Any], own: list[Tensor]) -> None:
    out = forward()
    outs = [out] if isinstance(out, Tensor) else list(out)
    total = torch.stack([o.float().sum() for o in outs]).sum()
    total.backward()
    for t in own:
        t.grad = None


def report(records: list[Record]) -> list[str]:
    """A row per step."""
    lines = [
        "| step | saved MB | estimated peak MB | allocator MB | margin |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in records:
        if "peak_bytes" in r:
            real = r.get("allocator_peak")
            measured = f"{real / 1e6:.1f} | {100 * r['margin']:+.1f} %" if real else " | "
            name = " ".join(filter(None, (r.get("op"), r["form"], r.get("shape"))))
            saved, peak = r["saved_bytes"] / 1e6, r["peak_bytes"] / 1e6
            lines.append(f"| {name} | {saved:.1f} | {peak:.1f} | {measured} |")
    return lines
