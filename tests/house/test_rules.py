"""The rules of size and shape hold, but for the table of exceptions; each sees what breaks it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.house import rules
from tests.house.__main__ import judge
from tests.house.exceptions import EXCEPTIONS


@pytest.mark.parametrize("rule", list(rules.RULES))
def test_a_rule_holds(rule: str) -> None:
    _, wrong = judge(list(rules.RULES[rule]()), rule)
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_of_a_rule_and_says_why() -> None:
    assert EXCEPTIONS.keys() <= rules.RULES.keys()
    assert all(why for table in EXCEPTIONS.values() for _, why in table.values())


def test_an_exception_may_not_grow_nor_outlive_its_fault() -> None:
    rule, table = next(iter(EXCEPTIONS.items()))
    place, (most, _) = next(iter(table.items()))
    others = [rules.Finding(rule, p, 1, "") for p in table if p != place]
    same, larger = (rules.Finding(rule, place, size, "it") for size in (most, most + 1))
    assert judge([*others, same], rule)[1] == []
    assert judge([*others, larger], rule)[1] == [f"{place}: it; excepted up to {most}"]
    assert judge(others, rule)[1] == [f"{place}: mended, so take it out of exceptions.py"]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository in the place of this one."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    return tmp_path


def write(tree: Path, name: str, text: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text)


def places(rule: str) -> list[tuple[str, int]]:
    return [(f.place, f.size) for f in rules.RULES[rule]()]


def test_a_cycle_is_seen(tree: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        write(tree, f"petal_kernels/{name}.py", "")
    write(tree, "petal_kernels/a.py", "from petal_kernels import b\n")
    write(tree, "petal_kernels/b.py", "try:\n    import petal_kernels.c\nexcept ImportError: ...\n")
    write(tree, "petal_kernels/c.py", "from petal_kernels.a import x\n")
    apart = "if TYPE_CHECKING:\n    from petal_kernels import e\n"
    write(tree, "petal_kernels/d.py", apart + "def f():\n    from petal_kernels import e\n")
    write(tree, "petal_kernels/e.py", "from petal_kernels import d\n")
    assert places("cycle") == [("petal_kernels.a, petal_kernels.b, petal_kernels.c", 3)]


def test_a_package_and_its_module_are_a_cycle(tree: Path) -> None:
    write(tree, "petal_kernels/x/__init__.py", "from petal_kernels.x.y import f\n")
    write(tree, "petal_kernels/x/y.py", "from petal_kernels.x import g\n")
    assert places("cycle") == [("petal_kernels.x, petal_kernels.x.y", 2)]


@pytest.mark.parametrize("name", ["tests/t.py", "csrc/deep/er/k.cu", "benchmarks/b.py"])
def test_a_long_file_is_seen(tree: Path, name: str) -> None:
    write(tree, name, "\n" * 400)
    assert places("file") == []
    write(tree, name, "\n" * 401)
    assert places("file") == [(name, 401)]


@pytest.mark.parametrize(
    ("name", "text", "most"),
    [
        ("p.py", "def f():\n{}    pass\n", 60),
        ("p.py", "class C:\n    async def f(self):\n{}        pass\n", 60),
        ("p.py", "@triton.jit\ndef f(\n    x\n):\n{}    pass\n", 150),
        (
            "p.h",
            "namespace n {{\nclass C : public B {{\n  int f(int x) const {{\n{}  }}\n}};\n}}\n",
            60,
        ),
        ("p.cpp", "template <typename T>\nstd::vector<T> f(T x) {{\n  if (x) {{ }}\n{}}}\n", 60),
        (
            "p.cu",
            "__global__ void __launch_bounds__(128)\nf(int x) {{\n  /* }} */ x = '}}';\n{}}}\n",
            150,
        ),
    ],
)
def test_a_long_function_is_seen(tree: Path, name: str, text: str, most: int) -> None:
    read = rules.python_functions if name.endswith("py") else rules.cpp_functions
    (own,) = (lines for _, lines, _ in read(text.format("")))
    write(tree, f"tests/{name}", text.format("\n" * (most - own)))
    assert places("function") == []
    write(tree, f"tests/{name}", text.format("\n" * (most + 1 - own)))
    assert places("function") == [(f"tests/{name}:f", most + 1)]


def test_a_table_in_cpp_is_no_function(tree: Path) -> None:
    write(tree, "csrc/a.cpp", "constexpr int kTable[] = {\n" + "  f(1),\n" * 90 + "};\n")
    write(tree, "csrc/b.cpp", "namespace {\nstruct S {\n" + "  int a = f(1);\n" * 90 + "};\n}\n")
    assert places("function") == []


def test_a_copy_is_seen(tree: Path) -> None:
    def block(n: int) -> str:
        return "".join(f"    x = {i}\n\n    # {n}\n" for i in range(n))

    same = "if a:\n    import b\n"  # an import does not count
    write(tree, "benchmarks/a.py", same + block(10))
    write(tree, "benchmarks/b.py", same + block(10))
    assert places("copy") == []
    write(tree, "benchmarks/a.py", "if a:\n" + block(12))
    write(tree, "benchmarks/b.py", "if b:\n" + block(13))
    write(tree, "tests/b.py", "if c:\n" + block(13))
    assert places("copy") == [("benchmarks: a.py = b.py", 12)]


POINTS = ["Maths", "Shapes", "Grid", "Traffic", "Numerics", "Limits", "Source"]


def test_a_silent_kernel_is_seen(tree: Path) -> None:
    full = "\n".join(f"{point}: such." for point in POINTS)
    kernel = "@triton.jit\ndef f(): ...\n"
    write(tree, "petal_kernels/ops/o/a.py", f'"""A kernel.\n{full}\n"""\n{kernel}')
    write(tree, "petal_kernels/ops/o/b.py", f'"""A kernel; see ``a.py``."""\n{kernel}')
    write(tree, "petal_kernels/ops/o/c.py", f'"""A kernel."""\n{kernel}')
    write(tree, "petal_kernels/ops/o/d.py", '"""No kernel."""\n')
    comment = "".join(f"// {point}   such\n" for point in POINTS[1:])
    write(tree, "csrc/o/cuda/forward.cu", f"// A kernel.\n//   y = x + 1\n{comment}#include <a>\n")
    write(tree, "csrc/o/cuda/backward.cu", f"#include <a>\n{comment}")
    write(tree, "csrc/o/cpu/kernel.cpp", f"// A kernel.\n{comment}")
    write(tree, "csrc/p/cpu/kernel.cpp", "// A kernel. Grid and so on.\n")
    assert places("kernel text") == [
        ("petal_kernels/ops/o/c.py", 7),
        ("csrc/o/cpu/kernel.cpp", 1),
        ("csrc/o/cuda/backward.cu", 7),
        ("csrc/p/cpu/kernel.cpp", 7),
    ]


def test_a_tile_without_a_shape_is_seen(tree: Path) -> None:
    lines = [
        "@triton.jit",
        "def f():",
        "    x = load_tile(x_ptr)  # [M, K]",
        "    # [M, K]",
        "    y = tl.load(y_ptr + offs_k[None, :])",
        "    n = tl.load(n_ptr)",
        "    z = load_tile(z_ptr)",
        "    w = tl.load(w_ptr + offs_k[None, :])",
    ]
    write(tree, "petal_kernels/ops/o/a.py", "\n".join(lines))
    assert places("tile") == [(f"petal_kernels/ops/o/a.py:{n}", 1) for n in (7, 8)]


def test_what_mypy_is_not_told_is_seen(tree: Path) -> None:
    write(tree, "pyproject.toml", '[tool.mypy]\nfiles = ["petal_kernels/ops/*/op.py", "tests/a"]\n')
    for name in ("petal_kernels/ops/o/op.py", "petal_kernels/ops/o/other.py", "petal_kernels/x.py"):
        write(tree, name, "")
    for name in ("tests/a/b/c.py", "tests/d/e.py"):
        write(tree, name, "")
    assert [place for place, _ in places("types")] == [
        "petal_kernels/ops",
        "petal_kernels/x.py",
        "tests/d",
    ]
