"""Which module is running, and whether it is trained: what records are attributed to."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils.hooks import RemovableHandle

from petal_kernels.nn.frozen_linear import FrozenLinear


class ModuleStack:
    """While entered, knows the innermost running module of `model`."""

    def __init__(self, model: nn.Module | None) -> None:
        modules = {} if model is None else dict(model.named_modules())
        self._names = {id(module): name for name, module in modules.items()}
        self.kinds = {name: type(module).__name__ for name, module in modules.items()}
        self.roles = _roles(modules)
        self._running: list[str] = []
        self._handles: list[RemovableHandle] = []

    @property
    def current(self) -> str:
        return self._running[-1] if self._running else ""

    @property
    def running(self) -> bool:
        return bool(self._running)

    def __enter__(self) -> ModuleStack:
        self._handles = [
            module_hooks.register_module_forward_pre_hook(self._push),
            module_hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _push(self, module: nn.Module, _: Any) -> None:
        # A module that is not in the tree (the base inside a wrapper) counts as the one around it.
        self._running.append(self._names.get(id(module), self.current))

    def _pop(self, module: nn.Module, _: Any, output: Any) -> None:
        self._running.pop()


def _roles(modules: dict[str, nn.Module]) -> dict[str, str]:
    """ "trainable" or "frozen" by the parameters of the module and what is inside it; one without
    any (an activation) has its parent's role. An adapted layer trains parameters of the adapter.
    """
    roles: dict[str, str] = {}
    for name, module in modules.items():
        needs = [p.requires_grad for p in module.parameters()]
        if any(needs) or any(isinstance(child, FrozenLinear) for child in module.modules()):
            roles[name] = "trainable"
        elif needs:
            roles[name] = "frozen"
        else:
            roles[name] = roles.get(name.rpartition(".")[0], "") if name else ""
    return roles


def frozen_subtrees(roles: dict[str, str]) -> list[str]:
    """Paths of the largest modules of which no parameter is trained."""
    found = []
    for name, role in roles.items():
        parent = roles.get(name.rpartition(".")[0], "") if name else ""
        if role == "frozen" and parent != "frozen":
            found.append(name)
    return found


def inside(path: str, parent: str) -> bool:
    """Whether `path` is `parent` or in it."""
    return not parent or path == parent or path.startswith(f"{parent}.")
