"""Modules that are trained whole: copies of their parameters are, the base's stay as they are.

The base's own parameters are never written. So a forward inside `disabled()`, in this thread or
another, and a checkpoint of the whole model see what came in, and `detach` has nothing to put back.
The copies are registered with the adapter; the module runs with them in its place. Half-precision
copies are kept in float32, which a GradScaler wants, and run under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels._runtime.keywords import closest
from petal_kernels.hf.context import now
from petal_kernels.hf.names import canonical, prefixes_of
from petal_kernels.hf.parts import Part, Run
from petal_kernels.hf.walk import device_of

Slot = tuple[dict[str, Any], str]  # a module's dictionary, and a name in it


class Copies(nn.Module):
    """The trained parameters, by the path of their module; registered with the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[str, str] = {}  # of the module -> name of its holder here
        self._known: dict[int, tuple[nn.Module, str]] = {}  # base parameter -> holder, name

    def hold(
        self, path: str, module: nn.Module, names: Sequence[str], *, buffers: bool = True
    ) -> CopyPart:
        """Copies parameters `names` of the module at `path`, and its buffers; parameters that
        several modules share stay shared."""
        holder = nn.Module()
        shared: dict[str, tuple[nn.Module, str]] = {}
        for name in names:
            parameter = module._parameters[name]
            assert parameter is not None
            if id(parameter) in self._known:
                shared[name] = self._known[id(parameter)]
                continue
            if not parameter.is_floating_point():
                raise ValueError(
                    f"modules_to_save: want floating parameters to train {path!r} whole, got "
                    f"{name} of {parameter.dtype}"
                )
            holder.register_parameter(name, _trained(parameter, module))
            self._known[id(parameter)] = (holder, name)
        for name, buffer in module._buffers.items() if buffers else ():
            copied = None if buffer is None else buffer.detach().clone()
            if copied is not None and names and copied.dtype == torch.float16:
                copied = copied.float()  # a norm's statistics beside its parameters
            lasting = name not in module._non_persistent_buffers_set
            holder.register_buffer(name, copied, persistent=lasting)
        if holder._parameters or holder._buffers:
            self.paths[path] = path.replace(".", "-")
            self.add_module(self.paths[path], holder)
        return CopyPart(holder, shared)

    def held(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module, str]]:
        """The parameters of `model` that are trained, under every name: path, module and name, then
        the holder of the copy and its name there."""
        for path, module in model.named_modules(remove_duplicate=False):
            part = module.__dict__.get("_petal_copy")
            for name in module._parameters:
                own = part.held(name) if isinstance(part, CopyPart) else None
                if name == "bias" and module.__dict__.get("bias_of") is not None:  # of a wrapper
                    own = (module.__dict__["bias_of"], name)
                if own is not None and own[0]._parameters.get(own[1]) is not None:
                    yield path, module, name, *own

    def other_names(self, model: nn.Module) -> dict[str, str]:
        """By what other names than the one that it is held under the model reads a parameter that
        several of its modules share."""
        first: dict[int, str] = {}
        others: dict[str, int] = {}
        for path, _, name, holder, key in self.held(model):
            known, full = id(holder._parameters[key]), f"{path}.{name}"
            if self._modules.get(self.paths.get(path, "")) is holder and key == name:
                first[known] = full
            else:
                others[full] = known
        return {name: first[known] for name, known in others.items()}

    def values(self, model: nn.Module) -> Iterator[tuple[list[Slot], Tensor]]:
        """Every copy, with the places in the model's modules that hold its base: several where they
        share it."""
        slots: dict[int, list[Slot]] = {}
        copies: dict[int, Tensor] = {}
        for _, module, name, holder, key in self.held(model):
            value = holder._parameters[key]
            assert value is not None
            copies[id(value)] = value
            slots.setdefault(id(value), []).append((module._parameters, name))
        for known, copied in copies.items():
            yield slots[known], copied
        for module in model.modules():
            part = module.__dict__.get("_petal_copy")
            for name, buffer in part.holder._buffers.items() if isinstance(part, CopyPart) else ():
                if buffer is not None:
                    yield [(module._buffers, name)], buffer

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        """The holders by the path of their module."""
        for path, name in self.paths.items():
            yield path, self._modules[name]  # type: ignore[misc]


def _trained(parameter: nn.Parameter, module: nn.Module) -> nn.Parameter:
    value = parameter.detach()
    if value.is_meta and device_of(module).type != "meta":
        (name,) = (n for n, p in module._parameters.items() if p is parameter)
        value = offloaded(value, module, name)
    dtype = torch.float32 if value.dtype == torch.float16 else value.dtype
    return nn.Parameter(value.to(device_of(module), dtype, copy=True))


def offloaded(empty: Tensor, module: nn.Module, name: str) -> Tensor:
    """The value of a parameter that accelerate keeps elsewhere; as it is where nobody does."""
    values: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return empty if values is None or name not in values else values[name]


class CopyPart(Part):
    """A module that runs with its trained parameters where the call is on: its own forward reads
    them from itself (`parts.Readable`)."""

    method: Any = None

    def __init__(self, holder: nn.Module, shared: dict[str, tuple[nn.Module, str]]) -> None:
        self.holder, self.shared = holder, shared

    def held(self, name: str) -> tuple[nn.Module, str]:
        """Which holder has the trained value of that name, and by what name."""
        return self.shared.get(name, (self.holder, name))

    def value(self, name: str) -> Tensor | None:
        """The trained parameter, or the buffer beside it, of that name where the call is on."""
        holder, key = self.held(name)
        value: Tensor | None = holder._parameters.get(key)
        if value is None:
            value = holder._buffers.get(key)
        return value if value is not None and now(self.method).on else None

    def takes(self, name: str, value: Any) -> bool:
        """Whether what is assigned to the module belongs to the copy: what the copy has already, as
        `tie_weights` assigns it, and statistics that a forward replaces."""
        current = self.value(name)
        if current is None or value is None:
            return False
        if current is not value and name in self.holder._buffers:
            self.holder._buffers[name] = value
            return True
        return current is value

    def _narrow(self, module: nn.Module) -> torch.dtype | None:
        """The base's dtype where the copies are wider than it now."""
        for name, own in module._parameters.items():
            holder, key = self.held(name)
            copied = holder._parameters.get(key)
            if own is not None and copied is not None and own.dtype != copied.dtype:
                return own.dtype
        return None

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        narrow = self._narrow(module) if now(self.method).on else None
        if narrow is None:
            return run(*args, **kwargs)
        with torch.autocast(device_of(module).type, dtype=narrow):
            output = run(*args, **kwargs)
        if isinstance(output, Tensor) and output.dtype == torch.float32:
            return output.to(narrow)
        return output


def extra_modules(
    model: nn.Module, names: Sequence[str] | None, adapted: Sequence[nn.Module]
) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names, by path; none may hold an adapted one."""
    extra: dict[str, nn.Module] = {}
    for name in names or []:
        matches = {
            path: module
            for path, module in model.named_modules()
            if path == name or path.endswith("." + name)
        }
        matches = matches or _elsewhere(model, name)
        if not matches:
            ends = {path.rpartition(".")[2] for path, _ in model.named_modules()} - {""}
            near = closest(name, sorted(ends))
            meant = f"; did you mean {near!r}?" if near else ""
            raise ValueError(
                f"modules_to_save: want names of modules of the model, got {name!r}{meant}"
            )
        extra.update(matches)
    taken = {id(module) for module in adapted}
    for path, module in extra.items():
        if any(id(child) in taken for child in module.modules()):
            raise ValueError(
                f"modules_to_save: want modules without adapted projections, got {path!r}"
            )
    return extra


def _elsewhere(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The module of that name in a model with a head, or without one, or in wrappers."""
    prefixes = prefixes_of(model)
    root = canonical(name, prefixes)
    found = model.named_modules()
    return {path: module for path, module in found if root and canonical(path, prefixes) == root}
