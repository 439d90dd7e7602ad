"""Finding what a method adapts in a model: the family's stacks, their layers, their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.linears import walk
from petal_kernels.hf.models import FAMILIES, Block, Linear, Stack
from petal_kernels.hf.roles import row_of, takes_cache
from petal_kernels.hf.walk import (
    class_name,
    is_norm,
    joined,
    named_but_left,
    select_named,
)
from petal_kernels.nn.routed_lora import linear_features

# What a method adapts in the layers of a stack: roles and rows, in the order of its modes; None
# where the stack is none of its own.
Rows = Callable[[Stack], Sequence[tuple[str, Linear | Block]] | None]


@dataclass
class Place:
    """One place that gets an adapter: on a linear or after a block."""

    role: str  # reported, and a name that target_modules may use
    row: Linear | Block
    path: str
    module: nn.Module  # the linear, or the module whose output is adapted
    layer: Layer

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) features of the linear."""
        try:
            return linear_features(self.module)
        except ValueError:
            raise ValueError(
                f"{self.path}: want a linear layer with in_features and out_features, got a "
                f"{type(self.module).__name__}"
            ) from None


@dataclass
class Layer:
    """One layer and its places, in the order of the method's rows."""

    index: int  # among the layers of its kind, through all stacks of the model
    path: str
    module: nn.Module
    row: Stack
    places: list[Place] = field(default_factory=list)

    def child(self, name: str) -> nn.Module:
        """The module at that path in the layer; ValueError if there is none."""
        try:
            return self.module.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{self.path}: want a child {name!r} in a {type(self.module).__name__}, got "
                f"{[child for child, _ in self.module.named_children()]}"
            ) from None


@dataclass
class Site:
    """One stack: the module that runs the layers."""

    row: Stack
    path: str
    module: nn.Module
    layers: list[Layer] = field(default_factory=list)

    @property
    def places(self) -> list[Place]:
        return [place for layer in self.layers for place in layer.places]


@dataclass
class Found:
    """What was found in a model."""

    model_type: str
    path: str  # of the family's own root in the model
    root: nn.Module
    stacks: list[Site]
    notes: list[str] = field(default_factory=list)  # what is left as it is: said at once
    outside: list[str] = field(default_factory=list)  # what was never asked for: the report says it

    @property
    def layers(self) -> list[Layer]:
        return [layer for stack in self.stacks for layer in stack.layers]

    @property
    def places(self) -> list[Place]:
        return [place for stack in self.stacks for place in stack.places]

    def at(self, kind: type) -> list[Place]:
        """The places after blocks (Block) or on linears (Linear)."""
        return [place for place in self.places if isinstance(place.row, kind)]

    def width(self) -> int:
        """Of the adapted layers' hidden states: their outermost norms know it. Inside an attention
        a norm may be as wide as a head."""
        layer = self.places[0].layer
        norms = [(n, m) for n, m in layer.module.named_modules() if is_norm(m)]
        for _, module in sorted(norms, key=lambda named: named[0].count(".")):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):
                return int(weight.shape[0])
        raise ValueError(
            f"{layer.path}: want a norm in the layer, whose width is that of the hidden states"
        )


def find(
    model: nn.Module,
    config: AdapterConfig,
    rows: Rows,
    needs: Sequence[str] = (),
    structural: bool = False,
) -> Found:
    """The places of `model` that `config` adapts; ValueError if there are none. `needs` names the
    stacks that the method cannot do without; `structural` where it adapts layers that no row names
    but that tell what they are made of."""
    families = {}
    for name, every in FAMILIES.items():
        own = [stack for stack in every if rows(stack) is not None]
        if own and set(needs) <= {stack.name for stack in own}:
            families[name] = own
    found = _family(model, families, structural)
    for name in needs:
        row = next(stack for stack in families[found.model_type] if stack.name == name)
        _check_stack(model, found, row)
    for layer in found.layers:
        layer.places = _places(layer, rows(layer.row) or ())
    stacks = families.get(found.model_type) or [layer.row for layer in found.layers]
    roles = [role for stack in stacks for role, _ in rows(stack) or ()]
    classes = sorted({type(layer.module).__name__ for layer in found.layers})
    where = (
        f"{len(found.layers)} layers {classes} of a {found.model_type!r} model, a "
        f"{type(model).__name__},"
    )
    candidates = found.places
    chosen = {id(place) for place in select_named(candidates, config, roles, where)}
    for layer in found.layers:
        layer.places = [place for place in layer.places if id(place) in chosen]
    found.notes += _left(model, config, found, candidates, families)
    return found


def _family(model: nn.Module, families: dict[str, list[Stack]], structural: bool) -> Found:
    """The stacks of the first module whose config names one of `families`, or, where these will do,
    that holds decoder layers which tell what they are made of; encoder layers where none does."""
    seen, refused, half = [], dict[str, str](), False
    encodes: Found | None = None  # the first that does, where nothing beside it decodes
    inside: set[int] = set()
    for path, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if model_type is None or id(module) in inside:
            continue
        if model_type in families:
            stacks = families[model_type]
            return Found(str(model_type), path, module, _sites(module, path, stacks))
        if structural and model_type not in FAMILIES:
            told = _Told(module, path)
            half = half or told.is_half
            if told.sites and (told.decodes or not half):
                found = Found(str(model_type), path, module, told.sites, told.notes())
                if told.decodes:
                    return found
                encodes = encodes or found
                inside |= {id(child) for child in module.modules()}
            refused.update((type(m).__name__, why) for _, m, why in told.refused)
        if model_type not in seen:
            seen.append(model_type)
    if encodes is not None:
        return encodes
    layers = sorted(
        {type(each).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) for each in m}
    )
    whys = "".join(f"; {name}: {why}" for name, why in refused.items())
    raise ValueError(
        f"model: want a module whose config.model_type is one of {sorted(families)}"
        f"{' or that has layers of one attention' if structural else ''}, "
        f"got a {type(model).__name__} with model types {seen} and layers {layers[:8]}{whys}"
        f"{'' if structural else _NO_TABLE}"
    )


_NO_TABLE = "; LoraConfig, RoutingConfig and ExpertConfig need no table of models"


class _Told:
    """Layers under `root` that tell what they are made of, of a model that sees its language's:
    those of its decoder, or where nothing decodes those of its encoder."""

    def __init__(self, root: nn.Module, path: str) -> None:
        parts = {id(seen.module): seen.part for seen in walk(root)}
        layers: list[tuple[str, nn.Module, Stack]] = []
        self.refused: list[tuple[str, nn.Module, str]] = []  # and why
        held: dict[int, tuple[str, nn.Module, nn.Module]] = {}  # path and module of the holder
        blank: list[tuple[str, nn.Module]] = []
        for name, module in root.named_modules(prefix=path):
            for child in module.children():
                if isinstance(child, nn.ModuleList):
                    held.update({id(layer): (name, module, child) for layer in child})
            if id(module) not in held or parts.get(id(module)) != "language":
                continue
            row = row_of(module)
            if isinstance(row, Stack):
                layers.append((name, module, row))
            elif row:
                self.refused.append((name, module, row))
            else:
                blank.append((name, module))
        decodes = self.decodes = any(row.name == "decoder" for *_, row in layers)
        # An encoder, without the decoder that reads it.
        self.is_half = not decodes and any(takes_cache(module) for _, module, _ in self.refused)
        sites: dict[int, Site] = {}
        self.beside: list[tuple[str, nn.Module]] = []  # encoders of what the decoder reads
        for name, module, row in layers:
            parent_path, parent, _ = held[id(module)]
            if decodes and row.name != "decoder":
                self.beside.append((parent_path, parent))
                continue
            site = sites.setdefault(id(parent), Site(row, parent_path, parent))
            count = sum(len(each.layers) for each in sites.values())
            site.layers.append(Layer(count, name, module, row))
        lists = {id(held[id(layer.module)][2]) for each in sites.values() for layer in each.layers}
        self.refused += [
            (name, module, "it has no attention")
            for name, module in blank
            if id(held[id(module)][2]) in lists
        ]
        self.sites = list(sites.values())

    def notes(self) -> list[str]:
        """What is left as it is, in words."""
        paths = dict.fromkeys((path, type(module).__name__) for path, module in self.beside)
        notes = [f"left as it is: {path}, a {name} beside the decoder" for path, name in paths]
        if self.refused:
            path, module, why = self.refused[0]
            notes.append(
                f"left as they are: {len(self.refused)} layers, {path} first, a "
                f"{type(module).__name__}: {why}"
            )
        return notes


def _sites(root: nn.Module, path: str, stacks: Sequence[Stack]) -> list[Site]:
    """The stacks under `root` with their layers, in the order of the model."""
    sites: dict[int, Site] = {}
    counts: dict[bool, int] = {}
    parents: dict[int, tuple[str, nn.Module]] = {}
    for name, module in root.named_modules(prefix=path):
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                parents.update({id(layer): (name, module) for layer in child})
        if id(module) not in parents:
            continue
        row = next((stack for stack in stacks if stack.has(module)), None)
        if row is not None:
            parent_path, parent = parents[id(module)]
            site = sites.setdefault(id(parent), Site(row, parent_path, parent))
            image = row.name == "vision"
            site.layers.append(Layer(counts.get(image, 0), name, module, row))
            counts[image] = counts.get(image, 0) + 1
    return list(sites.values())


def _check_stack(model: nn.Module, found: Found, row: Stack) -> None:
    if not any(site.row.name == row.name for site in found.stacks):
        raise ValueError(
            f"model: want a module of class {row.runs!r} in a {found.model_type!r} model, got none "
            f"in a {type(model).__name__}"
        )


def _places(layer: Layer, rows: Sequence[tuple[str, Linear | Block]]) -> list[Place]:
    places = []
    for role, row in rows:
        path = row.path if isinstance(row, Linear) else row.output
        if row.optional and not hasattr(layer.module, path.partition(".")[0]):
            continue
        module = layer.child(path)
        places.append(Place(role, row, joined(layer.path, path), module, layer))
    return places


def _left(
    model: nn.Module,
    config: AdapterConfig,
    found: Found,
    every: Sequence[Place],
    families: dict[str, list[Stack]],
) -> list[str]:
    """What is left as it is though a user may think otherwise: one line each."""
    notes = []
    named = named_but_left(model, config, every, found.path)
    if named:
        notes.append(
            f"named by target_modules and not adapted ({config.method!r} does not adapt them): "
            f"{len(named)} linears, {named[0]} first"
        )
    inside = {id(module) for module in found.root.modules()}
    for path, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if model_type in families and id(module) not in inside:
            notes.append(f"left as it is: {path}, a {type(module).__name__} beside {found.path}")
            inside |= {id(child) for child in module.modules()}
    for layer in found.layers:
        crosses = [n for n, _ in layer.module.named_children() if "cross" in n.lower()]
        if crosses and not layer.row.cross_block and layer.places:
            notes.append(f"left as it is: the cross-attention of {layer.path} and its like")
            break
    return notes


def counted(places: Sequence[Place]) -> dict[str, dict[str, int]]:
    """How many places of a role there are, and the linears' sizes: a part of a signature."""
    roles: dict[str, dict[str, int]] = {}
    for place in places:
        entry = roles.setdefault(place.role, {"count": 0})
        entry["count"] += 1
        if isinstance(place.row, Linear):
            entry["in"], entry["out"] = place.shape
    return roles


def own_name(module: nn.Module, pattern: str) -> str:
    """The class of a stack or a layer as its family calls it; without a pattern the most basic one
    that has a forward of its own."""
    if pattern:
        return class_name(module, pattern)
    basic = (cls for cls in reversed(type(module).__mro__) if cls is not nn.Module)
    return next(cls.__name__ for cls in basic if "forward" in vars(cls))
