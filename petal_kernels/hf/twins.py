"""Modules as a report asks them: without the hooks and replaced forwards that others hung there.

A report runs calls on tensors without values. Somebody else's hook is not to meet these: it would
keep them, read them, or bring an offloaded weight.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.hf.parts import own_class
from petal_kernels.nn.frozen_linear import compute_dtype, why_not_readable
from petal_kernels.nn.routed_lora import linear_features

HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith(("_hooks", "_with_kwargs")))


class NotDry(RuntimeError):  # noqa: N818 - it says what is
    """Only a real call of a base would say what it gives."""


def twin_of(module: nn.Module, **instead: Any) -> Any:
    """A module of the same class that shares everything but the hooks, and `instead`."""
    twin: Any = object.__new__(own_class(module))
    values = {n: v for n, v in module.__dict__.items() if not n.startswith("_petal")}
    hooks: dict[str, Any] = {name: OrderedDict() for name in HOOKS if name in values}
    twin.__dict__.update(values | hooks | instead)
    return twin


def skeleton(model: nn.Module) -> nn.Module:
    """A model of the same modules that shares every value and no object that can be changed:
    modules, parameters and the dictionaries that hold them, hooks among them, are its own."""
    modules: dict[int, nn.Module] = {}
    parameters: dict[int, Any] = {}

    def twin(module: nn.Module | None) -> Any:
        if module is None or id(module) in modules:
            return modules.get(id(module))
        own: Any = modules.setdefault(id(module), object.__new__(type(module)))
        values = dict(module.__dict__)
        for name in values:
            if name in HOOKS or name in ("_buffers", "_non_persistent_buffers_set"):
                values[name] = copy.copy(values[name])
        values["_parameters"] = {n: parameter(p) for n, p in module._parameters.items()}
        values["_modules"] = {n: twin(child) for n, child in module._modules.items()}
        own.__dict__.update(values)
        return own

    def parameter(value: nn.Parameter | None) -> Any:
        # What is of another class and frozen, as quantised weights are, is never written.
        if value is None or not (type(value) is nn.Parameter or value.requires_grad):
            return value
        if id(value) not in parameters:
            own = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            own.__dict__.update(value.__dict__)
            parameters[id(value)] = own
        return parameters[id(value)]

    found: nn.Module = twin(model)
    return found


def base_twin(base: nn.Module) -> nn.Module:
    """A linear as an adapter will meet it: what may not be read of it, may not of its twin.

    A hooked, patched or sharded linear is not run: what it gives is known. Of another class the own
    forward runs.
    """
    if not why_not_readable(base):
        return base
    twin: nn.Module = twin_of(base)
    if type(base).__name__ in ("Linear", "Conv1D"):
        twin.__dict__["forward"] = _Output(linear_features(base)[1])
    elif "forward" in base.__dict__:
        twin.__dict__["forward"] = _refuse
    return twin


class _Output(nn.Module):
    """What a linear gives, in the dtype of its product here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.empty(*x.shape[:-1], self.width, dtype=compute_dtype(x), device=x.device)


def _refuse(x: Tensor) -> Tensor:
    raise NotDry("its forward is replaced")
