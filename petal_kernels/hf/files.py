"""The adapter on disk: a directory with adapter.safetensors and petal_config.json.

The json says what the tensors are (format_version, method, variant, config, signature of the base)
and pins them by size and digest, and itself by its own `sha256` (files written before it had one
load all the same). Anything that does not fit raises ValueError with the file, the key, what is
wanted and what is there; pickles are never opened.

A save is one step for whoever reads the folder, or dies with it: see `pair`. Folders in which the
json has its old name, adapter_config.json, load too. PEFT's file of that name is read by
`peft_files`; here it is neither written over nor removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from petal_kernels.hf import pair
from petal_kernels.hf.config import METHODS, AdapterConfig
from petal_kernels.hf.names import renamed
from petal_kernels.hf.pair import CONFIG, OLD_CONFIG, TENSORS
from petal_kernels.hf.tensors import EXTRA, check_tensors, gathered

FORMAT_VERSION = 1

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_KEYS = ("format_version", "method", "variant", "config", "base", "tensors")
_SEAL = "sha256"  # of the json, over everything else in it
_TRAINING_ONLY = (
    "dropout",
    "frozen_norms",
    "lora_dropout",
    "recompute_mlp",
)  # config fields in which a file may differ from the attachment


@dataclass
class Saved:
    """An adapter read from disk, its two files already checked against each other."""

    path: Path  # of the json
    config: AdapterConfig
    base: dict[str, Any]
    tensors: dict[str, Tensor]

    def config_for(self, model: nn.Module) -> AdapterConfig:
        """The config to attach to `model` with."""
        return self.config

    def check_base(self, signature: dict[str, Any]) -> None:
        for key, got in flat(signature).items():
            want = flat(self.base).get(key)
            if want != got:
                raise ValueError(
                    f"{self.path}: base.{key}: the adapter was trained on a base with {want!r}, "
                    f"this model has {got!r}"
                )
        extra = sorted(set(flat(self.base)) - set(flat(signature)))
        if extra:
            raise ValueError(f"{self.path}: base.{extra[0]}: this model has no such entry")

    def check_config(self, config: AdapterConfig, model: nn.Module) -> None:
        if config.method != self.config.method:
            raise ValueError(
                f"{self.path}: method: want {config.method!r} as attached, got "
                f"{self.config.method!r}"
            )
        mine, theirs = config.to_dict(), self.config.to_dict()
        for key, want in mine.items():
            if key not in _TRAINING_ONLY and theirs[key] != want:
                raise ValueError(
                    f"{self.path}: config.{key}: want {want!r} as attached, got {theirs[key]!r}"
                )

    def tensors_for(
        self, state: Mapping[str, Tensor], prefixes: Sequence[str] = (), *, mirrors: bool = False
    ) -> dict[str, Tensor]:
        """The tensors under the names of `state`; ValueError where names, shapes or dtypes do not
        fit. Modules trained whole, and all where the adapter `mirrors` the model's names, may lie
        elsewhere than where they were saved by what `canonical` drops, `prefixes` among it."""
        found = renamed(self.tensors, state, prefixes, f"{EXTRA}.")
        if mirrors:
            found = renamed(found, state, prefixes, "")
        check_tensors(str(self.path.with_name(TENSORS)), found, state)
        return found


def write(
    directory: str | os.PathLike[str],
    config: AdapterConfig,
    signature: dict[str, Any],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Size] | None = None,
) -> None:
    """Writes an adapter; whatever interrupts it, the folder holds the old one or the new one.

    By `shapes`, those of `state` when nothing was sharded yet, one in pieces is known. Where it
    holds DTensors, every process of their mesh has to call this.
    """
    from safetensors.torch import save

    state = gathered("save", state, shapes)
    folder = to_save_into(directory)
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        metadata={"format": "pt", "method": config.method, "format_version": str(FORMAT_VERSION)},
    )
    digest = hashlib.sha256(data).hexdigest()
    values = {
        "format_version": FORMAT_VERSION,
        "method": config.method,
        "variant": config.variant,
        "config": config.to_dict(),
        "base": signature,
        "tensors": {"file": TENSORS, "bytes": len(data), "sha256": digest},
    }
    text = json.dumps(seal(values), indent=2) + "\n"
    with pair.alone(folder):
        old = folder / OLD_CONFIG
        pair.replace(folder, data, digest, text.encode(), old if is_ours(old) else None)
        pair.remove_stale(folder)


def to_save_into(directory: str | os.PathLike[str]) -> Path:
    """The folder, made where there is none."""
    folder = path_of(directory)
    if folder.suffix in _PICKLES or folder.is_file():
        raise ValueError(f"{folder}: want a directory to save into, got a file name")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_ours(path: Path) -> bool:
    """Whether this package wrote the json, be it damaged since; where in doubt not."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(values, dict) and {*_KEYS} <= {*values} and "peft_type" not in values


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the digest of everything else in them, as they read back from json."""
    rest = {key: value for key, value in json.loads(json.dumps(values)).items() if key != _SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**values, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read(directory: str | os.PathLike[str]) -> Saved:
    """Reads and checks an adapter directory; ValueError says which file is wrong, and how."""
    folder = _folder(path_of(directory))
    while True:
        found = pair.json_of(folder)
        if found is None:
            raise _missing(folder)
        path, text = found
        try:
            values = _read_config(path, text)
            config = _parse_config(path, values)
            tensors = _read_tensors(path, values["tensors"])
        except ValueError:
            if pair.json_of(folder) == found:
                raise
            continue  # somebody saved into it meanwhile
        return Saved(path, config, values["base"], tensors)


def path_of(given: object, argument: str = "directory") -> Path:
    """Raises unless it can name a directory, or what the argument of another name means."""
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"{argument}: want a path, got a {type(given).__name__}")
    name = os.fspath(given)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{argument}: want a path, got {name!r}")
    return Path(name)


def _folder(path: Path) -> Path:
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path}: a pickle can run code when it is opened and is refused; want a directory "
            f"with {TENSORS} and {CONFIG}"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such directory")
    if not path.is_dir():
        raise ValueError(f"{path}: want a directory with {TENSORS} and {CONFIG}, got a file")
    return path


def _missing(folder: Path) -> ValueError:
    names = sorted(entry.name for entry in folder.iterdir())
    missing = [name for name in (TENSORS, CONFIG) if name not in names]
    if OLD_CONFIG in names:
        missing = [TENSORS]
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    note = f" (the pickle {pickles[0]} is refused)" if pickles else ""
    return ValueError(f"{folder}: want {TENSORS} and {CONFIG}, missing {missing}{note}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no json")


def json_object(path: Path, text: bytes) -> dict[str, Any]:
    """What a json file holds; ValueError unless it is one object, each key once."""
    try:
        values = json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as json (truncated?): {error}") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}: want a json object, got a {kind}")
    return values


def _read_config(path: Path, text: bytes) -> dict[str, Any]:
    values = json_object(path, text)
    version = values.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: want at most {FORMAT_VERSION}, got {version}; "
            "a newer petal_kernels wrote this file"
        )
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise ValueError(f"{path}: want the keys {list(_KEYS)}, missing {missing}")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version: want {FORMAT_VERSION}, got {version!r}")
    unknown = sorted(set(values) - {*_KEYS, _SEAL})
    if unknown:
        raise ValueError(f"{path}: want the keys {list(_KEYS)}, got unknown {unknown}")
    want = seal(values)[_SEAL]
    if values.get(_SEAL, want) != want:
        raise ValueError(
            f"{path}: {_SEAL}: want {want}, got {values[_SEAL]!r} (damaged, or edited by hand: "
            f"then take the key {_SEAL!r} out)"
        )
    if not isinstance(values["method"], str) or values["method"] not in METHODS:
        raise ValueError(f"{path}: method: want one of {sorted(METHODS)}, got {values['method']!r}")
    for key in ("config", "base", "tensors"):
        if not isinstance(values[key], dict):
            got = values[key]
            raise ValueError(f"{path}: {key}: want an object, got {got!r}")
    return values


def _parse_config(path: Path, values: dict[str, Any]) -> AdapterConfig:
    try:
        config = METHODS[values["method"]].from_dict(values["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: config: {error}") from error
    if values["variant"] != config.variant:
        raise ValueError(
            f"{path}: variant: want {config.variant!r} as in config, got {values['variant']!r}"
        )
    return config


def _read_tensors(json_path: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """Of the file that the json means: under its usual name, or under that of a save that ended
    before its last step (which a running one may take meanwhile: hence once more)."""
    path, digest = json_path.with_name(TENSORS), entry.get("sha256")
    if not isinstance(digest, str):
        raise ValueError(f"{json_path}: tensors.sha256: want a digest, got {digest!r}")
    for candidate in (path, pair.pending(path.parent, digest), path):
        try:
            data = candidate.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            return parse_tensors(candidate, data)
    if not os.path.lexists(path):
        raise _missing(path.parent)
    if not path.is_file():
        raise ValueError(f"{path}: want a file, got something else")
    data = path.read_bytes()
    refuse_pickle(path, data)
    want = entry.get("bytes")
    if want != len(data):
        raise ValueError(
            f"{path}: want {want} bytes as {json_path.name} says, got {len(data)} (truncated, or "
            "the two files are not of one save)"
        )
    got = hashlib.sha256(data).hexdigest()
    raise ValueError(
        f"{path}: sha256: want {digest}, got {got} (damaged, or the two files are not of one save)"
    )


def refuse_pickle(path: Path, data: bytes) -> None:
    """ValueError where `data` begins as torch's files do."""
    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise ValueError(f"{path}: want a safetensors file, got a pickle, which is refused")


def parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """What a safetensors file holds; ValueError where `data` is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, torch.Tensor] = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # The torch half of the library has no error of its own: a dtype without a tensor is a
        # KeyError there, data of another size a RuntimeError.
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    return tensors


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What nested dicts hold, by the path of keys to it."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
