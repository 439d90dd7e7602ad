"""The module behind a step that is a function: a bound method's, or one that it closes over."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from petal_kernels.memory.graph import content_of


def module_behind(model: Callable[..., Any]) -> nn.Module | None:
    """The one module, in which every other that the function names lies; None where there is none.
    Several are the parts of a new one, under the names that the function has for them.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    _look("", model, found, depth=3)
    inner = {id(m) for _, module in found.values() for m in module.modules() if m is not module}
    roots = [(name, module) for name, module in found.values() if id(module) not in inner]
    if len(roots) <= 1:
        return roots[0][1] if roots else None
    parts = {f"{name.replace('.', '_') or 'module'}": module for name, module in roots}
    if len(parts) < len(roots):
        parts = {f"{name.replace('.', '_')}_{i}": m for i, (name, m) in enumerate(roots)}
    together = nn.Module()
    for name, module in parts.items():
        together._modules[name] = module
    together.training = any(module.training for _, module in roots)
    return together


def _look(name: str, value: Any, found: dict[int, tuple[str, nn.Module]], depth: int) -> None:
    if isinstance(value, nn.Module):
        found.setdefault(id(value), (name, value))
    elif depth:
        for label, each in _named(value):
            _look(label or name, each, found, depth - 1)


def _named(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, MethodType):
        own = value.__self__
        if isinstance(own, nn.Module):  # model.forward: what else it names is the model's business
            return [("", own)]
        attributes = getattr(own, "__dict__", {})
        return [("", value.__func__), *attributes.items()]
    if isinstance(value, functools.partial):
        keywords = value.keywords.items()
        return [("", value.func), *(("", each) for each in value.args), *keywords]
    if isinstance(value, FunctionType):
        original = getattr(value, "_torchdynamo_orig_callable", None)
        wrapped = [("", each) for each in (original, getattr(value, "__wrapped__", None))]
        defaults = [("", each) for each in value.__defaults__ or ()]
        keywords = (value.__kwdefaults__ or {}).items()
        return [*wrapped, *_variables(value), *defaults, *keywords]
    if isinstance(value, (list, tuple)):
        return [("", each) for each in value]
    if isinstance(value, dict):
        return [(str(key), each) for key, each in value.items()]
    if callable(value) and not isinstance(value, type):
        return list(getattr(value, "__dict__", {}).items())
    return []


def _variables(function: FunctionType) -> Iterable[tuple[str, Any]]:
    """What the function reads from around it, not every global that an attribute is called like."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    for name, cell in cells:
        yield name, content_of(cell)
    for name in sorted(_globals_of(function.__code__) & function.__globals__.keys()):
        yield name, function.__globals__[name]


def _globals_of(code: CodeType) -> set[str]:
    inner = [_globals_of(each) for each in code.co_consts if isinstance(each, CodeType)]
    read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return read.union(*inner)
