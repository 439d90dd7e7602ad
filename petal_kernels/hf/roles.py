"""What a layer is made of, by its own structure and code: the row of a layer that no table has.

A layer has one attention, whose code says which linears give query, key and value (`flow.py`), and
may have one feed-forward. The names of the linears are a check: one that says another role than the
code is refused. Where the code calls no attention function that can be found, they decide alone.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from petal_kernels.hf.flow import Flow, Source, Value, child_called, flow_of, forward_of
from petal_kernels.hf.linears import is_linear
from petal_kernels.hf.models import Block, Linear, Stack
from petal_kernels.hf.parts import own_class
from petal_kernels.nn.routed_lora import linear_features

ROLES = ("query", "key", "value")
_SAYS = {"query": ("q", "query", "wq"), "key": ("k", "key", "wk"), "value": ("v", "value", "wv")}
_FEED_FORWARD = ("mlp", "ffn", "ff", "feed_forward")


@dataclass(frozen=True)
class Attention:
    """An attention by the names of its linears: of three, or of one whose output is in three parts
    of `widths` columns. `crosses`: key and value always read another sequence than the query;
    `crosses_with`: arguments of the forward that make them do so where they are given."""

    linears: tuple[str, ...]
    widths: tuple[int, ...] = ()
    crosses: bool = False
    crosses_with: frozenset[str] = frozenset()


def attention_of(module: nn.Module) -> Attention | str:
    """How a module is an attention; why it cannot be told, or "" where it is none at all."""
    linears = {name: child for name, child in module.named_children() if is_linear(child)}
    if len(linears) < 2:
        return ""
    flow = flow_of(own_class(module), frozenset(linears))
    given = [_linears_of(call) for call in flow.calls] if flow is not None else []
    known = [call for call in given if all(call)]
    if flow is None or not known:
        return _by_names(linears, flow)
    joined = [frozenset[Source]().union(*values) for values in zip(*known, strict=True)]
    if any(len(values) != 1 for values in joined):
        return "its query, key and value are not each of one linear"
    query, key, value = (next(iter(values)) for values in joined)
    names = (query.name, key.name, value.name)
    if len(set(names)) == 1:
        if (query.part, key.part, value.part) != (0, 1, 2):
            return f"{query.name!r} does not give query, key and value one after the other"
        widths = _widths(linears, query.name, flow.reader_of_attention())
        if widths is None:
            return f"{query.name!r} does not give query, key and value of known widths"
        return Attention((query.name,), widths)
    if len(set(names)) == 2:
        return f"{names[2]!r} gives more than one of query, key and value"
    for role, name in zip(ROLES, names, strict=True):
        if _said(name) not in (None, role):
            return f"{name!r} is what it reads as its {role}"
    return _with_reads(names, flow)


def _linears_of(call: Sequence[Value]) -> list[frozenset[Source]]:
    return [frozenset(s for s in value if s.kind == "linear") for value in call]


def _with_reads(names: tuple[str, ...], flow: Flow) -> Attention:
    """By what the three read: one sequence, or the query one and the others another."""
    query, key, value = (flow.reads[name] for name in names)
    if key == value and key and not key & query:
        return Attention(names, crosses=True)
    return Attention(names, crosses_with=frozenset(source.name for source in (key | value) - query))


def _by_names(linears: dict[str, nn.Module], flow: Flow | None) -> Attention | str:
    said = {role: [name for name in linears if _said(name) == role] for role in ROLES}
    if any(len(names) != 1 for names in said.values()):
        return ""
    names = tuple(each[0] for each in said.values())
    if flow is None or not set(names) <= flow.reads.keys():
        return Attention(names)
    return _with_reads(names, flow)


def _said(name: str) -> str | None:
    """The role that a linear's name says."""
    words = re.split(r"[_\d]+", name.lower())
    return next((role for role, said in _SAYS.items() if set(words) & set(said)), None)


def _widths(
    linears: dict[str, nn.Module], fused: str, output: str | None
) -> tuple[int, ...] | None:
    """The widths of query, key and value: what is read behind the attention is as wide as the
    query."""
    if output is None:
        return None
    query, total = linear_features(linears[output])[0], linear_features(linears[fused])[1]
    rest = total - query
    return (query, rest // 2, rest // 2) if 0 < rest <= 2 * query and rest % 2 == 0 else None


def row_of(layer: nn.Module) -> Stack | str:
    """A layer's row; why it has none, or "" where it is no layer of attention."""
    found = {name: attention_of(child) for name, child in layer.named_children()}
    attentions = {name: each for name, each in found.items() if each != ""}
    if not attentions:
        return ""
    if len(attentions) > 1:
        return f"it has {len(attentions)} attentions, {', '.join(attentions)}"
    ((path, attention),) = attentions.items()
    if isinstance(attention, str):
        return f"{path}: {attention}"
    if attention.crosses_with & _given(layer, path):
        return f"{path}: its key and value may read another sequence than its query"
    kind = "cross" if attention.crosses else "self"
    block = "cross" if attention.crosses else "attention"
    called = _called(layer)
    blocks = [Block(block, path, path)] if path in called else []
    mlp = _feed_forward(layer, path)
    if mlp in called:
        blocks.append(Block("ffn", mlp, mlp))
    return Stack(
        "decoder" if takes_cache(layer) else "encoder",
        "",
        tuple(_rows(path, attention, kind)),
        tuple(blocks),
        cross_block=path if attention.crosses else "",
    )


def _rows(path: str, attention: Attention, kind: str) -> list[Linear]:
    if attention.widths:
        name, same = f"{path}.{attention.linears[0]}", len(set(attention.widths)) == 1
        parts = 3 if same else attention.widths
        return [Linear("self", "query_value", name, parts, (0, 2))]
    return [
        Linear(kind, role, f"{path}.{name}", encoded=attention.crosses and role != "query")  # type: ignore[arg-type]
        for role, name in zip(ROLES, attention.linears, strict=True)
    ]


def _feed_forward(layer: nn.Module, attention: str) -> str:
    """The one child with matrices beside the attention, or of several the one that is called so."""
    others = [
        name
        for name, child in layer.named_children()
        if name != attention and not is_linear(child) and _has_matrices(child)
    ]
    named = [name for name in others if name in _FEED_FORWARD]
    found = named if len(others) > 1 else others
    return found[0] if len(found) == 1 else ""


def _has_matrices(module: nn.Module) -> bool:
    """Linears, of whatever storage, or the stacked weights of experts."""
    return any(is_linear(each) for each in module.modules()) or any(
        parameter.dim() > 1 for parameter in module.parameters()
    )


def _given(layer: nn.Module, child: str) -> set[str]:
    """The arguments that the layer gives a child; all where its forward cannot be read."""
    names = _arguments(layer.get_submodule(child))
    function = forward_of(own_class(layer))
    if function is None:
        return set(names)
    own = function.args.args[0].arg
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    calls = [call for call in calls if child_called(call.func, own) == child]
    given = {each.arg for call in calls for each in call.keywords if each.arg is not None}
    return given.union(*(names[: len(call.args)] for call in calls))


def _called(layer: nn.Module) -> set[str]:
    """The children that the layer's forward calls; all where it cannot be read."""
    function = forward_of(own_class(layer))
    if function is None:
        return {name for name, _ in layer.named_children()}
    own = function.args.args[0].arg
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return {name for call in calls if (name := child_called(call.func, own))}


def takes_cache(layer: nn.Module) -> bool:
    """Whether its forward takes the keys and values of what came before."""
    return any("past" in name for name in _arguments(layer))


def _arguments(module: nn.Module) -> list[str]:
    forward = own_class(module).forward  # type: ignore[attr-defined]
    return list(inspect.signature(forward).parameters)[1:]
