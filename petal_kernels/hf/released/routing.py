"""Checkpoints of the routing functions' authors, on GPT-2 and RoBERTa.

ours                                   theirs
layers.I.*_query.down, .up [1, D, r]   attention.self.query.lora_A, lora_B (RoBERTa)
layers.I.*_query_value.down, .up       attn.c_attn.lora_A [2 r, D], lora_B [2 D, r]: query, then
                                       value (GPT-2)
layers.I.attention, .ffn               attention.output.adapter, output.adapter (RoBERTa)
layers.I.shared                        adapter of the block (GPT-2)
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from petal_kernels.hf.models import Linear
from petal_kernels.hf.released.layout import Layout, Source, modules_of


def routing(method: Any, keys: set[str]) -> Layout:
    """Routed LoRA and routed adapters."""
    sources: dict[str, Source] = {}
    for place, ours in modules_of(method):
        if isinstance(place.row, Linear):
            count = method.trains(place).up.shape[0]
            sources[f"{ours}.down"] = Source.of(f"{place.path}.lora_A")
            sources[f"{ours}.up"] = Source.of(f"{place.path}.lora_B", partial(_grouped, count))
            continue
        shared = method.config.share
        front = f"{place.layer.path if shared else place.path.rpartition('.')[0]}.adapter"
        for name, sampler in (("down", "down_sampler"), ("up", "up_sampler")):
            sources[f"{ours}.{name}"] = Source.of(f"{front}.{sampler}.weight")
            sources[f"{ours}.{name}_bias"] = Source.of(f"{front}.{sampler}.bias")
    base = r"(transformer|lm_head|roberta|classifier|score)\b"
    return Layout(sources, words=r".*(lora|adapter)", base=base)


def _grouped(count: int, value: Tensor) -> Tensor:
    """The rows of each output below each other, as a dimension of their own."""
    if value.dim() != 2 or value.shape[0] % count:
        raise ValueError(f"want {count} blocks of rows, got {list(value.shape)}")
    return value.reshape(count, -1, value.shape[1])
