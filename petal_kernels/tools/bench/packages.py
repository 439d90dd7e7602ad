"""Baselines that need a package: what each computes, whether it is here, and how to get it.

Each is a form of a layer of `layer_forms`, over that layer's own parameters.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.methods.lora import LoraLinear
from petal_kernels.hf.methods.routing import RoutedLinear
from petal_kernels.tools.bench.layer_forms import GatedLayer
from petal_kernels.tools.bench.layer_forms_lora import LoRALayer, LoRALayers
from petal_kernels.tools.bench.model_builders import Subject
from petal_kernels.tools.bench.scenarios import Inputs, Provider


@dataclass(frozen=True)
class Package:
    """Where it comes from, whether it needs a CUDA device, and in what targets it is compared."""

    module: str
    get: str
    cuda: bool
    targets: tuple[str, ...]
    drops: bool = True  # whether it has the layer's dropout

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run here, with what to do about it."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: {self.get}"
        if self.cuda and device.type != "cuda":
            return "its kernels need a CUDA device"
        return None


_LORA = ("lora_linear", "lora_qkv", "lora_mlp", "bart", "llama", "qwen2_5_vl")
PACKAGES = {
    "peft": Package("peft", "pip install peft", False, _LORA),
    "unsloth": Package("unsloth", "pip install unsloth", True, ("lora_linear",), drops=False),
    "lorafusion": Package(
        "lorafusion",
        "pip install git+https://github.com/CentML/lorafusion",
        True,
        ("lora_linear",),
        drops=False,
    ),
    "scattermoe": Package(
        "scattermoe",
        "pip install git+https://github.com/shawntan/scattermoe",
        True,
        ("expert_dispatch",),
    ),
    "liger": Package("liger_kernel", "pip install liger-kernel", True, ("gated_adapter",)),
}


def absent(targets: Sequence[str], device: torch.device, named: Sequence[str]) -> dict[str, str]:
    """The packages that are compared in `targets`, or are asked for by name, and cannot be: why."""
    found = {}
    for name, package in PACKAGES.items():
        if not set(targets) & set(package.targets):
            if name in named:
                found[name] = f"compared in {', '.join(package.targets)} only"
        elif why := package.why_not(device):
            found[name] = why
    return found


def _with_peft(layer: LoRALayers) -> Provider:
    """PEFT's LoRA on the same bases, its weights being copies."""
    bases = nn.ModuleDict({f"base{k}": lora.base for k, lora in enumerate(layer.each())})
    model, factors = _injected(bases, dict(zip(bases, layer.each(), strict=True)))
    linears = [model[name] for name in bases]

    def leaves(inputs: Inputs) -> list[Tensor]:
        return [*inputs.leaves(), *factors]

    return Provider(lambda x: layer.composed(linears, x), leaves)


def _injected(model: nn.Module, places: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """`model` with PEFT's LoRA on the linears at the paths of `places`, of the same rank, scale,
    dropout and values as the update there; its factors, A and B of each."""
    from peft import LoraConfig, inject_adapter_in_model

    first = next(iter(places.values()))
    config = LoraConfig(
        r=first.r,
        lora_alpha=first.scale * first.r,
        lora_dropout=first.dropout,
        target_modules=list(places),
    )
    adapted: Any = inject_adapter_in_model(config, model)
    factors: list[Tensor] = []
    for path, lora in places.items():
        module = adapted.get_submodule(path)
        module.lora_A.float(), module.lora_B.float()  # as get_peft_model does by default
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        with torch.no_grad():
            down.copy_(lora.down)
            up.copy_(lora.up.reshape(up.shape))
        factors += [down, up]
    return adapted, factors


def _factors(layer: LoRALayer) -> tuple[Tensor, Tensor, Tensor]:
    weight: Tensor = layer.lora.base.weight  # type: ignore[assignment]
    return weight, layer.lora.down, layer.lora.up


def _with_unsloth(layer: LoRALayer) -> Provider:
    """Unsloth's autograd function of one linear."""
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    weight, down, up = _factors(layer)
    return _own(layer, lambda x: function.apply(x, weight, None, down, up, layer.lora.scale))


def _with_lorafusion(layer: LoRALayer) -> Provider:
    """LoRAFusion's fused linear as it comes (TMA in its forward: H100 and later)."""
    ops = importlib.import_module("lorafusion.ops.lora_v1")
    weight, down, up = _factors(layer)

    def forward(x: Tensor) -> Tensor:
        a, b = down.to(x.dtype), up.to(x.dtype)
        y: Tensor = ops.fused_linear_lora(x, weight, a, b, layer.lora.scale)
        return y

    return _own(layer, forward)


def _with_liger(layer: GatedLayer) -> Provider:
    """Well-written torch with Liger's LayerNorm: of this layer, Liger has no more."""
    norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    trained = [p for p in layer.parameters() if p.requires_grad]

    def forward(x: Tensor, h: Tensor) -> Tensor:
        y = layer.without_norm(x, h)
        out: Tensor = norm.apply(y, *layer.norm_weights(y), layer.norm.eps)
        return out

    return Provider(forward, lambda inputs: [*inputs.leaves(), *trained])


def _own(layer: LoRALayer, forward: Callable[[Tensor], Tensor]) -> Provider:
    trained = (layer.lora.down, layer.lora.up)
    return Provider(lambda x: forward(x), lambda inputs: [*inputs.leaves(), *trained])


FORMS: dict[str, Callable[[Any], Provider]] = {
    "peft": _with_peft,
    "unsloth": _with_unsloth,
    "lorafusion": _with_lorafusion,
    "liger": _with_liger,
}


def peft_like(
    base: Subject, fused: Subject, trained: Sequence[Tensor]
) -> tuple[Subject, list[Tensor]]:
    """PEFT's LoRA in a copy of `base`, on the projections that `fused` adapts and with its values;
    the parameters in the order of `trained`."""
    places = {
        path: module.used()
        for path, module in fused.model.named_modules()
        if isinstance(module, (RoutedLinear, LoraLinear))
    }
    subject = copy.deepcopy(base)
    _, factors = _injected(subject.model, places)
    ours = [t for lora in places.values() for t in (lora.down, lora.up)]
    own = {id(t): factor for t, factor in zip(ours, factors, strict=True)}
    return subject.train(), [own[id(t)] for t in trained]
