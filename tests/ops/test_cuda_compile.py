"""The CUDA sources through nvcc alone, no GPU needed: no spill, tensor cores in use, no atomics."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
SOURCES = sorted(str(p.relative_to(CSRC)) for p in CSRC.glob("*/cuda/*.cu"))
ARCHS = ("sm_80", "sm_90", "sm_100")

# Kernels without a product of tiles: elementwise or second stages.
_NO_PRODUCT = re.compile(
    r"reduce_kernel|diagonal_\w+_kernel|act_fwd_kernel|act_bwd_rows_kernel|frozen_norm_\w+_kernel"
)
_HALVES = re.compile(r"6__half|13__nv_bfloat16")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_USAGE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    found = Path(home or "") / "bin" / "nvcc"
    return str(found) if home and found.exists() else shutil.which("nvcc")


def cuobjdump() -> str | None:
    """On the path, or the one that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if shipped.exists():
            return str(shipped)
    return shutil.which("cuobjdump")


pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc was not found")


def compile_and_check(source: str, arch: str, folder: Path) -> None:
    cubin = folder / f"{Path(source).stem}.{arch}.cubin"
    command = [
        str(nvcc()),
        "-std=c++17",
        "-O3",
        f"-I{CSRC}",
        f"-arch={arch}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
    ]
    command += ["-cubin", "-o", str(cubin), str(CSRC / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entries, usages = _ENTRY.findall(done.stderr), _USAGE.findall(done.stderr)
    assert entries
    assert len(entries) == len(usages)
    for entry, usage in zip(entries, usages, strict=True):
        assert usage == ("0", "0", "0"), f"{entry}: stack, spill stores and loads {usage}"

    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was not found")
    sass = subprocess.run(
        [tool, "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    bodies = dict(
        zip(
            re.findall(r"Function : (\w+)", sass),
            re.split(r"Function : \w+", sass)[1:],
            strict=True,
        )
    )
    assert sorted(bodies) == sorted(entries)
    for entry, body in bodies.items():
        multiplies = re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", body) is not None
        if _HALVES.search(entry) and not _NO_PRODUCT.search(entry):
            assert multiplies, f"{entry}: no tensor core instruction"
            assert "LDGSTS" in body, f"{entry}: no asynchronous copy"
            assert "LDSM" in body, f"{entry}: no ldmatrix"
        else:
            assert not multiplies, f"{entry}: fp32 products must be IEEE"
        assert not re.search(r"\b(ATOM|ATOMG|RED)\b", body), f"{entry}: an atomic"


def test_one_file_compiles(tmp_path: Path) -> None:
    compile_and_check("lowrank_linear/cuda/weights.cu", "sm_90", tmp_path)


@pytest.mark.slow
@pytest.mark.cross_compile
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source: str, arch: str, tmp_path: Path) -> None:
    compile_and_check(source, arch, tmp_path)
