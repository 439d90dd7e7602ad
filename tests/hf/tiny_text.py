"""Tiny random-weight text backbones, with and without an encoder, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, VOCABULARY = 32, 60
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama_like() -> dict[str, Any]:
    return {
        **_SMALL,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": WIDTH,
    }


def bart() -> nn.Module:
    import transformers

    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **_SMALL,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=0.0,
            init_std=0.2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


def t5() -> nn.Module:
    import transformers

    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(  # type: ignore[call-arg]
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **_SMALL,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=64,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            initializer_range=0.2,
        )
    )


def _bert_like() -> dict[str, Any]:
    return {
        **_SMALL,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }


def roberta() -> nn.Module:
    import transformers

    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_bert_like()))


def bert() -> nn.Module:
    import transformers

    return transformers.BertForMaskedLM(transformers.BertConfig(**_bert_like()))


def llama() -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_llama_like()))


def mistral() -> nn.Module:
    """Every layer sees a window that is shorter than the prompts."""
    import transformers

    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**_llama_like(), sliding_window=4)
    )


def gemma2() -> nn.Module:
    """Layers with a window and without."""
    import transformers

    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_llama_like(), head_dim=8, sliding_window=4)
    )


def llava() -> nn.Module:
    import transformers

    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **_vision()},
            text_config={"model_type": "llama", **_llama_like()},
            image_token_index=VOCABULARY - 1,
        )
    )


def paligemma() -> nn.Module:
    import transformers

    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", **_vision()},
            text_config={"model_type": "gemma", "head_dim": 8, **_llama_like()},
            image_token_index=VOCABULARY - 1,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
        )
    )


def idefics3() -> nn.Module:
    import transformers

    return transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(  # type: ignore[call-arg]
            vision_config=_vision(),
            text_config={"model_type": "llama", **_llama_like()},
            image_token_id=VOCABULARY - 1,
            pad_token_id=0,
            scale_factor=2,
        )
    )


def smolvlm() -> nn.Module:
    import transformers

    return transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(  # type: ignore[call-arg]
            vision_config=_vision(),
            text_config={"model_type": "llama", **_llama_like()},
            image_token_id=VOCABULARY - 1,
            pad_token_id=0,
            scale_factor=2,
        )
    )


def qwen2_5_vl() -> nn.Module:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**_llama_like(), "rope_parameters": {**rope, "rope_theta": 10000.0}},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "patch_size": 14,
                "fullatt_block_indexes": [0],
            },
            image_token_id=VOCABULARY - 1,
            video_token_id=VOCABULARY - 2,
            vision_start_token_id=VOCABULARY - 3,
            vision_end_token_id=VOCABULARY - 4,
        )
    )


MODELS = {
    f.__name__: f
    for f in (
        *(bart, t5, gpt2, roberta, bert, llama, mistral, gemma2),
        *(llava, paligemma, idefics3, smolvlm, qwen2_5_vl),
    )
}
ENCODER_DECODER = ("bart", "t5")


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The model in `dtype`, in evaluation mode (its dropouts are zero anyway)."""
    torch.manual_seed(seed)
    return MODELS[family]().to(dtype).eval()


def batch(family: str, size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Ids of odd length, the last samples padded; labels where the family has them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 5, (size, 9), generator=generator)
    mask = torch.ones_like(ids)
    if family in (*ENCODER_DECODER, "roberta", "bert"):
        mask[-1, 6:] = 0
        ids[-1, 6:] = 0
    labels = torch.randint(3, VOCABULARY - 5, (size, 5), generator=generator)
    if family not in ENCODER_DECODER:
        labels = ids.clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def features(tokens: int = 1, size: int = 2, seed: int = 3) -> Tensor:
    """Vision features [size, tokens, WIDTH] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, tokens, WIDTH, generator=generator, dtype=torch.float64)
