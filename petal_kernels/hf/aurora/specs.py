"""Which modules of which model Aurora adapts: a table, and the walk that finds them by role.

A family is a tuple of kinds of stacks: the image encoder and the text stacks (an encoder, a
decoder, or both). All of them share one U and one V, so every adapted projection is made of square
blocks of one width: a fused or wide projection counts one mode per block of its outputs or inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from petal_kernels.hf import walk
from petal_kernels.hf.config import AuroraConfig
from petal_kernels.hf.walk import class_name, family_of, is_a, owners, select_named, shapes_by_role


@dataclass(frozen=True)
class Row(walk.Row):
    """One projection of a layer."""

    form: str = "linear"  # one mode; or one per block of "outputs" or of "inputs"


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
            Row("vision.qkv", "self_attn", "BlipAttention", "qkv", form="outputs"),
            Row("vision.projection", "self_attn", "BlipAttention", "projection", form="inputs"),
            Row("vision.fc1", "mlp", "BlipMLP", "fc1", form="outputs"),
            Row("vision.fc2", "mlp", "BlipMLP", "fc2", form="inputs"),
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


@dataclass
class Site(walk.Projection):
    """One projection found in a model, and its modes."""

    row: Row
    modes: range = range(0)  # its rows of the mode matrix; set by `find`

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
    found = Found(model_type, stacks, head if isinstance(head, nn.Module) else None)
    roles = (row.role for kind in FAMILIES[model_type] for row in kind.rows)
    kept = select_named(found.sites(), config, roles, f"{[stack.path for stack in stacks]}")
    chosen = {id(site) for site in kept}
    for layer in (layer for stack in stacks for layer in stack.layers):
        layer.sites = [site for site in layer.sites if id(site) in chosen]
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
        site.sites += [Site(row, *found) for found in owners(layer, path, row)]
    return site


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
        signature[f"stack {number}"] = {
            "class": class_name(stack.module, stack.kind.stack),
            "layers": len(stack.layers),
            "projections": shapes_by_role(stack.sites()),
        }
    return signature
