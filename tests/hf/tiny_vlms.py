"""Tiny random-weight models that see, and models of one kind of layers: one line of a table each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf.tiny_text import WIDTH, _llama_like

VOCABULARY = 60
IMAGE, VIDEO, START, END = (VOCABULARY - n for n in (1, 2, 3, 4))
Sizes = dict[str, Any]


@dataclass(frozen=True)
class Sees:
    """A vision-language model: its class, its parts' configs, what an image is to it, and where its
    decoder and its tower are."""

    model: str
    text: Sizes
    vision: Sizes
    more: Sizes
    image: Callable[[torch.Generator], dict[str, Tensor]]
    tokens: int  # of an image in the text
    decoder: str = "model.language_model."
    tower: str = "model.vision_tower."

    def build(self) -> nn.Module:
        import transformers

        config = getattr(transformers, self.model.replace("ForConditionalGeneration", "Config"))
        made = config(text_config=self.text, vision_config=self.vision, **self.more)
        made._attn_implementation = "eager"
        return getattr(transformers, self.model)(made)  # type: ignore[no-any-return]

    def batch(self, seed: int = 0, length: int = 7) -> dict[str, Tensor]:
        """A sample of an image and a text after it, and one of a text before it."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(5, VOCABULARY - 8, (2, length), generator=generator)
        image = torch.full((1, self.tokens), IMAGE)
        ids = torch.cat((torch.cat((image, text[:1]), 1), torch.cat((text[1:], image), 1)))
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        values |= {"labels": torch.where(ids == IMAGE, -100, ids), **self.image(generator)}
        return values


def text(kind: str, **more: Any) -> Sizes:
    """Sizes of a decoder of that type."""
    sizes = {**_llama_like(), "model_type": kind, "initializer_range": 0.2}
    return sizes | ({"head_dim": 8} if kind.startswith(("gemma", "qwen3")) else {}) | more


def tower(kind: str, **more: Any) -> Sizes:
    """Sizes of a tower of that type."""
    return {
        "model_type": kind,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        **more,
    }


def pictures(size: int = 28, *lead: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Of each sample one."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        shape = (2, *lead, 3, size, size)
        return {"pixel_values": torch.randn(shape, generator=generator)}

    return draw
