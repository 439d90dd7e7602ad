"""The models that are timed, built from transformers' configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Width and depth; `image` is the side of the picture in patches. `vocabulary` 0: the model's
    own."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    image: int


SIZES = {
    "small": Size(width=96, layers=2, heads=4, vocabulary=200, image=4),
    "full": Size(width=768, layers=12, heads=12, vocabulary=0, image=14),
}
PATCH = 16


class Subject(nn.Module):
    """A model, what it runs on, its loss, and where its embeddings come out."""

    words: int  # of the published model
    model: nn.Module
    entry: nn.Module

    def __init__(self, size: Size) -> None:
        from transformers.utils import logging

        super().__init__()
        logging.set_verbosity_error()  # it comments on word ids that are not used here
        self.size = size
        self.vocabulary = size.vocabulary or self.words

    def batch(self, size: int, tokens: int, g: torch.Generator) -> dict[str, Tensor]:
        """Random inputs."""
        raise NotImplementedError

    def vision(self, **batch: Tensor) -> Tensor | None:
        """The features that routes read."""
        return None

    def both(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the outputs that it is of."""
        raise NotImplementedError


class QFormer(Subject):
    """InstructBLIP's Q-Former: 32 queries, instruction tokens, image tokens of ViT-g's width."""

    words, queries = 30522, 32

    def __init__(self, size: Size) -> None:
        from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

        super().__init__(size)
        full = size.width == SIZES["full"].width
        self.image_width, self.image_tokens = (1408, 257) if full else (64, 17)
        self.model: Any = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                vocab_size=self.vocabulary,
                hidden_size=size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                intermediate_size=4 * size.width,
                encoder_hidden_size=self.image_width,
                cross_attention_frequency=2,
                attention_probs_dropout_prob=0.0,
                hidden_dropout_prob=0.0,
            )
        )

    @property
    def entry(self) -> nn.Module:  # type: ignore[override]
        """Queries and instruction, embedded."""
        found: nn.Module = self.model.embeddings
        return found

    def batch(self, size: int, tokens: int, g: torch.Generator) -> dict[str, Tensor]:
        queries = torch.randn(1, self.queries, self.size.width, generator=g)
        return {
            "input_ids": torch.randint(5, self.vocabulary, (size, tokens), generator=g),
            "attention_mask": torch.ones(size, self.queries + tokens, dtype=torch.long),
            "query_embeds": queries.expand(size, -1, -1).contiguous(),
            "encoder_hidden_states": torch.randn(
                size, self.image_tokens, self.image_width, generator=g
            ),
        }

    def both(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        out: Tensor = self.model(**batch).last_hidden_state
        return out.square().mean(), out


class Bart(Subject):
    """BART-base: as many decoder tokens as encoder tokens."""

    words = 50265

    def __init__(self, size: Size) -> None:
        from transformers import BartConfig, BartForConditionalGeneration

        super().__init__(size)
        self.model: Any = BartForConditionalGeneration(
            BartConfig(
                vocab_size=self.vocabulary,
                d_model=size.width,
                encoder_layers=max(1, size.layers // 2),
                decoder_layers=max(1, size.layers // 2),
                encoder_attention_heads=size.heads,
                decoder_attention_heads=size.heads,
                encoder_ffn_dim=4 * size.width,
                decoder_ffn_dim=4 * size.width,
                max_position_embeddings=1024,
                dropout=0.0,
            )
        )

    @property
    def entry(self) -> nn.Module:  # type: ignore[override]
        """The encoder's first norm, behind words and positions."""
        found: nn.Module = self.model.model.encoder.layernorm_embedding
        return found

    def batch(self, size: int, tokens: int, g: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(5, self.vocabulary, (2, size, tokens), generator=g)
        return {"input_ids": ids[0], "labels": ids[1]}

    def both(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(**batch, use_cache=False)
        return out.loss, out.logits


class GPT2WithViT(Subject):
    """GPT-2 that says words, and a frozen ViT whose features the routes read."""

    words = 50257

    def __init__(self, size: Size) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

        super().__init__(size)
        self.model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=self.vocabulary,
                n_embd=size.width,
                n_layer=size.layers,
                n_head=size.heads,
                n_positions=1024,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        self.tower: Any = ViTModel(
            ViTConfig(
                hidden_size=size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                intermediate_size=4 * size.width,
                image_size=size.image * PATCH,
                patch_size=PATCH,
            ),
            add_pooling_layer=False,
        )

    @property
    def entry(self) -> nn.Module:  # type: ignore[override]
        """Words and positions, summed."""
        found: nn.Module = self.model.transformer.drop
        return found

    def batch(self, size: int, tokens: int, g: torch.Generator) -> dict[str, Tensor]:
        side = self.size.image * PATCH
        return {
            "pixel_values": torch.randn(size, 3, side, side, generator=g),
            "input_ids": torch.randint(5, self.vocabulary, (size, tokens), generator=g),
        }

    @torch.no_grad()
    def vision(self, **batch: Tensor) -> Tensor:
        features: Tensor = self.tower(pixel_values=batch["pixel_values"]).last_hidden_state
        return features

    def both(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        out = self.model(input_ids=ids, labels=ids, use_cache=False)
        return out.loss, out.logits


class Llama(Subject):
    """Four layers of Llama, 1024 wide, without a head: linears and attention alone."""

    words = 32000

    def __init__(self, size: Size) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__(size)
        full = size.width == SIZES["full"].width
        self.width = 1024 if full else size.width
        self.model: Any = LlamaModel(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=self.width * 11 // 4,
                num_hidden_layers=4 if full else size.layers,
                num_attention_heads=16 if full else size.heads,
                max_position_embeddings=4096,
            )
        )

    @property
    def entry(self) -> nn.Module:  # type: ignore[override]
        """The words' embeddings."""
        found: nn.Module = self.model.embed_tokens
        return found

    def batch(self, size: int, tokens: int, g: torch.Generator) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(5, self.vocabulary, (size, tokens), generator=g)}

    def both(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        out: Tensor = self.model(**batch, use_cache=False).last_hidden_state
        return out.square().mean(), out


class Qwen25VL(Subject):
    """Qwen2.5-VL, its image tokens in front of the words; grouped heads, biases on q, k and v."""

    words = 151936

    def __init__(self, size: Size) -> None:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

        super().__init__(size)
        full = size.width == SIZES["full"].width
        self.width, self.image = 1024 if full else size.width, self.vocabulary - 1
        heads = 16 if full else size.heads
        half = self.width // heads // 2  # of a head: in time, height and width
        text = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.width * 11 // 4,
            "num_hidden_layers": 4 if full else size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * (half * 3 // 8), *[half * 3 // 8] * 2],
            },
        }
        vision = {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "out_hidden_size": self.width,
            "fullatt_block_indexes": [1],
        }
        self.model: Any = Qwen2_5_VLModel(
            Qwen2_5_VLConfig(
                text_config=text,
                vision_config=vision,
                image_token_id=self.image,
                vision_start_token_id=self.vocabulary - 2,
                video_token_id=self.vocabulary - 3,
            )
        )

    @property
    def entry(self) -> nn.Module:  # type: ignore[override]
        """The words' embeddings."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def batch(self, size: int, tokens: int, g: torch.Generator) -> dict[str, Tensor]:
        side = self.size.image // 2 * 2
        words = tokens - side * side // 4  # two by two patches become a token
        return {
            "words": torch.randint(5, self.vocabulary - 3, (size, words), generator=g),
            "pixel_values": torch.randn(size * side * side, 3 * 2 * 14 * 14, generator=g),
        }

    def both(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        words, pixels = batch["words"], batch["pixel_values"]
        size, side = words.shape[0], self.size.image // 2 * 2
        image = words.new_full((size, side * side // 4), self.image)
        ids = torch.cat((image, words), dim=1)
        out: Tensor = self.model(
            input_ids=ids,
            pixel_values=pixels,
            image_grid_thw=words.new_tensor([[1, side, side]]).expand(size, -1).contiguous(),
            mm_token_type_ids=(ids == self.image).to(torch.int32),
            use_cache=False,
        ).last_hidden_state
        return out.square().mean(), out


BUILDERS: dict[str, Callable[[Size], Subject]] = {
    "qformer": QFormer,
    "bart": Bart,
    "gpt2-vit": GPT2WithViT,
    "llama": Llama,
    "qwen2_5_vl": Qwen25VL,
}
