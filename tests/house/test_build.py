"""The build: what it made, and what it says where it could not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from petal_kernels import _build_info
from petal_kernels._runtime import device

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ROOT / "petal_kernels" / "lib"
SHIPPED = ("petal_kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md")

built = pytest.mark.skipif(device.cpu_library_reason() is not None, reason="no CPU library")


def setup_module() -> ModuleType:
    """setup.py as a module, without running the build."""
    spec = importlib.util.spec_from_file_location("petal_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@built
def test_facts_name_the_build() -> None:
    facts = _build_info.facts()
    for key in ("compiler", "flags", "isas", "nvcc", "cuda_archs", "stable_abi", "commit"):
        assert facts[key] is not None, key
    assert "generic" in facts["isas"]


@built
def test_capability_is_asked_at_run_time() -> None:
    capability = _build_info.cpu_capability()
    assert set(capability) == {"avx2", "avx512"}
    best = torch.ops.petal_native.cpu_isa("")
    assert capability.get(best, True), "the kernels in use are beyond this CPU"


@built
def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match="want generic, avx2, avx512 or best, got sse9"):
        torch.ops.petal_native.cpu_isa("sse9")


@built
@pytest.mark.parametrize(
    "library",
    ["libpetal_cpu.so", pytest.param("libpetal_cuda.so", marks=pytest.mark.cross_compile)],
)
def test_libraries_use_the_stable_abi_only(library: str) -> None:
    pytest.importorskip("torch_abi_audit")
    path = LIBRARIES / library
    if not path.exists():
        pytest.skip(f"{library} is not built")
    command = [str(Path(sys.executable).parent / "torch-abi-audit"), "--check", "torch", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Min torch:   2.11" in done.stdout


def test_each_missing_tool_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    module = setup_module()
    monkeypatch.delenv("PETAL_BUILD_CUDA", raising=False)
    monkeypatch.delenv("PETAL_BUILD_CPU", raising=False)
    here = Path("there")
    full = {"cxx": "g++", "ninja": "ninja", "nvcc": "nvcc", "torch": here, "pybind11": here}
    full["gpus"] = ["9.0"]
    assert set(module.Tools(**full).reasons.values()) == {None}
    expected = {
        "cxx": dict.fromkeys(("cpu", "cuda", "host", "front"), "no C++ compiler"),
        "ninja": dict.fromkeys(("cpu", "cuda", "host", "front"), "ninja"),
        "torch": dict.fromkeys(("cpu", "cuda", "front"), "torch was not"),
        "nvcc": {"cuda": "nvcc was not found"},
        "pybind11": {"host": "pybind11 was not found"},
    }
    for tool, parts in expected.items():
        reasons = module.Tools(**{**full, tool: None}).reasons
        assert {part for part, why in reasons.items() if why} == set(parts)
        for part, why in parts.items():
            assert why in reasons[part]


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    module = setup_module()
    monkeypatch.setenv("PETAL_BUILD_CPU", "0")
    monkeypatch.setenv("PETAL_BUILD_CUDA", "0")
    reasons = module.Tools().reasons
    assert reasons["cpu"] == reasons["cuda"] == "it was switched off"
    monkeypatch.setenv("PETAL_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found"):
        module.Tools(cxx="g++", ninja="ninja", nvcc=None, torch=Path("there"), pybind11=None)
    monkeypatch.setenv("PETAL_CUDA_ARCHS", "10.0, 8.0;90")
    assert module.cuda_archs() == ["80", "90", "100"]
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PETAL_CPU_ISAS", "avx512, generic")
    assert module.cpu_isas() == ["generic", "avx512"]
    monkeypatch.setenv("PETAL_CPU_ISAS", "avx3")
    with pytest.raises(SystemExit, match="want some of generic, avx2, avx512, got avx3"):
        module.cpu_isas()


def test_the_build_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is asked for: CUDA where a device is visible, for it; the processor's own
    instruction sets."""
    module = setup_module()
    for name in ("PETAL_BUILD_CUDA", "PETAL_CUDA_ARCHS", "PETAL_CPU_ISAS"):
        monkeypatch.delenv(name, raising=False)
    full = {"cxx": "g++", "ninja": "ninja", "nvcc": "nvcc", "torch": Path("there")}
    without = module.Tools(**full, pybind11=Path("there"), gpus=[])
    assert without.reasons["cuda"] == module.NO_DEVICE
    assert without.reasons["cpu"] is None
    monkeypatch.setenv("PETAL_BUILD_CUDA", "1")
    assert module.Tools(**full, pybind11=Path("there"), gpus=[]).reasons["cuda"] is None
    assert module.cuda_archs([]) == ["80", "90", "100"]
    assert module.cuda_archs(["9.0", "9.0"]) == ["90"]

    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    for flags, isas in (
        (None, ["generic", "avx2", "avx512"]),
        ({"sse4_2"}, ["generic"]),
        ({"avx2", "fma", "f16c"}, ["generic", "avx2"]),
        ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl"}, ["generic", "avx2"]),
    ):
        monkeypatch.setattr(module.machine, "cpu_flags", lambda flags=flags: flags)
        assert module.cpu_isas() == isas
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(module.machine, "cpu_flags", lambda: None)
    assert module.cpu_isas() == ["generic"]


def test_a_gpu_is_asked_for_its_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = setup_module()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0; echo 8.9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert module.machine.visible_archs() == ["9.0", "8.9"]
    tool.write_text("#!/bin/sh\necho no devices were found; exit 9\n")
    assert module.machine.visible_archs() == []


USE = """
import torch, petal_kernels as pk
from petal_kernels._runtime import device
x, down, ups = torch.randn(4, 8), torch.randn(2, 8), [torch.randn(6, 2)]
out, = pk.lowrank_linear(x, down, ups)
assert torch.allclose(out, x @ down.T @ ups[0].T, atol=1e-5)
explained = str(pk.explain(pk.lowrank_linear, x, down, ups))
assert "runs on torch" in explained, explained
print(device.cpu_library_reason())
"""


@pytest.mark.slow
def test_pure_install_without_a_compiler(tmp_path: Path) -> None:
    source, target, empty = tmp_path / "source", tmp_path / "target", tmp_path / "empty"
    source.mkdir()
    empty.mkdir()
    for name in SHIPPED:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "build.json", "lib")
            shutil.copytree(path, source / name, ignore=ignored)
        elif path.exists():
            shutil.copy2(path, source / name)
    shutil.copy2(ROOT / "LICENSE", source / "LICENSE")
    bare = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH")}
    bare |= {"PATH": str(empty), "PYTHONPATH": ""}
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    install += ["--no-index", "--quiet", "--target", str(target), str(source)]
    done = subprocess.run(install, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(target.rglob("*.so"))
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env=bare | {"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stdout
    assert "--no-build-isolation" in done.stdout


def test_facts_of_a_build_for_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries serve it; of the compiled module nothing is needed but its record."""
    wanted = _build_info._record()["facts"]

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_build_info, "import_module", missing)
    monkeypatch.setattr(_build_info, "reason", lambda part: None)
    _build_info._host.cache_clear()
    try:
        assert _build_info.facts() == wanted
        assert _build_info.cpu_capability() == {}
    finally:
        _build_info._host.cache_clear()


@pytest.mark.cross_compile
def test_the_cuda_library_asks_for_torchs() -> None:
    """Without libtorch_cuda among its needs its symbols would be looked up too early: a load on a
    machine with a GPU would fail."""
    library = LIBRARIES / "libpetal_cuda.so"
    if not library.exists():
        pytest.skip(f"no CUDA library: {_build_info.reason('cuda')}")
    assert b"\0libtorch_cuda.so\0" in library.read_bytes()
