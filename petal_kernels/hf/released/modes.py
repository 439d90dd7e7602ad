"""PETAL's and Aurora's checkpoints: shared factors at the root, mode vectors in the attentions.

    ours                            theirs
    branches.text.down, .up, .core  CP_U.weight, CP_V.weight, CP_C (PETAL's image branch: *_Image)
    branches.text.modes [n, R]      q_CP, k_CP, v_CP [R, 1] beside each query, key and value
    Aurora's image encoder          CP_attention [R, 4]: query, key, value, projection; mlp_CP
                                    [R, 8]: the four blocks of fc1, then those of fc2
    layers.I.self.scale, ...        CP_scaleself, CP_shiftself, CP_scalecross, CP_shiftcross
    experts.down [E, r, D], ...     Qformer.bert.ExpertA.E, ExpertB.E

A row of `modes` is found by the projection that it serves, never by counting: how an attachment
numbers its modes is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from petal_kernels.hf.released.layout import Layout, Source, stacked

_COLUMNS = {"qkv": range(3), "projection": range(3, 4), "fc1": range(4), "fc2": range(4, 8)}
_LAVIS = (
    r"(Qformer|visual_encoder|ln_vision|t5_model|llm_model|opt_model|query_tokens)\b|\w+_proj\."
)
_INFORMATION = r".*(Wrapper|para_info)"  # the mutual-information term's, which is no adapter's
_MOMENTUM = r"\w+_m\.|\w+_queue$|(queue_ptr|ptr_queue|temp)$"

Column = tuple[str, int]  # a tensor of theirs, and the column that is one mode


def petal(method: Any, keys: set[str]) -> Layout:
    """PETAL on InstructBLIP's Q-Former."""
    sources: dict[str, Source] = {}
    for branch, end in (("text", ""), ("image", "_Image")):
        places = [p for p in method.found.places if p.row.encoded == (branch == "image")]
        if places:
            sources |= _factors(branch, end)
            own = {p.path: method.modes[p.path] for p in places}
            sources[f"branches.{branch}.modes"] = _modes(own, _qformer)
    for layer in method.found.layers:
        sources |= _pairs(method, layer.index, _in_lavis(layer.path))
    if method.adapter.experts is not None:
        count = method.config.experts
        for ours, theirs in (("down", "ExpertA"), ("up", "ExpertB")):
            for end, kind in (("", "weight"), ("_bias", "bias")):
                names = tuple(f"Qformer.bert.{theirs}.{k}.{kind}" for k in range(count))
                sources[f"experts.{ours}{end}"] = Source(names, stacked)
    return Layout(sources, words=r".*(CP|Expert|lora|adapter)", base=_LAVIS, beside=_INFORMATION)


def aurora(method: Any, keys: set[str]) -> Layout:
    """Aurora on BLIP."""
    sources = _factors("shared", "")
    sources["branches.shared.modes"] = _modes(method.modes, _blip)
    for layer in method.found.layers:
        if layer.row.name == "text":
            sources |= _pairs(method, layer.index, layer.path)
    base = r"(visual_encoder|text_encoder|text_decoder|itm_head|cls)\.|\w+_proj\."
    return Layout(sources, words=r".*(CP|lora|adapter)", base=base, beside=_MOMENTUM)


def _factors(branch: str, end: str) -> dict[str, Source]:
    return {
        f"branches.{branch}.down": Source.of(f"CP_U{end}.weight"),
        f"branches.{branch}.up": Source.of(f"CP_V{end}.weight"),
        f"branches.{branch}.core": Source.of(f"CP_C{end}"),
    }


def _pairs(method: Any, index: int, path: str) -> dict[str, Source]:
    """The scale/shift pairs of a layer, those that it has."""
    found = {}
    pairs = dict(method.adapter.layers.items())
    for block in pairs.get(str(index), ()):
        for name in ("scale", "shift"):
            found[f"layers.{index}.{block}.{name}"] = Source.of(f"{path}.CP_{name}{block}")
    return found


def _modes(modes: dict[str, range], columns: Callable[[str, int], list[Column]]) -> Source:
    """All rows of `modes`, of each projection those that are its own."""
    rows: dict[int, Column] = {}
    for path, own in modes.items():
        rows |= dict(zip(own, columns(path, len(own)), strict=True))
    ordered = [rows[k] for k in range(len(rows))]
    names = tuple(dict.fromkeys(name for name, _ in ordered))
    return Source(names, partial(_gathered, names, ordered))


def _gathered(names: tuple[str, ...], ordered: list[Column], *values: Tensor) -> Tensor:
    held = dict(zip(names, values, strict=True))
    for name, value in held.items():
        used = sorted(column for other, column in ordered if other == name)
        if value.dim() != 2 or used != list(range(value.shape[1])):
            raise ValueError(
                f"{name}: want [R, {len(used)}], a column for each adapted block, got "
                f"{list(value.shape)}"
            )
    return torch.stack([held[name][:, column] for name, column in ordered])


def _in_lavis(path: str) -> str:
    """A path in transformers' Q-Former, in LAVIS's."""
    return path.replace("qformer.encoder", "Qformer.bert.encoder").replace(
        "attention.attention", "attention.self"
    )


def _qformer(path: str, count: int) -> list[Column]:
    return _bert(_in_lavis(path), count)


def _bert(path: str, count: int) -> list[Column]:
    front, _, name = path.rpartition(".")
    return [(f"{front}.{name[0]}_CP", 0)]


def _blip(path: str, count: int) -> list[Column]:
    if not path.startswith("vision_model."):
        return _bert(path, count)
    front, block, name = path.rsplit(".", 2)
    layer = front.replace("vision_model.encoder.layers", "visual_encoder.blocks")
    held = "attn.CP_attention" if block == "self_attn" else "mlp.mlp_CP"
    return [(f"{layer}.{held}", column) for column in _COLUMNS[name]]
