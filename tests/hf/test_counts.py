"""Parameter counts at full size, on the meta device: those of the papers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig


class VisualEmbedding(nn.Module):
    """VL-BART's: features and boxes with a norm each, two order vectors."""

    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.features, self.features_norm = nn.Linear(2048, width), norm(width)
        self.boxes, self.boxes_norm = nn.Linear(5, width), norm(width)
        self.order = nn.Parameter(torch.empty(2, width))


def vl_bart() -> nn.Module:
    import transformers

    config = transformers.BartConfig(
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    model = transformers.BartForConditionalGeneration(config)
    model.visual_embedding = VisualEmbedding(768, nn.LayerNorm)
    return model


def vl_t5() -> nn.Module:
    import transformers
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    config = transformers.T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.visual_embedding = VisualEmbedding(768, T5LayerNorm)
    return model


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def roberta() -> nn.Module:
    import transformers

    return transformers.RobertaModel(transformers.RobertaConfig(vocab_size=50265))


VISUAL = ["visual_embedding"]
VISUAL_T5 = 2048 * 768 + 768 + 5 * 768 + 768 + 2 * 768 + 2 * 768  # its norms have no bias
BART: dict[str, Any] = {"r": 96, "modules_to_save": VISUAL}
T5: dict[str, Any] = {"r": 192, "scale": 0.3, "modules_to_save": VISUAL}
LORA: dict[str, Any] = {"r": 128, "train_bias": True, "train_norms": True}
ADAPTER: dict[str, Any] = {"kind": "adapter", "train_norms": True}

CASES = [
    ("vl-pet bart large", vl_bart, pk.VLPetConfig(gate="large", **BART), 6_052_416),
    ("vl-pet bart middleX", vl_bart, pk.VLPetConfig(gate="middleX", **BART), 4_281_804),
    ("vl-pet bart middleY", vl_bart, pk.VLPetConfig(gate="middleY", **BART), 4_281_792),
    ("vl-pet bart small", vl_bart, pk.VLPetConfig(gate="small", **BART), 4_291_020),
    ("vl-pet t5 large", vl_t5, pk.VLPetConfig(gate="large", **T5), 17_582_208),
    ("vl-pet t5 middleX", vl_t5, pk.VLPetConfig(gate="middleX", **T5), 10_499_736),
    ("vl-pet t5 middleY", vl_t5, pk.VLPetConfig(gate="middleY", **T5), 10_499_712),
    ("vl-pet t5 small", vl_t5, pk.VLPetConfig(gate="small", **T5), 10_518_168),
    # VL-PET's places on the other modules: the adapters alone, Compacter's, LoRA of the linears
    # that end its blocks (768 -> 768 and 3072 -> 768) and of the values.
    (
        "vl-pet bart without gates",
        vl_bart,
        pk.VLPetConfig(gate="none", **BART),
        18 * 148_320 + 19_968 + 1_582_848,
    ),
    (
        "vl-pet bart compacter",
        vl_bart,
        pk.VLPetConfig(module="compacter", **BART),
        18 * 74_608 + 19_968 + 1_582_848,
    ),
    (
        "vl-pet bart compacter shared",
        vl_bart,
        pk.VLPetConfig(module="compacter", division=4, factor_r=1, share_rule=True, **BART),
        18 * 2_592 + 64 + 19_968 + 1_582_848,
    ),
    (
        "vl-pet bart compacter large",
        vl_bart,
        pk.VLPetConfig(module="compacter", gate="large", **BART),
        18 * 74_608 + 12 * 148_320 + 19_968 + 1_582_848,
    ),
    (
        "vl-pet bart lora",
        vl_bart,
        pk.VLPetConfig(module="lora", **BART),
        96 * (6 * 1_536 + 6 * 3_840 + 6 * 1_536) + 19_968 + 1_582_848,
    ),
    (
        "vl-pet t5 lora",
        vl_t5,
        pk.VLPetConfig(module="lora", r=192, modules_to_save=VISUAL),
        192 * 12 * (1_536 + 3_840) + 96 * 12 * 1_536 + 25 * 768 + VISUAL_T5,
    ),
    ("vl-adapter bart", vl_bart, pk.VLAdapterConfig(**BART), 6_081_600),
    # VL-BART's image-text runs: 30 adapters of 74,608, all norms, the visual embedding.
    ("compacter bart", vl_bart, pk.CompacterConfig(**BART), 30 * 74_608 + 49_152 + 1_582_848),
    # Compacter's own: 30 adapters of 2,592, of which 864 are biases, and one rule.
    (
        "compacter bart shared",
        vl_bart,
        pk.CompacterConfig(division=4, factor_r=1, share_rule=True, **BART),
        30 * (2 * 4 * (768 // 4 + 96 // 4) + 864) + 64 + 49_152 + 1_582_848,
    ),
    # Every query and value of VL-BART's 18 attentions.
    ("lora bart", vl_bart, pk.RoutingConfig(r=128, alpha=32), 7_077_888),
    ("routing gpt-2 lora", gpt2, pk.RoutingConfig(function="mul", **LORA), 4_783_104),
    (
        "routing gpt-2 adapter",
        gpt2,
        pk.RoutingConfig(r=128, function="gram", share=True, **ADAPTER),
        2_406_912,
    ),
    (
        "routing roberta lora",
        roberta,
        pk.RoutingConfig(function="add", **LORA),
        4_718_592 + 18_432 + 36_864,
    ),
    (
        "routing roberta adapter",
        roberta,
        pk.RoutingConfig(r=64, function="add", **ADAPTER),
        2_379_264 + 36_864,
    ),
]


@pytest.mark.parametrize(
    ("build", "config", "count"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_trainable_parameters(build: Any, config: AdapterConfig, count: int) -> None:
    with torch.device("meta"):
        model = build()
    attachment = pk.attach(model, config)
    assert sum(p.numel() for p in attachment.parameters()) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert attachment.report().trainable == count
