"""Which modules of which model Aurora adapts: a table, and the walk that finds them by role.

A family is a tuple of kinds of stacks: the image encoder and the text stacks (an encoder, a
decoder, or both). All of them share one U and one V, so every adapted projection is made of square
blocks of one width: a fused or wide projection counts one mode per block of its outputs or inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from petal_kernels.hf.config import AuroraConfig
from petal_kernels.hf.walk import class_name, family_of, is_a


@dataclass(frozen=True)
class Row:
    """One projection of a layer."""

    role: str  # reported, and a name that target_modules may use
    block: str  # the layer's child it lies in
    parent: str  # class-name pattern of the module that owns it
    child: str  # its name there
    form: str = "linear"  # one mode; or one per block of "outputs" or of "inputs"
    branch: str = "text"  # "image": it reads the features that all layers of the stack read
    group: str = ""  # projections of one group read one input and share one operator call


@dataclass(frozen=True)
class Kind:
    """How one kind of stack names its layers and their projections."""

    name: str
    stack: str  # class-name pattern of the module that runs the layers
    layer: str  # class-name pattern of a layer
    rows: tuple[Row, ...]
    self_block: str = ""  # children whose outputs the residuals read
    cross_block: str = ""


_TEXT_OWNER = "BlipTextSelfAttention"

BLIP = (
    Kind(
        "vision",
        stack="BlipEncoder",
        layer="BlipEncoderLayer",
        rows=(
            Row("vision.qkv", "self_attn", "BlipAttention", "qkv", "outputs"),
            Row("vision.projection", "self_attn", "BlipAttention", "projection", "inputs"),
            Row("vision.fc1", "mlp", "BlipMLP", "fc1", "outputs"),
            Row("vision.fc2", "mlp", "BlipMLP", "fc2", "inputs"),
        ),
    ),
    Kind(
        "text",
        stack="BlipTextEncoder",
        layer="BlipTextLayer",
        rows=(
            *(
                Row(f"self.{name}", "attention", _TEXT_OWNER, name, group="self")
                for name in ("query", "key", "value")
            ),
            Row("cross.query", "crossattention", _TEXT_OWNER, "query", group="cross.query"),
            *(
                Row(
                    f"cross.{name}",
                    "crossattention",
                    _TEXT_OWNER,
                    name,
                    branch="image",
                    group="cross.key_value",
                )
                for name in ("key", "value")
            ),
        ),
        self_block="attention",
        cross_block="crossattention",
    ),
)
FAMILIES: dict[str, tuple[Kind, ...]] = {"blip": BLIP}
MLP_BLOCKS = ("mlp",)  # whose modes the layout concerns
MATCHING_HEAD = "itm_head"
EMBEDDINGS = "BlipTextEmbeddings"  # they add to their word embeddings in place


@dataclass
class Site:
    """One projection found in a model."""

    row: Row
    path: str
    parent: nn.Module
    base: nn.Module
    modes: range = range(0)  # its rows of the mode matrix; set by `find`

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

    @property
    def long(self) -> int:
        """The size that is cut into blocks."""
        return self.shape[1 if self.row.form == "outputs" else 0]


@dataclass
class LayerSite:
    """One layer with its projections, in the order of the table's rows."""

    index: int  # among the layers of its kind, through all stacks
    path: str
    layer: nn.Module
    self_block: nn.Module | None
    cross_block: nn.Module | None
    sites: list[Site] = field(default_factory=list)


@dataclass
class Stack:
    """One stack of layers."""

    kind: Kind
    path: str
    module: nn.Module
    layers: list[LayerSite]

    def sites(self) -> list[Site]:
        return [site for layer in self.layers for site in layer.sites]

    @property
    def modes(self) -> slice:
        """The rows of the mode matrix that belong to this stack."""
        modes = [mode for site in self.sites() for mode in site.modes]
        return slice(min(modes), max(modes) + 1) if modes else slice(0, 0)


@dataclass
class Found:
    """What the walk found: the stacks, the width of their blocks, the matching head."""

    model_type: str
    stacks: list[Stack]
    head: nn.Module | None
    embeddings: list[nn.Module]
    width: int = 0

    def sites(self) -> list[Site]:
        return [site for stack in self.stacks for site in stack.sites()]

    def text_layers(self) -> list[LayerSite]:
        return [layer for s in self.stacks if s.kind.name == "text" for layer in s.layers]


def find(model: nn.Module, config: AuroraConfig) -> Found:
    """The projections of `model` that `config` adapts; ValueError if there are none."""
    model_type, root_path, root = family_of(model, FAMILIES)
    stacks: list[Stack] = []
    for kind in FAMILIES[model_type]:
        modules = [(name, m) for name, m in root.named_modules() if is_a(m, kind.stack)]
        if not modules:
            raise ValueError(
                f"model: want a module of class {kind.stack!r} in a {model_type!r} model, got none "
                f"in a {type(model).__name__}"
            )
        first = 0
        for name, module in modules:
            path = ".".join(part for part in (root_path, name) if part)
            stacks.append(Stack(kind, path, module, _layers(kind, path, module, first)))
            first += len(stacks[-1].layers)
    head = getattr(root, MATCHING_HEAD, None)
    embeddings = [m for m in root.modules() if is_a(m, EMBEDDINGS)]
    found = Found(model_type, stacks, head if isinstance(head, nn.Module) else None, embeddings)
    _select(found, config)
    found.width = _width(found.sites())
    _number(found)
    return found


def _layers(kind: Kind, path: str, stack: nn.Module, first: int) -> list[LayerSite]:
    modules = [(n, m) for n, m in stack.named_modules() if is_a(m, kind.layer)]
    return [
        _layer(kind, first + index, f"{path}.{name}", layer)
        for index, (name, layer) in enumerate(modules)
    ]


def _layer(kind: Kind, index: int, path: str, layer: nn.Module) -> LayerSite:
    self_block = getattr(layer, kind.self_block, None) if kind.self_block else None
    cross_block = getattr(layer, kind.cross_block, None) if kind.cross_block else None
    site = LayerSite(index, path, layer, self_block, cross_block)
    for row in kind.rows:
        block = getattr(layer, row.block, None)
        if not isinstance(block, nn.Module):
            continue
        for name, parent in block.named_modules():
            base = getattr(parent, row.child, None)
            if is_a(parent, row.parent) and isinstance(base, nn.Module):
                parts = (path, row.block, name, row.child)
                site.sites.append(Site(row, ".".join(p for p in parts if p), parent, base))
    return site


def _select(found: Found, config: AuroraConfig) -> None:
    """Keeps what `target_modules` names; an empty result or a name without a match raises."""
    sites, wanted = found.sites(), config.target_modules
    roles = sorted({site.row.role for site in sites})
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
        raise ValueError(
            f"model: want projections with roles {roles} (target_modules={wanted!r}), got "
            f"{len(sites)} candidates in {[stack.path for stack in found.stacks]} and none selected"
        )
    chosen = {id(site) for site in kept}
    for stack in found.stacks:
        for layer in stack.layers:
            layer.sites = [site for site in layer.sites if id(site) in chosen]


def _named(site: Site, name: str) -> bool:
    return name in (site.row.role, site.path) or site.path.endswith("." + name)


def _width(sites: list[Site]) -> int:
    """The width of all blocks, which share U and V."""
    widths: dict[int, str] = {}
    for site in sites:
        d_in, d_out = site.shape
        ends = {"linear": (d_in, d_out), "outputs": (d_in,), "inputs": (d_out,)}[site.row.form]
        for width in ends:
            widths.setdefault(width, site.path)
    if len(widths) != 1:
        raise ValueError(
            "model: want one width in the image encoder and the text, which share their factors, "
            f"got {widths}"
        )
    width = next(iter(widths))
    for site in sites:
        if site.long % width:
            raise ValueError(
                f"{site.path}: want sizes that are multiples of the width {width}, which is that "
                f"of a mode's block, got {site.shape[0]} -> {site.shape[1]}"
            )
    return width


def _number(found: Found) -> None:
    """Modes are numbered stack by stack so that what is contracted together is one slice: in text
    layer by layer, in the image encoder form by form and block by block."""
    count = 0
    for stack in found.stacks:
        for site in sorted(stack.sites(), key=_together):
            blocks = site.long // found.width
            site.modes = range(count, count + blocks)
            count += blocks


def _together(site: Site) -> tuple[str, str]:
    row = site.row
    return (row.form, "" if row.form == "linear" else row.block)


def base_signature(found: Found) -> dict[str, Any]:
    """What an adapter needs of its base: its stacks, their layers, the projections' shapes."""
    signature: dict[str, Any] = {}
    for number, stack in enumerate(found.stacks):
        projections: dict[str, dict[str, int]] = {}
        for site in stack.sites():
            d_in, d_out = site.shape
            entry = projections.setdefault(site.row.role, {"count": 0, "in": d_in, "out": d_out})
            entry["count"] += 1
        signature[f"stack {number}"] = {
            "class": class_name(stack.module, stack.kind.stack),
            "layers": len(stack.layers),
            "projections": projections,
        }
    return signature
