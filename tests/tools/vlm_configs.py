"""Configs of vision-language models, written by hand after the repository on huggingface.co that
each names: what decides about sizes alone. With billions of parameters as a model's page rounds
them, and the exact number summed up by hand from the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.tools import vlm_sums as sums

Values = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A config, billions of parameters on the model's page, and the hand sum."""

    repository: str
    values: Values
    billions: float
    count: Callable[[Values], int]


def _text(kind: str, sizes: tuple[int, ...], **more: Any) -> Values:
    """(vocabulary, width, inner width, layers, heads, pairs of keys and values)."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads")  # fmt: skip
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), **more}


def _tower(kind: str, sizes: tuple[int, ...], image: Any, patch: Any, **more: Any) -> Values:
    """(width, inner width, layers, heads)."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = dict(zip(names, sizes, strict=True))
    return {"model_type": kind, **values, "image_size": image, "patch_size": patch, **more}


def _siglip(image: int, layers: int = 27, **more: Any) -> Values:
    sizes = (1152, 4304, layers, 16)
    return _tower("siglip_vision_model", sizes, image, 14, vision_use_head=False, **more)


_QWEN: Values = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_MROPE: Values = {"type": "mrope", "mrope_section": [16, 24, 24]}


def _qwen(kind: str, sizes: tuple[int, ...], tied: bool, tower: Values) -> Values:
    """Qwen2-VL's and Qwen2.5-VL's, whose decoder's sizes lie at the top."""
    text = _text(kind, sizes, tie_word_embeddings=tied, rope_scaling=_MROPE)
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    vision = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, **tower}
    models = [f"{name}ForConditionalGeneration"]
    return {**_QWEN, **text, "architectures": models, "vision_config": vision}


def _qwen2(out: int) -> Values:
    return {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": out}


def _qwen25(out: int) -> Values:
    return {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }


_LLAVA = ["LlavaForConditionalGeneration"]
_QWEN2_7B = (3584, 18944, 28, 28, 4)

PUBLISHED = [
    Published(
        "llava-hf/llava-1.5-7b-hf",
        {
            "model_type": "llava",
            "architectures": _LLAVA,
            "image_token_index": 32000,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "text_config": _text("llama", (32064, 4096, 11008, 32, 32, 32)),
            "vision_config": _tower("clip_vision_model", (1024, 4096, 24, 16), 336, 14),
        },
        7.06,
        sums.llava,
    ),
    Published(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        {
            "model_type": "llava_onevision",
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "image_token_index": 151646,
            "video_token_index": 151647,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)],
            "tie_word_embeddings": False,
            "text_config": _text("qwen2", (152064, *_QWEN2_7B)),
            "vision_config": _siglip(384, layers=26),
        },
        8.03,
        sums.onevision,
    ),
    Published(
        "google/paligemma2-3b-pt-224",
        {
            "model_type": "paligemma",
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "image_token_index": 257152,
            "projection_dim": 2304,
            "hidden_size": 2304,
            "pad_token_id": 0,
            "text_config": _text("gemma2", (257216, 2304, 9216, 26, 8, 4), head_dim=256),
            "vision_config": _siglip(224, projection_dim=2304),
        },
        3.03,
        sums.paligemma2,
    ),
    Published(
        "google/gemma-3-4b-it",
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "mm_tokens_per_image": 256,
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
            "text_config": _text("gemma3_text", (262208, 2560, 10240, 34, 8, 4), head_dim=256),
            "vision_config": _siglip(896),
        },
        4.30,
        sums.gemma3,
    ),
    Published(
        "Qwen/Qwen2-VL-2B-Instruct",
        _qwen("qwen2_vl", (151936, 1536, 8960, 28, 12, 2), True, _qwen2(1536)),
        2.21,
        sums.qwen2_vl,
    ),
    Published(
        "Qwen/Qwen2-VL-7B-Instruct",
        _qwen("qwen2_vl", (152064, *_QWEN2_7B), False, _qwen2(3584)),
        8.29,
        sums.qwen2_vl,
    ),
    Published(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        _qwen("qwen2_5_vl", (151936, 2048, 11008, 36, 16, 2), True, _qwen25(2048)),
        3.75,
        sums.qwen25_vl,
    ),
    Published(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        _qwen("qwen2_5_vl", (152064, *_QWEN2_7B), False, _qwen25(3584)),
        8.29,
        sums.qwen25_vl,
    ),
    Published(
        "Qwen/Qwen3-VL-4B-Instruct",
        {
            **_QWEN,
            "model_type": "qwen3_vl",
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "tie_word_embeddings": True,
            "text_config": _text(
                "qwen3_vl_text", (151936, 2560, 9728, 36, 32, 8), head_dim=128,
                tie_word_embeddings=True,
                rope_scaling={"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                              "rope_type": "default"},
            ),
            "vision_config": {
                "model_type": "qwen3_vl",
                "deepstack_visual_indexes": [5, 11, 17],
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2560,
                "patch_size": 16,
                "spatial_merge_size": 2,
            },
        },
        4.44,
        sums.qwen3_vl,
    ),
    Published(
        "OpenGVLab/InternVL3-8B-hf",
        {
            "model_type": "internvl",
            "architectures": ["InternVLForConditionalGeneration"],
            "image_token_id": 151667,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
            "text_config": _text("qwen2", (151674, *_QWEN2_7B)),
            "vision_config": _tower(
                "internvl_vision", (1024, 4096, 24, 16), [448, 448], [14, 14], attention_bias=True
            ),
        },
        7.94,
        sums.internvl,
    ),
    Published(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        {
            "model_type": "smolvlm",
            "architectures": ["SmolVLMForConditionalGeneration"],
            "image_token_id": 49190,
            "scale_factor": 3,
            "tie_word_embeddings": False,
            "pad_token_id": 2,
            "text_config": _text("llama", (49280, 2048, 8192, 24, 32, 32), pad_token_id=2),
            "vision_config": _tower("smolvlm_vision", (1152, 4304, 27, 16), 384, 14),
        },
        2.25,
        sums.idefics3,
    ),
    Published(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        {
            "model_type": "idefics3",
            "architectures": ["Idefics3ForConditionalGeneration"],
            "image_token_id": 128257,
            "scale_factor": 2,
            "tie_word_embeddings": False,
            "pad_token_id": 128002,
            "text_config": _text("llama", (128259, 4096, 14336, 32, 32, 8), pad_token_id=128002),
            "vision_config": _tower("idefics3_vision", (1152, 4304, 27, 16), 364, 14),
        },
        8.46,
        sums.idefics3,
    ),
    Published(
        "meta-llama/Llama-3.2-11B-Vision",
        {
            "model_type": "mllama",
            "architectures": ["MllamaForConditionalGeneration"],
            "image_token_index": 128256,
            "text_config": _text(
                "mllama_text_model", (128256, 4096, 14336, 40, 32, 8), pad_token_id=128004,
                cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38],
            ),
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_global_layers": 8,
                "attention_heads": 16,
                "image_size": 560,
                "patch_size": 14,
                "max_num_tiles": 4,
                "vision_output_dim": 7680,
                "intermediate_layers_indices": [3, 7, 15, 23, 30],
                "supported_aspect_ratios": [
                    [1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]
                ],
            },
        },
        10.67,
        sums.mllama,
    ),
    Published(
        "mistral-community/pixtral-12b",
        {
            "model_type": "llava",
            "architectures": _LLAVA,
            "image_token_index": 10,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": _text("mistral", (131072, 5120, 14336, 40, 32, 8), head_dim=128),
            "vision_config": _tower("pixtral", (1024, 4096, 24, 16), 1024, 16, head_dim=64),
        },
        12.68,
        sums.llava,
    ),
    Published(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        {
            "model_type": "mistral3",
            "architectures": ["Mistral3ForConditionalGeneration"],
            "image_token_index": 10,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "tie_word_embeddings": False,
            "text_config": _text("mistral", (131072, 5120, 32768, 40, 32, 8), head_dim=128),
            "vision_config": _tower("pixtral", (1024, 4096, 24, 16), 1540, 14, head_dim=64),
        },
        24.01,
        sums.mistral3,
    ),
]  # fmt: skip
BY_NAME = {p.repository.rpartition("/")[2]: p for p in PUBLISHED}
