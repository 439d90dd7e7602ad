"""Which modules of which model are adapted: a table, and the walk that finds them by role.

A row says what a projection is for, how the module that owns it is recognised (its class name and
the block of the layer it lies in) and which shared factors it uses. Paths are never written down:
they move between releases of the model library. A new family is a row of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from petal_kernels.hf.config import PetalConfig
from petal_kernels.hf.walk import (
    Projection,
    Row,
    class_name,
    family_of,
    is_a,
    owners,
    select_named,
    shapes_by_role,
)


@dataclass(frozen=True)
class Family:
    """How one model family names its stack, its layers and their projections."""

    stack: str  # class-name pattern of the module that runs the layers
    layer: str  # class-name pattern of a layer
    self_block: str  # child whose output the scale/shift residual reads
    cross_block: str  # child whose output the cross residual and the context touch
    rows: tuple[Row, ...]
    embeddings: str = ""  # class-name pattern of [queries; instruction]; "": takes no instruction


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
_INSTRUCTED = replace(_QFORMER, embeddings="*QFormerEmbeddings")

FAMILIES: dict[str, Family] = {
    "instructblip": _INSTRUCTED,
    "instructblip_qformer": _INSTRUCTED,
    "blip-2": _QFORMER,
    "blip_2": _QFORMER,
    "blip_2_qformer": _QFORMER,
}


@dataclass
class Site(Projection):
    """One projection found in a model, and its mode."""

    mode: int = -1  # row of the branch's mode matrix; set by `find`


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
class Embeddings:
    """The module that embeds [queries; instruction], and the one that calls it."""

    path: str
    module: nn.Module
    owner: nn.Module
    width: int


@dataclass
class Found:
    """What the walk found: the model type, the stack and its layers; for experts the embeddings."""

    model_type: str
    family: Family
    path: str
    stack: nn.Module
    layers: list[LayerSite]
    embeddings: Embeddings | None = None

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
    classes = sorted({type(layer.layer).__name__ for layer in layers})
    where = f"{len(layers)} layers {classes} under {path!r}"
    kept = select_named(found.sites(), config, (row.role for row in family.rows), where)
    chosen = {id(site) for site in kept}
    for layer in layers:
        layer.sites = [site for site in layer.sites if id(site) in chosen]
    _number(found)
    if config.experts:
        found.embeddings = _embeddings(model_type, root_path, root, family)
    return found


def _embeddings(model_type: str, root_path: str, root: nn.Module, family: Family) -> Embeddings:
    matches = [(n, m) for n, m in root.named_modules() if is_a(m, family.embeddings)]
    if len(matches) != 1:
        raise ValueError(
            "experts: want a model whose Q-Former embeds an instruction (one module of class "
            f"'*QFormerEmbeddings'), got a {model_type!r} model with {len(matches)}"
        )
    name, module = matches[0]
    owner = root.get_submodule(name.rpartition(".")[0])
    path = ".".join(part for part in (root_path, name) if part)
    return Embeddings(path, module, owner, norm_width(module, path))


def norm_width(block: nn.Module, path: str) -> int:
    """What the last LayerNorm of a block normalises: the width of its output."""
    for module in reversed(list(block.modules())):
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[0])
    raise ValueError(f"{path}: want a LayerNorm in the {type(block).__name__}, got none")


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
        site.sites += [Site(row, *found) for found in owners(layer, path, row)]
    return site


def _number(found: Found) -> None:
    """Modes are numbered layer by layer, so that one layer's are one slice."""
    for branch in ("text", "image"):
        for mode, site in enumerate(found.sites(branch)):
            site.mode = mode


def base_signature(found: Found) -> dict[str, Any]:
    """What an adapter needs of its base: the stack's class, its layers, the projections' shapes."""
    signature = {
        "stack": class_name(found.stack, found.family.stack),
        "layers": len(found.layers),
        "projections": shapes_by_role(found.sites()),
    }
    if found.embeddings is not None:
        signature["embeddings"] = {"width": found.embeddings.width}
    return signature
