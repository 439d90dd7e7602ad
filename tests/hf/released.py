"""Checkpoints as the methods' authors name and lay them out, with any values, for tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny, tiny_blip, tiny_text

F32 = torch.float32
R = 4
Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, out: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def petal() -> Shapes:
    shapes: Shapes = {}
    for end, width in (("", 32), ("_Image", 40)):
        shapes |= {f"CP_U{end}.weight": (R, width), f"CP_V{end}.weight": (32, R)}
        shapes[f"CP_C{end}"] = (R, R, R)
    for number in range(4):
        layer = f"Qformer.bert.encoder.layer.{number}"
        blocks = ["attention", "crossattention"] if number % 2 == 0 else ["attention"]
        shapes |= {f"{layer}.{b}.self.{n}_CP": (R, 1) for b in blocks for n in "qkv"}
        for name in ("scaleself", "shiftself", "scalecross", "shiftcross"):
            shapes[f"{layer}.CP_{name}"] = (32,)
    for number in range(3):
        shapes |= _linear(f"Qformer.bert.ExpertA.{number}", 2, 32)
        shapes |= _linear(f"Qformer.bert.ExpertB.{number}", 32, 2)
    return shapes | {
        "Qformer.bert.embeddings.position_ids": (1, 8),  # a buffer of the base
        "MIWrapper.mi.weight": (3, 3),
    }


def _text_modes(stack: str) -> Shapes:
    shapes: Shapes = {}
    for number in range(2):
        layer = f"{stack}.encoder.layer.{number}"
        for block in ("attention", "crossattention"):
            shapes |= {f"{layer}.{block}.self.{name}_CP": (R, 1) for name in "qkv"}
        for name in ("scaleself", "shiftself", "scalecross", "shiftcross"):
            shapes[f"{layer}.CP_{name}"] = (16,)
    return shapes


def _aurora(*stacks: str) -> Shapes:
    shapes: Shapes = {"CP_U.weight": (R, 16), "CP_V.weight": (16, R), "CP_C": (R, R, R)}
    for number in range(2):
        block = f"visual_encoder.blocks.{number}"
        shapes |= {f"{block}.attn.CP_attention": (R, 4), f"{block}.mlp.mlp_CP": (R, 8)}
        shapes |= {f"visual_encoder_m.blocks.{number}.attn.CP_attention": (R, 4)}
        shapes |= _linear(f"{block}.attn.qkv", 48, 16)
    for stack in stacks:
        shapes |= _text_modes(stack)
    return shapes | {"image_queue": (8, 3), "temp": (1,)}


def aurora_retrieval() -> Shapes:
    heads = _linear("vision_proj", 8, 16) | _linear("itm_head", 2, 16)
    return _aurora("text_encoder", "text_encoder_m") | heads


def aurora_vqa() -> Shapes:
    return _aurora("text_encoder", "text_decoder.bert")


GATES: dict[str, Callable[[str], Shapes]] = {
    "large": lambda n: _linear(f"{n}_large_x_down", 6, 32) | _linear(f"{n}_large_x_up", 32, 6),
    "middleX": lambda n: _linear(f"{n}_middle_xy_add", 1, 32),
    "middleY": lambda n: {f"{n}_middle_ia3_add": (32,)},
    "small": lambda n: _linear(f"{n}_small_xy_cat", 1, 64),
}


def _controller(name: str, r: int, tasks: tuple[str, ...] = ("vqa", "gqa")) -> Shapes:
    """One adapter that the tasks share: the same tensor once for each."""
    shapes: Shapes = {}
    for task in tasks:
        shapes |= _linear(f"{name}.adapters.{task}.down_sampler", r, 32)
        shapes |= _linear(f"{name}.adapters.{task}.up_sampler", 32, r)
    return shapes


def vlpet(gate: str, family: str) -> Shapes:
    shapes: Shapes = {}
    for number in range(2):
        bart = f"model.encoder.layers.{number}"
        t5 = f"encoder.block.{number}.layer"
        for kind, where in (("attn", f"{t5}.0"), ("ff", f"{t5}.1")):
            front = bart if family == "bart" else where
            for head in range(4):
                shapes |= _linear(f"{front}.{kind}_adapter_multihead_down.{head}", 2, 32)
            shapes |= _linear(f"{front}.{kind}_adapter_multihead_up", 32, 8)
            shapes |= GATES[gate](f"{front}.encoder_{kind}_adapter_gating")
        where = f"model.decoder.layers.{number}.encoder_attn"
        if family == "t5":
            where = f"decoder.block.{number}.layer.1.EncDecAttention"
        shapes |= _controller(f"{where}.attn_value_parallel_adapter", 3)
    stack = "model.encoder" if family == "bart" else "encoder"
    return shapes | _linear(f"{stack}.visual_embedding.feat_embedding.0", 32, 20)


def vladapter(family: str) -> Shapes:
    shapes: Shapes = {}
    for number in range(2):
        if family == "bart":
            for name in ("attn_adapter", "ff_adapter"):
                shapes |= _controller(f"model.encoder.layers.{number}.{name}", 8)
            for name in ("self_attn_adapter", "enc_attn_adapter", "ff_adapter"):
                shapes |= _controller(f"model.decoder.layers.{number}.{name}", 8)
        else:
            for name in ("0.attn_adapter", "1.ff_adapter"):
                shapes |= _controller(f"encoder.block.{number}.layer.{name}", 8)
            for name in ("0.attn_adapter", "1.enc_attn_adapter", "2.ff_adapter"):
                shapes |= _controller(f"decoder.block.{number}.layer.{name}", 8)
    return shapes


def routing_gpt2() -> Shapes:
    shapes: Shapes = {}
    for number in range(2):
        name = f"gpt.transformer.h.{number}.attn.c_attn"
        shapes |= {f"{name}.lora_A": (16, 32), f"{name}.lora_B": (64, 8)}
    return shapes


def routing_roberta() -> Shapes:
    shapes: Shapes = {}
    for number in range(2):
        for name in ("query", "value"):
            where = f"roberta.encoder.layer.{number}.attention.self.{name}"
            shapes |= {f"{where}.lora_A": (8, 32), f"{where}.lora_B": (32, 8)}
    return shapes


def _adapters(*fronts: str) -> Shapes:
    shapes: Shapes = {}
    for front in fronts:
        shapes |= _linear(f"{front}.adapter.down_sampler", 8, 32)
        shapes |= _linear(f"{front}.adapter.up_sampler", 32, 8)
    return shapes


def routed_adapters_gpt2() -> Shapes:
    return _adapters("transformer.h.0", "transformer.h.1")


def routed_adapters_roberta() -> Shapes:
    layers = (f"roberta.encoder.layer.{number}" for number in range(2))
    return _adapters(
        *(f"{layer}{part}" for layer in layers for part in (".attention.output", ".output"))
    )


@dataclass(frozen=True)
class Case:
    """A method on a model, and what its authors' checkpoint holds."""

    build: Callable[[], nn.Module]
    config: Callable[[], AdapterConfig]
    shapes: Callable[[], Shapes]
    norms: str = ""  # how the names of norms that are trained whole begin

    def model(self) -> Any:
        return self.build()

    def tensors(self) -> dict[str, Tensor]:
        """Of every name any values; of one adapter that tasks share the same."""
        generator = torch.Generator().manual_seed(11)
        held: dict[str, Tensor] = {}
        for name, shape in self.shapes().items():
            twin = name.replace(".gqa.", ".vqa.")
            held[name] = held[twin] if twin in held else torch.randn(shape, generator=generator)
        for name in self._norms():
            shape = self.build().get_parameter(name).shape
            held[name] = torch.randn(shape, generator=generator)
        return held

    def _norms(self) -> Iterator[str]:
        for name, _ in self.build().named_parameters():
            if self.norms and name.startswith(self.norms.split("|")[0]) and "norm" in name:
                yield name


def _text(family: str) -> Callable[[], nn.Module]:
    return lambda: tiny_text.build(family, F32)


def _vlpet(gate: str, family: str) -> Case:
    return Case(
        _text(family),
        lambda: pk.VLPetConfig(r=8, gate=gate, gate_r=6, value_r=3, variant="release"),
        lambda: vlpet(gate, family),
        "model.encoder" if family == "bart" else "encoder",
    )


def _routing(family: str, shapes: Callable[[], Shapes], **config: Any) -> Case:
    return Case(_text(family), lambda: pk.RoutingConfig(r=8, variant="release", **config), shapes)


CASES: dict[str, Case] = {
    "petal": Case(
        tiny.instructblip,
        lambda: pk.PetalConfig(r=R, experts=3, expert_r=2, variant="release"),
        petal,
    ),
    "aurora-retrieval": Case(
        lambda: tiny_blip.build("retrieval", F32),
        lambda: pk.AuroraConfig(
            r=R, variant="release", modules_to_save=["vision_proj", "itm_head"]
        ),
        aurora_retrieval,
    ),
    "aurora-vqa": Case(
        lambda: tiny_blip.build("vqa", F32),
        lambda: pk.AuroraConfig(r=R, variant="release"),
        aurora_vqa,
    ),
    **{f"vlpet-{g}-{f}": _vlpet(g, f) for g, f in zip(GATES, ("bart", "t5") * 2, strict=True)},
    "vladapter-bart": Case(
        _text("bart"),
        lambda: pk.VLAdapterConfig(r=8, variant="release"),
        lambda: vladapter("bart"),
        "model",
    ),
    "vladapter-t5": Case(
        _text("t5"),
        lambda: pk.VLAdapterConfig(r=8, variant="release", train_norms=False),
        lambda: vladapter("t5"),
    ),
    "routing-gpt2": _routing("gpt2", routing_gpt2, function="mul", groups="merged"),
    "routing-roberta": _routing("roberta", routing_roberta, function="mul"),
    "adapters-gpt2": _routing("gpt2", routed_adapters_gpt2, kind="adapter", share=True),
    "adapters-roberta": _routing(
        "roberta", routed_adapters_roberta, kind="adapter", residual=False
    ),
}
