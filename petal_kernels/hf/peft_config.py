"""PEFT's own LoraConfig objects, taken as they are; PEFT itself is not needed for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from petal_kernels.hf.lora_config import PARTS, LoraConfig

# What means the same here.
_SAME = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "bias", "init_lora_weights", "trainable_token_indices"),
)
# What says where a config comes from, or what is read from the base's class here.
_SAYS_NOTHING = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("peft_version", "fan_in_fan_out", "runtime_config"),
)
# The heads that PEFT trains whole with these tasks, where the model has them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def is_peft(config: object) -> bool:
    """Whether it is one of PEFT's configs."""
    return any(
        cls.__module__.partition(".")[0] == "peft" and cls.__name__.endswith("Config")
        for cls in type(config).__mro__
    )


def from_peft(config: Any, model: nn.Module) -> LoraConfig:
    """The same as a LoraConfig for `model`: names match in all its parts, as they do in PEFT.
    ValueError names what is set and means nothing here."""
    values: dict[str, Any] = config.to_dict()
    kind = _word(values.get("peft_type"))
    if kind != "LORA" or not any(cls.__name__ == "LoraConfig" for cls in type(config).__mro__):
        raise ValueError(
            f"config: want a LoraConfig of PEFT's configs, got a {type(config).__name__} "
            f"(peft_type {kind})"
        )
    for name, default in _defaults(config, values).items():
        value = values[name]
        if name not in (*_SAME, *_SAYS_NOTHING) and value != default:
            raise ValueError(
                f"{name}: want {default!r}, all that attach supports of it in a config of PEFT, "
                f"got {value!r}"
            )
    same = {name: values[name] for name in _SAME if name in values}
    for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        if not isinstance(same.get(name), int) and not same.get(name):
            same[name] = None  # an empty list is none
    heads = [h for h in _HEADS.get(_word(values.get("task_type")), ()) if hasattr(model, h)]
    saved = [*(same["modules_to_save"] or ()), *heads]
    same["modules_to_save"] = list(dict.fromkeys(saved)) or None
    everywhere = {} if same["target_modules"] is None else {"parts": PARTS}
    return LoraConfig(**same, **everywhere)  # type: ignore[arg-type]


def _defaults(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What each of the config's values is where nobody sets it."""
    found = dict.fromkeys(values)
    for each in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        if each.name not in found:
            continue
        if each.default is not dataclasses.MISSING:
            found[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            found[each.name] = each.default_factory()
    return found


def _word(value: Any) -> str:
    """An enumeration's value, or the string itself."""
    return str(getattr(value, "value", value))
