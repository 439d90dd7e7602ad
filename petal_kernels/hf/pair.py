"""A folder whose two files, an adapter's tensors and its json, change in one step.

The tensors are written under a name made of their digest, `.adapter-DIGEST.safetensors`; the json
that names this digest is renamed into place, from where on the folder is the new adapter; only then
the tensors get their usual name. A reader takes whichever of the two names has the digest of the
json it read.

The json is petal_config.json. In folders written before it had that name it is adapter_config.json,
which is PEFT's name and makes transformers take the folder for PEFT's. It counts where the new one
is missing: it goes last, after the step, so that at every moment one of the two says what to load.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TENSORS = "adapter.safetensors"
CONFIG = "petal_config.json"
OLD_CONFIG = "adapter_config.json"
CHECKPOINT = "model.safetensors"  # what Trainer reads, beside the two

_PATIENCE = 60.0  # seconds to wait for another save into the same folder
_STALE = 3600.0  # seconds after which what an interrupted save left behind is removed


def pending(folder: Path, digest: str) -> Path:
    """Where the tensors of this digest lie until the json names them."""
    return folder / f".adapter-{digest[:16]}.safetensors"


def json_of(folder: Path) -> tuple[Path, bytes] | None:
    """The json that says what the folder holds, and its content."""
    # The new name once more: a save may have put it there, and removed the old one, meanwhile.
    for name in (CONFIG, OLD_CONFIG, CONFIG):
        path = folder / name
        try:
            return path, path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            if path.is_file():
                raise
            raise ValueError(f"{path}: want a file, got something else") from error
    return None


def replace(folder: Path, data: bytes, digest: str, text: bytes, obsolete: Path | None) -> None:
    """Makes `data` and `text` the folder's adapter; then `obsolete`, the json of the adapter that
    was there under its old name, is removed."""
    waiting, config = pending(folder, digest), folder / CONFIG
    # Unique for threads, containers and machines that share a disk, too.
    mark = uuid.uuid4().hex
    tensors_file, config_file = (folder / f".{name}.{mark}.tmp" for name in (TENSORS, CONFIG))
    try:
        _write_synced(tensors_file, data)
        _write_synced(config_file, text)
        os.replace(tensors_file, waiting)
        _sync_directory(folder)
        os.replace(config_file, config)  # the one step
        _sync_directory(folder)
        if config.read_bytes() == text:
            # Another machine's save of the same tensors may have been as far.
            with contextlib.suppress(FileNotFoundError):
                os.replace(waiting, folder / TENSORS)
            _sync_directory(folder)
            if obsolete is not None:
                _remove(obsolete)
                _sync_directory(folder)
    finally:
        tensors_file.unlink(missing_ok=True)
        config_file.unlink(missing_ok=True)
        if not _is_named(folder, digest):
            waiting.unlink(missing_ok=True)


def replace_one(folder: Path, name: str, data: bytes) -> None:
    """Makes `data` the folder's file of that name."""
    temporary = folder / f".{name}.{uuid.uuid4().hex}.tmp"
    try:
        _write_synced(temporary, data)
        os.replace(temporary, folder / name)
        _sync_directory(folder)
    finally:
        temporary.unlink(missing_ok=True)


def replace_two(folder: Path, tensors: tuple[str, bytes], config: tuple[str, bytes]) -> None:
    """Makes both files the folder's, for readers who know of no digest (PEFT): a json that says
    something else goes first, so that none ever stands beside tensors that are not its own. A save
    that dies in between leaves a folder without a json, which readers refuse."""
    mark = uuid.uuid4().hex
    waiting = [(folder / f".{n}.{mark}.tmp", folder / n, data) for n, data in (tensors, config)]
    try:
        for temporary, _, data in waiting:
            _write_synced(temporary, data)
        _, path, text = waiting[1]
        if path.is_file() and path.read_bytes() != text:
            _remove(path)
            _sync_directory(folder)
        for temporary, final, _ in waiting:
            os.replace(temporary, final)
            _sync_directory(folder)
    finally:
        for temporary, _, _ in waiting:
            temporary.unlink(missing_ok=True)


def _is_named(folder: Path, digest: str) -> bool:
    """Whether a json of the folder means the tensors of this digest. The one that was there may, if
    the save that wrote it died after its step."""
    for name in (CONFIG, OLD_CONFIG):
        with contextlib.suppress(OSError):
            if digest.encode() in (folder / name).read_bytes():
                return True
    return False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
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


def remove_stale(folder: Path) -> None:
    """Removes what interrupted saves left behind, once no save can still be at it."""
    temporary = [f".{name}.*.tmp" for name in (CONFIG, CHECKPOINT)]
    for pattern in (".adapter*.tmp", *temporary, ".adapter-*.safetensors"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


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
