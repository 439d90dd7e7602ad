"""Configs: defaults of the variants, refusals, and the dictionary form."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from typing import Any

import numpy as np
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
    assert (config.experts, config.gate, config.tokens) == (0, "softmax", "text")
    assert (release.gate, release.tokens, release.keep, release.mix) == ("mean", "all", None, 0.4)


@pytest.mark.parametrize(
    ("variant", "core", "layout"),
    [("paper", "cp", "blocks"), ("release", "tucker", "aurora_release")],
)
def test_auroras_variant_fills_core_and_layout(variant: str, core: str, layout: Any) -> None:
    config = pk.AuroraConfig(variant=variant)
    assert (config.core, config.layout) == (core, layout)
    for given in ("blocks", "aurora_release"):
        assert pk.AuroraConfig(variant=variant, layout=given).layout == given
    assert pk.AuroraConfig.from_dict(config.to_dict()) == config


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
        ({"experts": -1}, "experts: want an integer >= 0, got -1"),
        ({"gate": "domain"}, "gate: want one of ('softmax', 'mean'), got 'domain'"),
        ({"experts": 2, "top_k": 3}, "top_k: want None or an integer from 1 to experts=2, got 3"),
        (
            {"variant": "release", "experts": 2, "top_k": 1},
            "top_k: want None with gate='mean', got 1",
        ),
        ({"router_noise": -0.5}, "router_noise: want a finite number >= 0, got -0.5"),
        ({"tokens": "image"}, "tokens: want one of ('text', 'all'), got 'image'"),
        ({"expert_init": "identity", "keep": 0.6}, "keep: want None or 1, got 0.6"),
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": 0}, "experts: want an integer >= 1, got 0"),
        ({"kind": "prefix"}, "kind: want one of ('lora', 'adapter'), got 'prefix'"),
        ({"kind": "adapter", "alpha": 8}, "alpha: want None with kind='adapter', got 8"),
        ({"scale": 2.0}, "scale: want 1.0 with kind='lora' (alpha scales it), got 2.0"),
        (
            {"gate": "domain", "router_input": "pooled"},
            "router_input: want 'token' with gate='domain', got 'pooled'",
        ),
        ({"top_k": True}, "top_k: want None or an integer from 1 to experts=4, got True"),
        ({"shared_down": 1}, "shared_down: want a bool, got 1"),
    ],
    ids=str,
)
def test_refusals_of_experts(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pk.ExpertConfig(**values)


def test_dictionary_round_trip() -> None:
    config = pk.PetalConfig(
        r=8,
        variant="release",
        adapter_dtype=torch.bfloat16,  # type: ignore[arg-type]
        target_modules={"query", "key"},  # type: ignore[arg-type]
    )
    assert config.adapter_dtype == "bfloat16"
    assert config.dtype is torch.bfloat16
    assert config.target_modules == ["key", "query"]
    assert pk.PetalConfig.from_dict(config.to_dict()) == config
    experts = pk.ExpertConfig(kind="adapter", gate="softmax", top_k=2, router_input="pooled")
    assert pk.ExpertConfig.from_dict(experts.to_dict()) == experts
    with pytest.raises(ValueError, match=r"got unknown \['alpha'\]"):
        pk.PetalConfig.from_dict({"r": 8, "alpha": 1})


def test_numpys_numbers_are_numbers_and_stored_as_pythons() -> None:
    """The kind: values of a sweep, which are numpy's, and which json does not know."""
    config = pk.PetalConfig(
        r=np.int64(8),  # type: ignore[arg-type]
        dropout=np.float32(0.25),  # type: ignore[arg-type]
        scale=np.int32(2),  # type: ignore[arg-type]
        scale_shift=np.bool_(False),  # type: ignore[arg-type]
        experts=np.uint8(2),  # type: ignore[arg-type]
        keep=np.float64(0.5),
        variant=np.str_("release"),
        target_modules=[np.str_("query")],
    )
    want = pk.PetalConfig(
        r=8,
        dropout=0.25,
        scale=2,
        scale_shift=False,
        experts=2,
        keep=0.5,
        variant="release",
        target_modules=["query"],
    )
    assert json.dumps(config.to_dict()) == json.dumps(want.to_dict())
    assert {type(v).__module__ for v in config.to_dict().values()} == {"builtins"}
    assert type(config.target_modules[0]) is str  # type: ignore[index]
    bools = {name: np.bool_(True) for name in ("share", "train_bias", "train_norms", "residual")}
    routing = pk.RoutingConfig(alpha=np.float16(6), **bools)  # type: ignore[arg-type]
    assert json.loads(json.dumps(routing.to_dict()))["alpha"] == 6.0
    experts = pk.ExpertConfig(top_k=np.int16(2), router_noise=np.float32(0.5))  # type: ignore[arg-type]
    assert pk.ExpertConfig.from_dict(json.loads(json.dumps(experts.to_dict()))) == experts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": np.float64(8)}, "r: want an integer >= 1, got 8.0"),
        ({"r": np.bool_(True)}, "r: want an integer >= 1, got True"),
        ({"r": np.int64(0)}, "r: want an integer >= 1, got 0"),
        ({"r": np.array([8])}, "r: want an integer >= 1, got array([8])"),
        ({"scale": np.bool_(True)}, "scale: want a finite number, got True"),
        ({"scale": np.float32("nan")}, "scale: want a finite number, got nan"),
        ({"scale": np.complex64(1)}, "scale: want a finite number, got (1+0j)"),
        ({"scale_shift": np.int64(1)}, "scale_shift: want a bool, got 1"),
    ],
    ids=str,
)
def test_numpys_numbers_of_another_kind_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        pk.PetalConfig(**values)


@pytest.mark.parametrize(
    "pattern", ["(", "[a", "a**", "(?P<x>", "a{99999999999999999999}", "(" * 5000]
)
def test_a_bad_pattern_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^target_modules: want a regular expression"):
        pk.RoutingConfig(target_modules=pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_may_be_torchs(dtype: torch.dtype) -> None:
    config = pk.VLPetConfig(adapter_dtype=dtype)  # type: ignore[arg-type]
    assert config.dtype is dtype
    assert config.to_dict()["adapter_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"module": "ia3"}, "module: want one of ('adapter', 'compacter', 'lora'), got 'ia3'"),
        ({"module": "lora", "gate": "large"}, "gate: want one of ('none',), got 'large'"),
        ({"module": "lora", "gate_r": 4}, "gate_r: want None with module='lora', got 4"),
        ({"module": "lora", "scale": 0.3}, "scale: want 1.0 with module='lora', got 0.3"),
        ({"alpha": 4.0}, "alpha: want None with module='adapter', got 4.0"),
        ({"division": 4}, "division: want 2 with module='adapter', got 4"),
        ({"module": "compacter", "dropout": 0.1}, "dropout: want 0.0 with module='compacter'"),
        ({"module": "compacter", "r": 7}, "r: want a multiple of division=2, got 7"),
        ({"module": "compacter", "value_r": 7}, "value_r: want a multiple of division=2, got 7"),
    ],
)
def test_a_field_that_a_placed_module_does_not_read_is_refused(
    values: dict[str, Any], message: str
) -> None:
    """Kind: a field that is set and decides nothing."""
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.VLPetConfig(**values)


def test_gates_of_placed_modules() -> None:
    gates = {m: pk.VLPetConfig(module=m).gate for m in ("adapter", "compacter", "lora")}
    assert gates == {"adapter": "large", "compacter": "none", "lora": "none"}
    config = pk.VLPetConfig(module="lora", alpha=4.0, dropout=0.1)
    assert pk.VLPetConfig.from_dict(config.to_dict()) == config


OURS = [getattr(pk, name) for name in pk.__all__ if name.endswith("Config")]


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("config", OURS, ids=lambda config: config.__name__)
def test_a_field_that_a_config_has_not_is_refused_by_name(config: Any, peft: bool) -> None:
    """Kind: Python's bare TypeError of a config, which knows what was meant. Every field, misspelt;
    of PEFT's configs of the same name too."""
    if peft:
        pytest.importorskip("peft")
        config = getattr(pk.peft, config.__name__, None)
        if config is None:  # LoRA is PEFT's own
            return
    fields = [field.name for field in dataclasses.fields(config) if len(field.name) > 3]
    assert len(fields) > 5
    for field in fields:
        typo = field[:-2] + field[-1] + field[-2]
        typo = f"{field}s" if typo == field else typo
        message = f"^{config.__name__}: got an unknown field '{typo}'; did you mean '{field}'"
        with pytest.raises(TypeError, match=message):
            config(**{typo: None})
    with pytest.raises(TypeError, match=r"'rank'; did you mean 'r'\?$"):
        config(rank=8)
    with pytest.raises(TypeError, match=r"unknown field 'quux'; want some of .*target_modules"):
        config(r=4, quux=1)
    made = config(r=4)
    assert dataclasses.replace(made, r=6).r == 6
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made


def test_a_field_of_pefts_that_says_nothing_is_told_so() -> None:
    for name in ("task_type", "inference_mode"):
        message = f"'{name}', a field of peft.LoraConfig that says nothing here: leave it out"
        values: dict[str, Any] = {name: None}
        with pytest.raises(TypeError, match=message):
            pk.LoraConfig(**values)


def test_a_config_with_an_init_of_its_own_takes_what_that_takes() -> None:
    class Mine(pk.LoraConfig):
        def __init__(self, rank: int) -> None:
            super().__init__(r=rank)

    assert Mine(rank=4).r == 4
    with pytest.raises(TypeError, match="Mine: got an unknown field 'rnk'; did you mean 'rank'"):
        Mine(rnk=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("function", [pk.attach, pk.plan, pk.fuse], ids=lambda f: f.__name__)
def test_an_argument_that_a_function_has_not_is_refused_by_name(function: Any) -> None:
    """Kind: the same of the calls that take a model, before anything is looked at."""
    model = torch.nn.Linear(2, 2)
    name = function.__name__
    mistyped = {"attach": "implementaton", "plan": "tokns", "fuse": "recompute"}[name]
    meant = {"attach": "implementation", "plan": "tokens", "fuse": "recompute_mlp"}[name]
    message = f"^{name}: got an unknown argument '{mistyped}'; did you mean '{meant}'"
    with pytest.raises(TypeError, match=message):
        function(model, **{mistyped: 1})
    if name != "fuse":
        message = r"'lora_alpha', a field of LoraConfig: want it in the config, LoraConfig\(lora_al"
        with pytest.raises(TypeError, match=message):
            function(model, pk.LoraConfig(), lora_alpha=8)


def test_a_class_is_no_config() -> None:
    """Kind: parentheses that were forgotten."""
    with pytest.raises(TypeError, match=r"got the class LoraConfig; call it: LoraConfig\(\.\.\.\)"):
        pk.attach(torch.nn.Linear(2, 2), pk.LoraConfig)


def test_a_warning_of_attach_is_of_the_line_that_called_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    config = pk.LoraConfig(r=2, target_modules=["0"], exclude_modules=["1"])
    with pytest.warns(UserWarning, match="leaves out nothing") as caught:
        pk.attach(model, config)
    assert caught[0].filename == __file__
