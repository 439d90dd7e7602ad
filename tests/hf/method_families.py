"""The families of tiny models over which the methods' table runs, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.hf import tiny, tiny_blip, tiny_text


@dataclass(frozen=True)
class Family:
    """Tiny models of one family, and their batches."""

    build: Callable[[], nn.Module]
    batch: Callable[..., dict[str, Any]]  # of size, seed, length
    width: int = tiny_text.WIDTH


def _qformer_batch(family: str, size: int, seed: int, length: int) -> dict[str, Any]:
    values = tiny.batch(family, size, seed)
    if family == "instructblip":
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            values[name] = values[name][:, :length]
        values["qformer_attention_mask"][-1, 5:] = 0
    values["pixel_values"] = values["pixel_values"].double()
    return values


def _blip_batch(task: str, size: int, seed: int, length: int) -> dict[str, Any]:
    return tiny_blip.batch(task, seed, size)


def _text_batch(family: str, size: int, seed: int, length: int) -> dict[str, Any]:
    """Embeddings instead of ids, so that the first layer's input has a gradient too."""
    values: dict[str, Any] = dict(tiny_text.batch(family, size, seed))
    generator = torch.Generator().manual_seed(seed)
    shape = (*values.pop("input_ids").shape, tiny_text.WIDTH)
    embeds = torch.randn(shape, generator=generator, dtype=torch.float64)
    values |= {"inputs_embeds": embeds[:, :length], "use_cache": False}
    values["attention_mask"] = values["attention_mask"][:, :length]
    values["labels"] = values["labels"][:, :length].contiguous()
    return values


def _word_batch(family: str, size: int, seed: int, length: int) -> dict[str, Any]:
    """Ids, so that the embeddings run."""
    values: dict[str, Any] = dict(tiny_text.batch(family, size, seed))
    return {n: t[:, :length].contiguous() for n, t in values.items()} | {"use_cache": False}


FAMILIES = {
    **{
        name: Family(partial(build, layers=2), partial(_qformer_batch, name))
        for name, build in tiny.FAMILIES.items()
    },
    **{
        task: Family(partial(tiny_blip.build, task), partial(_blip_batch, task), tiny_blip.WIDTH)
        for task in tiny_blip.TASKS
    },
    **{
        name: Family(partial(tiny_text.build, name), partial(_text_batch, name))
        for name in tiny_text.MODELS
    },
    "gpt2-words": Family(partial(tiny_text.build, "gpt2"), partial(_word_batch, "gpt2")),
}
