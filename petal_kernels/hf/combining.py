"""The weighted sum of LoRA updates as one update: sum_i w_i s_i B_i A_i = [w_i s_i B_i] [A_i].

Its rank is the sum of the ranks. What was taken out of the base's weight at the start (PiSSA,
OLoRA) is a member of its own, subtracted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime import checks
from petal_kernels.hf.lora_config import LoraConfig
from petal_kernels.hf.merging import NAME
from petal_kernels.hf.peft_files import targets
from petal_kernels.nn.lora import LoRALinear

if TYPE_CHECKING:
    from petal_kernels.hf.installed import Installed

Factors = tuple[Tensor, Tensor]  # A [r, in] and scale * B [out, r], in fp32 (fp64)


def combined(
    model: nn.Module, members: Mapping[str, Installed], weights: Mapping[str, float]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors of the sum."""
    found: dict[str, list[Factors]] = {}
    for name, member in members.items():
        weight = checks.check_number(f"weights[{name!r}]", weights[name])
        why = _why_not(member)
        if why:
            raise ValueError(f"weights: want LoRA adapters of updates alone, got {name!r}: {why}")
        for place in member.method.found.places:
            lora = member.method.trains(place)
            assert isinstance(lora, LoRALinear)
            found.setdefault(place.path, []).append(_factors(lora, weight))
    configs = [member.config for member in members.values()]
    ranks = {path: sum(len(down) for down, _ in parts) for path, parts in found.items()}
    config = _config(model, configs, ranks)
    state = {}
    for path, parts in found.items():
        state[f"{path}.down"] = torch.cat([down for down, _ in parts]).to(config.dtype)
        state[f"{path}.up"] = torch.cat([up for _, up in parts], dim=1).to(config.dtype)
    return config, state


def _why_not(member: Installed) -> str:
    """Why an adapter is more than its updates, or none of LoRA's."""
    config = member.config
    if not isinstance(config, LoraConfig):
        return f"its method is {config.method!r}"
    if config.use_dora:
        return "it trains magnitudes (use_dora)"
    if config.bias != "none":
        return f"it trains biases (bias={config.bias!r})"
    if config.trainable_token_indices is not None:
        return "it trains rows of tokens (trainable_token_indices)"
    return "it trains modules whole (modules_to_save)" if config.modules_to_save else ""


@torch.no_grad()
def _factors(lora: LoRALinear, weight: float) -> Factors:
    """[A; A0] and weight * scale * [B, -B0]: the update is their product."""
    dtype = torch.promote_types(lora.down.dtype, torch.float32)
    down, up = lora._factors(dtype, lora.down.device)
    return down.to(dtype), (weight * lora.scale) * up.to(dtype)


def _config(model: nn.Module, members: Sequence[Any], ranks: Mapping[str, int]) -> LoraConfig:
    """The config under which the sum's scale is 1 everywhere."""

    def common(name: str, otherwise: object) -> Any:
        values = [getattr(config, name) for config in members]
        return values[0] if all(value == values[0] for value in values) else otherwise

    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    base = [path for path in paths if path and path.partition(".")[0] != NAME]
    r = max(ranks.values())
    other = {re.escape(path): rank for path, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets(list(ranks), base),
        rank_pattern=other,
        alpha_pattern=dict(other),
        parts=tuple(sorted({part for config in members for part in config.parts})),
        lora_dropout=common("lora_dropout", 0.0),
        recompute_mlp=common("recompute_mlp", False),
        frozen_norms=common("frozen_norms", "module"),
    )
