"""The small text backbones of the demo's other methods, over the same frozen vision tower.

`bart`: an encoder-decoder whose encoder reads [visual tokens, question] and whose decoder answers.
`gpt2`: a decoder that reads the same and says the next word. Both are transformers' own classes.
A visual token is one column of the picture: the mean of the vision tower's patches in it, through
a linear projection that belongs to the backbone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.utils import logging as transformers_logging

from petal_kernels.tools.demo import tasks
from petal_kernels.tools.demo.model import GRID, WIDTH

__all__ = ["KINDS", "Backbone", "build", "columns", "load", "weights"]

KINDS = ("bart", "gpt2")
_HEADS, _HIDDEN, _POSITIONS = 4, 4 * WIDTH, 16
_TIED = ("lm_head.weight", "embed_tokens.weight")


class Backbone(nn.Module):
    """A language model and the projection of the visual tokens into it."""

    def __init__(self, kind: str, language: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.language: Any = language

    def visual_tokens(self, features: Tensor) -> Tensor:
        """Features [N, GRID, WIDTH] of `columns` -> the tokens that the language model reads, and
        that the routing functions read as vision features.
        """
        projected: Tensor = self.projection(features)
        return projected

    def forward(self, visual: Tensor, questions: Tensor) -> Tensor:
        """Logits [N, vocabulary] of the answer, from visual tokens and question words [N, 3]."""
        words = self.language.get_input_embeddings()(questions)
        prompt = torch.cat([visual, words], dim=1)
        if self.kind == "bart":
            start = torch.full((prompt.shape[0], 1), tasks.BOS)
            out = self.language(inputs_embeds=prompt, decoder_input_ids=start, use_cache=False)
        else:
            out = self.language(inputs_embeds=prompt, use_cache=False, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits


def build(kind: str, seed: int = 0) -> Backbone:
    """The backbone with random weights."""
    if kind not in KINDS:
        raise ValueError(f"kind: want one of {KINDS}, got {kind!r}")
    words: dict[str, Any] = {
        "vocab_size": len(tasks.WORDS),
        "pad_token_id": tasks.PAD,
        "bos_token_id": tasks.BOS,
        "eos_token_id": tasks.EOS,
    }
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        language = _bart(words) if kind == "bart" else _gpt2(words)
        return Backbone(kind, language).eval()
    finally:
        torch.random.set_rng_state(state)


def _bart(words: dict[str, Any]) -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            **words,
            d_model=WIDTH,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=_HEADS,
            decoder_attention_heads=_HEADS,
            encoder_ffn_dim=_HIDDEN,
            decoder_ffn_dim=_HIDDEN,
            max_position_embeddings=_POSITIONS,
            dropout=0.0,
            decoder_start_token_id=tasks.BOS,
            forced_eos_token_id=None,
        )
    )


def _gpt2(words: dict[str, Any]) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            **words,
            n_positions=_POSITIONS,
            n_embd=WIDTH,
            n_layer=5,
            n_head=_HEADS,
            n_inner=_HIDDEN,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def weights(kind: str) -> Path:
    """The file of a trained backbone in this package."""
    return Path(__file__).with_name("weights") / f"two-digits-{kind}.safetensors"


def load(kind: str, path: Path | None = None) -> Backbone:
    """The trained backbone in float32; raises if a weight is missing or does not fit."""
    path = weights(kind) if path is None else path
    if not path.exists():
        raise FileNotFoundError(
            f"weights of the demo: want {path}, which is missing; "
            f"in a checkout, python -m benchmarks.demo.pretrain_backbones {kind} makes them"
        )
    transformers_logging.set_verbosity_error()
    backbone = build(kind)
    tensors = {name: value.float() for name, value in load_file(path).items()}
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    # Tied weights are stored once.
    missing = [name for name in missing if not name.endswith(_TIED)]
    if unexpected or missing:
        raise ValueError(f"{path.name}: missing {sorted(missing)}, unexpected {unexpected}")
    return backbone.eval()


def columns(features: Tensor) -> Tensor:
    """The vision tower's features [N, 1 + patches, WIDTH] -> [N, GRID, WIDTH]: the patches averaged
    over each column of the picture.
    """
    patches: Tensor = features[:, 1:].unflatten(1, (GRID, GRID))
    return patches.mean(1)
