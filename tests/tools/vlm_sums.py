"""Parameters of vision-language models summed up by hand from the values of their configs."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def decoder(t: Values, tied: bool, bias: bool = False, norms: int = 2, qk: bool = False) -> int:
    """Embeddings, layers, the last norm and, unless it is tied, the head."""
    width, inner, layers = t["hidden_size"], t["intermediate_size"], t["num_hidden_layers"]
    heads, pairs = t["num_attention_heads"], t["num_key_value_heads"]
    head = t.get("head_dim") or width // heads
    of_q, of_kv = heads * head, pairs * head
    attention = width * (of_q + 2 * of_kv) + of_q * width
    attention += of_q + 2 * of_kv if bias else 0
    attention += 2 * head if qk else 0
    layer = attention + 3 * width * inner + norms * width
    words = t["vocab_size"] * width
    return words + layers * layer + width + (0 if tied else words)


def encoder(v: Values, kind: str) -> int:
    """CLIP's, SigLIP's (and Idefics3's) or InternVL's tower."""
    width, inner = v["hidden_size"], v["intermediate_size"]
    side, patch = (s[0] if isinstance(s, list) else s for s in (v["image_size"], v["patch_size"]))
    places = (side // patch) ** 2
    layer = 4 * (width * width + width) + 4 * width + 2 * width * inner + inner + width
    pixels = 3 * patch * patch * width
    if kind == "clip":  # a class, norms before and after, no bias of the patches
        around = pixels + width + (places + 1) * width + 4 * width
    elif kind == "siglip":
        around = pixels + width + places * width + 2 * width
    else:  # a class and two scales in each layer
        layer += 2 * width
        around = pixels + width + width + (places + 1) * width
    return v["num_hidden_layers"] * layer + around


def pixtral(v: Values) -> int:
    width, inner = v["hidden_size"], v["intermediate_size"]
    layer = 4 * width * width + 3 * width * inner + 2 * width
    return v["num_hidden_layers"] * layer + 3 * v["patch_size"] ** 2 * width + width


def qwen_merger(width: int, out: int, norm: int) -> int:
    return norm + (4 * width) ** 2 + 4 * width + 4 * width * out + out


def qwen2_tower(v: Values) -> int:
    width, out = v["embed_dim"], v["hidden_size"]
    inner = width * v["mlp_ratio"]
    layer = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
    pixels = 3 * 2 * v["patch_size"] ** 2 * width
    return v["depth"] * layer + pixels + qwen_merger(width, out, 2 * width)


def qwen25_tower(v: Values) -> int:
    width, inner = v["hidden_size"], v["intermediate_size"]
    layer = 4 * width * width + 4 * width + 3 * width * inner + 2 * inner + width + 2 * width
    pixels = 3 * 2 * v["patch_size"] ** 2 * width
    return v["depth"] * layer + pixels + qwen_merger(width, v["out_hidden_size"], width)


def qwen3_tower(v: Values) -> int:
    width, inner, out = v["hidden_size"], v["intermediate_size"], v["out_hidden_size"]
    layer = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
    pixels = 3 * 2 * v["patch_size"] ** 2 * width + width
    deep = len(v["deepstack_visual_indexes"]) * qwen_merger(width, out, 8 * width)
    places = v["num_position_embeddings"] * width
    return v["depth"] * layer + pixels + places + qwen_merger(width, out, 2 * width) + deep


def two_linears(width: int, out: int) -> int:
    return width * out + out + out * out + out


def llava(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    tower = pixtral(v) if v["model_type"] == "pixtral" else encoder(v, "clip")
    return decoder(t, tied=False) + tower + two_linears(v["hidden_size"], t["hidden_size"])


def onevision(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    width = t["hidden_size"]
    between = two_linears(v["hidden_size"], width) + width  # and the end of a row
    return decoder(t, tied=False, bias=True) + encoder(v, "siglip") + between


def paligemma2(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    between = v["hidden_size"] * t["hidden_size"] + t["hidden_size"]
    return decoder(t, tied=True, norms=4) + encoder(v, "siglip") + between


def gemma3(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    between = v["hidden_size"] * t["hidden_size"] + v["hidden_size"]
    return decoder(t, tied=True, norms=4, qk=True) + encoder(v, "siglip") + between


def qwen2_vl(c: Values) -> int:
    return decoder(c, c["tie_word_embeddings"], bias=True) + qwen2_tower(c["vision_config"])


def qwen25_vl(c: Values) -> int:
    return decoder(c, c["tie_word_embeddings"], bias=True) + qwen25_tower(c["vision_config"])


def qwen3_vl(c: Values) -> int:
    return decoder(c["text_config"], tied=True, qk=True) + qwen3_tower(c["vision_config"])


def internvl(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    joined, width = 4 * v["hidden_size"], t["hidden_size"]
    between = 2 * joined + two_linears(joined, width)
    return decoder(t, tied=False, bias=True) + encoder(v, "internvl") + between


def idefics3(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    between = v["hidden_size"] * c["scale_factor"] ** 2 * t["hidden_size"]
    return decoder(t, tied=False) + encoder(v, "siglip") + between


def mllama(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    width, inner, seen = t["hidden_size"], t["intermediate_size"], len(t["cross_attention_layers"])
    head = width // t["num_attention_heads"]
    # A layer that sees has q and k norms and two gates besides; eight words more are read only.
    text = decoder(t, tied=False) + seen * (2 * head + 2) + 8 * width
    eye, deep = v["hidden_size"], v["intermediate_size"]
    layer = 4 * eye * eye + 2 * eye * deep + deep + eye + 4 * eye
    layers = (v["num_hidden_layers"] + v["num_global_layers"]) * layer + 2 * v["num_global_layers"]
    places = (v["image_size"] // v["patch_size"]) ** 2 + 1
    ratios, tiles = len(v["supported_aspect_ratios"]) + 1, v["max_num_tiles"]
    around = 3 * v["patch_size"] ** 2 * eye + eye + 4 * eye  # patches, class, two norms
    around += places * eye + ratios * tiles * places * eye + 1
    around += 2 * (ratios * tiles * eye + 1)
    assert inner
    return text + layers + around + v["vision_output_dim"] * width + width


def mistral3(c: Values) -> int:
    t, v = c["text_config"], c["vision_config"]
    eye, width = v["hidden_size"], t["hidden_size"]
    between = eye + 4 * eye * eye + eye * width + width * width
    return decoder(t, tied=False) + pixtral(v) + between
