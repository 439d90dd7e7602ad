"""The adapter on disk: a directory with adapter.safetensors and adapter_config.json.

The json says what the tensors are (format_version, method, variant, config, signature of the base)
and pins them by size and digest, and itself by its own `sha256` (files written before it had one
load all the same). Anything that does not fit raises ValueError with the file, the key, what is
wanted and what is there; pickles are never opened.

A save is one step for whoever reads the folder, or dies with it: the tensors are written under a
name made of their digest, `.adapter-DIGEST.safetensors`; the json that names this digest is renamed
into place, from where on the folder is the new adapter; only then the tensors get their usual name.
A reader takes whichever of the two names has the digest of the json it read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petal_kernels._runtime.checks import FLOATING
from petal_kernels.hf.config import METHODS, AdapterConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
EXTRA = "modules_to_save"  # prefix of the tensors of modules trained whole

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_KEYS = ("format_version", "method", "variant", "config", "base", "tensors")
_SEAL = "sha256"  # of the json, over everything else in it
_PATIENCE = 60.0  # seconds to wait for another save into the same folder
_STALE = 3600.0  # seconds after which what an interrupted save left behind is removed
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
    if not want.is_floating_point:
        return got == want
    return got in FLOATING and torch.promote_types(got, want) == want


def write(
    directory: str | os.PathLike[str],
    config: AdapterConfig,
    signature: dict[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    """Writes an adapter; whatever interrupts it, the folder holds the old one or the new one."""
    from safetensors.torch import save

    meta = [name for name, tensor in state.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"save: want tensors with values, got {meta[0]} on the meta device")
    folder = _path(directory)
    if folder.suffix in _PICKLES or folder.is_file():
        raise ValueError(f"{folder}: want a directory to save into, got a file name")
    folder.mkdir(parents=True, exist_ok=True)
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
    with _alone(folder):
        _replace(folder, data, digest, text.encode())
        _remove_stale(folder)


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the digest of everything else in them, as they read back from json."""
    rest = {key: value for key, value in json.loads(json.dumps(values)).items() if key != _SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**values, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _pending(folder: Path, digest: str) -> Path:
    return folder / f".adapter-{digest[:16]}.safetensors"


def _replace(folder: Path, data: bytes, digest: str, text: bytes) -> None:
    pending, config = _pending(folder, digest), folder / CONFIG
    # Unique for threads, containers and machines that share a disk, too.
    mark = uuid.uuid4().hex
    tensors_file, config_file = (folder / f".{name}.{mark}.tmp" for name in (TENSORS, CONFIG))
    try:
        _write_synced(tensors_file, data)
        _write_synced(config_file, text)
        os.replace(tensors_file, pending)
        _sync_directory(folder)
        os.replace(config_file, config)  # the one step
        _sync_directory(folder)
        if config.read_bytes() == text:
            # Another machine's save of the same tensors may have been as far.
            with contextlib.suppress(FileNotFoundError):
                os.replace(pending, folder / TENSORS)
            _sync_directory(folder)
    finally:
        tensors_file.unlink(missing_ok=True)
        config_file.unlink(missing_ok=True)
        if not config.is_file() or config.read_bytes() != text:
            pending.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One save at a time into a folder, among the threads and processes of a machine. Where a
    folder cannot be locked the order of the steps alone has to do."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _PATIENCE
        while not _locked(descriptor) and time.monotonic() < until:
            time.sleep(0.01)
        yield
    finally:
        # A process forked meanwhile holds the descriptor too: closing it would not be enough.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """False while somebody else has it; True once it is ours, or cannot be locked at all."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_stale(folder: Path) -> None:
    for pattern in (".adapter*.tmp", ".adapter-*.safetensors"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()


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
    folder = _folder(_path(directory))
    path = folder / CONFIG
    while True:
        text = _bytes(path)
        try:
            values = _read_config(path, text)
            config = _parse_config(path, values)
            tensors = _read_tensors(folder, values["tensors"])
        except ValueError:
            if _bytes(path) == text:
                raise
            continue  # somebody saved into it meanwhile
        return Saved(folder, config, values["base"], tensors)


def _path(directory: object) -> Path:
    """Raises unless it can name a directory."""
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: want a path, got a {type(directory).__name__}")
    name = os.fspath(directory)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"directory: want a path, got {name!r}")
    return Path(name)


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        got = "something else" if path.exists() else "nothing there"
        raise ValueError(f"{path}: want a file, got {got}")
    return path.read_bytes()


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
    if missing == [TENSORS] and any(path.glob(".adapter-*.safetensors")):
        return path  # a first save that ended before its last step
    if missing:
        pickles = [name for name in names if Path(name).suffix in _PICKLES]
        note = f" (the pickle {pickles[0]} is refused)" if pickles else ""
        raise ValueError(f"{path}: want {TENSORS} and {CONFIG}, missing {missing}{note}")
    return path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no json")


def _read_config(path: Path, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
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


def _read_tensors(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """Of the file that the json means: under its usual name, or under that of a save that ended
    before its last step (which a running one may take meanwhile: hence once more)."""
    path, digest = folder / TENSORS, entry.get("sha256")
    if not isinstance(digest, str):
        raise ValueError(f"{folder / CONFIG}: tensors.sha256: want a digest, got {digest!r}")
    for candidate in (path, _pending(folder, digest), path):
        try:
            data = candidate.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            return _parse_tensors(candidate, data)
    data = _bytes(path)
    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise ValueError(f"{path}: want a safetensors file, got a pickle, which is refused")
    want = entry.get("bytes")
    if want != len(data):
        raise ValueError(
            f"{path}: want {want} bytes as {CONFIG} says, got {len(data)} (truncated, or the two "
            "files are not of one save)"
        )
    got = hashlib.sha256(data).hexdigest()
    raise ValueError(
        f"{path}: sha256: want {digest}, got {got} (damaged, or the two files are not of one save)"
    )


def _parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, torch.Tensor] = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # The torch half of the library has no error of its own: a dtype without a tensor is a
        # KeyError there, data of another size a RuntimeError.
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
