"""A LoRA adapter on disk as PEFT has it: adapter_config.json and adapter_model.safetensors.

PEFT's names end in `lora_A.weight`, `lora_B.weight` and of DoRA `lora_magnitude_vector`, with
`base_model.model.` in front; the trained bias of an adapted linear is its `base_layer.bias`, and
what is trained whole has its name in the model. PEFT's file does not say which file of tensors it
belongs to: see `pair.replace_two`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn

from petal_kernels.hf import files, pair
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.linears import is_named
from petal_kernels.hf.lora_config import LoraConfig
from petal_kernels.hf.merging import NAME
from petal_kernels.hf.method import Method
from petal_kernels.hf.names import renamed
from petal_kernels.hf.pair import CONFIG, OLD_CONFIG
from petal_kernels.hf.peft_config import check_filed, ends_with, from_json, to_json
from petal_kernels.hf.tensors import EXTRA, check_tensors, gathered
from petal_kernels.hf.whole import Copies

TENSORS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTORS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude",
}
_BIAS = "base_layer.bias"
# With bias="all" PEFT keeps these besides: the base's own values, and what stands there twice.
_BESIDE = (".original_module.", ".modules_to_save.")
# What an attachment may be told otherwise than the file: each decides no value.
_FREE = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "parts"),
    *("modules_to_save", "lora_dropout", "init_lora_weights", "adapter_dtype", "recompute_mlp"),
)


@dataclass
class PeftSaved:
    """What PEFT saved: read like `files.Saved`, and loaded by the names of the tensors."""

    path: Path  # of the json
    values: dict[str, Any]
    tensors: dict[str, Tensor]

    def config_for(self, model: nn.Module) -> LoraConfig:
        """The config to attach to `model` with."""
        try:
            return from_json(self.values, model)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}: {error}") from error

    def check_base(self, signature: dict[str, Any]) -> None:
        """PEFT keeps nothing of the base: its names and shapes are all there is to fit."""

    def check_config(self, config: AdapterConfig, model: nn.Module) -> None:
        """ValueError where the tensors would mean something else under `config`."""
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{self.path}: method: want {config.method!r} as attached, got 'lora'")
        theirs = self.config_for(model).to_dict()
        for key, want in config.to_dict().items():
            if key not in _FREE and theirs[key] != want:
                raise ValueError(
                    f"{self.path}: {key}: want {want!r} as attached, got {theirs[key]!r}"
                )

    def once(self, others: Mapping[str, str]) -> PeftSaved:
        """Without what it holds twice under the names of one parameter, `others` to the first: PEFT
        keeps a tied bias under each of its names."""
        kept = dict(self.tensors)
        for name, first in others.items():
            again, value = (self.tensors.get(_PREFIX + each) for each in (name, first))
            if again is not None and value is not None and torch.equal(again, value):
                del kept[_PREFIX + name]
        return dataclasses.replace(self, tensors=kept)

    def tensors_for(
        self, state: Mapping[str, Tensor], prefixes: Sequence[str] = (), *, mirrors: bool = True
    ) -> dict[str, Tensor]:
        """The tensors under the names of `state`, as `files.Saved` gives them."""
        kept = {n: t for n, t in self.tensors.items() if not any(part in n for part in _BESIDE)}
        found = renamed({_ours(name): t for name, t in kept.items()}, state, prefixes, f"{EXTRA}.")
        found = renamed(found, state, prefixes, "")
        check_tensors(str(self.path.with_name(TENSORS)), found, state)
        return found


def is_peft(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter of PEFT's, whole or not, and none of this package's."""
    folder = files.path_of(directory)
    if (folder / CONFIG).exists():
        return False
    try:
        values = json.loads((folder / OLD_CONFIG).read_bytes())
    except (ValueError, RecursionError, OSError):
        return (folder / TENSORS).exists()
    named = isinstance(values, dict) and "peft_type" in values
    return named or ((folder / TENSORS).exists() and not files.is_ours(folder / OLD_CONFIG))


def read(directory: str | os.PathLike[str]) -> PeftSaved:
    """Reads an adapter of PEFT's; ValueError says which file is wrong, and how."""
    folder = files.path_of(directory)
    path, tensors = folder / OLD_CONFIG, folder / TENSORS
    missing = [each.name for each in (path, tensors) if not each.is_file()]
    if missing:
        pickled = (folder / "adapter_model.bin").exists()
        note = " (the pickle adapter_model.bin is refused)" if pickled else ""
        raise ValueError(f"{folder}: want {TENSORS} and {OLD_CONFIG}, missing {missing}{note}")
    text, data = path.read_bytes(), tensors.read_bytes()
    if not path.is_file() or path.read_bytes() != text:
        return read(directory)  # somebody saves into it
    values = files.json_object(path, text)
    files.refuse_pickle(tensors, data)
    return PeftSaved(path, values, files.parse_tensors(tensors, data))


def _ours(key: str) -> str:
    """The name in an adapter of what PEFT calls `key`."""
    name = key.removeprefix(_PREFIX)
    if name.endswith(f".{_BIAS}"):
        return f"{EXTRA}.{name.removesuffix(_BIAS)}bias"
    for theirs, ours in _FACTORS.items():
        if name.endswith(f".{theirs}"):
            return name.removesuffix(theirs) + ours
    return f"{EXTRA}.{name}"


# -- saving ---------------------------------------------------------------------------------------


class Held(Protocol):
    """What is read of an attachment."""

    model: nn.Module
    method: Method
    config: AdapterConfig
    shapes: dict[str, Size]

    def state_dict(self) -> dict[str, Tensor]:
        """All that is stored."""

    def copies(self) -> Copies | None:
        """What is trained whole, biases among it."""

    def named_whole(self) -> list[str]:
        """The paths of what `modules_to_save` means."""

    def used_again(self) -> list[str]:
        """The paths of adapted linears that the model uses in several places."""


def write(directory: str | os.PathLike[str], attachment: Held) -> None:
    """Writes what `PeftModel.from_pretrained(base, directory)` loads. ValueError, before anything
    is written, names what PEFT's files cannot say."""
    from safetensors.torch import save

    config = attachment.config
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"format: want 'petal' for the method {config.method!r}, got 'peft', whose files hold "
            "LoRA (LoraConfig) alone"
        )
    try:
        check_filed(config.init_lora_weights, config.trainable_token_indices)
    except ValueError as error:
        raise ValueError(f"format: want 'petal', not 'peft', for this config: {error}") from error
    adapted = [place.path for place in attachment.method.found.places]
    paths = _paths(attachment.model)
    values = _config(attachment, config, adapted, paths)
    state = gathered("save", attachment.state_dict(), attachment.shapes)
    named = _theirs(attachment, state, set(adapted))
    folder = files.to_save_into(directory)
    if (folder / CONFIG).exists() or files.is_ours(folder / OLD_CONFIG):
        raise ValueError(
            f"{folder}: want a folder without an adapter in this package's own format, which "
            "attach would load in place of PEFT's"
        )
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()},
        metadata={"format": "pt"},
    )
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    with pair.alone(folder):
        pair.replace_two(folder, (TENSORS, data), (OLD_CONFIG, text.encode()))
        pair.remove_stale(folder)


def _paths(model: nn.Module) -> list[str]:
    """Of the base's modules, wherever they are used."""
    found = (path for path, _ in model.named_modules(remove_duplicate=False))
    return [path for path in found if path and path.partition(".")[0] != NAME]


def _config(
    attachment: Held, config: LoraConfig, adapted: list[str], paths: list[str]
) -> dict[str, Any]:
    used = attachment.used_again()
    if used:
        raise ValueError(
            f"format: want linears that the model uses in one place, got {used[0]} in several, of "
            "which PEFT would adapt the first"
        )
    conv1d = {type(place.module).__name__ == "Conv1D" for place in attachment.method.found.places}
    base = attachment.model
    return to_json(
        config,
        targets(adapted, paths),
        _saved(attachment.named_whole(), paths),
        fan_in_fan_out=conv1d == {True},
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        auto_mapping={
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        },
    )


def targets(adapted: Sequence[str], paths: Collection[str]) -> list[str] | str:
    """Names by which PEFT adapts just these: the last words of their paths, else the paths, else
    one expression."""
    for names in (sorted({path.rpartition(".")[2] for path in adapted}), sorted(adapted)):
        if {path for path in paths if is_named(path, names)} == {*adapted}:
            return names
    return "|".join(path.replace(".", r"\.") for path in sorted(adapted))


def _saved(whole: Sequence[str], paths: Collection[str]) -> list[str]:
    """Names by which PEFT trains just these whole."""
    for path in whole:
        others = sorted({*ends_with(paths, [path])} - {path})
        if others:
            raise ValueError(
                f"modules_to_save: want a name that is the end of no other module's, as PEFT takes "
                f"it, got {path!r}, with which {others[0]!r} ends too"
            )
    return sorted(whole)


def _theirs(attachment: Held, state: Mapping[str, Tensor], adapted: set[str]) -> dict[str, Tensor]:
    """The tensors by PEFT's names."""
    _check_untied(attachment)
    words = {ours: theirs for theirs, ours in _FACTORS.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, last = name.removeprefix(f"{EXTRA}.").rpartition(".")
        if not name.startswith(f"{EXTRA}."):
            last = words[last]
        elif path in adapted:
            last = _BIAS
        named[f"{_PREFIX}{path}.{last}"] = tensor
    return named


def _check_untied(attachment: Held) -> None:
    """ValueError where what is trained whole shares a parameter with another module."""
    copies = attachment.copies()
    whole = tuple(f"{path}." for path in attachment.named_whole())
    others = {} if copies is None else copies.other_names(attachment.model)
    for other, name in others.items():
        if name.startswith(whole):
            raise ValueError(
                "modules_to_save: want modules that share no parameter with another, got "
                f"{name!r}, which is {other!r} too and in PEFT becomes a copy of its own"
            )
