"""Loading an authors' checkpoint into an attachment: every tensor is accounted for, or refused."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.method import Method
from petal_kernels.hf.released.bottlenecks import vladapter, vlpet
from petal_kernels.hf.released.layout import Layout
from petal_kernels.hf.released.modes import aurora, petal
from petal_kernels.hf.released.routing import routing
from petal_kernels.hf.tensors import EXTRA, check_tensors

_LAYOUTS: dict[str, Callable[[Any, set[str]], Layout]] = {
    "petal": petal,
    "aurora": aurora,
    "vlpet": vlpet,
    "vladapter": vladapter,
    "routing": routing,
}
# What training scripts put in front of every name.
_FRONTS = ("module.", "gpt.")


def check_config(config: Any) -> None:
    """ValueError unless the authors' checkpoints mean something under `config`."""
    if config.method not in _LAYOUTS:
        raise ValueError(
            f"checkpoint: want a config of {sorted(_LAYOUTS)}, whose authors published code, got "
            f"{config.method!r}"
        )
    if config.variant != "release":
        raise ValueError(
            "checkpoint: want a config with variant='release', which computes what the authors' "
            f"code does, got {config.variant!r}"
        )


def values_of(
    path: str | os.PathLike[str], method: Method, model: nn.Module, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of `own`, the state of an adapter. ValueError
    where one is missing, unknown, of another shape, or a base's that this model has not."""
    theirs = read(path)
    layout = _LAYOUTS[method.config.method](method, set(theirs))
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in own:
        whole = name.startswith(f"{EXTRA}.")
        source = layout.sources.get(name)
        names = (name.removeprefix(f"{EXTRA}."),) if whole or source is None else source.names
        missing = [each for each in names if each not in theirs]
        if missing:
            raise ValueError(f"{path}: want {missing[0]} for {name}, got no tensor of that name")
        values = [theirs[each] for each in names]
        try:
            found[name] = values[0] if source is None else source.make(*values)
        except ValueError as error:
            raise ValueError(f"{path}: {names[0]}: {error}") from error
        except RuntimeError as error:
            shapes = [list(value.shape) for value in values]
            raise ValueError(
                f"{path}: {names[0]}: want {len(names)} tensors that fit each other for {name}, "
                f"got shapes {shapes}"
            ) from error
        used.update(names)
    check_tensors(str(path), found, own)
    _check_rest(path, {n: t for n, t in theirs.items() if n not in used}, layout, model)
    return found


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a `.pth` file: tensors alone, no code of a pickle runs."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: want a state dict that torch.load(weights_only=True) reads, got a file that "
            "is damaged or holds more than tensors; where you trust it, save its state_dict() to a "
            f"file of its own ({why})"
        ) from error
    if isinstance(held, dict) and isinstance(held.get("model"), dict):
        held = held["model"]
    entries = held.items() if isinstance(held, dict) else [("", held)]
    wrong = [v for k, v in entries if not isinstance(k, str) or not isinstance(v, Tensor)]
    if wrong or not entries:
        got = f"a {type(wrong[0]).__name__}" if wrong else "none"
        raise ValueError(f"{path}: want a dict of tensors, or one under 'model', got {got}")
    state: dict[str, Tensor] = {}
    for name, value in entries:
        for front in _FRONTS:
            name = name.removeprefix(front)
        if name in state:
            raise ValueError(
                f"{path}: {name}: want each name once, got it with and without a front"
            )
        state[name] = value
    return state


def _check_rest(
    path: str | os.PathLike[str], rest: Mapping[str, Tensor], layout: Layout, model: nn.Module
) -> None:
    """What is left must be the base's, and the base's own."""
    adapter = [name for name in rest if re.match(layout.words, name)]
    strange = [n for n in rest if not re.match(f"(?:{layout.base})|(?:{layout.beside})", n)]
    kept = [name for name in adapter if not re.match(layout.beside, name)]
    if kept or strange:
        first, more = (kept or strange)[0], len({*kept, *strange}) - 1
        raise ValueError(
            f"{path}: {first}: want names that this config has a place for, got one that it has "
            f"not (and {more} more); is it the config that was trained?"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    other = [
        name
        for name, value in rest.items()
        if name in parameters and _differs(value, parameters[name])
    ]
    if other:
        raise ValueError(
            f"{path}: {other[0]}: want the values of this model's base, got others (of "
            f"{len(other)} tensors): load it into the base that was trained on, and name what was "
            "trained whole in modules_to_save"
        )
    known = {name.rpartition(".")[0] for name in parameters}
    absent = [n for n in rest if "visual_embedding" in n and n.rpartition(".")[0] not in known]
    if absent:
        warnings.warn(
            f"attach: {len(absent)} tensors of {path} belong to a module that this model has not, "
            f"{absent[0]} first",
            stacklevel=5,
        )


def _differs(value: Tensor, parameter: Tensor) -> bool:
    """A base may be kept in another dtype; resized embeddings are not compared."""
    if parameter.is_meta or value.shape != parameter.shape:
        return False
    return not torch.equal(value.to(parameter), parameter)
