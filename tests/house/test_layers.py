"""The house rules, checked by machine: who imports whom, what an operator's folder holds, what
importing costs."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "petal_kernels"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
RANK = {"_runtime": 0, "ops": 1, "nn": 2, "hf": 3, "memory": 3, "tools": 3}
OPERATORS = sorted(p.parent for p in (PACKAGE / "ops").glob("*/op.py"))
CSRC = ROOT / "csrc"
CUDA_KERNELS = sorted(CSRC.glob("*/cuda/*.cu*"))
CPU_KERNELS = sorted((*CSRC.glob("*/cpu/*.h"), *CSRC.glob("*/cpu/kernel.cpp")))


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Imported module names with their line, and whether the import runs when the module is
    imported."""
    tree = ast.parse(path.read_text())
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            deferred.update(ast.walk(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            deferred.update(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name, node.lineno, node not in deferred) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [
                (f"{node.module}.{a.name}", node.lineno, node not in deferred) for a in node.names
            ]
            found.append((node.module, node.lineno, node not in deferred))
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append(("relative", node.lineno, True))
    return found


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    here = layer(path)
    for name, line, _ in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        assert name != "relative", f"{where}: import by the full name"
        parts = name.split(".")
        assert parts[0] not in ("benchmarks", "tests"), f"{where}: {parts[0]} is not installed"
        if parts[0] in ("transformers", "peft"):
            assert here in ("hf", "tools"), f"{where}: {parts[0]} belongs in hf/ or tools/"
        if parts[0] != "petal_kernels" or len(parts) < 2 or here == "__init__.py":
            continue
        there = parts[1]
        if here not in RANK or there not in RANK:
            continue
        if here == there == "ops" and len(parts) > 2:
            own = path.relative_to(PACKAGE).parts[1]
            assert parts[2] == own, f"{where}: ops/{own} imports ops/{parts[2]}"
        beside = here == "tools" and there in ("hf", "memory")
        assert RANK[there] < RANK[here] or there == here or beside, (
            f"{where}: {here} imports {there}"
        )
        measures = path.name in ("workload.py", "baselines.py") or here == "tools"
        assert not {"workload", "baselines"} & set(parts) or measures, (
            f"{where}: runtime code imports what is measured"
        )


# Their classes are subclasses of PEFT's and transformers': they are imported when one is asked for.
SUBCLASSES = [PACKAGE / "hf" / "tuners.py", PACKAGE / "hf" / "trainer.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_used(path: Path) -> None:
    for name, line, at_import in imports(path):
        top = name.split(".")[0]
        if top == "triton" and at_import:
            allowed = path.name == "triton_lib.py" or path.name.startswith("triton_")
            assert allowed, (
                f"{path.relative_to(ROOT)}:{line}: triton is imported when the module is"
            )
        if top in ("transformers", "peft") and at_import:
            assert layer(path) == "tools" or path in SUBCLASSES, (
                f"{path.relative_to(ROOT)}:{line}: {top} is imported when the module is"
            )
        if at_import and any(name.startswith(f"petal_kernels.hf.{p.stem}") for p in SUBCLASSES):
            assert path == PACKAGE / "peft.py", (
                f"{path.relative_to(ROOT)}:{line}: {name} is imported when the module is"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_public_functions_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), (
                f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has no docstring"
            )


@pytest.mark.parametrize("folder", OPERATORS, ids=lambda p: p.name)
def test_an_operator_folder_is_complete(folder: Path) -> None:
    backends = {"torch", "native", "triton", "cuda"}
    present = {b for b in backends if (folder / f"{b}_impl.py").exists()}
    assert present == backends
    wanted = ["__init__.py", "reference.py", "op.py", "workload.py"]
    assert [w for w in wanted if not (folder / w).exists()] == []
    package = importlib.import_module(f"petal_kernels.ops.{folder.name}")
    assert package.__all__ == [folder.name]
    workload = importlib.import_module(f"petal_kernels.ops.{folder.name}.workload")
    for name in (
        "CASES",
        "SHAPES",
        "DIFFERENTIABLE",
        "BASELINES",
        "make_inputs",
        "bytes_moved",
        "flops",
    ):
        assert hasattr(workload, name), f"{folder.name}/workload.py lacks {name}"
    assert {"published", "eager"} <= set(workload.BASELINES)
    for implementation in sorted(present - {"torch"}):
        text = (
            ast.get_docstring(ast.parse((folder / f"{implementation}_impl.py").read_text())) or ""
        )
        for word in ("shape", "traffic", "numerics", "limits", "source"):
            assert word in text.lower(), (
                f"{folder.name}/{implementation}_impl.py's docstring says nothing of {word}"
            )


@pytest.mark.parametrize("path", CUDA_KERNELS, ids=lambda p: str(p.relative_to(CSRC)))
def test_kernels_include_no_torch(path: Path) -> None:
    assert "torch/" not in path.read_text()


@pytest.mark.parametrize("path", CPU_KERNELS, ids=lambda p: str(p.relative_to(CSRC)))
def test_cpu_kernels_are_free_of_registration(path: Path) -> None:
    assert "TORCH_LIBRARY" not in path.read_text()


def run(code: str, **environment: str) -> str:
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PETAL_"))
    } | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True
    )
    return done.stdout.strip()


def test_import_pulls_in_nothing_but_torch() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import petal_kernels;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "heavy = {'triton', 'transformers', 'peft', 'safetensors', 'numpy', 'matplotlib'};"
        "print(sorted(new & heavy))"
    )
    assert run(code) == "[]"


def test_a_first_call_on_cpu_does_not_import_triton() -> None:
    code = (
        "import torch, sys, petal_kernels as pk;"
        "pk.lowrank_linear(torch.ones(2, 4), torch.ones(2, 4), [torch.ones(3, 2)]);"
        "print('triton.language' in sys.modules)"
    )
    assert run(code) == "False"


@pytest.mark.timing
def test_import_time() -> None:
    """Importing the package costs under 1.2 times ``import torch`` alone: best of interleaved
    processes."""

    def seconds(code: str) -> float:
        begin = time.perf_counter()
        run(code)
        return time.perf_counter() - begin

    alone, package = [], []
    for _ in range(4):
        alone.append(seconds("import torch"))
        package.append(seconds("import petal_kernels"))
    assert min(package) < 1.2 * min(alone), (
        f"import petal_kernels {min(package):.2f} s, torch {min(alone):.2f} s"
    )
