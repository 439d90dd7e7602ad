"""The CPU kernels' tiling with vectors of every width, executed with the vectors this CPU has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.emulation.build import CSRC, compiler
from tests.ops import folders

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "cpu_widths" / "cpu_widths.cpp"


@pytest.mark.slow
def test_vectors_of_every_width_compute_the_same(tmp_path: Path) -> None:
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    flags = ["-O1", "-std=c++17", "-w", "-Wno-psabi", f"-I{CSRC}"]
    objects = []
    for operator, kernel in folders.cpu_kernels().items():
        for isa, width in (("generic", 4), ("avx2", 8), ("avx512", 16)):
            objects.append(str(tmp_path / f"{operator}-{isa}.o"))
            special = [f"-DPETAL_ISA={isa}", f"-DPETAL_VL={width}", "-c", str(kernel)]
            subprocess.run([cxx, *flags, *special, "-o", objects[-1]], check=True)
    program = str(tmp_path / "widths")
    subprocess.run([cxx, *flags, str(DRIVER), *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-5


def test_every_kernel_is_compared() -> None:
    """The driver includes something of each operator that has a CPU kernel."""
    written = "".join(p.read_text() for p in sorted(DRIVER.parent.iterdir()))
    included = "".join(re.findall(r'^#include "(.*)"', written, re.MULTILINE))
    kernels = folders.cpu_kernels()
    assert set(kernels) == set(folders.names("native_impl"))
    assert [name for name in kernels if name not in included] == []
