"""Where adapters are inserted, by model family: a table, and the walk that finds the places.

A `Point` is a place after a block of a layer: `output` is the child whose output H is adapted,
`reads` the child whose input is X, the block's input. Paths are relative to the layer, as in its
state_dict. A `Target` is a linear that gets a low-rank update or a value adapter. A new family is a
row of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from petal_kernels.hf.config import (
    AdapterConfig,
    ExpertConfig,
    RoutingConfig,
    VLAdapterConfig,
    VLPetConfig,
)
from petal_kernels.hf.tokens import Part
from petal_kernels.hf.walk import class_name, family_of, is_a, select_named
from petal_kernels.nn.routed_lora import linear_features


@dataclass(frozen=True, kw_only=True)
class Place:
    """What both kinds of places may say of themselves."""

    optional: bool = False  # some layers of the stack lack it
    part: Part = "all"  # of the stack's tokens it sees: those in front, those behind


@dataclass(frozen=True)
class Point(Place):
    """A place after a block: role, whose output is adapted, whose input the gate reads."""

    role: str
    output: str
    reads: str
    raw: str = ""  # pre-LN families: whose input is the un-normalised residual stream
    norm: str = ""  # post-LN families: the norm of dropout(output) + input that follows


@dataclass(frozen=True)
class Target(Place):
    """A linear: role, path in the layer, equal parts of its outputs, the parts that are adapted."""

    role: str
    path: str
    parts: int = 1
    targets: tuple[int, ...] = (0,)
    encoded: bool = False  # it reads the encoder's output, or an image's features


@dataclass(frozen=True)
class Stack:
    """The layers of one stack of a family."""

    name: str  # "encoder", "decoder": the first word of the roles
    layer: str  # class-name pattern of a layer
    points: tuple[Point, ...]
    linears: tuple[Target, ...]
    value: Target | None = None  # the values of cross-attention
    where: tuple[str, Any] | None = None  # an attribute of the layer that tells stacks apart


def _decoder_only(layer: str) -> tuple[Stack, ...]:
    points = (
        Point("decoder.attention", "self_attn", "self_attn"),
        Point("decoder.ffn", "mlp", "mlp"),
    )
    linears = tuple(
        Target(f"decoder.{name}", f"self_attn.{child}")
        for name, child in (("query", "q_proj"), ("value", "v_proj"))
    )
    return (Stack("decoder", layer, points, linears),)


def _bert_like(layer: str) -> tuple[Stack, ...]:
    points = (
        Point("encoder.attention", "attention.output.dropout", "attention"),
        Point("encoder.ffn", "output.dropout", "intermediate"),
    )
    linears = tuple(
        Target(f"encoder.{name}", f"attention.self.{name}") for name in ("query", "value")
    )
    return (Stack("encoder", layer, points, linears),)


_ROLES = ("query", "value", "cross.query", "cross.value")


def _linears(name: str, paths: tuple[str, ...]) -> tuple[Target, ...]:
    return tuple(
        Target(f"{name}.{role}", path, encoded=role == "cross.value")
        for role, path in zip(_ROLES, paths, strict=False)
    )


def _qformer() -> tuple[Stack, ...]:
    """[queries; instruction]: cross-attention, in some layers, and a feed-forward of the queries;
    another feed-forward of the instruction, in models that take one."""
    points = (
        Point("qformer.attention", "attention.output.dropout", "attention"),
        Point(
            "qformer.cross",
            "crossattention.output.dropout",
            "crossattention",
            optional=True,
            part="first",
        ),
        Point("qformer.ffn_query", "output_query.dropout", "intermediate_query", part="first"),
        Point("qformer.ffn", "output.dropout", "intermediate", optional=True, part="last"),
    )
    query, value, cross_query, cross_value = _linears(
        "qformer",
        tuple(
            f"{block}.attention.{name}"
            for block in ("attention", "crossattention")
            for name in ("query", "value")
        ),
    )
    linears = (
        query,
        value,
        replace(cross_query, optional=True, part="first"),
        replace(cross_value, optional=True),
    )
    return (Stack("qformer", "*QFormerLayer", points, linears),)


def _blip() -> tuple[Stack, ...]:
    """A text encoder, a decoder, or both; cross-attention where images or answers need it."""
    points = (
        Point("text.attention", "attention.output.dropout", "attention"),
        Point("text.cross", "crossattention.output.dropout", "crossattention", optional=True),
        Point("text.ffn", "output.dropout", "intermediate"),
    )
    paths = tuple(
        f"{block}.self.{name}"
        for block in ("attention", "crossattention")
        for name in ("query", "value")
    )
    linears = tuple(
        replace(target, optional=".cross." in target.role) for target in _linears("text", paths)
    )
    return (Stack("text", "BlipTextLayer", points, linears),)


_BART = (
    Stack(
        "encoder",
        "BartEncoderLayer",
        (
            Point("encoder.attention", "self_attn", "self_attn", norm="self_attn_layer_norm"),
            Point("encoder.ffn", "fc2", "fc1", norm="final_layer_norm"),
        ),
        _linears("encoder", ("self_attn.q_proj", "self_attn.v_proj")),
    ),
    Stack(
        "decoder",
        "BartDecoderLayer",
        (
            Point("decoder.attention", "self_attn", "self_attn", norm="self_attn_layer_norm"),
            Point("decoder.cross", "encoder_attn", "encoder_attn", norm="encoder_attn_layer_norm"),
            Point("decoder.ffn", "fc2", "fc1", norm="final_layer_norm"),
        ),
        _linears(
            "decoder",
            (
                "self_attn.q_proj",
                "self_attn.v_proj",
                "encoder_attn.q_proj",
                "encoder_attn.v_proj",
            ),
        ),
        Target("decoder.cross.value", "encoder_attn.v_proj"),
    ),
)

_T5 = (
    Stack(
        "encoder",
        "T5Block",
        (
            Point("encoder.attention", "layer.0.SelfAttention", "layer.0.SelfAttention", "layer.0"),
            Point("encoder.ffn", "layer.1.DenseReluDense", "layer.1.DenseReluDense", "layer.1"),
        ),
        _linears("encoder", ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v")),
        where=("is_decoder", False),
    ),
    Stack(
        "decoder",
        "T5Block",
        (
            Point("decoder.attention", "layer.0.SelfAttention", "layer.0.SelfAttention", "layer.0"),
            Point("decoder.cross", "layer.1.EncDecAttention", "layer.1.EncDecAttention", "layer.1"),
            Point("decoder.ffn", "layer.2.DenseReluDense", "layer.2.DenseReluDense", "layer.2"),
        ),
        _linears(
            "decoder",
            (
                "layer.0.SelfAttention.q",
                "layer.0.SelfAttention.v",
                "layer.1.EncDecAttention.q",
                "layer.1.EncDecAttention.v",
            ),
        ),
        Target("decoder.cross.value", "layer.1.EncDecAttention.v"),
        where=("is_decoder", True),
    ),
)

_GPT2 = (
    Stack(
        "decoder",
        "GPT2Block",
        (Point("decoder.attention", "attn", "attn"), Point("decoder.ffn", "mlp", "mlp")),
        (Target("decoder.query_value", "attn.c_attn", 3, (0, 2)),),
    ),
)

FAMILIES: dict[str, tuple[Stack, ...]] = {
    "bart": _BART,
    "t5": _T5,
    "gpt2": _GPT2,
    "roberta": _bert_like("RobertaLayer"),
    "bert": _bert_like("BertLayer"),
    "llama": _decoder_only("LlamaDecoderLayer"),
    "mistral": _decoder_only("MistralDecoderLayer"),
    "gemma2": _decoder_only("Gemma2DecoderLayer"),
    "llava": _decoder_only("LlamaDecoderLayer"),
    "qwen2_5_vl": _decoder_only("Qwen2_5_VLDecoderLayer"),
    "paligemma": _decoder_only("GemmaDecoderLayer"),
    "smolvlm": _decoder_only("LlamaDecoderLayer"),
    "idefics3": _decoder_only("LlamaDecoderLayer"),
    **dict.fromkeys(
        ("instructblip", "instructblip_qformer", "blip-2", "blip_2", "blip_2_qformer"), _qformer()
    ),
    **dict.fromkeys(("blip", "blip_text_model"), _blip()),
}


@dataclass
class Insertion:
    """One adapter's place: after a block (`point`) or on a linear (`target`)."""

    path: str
    place: Point | Target
    layer: int  # index in `Found.layers`
    module: nn.Module  # whose output is adapted, or the linear
    reads: nn.Module | None = None

    @property
    def role(self) -> str:
        """Reported, and a name that target_modules may use."""
        return self.place.role


@dataclass
class Found:
    """What the walk found."""

    model_type: str
    layers: list[tuple[str, nn.Module, Stack]]
    stacks: dict[str, tuple[str, nn.Module]] = field(default_factory=dict)  # path -> name, module
    insertions: list[Insertion] = field(default_factory=list)

    def at(self, kind: type) -> list[Insertion]:
        """The insertions after blocks (Point) or on linears (Target)."""
        return [i for i in self.insertions if isinstance(i.place, kind)]


def find(model: nn.Module, config: AdapterConfig) -> Found:
    """The places of `model` that `config` adapts; ValueError if there are none."""
    model_type, root_path, root = family_of(model, FAMILIES)
    found = Found(model_type, [])
    parents: dict[int, tuple[str, nn.Module]] = {}
    for path, module in root.named_modules(prefix=root_path):
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                parents.update({id(layer): (path, module) for layer in child})
        for stack in FAMILIES[model_type]:
            fits = stack.where is None or getattr(module, stack.where[0], None) == stack.where[1]
            if is_a(module, stack.layer) and fits and id(module) in parents:
                found.layers.append((path, module, stack))
                parent_path, parent = parents[id(module)]
                found.stacks.setdefault(parent_path, (stack.name, parent))
    for index, (path, layer, stack) in enumerate(found.layers):
        for place in _places(stack, config):
            if not (place.optional and _lacks(layer, place)):
                found.insertions.append(_insertion(index, path, layer, place, config))
    roles = (place.role for stack in FAMILIES[model_type] for place in _places(stack, config))
    where = f"{len(found.layers)} layers of a {model_type!r} model, a {type(model).__name__},"
    found.insertions = select_named(found.insertions, config, roles, where)
    if isinstance(config, RoutingConfig) and config.function != "none":
        found.insertions = _routable(found, config)
    return found


def _routable(found: Found, config: RoutingConfig) -> list[Insertion]:
    """The places whose input is as wide as the features that a route joins with it: not those that
    read an image's features themselves, of another width."""
    width, kept = width_of(found), []
    for insertion in found.insertions:
        point = isinstance(insertion.place, Point)
        if point or linear_features(insertion.module)[0] == width:
            kept.append(insertion)
        elif config.target_modules is not None:
            raise ValueError(
                f"target_modules: want places that read the layers' {width} wide hidden states "
                f"for the route {config.function!r}, got {insertion.path}, which reads "
                f"{linear_features(insertion.module)[0]}"
            )
    return kept


def width_of(found: Found) -> int:
    """Of the adapted layers' hidden states: their norms know it."""
    for module in found.layers[found.insertions[0].layer][1].modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and isinstance(weight, Tensor):
            return int(weight.shape[0])
    raise ValueError(
        f"{found.layers[0][0]}: want a norm in the layer, whose width is that of the hidden states"
    )


def _places(stack: Stack, config: AdapterConfig) -> list[Point | Target]:
    """What a method adapts in the layers of one stack."""
    if isinstance(config, VLPetConfig):
        if stack.name == "encoder":
            return list(stack.points)
        return [stack.value] if stack.value is not None and config.value_r else []
    if isinstance(config, VLAdapterConfig):
        return list(stack.points)
    assert isinstance(config, (RoutingConfig, ExpertConfig))
    return list(stack.linears if config.kind == "lora" else stack.points)


def _child(layer: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{path}: want a child {name!r} in a {type(layer).__name__}, got "
            f"{[child for child, _ in layer.named_children()]}"
        ) from None


def _lacks(layer: nn.Module, place: Point | Target) -> bool:
    path = place.output if isinstance(place, Point) else place.path
    return not hasattr(layer, path.partition(".")[0])


def _insertion(
    index: int, path: str, layer: nn.Module, place: Point | Target, config: AdapterConfig
) -> Insertion:
    if isinstance(place, Target):
        return Insertion(f"{path}.{place.path}", place, index, _child(layer, path, place.path))
    chunk: Any = getattr(layer, "chunk_size_feed_forward", None)
    if place.part != "all" and chunk:
        raise ValueError(
            f"{path}: want chunk_size_feed_forward = 0, since {place.role!r} must see its tokens "
            f"at once, got {chunk}"
        )
    reads = place.raw if config.variant == "release" and place.raw else place.reads
    return Insertion(
        f"{path}.{place.output}",
        place,
        index,
        _child(layer, path, place.output),
        _child(layer, path, reads),
    )


def base_signature(found: Found) -> dict[str, Any]:
    """What an adapter needs of its base: layers by class, the places and the linears' shapes."""
    layers: dict[str, int] = {}
    for _, layer, stack in found.layers:
        name = class_name(layer, stack.layer)
        layers[name] = layers.get(name, 0) + 1
    places: dict[str, dict[str, int]] = {}
    for insertion in found.insertions:
        entry = places.setdefault(insertion.role, {"count": 0})
        entry["count"] += 1
        if isinstance(insertion.place, Target):
            entry["in"], entry["out"] = linear_features(insertion.module)
    return {"family": found.model_type, "layers": layers, "places": places}
