"""Where the arguments of a module's attention call come from, read from its forward.

The syntax tree is followed in the order in which it runs, from the arguments and the linears that
the module calls to the call of an attention function: `f(self, query, key, value, ...)`, or torch's
`scaled_dot_product_attention`. A value is the set of its sources. What cuts the output of one
linear into query, key and value is followed only where its three parts are ranges of columns one
after the other; whatever else happens to it makes it "mixed", which is no part of anything.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# What a linear's output is by now: its columns as they were, its three parts in a list, or anything
# else.
RAW, PIECES, MIXED = "raw", "pieces", "mixed"
_KEEPS_COLUMNS = ("to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone")
_CUTS = ("split", "chunk", "tensor_split", "unbind")


@dataclass(frozen=True)
class Source:
    """An argument of the forward, the attention function, or a linear and what became of its
    output: which third it is, or else in what form, and along which dim three rows of it lie."""

    name: str
    kind: str  # "argument", "attention" or "linear"
    form: str = RAW
    part: int | None = None
    dim: int | None = None


Value = frozenset[Source]
_NOTHING: Value = frozenset()


@dataclass
class Flow:
    """What was found: the (query, key, value) of attention calls, and what each linear reads."""

    calls: list[tuple[Value, ...]] = field(default_factory=list)
    reads: dict[str, Value] = field(default_factory=dict)

    def reader_of_attention(self) -> str | None:
        """The one linear that reads what the attention function gives."""
        found = [n for n, v in self.reads.items() if any(s.kind == "attention" for s in v)]
        return found[0] if len(found) == 1 else None


def forward_of(cls: type) -> ast.FunctionDef | None:
    """The syntax tree of a class's forward; None where its source cannot be read."""
    try:
        source = textwrap.dedent(inspect.getsource(cls.forward))  # type: ignore[attr-defined]
        (function,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return None
    return function


def child_called(func: ast.expr, own: str) -> str:
    """The name of the module's own attribute that is called; empty where it is none."""
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        return func.attr if func.value.id == own else ""
    return ""


@functools.lru_cache(maxsize=512)
def flow_of(cls: type, linears: frozenset[str]) -> Flow | None:
    """The flow through a class's forward where its `linears` are these; None where it cannot be
    read."""
    function = forward_of(cls)
    if function is None:
        return None
    reader = _Reader(function.args.args[0].arg, linears)
    for argument in function.args.args[1:] + function.args.kwonlyargs:
        reader.known[argument.arg] = frozenset({Source(argument.arg, "argument")})
    reader.run(function.body)
    return reader.flow


class _Reader:
    """Follows one forward."""

    def __init__(self, own: str, linears: frozenset[str]) -> None:
        self.own, self.linears = own, linears
        self.known: dict[str, Value] = {}
        self.flow = Flow()

    # -- statements -------------------------------------------------------------------------------

    def run(self, body: Sequence[ast.stmt]) -> None:
        for each in body:
            self._step(each)

    def _step(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            self._put(node.target, self.value(node.value) | self.value(node.target))
        elif isinstance(node, (ast.Expr, ast.Return)) and node.value is not None:
            self.value(node.value)
        elif isinstance(node, ast.If):
            self._branches(self._ways(node))
        elif isinstance(node, (ast.For, ast.While, ast.With)):
            self.run([*node.body, *getattr(node, "orelse", [])])
        elif isinstance(node, ast.Try):
            self._branches([[*node.body, *node.orelse], *(h.body for h in node.handlers)])
            self.run(node.finalbody)

    def _ways(self, node: ast.If | ast.IfExp) -> list[Any]:
        """What of the two may run: a linear of the module's own is not None."""
        test = node.test
        if isinstance(test, ast.Compare) and child_called(test.left, self.own) in self.linears:
            none = isinstance(test.comparators[0], ast.Constant) and not test.comparators[0].value
            if none and isinstance(test.ops[0], ast.IsNot):
                return [node.body]
            if none and isinstance(test.ops[0], ast.Is):
                return [node.orelse]
        return [node.body, node.orelse]

    def _branches(self, bodies: Sequence[Sequence[ast.stmt]]) -> None:
        """Ways that a run may take: a name has what any of them gives it."""
        before, joined = self.known, dict[str, Value]()
        for body in bodies:
            self.known = dict(before)
            self.run(body)
            for name, value in self.known.items():
                joined[name] = joined.get(name, _NOTHING) | value
        self.known = joined

    def _assign(self, target: ast.expr, node: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = self._values(node, len(target.elts))
            for each, value in zip(target.elts, values, strict=True):
                self._put(each, value)
        else:
            self._put(target, self.value(node))

    def _put(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = value

    # -- several values ---------------------------------------------------------------------------

    def _values(self, node: ast.expr, count: int) -> list[Value]:
        """What is unpacked into so many names."""
        if isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) == count:
            return [self.value(each) for each in node.elts]
        if isinstance(node, (ast.GeneratorExp, ast.ListComp)) and len(node.generators) == 1:
            loop = node.generators[0]
            found = []
            for value in self._values(loop.iter, count):
                self._put(loop.target, value)
                found.append(self.value(node.elt))
            return found
        whole = self.value(node)
        if any(source.kind == "attention" for source in whole):
            return [whole] * count
        if isinstance(node, ast.Call) and len(node.args) >= count:
            # As a rotary embedding or a cache gives back what it is given, each in its place.
            given = [self.value(each) for each in node.args[:count]]
            if all(given):
                return given
        return [_each(whole, functools.partial(_piece, number=n)) for n in range(count)]

    # -- one value --------------------------------------------------------------------------------

    def value(self, node: ast.AST) -> Value:
        """The sources of an expression."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, _NOTHING)
        if isinstance(node, (ast.Compare, ast.Constant, ast.Lambda)):
            return _NOTHING
        if isinstance(node, ast.Attribute):
            # Of x.shape, x.dtype: no values of x.
            return self.value(node.value) if node.attr in ("T", "mT") else _NOTHING
        if isinstance(node, ast.Subscript):
            return _each(self.value(node.value), functools.partial(_taken, index=node.slice))
        if isinstance(node, ast.Call):
            return self._call(node)
        found = _NOTHING
        ways = self._ways(node) if isinstance(node, ast.IfExp) else ast.iter_child_nodes(node)
        for each in ways:
            found |= self.value(each)
        return found

    def _call(self, node: ast.Call) -> Value:
        given = [self.value(each) for each in node.args]
        named = {each.arg: self.value(each.value) for each in node.keywords}
        every = _NOTHING.union(*given, *named.values())
        if self._is_attention(node, given, named):
            return frozenset({Source("", "attention")})
        child = child_called(node.func, self.own)
        if child in self.linears:
            self.flow.reads[child] = self.flow.reads.get(child, _NOTHING) | every
            return frozenset({Source(child, "linear")})
        if not child and isinstance(node.func, ast.Attribute):
            # A method of a tensor, or torch's function by the same name.
            own = self.value(node.func.value)
            if own:
                return _each(own, functools.partial(_through, node=node, args=node.args))
            if given and node.func.attr in _CUTS:
                return _each(given[0], functools.partial(_through, node=node, args=node.args[1:]))
        return every

    def _is_attention(
        self, node: ast.Call, given: list[Value], named: dict[str | None, Value]
    ) -> bool:
        """Whether it is the call of an attention function, which is then noted."""
        first = node.args[0] if node.args else None
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name == "scaled_dot_product_attention":
            values = given
        elif isinstance(first, ast.Name) and first.id == self.own:
            values = given[1:]
        else:
            return False
        rest = ("query", "key", "value")[len(values) :]
        values = [*values[:3], *(named[name] for name in rest if name in named)]
        if len(values) != 3:
            return False
        self.flow.calls.append(tuple(values))
        return True


def _each(value: Value, change: Callable[[Source], Source]) -> Value:
    """The value whose linears' outputs have become something else."""
    return frozenset(change(s) if s.kind == "linear" and s.part is None else s for s in value)


def _piece(source: Source, number: int) -> Source:
    """One of three pieces, in a list or along the first dim."""
    if number < 3 and (source.form == PIECES or (source.form == RAW and source.dim == 0)):
        return replace(source, part=number)
    return replace(source, form=MIXED)


def _constant(node: ast.expr | None) -> int | None:
    """An integer that is written out."""
    try:
        found = None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
    return found if type(found) is int else None


def _taken(source: Source, index: ast.expr) -> Source:
    """A linear's output by an index: `[i]` of pieces, `[..., a:b]` of columns."""
    number = _constant(index)
    if number is not None:
        return _piece(source, number % 3)
    *lead, last = index.elts if isinstance(index, ast.Tuple) else [index]
    whole = all(
        _constant_ellipsis(each) or (isinstance(each, ast.Slice) and _is_all(each)) for each in lead
    )
    if source.form != RAW or not lead or not whole or not isinstance(last, ast.Slice):
        return replace(source, form=MIXED)
    if _is_all(last):
        return source
    # Of three ranges the first has no beginning and the last no end.
    return replace(source, part=0 if last.lower is None else 2 if last.upper is None else 1)


def _constant_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def _is_all(node: ast.Slice) -> bool:
    return node.lower is None and node.upper is None and node.step is None


def _through(source: Source, node: ast.Call, args: Sequence[ast.expr]) -> Source:
    """A linear's output through a method of tensors."""
    assert isinstance(node.func, ast.Attribute)
    name, raw, dim = node.func.attr, source.form == RAW, source.dim
    if name in _KEEPS_COLUMNS:
        return source
    if name in _CUTS:
        where = 0 if name == "unbind" else 1  # of the arguments
        keyword = next((each.value for each in node.keywords if each.arg == "dim"), None)
        along = _constant(keyword or (args[where] if len(args) > where else None))
        columns = dim is None and name != "unbind" and along in (-1, 2)
        rows = dim is not None and name == "unbind" and (along or 0) in (dim, -3)
        return replace(source, form=PIECES if raw and (columns or rows) else MIXED)
    if raw and dim is None and name in ("view", "reshape"):
        threes = [n for n, each in enumerate(args) if _constant(each) == 3]
        # Three rows of heads, which lie in columns one after the other.
        if len(threes) == 1 and threes[0] == len(args) - 3:
            known = not any(isinstance(each, ast.Starred) for each in args)
            return replace(source, dim=threes[0] if known else -3)
    if raw and dim is not None and name == "permute" and args and _constant(args[0]) == dim:
        return replace(source, dim=0)
    return replace(source, form=MIXED)
