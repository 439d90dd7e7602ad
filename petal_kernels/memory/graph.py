"""Autograd's graph after a forward: its nodes, what they hold, and what is trained behind them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

_RAW = "_raw_saved_"
REENTRANT = "CheckpointFunctionBackward"
COMPILED = "CompiledFunctionBackward"
_GENERATORS = ("fwd_cpu_state", "fwd_device_states")  # 5 KB a region, whatever the model
_MOST = 100_000  # objects looked at in one search: one that holds the world is let go

_ATTRIBUTES: dict[type, tuple[str, ...]] = {}


def walk(outputs: Iterable[Tensor], trained: set[int]) -> dict[Any, bool]:
    """Every node behind the outputs, and whether a trained tensor (by identity) lies behind it."""
    reaches: dict[Any, bool] = {}
    for output in outputs:
        if output.grad_fn is not None:
            _reach(output.grad_fn, trained, reaches)
    return reaches


def _reach(root: Any, trained: set[int], reaches: dict[Any, bool]) -> None:
    """Depth first without recursion: a graph is deeper than Python's stack."""
    pending: list[tuple[Any, bool]] = [(root, False)]
    while pending:
        node, ready = pending.pop()
        if node in reaches:
            continue
        below = [child for child, _ in node.next_functions if child is not None]
        if ready:
            variable = getattr(node, "variable", None)
            # A reentrant checkpoint hides its parameters.
            own = id(variable) in trained or node.name() == REENTRANT
            reaches[node] = own or any(reaches.get(child, False) for child in below)
        else:
            pending.append((node, True))
            pending += [(child, False) for child in below if child not in reaches]


def saved(node: Any) -> Iterator[tuple[str, Any]]:
    """What a node holds for its saved tensors, each with its argument's name: what hooks made of
    them, or the tensor itself. Nothing is unpacked, which would start a checkpointed region's
    recomputation.
    """
    kind = type(node)
    if kind not in _ATTRIBUTES:
        _ATTRIBUTES[kind] = tuple(name for name in dir(node) if name.startswith(_RAW))
    for name in _ATTRIBUTES[kind]:
        raw = getattr(node, name)
        label = name.removeprefix(_RAW)
        several = isinstance(raw, (tuple, list))
        for i, each in enumerate(raw if several else [raw]):
            yield (f"tensor {i}" if label == "tensors" else label), each.data


def attributes(node: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a custom autograd.Function keeps as attributes of its ctx, in containers too;
    states of generators, which a checkpoint keeps in either form, are left out.
    """
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return
    for name, value in vars(node).items():
        if type(node).__name__ == REENTRANT and name in _GENERATORS:
            continue
        for t in tensors_under(value, closures=False):
            yield f"ctx.{name}", t


def tensors_under(value: Any, closures: bool = True) -> list[Tensor]:
    """The tensors that an object keeps alive: in containers, and with `closures` in functions'
    variables and objects' attributes too. Modules are not entered: what they hold stays anyway.
    """
    found: list[Tensor] = []
    seen: set[int] = set()
    pending = [value]
    while pending and len(seen) < _MOST:
        each = pending.pop()
        if isinstance(each, Tensor):
            found.append(each)
        elif id(each) not in seen and not isinstance(each, (str, bytes, int, float, type)):
            seen.add(id(each))
            pending += _parts(each, closures)
    return found


def _parts(value: Any, closures: bool) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    if isinstance(value, torch._C._autograd.SavedTensor):
        return [cast("Any", value).data]
    if not closures or isinstance(value, nn.Module):
        return []
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        cells = [content_of(cell) for cell in value.__closure__ or ()]
        return [*cells, value.__defaults__, value.__kwdefaults__]
    own = getattr(value, "__dict__", None)
    return list(own.values()) if isinstance(own, dict) and type(value).__name__ != "module" else []


def content_of(cell: Any) -> Any:
    """A closure's variable, None where it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
