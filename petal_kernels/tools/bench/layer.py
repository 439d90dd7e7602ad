"""Scenarios of whole layers: every form of `layer_forms` over one set of parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.tools.bench import packages
from petal_kernels.tools.bench.correctness import Results
from petal_kernels.tools.bench.fresh import Fresh
from petal_kernels.tools.bench.layer_forms import (
    ExpertsLayer,
    GatedLayer,
    Layer,
    LayerCase,
    PetalQKV,
    RoutedLayer,
)
from petal_kernels.tools.bench.layer_forms_lora import LoRALayer, LoRAMlp, LoRAQKV
from petal_kernels.tools.bench.op import Oracle, run
from petal_kernels.tools.bench.request import Request, covered
from petal_kernels.tools.bench.scenarios import Check, Forward, Inputs, Provider, Scenario

LAYERS: dict[str, tuple[type[Layer], tuple[LayerCase, ...]]] = {
    "petal_qkv": (
        PetalQKV,
        (
            LayerCase("adapter part, base outputs given", 64, 64, 768, 64, "given"),
            LayerCase("whole layer", 64, 64, 768, 64),
        ),
    ),
    "gated_adapter": (
        GatedLayer,
        (
            LayerCase("VL-PET large", 50, 128, 768, 96, "large"),
            LayerCase("VL-PET middleX", 50, 128, 768, 96, "middleX"),
            LayerCase("VL-PET small", 50, 128, 768, 96, "small"),
            LayerCase("VL-Adapter", 50, 128, 768, 96, "none"),
        ),
    ),
    "routed_lora": (
        RoutedLayer,
        (
            LayerCase("GPT-2 mul", 40, 51, 768, 128, "mul 1"),
            LayerCase("GPT-2 gram, 197 image tokens", 40, 51, 768, 128, "gram 197"),
        ),
    ),
    "lora_linear": (
        LoRALayer,
        (
            LayerCase("LoRA, width 2048", 4, 512, 2048, 16),
            LayerCase("LoRA, width 2048, dropout 0.05", 4, 512, 2048, 16, "0.05"),
            LayerCase("LoRA, width 4096", 4, 512, 4096, 16),
        ),
    ),
    "lora_qkv": (
        LoRAQKV,
        (
            LayerCase("q, k, v, width 2048", 4, 512, 2048, 16),
            LayerCase("q, k, v, width 2048, dropout 0.05", 4, 512, 2048, 16, "0.05"),
        ),
    ),
    "lora_mlp": (
        LoRAMlp,
        (
            LayerCase("MLP, width 1024", 4, 256, 1024, 16),
            LayerCase("MLP, width 1024, dropout 0.05", 4, 256, 1024, 16, "0.05"),
        ),
    ),
    "instruction_experts": (
        ExpertsLayer,
        (
            LayerCase("softmax over 6", 128, 32, 768, 64, "softmax"),
            LayerCase("mean of 6", 128, 32, 768, 64, "mean"),
        ),
    ),
}


def names() -> list[str]:
    """Every layer."""
    return list(LAYERS)


def on_backend(forward: Callable[..., Any], backend: str) -> Forward:
    """The forward with another default backend; its backward takes the same."""

    def run_on(**arguments: Any) -> Any:
        with pk.use_backend(backend):
            return forward(**arguments)

    return run_on


def _inputs(layer: Layer, request: Request) -> Inputs:
    g = torch.Generator().manual_seed(1)
    rows = {
        name: t.to(request.device, request.dtype).requires_grad_()
        for name, t in layer.inputs(g).items()
    }
    with torch.no_grad():
        out = layer.published(**rows)
    outs = [out] if isinstance(out, Tensor) else out
    douts = [torch.randn(o.shape, generator=g).to(o) for o in outs]
    return Inputs(rows, tuple(rows), douts)


def _trained(layer: Layer) -> list[Tensor]:
    return [p for p in layer.parameters() if p.requires_grad]


def _oracle(layer: Layer, inputs: Inputs, fresh: Fresh) -> Callable[[Provider], Check]:
    """Checks with dropout off: the forms draw their masks from different generators."""

    def results(of: Layer, provider: Provider, given: Inputs, gradients: bool = True) -> Results:
        of.eval()
        try:
            return run(provider.forward, given, provider.leaves(given), gradients)
        finally:
            of.train()

    def published(of: Layer, given: Inputs) -> Results:
        trained = _trained(of)
        own = Provider(of.published, lambda i: [*i.leaves(), *trained])
        return results(of, own, given)

    oracle = Oracle(
        lambda: published(copy.deepcopy(layer).double(), inputs.map(Tensor.double)),
        lambda: published(layer, inputs),
        fresh=fresh,
    )
    return lambda provider: oracle(functools.partial(results, layer, provider, inputs))


def build(
    name: str, case: LayerCase, request: Request, shape: str, value: float | None
) -> Scenario:
    """One layer at one size."""
    torch.manual_seed(0)
    layer = LAYERS[name][0](case, request.dtype).to(request.device).train()
    inputs = _inputs(layer, request)
    trained = _trained(layer)
    fresh = Fresh([*inputs.leaves(), *inputs.douts])
    check = _oracle(layer, inputs, fresh)
    providers: dict[str, Provider] = {}

    def add(label: str, provider: Provider) -> None:
        if not provider.floor:
            provider.check = check(provider)
        providers[label] = provider

    def own(forward: Forward) -> Provider:
        return Provider(forward, lambda i: [*i.leaves(), *trained])

    for form in ("published", "eager"):
        if form in layer.forms and request.wants(form):
            add(form, own(getattr(layer, form)))
    if request.wants("compile"):
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        compiled = torch.compile(layer.published, dynamic=False)
        add("compile", replace(own(compiled), compiled=True))
    for package, found in packages.PACKAGES.items():
        offered = package in packages.FORMS
        offered &= found.offers(name, getattr(layer, "dropout", 0.0), request.dtype)
        if offered and request.wants(package) and not found.why_not(request.device):
            add(package, packages.FORMS[package](layer))
    if "base" in layer.forms and request.wants("base"):
        add("base", replace(own(layer.base), floor=True))
    for backend in request.backends or ("",):
        forward = on_backend(layer.petal, backend) if backend else layer.petal
        add(f"petal {backend}".strip(), replace(own(forward), ours=True, chosen=True))
    arguments = ["layer", name, "--shape", shape]
    if value is not None:
        arguments += ["--sweep", str(request.sweep), "--values", str(int(value))]
    size = f"B={case.batch} L={case.tokens} d={case.width} r={case.rank}"
    return Scenario(
        f"{name} {shape}, {size}",
        inputs,
        providers,
        arguments,
        layer.moved(request.dtype),
        layer.work(),
        list(layer.parameters()),
        value,
        fresh=fresh,
    )


def scenarios(wanted: Sequence[str], request: Request) -> Iterator[Callable[[], Scenario]]:
    """What builds each scenario, one at a time."""
    for name in wanted:
        shapes = [s for s in LAYERS[name][1] if request.matches(s.name)]
        shapes = [s for s in shapes if s.name == request.shape] or shapes
        for shape in shapes:
            for case, value in covered(shape, request):
                yield functools.partial(build, name, case, request, shape.name, value)
