"""Embeddings that write into their words' vectors, made safe for checkpointing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from petal_kernels.hf.method import Hand
from petal_kernels.hf.parts import Part, Run
from petal_kernels.hf.walk import is_a

_IN_PLACE = "BlipTextEmbeddings"


def guard_embeddings(model: nn.Module, hand: Hand) -> None:
    """Guards all embeddings of `model` that add to their words' vectors in place."""
    for module in model.modules():
        if is_a(module, _IN_PLACE):
            hand.take(module, FreshVectors())


class FreshVectors(Part):
    """Enabling checkpointing lets these vectors require grad: of frozen embeddings they are leaves,
    which must not be written."""

    def forward(self, module: nn.Module, run: Run, args: Any, kwargs: Any) -> Any:
        ids, words = kwargs.get("input_ids"), module.word_embeddings
        if ids is None or not isinstance(words, nn.Module) or not words._forward_hooks:
            return run(*args, **kwargs)
        vectors: Tensor = words(ids)
        if vectors.is_leaf and vectors.requires_grad:
            vectors = vectors.clone()
        return run(*args, **{**kwargs, "input_ids": None, "inputs_embeds": vectors})
