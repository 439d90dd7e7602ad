"""Which module is running, and whether it is trained: what records are attributed to."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType

from torch import nn

from petal_kernels.nn.frozen_linear import FrozenLinear

# Every call of a module passes through these, whose `self` is the module.
_CALLS = {
    function.__code__
    for name in ("_wrapped_call_impl", "_call_impl")
    if (function := getattr(nn.Module, name, None)) is not None
}


class ModuleStack:
    """Knows the innermost running module of `model`, in the thread that asks.

    It is read off the interpreter's own stack: hooks would be seen by other threads' forwards and
    by compiled code, which would be compiled again for them.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = {} if model is None else dict(model.named_modules())
        self._names = {id(module): name for name, module in modules.items()}
        self.kinds = {name: type(module).__name__ for name, module in modules.items()}
        self.roles = _roles(modules)

    @property
    def current(self) -> str:
        """The path of the module that runs, "" for none or the model itself."""
        return self._innermost(sys._getframe(1)) or ""

    @property
    def running(self) -> bool:
        """Whether any module of the model does."""
        return self._innermost(sys._getframe(1)) is not None

    def raised_in(self, traceback: TracebackType | None) -> str:
        """The path of the innermost module that an exception passed through."""
        found = ""
        while traceback is not None:
            found = self._name(traceback.tb_frame) or found
            traceback = traceback.tb_next
        return found

    def _innermost(self, frame: FrameType | None) -> str | None:
        # A module that is not in the tree (the base inside a wrapper) counts as the one around it.
        while frame is not None:
            name = self._name(frame)
            if name is not None:
                return name
            frame = frame.f_back
        return None

    def _name(self, frame: FrameType) -> str | None:
        if frame.f_code not in _CALLS:
            return None
        return self._names.get(id(frame.f_locals.get("self")))


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
