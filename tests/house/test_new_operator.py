"""A new operator is a new folder: what walks the folders takes it up, and what must be written by
hand for it turns red until it is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import folders

OLD, NEW = "mode_contract", "other_contract"
WALKERS = ("tests/ops", "tests/runtime", "tests/house/test_layers.py")
# Each asks for something that only a person can write.
BY_HAND = (
    "tests/fuzz/test_fuzz.py::test_every_operator_is_drawn_and_has_a_formula",
    *(
        f"tests/house/test_mutants.py::test_every_operator_has_faults_in_each_backend[{backend}]"
        for backend in ("torch", "native", "triton", "cuda")
    ),
    "tests/ops/test_native_widths.py::test_every_kernel_is_compared",
    "tests/emulation/test_emulation.py::test_every_operator_has_a_driver",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with one more operator: `mode_contract` under another name."""
    root = tmp_path_factory.mktemp("tree")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "lib", "weights", "saved")
    for name in ("petal_kernels", "benchmarks", "tests", "csrc"):
        shutil.copytree(folders.ROOT / name, root / name, ignore=unwanted)
    shutil.copy2(folders.ROOT / "pyproject.toml", root)
    for folder in (root / "petal_kernels" / "ops", root / "csrc"):
        for path in [p for p in folder.iterdir() if OLD in p.name]:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, path.with_name(path.name.replace(OLD, NEW)))
    for path in (root / "petal_kernels" / "ops" / NEW).glob("*.py"):
        path.write_text(path.read_text().replace(OLD, NEW))
    return root


def run(tree: Path, *arguments: str) -> str:
    """What pytest says there."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.slow
def test_whatever_walks_the_folders_finds_it(tree: Path) -> None:
    said = run(tree, "--collect-only", *WALKERS)
    found = set(re.findall(r"^tests/.*::.*$", said, re.MULTILINE))
    old = {test for test in found if OLD in test.partition("[")[2]}  # of no test written for it
    assert len({test.split("::")[0] for test in old}) > 8, said[-2000:]
    missed = sorted(test for test in old if test.replace(OLD, NEW) not in found)
    assert missed == []


@pytest.mark.slow
def test_whatever_is_written_by_hand_is_missed(tree: Path) -> None:
    said = run(tree, *BY_HAND)
    failed = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
    assert sorted(failed) == sorted(BY_HAND), said[-2000:]
