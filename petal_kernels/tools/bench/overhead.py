"""Host time of a tiny call: nothing but the path from a module, or the public function, to the
kernel; of LoRA beside the published form, the plain torch that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import petal_kernels as pk
from petal_kernels.ops.lowrank_linear.arguments import Call, Settings, Tensors
from petal_kernels.tools.bench import op, timing
from petal_kernels.tools.bench.layer_forms import LayerCase
from petal_kernels.tools.bench.layer_forms_lora import LoRALayer, LoRALayers, LoRAMlp, LoRAQKV
from petal_kernels.tools.bench.request import Request
from petal_kernels.tools.bench.timing import Step

CALLS = 200
LAYERS: dict[str, type[LoRALayers]] = {"linear": LoRALayer, "q, k, v": LoRAQKV, "MLP": LoRAMlp}


def steps(device: torch.device, calls: int = CALLS) -> dict[str, Step]:
    """One row of 16 values through the raw backend, and through the public function without and
    with a gradient."""
    x, u = torch.ones(1, 16, device=device), torch.ones(4, 16, device=device)
    ups, base = [torch.ones(16, 4, device=device)], [torch.ones(1, 16, device=device)]
    trained = x.clone().requires_grad_()
    name = next(
        b
        for b, why in pk.explain(pk.lowrank_linear, x, u, ups, base=base).rows
        if not why and b != "triton"
    )
    impl = next(b for b in op.operator("lowrank_linear").backends if b.name == name).load()
    call = Call(Tensors(x, [u], None, ups, [], [], base, None), Settings([1.0], 0.0, "bottleneck"))

    def repeat(f: Callable[[], object]) -> Step:
        return _repeat(f, calls)

    return {
        f"raw {name}": repeat(lambda: impl.forward(call, None, "update")),
        "public, no grad": repeat(lambda: pk.lowrank_linear(x, u, ups, base=base)),
        "public, grad": repeat(lambda: pk.lowrank_linear(trained, u, ups, base=base)),
    }


def _repeat(f: Callable[[], object], calls: int) -> Step:
    def run(_: object) -> None:
        for _ in range(calls):
            f()

    return Step(run, calls=calls)


def layer_steps(device: torch.device, calls: int = CALLS) -> dict[str, Step]:
    """LoRA with dropout on four rows of 64 values, forward alone and with its backward."""
    found = {}
    for name, kind in LAYERS.items():
        layer = kind(LayerCase(name, 1, 4, 64, 8, "0.05"), torch.float32).to(device)
        x = torch.ones(1, 4, 64, device=device)
        for form in ("published", "petal"):
            forward, backward = _passes(getattr(layer, form), x)
            found[f"{name} {form}"] = _repeat(forward, calls)
            found[f"{name} {form}, trained"] = _repeat(backward, calls)
    return found


def _passes(form: Callable[..., Any], x: torch.Tensor) -> tuple[Callable[[], object], ...]:
    def both() -> None:
        y = form(x)
        ys = y if isinstance(y, (list, tuple)) else [y]
        torch.autograd.backward(ys, [torch.ones_like(each) for each in ys])

    return (lambda: form(x)), both


def bench(request: Request) -> Iterator[dict[str, Any]]:
    """Print and give microseconds per call."""
    everything = steps(request.device) | layer_steps(request.device)
    rows = timing.compare(everything, request.device, request.rounds)
    print("\nhost overhead of one call of lowrank_linear, and of layers, microseconds")
    micro = {label: round(t.median * 1e3, 2) for label, t in rows.items()}
    for label, value in micro.items():
        print(f"  {label:<28}{value:8.1f}")
    noise = round(timing.drift(rows), 4)
    yield {"scenario": "host overhead", "microseconds": micro, "drift": noise}
