"""transformers' own classes at their published sizes, each with a batch that it is trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petal_kernels.tools.memory.options import DTYPES, Options


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype is `dtype` meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def checkpoint(model: nn.Module) -> None:
    """Gradient checkpointing of every part that has it."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # older versions of transformers, and SeeingGPT2
        enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            f"--checkpointing: want a model of transformers, got a {type(model).__name__}"
        )
    enable()


def require_input_grads(model: nn.Module) -> None:
    """What embeddings give requires a gradient, a tower's too, as PEFT asks of a model that is
    checkpointed."""
    enable: Any = getattr(model, "enable_input_require_grads", None)
    if enable is None:
        raise ValueError(
            f"--input-grads: want a model of transformers, got a {type(model).__name__}"
        )
    enable()


def words(count: int, *shape: int) -> Tensor:
    """Ids below `count`, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, count, shape, generator=generator)


def _llama_7b(words: int) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
    )


def llama(options: Options) -> nn.Module:
    """Llama-7B."""
    import transformers

    config = _llama_7b(32000)
    config._attn_implementation = options.attention
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def llama_layer() -> nn.Module:
    """Llama-7B with one layer of its 32 and hardly a word."""
    import transformers

    config = _llama_7b(32)
    config.num_hidden_layers = 1
    model: nn.Module = transformers.LlamaModel(config)
    return model


def text_batch(model: nn.Module, options: Options) -> dict[str, Tensor]:
    """Words that are their own labels."""
    ids = words(1000, options.batch, options.length)
    return {"input_ids": ids, "labels": ids}


def instructblip(options: Options) -> nn.Module:
    """InstructBLIP with Vicuna-7B."""
    import transformers

    config = transformers.InstructBlipConfig(
        text_config=_llama_7b(32001).to_dict(), image_token_index=32000
    )
    config._attn_implementation = options.attention
    model: nn.Module = transformers.InstructBlipForConditionalGeneration(config)
    return model


def blip2(options: Options) -> nn.Module:
    """BLIP-2 with OPT-2.7B."""
    import transformers

    language = transformers.OPTConfig(
        vocab_size=50304,
        hidden_size=2560,
        word_embed_proj_dim=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    config = transformers.Blip2Config(text_config=language.to_dict(), image_token_index=50265)
    config._attn_implementation = options.attention
    model: nn.Module = transformers.Blip2ForConditionalGeneration(config)
    return model


def image_text_batch(model: nn.Module, options: Options) -> dict[str, Tensor]:
    """Pixels, image tokens and words, and the instruction where the Q-Former reads one."""
    config: Any = model.config
    size, queries = config.vision_config.image_size, config.num_query_tokens
    image = torch.full((options.batch, queries), config.image_token_index)
    ids = torch.cat([image, words(1000, options.batch, options.length)], dim=1)
    values = {
        "pixel_values": torch.zeros(options.batch, 3, size, size, dtype=DTYPES[options.dtype]),
        "input_ids": ids,
        "labels": torch.where(ids == config.image_token_index, -100, ids),
    }
    if config.model_type == "instructblip":
        values["qformer_input_ids"] = words(1000, options.batch, 32)
    return values


def bart(options: Options) -> nn.Module:
    """BART-base."""
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
    config._attn_implementation = options.attention
    model: nn.Module = transformers.BartForConditionalGeneration(config)
    return model


def bart_batch(model: nn.Module, options: Options) -> dict[str, Tensor]:
    """A text, and a quarter of its length to say."""
    return {
        "input_ids": words(1000, options.batch, options.length),
        "labels": words(1000, options.batch, max(1, options.length // 4)),
    }


class SeeingGPT2(nn.Module):
    """GPT-2 (small) after the projected features of a frozen ViT (base): [pictures, words]."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        import transformers

        vision, text = transformers.ViTConfig(), transformers.GPT2Config()
        vision._attn_implementation = text._attn_implementation = attention
        self.vision = transformers.ViTModel(vision, add_pooling_layer=False)
        self.projection = nn.Linear(vision.hidden_size, text.n_embd)
        self.language = transformers.GPT2LMHeadModel(text)
        self.attachment: Any = None

    def gradient_checkpointing_enable(self) -> None:
        checkpoint(self.language)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """The loss of the words after the pictures' features."""
        visual = self.projection(self.vision(pixel_values=pixel_values).last_hidden_state)
        words = self.language.get_input_embeddings()(input_ids)
        seeing = (
            contextlib.nullcontext() if self.attachment is None else self.attachment.vision(visual)
        )
        with seeing:
            logits = self.language(
                inputs_embeds=torch.cat([visual, words], dim=1), use_cache=False
            ).logits
        said = logits[:, visual.shape[1] - 1 : -1]
        return nn.functional.cross_entropy(said.flatten(0, 1), input_ids.flatten())


def gpt2_batch(model: nn.Module, options: Options) -> dict[str, Tensor]:
    """Pixels and words."""
    return {
        "pixel_values": torch.zeros(options.batch, 3, 224, 224, dtype=DTYPES[options.dtype]),
        "input_ids": words(1000, options.batch, options.length),
    }
