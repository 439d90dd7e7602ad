"""The build: what it made, what it says where it could not, and that no choice it makes at run time
shows in a result."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from petal_kernels import _build_info
from petal_kernels._runtime import device
from petal_kernels.ops.lowrank_linear import native_impl, torch_impl
from petal_kernels.ops.lowrank_linear.arguments import Call, Settings, Tensors

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


def _forward_and_backward(
    dtype: torch.dtype, impl: ModuleType = native_impl, plan: str = "extend"
) -> list[torch.Tensor]:
    """Several blocks of rows and several splits of the weight gradients, both ragged."""
    torch.manual_seed(0)
    rows, width, rank, outs = 1500, 70, 20, (40, 130)
    x = torch.randn(rows, width).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    down, ups = torch.randn(rank, width).to(wide), [torch.randn(o, rank).to(wide) for o in outs]
    weights = [torch.randn(o, width).to(dtype) for o in outs]
    dys = [torch.randn(rows, o).to(dtype) for o in outs]
    rng = torch.tensor([5, 6])
    none = [None] * len(outs)
    call = Call(
        Tensors(x, down, None, ups, weights, none, [], None), Settings(0.5, 0.3, "bottleneck")
    )
    ys, saved = impl.forward(call, rng, plan)
    call = call._replace(tensors=call.tensors._replace(weights=[], biases=[]))
    grads = impl.backward(call, saved, dys, rng, frozenset(("x", "down", "ups")))
    assert grads.x is not None
    assert grads.down is not None
    assert grads.ups is not None
    return [*ys, saved.h, grads.x, grads.down, *grads.ups]


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The instruction sets that this build has and this CPU runs; the best is restored."""
    names = _build_info.facts()["isas"].split(",")
    capability = _build_info.cpu_capability()
    yield [n for n in names if capability.get(n, True)]
    torch.ops.petal_native.cpu_isa("best")


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_instruction_sets_agree(every_isa: list[str], dtype: torch.dtype) -> None:
    results = []
    for name in every_isa:
        assert torch.ops.petal_native.cpu_isa(name) == name
        results.append(_forward_and_backward(dtype))
    # h may be rounded the other way in 16 bits, and one unit of h moves what follows.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            apart = (one.double() - two.double()).abs().max() / one.double().abs().max()
            assert apart < tolerance


@built
def test_many_splits_agree_with_fp64() -> None:
    exact = _forward_and_backward(torch.float64, torch_impl, "update")
    for one, two in zip(exact, _forward_and_backward(torch.float32), strict=True):
        assert (one - two.double()).abs().max() / one.abs().max() < 3e-6


@built
def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match="want generic, avx2, avx512 or best, got sse9"):
        torch.ops.petal_native.cpu_isa("sse9")


@built
def test_threads_do_not_change_bits() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _forward_and_backward(torch.float32)
        torch.set_num_threads(3)
        three = _forward_and_backward(torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@built
@pytest.mark.parametrize("library", ["libpetal_cpu.so", "libpetal_cuda.so"])
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
    assert set(module.Tools(**full).reasons.values()) == {None}
    expected = {
        "cxx": {"cpu": "no C++ compiler", "cuda": "no C++ compiler", "host": "no C++ compiler"},
        "ninja": {"cpu": "ninja", "cuda": "ninja", "host": "ninja"},
        "torch": {"cpu": "torch was not", "cuda": "torch was not"},
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


@pytest.mark.slow
def test_vectors_of_every_width_compute_the_same(tmp_path: Path) -> None:
    """The AVX2 and AVX-512 kernels' tiling, executed with the vectors this CPU has."""
    module = setup_module()
    compiler = module._compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-O1", "-std=c++17", "-w", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    objects = []
    for operator in ("lowrank_linear", "gated_bottleneck", "expert_dispatch"):
        kernel = ROOT / "csrc" / f"{operator}_cpu_kernel.h"
        for isa, width in (("generic", 4), ("avx2", 8), ("avx512", 16)):
            objects.append(str(tmp_path / f"{operator}-{isa}.o"))
            special = [f"-DPETAL_ISA={isa}", f"-DPETAL_VL={width}", "-x", "c++", "-c", str(kernel)]
            subprocess.run([compiler, *flags, *special, "-o", objects[-1]], check=True)
    program = str(tmp_path / "widths")
    main = str(ROOT / "tests" / "ops" / "cpu_widths" / "cpu_widths.cpp")
    subprocess.run([compiler, *flags, main, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-5


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


def test_the_cuda_library_asks_for_torchs() -> None:
    """Without libtorch_cuda among its needs its symbols would be looked up too early: a load on a
    machine with a GPU would fail."""
    library = LIBRARIES / "libpetal_cuda.so"
    if not library.exists():
        pytest.skip(f"no CUDA library: {_build_info.reason('cuda')}")
    assert b"\0libtorch_cuda.so\0" in library.read_bytes()
