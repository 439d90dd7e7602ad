"""Embeddings that write into their words' vectors, made safe for checkpointing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petal_kernels.hf.walk import is_a

_IN_PLACE = "BlipTextEmbeddings"


def guard_embeddings(model: nn.Module) -> list[RemovableHandle]:
    """Hooks on all embeddings of `model` that add to their words' vectors in place."""
    return [
        module.register_forward_pre_hook(_fresh_vectors, with_kwargs=True)
        for module in model.modules()
        if is_a(module, _IN_PLACE)
    ]


def _fresh_vectors(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Enabling checkpointing lets these vectors require grad: of frozen embeddings they are leaves,
    which must not be written."""
    ids, words = kwargs.get("input_ids"), module.word_embeddings
    if ids is None or not isinstance(words, nn.Module) or not words._forward_hooks:
        return None
    vectors: Tensor = words(ids)
    if vectors.is_leaf and vectors.requires_grad:
        vectors = vectors.clone()
    return args, {**kwargs, "input_ids": None, "inputs_embeds": vectors}
