"""Compiles the CUDA sources as C++ against the emulation header, once per content."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
# Objects are named by their content, so that copies of the tree may share one folder.
CACHE = Path(os.environ.get("PETAL_EMULATION_CACHE", ROOT / "build" / "emulation"))
INCLUDES = (HERE, HERE / "include", CSRC)
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

COMMON = (
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DPETAL_EMULATION",
    *(f"-I{folder}" for folder in INCLUDES),
)
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# Without it every fmaf is a call into libm. ISO C++ keeps the compiler from contracting others.
RELEASE = ("-O2", "-march=native")


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def kernels() -> list[Path]:
    return sorted(CSRC.glob("*/cuda/*.cu"))


def registrations() -> list[Path]:
    """The host side, which includes torch."""
    return sorted(CSRC.glob("*/cuda/*.cpp"))


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(include)]


def _included(source: Path, found: set[Path]) -> set[Path]:
    """The source and what it includes of this repository, directly or not."""
    if source in found:
        return found
    found.add(source)
    for name in _INCLUDE.findall(source.read_text()):
        places = (folder / name for folder in (source.parent, *INCLUDES))
        header = next((p.resolve() for p in places if p.is_file()), None)
        if header is not None:
            _included(header, found)
    return found


@contextlib.contextmanager
def _to_make(target: Path) -> Iterator[bool]:
    """Whether it is still to be made; processes that want the same one wait for the first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.exists()


def _object(source: Path, flags: list[str]) -> Path:
    content = hashlib.sha256(" ".join(flags).replace(str(ROOT), "").encode())
    for path in sorted(_included(source, set())):
        content.update(path.read_bytes())
    target = CACHE / f"{source.name}-{content.hexdigest()[:16]}.o"
    with _to_make(target) as missing:
        if missing:
            part = target.with_suffix(f".{os.getpid()}")
            command = [str(compiler()), *flags, "-x", "c++", "-c", str(source), "-o", str(part)]
            subprocess.run(command, check=True)
            part.replace(target)
    return target


def _link(name: str, sources: list[Path], flags: tuple[str, ...], link: list[str]) -> Path:
    registered = registrations()

    def build(source: Path) -> Path:
        extra = _torch_flags() if source in registered else []
        return _object(source, [*COMMON, *flags, *extra])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(build, sources))
    key = hashlib.sha256(" ".join([*map(str, objects), *link]).encode()).hexdigest()[:16]
    target = CACHE / f"{key}-{name}"
    with _to_make(target) as missing:
        if missing:
            part = target.with_suffix(f".{os.getpid()}")
            command = [str(compiler()), *flags, *map(str, objects), "-o", str(part), *link]
            subprocess.run(command, check=True)
            part.replace(target)
    return target


def library() -> tuple[Path, ctypes.CDLL]:
    """Kernels and registrations (``torch.ops.petal_cuda_emulated``, CPU tensors) and the probes."""
    sources = [
        *kernels(),
        *registrations(),
        HERE / "cuda_emulation.cpp",
        HERE / "probes.cpp",
    ]
    lib = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    path = _link("libpetal_emulated.so", sources, RELEASE, link)
    torch.ops.load_library(str(path))
    return path, ctypes.CDLL(str(path))


def drivers() -> list[Path]:
    """Programs without torch, each for some operators."""
    return sorted(HERE.glob("driver*.cpp"))


def sanitized(driver: Path) -> Path:
    """A driver, built: kernels on exact-size buffers under both sanitizers."""
    sources = [*kernels(), HERE / "cuda_emulation.cpp", driver]
    return _link(driver.stem, sources, SANITIZE, [])
