"""Builds the compiled parts with ninja; everything else about the package is in pyproject.toml.

    petal_kernels/lib/libpetal_cpu.so   g++, one object per kernel and instruction set, stable ABI
    petal_kernels/lib/libpetal_cuda.so  where nvcc is found; needs no GPU and no torch with CUDA
    petal_kernels/_host.<tag>.so        pybind11: build facts, CPU capability
    petal_kernels/_front.<tag>.so       short ways for small calls; for this very torch
    petal_kernels/lib/build.json        what was built, or why not

By default what this machine can run: the CPU kernels for its instruction sets, the CUDA ones where
a CUDA device is visible, for its architecture. What cannot be built for want of a tool is left out
with its reason; a source that does not compile is an error.

    PETAL_BUILD_CUDA=1     insists on the CUDA kernels; =0 leaves them out, as PETAL_BUILD_CPU=0,
                           PETAL_BUILD_HOST=0 and PETAL_BUILD_FRONT=0 do with the others
    PETAL_CUDA_ARCHS       architectures, "80;90;100" where no device is visible; the last one is
                           also kept as PTX
    PETAL_CPU_ISAS         instruction sets beside the generic one, of "avx2;avx512"
    PETAL_BUILD_CACHE      where compiled objects are kept for the next clone, by what they were
                           made of; default ~/.cache/petal_kernels; =0: nowhere
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
sys.path.insert(0, str(SOURCES))
import machine  # noqa: E402
from ninja_file import NinjaFile, ObjectCache  # noqa: E402

# A message names a source the same in every clone.
AS_CSRC = f"-ffile-prefix-map={SOURCES}=csrc"
STABLE_ABI = "0x020b000000000000"  # torch 2.11
ISAS = {
    "generic": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
}
HOW = (
    "To get the compiled kernels: install torch, ninja, pybind11, setuptools and a C++ compiler "
    "(and nvcc for CUDA), then `pip install --no-build-isolation .`"
)
OFF = "it was switched off"
NO_DEVICE = "no CUDA device is visible (PETAL_BUILD_CUDA=1 builds for other machines)"
# The last two: GCC 12 warns about its own AVX-512 intrinsics.
CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas "
    "-Wno-uninitialized -Wno-maybe-uninitialized"
)


def _commit() -> tuple[str, str]:
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h %cs"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    return (found[0], found[1]) if len(found) == 2 else ("unknown", "unknown")


def _torch_version(torch: Path | None) -> str:
    """Read, not imported: a build needs torch's headers alone."""
    if torch is None:
        return "none"
    found: dict[str, str] = {}
    exec((torch / "version.py").read_text(), found)
    return str(found["__version__"])


@dataclass
class Tools:
    """What the environment offers, and why a product cannot be built with it (None: it can)."""

    cxx: str | None = field(default_factory=machine.compiler)
    ninja: str | None = field(default_factory=machine.ninja)
    nvcc: str | None = field(default_factory=machine.nvcc)
    torch: Path | None = field(default_factory=lambda: machine.package("torch"))
    pybind11: Path | None = field(default_factory=lambda: machine.package("pybind11"))
    gpus: list[str] = field(default_factory=machine.visible_archs)
    reasons: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        common = None
        if self.cxx is None:
            common = "no C++ compiler was found"
        elif self.ninja is None:
            common = "ninja was not found"
        no_torch = None if self.torch else "torch was not in the build environment"
        self.reasons["host"] = common or (None if self.pybind11 else "pybind11 was not found")
        self.reasons["cpu"] = common or no_torch
        self.reasons["front"] = common or no_torch
        for part in ("host", "front", "cpu"):
            if os.environ.get(f"PETAL_BUILD_{part.upper()}") == "0":
                self.reasons[part] = OFF
        cuda = common or no_torch or (None if self.nvcc else "nvcc was not found")
        if cuda is None and not list(SOURCES.glob("*/cuda/*.cpp")):
            cuda = "there are no CUDA sources"
        wish = os.environ.get("PETAL_BUILD_CUDA")
        if wish == "1" and cuda is not None:
            raise SystemExit(f"PETAL_BUILD_CUDA=1, but {cuda}")
        if wish is None and cuda is None and not self.gpus:
            cuda = NO_DEVICE
        self.reasons["cuda"] = OFF if wish == "0" else cuda


def _made_with(tools: Tools, compiler: str) -> str:
    """The versions of everything that an object is made with and its command does not show."""
    assert tools.torch is not None
    assert tools.cxx is not None
    torch = (tools.torch / "version.py").read_text()
    return "\n".join([*map(machine.versions, {compiler: 0, tools.cxx: 0}), torch])


def object_cache(tools: Tools) -> ObjectCache:
    """Where objects are kept, if they are."""
    wish = os.environ.get("PETAL_BUILD_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = None if wish == "0" else Path(wish or home / "petal_kernels")
    return ObjectCache(root, SOURCES, [SOURCES, *([tools.torch] if tools.torch else [])])


def _torch_flags(torch: Path) -> str:
    include = torch / "include"
    api = include / "torch" / "csrc" / "api" / "include"
    return f"-DTORCH_TARGET_VERSION={STABLE_ABI} -isystem {include} -isystem {api}"


def cpu_isas() -> list[str]:
    """The generic instruction set, and those asked for that this family of processors has; without
    a wish those that this processor has."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    has = machine.cpu_flags()
    own = [i for i in ISAS if has is None or _needs(i) <= has]
    wish = os.environ.get("PETAL_CPU_ISAS")
    wanted = own if wish is None else [i.strip() for i in wish.replace(",", ";").split(";")]
    unknown = set(wanted) - {"", *ISAS}
    if unknown:
        raise SystemExit(f"PETAL_CPU_ISAS: want some of {', '.join(ISAS)}, got {min(unknown)}")
    return [isa for isa in ISAS if isa == "generic" or (x86 and isa in wanted)]


def _needs(isa: str) -> set[str]:
    """The flags that a processor shows which runs it."""
    return {flag.removeprefix("-m") for flag in ISAS[isa].split()}


def add_cpu(n: NinjaFile, tools: Tools) -> None:
    """Kernels once per instruction set, the host side once, one library."""
    assert tools.torch is not None
    assert tools.cxx is not None
    command = f"{tools.cxx} {CXX_FLAGS} {AS_CSRC} -I{SOURCES} $flags -MMD -MF $out.d -c $in -o $out"
    n.rule("cxx", command, tool=_made_with(tools, tools.cxx))
    built = " ".join(f"-DPETAL_BUILT_{isa.upper()}" for isa in cpu_isas())
    host = f"{_torch_flags(tools.torch)} {built}"
    objects = []
    for source in sorted(SOURCES.glob("*/cpu/*.cpp")):
        if source.name != "kernel.cpp":
            objects.append(n.compiled("cxx", source, host))
            continue
        for isa in cpu_isas():
            flags = f"{ISAS[isa]} -DPETAL_ISA={isa}"
            objects.append(n.compiled("cxx", source, flags, isa))
    n.rule(
        "link_cpu",
        f"{tools.cxx} -shared -o $out $in -L{tools.torch / 'lib'} "
        "-Wl,--no-as-needed -ltorch_cpu -lc10",
        depfile=False,
    )
    n.product(n.edge("link_cpu", n.build / "libpetal_cpu.so", objects))


def add_cuda(n: NinjaFile, tools: Tools) -> None:
    """Device code for every architecture, the CUDA runtime linked in.

    libtorch_cuda is named as a dependency through a stub of the same soname: at run time torch has
    loaded the real one, at build time no torch with CUDA is needed. Named by -l: nvcc puts files
    before --no-as-needed, and many linkers leave out what no symbol is taken from.
    """
    assert tools.torch is not None
    assert tools.nvcc is not None
    archs = cuda_archs(tools.gpus)
    codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    common = f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,{AS_CSRC} -I{SOURCES}"
    command = f"{tools.nvcc} {common} $flags -MD -MF $out.d -c $in -o $out"
    n.rule("nvcc", command, tool=_made_with(tools, tools.nvcc))
    kernels = sorted(SOURCES.glob("*/cuda/*.cu"))
    objects = [n.compiled("nvcc", s, " ".join(codes)) for s in kernels]
    calls = f"-DUSE_CUDA {_torch_flags(tools.torch)}"
    objects += [n.compiled("nvcc", s, calls) for s in sorted(SOURCES.glob("*/cuda/*.cpp"))]
    stub = n.build / "stub"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "empty.cpp").write_text("")
    n.rule("stub", f"{tools.cxx} -shared -Wl,-soname,libtorch_cuda.so -o $out $in", depfile=False)
    named = n.edge("stub", stub / "libtorch_cuda.so", [stub / "empty.cpp"])
    n.rule(
        "link_cuda",
        f"{tools.nvcc} -shared -cudart static -o $out $in -L{tools.torch / 'lib'} -L{stub} "
        "-Xlinker --no-as-needed -ltorch_cpu -lc10 -ltorch_cuda",
        depfile=False,
    )
    n.product(n.edge("link_cuda", n.build / "libpetal_cuda.so", [*objects, named]))


def cuda_archs(gpus: Sequence[str] = ()) -> list[str]:
    """The architectures asked for, those of `gpus`, or of three generations; lowest first."""
    default = ";".join(gpus) or "80;90;100"
    wanted = os.environ.get("PETAL_CUDA_ARCHS", default).replace(",", ";").replace(".", "")
    return sorted({a.strip() for a in wanted.split(";") if a.strip()}, key=int)


def facts(tools: Tools) -> dict[str, str]:
    """What doctor prints about the build."""
    commit, date = _commit()
    return {
        "compiler": machine.version(tools.cxx) if tools.cxx else "none",
        "flags": CXX_FLAGS,
        "isas": ",".join(cpu_isas()) if tools.reasons["cpu"] is None else "",
        "nvcc": machine.version(tools.nvcc)
        if tools.nvcc and tools.reasons["cuda"] is None
        else "none",
        "cuda_archs": ",".join(cuda_archs(tools.gpus)) if tools.reasons["cuda"] is None else "",
        "stable_abi": "torch 2.11",
        "torch": _torch_version(tools.torch),
        "commit": commit,
        "commit_date": date,
    }


def add_host(n: NinjaFile, tools: Tools, known: dict[str, str]) -> None:
    """The pybind11 module; the facts are a generated header, rewritten only when they change."""
    assert tools.pybind11 is not None
    header = n.build / "facts.h"
    rows = "".join(f"  {{{json.dumps(k)}, {json.dumps(v)}}},\n" for k, v in known.items())
    text = f"static const char* const kFacts[][2] = {{\n{rows}}};\n"
    if not header.exists() or header.read_text() != text:
        n.build.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    python = sysconfig.get_paths()["include"]
    include = f"-isystem {python} -isystem {tools.pybind11 / 'include'} -I{n.build}"
    flags = "-O2 -std=c++17 -fPIC -fvisibility=hidden"
    n.rule(
        "host",
        f"{tools.cxx} {flags} {include} -MMD -MF $out.d -c $in -o $out",
    )
    n.rule("link_host", f"{tools.cxx} -shared -o $out $in", depfile=False)
    built = n.edge("host", n.build / "host_module.o", [SOURCES / "host_module.cpp"])
    n.product(
        n.edge("link_host", n.build / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}", [built])
    )


def add_front(n: NinjaFile, tools: Tools) -> None:
    """The module on torch's own C++ interface, pybind11 in torch's headers."""
    assert tools.torch is not None
    include = tools.torch / "include"
    api = include / "torch" / "csrc" / "api" / "include"
    python = sysconfig.get_paths()["include"]
    command = (
        f"{tools.cxx} -O2 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -isystem {include} "
        f"-isystem {api} -isystem {python} -I{SOURCES} $flags -MMD -MF $out.d -c $in -o $out"
    )
    n.rule("front", command, tool=_made_with(tools, f"{tools.cxx}") + sys.version)
    n.rule(
        "link_front",
        f"{tools.cxx} -shared -o $out $in -L{tools.torch / 'lib'} -Wl,--no-as-needed "
        "-ltorch_python -ltorch_cpu -lc10",
        depfile=False,
    )
    built = n.compiled("front", SOURCES / "front_module.cpp", AS_CSRC)
    name = f"_front{sysconfig.get_config_var('EXT_SUFFIX')}"
    n.product(n.edge("link_front", n.build / name, [built]))


def _modules(target: Path) -> list[Path]:
    return [*target.glob("_host*.so"), *target.glob("_front*.so")]


class BuildKernels(build_ext):
    """build_ext, run by ninja; never fails for want of a tool."""

    def _target(self) -> Path:
        return (
            ROOT / "petal_kernels"
            if self.inplace
            else Path(self.build_lib).resolve() / "petal_kernels"
        )

    def run(self) -> None:
        tools = Tools()
        known = facts(tools)
        n = NinjaFile(ROOT / "build" / "ninja", object_cache(tools))
        if tools.reasons["cpu"] is None:
            add_cpu(n, tools)
        if tools.reasons["cuda"] is None:
            add_cuda(n, tools)
        if tools.reasons["host"] is None:
            add_host(n, tools, known)
        if tools.reasons["front"] is None:
            add_front(n, tools)
        if n.products:
            assert tools.ninja is not None
            n.run(tools.ninja)
        self._install(n.products, {"reasons": tools.reasons, "facts": known})
        for name, reason in tools.reasons.items():
            if reason is not None:
                print(f"petal-kernels: the {name} part is not built: {reason}", file=sys.stderr)
        if set(tools.reasons.values()) - {None, OFF, NO_DEVICE}:
            print(HOW, file=sys.stderr)

    def _install(self, products: list[Path], record: dict[str, object]) -> None:
        target = self._target()
        lib = target / "lib"
        lib.mkdir(parents=True, exist_ok=True)
        stale = [*lib.glob("libpetal_*.so"), *_modules(target)]
        fresh = {(lib if p.name.startswith("lib") else target) / p.name: p for p in products}
        for path in stale:
            if path not in fresh:
                path.unlink()
        for path, built in fresh.items():
            # Replaced, not overwritten: a process may have the old one mapped.
            if not path.exists() or path.read_bytes() != built.read_bytes():
                temporary = path.with_name(path.name + ".new")
                shutil.copy2(built, temporary)
                temporary.replace(path)
        (lib / "build.json").write_text(json.dumps({**record, "how": HOW}, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        target = self._target()
        found = [
            *target.glob("lib/libpetal_*.so"),
            *_modules(target),
            target / "lib" / "build.json",
        ]
        return [str(p) for p in found]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build writes into the source tree itself."""


class Wheel(bdist_wheel):
    """Without the two modules the compiled parts know torch's stable ABI alone: one wheel for every
    Python and torch."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform_name = super().get_tag()
        reasons = Tools().reasons
        if reasons["host"] is None or reasons["front"] is None:
            return python, abi, platform_name
        return "py3", "none", platform_name


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("petal_kernels._host", ["csrc/host_module.cpp"])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
