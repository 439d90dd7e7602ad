"""Finding modules by class, over the whole MRO, and the places that `target_modules` names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

import torch
from torch import nn

from petal_kernels._runtime.keywords import closest
from petal_kernels.hf.config import AdapterConfig


def is_a(module: nn.Module, pattern: str) -> bool:
    """Whether a class of `module` fits: engines that swap a class put a subclass in front."""
    return any(fnmatchcase(cls.__name__, pattern) for cls in type(module).__mro__)


def class_name(module: nn.Module, pattern: str) -> str:
    """The name of the most basic class of `module` that fits `pattern`."""
    return [cls.__name__ for cls in type(module).__mro__ if fnmatchcase(cls.__name__, pattern)][-1]


def is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm or an RMSNorm, of whatever model; Liger's say for which."""
    return re.search(r"(Layer|RMS)Norm(For\w+)?$", type(module).__name__) is not None


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that owns the one at `path`, and its name there."""
    parent, _, child = path.rpartition(".")
    return model.get_submodule(parent), child


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters are, or an engine brings them to."""
    for each in module.modules():
        to = getattr(getattr(each, "_hf_hook", None), "execution_device", None)
        if to is not None:
            return torch.device(to)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def uses_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module stands: its owners and its names there, by its id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found


def joined(*parts: str) -> str:
    """A module's path."""
    return ".".join(part for part in parts if part)


class Named(Protocol):
    """A place that `target_modules` may name."""

    path: str

    @property
    def role(self) -> str: ...


NamedT = TypeVar("NamedT", bound=Named)


def select_named(
    sites: Sequence[NamedT], config: AdapterConfig, roles: Iterable[str], where: str
) -> list[NamedT]:
    """The sites that `config.target_modules` names, all where it is None; ValueError for a name
    without a match and where nothing is left. `roles` are those of the family's table."""
    wanted, known = config.target_modules, sorted(set(roles))
    kept = list(sites)
    if isinstance(wanted, str):
        kept = [site for site in sites if re.fullmatch(wanted, site.path)]
    elif wanted is not None:
        kept = [site for site in sites if any(_is_named(site, name) for name in wanted)]
        missing = [name for name in wanted if not any(_is_named(site, name) for site in sites)]
        if missing:
            ends = {site.path.rpartition(".")[2] for site in sites}
            near = [closest(name, [*known, *sorted(ends)]) for name in missing]
            meant = "".join(f"; did you mean {name!r}?" for name in filter(None, near))
            raise ValueError(
                f"target_modules: {missing} match nothing; want names among the roles {known} or "
                f"ends of module paths such as {[site.path for site in sites[:2]]}{meant}"
            )
    if not kept:
        raise ValueError(
            f"model: want places that {config.method!r} adapts (roles {known}, target_modules="
            f"{wanted!r}), got {len(sites)} candidates in {where} and none selected"
        )
    return kept


def _is_named(site: Named, name: str) -> bool:
    return name in (site.role, site.path) or site.path.endswith("." + name)


def named_but_left(
    model: nn.Module, config: AdapterConfig, sites: Sequence[Named], root: str
) -> list[str]:
    """Linears that the same names or expression match, and that are no place of the method."""
    wanted, taken = config.target_modules, {site.path for site in sites}
    if wanted is None:
        return []

    def matches(path: str) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return any(path == name or path.endswith("." + name) for name in wanted)

    return [
        path
        for path, module in model.named_modules()
        if path.startswith(root)
        and path not in taken
        and (hasattr(module, "in_features") or hasattr(module, "nf"))
        and matches(path)
    ]
