"""What a module's own forward does with its children, read from its code and not from its name.

Two questions that decide what may run as one call: is this module an MLP, down(act(gate(x)) *
up(x)) or down(act(up(x))), and nothing else; and which of its linears read one and the same tensor.
The first is answered by a symbolic trace of the forward, the second by its syntax tree. A module
whose code cannot be read, or that does anything beside, gets no for an answer.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from petal_kernels.hf.flow import child_called, forward_of
from petal_kernels.hf.linears import is_linear
from petal_kernels.hf.parts import own_class
from petal_kernels.hf.twins import twin_of

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Mlp:
    """An MLP by its children's names: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where
    `gate` is None; `after` follow on what `down` gives, one after the other (dropouts)."""

    gate: str | None
    up: str
    down: str
    act: str
    activation: str
    after: tuple[str, ...] = ()


class _Children(fx.Tracer):
    """Traces a module's own forward; every child is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def activation_of(module: nn.Module) -> str | None:
    """The name of the function that an activation module computes, found by its values."""
    if any(True for each in (module.children, module.parameters, module.buffers) for _ in each()):
        return None
    with _disable_current_modes(), torch.no_grad():
        near = torch.linspace(-6.0, 6.0, 61, dtype=torch.float64, device="cpu")
        # And far enough to tell one that is cut off somewhere.
        z = torch.cat((near, *(sign * near.new_tensor([7, 12, 40, 1e3, 1e6]) for sign in (-1, 1))))
        try:
            got = module(z.clone())
        except Exception:  # whatever it is, it is no activation
            return None
        if not isinstance(got, Tensor) or got.shape != z.shape:
            return None
        for name, function in _ACTIVATIONS.items():
            if torch.allclose(got, function(z), rtol=1e-12, atol=1e-12):
                return name
    return None


def mlp_of(module: nn.Module) -> Mlp | None:
    """How `module` is an MLP of linears; None where its forward is anything else."""
    linears = [name for name, child in module.named_children() if is_linear(child)]
    if not 2 <= len(linears) <= 3 or "forward" in module.__dict__:
        return None
    # A forward may take another way in evaluation.
    forms = {_form(twin_of(module, training=training)) for training in (False, True)}
    mlp = forms.pop() if len(forms) == 1 else None
    if mlp is None or sorted(n for n in (mlp.gate, mlp.up, mlp.down) if n) != sorted(linears):
        return None
    activation = activation_of(module.get_submodule(mlp.act))
    dropouts = all(isinstance(module.get_submodule(name), nn.Dropout) for name in mlp.after)
    return replace(mlp, activation=activation) if activation is not None and dropouts else None


def _form(module: nn.Module) -> Mlp | None:
    """The MLP that a module's forward is as it stands, its activation not yet known."""
    try:
        with _disable_current_modes():
            graph = _Children().trace(module)
    except Exception:  # somebody's code meets what is no tensor: it may raise anything
        return None
    try:
        return _mlp(_tree(graph))
    except ValueError:
        return None


_X = "x"  # the one input
_Tree = str | tuple[Any, ...]  # of a call (child's name, what it reads), of a product ("*", a, b)


def _tree(graph: fx.Graph) -> _Tree:
    """What the forward returns, as a tree over its input; ValueError where it is none, or where
    the forward does anything else beside."""
    # What is read and not used does nothing; a call without a reader may write.
    unread = ("placeholder", "get_attr")
    nodes = [node for node in graph.nodes if node.users or node.op not in unread]
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError("more than one input")
    seen = 2  # that and the output

    def tree(node: Any) -> _Tree:
        nonlocal seen
        if node is inputs[0]:
            return _X
        if not isinstance(node, fx.Node):
            raise ValueError("a constant")
        seen += 1
        if len(node.users) != 1 or node.kwargs:
            raise ValueError("read twice, or called with keywords")
        if node.op == "call_module" and len(node.args) == 1:
            return str(node.target), tree(node.args[0])
        if node.op == "call_function" and node.target in (operator.mul, torch.mul):
            left, right = node.args
            return "*", tree(left), tree(right)
        raise ValueError(f"a {node.op}")

    found = tree(nodes[-1].args[0])
    if seen != len(nodes):
        raise ValueError("something beside")
    return found


def _chain(tree: _Tree) -> tuple[list[str], _Tree]:
    """Calls from the outermost inwards, and what the innermost reads."""
    names = []
    while not isinstance(tree, str) and tree[0] != "*":
        name, tree = tree
        names.append(name)
    return names, tree


def _mlp(tree: _Tree) -> Mlp | None:
    names, inner = _chain(tree)
    if inner == _X:
        if len(names) < 3:
            return None
        *after, down, act, up = names
        return Mlp(None, up, down, act, "", tuple(reversed(after)))
    if not names:
        return None
    *after, down = names
    sides = sorted((_chain(side) for side in inner[1:]), key=lambda side: len(side[0]))
    if [(len(chain), end) for chain, end in sides] != [(1, _X), (2, _X)]:
        return None
    ((up,), _), ((act, gate), _) = sides
    return Mlp(gate, up, down, act, "", tuple(reversed(after)))


def one_input(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of two and more of the module's linears that its forward calls with one and the same
    variable, in the order of the calls."""
    if "forward" in module.__dict__:
        return ()
    linears = {name for name, child in module.named_children() if is_linear(child)}
    return tuple(
        kept
        for group in _groups(own_class(module))
        if len(kept := tuple(name for name in group if name in linears)) > 1
    )


@functools.lru_cache(maxsize=512)
def _groups(cls: type) -> tuple[tuple[str, ...], ...]:
    function = forward_of(cls)
    if function is None:
        return ()
    own = function.args.args[0].arg  # "self", as a rule
    calls: list[_Call] = []
    writes: list[tuple[int, str]] = []
    for order, (node, body) in enumerate(_walk(function, 0)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            writes.append((order, node.id))
        elif isinstance(node, ast.Call) and (child := child_called(node.func, own)):
            calls.append(_Call(order, child, _variable(node), body))
    times = [call.child for call in calls]
    groups: dict[tuple[str, int, int], list[str]] = {}
    for call in calls:
        if call.name and times.count(call.child) == 1:
            written = sum(1 for order, name in writes if name == call.name and order < call.order)
            groups.setdefault((call.name, written, call.body), []).append(call.child)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


@dataclass(frozen=True)
class _Call:
    """A child's call with a variable, where in the function, in which list of statements."""

    order: int
    child: str
    name: str
    body: int


def _variable(call: ast.Call) -> str:
    """The one variable that it is called with; empty where it is called with anything else."""
    given = [*call.args, *call.keywords]
    return given[0].id if len(given) == 1 and isinstance(given[0], ast.Name) else ""


def _walk(node: ast.AST, body: int) -> Iterator[tuple[ast.AST, int]]:
    """Every node in the order in which it runs, with a number for the list of statements that it
    is in: an assignment's value before its target."""
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        if node.value is not None:
            yield from _walk(node.value, body)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from _walk(target, body)
        return
    yield node, body
    for field, value in ast.iter_fields(node):
        values = value if isinstance(value, list) else [value]
        inner = body
        if field in ("body", "orelse", "finalbody", "handlers") and isinstance(
            node, (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.IfExp, ast.Lambda)
        ):
            inner = hash((id(node), field))
        for each in values:
            if isinstance(each, ast.AST):
                yield from _walk(each, inner)
