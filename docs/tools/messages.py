"""Every refusal of the package, read from its source: what is raised and warned, and in what words.

A message is what stands in a ``raise``, in a ``warnings.warn``, in an error that a function returns
to be raised, or among the reasons for which a backend declines. What only a run knows is "…". A
function that is given a part of its message (``want(ok, "r", "an integer >= 1", value)``) is
followed to its callers, so that their words are found too.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "petal_kernels"
GAP = "…"
ALTERNATIVES = 8  # of one message: words that depend on several choices
# Raised for Python or the shell, not for a user to read.
_SILENT = ("AssertionError", "AttributeError", "KeyboardInterrupt", "StopIteration", "SystemExit")
_ENDINGS = ("Error", "Refusal", "Unavailable")


@dataclass(frozen=True)
class Parameter:
    """A part of a message that its function is given."""

    name: str


Parts = tuple[str | Parameter, ...]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Message:
    """A refusal: where it stands, what it is raised as ("reason": why a backend declines), and its
    words."""

    module: str
    line: int
    kind: str
    text: str


@dataclass(frozen=True)
class _Helper:
    """A function that raises or reports what its callers say."""

    names: tuple[str, ...]
    defaults: dict[str, ast.expr]
    kind: str
    parts: Parts


Helpers = dict[str, list[_Helper]]  # by module and name


def messages(files: Iterable[Path] | None = None, root: Path = ROOT) -> list[Message]:
    """All of them, by module and line, each text once in a module."""
    paths = sorted(PACKAGE.rglob("*.py")) if files is None else sorted(files)
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    modules = [_Module(module_of(path, root), tree) for path, tree in trees.items()]
    helpers: Helpers = {}
    # Helpers call helpers: once more for each of them on the way.
    for _ in range(3):
        helpers = _helpers(modules, helpers)
    found: dict[tuple[str, str], Message] = {}
    for each in modules:
        module = each.name
        for line, kind, parts in each.said(helpers):
            text = words(parts)
            if any(character.isalpha() for character in text.replace(GAP, "")):
                found.setdefault((module, text), Message(module, line, kind, text))
    return sorted(found.values())


def module_of(path: Path, root: Path = ROOT) -> str:
    """The name to import a file by."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def words(parts: Parts) -> str:
    """The text, with a gap for what a run fills in."""
    text = "".join(part if isinstance(part, str) else GAP for part in parts)
    while GAP + GAP in text:
        text = text.replace(GAP + GAP, GAP)
    return " ".join(text.split())


def _functions(tree: ast.Module) -> Iterator[tuple[Function | None, list[ast.AST]]]:
    """Every function with what stands in it and in no function inside of it; and the module."""
    owners: list[tuple[Function | None, ast.AST]] = [(None, tree)]
    while owners:
        owner, top = owners.pop()
        nodes: list[ast.AST] = []
        left: list[ast.AST] = list(ast.iter_child_nodes(top))
        while left:
            node = left.pop(0)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                owners.append((node, node))
                continue
            nodes.append(node)
            left = list(ast.iter_child_nodes(node)) + left
        yield owner, nodes


def _parameters(function: Function | None) -> list[str]:
    if function is None:
        return []
    own = function.args
    return [a.arg for a in (*own.posonlyargs, *own.args, *own.kwonlyargs)]


def _defaults(function: Function) -> dict[str, ast.expr]:
    own = function.args
    plain = [a.arg for a in (*own.posonlyargs, *own.args)]
    found = dict(zip(plain[len(plain) - len(own.defaults) :], own.defaults, strict=True))
    keyword = zip(own.kwonlyargs, own.kw_defaults, strict=True)
    return found | {a.arg: value for a, value in keyword if value is not None}


def _name(node: ast.expr | None) -> str:
    """The last name of what is called or raised."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _dotted(node: ast.expr) -> str:
    """``a.b.c``, or nothing for what is no such name."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


class _Reader:
    """The words of expressions in one function."""

    def __init__(self, function: Function | None, nodes: Sequence[ast.AST], tree: ast.Module):
        self.parameters = set(_parameters(function))
        self.values: dict[str, list[ast.expr]] = {}
        for node in (*tree.body, *nodes):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.values.setdefault(target.id, []).append(node.value)
        self.open: set[str] = set()

    def read(self, node: ast.expr) -> list[Parts]:
        """Every way in which the words may stand."""
        if isinstance(node, ast.Constant):
            return [(str(node.value),)]
        if isinstance(node, ast.JoinedStr):
            return self._joined(node.values)
        if isinstance(node, ast.FormattedValue):
            return self.read(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined((node.left, node.right))
        if isinstance(node, ast.IfExp):
            return [*self.read(node.body), *self.read(node.orelse)][:ALTERNATIVES]
        if isinstance(node, ast.Name):
            return self._named(node.id)
        return [(GAP,)]

    def _joined(self, nodes: Sequence[ast.expr]) -> list[Parts]:
        found = itertools.product(*(self.read(node) for node in nodes))
        return [tuple(itertools.chain(*each)) for each in itertools.islice(found, ALTERNATIVES)]

    def _named(self, name: str) -> list[Parts]:
        values = self.values.get(name, [])
        if name in self.parameters and not values:
            return [(Parameter(name),)]
        strings = [v for v in values if isinstance(v, (ast.Constant, ast.JoinedStr, ast.IfExp))]
        if not strings or name in self.open:
            return [(GAP,)]
        self.open.add(name)
        found = [parts for value in strings for parts in self.read(value)][:ALTERNATIVES]
        self.open.discard(name)
        return found if len(strings) == len(values) else [*found, (GAP,)]


class _Module:
    """A module: its functions with what stands in them, and what its names stand for."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree
        self.functions = [
            (function, nodes, _Reader(function, nodes, tree))
            for function, nodes in _functions(tree)
        ]
        # By module and name: its own functions, and what it imports.
        self.known = {
            node.name: f"{name}.{node.name}"
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                self.known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def said(self, helpers: Helpers) -> Iterator[tuple[int, str, Parts]]:
        """Whatever its functions raise, warn or give as a reason, with the line."""
        for function, nodes, reader in self.functions:
            yield from self.said_in(function, nodes, reader, helpers)

    def said_in(
        self, function: Function | None, nodes: Sequence[ast.AST], reader: _Reader, helpers: Helpers
    ) -> Iterator[tuple[int, str, Parts]]:
        """What one function says, itself or through a helper."""
        for node in nodes:
            for kind, said in _direct(node, function):
                for parts in reader.read(said):
                    yield said.lineno, kind, parts
            if isinstance(node, ast.Call):
                yield from _through(node, self.known, helpers, reader)


def _direct(node: ast.AST, function: Function | None) -> Iterator[tuple[str, ast.expr]]:
    """What a statement itself raises, warns or gives as a reason."""
    if isinstance(node, (ast.Raise, ast.Return)):
        error = node.exc if isinstance(node, ast.Raise) else node.value
        if isinstance(error, ast.Call) and error.args and _is_error(_name(error)):
            yield _name(error), error.args[0]
    if isinstance(node, ast.Call) and _dotted(node.func) == "warnings.warn":
        yield "warning", node.args[0]
    if function is not None and _gives_reasons(function.name):
        yield from (("reason", said) for said in _reasons(node))


def _is_error(name: str) -> bool:
    return name.endswith(_ENDINGS) and name not in _SILENT


def _gives_reasons(name: str) -> bool:
    return "unsupported" in name or name.endswith("reasons") or name.startswith("why_not")


def _reasons(node: ast.AST) -> Iterator[ast.expr]:
    given: list[ast.expr] = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        given = list(node.args) if node.func.attr == "append" else []
    elif isinstance(node, (ast.List, ast.Tuple)):
        given = list(node.elts)
    elif isinstance(node, ast.Return) and node.value is not None:
        given = [node.value]
    for each in given:
        if isinstance(each, ast.JoinedStr) or (
            isinstance(each, ast.Constant) and isinstance(each.value, str) and " " in each.value
        ):
            yield each


def _through(
    call: ast.Call, known: dict[str, str], helpers: Helpers, reader: _Reader
) -> Iterator[tuple[int, str, Parts]]:
    """What a helper says for this caller."""
    head, _, rest = _dotted(call.func).partition(".")
    called = known.get(head, "") + (f".{rest}" if rest else "")
    for helper in helpers.get(called, ()):
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            continue
        given = helper.defaults | dict(zip(helper.names, call.args, strict=False))
        given |= {k.arg: k.value for k in call.keywords if k.arg is not None}
        choices = [
            reader.read(given[part.name])
            if isinstance(part, Parameter) and part.name in given
            else [(part if isinstance(part, str) else GAP,)]
            for part in helper.parts
        ]
        for each in itertools.islice(itertools.product(*choices), ALTERNATIVES):
            yield call.lineno, helper.kind, tuple(itertools.chain(*each))


def _helpers(modules: Sequence[_Module], before: Helpers) -> Helpers:
    """The functions of modules (no methods) whose callers give words of what they raise."""
    found: Helpers = {}
    for module in modules:
        for function, nodes, reader in module.functions:
            if function is None or function not in module.tree.body:
                continue
            said = module.said_in(function, nodes, reader, before)
            for kind, parts in dict.fromkeys((kind, parts) for _, kind, parts in said):
                if any(isinstance(part, Parameter) for part in parts):
                    names = tuple(_parameters(function))
                    helper = _Helper(names, _defaults(function), kind, parts)
                    found.setdefault(f"{module.name}.{function.name}", []).append(helper)
    return found
