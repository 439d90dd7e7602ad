"""LoRA on one decoder layer of Llama-7B: what it keeps for backward, by the linears that are
adapted, as PEFT writes it and as `pk.attach` does. On fake tensors, under CUDA's rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels import memory
from petal_kernels._runtime.columns import columns, rounded
from petal_kernels.tools.memory import models
from petal_kernels.tools.memory.compare import Kept
from petal_kernels.tools.memory.lora_forms import (
    adapted_paths,
    installed,
    peft_lora,
    restated_lora,
)

Targets = str | tuple[str, ...]
TARGETS: tuple[Targets, ...] = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), "all-linear")
# Forms of ours by label: fields of LoraConfig.
OURS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, frozen norms fused": {"frozen_norms": "fused"},
    "lora, frozen norms folded": {"frozen_norms": "folded"},
    "lora, MLP recomputed": {"recompute_mlp": True},
    "lora, MLP recomputed, frozen norms fused": {"recompute_mlp": True, "frozen_norms": "fused"},
    "lora, MLP recomputed, frozen norms folded": {"recompute_mlp": True, "frozen_norms": "folded"},
}


@dataclass(frozen=True)
class Sizes:
    """x is [batch, length, 4096]."""

    batch: int = 4
    length: int = 512
    rank: int = 16
    dropout: float = 0.05
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{self.batch} x {self.length} x 4096 {dtype}"
        return f"{size}, r={self.rank}, dropout {self.dropout:g}"

    def config(self, targets: Targets, **chosen: Any) -> pk.LoraConfig:
        """Of ours, with fields of it as `chosen`; its targets are PEFT's too."""
        return pk.LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            lora_dropout=self.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            **chosen,
        )


class FirstLayer(nn.Module):
    """A model's first decoder layer, run alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Of x [batch, length, width], which another layer gave."""
        positions = torch.arange(x.shape[1])[None]
        out: Tensor = self.model.layers[0](
            x * 1.0, position_embeddings=self.model.rotary_emb(x, positions)
        )
        return out


def forms(sizes: Sizes, peft: bool) -> dict[str, Callable[..., object]]:
    """What adapts `targets` of a frozen model, by label."""
    inject = peft_lora if peft else restated_lora

    def theirs(model: nn.Module, targets: Targets, dtype: torch.dtype) -> object:
        paths = adapted_paths(model, sizes.config(targets))
        return inject(model, paths, sizes.rank, sizes.dropout, dtype)

    def ours(model: nn.Module, targets: Targets, **chosen: Any) -> object:
        return pk.attach(model, sizes.config(targets, **chosen))

    half = str(sizes.dtype).removeprefix("torch.")
    return {
        "peft-lora, float32": functools.partial(theirs, dtype=torch.float32),
        f"peft-lora, {half}": functools.partial(theirs, dtype=sizes.dtype),
        **{label: functools.partial(ours, **chosen) for label, chosen in OURS.items()},
    }


def _kept(sizes: Sizes, adapt: Callable[[nn.Module], object]) -> tuple[int, float]:
    """Bytes, and in units of x's."""
    with torch.device("meta"), models.default_dtype(sizes.dtype):
        model = models.llama_layer()
        x = torch.empty(sizes.batch, sizes.length, 4096, requires_grad=True)
    model.requires_grad_(False)
    held = adapt(model)
    layer, batch = memory.fake_tensors(FirstLayer(model).train(), (x,))
    kept = memory.profile(layer, batch, backward=False).saved_bytes
    del held
    return kept, kept / (x.numel() * x.itemsize)


def compare(
    sizes: Sizes, targets: Sequence[Targets] = TARGETS, peft: bool | None = None
) -> Iterator[Kept]:
    """The frozen layer, then every form on each of `targets`."""
    yield Kept("frozen", *_kept(sizes, lambda model: None), targets="nothing")
    wanted = forms(sizes, installed() if peft is None else peft)
    for each in targets:
        name = each if isinstance(each, str) else ", ".join(each)
        for label, form in wanted.items():
            found = _kept(sizes, functools.partial(form, targets=each))
            yield Kept(label, *found, targets=name)


def title(sizes: Sizes) -> str:
    """What is compared, in a line."""
    theirs = "PEFT's own layers" if installed() else "PEFT not installed: restated"
    return f"LoRA on one layer of Llama-7B, {sizes} ({theirs})"


def table(kept: Sequence[Kept]) -> str:
    """Kept for backward in units of x's bytes: lines by form, columns by what is adapted."""
    frozen, *adapted = kept
    targets = list(dict.fromkeys(k.targets for k in adapted))
    found: dict[str, dict[str, str]] = {}
    for k in adapted:
        found.setdefault(k.label, {})[k.targets] = rounded(k.times_x, 2)
    rows = [[label, *(cells[each] for each in targets)] for label, cells in found.items()]
    shown = columns(("form", *targets), rows, right=tuple(range(1, len(targets) + 1)))
    return (
        f"{shown}\n\nKept for backward, in units of x's bytes, as on CUDA; the frozen layer keeps "
        f"{frozen.times_x:.2f}. Parameters are not counted."
    )
