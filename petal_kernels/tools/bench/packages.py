"""Baselines that need a package: what each computes, whether it is here, and how to get it.

Each is a form of a layer of `layer_forms`, over that layer's own parameters.
"""

from __future__ import annotations

import copy
import functools
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
from petal_kernels.tools.bench.layer_forms_lora import LoRALayer, LoRALayers, LoRAMlp, LoRAQKV
from petal_kernels.tools.bench.model_builders import Subject
from petal_kernels.tools.bench.scenarios import Forward, Inputs, Provider


@dataclass(frozen=True)
class Package:
    """Where it comes from, whether it needs a CUDA device, and in what targets it is compared."""

    module: str
    get: str
    cuda: bool
    targets: tuple[str, ...]
    drops: bool = True  # whether it has the layer's dropout
    half: bool = False  # whether it is something of its own beside 16-bit bases alone

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run here, with what to do about it."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: {self.get}"
        if self.cuda and device.type != "cuda":
            return "its kernels need a CUDA device"
        return None

    def offers(self, target: str, dropout: float, dtype: torch.dtype) -> bool:
        """Whether it has a form of a layer or model."""
        half = not self.half or dtype.itemsize == 2
        return target in self.targets and (self.drops or not dropout) and half


_LORA = ("lora_linear", "lora_qkv", "lora_mlp")
_PEFT = (*_LORA, "bart", "llama", "qwen2_5_vl")
PACKAGES = {
    # With float32 factors, its default whatever the base's dtype is, and with factors of that.
    "peft": Package("peft", "pip install peft", False, _PEFT),
    "peft_half": Package("peft", "pip install peft", False, _PEFT, half=True),
    "unsloth": Package("unsloth", "pip install unsloth", True, _LORA, drops=False),
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
    "liger": Package(
        "liger_kernel", "pip install liger-kernel", True, ("gated_adapter", "lora_mlp")
    ),
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


def _with_peft(layer: LoRALayers, half: bool = False) -> Provider:
    """PEFT's LoRA on the same bases, its weights being copies."""
    bases = nn.ModuleDict({f"base{k}": lora.base for k, lora in enumerate(layer.each())})
    model, factors = _injected(bases, dict(zip(bases, layer.each(), strict=True)), half)
    linears = [model[name] for name in bases]

    def leaves(inputs: Inputs) -> list[Tensor]:
        return [*inputs.leaves(), *factors]

    def forward(x: Tensor) -> Tensor | list[Tensor]:
        if model.training != layer.training:  # its dropout is no module of the layer's
            model.train(layer.training)
        return layer.composed(linears, x)

    return Provider(forward, leaves)


def _injected(model: nn.Module, places: Mapping[str, Any], half: bool) -> tuple[Any, list[Tensor]]:
    """`model` with PEFT's LoRA on the linears at the paths of `places`, of the same rank, scale,
    dropout and values as the update there; its factors, A and B of each, in float32 as
    get_peft_model makes them, or (`half`) in their bases' dtype."""
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
        dtype = module.weight.dtype if half else torch.float32
        module.lora_A.to(dtype), module.lora_B.to(dtype)
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        with torch.no_grad():
            down.copy_(lora.down)
            up.copy_(lora.up.reshape(up.shape))
        factors += [down, up]
    return adapted, factors


def _with_unsloth(layer: LoRALayers) -> Provider:
    """Unsloth's autograd functions of one linear, of q, k and v, and of Llama's MLP; none may
    write its gradient into x."""
    functions = importlib.import_module("unsloth.kernels.fast_lora")
    given = [
        each
        for lora in layer.each()
        for each in (lora.base.weight, None, lora.down, lora.up, lora.scale)
    ]
    if isinstance(layer, LoRAMlp):
        swiglu = importlib.import_module("unsloth.kernels.swiglu")
        inner = (swiglu.swiglu_fg_kernel, swiglu.swiglu_DWf_DW_dfg_kernel, False)
        return _own(layer, lambda x: functions.LoRA_MLP.apply(x, *given, *inner))
    if isinstance(layer, LoRAQKV):
        return _own(layer, lambda x: list(functions.LoRA_QKV.apply(x, *given, False)))
    return _own(layer, lambda x: functions.LoRA_W.apply(x, *given))


def _with_lorafusion(layer: LoRALayer) -> Provider:
    """LoRAFusion's fused linear as it comes (TMA in its forward: H100 and later)."""
    ops = importlib.import_module("lorafusion.ops.lora_v1")
    lora = layer.lora

    def forward(x: Tensor) -> Tensor:
        a, b = lora.down.to(x.dtype), lora.up.to(x.dtype)
        y: Tensor = ops.fused_linear_lora(x, lora.base.weight, a, b, lora.scale)
        return y

    return _own(layer, forward)


def _with_liger(layer: GatedLayer | LoRAMlp) -> Provider:
    """Well-written torch with Liger's LayerNorm or its activation of an MLP: of these layers, Liger
    has no more."""
    if isinstance(layer, LoRAMlp):
        multiplied = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        gate, up, down = layer.eager_linears()
        return _own(layer, lambda x: down(multiplied.apply(gate(x), up(x))))
    norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    trained = [p for p in layer.parameters() if p.requires_grad]

    def forward(x: Tensor, h: Tensor) -> Tensor:
        y = layer.without_norm(x, h)
        out: Tensor = norm.apply(y, *layer.norm_weights(y), layer.norm.eps)
        return out

    return Provider(forward, lambda inputs: [*inputs.leaves(), *trained])


def _own(layer: LoRALayers, forward: Forward) -> Provider:
    trained = [factor for lora in layer.each() for factor in (lora.down, lora.up)]
    return Provider(lambda x: forward(x), lambda inputs: [*inputs.leaves(), *trained])


FORMS: dict[str, Callable[[Any], Provider]] = {
    "peft": _with_peft,
    "peft_half": functools.partial(_with_peft, half=True),
    "unsloth": _with_unsloth,
    "lorafusion": _with_lorafusion,
    "liger": _with_liger,
}


def peft_like(
    base: Subject, fused: Subject, trained: Sequence[Tensor], half: bool
) -> tuple[Subject, list[Tensor]]:
    """PEFT's LoRA in a copy of `base`, on the projections that `fused` adapts and with its values;
    the parameters in the order of `trained`. `half`: in the base's dtype."""
    places = {
        path: module.used()
        for path, module in fused.model.named_modules()
        if isinstance(module, (RoutedLinear, LoraLinear))
    }
    subject = copy.deepcopy(base)
    _, factors = _injected(subject.model, places, half)
    ours = [t for lora in places.values() for t in (lora.down, lora.up)]
    own = {id(t): factor for t, factor in zip(ours, factors, strict=True)}
    return subject.train(), [own[id(t)] for t in trained]
