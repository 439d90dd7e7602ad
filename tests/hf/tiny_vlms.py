"""Tiny random-weight models of many families: vision-language models, decoders and encoders, one
entry of a table each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf.tiny_text import VOCABULARY, WIDTH, _llama_like

IMAGE, VIDEO, START, END = (VOCABULARY - n for n in (1, 2, 3, 4))
Sizes = dict[str, Any]
Draw = Callable[[torch.Generator], dict[str, Tensor]]


def _text(kind: str, **more: Any) -> Sizes:
    """Sizes of a decoder of that type."""
    head = {"head_dim": 8} if kind.startswith(("gemma", "qwen3")) else {}
    return {**_llama_like(), "model_type": kind, **head, **more}


def _tower(kind: str, **more: Any) -> Sizes:
    """Sizes of a tower of that type."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return {"model_type": kind, **sizes, **more}


def _pixels(*lead: int, size: int = 28) -> Draw:
    """Of each of two samples one image."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(2, *lead, 3, size, size, generator=generator)}

    return draw


_PICTURES = _pixels()


def _crops(generator: torch.Generator) -> dict[str, Tensor]:
    """LLaVA-OneVision's: the image, and what it is cut into."""
    sizes = torch.tensor([[28, 28]] * 2)
    return {**_pixels(2)(generator), "image_sizes": sizes}


def _sized(generator: torch.Generator) -> dict[str, Tensor]:
    return {**_pixels()(generator), "image_sizes": torch.tensor([[28, 28]] * 2)}


def _patches(generator: torch.Generator) -> dict[str, Tensor]:
    """Qwen's: the patches of all images, one after the other."""
    return {
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _tiles(generator: torch.Generator) -> dict[str, Tensor]:
    """Mllama's: one tile of an image, which every token of its text sees."""
    return {
        **_pixels(1, 1)(generator),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.int64),
        "cross_attention_mask": torch.ones(2, 8, 1, 1, dtype=torch.int64),
    }


@dataclass(frozen=True)
class Vlm:
    """A model that sees: its class, the configs of its parts, what it is given for an image, how
    many tokens that is in its text, and where its decoder and its tower are."""

    model: str
    text: Sizes
    vision: Sizes
    more: Sizes = field(default_factory=dict)
    image: Draw = _PICTURES
    tokens: int = 4
    decoder: str = "model.language_model."
    tower: str = "model.vision_tower."
    index: str = "image_token_id"

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, in evaluation mode."""
        import transformers

        prefix = self.model.removesuffix("ForConditionalGeneration")
        config = getattr(transformers, f"{prefix}Config")(
            text_config=dict(self.text),
            vision_config=dict(self.vision),
            **{self.index: IMAGE, **self.more},
        )
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, self.model)(config)
        return _visible(model).to(dtype).eval()

    def batch(self, seed: int = 0, length: int = 7) -> dict[str, Tensor]:
        """A text behind an image, and one around it."""
        generator = torch.Generator().manual_seed(seed)
        said = torch.randint(5, VOCABULARY - 8, (2, length), generator=generator)
        seen = torch.full((1, self.tokens), IMAGE)
        around = (said[1:, :-2], seen, said[1:, -2:])
        ids = torch.cat((torch.cat((seen, said[:1]), 1), torch.cat(around, 1)))
        labels = torch.where(ids == IMAGE, -100, ids)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if self.model.startswith(("Qwen", "Gemma3", "PaliGemma")):
            name = "mm_token_type_ids" if self.model.startswith("Qwen") else "token_type_ids"
            given[name] = (ids == IMAGE).long()
        return given | self.image(generator)


@dataclass(frozen=True)
class Plain:
    """A model of one kind of layers: its class, its config, and what it is given."""

    model: str
    config: str
    sizes: Sizes
    given: Draw | None = None  # ids with their labels where it is None

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, in evaluation mode."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.sizes)
        model: nn.Module = getattr(transformers, self.model)(config)
        return _visible(model).to(dtype).eval()

    def batch(self, seed: int = 0, length: int = 7) -> dict[str, Tensor]:
        """Two samples of ids, or what the model is given in their place."""
        generator = torch.Generator().manual_seed(seed)
        if self.given is not None:
            return self.given(generator)
        ids = torch.randint(5, VOCABULARY - 8, (2, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _visible(model: nn.Module) -> nn.Module:
    """Weights with which every part matters: some start at zero, or too near to it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.7)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN: Sizes = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_QWEN_TOWER: Sizes = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
_LLAVA = "LlavaForConditionalGeneration"

VLMS = {
    "llava-mistral": Vlm(
        _LLAVA, _text("mistral"), _tower("clip_vision_model"), {"vision_feature_layer": -1}
    ),
    "llava-qwen2": Vlm(
        _LLAVA, _text("qwen2"), _tower("clip_vision_model"), {"vision_feature_layer": -1}
    ),
    "llava-pixtral": Vlm(
        _LLAVA,
        _text("mistral"),
        _tower("pixtral"),
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        image=_sized,
    ),
    "llava-onevision": Vlm(
        "LlavaOnevisionForConditionalGeneration",
        _text("qwen2"),
        _tower("siglip_vision_model", vision_use_head=False),
        {
            "image_grid_pinpoints": [[28, 28]],
            "vision_feature_layer": -1,
            "video_token_id": VIDEO,
            "vision_feature_select_strategy": "full",
        },
        image=_crops,
        tokens=10,
    ),
    "paligemma2": Vlm(
        "PaliGemmaForConditionalGeneration",
        _text("gemma2", sliding_window=4),
        _tower("siglip_vision_model", vision_use_head=False),
        {"projection_dim": WIDTH},
    ),
    "gemma3": Vlm(
        "Gemma3ForConditionalGeneration",
        _text("gemma3_text", sliding_window=4),
        _tower("siglip_vision_model", vision_use_head=False),
        {"mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END},
        index="image_token_index",
    ),
    "qwen2-vl": Vlm(
        "Qwen2VLForConditionalGeneration",
        _text("qwen2_vl_text", rope_parameters=_MROPE),
        {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2},
        _QWEN,
        image=_patches,
        tower="model.visual.",
    ),
    "qwen2.5-vl": Vlm(
        "Qwen2_5_VLForConditionalGeneration",
        _text("qwen2_5_vl_text", rope_parameters=_MROPE),
        {
            **_QWEN_TOWER,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        _QWEN,
        image=_patches,
        tower="model.visual.",
    ),
    "qwen3-vl": Vlm(
        "Qwen3VLForConditionalGeneration",
        _text("qwen3_vl_text", rope_parameters=_MROPE | {"mrope_interleaved": True}),
        {
            **_QWEN_TOWER,
            "intermediate_size": 24,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        _QWEN,
        image=_patches,
        tower="model.visual.",
    ),
    "internvl3": Vlm(
        "InternVLForConditionalGeneration",
        _text("qwen2"),
        _tower("internvl_vision", image_size=[56, 56], patch_size=[14, 14]),
        {"downsample_ratio": 0.5},
        image=_pixels(size=56),
    ),
    "smolvlm2": Vlm(
        "SmolVLMForConditionalGeneration",
        _text("llama"),
        _tower("smolvlm_vision"),
        {"scale_factor": 2, "pad_token_id": 0},
        image=_pixels(1),
        tokens=1,
        decoder="model.text_model.",
        tower="model.vision_model.",
    ),
    "idefics3": Vlm(
        "Idefics3ForConditionalGeneration",
        _text("llama"),
        _tower("idefics3_vision"),
        {"scale_factor": 2, "pad_token_id": 0},
        image=_pixels(1),
        tokens=1,
        decoder="model.text_model.",
        tower="model.vision_model.",
    ),
    "mllama": Vlm(
        "MllamaForConditionalGeneration",
        _text("mllama_text_model", cross_attention_layers=[1]),
        _tower(
            "mllama_vision_model",
            num_global_layers=1,
            attention_heads=2,
            max_num_tiles=1,
            supported_aspect_ratios=[[1, 1]],
            vision_output_dim=32,
            intermediate_layers_indices=[0],
        ),
        image=_tiles,
        tokens=1,
        tower="model.vision_model.",
        index="image_token_index",
    ),
}


def _caption(generator: torch.Generator) -> dict[str, Tensor]:
    """CLIP's: as many texts as images."""
    ids = torch.randint(5, VOCABULARY - 8, (2, 7), generator=generator)
    return {"input_ids": ids, **_pixels()(generator)}


def _flat(generator: torch.Generator) -> dict[str, Tensor]:
    """SigLIP 2's: the patches of each image, of which the second has fewer."""
    mask = torch.ones(2, 4, dtype=torch.int64)
    mask[1, 2:] = 0
    return {
        "pixel_values": torch.randn(2, 4, 3 * 14 * 14, generator=generator),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[2, 2], [1, 2]]),
    }


def _tower_of(kind: str) -> Sizes:
    sizes = _tower(kind)
    sizes.pop("model_type")
    return sizes


def _decoder(kind: str, **more: Any) -> Sizes:
    sizes = _text(kind, **more)
    sizes.pop("model_type")
    return sizes


PLAIN = {
    "llama": Plain("LlamaForCausalLM", "LlamaConfig", _decoder("llama")),
    "mistral": Plain("MistralForCausalLM", "MistralConfig", _decoder("mistral", sliding_window=4)),
    "qwen2": Plain("Qwen2ForCausalLM", "Qwen2Config", _decoder("qwen2")),
    "qwen3": Plain("Qwen3ForCausalLM", "Qwen3Config", _decoder("qwen3")),
    "gemma2": Plain("Gemma2ForCausalLM", "Gemma2Config", _decoder("gemma2", sliding_window=4)),
    "gemma3-text": Plain(
        "Gemma3ForCausalLM", "Gemma3TextConfig", _decoder("gemma3_text", sliding_window=4)
    ),
    "phi3": Plain("Phi3ForCausalLM", "Phi3Config", _decoder("phi3", num_key_value_heads=4)),
    "phi3-grouped": Plain("Phi3ForCausalLM", "Phi3Config", _decoder("phi3")),
    "clip": Plain(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_tower("clip_text_model"), "vocab_size": VOCABULARY},
            "vision_config": _tower("clip_vision_model", hidden_size=24),
            "projection_dim": 8,
        },
        _caption,
    ),
    "clip-vision": Plain(
        "CLIPVisionModel", "CLIPVisionConfig", _tower_of("clip_vision_model"), _pixels()
    ),
    "siglip2-vision": Plain(
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        {**_tower_of("siglip2_vision_model"), "num_patches": 4, "vision_use_head": False},
        _flat,
    ),
    "dinov3": Plain(  # whose positions are drawn in training, by default
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**_tower_of("dinov3_vit"), "pos_embed_rescale": None},
        _pixels(),
    ),
    "vit": Plain("ViTForImageClassification", "ViTConfig", _tower_of("vit"), _pixels()),
}
FAMILIES: dict[str, Vlm | Plain] = {**VLMS, **PLAIN}


def read(out: Any) -> tuple[Tensor, Tensor]:
    """What a model's task reads, and a loss."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        value = out.get(name)
        if isinstance(value, Tensor):
            loss = out.get("loss")
            return value, value.square().mean() if loss is None else loss
    raise AssertionError(list(out))
