"""Which modules of which model are adapted: a table, and the walk that finds them by role.

A row says what a projection is for, how the module that owns it is recognised (its class name and
the block of the layer it lies in) and which shared factors it uses. Paths are never written down:
they move between releases of the model library. A new family is a row of `FAMILIES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from petal_kernels.hf.config import PetalConfig
from petal_kernels.hf.walk import class_name, family_of, is_a


@dataclass(frozen=True)
class Row:
    """One projection of a layer."""

    role: str  # "self.query": reported, and a name that target_modules may use
    block: str  # the layer's child it lies in
    parent: str  # class-name pattern of the module that owns it
    child: str  # its name there
    branch: str  # shared factors it uses: "text" or "image"
    group: str  # projections of one group read one input and share one operator call


@dataclass(frozen=True)
class Family:
    """How one model family names its stack, its layers and their projections."""

    stack: str  # class-name pattern of the module that runs the layers
    layer: str  # class-name pattern of a layer
    self_block: str  # child whose output the scale/shift residual reads
    cross_block: str  # child whose output the cross residual and the context touch
    rows: tuple[Row, ...]


def _attention_rows(parent: str) -> tuple[Row, ...]:
    self_rows = (
        Row(f"self.{name}", "attention", parent, name, "text", "self")
        for name in ("query", "key", "value")
    )
    cross_rows = (
        Row("cross.query", "crossattention", parent, "query", "text", "cross.query"),
        Row("cross.key", "crossattention", parent, "key", "image", "cross.key_value"),
        Row("cross.value", "crossattention", parent, "value", "image", "cross.key_value"),
    )
    return (*self_rows, *cross_rows)


_QFORMER = Family(
    stack="*QFormerEncoder",
    layer="*QFormerLayer",
    self_block="attention",
    cross_block="crossattention",
    rows=_attention_rows("*QFormerMultiHeadAttention"),
)

FAMILIES: dict[str, Family] = {
    "instructblip": _QFORMER,
    "instructblip_qformer": _QFORMER,
    "blip-2": _QFORMER,
    "blip_2": _QFORMER,
    "blip_2_qformer": _QFORMER,
}


@dataclass
class Site:
    """One projection found in a model."""

    row: Row
    path: str
    parent: nn.Module
    base: nn.Module
    mode: int = -1  # row of the branch's mode matrix; set by `find`

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


@dataclass
class LayerSite:
    """One layer with its projections, in the order of the table's rows."""

    index: int
    path: str
    layer: nn.Module
    self_block: nn.Module
    cross_block: nn.Module | None
    sites: list[Site] = field(default_factory=list)


@dataclass
class Found:
    """What the walk found: the model type, the stack and its layers."""

    model_type: str
    family: Family
    path: str
    stack: nn.Module
    layers: list[LayerSite]

    def sites(self, branch: str | None = None) -> list[Site]:
        every = (site for layer in self.layers for site in layer.sites)
        return [site for site in every if branch is None or site.row.branch == branch]


def find(model: nn.Module, config: PetalConfig) -> Found:
    """The projections of `model` that `config` adapts; ValueError if there are none."""
    model_type, root_path, root = family_of(model, FAMILIES)
    family = FAMILIES[model_type]
    stacks = [(n, m) for n, m in root.named_modules() if is_a(m, family.stack)]
    if len(stacks) != 1:
        raise ValueError(
            f"model: want exactly one module of class {family.stack!r} in a {model_type!r} model, "
            f"got {len(stacks)} {[name for name, _ in stacks]} in a {type(model).__name__}"
        )
    path = ".".join(part for part in (root_path, stacks[0][0]) if part)
    stack = stacks[0][1]
    layers = [
        _layer_site(index, f"{path}.{name}", module, family)
        for index, (name, module) in enumerate(
            (n, m) for n, m in stack.named_modules() if is_a(m, family.layer)
        )
    ]
    found = Found(model_type, family, path, stack, layers)
    _select(found, config)
    _number(found)
    return found


def _layer_site(index: int, path: str, layer: nn.Module, family: Family) -> LayerSite:
    self_block = getattr(layer, family.self_block, None)
    cross_block = getattr(layer, family.cross_block, None)
    if self_block is None:
        raise ValueError(
            f"{path}: want a child {family.self_block!r} in a {type(layer).__name__}, "
            f"got {[name for name, _ in layer.named_children()]}"
        )
    site = LayerSite(index, path, layer, self_block, cross_block)
    for row in family.rows:
        block = getattr(layer, row.block, None)
        if block is None:
            continue
        for name, parent in block.named_modules():
            base = getattr(parent, row.child, None)
            if is_a(parent, row.parent) and isinstance(base, nn.Module):
                parts = (path, row.block, name, row.child)
                site.sites.append(Site(row, ".".join(p for p in parts if p), parent, base))
    return site


def _select(found: Found, config: PetalConfig) -> None:
    """Keeps what `target_modules` names; an empty result or a name without a match raises."""
    sites = found.sites()
    wanted = config.target_modules
    roles = sorted({row.role for row in found.family.rows})
    if wanted is None:
        kept = sites
    elif isinstance(wanted, str):
        kept = [site for site in sites if re.fullmatch(wanted, site.path)]
    else:
        kept = [site for site in sites if any(_named(site, name) for name in wanted)]
        missing = [name for name in wanted if not any(_named(site, name) for site in sites)]
        if missing:
            raise ValueError(
                f"target_modules: {missing} match nothing; want names among the roles {roles} or "
                f"ends of module paths such as {[site.path for site in sites[:2]]}"
            )
    if not kept:
        classes = sorted({type(layer.layer).__name__ for layer in found.layers})
        raise ValueError(
            f"model: want projections with roles {roles} (target_modules={wanted!r}) under "
            f"{found.path!r}, got {len(sites)} candidates in {len(found.layers)} layers {classes} "
            "and none selected"
        )
    for layer in found.layers:
        layer.sites = [site for site in layer.sites if any(site is k for k in kept)]


def _named(site: Site, name: str) -> bool:
    return name in (site.row.role, site.path) or site.path.endswith("." + name)


def _number(found: Found) -> None:
    """Modes are numbered layer by layer, so that one layer's are one slice."""
    for branch in ("text", "image"):
        for mode, site in enumerate(found.sites(branch)):
            site.mode = mode


def base_signature(found: Found) -> dict[str, Any]:
    """What an adapter needs of its base: the stack's class, its layers, the projections' shapes."""
    projections: dict[str, dict[str, int]] = {}
    for site in found.sites():
        d_in, d_out = site.shape
        entry = projections.setdefault(site.row.role, {"count": 0, "in": d_in, "out": d_out})
        entry["count"] += 1
    return {
        "stack": class_name(found.stack, found.family.stack),
        "layers": len(found.layers),
        "projections": projections,
    }
