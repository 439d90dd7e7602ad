"""One table of models for all methods: what the layers of a family are made of.

A `Linear` is a projection of a layer, a `Block` a place after one of its blocks; paths are relative
to the layer, as in its state_dict. Every method chooses among these rows and names its roles by
them. Layers of one attention and a feed-forward tell their row themselves (`roles.py`), whatever
the model; what their structure cannot tell is a row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from petal_kernels.hf.tokens import Part
from petal_kernels.hf.walk import is_a

Form = Literal["whole", "outputs", "inputs"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What both kinds of rows may say of themselves."""

    optional: bool = False  # some layers of the stack lack it
    part: Part = "all"  # of the stack's tokens it sees: those in front, those behind


@dataclass(frozen=True)
class Linear(Row):
    """A linear: of which attention ("" of none), what for, where; fused ones in `parts`, so many
    equal ones or their widths, of which low-rank updates adapt `targets`; `form` cuts a wide one
    into square blocks (Aurora)."""

    attention: Literal["self", "cross", ""]
    name: str
    path: str
    parts: int | tuple[int, ...] = 1
    targets: tuple[int, ...] = (0,)
    encoded: bool = False  # it reads the encoder's output, or an image's features
    form: Form = "whole"


@dataclass(frozen=True)
class Block(Row):
    """A place after a block: the module whose output H is adapted, and the one whose input is X."""

    name: str
    output: str
    reads: str
    raw: str = ""  # pre-LN families: whose input is the un-normalised residual stream
    norm: str = ""  # post-LN families: the norm of dropout(output) + input that follows
    linear: str = ""  # the linear that ends the block


@dataclass(frozen=True)
class Stack:
    """The layers of one stack of a family."""

    name: str
    layer: str  # class-name pattern of a layer; "" of a row that a layer has told
    linears: tuple[Linear, ...]
    blocks: tuple[Block, ...] = ()
    runs: str = ""  # class-name pattern of the module that runs the layers
    where: tuple[str, Any] | None = None  # an attribute of the layer that tells stacks apart
    self_block: str = ""  # children whose outputs are the self and the cross attention's
    cross_block: str = ""

    def has(self, module: nn.Module) -> bool:
        """Whether `module` is one of its layers."""
        fits = self.where is None or getattr(module, self.where[0], None) == self.where[1]
        return fits and is_a(module, self.layer)


def attention(
    kind: Literal["self", "cross"], block: str, names: tuple[str, ...], **row: Any
) -> Iterator[Linear]:
    """The query, key and value projections of one attention; `names` are theirs in the block."""
    for role, name in zip(("query", "key", "value"), names, strict=True):
        encoded = kind == "cross" and role != "query"
        yield Linear(kind, role, f"{block}.{name}", encoded=encoded, **row)


_QKV = ("query", "key", "value")
_PROJ = ("q_proj", "k_proj", "v_proj")


def _bert(layer: str) -> tuple[Stack, ...]:
    blocks = (
        Block("attention", "attention.output.dropout", "attention"),
        Block("ffn", "output.dropout", "intermediate"),
    )
    return (Stack("encoder", layer, tuple(attention("self", "attention.self", _QKV)), blocks),)


def _first(linears: Iterator[Linear]) -> Iterator[Linear]:
    """Of cross-attention, whose queries see the tokens in front."""
    for row in linears:
        yield row if row.encoded else replace(row, part="first")


# [queries; instruction]: cross-attention, in some layers, and a feed-forward of the queries;
# another feed-forward of the instruction, in models that take one.
QFORMER = Stack(
    "qformer",
    "*QFormerLayer",
    (
        *attention("self", "attention.attention", _QKV),
        *_first(attention("cross", "crossattention.attention", _QKV, optional=True)),
    ),
    (
        Block("attention", "attention.output.dropout", "attention"),
        Block(
            "cross", "crossattention.output.dropout", "crossattention", optional=True, part="first"
        ),
        Block("ffn_query", "output_query.dropout", "intermediate_query", part="first"),
        Block("ffn", "output.dropout", "intermediate", optional=True, part="last"),
    ),
    runs="*QFormerEncoder",
    self_block="attention",
    cross_block="crossattention",
)

BLIP_VISION = Stack(
    "vision",
    "BlipEncoderLayer",
    (
        Linear("self", "qkv", "self_attn.qkv", form="outputs"),
        Linear("self", "projection", "self_attn.projection", form="inputs"),
        Linear("", "fc1", "mlp.fc1", form="outputs"),
        Linear("", "fc2", "mlp.fc2", form="inputs"),
    ),
    runs="BlipEncoder",
)
# A text encoder, a decoder, or both; cross-attention where images or answers need it.
BLIP_TEXT = Stack(
    "text",
    "BlipTextLayer",
    (
        *attention("self", "attention.self", _QKV),
        *attention("cross", "crossattention.self", _QKV, optional=True),
    ),
    (
        Block("attention", "attention.output.dropout", "attention"),
        Block("cross", "crossattention.output.dropout", "crossattention", optional=True),
        Block("ffn", "output.dropout", "intermediate"),
    ),
    runs="BlipTextEncoder",
    self_block="attention",
    cross_block="crossattention",
)


def _bart_block(name: str, path: str, norm: str) -> Block:
    return Block(name, path, path, linear=f"{path}.out_proj", norm=norm)


BART = (
    Stack(
        "encoder",
        "BartEncoderLayer",
        tuple(attention("self", "self_attn", _PROJ)),
        (
            _bart_block("attention", "self_attn", "self_attn_layer_norm"),
            Block("ffn", "fc2", "fc1", linear="fc2", norm="final_layer_norm"),
        ),
    ),
    Stack(
        "decoder",
        "BartDecoderLayer",
        (
            *attention("self", "self_attn", _PROJ),
            *attention("cross", "encoder_attn", _PROJ),
        ),
        (
            _bart_block("attention", "self_attn", "self_attn_layer_norm"),
            _bart_block("cross", "encoder_attn", "encoder_attn_layer_norm"),
            Block("ffn", "fc2", "fc1", linear="fc2", norm="final_layer_norm"),
        ),
    ),
)


def _t5(name: str, numbers: dict[str, int], *, decodes: bool) -> Stack:
    """`numbers`: of the layer's children, whose input is the residual stream."""
    children = {"attention": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}
    ends = {"attention": "o", "cross": "o", "ffn": "wo"}
    paths = {block: f"layer.{number}.{children[block]}" for block, number in numbers.items()}
    linears = tuple(attention("self", paths["attention"], ("q", "k", "v")))
    if "cross" in paths:
        linears += tuple(attention("cross", paths["cross"], ("q", "k", "v")))
    blocks = (
        Block(b, path, path, raw=path.rpartition(".")[0], linear=f"{path}.{ends[b]}")
        for b, path in paths.items()
    )
    return Stack(name, "T5Block", linears, tuple(blocks), where=("is_decoder", decodes))


T5 = (
    _t5("encoder", {"attention": 0, "ffn": 1}, decodes=False),
    _t5("decoder", {"attention": 0, "cross": 1, "ffn": 2}, decodes=True),
)
GPT2 = Stack(
    "decoder",
    "GPT2Block",
    (Linear("self", "query_value", "attn.c_attn", 3, (0, 2)),),
    (Block("attention", "attn", "attn"), Block("ffn", "mlp", "mlp")),
)

FAMILIES: dict[str, tuple[Stack, ...]] = {
    "bart": BART,
    "t5": T5,
    "gpt2": (GPT2,),
    "roberta": _bert("RobertaLayer"),
    "bert": _bert("BertLayer"),
    **dict.fromkeys(
        ("instructblip", "instructblip_qformer", "blip-2", "blip_2", "blip_2_qformer"), (QFORMER,)
    ),
    "blip": (BLIP_VISION, BLIP_TEXT),
    "blip_text_model": (BLIP_TEXT,),
}
