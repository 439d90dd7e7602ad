"""What a model is given for pictures of some size: by its family's own image processor, whose
settings are those of a `preprocessor_config.json` beside the config, or follow from the config."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

_FILES = ("preprocessor_config.json", "processor_config.json")
_NESTED = ("idefics3", "smolvlm", "mllama")  # take a list of pictures for each sample


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _side(config: Any) -> int:
    size = config.vision_config.image_size
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _patches(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }


def _sized(config: Any) -> dict[str, Any]:
    return {"size": _square(_side(config))}


def _split(config: Any) -> dict[str, Any]:
    """At most four of the tower's sides long, cut into pieces of its side, and the whole."""
    edge = _side(config)
    return {"size": {"longest_edge": 4 * edge}, "max_image_size": {"longest_edge": edge}}


def _pixtral(config: Any) -> dict[str, Any]:
    merged = getattr(config, "spatial_merge_size", 1)
    size = {"longest_edge": _side(config)}
    return {"size": size, "patch_size": config.vision_config.patch_size * merged}


# Settings of a family's processor that follow from its config; the class has the others.
_SETTINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llava": lambda c: {"size": {"shortest_edge": _side(c)}, "crop_size": _square(_side(c))},
    "llava_onevision": lambda c: _sized(c) | {"image_grid_pinpoints": c.image_grid_pinpoints},
    "paligemma": _sized,
    "gemma3": _sized,
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "internvl": lambda c: _sized(c) | {"crop_to_patches": True},
    "idefics3": _split,
    "smolvlm": _split,
    "mllama": lambda c: _sized(c) | {"max_image_tiles": c.vision_config.max_num_tiles},
    "pixtral": _pixtral,
    "mistral3": _pixtral,
}


def processor(config: Any, folder: Path | None) -> Any:
    """The image processor of a config's family; with the settings in `folder` where it has them.

    Raises ValueError for a family whose processor is not known here or needs a missing package.
    """
    import transformers
    from transformers.models.auto import image_processing_auto

    kind = config.model_type
    if getattr(config.vision_config, "model_type", "") == "pixtral":
        kind = "pixtral"
    names: Any = vars(image_processing_auto)["IMAGE_PROCESSOR_MAPPING_NAMES"].get(kind)
    name = names.get("pil") if isinstance(names, dict) else None
    given = _given(folder)
    if name is None or (given is None and kind not in _SETTINGS):
        raise ValueError(
            f"--config: want a family whose pictures are known ({', '.join(_SETTINGS)}), or its "
            f"preprocessor_config.json beside the config, got {kind}; --images 0: text alone"
        )
    settings = _SETTINGS[kind](config) if given is None else given
    return getattr(transformers, name)(**settings)


def _given(folder: Path | None) -> dict[str, Any] | None:
    """What the file beside a config says, the class's own name left out."""
    for name in _FILES if folder is not None else ():
        assert folder is not None
        file = folder / name
        if file.is_file():
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            values = values.get("image_processor", values)
            names = ("image_processor_type", "processor_class", "feature_extractor_type")
            return {k: v for k, v in values.items() if k not in names}
    return None


def side_of(config: Any) -> tuple[int, int]:
    """Width and height of a picture that is as large as the tower's own, where it has one."""
    size = getattr(config.vision_config, "image_size", None)
    if size is None:
        return 448, 448
    side = _side(config)
    return side, side


def inputs(
    model: nn.Module, config: Any, folder: Path | None, size: tuple[int, int], count: int
) -> dict[str, Tensor]:
    """What `model` takes for one sample with `count` blank pictures of `size` (width, height)."""
    import PIL.Image

    blank = [PIL.Image.new("RGB", size) for _ in range(count)]
    nested = config.model_type in _NESTED
    made = processor(config, folder)(images=[blank] if nested else blank, return_tensors="pt")
    taken = inspect.signature(type(model).forward).parameters
    return {k: v for k, v in made.items() if k in taken and isinstance(v, Tensor)}


def tokens(
    model: nn.Module, given: Callable[[bool], dict[str, Tensor]], count: int
) -> tuple[int, bool]:
    """How many tokens of the text stand for `count` pictures: one for each feature that the model,
    on fake tensors, makes of them; of one whose text sees them by cross-attention one each. And
    whether it decides something by the pixels' values: `given` makes them, real where it is True.
    """
    inner = getattr(model, "model", model)
    features = getattr(inner, "get_image_features", None)
    if features is None or "cross_attention_mask" in inspect.signature(model.forward).parameters:
        return count, False
    taken = inspect.signature(features).parameters
    for values in (False, True):
        pixels = {k: v for k, v in given(values).items() if k in taken}
        try:
            with torch.no_grad():
                found = features(**pixels)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if values:
                raise
        else:
            return _rows(getattr(found, "pooler_output", found)), values
    raise AssertionError("unreachable")


def _rows(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(_rows(each) for each in features)
