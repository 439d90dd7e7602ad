"""Finding modules by class, over the whole MRO, a model's family by its config, and the places that
`target_modules` names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from torch import nn

from petal_kernels.hf.config import AdapterConfig


def family_of(model: nn.Module, families: Collection[str]) -> tuple[str, str, nn.Module]:
    """(model type, path, module) of the first module whose config names one of `families`."""
    seen = []
    for path, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if model_type in families:
            return str(model_type), path, module
        if model_type is not None and model_type not in seen:
            seen.append(model_type)
    raise ValueError(
        f"model: want a module whose config.model_type is one of {sorted(families)}, "
        f"got a {type(model).__name__} with model types {seen}"
    )


def is_a(module: nn.Module, pattern: str) -> bool:
    """Whether a class of `module` fits: engines that swap a class put a subclass in front."""
    return any(fnmatchcase(cls.__name__, pattern) for cls in type(module).__mro__)


def class_name(module: nn.Module, pattern: str) -> str:
    """The name of the most basic class of `module` that fits `pattern`."""
    return [cls.__name__ for cls in type(module).__mro__ if fnmatchcase(cls.__name__, pattern)][-1]


@dataclass(frozen=True)
class Row:
    """One projection of a layer, in a family's table."""

    role: str  # "self.query": reported, and a name that target_modules may use
    block: str  # the layer's child it lies in
    parent: str  # class-name pattern of the module that owns it
    child: str  # its name there
    branch: str = "text"  # "image": it reads the features that all layers of the stack read
    group: str = ""  # projections of one group read one input and share one operator call


@dataclass
class Projection:
    """One projection found in a model."""

    row: Row
    path: str
    parent: nn.Module
    base: nn.Module

    @property
    def role(self) -> str:
        return self.row.role

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features) of the base."""
        sizes = [getattr(self.base, name, None) for name in ("in_features", "out_features")]
        if not all(isinstance(size, int) for size in sizes):
            raise ValueError(
                f"{self.path}: want a linear layer with in_features and out_features, got a "
                f"{type(self.base).__name__}"
            )
        return sizes[0], sizes[1]  # type: ignore[return-value]


def owners(layer: nn.Module, path: str, row: Row) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, owner, projection) of all that `row` describes in the layer at `path`."""
    block = getattr(layer, row.block, None)
    if not isinstance(block, nn.Module):
        return
    for name, owner in block.named_modules():
        base = getattr(owner, row.child, None)
        if is_a(owner, row.parent) and isinstance(base, nn.Module):
            yield ".".join(p for p in (path, row.block, name, row.child) if p), owner, base


def shapes_by_role(sites: Iterable[Projection]) -> dict[str, dict[str, int]]:
    """How many projections of a role there are, and their sizes."""
    shapes: dict[str, dict[str, int]] = {}
    for site in sites:
        d_in, d_out = site.shape
        entry = shapes.setdefault(site.role, {"count": 0, "in": d_in, "out": d_out})
        entry["count"] += 1
    return shapes


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
            raise ValueError(
                f"target_modules: {missing} match nothing; want names among the roles {known} or "
                f"ends of module paths such as {[site.path for site in sites[:2]]}"
            )
    if not kept:
        raise ValueError(
            f"model: want places that {config.method!r} adapts (roles {known}, target_modules="
            f"{wanted!r}), got {len(sites)} candidates in {where} and none selected"
        )
    return kept


def _is_named(site: Named, name: str) -> bool:
    return name in (site.role, site.path) or site.path.endswith("." + name)
