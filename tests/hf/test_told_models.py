"""Models whose layers say what they are made of: which are adapted, left and said, or refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import petal_kernels as pk
from tests.hf import tiny_text
from tests.hf.tiny_vlms import FAMILIES, VLMS

_SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}


def _made(kind: str, **sizes: Any) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(kind, **sizes)
    model: nn.Module = transformers.AutoModel.from_config(config)
    return model


def neox() -> nn.Module:
    return _made("gpt_neox", **_SMALL, intermediate_size=40, num_attention_heads=4)


def mbart() -> nn.Module:
    return _made("mbart", vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1)


def opt() -> nn.Module:
    return _made("opt", **_SMALL, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=32)


@pytest.mark.parametrize(
    ("build", "config", "why"),
    [
        (neox, pk.RoutingConfig(r=2), "GPTNeoXLayer: attention: 'query_key_value' does not give"),
        (mbart, pk.RoutingConfig(r=2), "MBartDecoderLayer: it has 2 attentions, self_attn, encod"),
        (opt, pk.RoutingConfig(r=2, kind="adapter", target_modules=["decoder.ffn"]), "match noth"),
        (FAMILIES["vit"].build, pk.VLPetConfig(r=2), "want a module whose config.model_type is"),
        (FAMILIES["llama"].build, pk.PetalConfig(r=2), "want a module whose config.model_type is"),
        (FAMILIES["clip"].build, pk.AuroraConfig(r=2), "want a module whose config.model_type is"),
    ],
)
def test_a_model_without_what_a_method_needs_is_refused_with_the_reason(
    build: Any, config: Any, why: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        pk.attach(build(), config)


def test_no_route_where_nothing_reads_hidden_states() -> None:
    model: Any = VLMS["mllama"].build()
    layers = model.model.language_model.layers
    for name in ("q_proj", "k_proj", "v_proj"):
        for attention in (layers[0].self_attn, layers[1].cross_attn):
            linear = getattr(attention, name)
            linear.in_features += 1
    with pytest.raises(ValueError, match=r"want places that 'routing' can adapt .* got none"):
        pk.attach(model, pk.RoutingConfig(r=2, function="mul"))


def test_layers_that_are_left_are_said() -> None:
    """The kind: a model of two kinds of layers, half of which trains nothing."""
    model: Any = tiny_text.build("llama", torch.float32)
    model.model.layers[1].self_attn = nn.Linear(32, 32)
    with pytest.warns(UserWarning, match=r"left as they are: 1 layers, model.layers.1 first, a L"):
        attachment = pk.attach(model, pk.RoutingConfig(r=2))
    assert "it has no attention" in str(attachment.report())


def test_a_tower_in_front_of_a_decoder_is_left() -> None:
    """Of a module of one's own the tower may be met first: it encodes what the decoder reads."""
    model: Any = torch.nn.Module()
    model.tower, model.text = FAMILIES["vit"].build(), tiny_text.build("gpt2")
    found = pk.attach(model, pk.RoutingConfig(r=2)).found
    assert {place.path.partition(".")[0] for place in found.places} == {"text"}


def test_an_encoder_beside_a_decoder_is_left_and_said() -> None:
    model: Any = tiny_text.build("llama", torch.float32)
    model.ears = FAMILIES["vit"].build()
    with pytest.warns(UserWarning, match=r"left as it is: ears\..* beside the decoder"):
        attachment = pk.attach(model, pk.RoutingConfig(r=2))
    assert {row.module.partition(".")[0] for row in attachment.report().rows} == {"model"}


def test_layers_are_numbered_through_all_stacks() -> None:
    """Their numbers are names in the adapter's files."""
    model: Any = tiny_text.build("llama", torch.float32)
    model.more = tiny_text.build("llama", torch.float32).model
    attachment = pk.attach(model, pk.RoutingConfig(r=2))
    assert [layer.index for layer in attachment.found.layers] == [0, 1, 2, 3]


def test_a_norm_of_heads_is_not_the_layer_s_width() -> None:
    attachment = pk.attach(FAMILIES["qwen3"].build(), pk.RoutingConfig(r=2, kind="adapter"))
    assert attachment.method.width() == tiny_text.WIDTH


def test_a_tower_alone_is_adapted() -> None:
    model: Any = VLMS["qwen2.5-vl"].build()
    tower = model.model.visual
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rest of the model stays trainable
        attachment = pk.attach(tower, pk.RoutingConfig(r=2))
    assert [row.module for row in attachment.report().rows] == [
        f"blocks.{n}.attn.qkv" for n in range(2)
    ]
    patches, grid = torch.randn(16, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 4]])
    tower(patches, grid).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in attachment.parameters())


# -- an image's tokens ----------------------------------------------------------------------------


def _domains(family: str, **config: Any) -> Any:
    config = {"r": 2, "experts": 2, "gate": "domain", **config}
    return pk.attach(FAMILIES[family].build(), pk.ExpertConfig(**config))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"input_ids": torch.ones(2, 3)}, TypeError, "input_ids: want"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, ValueError, "input_ids: want shape [B, "),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "text": 2}, ValueError, "text: want a"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "image": 1.0}, ValueError, "image: wa"),
    ],
)
def test_image_domains_refuses_by_name(given: Any, error: type, message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        _domains("llava-qwen2").image_domains(**given)


def test_a_model_without_an_image_among_its_text_has_no_image_domains() -> None:
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^model: want a model whose config says which tokens"):
        _domains("llama").image_domains(ids)
    attachment = pk.attach(tiny_text.build("t5"), pk.ExpertConfig(experts=2, r=2, gate="domain"))
    with pytest.raises(ValueError, match=r"^image_domains: want a decoder that reads an image amo"):
        attachment.image_domains(ids)
    attachment = pk.attach(FAMILIES["llama"].build(), pk.ExpertConfig(experts=2, r=2))
    with pytest.raises(ValueError, match=r"^image_domains: want a config with gate='domain'"):
        attachment.image_domains(ids)


def test_a_video_s_tokens_are_an_image_s_too() -> None:
    model = VLMS["qwen3-vl"].build()
    attachment = pk.attach(model, pk.ExpertConfig(r=2, experts=3, gate="domain"))
    ids = torch.tensor([[5, 59, 58, 7]])
    with attachment.image_domains(ids, image=2, text=1):
        model(inputs_embeds=torch.randn(1, 4, 32), use_cache=False)
    usage = next(iter(attachment.expert_usage().values()))
    torch.testing.assert_close(usage, torch.tensor([0.0, 0.5, 0.5]))


def test_pooling_over_tiles_is_refused() -> None:
    """The kind: one choice for a tile, or over its padding, where it is one for a sample."""
    model = VLMS["mllama"].build()
    pk.attach(model, pk.ExpertConfig(r=2, experts=2, router_input="pooled"))
    features = torch.randn(4, 3, 32)
    text: Any = model.get_submodule("model.language_model")
    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"router_input='pooled': want one row for every sample"):
        text(input_ids=ids, cross_attention_states=features)


def test_features_that_cross_attention_reads_are_an_image_s() -> None:
    model, values = VLMS["mllama"].build(), VLMS["mllama"].batch()
    attachment = pk.attach(model, pk.ExpertConfig(r=2, experts=2, gate="domain"))
    with attachment.image_domains(values["input_ids"]):
        model(**values)
    for path, usage in attachment.expert_usage().items():
        want = [1.0, 0.0] if path.endswith("cross_attn.v_proj") else [0.0, 1.0]
        torch.testing.assert_close(usage, torch.tensor(want))
