"""The house's rules of size and shape, each a function that yields what breaks it."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TREES = ("petal_kernels", "csrc", "benchmarks", "tests", "docs", "examples")
CPP = (".cu", ".cuh", ".h", ".cpp")

FILE_LINES = 400
HOST_LINES = 60
KERNEL_LINES = 150
EQUAL_LINES = 12

# What the text of a kernel file says: each begins a line of it. Formulas alone are maths too.
SEVEN = ("Maths", "Shapes", "Grid", "Traffic", "Numerics", "Limits", "Source")


@dataclass(frozen=True)
class Finding:
    """What breaks a rule: where, how much of it there is, and in which words."""

    rule: str
    place: str
    size: int
    text: str


def files(*suffixes: str, trees: Iterable[str] = TREES) -> list[Path]:
    """What git tracks or would, with one of the suffixes."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard", *trees]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (ROOT / name for name in names.split("\0") if name.endswith(suffixes))
    return sorted(path for path in found if path.is_file())


def name_of(path: Path) -> str:
    """A path as the table of exceptions writes it."""
    return path.relative_to(ROOT).as_posix()


# Import cycles.


def imports_at_import(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules that are imported when this one is, so not what stands in functions or under
    TYPE_CHECKING."""
    found: set[str] = set()
    left: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while left:
        node = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
        left += ast.iter_child_nodes(node)
    return found & modules.keys()


def cycles() -> Iterator[Finding]:
    """Modules of the package that import each other, directly or not."""
    modules = {}
    for path in files(".py", trees=("petal_kernels",)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {name: imports_at_import(path, modules) for name, path in modules.items()}
    reach = {name: _reachable(graph, name) for name in graph}
    seen: set[str] = set()
    for name in sorted(graph):
        group = {other for other in reach[name] if name in reach[other]}
        if group and name not in seen:
            seen |= group
            yield Finding("cycle", ", ".join(sorted(group)), len(group), "import each other")


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += graph[name]
    return found


# Sizes.


def long_files() -> Iterator[Finding]:
    """Files of too many lines."""
    for path in files(".py", *CPP):
        lines = len(path.read_text().splitlines())
        if lines > FILE_LINES:
            yield Finding("file", name_of(path), lines, f"{lines} lines, at most {FILE_LINES}")


def long_functions() -> Iterator[Finding]:
    """Functions of too many lines; what is nested counts for the outermost."""
    for path in files(".py", *CPP):
        functions = python_functions if path.suffix == ".py" else cpp_functions
        for function, lines, kernel in functions(path.read_text()):
            most = KERNEL_LINES if kernel else HOST_LINES
            if lines > most:
                place = f"{name_of(path)}:{function}"
                yield Finding("function", place, lines, f"{lines} lines, at most {most}")


def python_functions(text: str) -> Iterator[tuple[str, int, bool]]:
    """Name, lines without decorators and whether it is a Triton function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marks = " ".join(ast.unparse(d) for d in node.decorator_list)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield node.name, lines, "triton.jit" in marks


_HIDDEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|^[ \t]*\#(?:\\\n|[^\n])*""",
    re.DOTALL | re.MULTILINE,
)
_ATTRIBUTE = re.compile(
    r"__attribute__\s*\(\(.*?\)\)|__launch_bounds__\s*\([^)]*\)|template\s*<[^{]*?>\s*\n"
)
_SCOPE = re.compile(r"\b(?:namespace|struct|class|enum|union|extern)\b[^()]*$|=\s*$|^\s*$")


def cpp_functions(text: str) -> Iterator[tuple[str, int, bool]]:
    """Name, lines from the signature on, and whether it runs on the device."""
    text = _HIDDEN.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    depth, inside, begin = 0, None, 0
    for at, sign in enumerate(text):
        if sign == "{":
            head = text[begin:at]
            if inside is None and "(" in head and not _SCOPE.search(head):
                inside, first = (depth, head), begin + len(head) - len(head.lstrip())
            depth, begin = depth + 1, at + 1
        elif sign == "}":
            depth, begin = depth - 1, at + 1
            if inside is not None and inside[0] == depth:
                called = re.search(r"([\w~]+)\s*\(", _ATTRIBUTE.sub("", inside[1]))
                lines = text.count("\n", first, at) + 1
                device = "__global__" in inside[1] or "__device__" in inside[1]
                yield called[1] if called else "?", lines, device
                inside = None
        elif sign == ";":
            begin = at + 1


# Copies.


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, without blank ones, comments and imports."""
    text = path.read_text()
    left_out = set()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and number not in left_out and not line.startswith(("#", "//", "/*", "* ")):
            found.append((number, line))
    return found


def copies() -> Iterator[Finding]:
    """Runs of equal lines in two files of one tree; the longest of each pair of files."""
    for tree in TREES:
        places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
        lines = {path: code_lines(path) for path in files(".py", *CPP, trees=(tree,))}
        for path, code in lines.items():
            for i in range(len(code) - EQUAL_LINES + 1):
                places[tuple(line for _, line in code[i : i + EQUAL_LINES])].append((path, i))
        longest: dict[tuple[Path, Path], tuple[int, int]] = {}
        for found in places.values():
            for n, (one, i) in enumerate(found):
                for other, j in found[n + 1 :]:
                    if one != other:
                        size = _equal(lines[one], lines[other], i, j)
                        pair = longest.get((one, other), (0, 0))
                        longest[one, other] = max(pair, (size, i))
        for (one, other), (size, i) in sorted(longest.items()):
            above = Path(os.path.commonpath([one, other]))
            beside = " = ".join(p.relative_to(above).as_posix() for p in (one, other))
            place = f"{name_of(above)}: {beside}"
            yield Finding("copy", place, size, f"{size} equal lines from {lines[one][i][0]} on")


def _equal(one: list[tuple[int, str]], other: list[tuple[int, str]], i: int, j: int) -> int:
    size = 0
    while i + size < len(one) and j + size < len(other) and one[i + size][1] == other[j + size][1]:
        size += 1
    return size


# Kernels say what they do.


def kernel_files() -> list[Path]:
    """Triton kernel modules, CUDA sources and CPU kernels."""
    found = [p for p in files(".py", trees=("petal_kernels/ops",)) if _has_kernel(p)]
    csrc = files(*CPP, trees=("csrc",))
    found += [p for p in csrc if p.suffix == ".cu" or p.match("*/cpu/kernel.cpp")]
    return found


def _has_kernel(path: Path) -> bool:
    return any(kernel for _, _, kernel in python_functions(path.read_text()))


def kernel_text(path: Path, seen: set[Path] | None = None) -> str:
    """The module docstring and those of the modules beside it that it names; or the comment that a
    C++ file begins with."""
    text = path.read_text()
    if path.suffix != ".py":
        found = re.match(r"(?:\s*(?://[^\n]*\n|/\*.*?\*/))+", text, re.DOTALL)
        return found[0] if found else ""
    seen = {path} if seen is None else seen | {path}
    said = ast.get_docstring(ast.parse(text)) or ""
    named = (path.with_name(name) for name in re.findall(r"``(\w+\.py)``", said))
    beside = [kernel_text(p, seen) for p in named if p.is_file() and p not in seen]
    return "\n".join([said, *beside])


def silent_kernels() -> Iterator[Finding]:
    """Kernel files whose text leaves out some of the seven points."""
    for path in kernel_files():
        text = kernel_text(path)
        said = {point for point in SEVEN if re.search(rf"(?m)^\W*{point}\b", text)}
        if re.search(r"(?m)^\W*\w[\w, \[\]{}^]*\s=\s", text):
            said.add("Maths")
        missing = [point for point in SEVEN if point not in said]
        if missing:
            what = f"says nothing of {', '.join(missing)}"
            yield Finding("kernel text", name_of(path), len(missing), what)


_TILE = re.compile(r"\bload_tile\(|\btl\.load\(.*(?:\[None, :\]|\[:, None\])")


def tiles_without_a_shape() -> Iterator[Finding]:
    """Tiles that a Triton kernel loads without saying their shape, on the line or above it."""
    for path in files(".py", trees=("petal_kernels/ops",)):
        if not _has_kernel(path):
            continue
        above = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            loads = _TILE.search(line) and not line.lstrip().startswith("return")
            if loads and "# [" not in line and not above.lstrip().startswith("# ["):
                yield Finding("tile", f"{name_of(path)}:{number}", 1, "no shape is said")
            above = line


# Types.


def unchecked() -> Iterator[Finding]:
    """Folders with Python files that mypy's configuration does not name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    named = [str(pattern) for pattern in settings["files"]]
    left: dict[str, int] = defaultdict(int)
    for path in files(".py", trees=("petal_kernels", "benchmarks", "tests", "docs")):
        parts = path.relative_to(ROOT).parts
        above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        if not any(fnmatch.fnmatch(a, pattern) for a in above for pattern in named):
            left["/".join(parts[:2]) if len(parts) > 2 else above[-1]] += 1
    for place, count in sorted(left.items()):
        yield Finding("types", place, 1, f"mypy is not told to check {count} files")


RULES = {
    "cycle": cycles,
    "file": long_files,
    "function": long_functions,
    "copy": copies,
    "kernel text": silent_kernels,
    "tile": tiles_without_a_shape,
    "types": unchecked,
}
