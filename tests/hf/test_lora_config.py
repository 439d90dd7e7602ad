"""LoraConfig: what its fields may be, and PEFT's rules of matching, written down."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch

import petal_kernels as pk
from petal_kernels.hf.linears import in_layers, is_named, of_pattern
from tests.hf import tiny_text
from tests.hf.lora_places import places

# -- fields ---------------------------------------------------------------------------------------


def test_defaults_are_pefts() -> None:
    config = pk.LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 8, 0.0, "none")
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
    assert config.init_lora_weights is True
    assert config.use_rslora is False
    assert config.parts == ("language",)
    given = pk.LoraConfig(
        target_modules={"v_proj", "q_proj"},  # type: ignore[arg-type]
        layers_to_transform=(1, 2),  # type: ignore[arg-type]
        layers_pattern="layers",
        rank_pattern={"q_proj": 4},
        parts=["vision", "language"],  # type: ignore[arg-type]
    )
    assert given.target_modules == ["q_proj", "v_proj"]
    assert given.parts == ("language", "vision")
    assert pk.LoraConfig.from_dict(given.to_dict()) == given


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ([5, 2], [5, 2]),
        ((5, 2), [5, 2]),
        ({9, 2}, [2, 9]),  # which a small set holds in another order
        ({"wte": (5, 2), "head": [1]}, {"wte": [5, 2], "head": [1]}),
    ],
    ids=str,
)
def test_tokens_are_lists(value: Any, want: Any) -> None:
    config = pk.LoraConfig(trainable_token_indices=value)
    assert config.trainable_token_indices == want
    assert config.trainable_token_indices is not value
    assert pk.LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == (
        config.to_dict() | {"parts": ("language",)}
    )


FIELD = "trainable_token_indices"
WANTED = (
    f"{FIELD}: want None, a non-empty list of tokens >= 0, each once, or a dict of names and such "
    "lists, got "
)
NO_TOKENS: list[Any] = [3, [], [3, 3], [-1], [True], ["3"], {}, {"a": []}, {1: [2]}, {"a": [1, 1]}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: want an integer >= 1, got 0"),
        ({"lora_alpha": "16"}, "lora_alpha: want a finite number, got '16'"),
        ({"lora_dropout": 1.0}, "lora_dropout: want a number with 0 <= lora_dropout < 1, got 1.0"),
        ({"variant": "release"}, "variant: want 'paper', LoRA has no other, got 'release'"),
        ({"use_rslora": 1}, "use_rslora: want a bool, got 1"),
        ({"use_dora": 1}, "use_dora: want a bool, got 1"),
        *(({FIELD: value}, WANTED + repr(value)) for value in NO_TOKENS),
        ({"bias": "some"}, "bias: want one of ('none', 'all', 'lora_only'), got 'some'"),
        (
            {"init_lora_weights": "eva"},
            "init_lora_weights: want one of (True, False, 'gaussian', 'pissa', 'pissa_niter_N', "
            "'olora') (N a number), got 'eva'",
        ),
        ({"init_lora_weights": 1}, "init_lora_weights: want one of"),
        ({"target_modules": "("}, "target_modules: want a regular expression or a list of names"),
        ({"exclude_modules": "("}, "exclude_modules: want a regular expression"),
        ({"exclude_modules": []}, "exclude_modules: want None or a non-empty list"),
        ({"layers_to_transform": []}, "layers_to_transform: want None, a layer's number or a list"),
        ({"layers_to_transform": [1.0]}, "layers_to_transform: want None, a layer's number or a"),
        (
            {"target_modules": "all-linear", "layers_to_transform": 1},
            "layers_to_transform: want None where target_modules is one string, got 1",
        ),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "h"},
            "layers_pattern: want None without layers_to_transform, got ['h']",
        ),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: want a dict of names and integers >= 1"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern: want a regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: want a dict of names and numbers, got ["),
        ({"parts": "vision"}, "parts: want a non-empty list of names among"),
        ({"parts": ["audio"]}, "parts: want a non-empty list of names among"),
        ({"parts": ["vision"]}, "parts: want ('language',) where target_modules is None"),
        ({"adapter_dtype": "float16"}, "adapter_dtype: want one of"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: want None or a non-empty list"),
    ],
    ids=str,
)
def test_refusals_name_the_field(values: dict[str, Any], message: str) -> None:
    if values.get("layers_pattern") == "h":
        message = message.replace("['h']", "'h'")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pk.LoraConfig(**values)


# -- PEFT's rules of matching, written down -------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names", "want"),
    [
        ("model.layers.0.q_proj", ["q_proj"], True),
        ("q_proj", ["q_proj"], True),
        ("model.layers.0.seq_proj", ["q_proj"], False),
        ("model.layers.0.q_proj", ["layers.0.q_proj"], True),
        ("model.layers.10.q_proj", ["0.q_proj"], False),
        ("model.layers.0.q_proj.inner", ["q_proj"], False),
        ("model.layers.0.q_proj", r".*\.q_proj", True),
        ("model.layers.0.q_proj", r"\.q_proj", False),
        ("model.layers.0.q_proj", "q_proj", False),
        ("q_proj", "q_proj", True),
    ],
)
def test_names_match_ends_of_paths_and_an_expression_all_of_one(
    path: str, names: Any, want: bool
) -> None:
    assert is_named(path, names) is want


@pytest.mark.parametrize(
    ("path", "layers", "pattern", "want"),
    [
        ("model.layers.1.attn.q", 1, None, True),
        ("model.layers.1.attn.q", [0, 2], None, False),
        ("model.layers.12.attn.q", [1, 2], None, False),
        ("model.layers.1.experts.3.q", 3, None, True),  # the last number
        ("model.layers.1.experts.3.q", 1, "layers", True),
        ("model.layers.1.experts.3.q", 1, ["h", "layers"], True),
        ("model.h.1.q", 1, ["layers"], False),
        ("layers.1.attn.q", 1, None, False),  # PEFT wants something in front
        ("model.q", 1, None, False),
        ("exact.q", 1, None, True),  # a whole path is meant wherever it is
    ],
)
def test_layers_are_numbers_behind_a_name(path: str, layers: Any, pattern: Any, want: bool) -> None:
    config = pk.LoraConfig(
        target_modules=["q", "exact.q"], layers_to_transform=layers, layers_pattern=pattern
    )
    assert in_layers(path, config) is want


@pytest.mark.parametrize(
    ("patterns", "want"),
    [
        ({}, 8),
        ({"q_proj": 4}, 4),
        ({"attn.q_proj": 4}, 4),
        ({"eq_proj": 4, "q_proj": 5}, 5),
        ({"proj": 4}, 8),  # an end behind a dot
        ({".*proj": 4}, 4),
        ({"^model.layers.0.attn.q_proj": 4}, 4),
        ({r"layers\.[0-3]\.attn\.q_proj": 4, "q_proj": 5}, 4),  # the first that matches
        ({"attn": 4}, 8),
    ],
    ids=str,
)
def test_patterns_match_the_end_of_a_path(patterns: dict[str, int], want: int) -> None:
    assert of_pattern(patterns, "model.layers.0.attn.q_proj", 8) == want


def test_ranks_and_scales_follow_their_patterns() -> None:
    model = tiny_text.build("llama", torch.float32)
    config = pk.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 3, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"layers.0.self_attn.*": 5},
    )
    for rslora in (False, True):
        config.use_rslora = rslora
        attachment = pk.attach(model, config)
        found = {
            name: (m.r, m.scale)
            for name, m in attachment.adapter.named_modules()
            if isinstance(m, pk.nn.LoRALinear)
        }
        sizes = {
            "0.self_attn.q_proj": (4, 5),
            "0.self_attn.v_proj": (3, 5),
            "1.self_attn.q_proj": (2, 6),
            "1.self_attn.v_proj": (3, 6),
        }
        assert found == {
            f"model.layers.{name}": (r, alpha / (math.sqrt(r) if rslora else r))
            for name, (r, alpha) in sizes.items()
        }
        attachment.detach()


def test_layers_and_exclusions_leave_out() -> None:
    model = tiny_text.build("llama", torch.float32)
    q, v = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"], "v_proj"
    assert places(model, target_modules=["q_proj"]) == q
    assert places(model, target_modules=["q_proj"], layers_to_transform=1) == q[1:]
    assert places(model, target_modules=["q_proj"], layers_to_transform=[0, 7]) == q[:1]
    assert places(model, target_modules=r".*\.1\.self_attn\.q_proj") == q[1:]
    assert places(model, target_modules=["q_proj", v], exclude_modules=[v]) == q
    assert places(model, target_modules="ALL-linear", exclude_modules=r".*(mlp|[kvo]_proj).*") == q
    with pytest.warns(UserWarning, match=r"exclude_modules=\['x'\] leaves out nothing"):
        places(model, target_modules=["q_proj"], exclude_modules=["x"])
    with pytest.raises(ValueError, match=r"layers_to_transform=5, .*none is left of 2"):
        places(model, target_modules=["q_proj"], layers_to_transform=5)
