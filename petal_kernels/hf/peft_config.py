"""PEFT's own LoraConfig, as an object or as it stands in adapter_config.json, to ours and back.

PEFT itself is not needed for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from petal_kernels.hf.linears import is_named
from petal_kernels.hf.lora_config import PARTS, SAYS_NOTHING, LoraConfig

# What means the same here.
_SAME = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "bias", "init_lora_weights", "trainable_token_indices"),
)
# What is neither set nor empty in an adapter_config.json.
_OFF = {"qalora_group_size": 16, "megatron_core": "megatron.core"}
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
    return _taken(values, _defaults(config, values), model)


def check_filed(init: object, rows: object) -> None:
    """ValueError where PEFT's files hold other values than an adapter here has: PEFT takes PiSSA's
    and OLoRA's first factors out of the base's weight, and has rows of tokens in a layer of its
    own."""
    if isinstance(init, str) and init.startswith(("pissa", "olora")):
        raise ValueError(
            f"init_lora_weights: want factors beside an unchanged base, got {init!r}, which PEFT "
            "takes out of its weight (its save_pretrained converts them)"
        )
    if rows:
        raise ValueError(f"trainable_token_indices: want none in PEFT's files, got {rows!r}")


def from_json(values: Mapping[str, Any], model: nn.Module) -> LoraConfig:
    """The same of what stands in PEFT's adapter_config.json."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type: want 'LORA' of PEFT's methods, got {kind!r}")
    check_filed(values.get("init_lora_weights"), values.get("trainable_token_indices"))
    # What a later PEFT adds is off where it is empty.
    defaults = {name: _OFF.get(name, None if value else value) for name, value in values.items()}
    defaults["inference_mode"] = values.get("inference_mode")  # PEFT saves every adapter with it
    return _taken(values, defaults, model)


def to_json(
    config: LoraConfig, targets: Sequence[str] | str, saved: Sequence[str], **more: Any
) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of `config`, whose names PEFT knows as `targets` and
    `saved`; `more` is what the base says."""
    resolved = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "revision": None,
        "inference_mode": True,
        **{name: getattr(config, name) for name in _SAME if name not in resolved},
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(saved) or None,
        **more,
    }


def _taken(values: Mapping[str, Any], defaults: Mapping[str, Any], model: nn.Module) -> LoraConfig:
    for name, default in defaults.items():
        value = values.get(name)
        if name not in (*_SAME, *SAYS_NOTHING) and value != default:
            raise ValueError(
                f"{name}: want {default!r}, all that attach supports of it in a config of PEFT, "
                f"got {value!r}"
            )
    same = {name: values[name] for name in _SAME if name in values}
    for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        if not isinstance(same.get(name), int) and not same.get(name):
            same[name] = None  # an empty list is none
    heads = _HEADS.get(_word(values.get("task_type")), ())
    saved = same["modules_to_save"]
    if saved is None or isinstance(saved, (list, tuple, set)):
        saved = sorted(saved) if isinstance(saved, set) else saved
        own = [head for head in heads if hasattr(model, head)]
        same["modules_to_save"] = _whole([*(saved or ()), *own], heads, model) or None
    if same.get("target_modules") is not None:
        same["parts"] = PARTS
    return LoraConfig(**same)


def _whole(names: Sequence[Any], heads: Sequence[str], model: nn.Module) -> list[Any]:
    """`modules_to_save` as it is meant here: PEFT's names are ends of paths with or without a dot
    before them, and a task's heads are named whether or not the model has them."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    found: list[Any] = []
    for name in names:
        meant = ends_with(paths, [name]) if isinstance(name, str) and name else []
        if not meant and name in heads:
            continue
        found += [name] if set(meant) == {p for p in meant if is_named(p, [name])} else meant
    return list(dict.fromkeys(found))


def ends_with(paths: Collection[str], names: Sequence[str]) -> list[str]:
    """The paths that PEFT's `modules_to_save` would mean by `names`."""
    return [path for path in paths if path.endswith(tuple(names))]


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
