"""PetalConfig: defaults of the variants, refusals, and the dictionary form."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import petal_kernels as pk


def test_defaults_are_the_published_ones() -> None:
    config = pk.PetalConfig()
    assert (config.r, config.variant, config.dropout, config.scale) == (64, "paper", 0.1, 1.0)
    assert (config.core, config.context, config.use_cross_residual) == ("cp", "none", True)
    release = pk.PetalConfig(variant="release")
    assert (release.core, release.context) == ("tucker", "batch")
    assert release.use_cross_residual is False
    assert pk.PetalConfig(variant="release", core="cp").core == "cp"
    assert not hasattr(config, "experts")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: want an integer >= 1, got 0"),
        ({"r": -3}, "r: want an integer >= 1, got -3"),
        ({"r": 2.0}, "r: want an integer >= 1, got 2.0"),
        ({"r": True}, "r: want an integer >= 1, got True"),
        ({"variant": "v2"}, "variant: want one of ('paper', 'release'), got 'v2'"),
        ({"core": "full"}, "core: want one of ('cp', 'tucker'), got 'full'"),
        ({"dropout": 1.0}, "dropout: want a number with 0 <= dropout < 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: want a number with 0 <= dropout < 1, got -0.1"),
        ({"dropout": "0.1"}, "dropout: want a number with 0 <= dropout < 1, got '0.1'"),
        ({"scale": float("nan")}, "scale: want a finite number, got nan"),
        ({"context": "mean"}, "context: want one of ('none', 'batch'), got 'mean'"),
        ({"use_cross_residual": 1}, "use_cross_residual: want a bool, got 1"),
        ({"adapter_dtype": "float16"}, "adapter_dtype: want one of"),
        ({"adapter_dtype": torch.float16}, "adapter_dtype: want one of"),
        ({"target_modules": []}, "target_modules: want None or a non-empty list of module names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: want None or a non-empty list"),
    ],
    ids=str,
)
def test_refusals_name_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pk.PetalConfig(**values)


def test_dictionary_round_trip() -> None:
    config = pk.PetalConfig(
        r=8, variant="release", adapter_dtype=torch.bfloat16, target_modules={"query", "key"}
    )
    assert config.adapter_dtype == "bfloat16"
    assert config.dtype is torch.bfloat16
    assert config.target_modules == ["key", "query"]
    assert pk.PetalConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"got unknown \['alpha'\]"):
        pk.PetalConfig.from_dict({"r": 8, "alpha": 1})
