"""The CPU kernels' tiling with vectors of every width, executed with the vectors this CPU has."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.emulation.build import CSRC, compiler

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "cpu_widths" / "cpu_widths.cpp"


@pytest.mark.slow
def test_vectors_of_every_width_compute_the_same(tmp_path: Path) -> None:
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    flags = ["-O1", "-std=c++17", "-w", "-Wno-psabi", f"-I{CSRC}"]
    objects = []
    for operator in ("lowrank_linear", "gated_bottleneck", "expert_dispatch"):
        kernel = CSRC / f"{operator}_cpu_kernel.h"
        for isa, width in (("generic", 4), ("avx2", 8), ("avx512", 16)):
            objects.append(str(tmp_path / f"{operator}-{isa}.o"))
            special = [f"-DPETAL_ISA={isa}", f"-DPETAL_VL={width}", "-x", "c++", "-c", str(kernel)]
            subprocess.run([cxx, *flags, *special, "-o", objects[-1]], check=True)
    program = str(tmp_path / "widths")
    subprocess.run([cxx, *flags, str(DRIVER), *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-5
