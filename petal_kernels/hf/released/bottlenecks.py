"""VL-PET's and VL-Adapter's checkpoints, on VL-BART and VL-T5.

    ours, in a place's adapter    theirs, in the same layer
    down, down_bias               attn_adapter_multihead_down.H, one head's rows below the other's;
    up, up_bias                   or, of one head, attn_adapter.adapters.TASK.down_sampler and
                                  .up_sampler; ff_adapter, enc_attn_adapter and so on likewise
    gate_down, gate_up            encoder_attn_adapter_gating_large_x_down, _up
    gate_weight                   encoder_attn_adapter_gating_middle_xy_add (middleX),
                                  _middle_ia3_add (middleY), _small_xy_cat (small)
    value.down, .up               attn_value_parallel_adapter.adapters.TASK of each cross-attention

One adapter that all tasks share stands there once for each of them; adapters that differ from task
to task are refused. What is trained whole has its own name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from petal_kernels.hf.models import Linear
from petal_kernels.hf.released.layout import Layout, Source, flat, modules_of, rows, stacked

_BASE = r"(model|encoder|decoder|shared|lm_head|final_logits_bias)\b"
_WORDS = r".*(adapter|gating|lora|prompt)"
_GATES = {"middleX": "middle_xy_add", "middleY": "middle_ia3_add", "small": "small_xy_cat"}
_SAMPLERS = (("down", "down_sampler"), ("up", "up_sampler"))


def vlpet(method: Any, keys: set[str]) -> Layout:
    """VL-PET's gated adapters and value adapters."""
    sources: dict[str, Source] = {}
    for place, ours in modules_of(method):
        front, kind = _beside(place)
        sources |= _adapter(ours, f"{front}.{kind}", keys)
        sources |= _gate(ours, f"{front}.encoder_{kind}_gating", method.config.gate)
    values = [place.path for place in method.found.at(Linear)]
    if values:
        sources |= _values(values, keys)
    return Layout(sources, words=_WORDS, base=_BASE)


def vladapter(method: Any, keys: set[str]) -> Layout:
    """VL-Adapter's bottlenecks, in encoder and decoder."""
    sources: dict[str, Source] = {}
    for place, ours in modules_of(method):
        front, kind = _beside(place)
        sources |= _adapter(ours, f"{front}.{kind}", keys)
    return Layout(sources, words=_WORDS, base=_BASE)


def _beside(place: Any) -> tuple[str, str]:
    """The layer that holds a place's adapter, and the adapter's name there."""
    front = place.path.rpartition(".")[0]
    stack, _, block = place.role.rpartition(".")
    names = {"attention": "attn_adapter", "cross": "enc_attn_adapter", "ffn": "ff_adapter"}
    own_name = stack == "decoder" and block == "attention" and ".layers." in place.path  # BART's
    return front, "self_attn_adapter" if own_name else names.get(block, "")


def _adapter(ours: str, theirs: str, keys: set[str]) -> dict[str, Source]:
    """Down and up with their biases, of several heads or of one."""
    found: dict[str, Source] = {}
    heads = _numbers(f"{theirs}_multihead_down", keys)
    for end, kind in (("", "weight"), ("_bias", "bias")):
        if heads:
            names = tuple(f"{theirs}_multihead_down.{head}.{kind}" for head in heads)
            found[f"{ours}.down{end}"] = Source(names, rows)
            found[f"{ours}.up{end}"] = Source.of(f"{theirs}_multihead_up.{kind}")
            continue
        for name, sampler in _SAMPLERS:
            names = _tasks(theirs, f"{sampler}.{kind}", keys)
            found[f"{ours}.{name}{end}"] = Source(names, alike)
    return found


def _gate(ours: str, theirs: str, gate: str) -> dict[str, Source]:
    if gate == "large":
        return {
            f"{ours}.gate_{name}{end}": Source.of(f"{theirs}_large_x_{name}.{kind}")
            for name in ("down", "up")
            for end, kind in (("", "weight"), ("_bias", "bias"))
        }
    if gate == "middleY":
        return {f"{ours}.gate_weight": Source.of(f"{theirs}_{_GATES[gate]}")}
    if gate == "none":
        return {}
    name = f"{theirs}_{_GATES[gate]}"
    return {
        f"{ours}.gate_weight": Source.of(f"{name}.weight", flat),
        f"{ours}.gate_bias": Source.of(f"{name}.bias"),
    }


def _values(paths: Sequence[str], keys: set[str]) -> dict[str, Source]:
    """The value adapters of all layers: one down-projection below the other, one up each."""
    found: dict[str, Source] = {}
    fronts = [f"{path.rpartition('.')[0]}.attn_value_parallel_adapter" for path in paths]
    for name, sampler in _SAMPLERS:
        join = rows if name == "down" else stacked
        for end, kind in (("", "weight"), ("_bias", "bias")):
            names = [_tasks(front, f"{sampler}.{kind}", keys) for front in fronts]
            each = partial(_joined, join, [len(own) for own in names])
            found[f"value.{name}{end}"] = Source(tuple(n for own in names for n in own), each)
    return found


def _joined(join: Callable[..., Tensor], counts: Sequence[int], *values: Tensor) -> Tensor:
    """Of every layer the one adapter of its tasks, joined."""
    ends = itertools.accumulate(counts)
    own = [values[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return join(*(alike(*each) for each in own))


def alike(*values: Tensor) -> Tensor:
    """What stands there once for each task."""
    if any(not torch.equal(value, values[0]) for value in values[1:]):
        raise ValueError("want one adapter that all tasks share, got adapters of their own")
    return values[0]


def _numbers(theirs: str, keys: set[str]) -> list[int]:
    found = {m[1] for key in keys if (m := re.match(rf"{re.escape(theirs)}\.(\d+)\.weight$", key))}
    return sorted(int(number) for number in found)


def _tasks(theirs: str, end: str, keys: set[str]) -> tuple[str, ...]:
    """The names of one tensor of an adapter, for each task; one that is missing, where none is."""
    pattern = rf"{re.escape(theirs)}\.adapters\.\w+\.{re.escape(end)}$"
    return tuple(sorted(key for key in keys if re.match(pattern, key))) or (
        f"{theirs}.adapters.TASK.{end}",
    )
