"""The small InstructBLIP of the demo: transformers' own classes, two million parameters, weights in
this package.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig
from transformers.utils import logging as transformers_logging

from petal_kernels.tools.demo import tasks
from petal_kernels.tools.demo.data import IMAGE_SIZE

WEIGHTS = Path(__file__).with_name("weights") / "two-digits.safetensors"
PATCH = 7
GRID = IMAGE_SIZE // PATCH
WIDTH = 128
QUERIES = 4
_VISION_INIT = 0.05


def build(seed: int = 0) -> InstructBlipForConditionalGeneration:
    """The model with random weights."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        # The default of the class is 1e-10, meant for weights that are loaded: it does not train.
        "initializer_range": _VISION_INIT,
    }
    qformer = {
        "vocab_size": len(tasks.WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "encoder_hidden_size": WIDTH,
        "cross_attention_frequency": 2,
        "max_position_embeddings": 8,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    language = LlamaConfig(
        vocab_size=len(tasks.WORDS),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=tasks.PAD,
        bos_token_id=tasks.BOS,
        eos_token_id=tasks.EOS,
    )
    config = InstructBlipConfig(
        vision_config=vision,
        qformer_config=qformer,
        text_config=language.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tasks.IMAGE,
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = InstructBlipForConditionalGeneration(config)
        with torch.no_grad():
            # The class leaves the queries at zero; without positions they would stay equal for
            # ever.
            model.query_tokens.normal_(std=0.02)
            model.vision_model.embeddings.position_embedding.normal_(std=0.1)
    finally:
        torch.random.set_rng_state(state)
    model.eval()
    return model


def load(path: Path = WEIGHTS) -> InstructBlipForConditionalGeneration:
    """The trained model in float32; raises if a weight is missing or does not fit."""
    if not path.exists():
        raise FileNotFoundError(
            f"weights of the demo: want {path}, which is missing; "
            "in a checkout, python -m benchmarks.demo.pretrain makes them"
        )
    transformers_logging.set_verbosity_error()
    model = build()
    tensors = {name: value.float() for name, value in load_file(path).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"language_model.lm_head.weight"}
    if unexpected or set(missing) - tied:
        raise ValueError(
            f"{path.name}: missing {sorted(set(missing) - tied)}, unexpected {unexpected}"
        )
    model.eval()
    return model


@torch.no_grad()
def image_features(
    model: InstructBlipForConditionalGeneration, pictures: Tensor, batch: int = 250
) -> Tensor:
    """What the frozen vision tower says about pictures [N, 1, 42, 42]: features [N, 37, 128]."""
    parts = [
        model.vision_model(pixel_values=part.expand(-1, 3, -1, -1)).last_hidden_state
        for part in pictures.split(batch)
    ]
    return torch.cat(parts)


def answer_logits(
    model: InstructBlipForConditionalGeneration,
    features: Tensor,
    questions: Tensor,
    answers: Tensor | None = None,
) -> Tensor:
    """Logits of the words after the prompt, from cached image features.

    The same steps as the model's own forward, without the vision tower: Q-Former with the question,
    projection, language model on [projected queries, <bos>, answers...]. Returns [N, 1 + answer
    words, vocabulary].
    """
    count = features.shape[0]
    queries = model.query_tokens.expand(count, -1, -1)
    hidden = model.qformer(
        input_ids=questions,
        attention_mask=torch.ones(count, QUERIES + questions.shape[1], dtype=torch.long),
        query_embeds=queries,
        encoder_hidden_states=features,
        encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long),
    ).last_hidden_state[:, :QUERIES]
    words = torch.full((count, 1), tasks.BOS)
    if answers is not None:
        words = torch.cat([words, answers], dim=1)
    embedded = model.get_input_embeddings()(words)
    prompt = torch.cat([model.language_projection(hidden), embedded], dim=1)
    logits: Tensor = model.language_model(inputs_embeds=prompt, use_cache=False).logits
    return logits[:, QUERIES:]
