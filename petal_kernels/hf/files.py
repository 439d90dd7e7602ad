"""The adapter on disk: a directory with adapter.safetensors and adapter_config.json.

The json says what the tensors are (format_version, method, variant, config, signature of the base)
and pins them by size and digest. Both files are written under a temporary name, synced and renamed,
the tensors first. Anything that does not fit raises ValueError with the file, the key, what is
wanted and what is there; pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petal_kernels.hf.config import METHODS, AdapterConfig

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
EXTRA = "modules_to_save"  # prefix of the tensors of modules trained whole

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_KEYS = ("format_version", "method", "variant", "config", "base", "tensors")
_TRAINING_ONLY = ("dropout",)  # config fields in which a file may differ from the attachment


@dataclass
class Saved:
    """An adapter read from disk, its two files already checked against each other."""

    directory: Path
    config: AdapterConfig
    base: dict[str, Any]
    tensors: dict[str, Tensor]

    def check_base(self, signature: dict[str, Any]) -> None:
        path = self.directory / CONFIG
        for key, got in _flat(signature).items():
            want = _flat(self.base).get(key)
            if want != got:
                raise ValueError(
                    f"{path}: base.{key}: the adapter was trained on a base with {want!r}, "
                    f"this model has {got!r}"
                )
        extra = sorted(set(_flat(self.base)) - set(_flat(signature)))
        if extra:
            raise ValueError(f"{path}: base.{extra[0]}: this model has no such entry")

    def check_config(self, config: AdapterConfig) -> None:
        if config.method != self.config.method:
            raise ValueError(
                f"{self.directory / CONFIG}: method: want {config.method!r} as attached, got "
                f"{self.config.method!r}"
            )
        mine, theirs = config.to_dict(), self.config.to_dict()
        for key, want in mine.items():
            if key not in _TRAINING_ONLY and theirs[key] != want:
                raise ValueError(
                    f"{self.directory / CONFIG}: config.{key}: want {want!r} as attached, "
                    f"got {theirs[key]!r}"
                )

    def check_tensors(self, state: Mapping[str, Tensor]) -> None:
        check_tensors(str(self.directory / TENSORS), self.tensors, state)


def check_tensors(where: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """ValueError unless `got` has the names and shapes of `want`, and dtypes that fit."""
    missing, unexpected = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing or unexpected:
        raise ValueError(f"{where}: missing keys {missing}, unexpected keys {unexpected}")
    for name, tensor in want.items():
        if got[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name}: want shape {list(tensor.shape)}, got {list(got[name].shape)}"
            )
        if not _fits(name, got[name].dtype, tensor.dtype):
            raise ValueError(
                f"{where}: {name}: want {tensor.dtype} (or what converts to it exactly), "
                f"got {got[name].dtype}"
            )


def _fits(name: str, got: torch.dtype, want: torch.dtype) -> bool:
    """Adapters are only ever widened; modules trained whole follow the dtype of their base."""
    if name.startswith(EXTRA + "."):
        return got.is_floating_point == want.is_floating_point
    return torch.promote_types(got, want) == want


def write(
    directory: str | os.PathLike[str],
    config: AdapterConfig,
    signature: dict[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    """Writes an adapter; an interruption leaves the files that were there, or is noticed later."""
    from safetensors.torch import save

    meta = [name for name, tensor in state.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"save: want tensors with values, got {meta[0]} on the meta device")
    folder = Path(directory)
    if folder.suffix in _PICKLES or folder.is_file():
        raise ValueError(f"{folder}: want a directory to save into, got a file name")
    folder.mkdir(parents=True, exist_ok=True)
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        metadata={"format": "pt", "method": config.method, "format_version": str(FORMAT_VERSION)},
    )
    values = {
        "format_version": FORMAT_VERSION,
        "method": config.method,
        "variant": config.variant,
        "config": config.to_dict(),
        "base": signature,
        "tensors": {
            "file": TENSORS,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    }
    text = json.dumps(values, indent=2) + "\n"
    contents = {TENSORS: data, CONFIG: text.encode()}
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            _write_synced(temporary[name], content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    _sync_directory(folder)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(directory: str | os.PathLike[str]) -> Saved:
    """Reads and checks an adapter directory; ValueError says which file is wrong, and how."""
    folder = _folder(Path(directory))
    path = folder / CONFIG
    values = _read_config(path)
    config = _parse_config(path, values)
    tensors = _read_tensors(folder / TENSORS, values["tensors"])
    return Saved(folder, config, values["base"], tensors)


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
    names = sorted(entry.name for entry in path.iterdir())
    missing = [name for name in (TENSORS, CONFIG) if name not in names]
    if missing:
        pickles = [name for name in names if Path(name).suffix in _PICKLES]
        note = f" (the pickle {pickles[0]} is refused)" if pickles else ""
        raise ValueError(f"{path}: want {TENSORS} and {CONFIG}, missing {missing}{note}")
    return path


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as json (truncated?): {error}") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}: want a json object, got a {kind}")
    version = values.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: want at most {FORMAT_VERSION}, got {version}; "
            "a newer petal_kernels wrote this file"
        )
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise ValueError(f"{path}: want the keys {list(_KEYS)}, missing {missing}")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version: want {FORMAT_VERSION}, got {version!r}")
    if values["method"] not in METHODS:
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


def _read_tensors(path: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise ValueError(f"{path}: want a safetensors file, got a pickle, which is refused")
    want = entry.get("bytes")
    if want != len(data):
        raise ValueError(
            f"{path}: want {want} bytes as {CONFIG} says, got {len(data)} (truncated, or the two "
            "files are not of one save)"
        )
    digest = hashlib.sha256(data).hexdigest()
    if entry.get("sha256") != digest:
        raise ValueError(
            f"{path}: sha256: want {entry.get('sha256')}, got {digest} (damaged, or the two files "
            "are not of one save)"
        )
    try:
        tensors: dict[str, torch.Tensor] = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    return tensors


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
