"""Tiny random-weight models and batches of the supported families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE_TOKEN = 109
QUERIES = 5


def _configs() -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "initializer_range": 0.2,
    }
    qformer = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "encoder_hidden_size": 40,
        "cross_attention_frequency": 2,
        "max_position_embeddings": 64,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return vision, qformer


def _text() -> dict[str, Any]:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=110,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    ).to_dict()


def _ready(model: nn.Module, seed: int) -> nn.Module:
    # query_tokens are initialised to zero, which would make all queries alike
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("query_tokens"):
            parameter.data.normal_(0.0, 1.0, generator=generator)
    return model.eval()


def instructblip(seed: int = 0, layers: int = 4) -> nn.Module:
    import transformers

    vision, qformer = _configs()
    qformer["num_hidden_layers"] = layers
    config = transformers.InstructBlipConfig(
        vision_config=vision,
        qformer_config=qformer,
        text_config=_text(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(seed)
    return _ready(transformers.InstructBlipForConditionalGeneration(config), seed)


def blip2(seed: int = 0, layers: int = 4) -> nn.Module:
    import transformers

    vision, qformer = _configs()
    qformer["num_hidden_layers"] = layers
    config = transformers.Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=_text(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(seed)
    return _ready(transformers.Blip2ForConditionalGeneration(config), seed)


FAMILIES = {"instructblip": instructblip, "blip2": blip2}


def batch(family: str, size: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((size, QUERIES), IMAGE_TOKEN)
    text = torch.randint(3, 90, (size, 6), generator=generator)
    ids = torch.cat([image, text], dim=1)
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(size, 3, 28, 28, generator=generator),
        "labels": torch.where(ids == IMAGE_TOKEN, -100, ids),
    }
    if family == "instructblip":
        instruction = torch.randint(3, 90, (size, 7), generator=generator)
        values["qformer_input_ids"] = instruction
        values["qformer_attention_mask"] = torch.ones_like(instruction)
    return values


def randomise(adapter: nn.Module, seed: int = 1) -> None:
    """Values with which every part of the adapter matters: at step 0 all updates are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
