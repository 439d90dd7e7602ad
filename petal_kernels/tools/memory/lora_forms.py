"""LoRA as PEFT computes it, and as `pk.LoraConfig` does, on the same linears of a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.methods import method_of


class RestatedLoRA(nn.Module):
    """A frozen linear with LoRA as PEFT computes it: x is converted to the adapter's dtype, dropped
    out and multiplied by A and B in that dtype, and the sum is converted back.
    """

    def __init__(self, base: nn.Linear, rank: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        kind = {"bias": False, "device": base.weight.device, "dtype": dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **kind)  # type: ignore[arg-type]
        self.lora_B = nn.Linear(rank, base.out_features, **kind)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + B(A(drop(x)))."""
        y: Tensor = self.base(x)
        x = x.to(self.lora_A.weight.dtype)
        y = y + self.lora_B(self.lora_A(self.dropout(x)))
        return y.to(self.base.weight.dtype)


def installed(package: str = "peft") -> bool:
    """Whether a package is here; PEFT: whether its own layers can be measured."""
    return importlib.util.find_spec(package) is not None


def adapted_paths(model: nn.Module, config: pk.LoraConfig) -> list[str]:
    """The linears of `model` that `config` names."""
    return [p.path for p in method_of(config)(model, config, published=False).found.places]


def peft_lora(
    model: nn.Module, paths: Sequence[str], rank: int, dropout: float, dtype: torch.dtype
) -> nn.Module:
    """PEFT's LoRA in `model`, on the linears at `paths`; `dtype` is that of its factors, float32 by
    its default whatever the base's is (as get_peft_model makes them)."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(paths))
    shapes = any(parameter.is_meta for parameter in model.parameters())
    adapted: nn.Module = inject_adapter_in_model(config, model, low_cpu_mem_usage=shapes)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return adapted


def restated_lora(
    model: nn.Module, paths: Sequence[str], rank: int, dropout: float, dtype: torch.dtype
) -> nn.Module:
    """The same, restated: for where PEFT is not installed."""
    for path in paths:
        base: nn.Linear = model.get_submodule(path)  # type: ignore[assignment]
        model.set_submodule(path, RestatedLoRA(base, rank, dropout, dtype))
    return model
