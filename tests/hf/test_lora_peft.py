"""PEFT's own LoraConfig objects, and the same linears and values as PEFT where it is installed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest
import torch

import petal_kernels as pk
from tests.hf import tiny_text
from tests.hf.lora_places import ALL, LLAMA, ends

# -- PEFT's own configs ---------------------------------------------------------------------------


def _like_pefts(name: str = "LoraConfig", kind: str = "LORA", **values: Any) -> Any:
    """A config as PEFT's is, by the fields that matter here."""
    kinds: Any = enum.Enum("PeftType", {kind: kind})  # type: ignore[misc]
    defaults: dict[str, Any] = {
        "task_type": None,
        "peft_type": kinds[kind],
        "inference_mode": False,
        "r": 8,
        "target_modules": None,
        "exclude_modules": None,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": dict,
        "alpha_pattern": dict,
        "trainable_token_indices": None,
        "loftq_config": dict,
        "use_dora": False,
        "use_qalora": False,
        "qalora_group_size": 16,
        "layer_replication": None,
        "lora_bias": False,
    }
    fields = [
        (key, Any, field(default_factory=value) if value is dict else field(default=value))
        for key, value in defaults.items()
    ]
    made = make_dataclass(name, fields, bases=(_ToDict,))
    made.__module__ = "peft.tuners.lora.config"
    return made(**values)


@dataclass
class _ToDict:
    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def _real(**values: Any) -> Any:
    """PEFT's own, where it is installed."""
    return pytest.importorskip("peft").LoraConfig(**values)


MAKERS = pytest.mark.parametrize("make", [_like_pefts, _real], ids=["like", "real"])


@MAKERS
def test_a_config_of_peft_is_taken_as_it_is(make: Any) -> None:
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.25,
        "target_modules": {"q_proj", "v_proj"},
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "rank_pattern": {"v_proj": 2},
        "use_rslora": True,
        "bias": "lora_only",
        "init_lora_weights": "gaussian",
        "fan_in_fan_out": True,
    }
    attachment = pk.attach(tiny_text.build("llama"), make(task_type="CAUSAL_LM", **values))
    values.pop("fan_in_fan_out")
    assert attachment.config == pk.LoraConfig(**values, parts=ALL)
    # Names match in every part, as they do in PEFT.
    attachment = pk.attach(tiny_text.build("llava"), make(target_modules=["q_proj"]))
    assert {row.role for row in attachment.report().rows} == {"language.q_proj", "vision.q_proj"}
    assert pk.attach(tiny_text.build("llama"), make()).config == pk.LoraConfig()


@MAKERS
def test_a_task_s_head_is_trained_whole_as_in_peft(make: Any) -> None:
    import transformers

    config = transformers.LlamaConfig(**tiny_text._llama_like())
    config.num_labels = 3
    model = transformers.LlamaForSequenceClassification(config)
    attachment = pk.attach(model, make(task_type="SEQ_CLS", target_modules="all-linear"))
    assert attachment.config.modules_to_save == ["score"]
    assert ends([place.path for place in attachment.found.places]) == LLAMA


@MAKERS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loftq_config", {"loftq_bits": 4}),
        ("layer_replication", [(0, 2)]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("qalora_group_size", 32),
        ("inference_mode", True),
        ("init_lora_weights", "orthogonal"),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(make: Any, name: str, value: Any) -> None:
    if make is _real and name == "loftq_config":
        pytest.skip("PEFT empties it unless LoftQ is asked for")
    with pytest.raises(ValueError, match=f"^{name}: want "):
        pk.attach(tiny_text.build("llama"), make(target_modules=["q_proj"], **{name: value}))


def test_other_configs_of_peft_are_refused() -> None:
    model = tiny_text.build("llama")
    for name, kind in (("IA3Config", "IA3"), ("LoraConfig", "ADALORA")):
        with pytest.raises(ValueError, match=f"config: want a LoraConfig .* got a {name}"):
            pk.attach(model, _like_pefts(name, kind))


REAL = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "layers.1.mlp.up_proj"], "exclude_modules": ["x"]}),
    ("llama", {"target_modules": r".*\.1\..*_proj", "rank_pattern": {"up_proj": 2}}),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": 1}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True}),
    ("gpt2", {"target_modules": "all-linear", "exclude_modules": r".*c_proj"}),
    ("llava", {"target_modules": ["q_proj", "fc1"], "alpha_pattern": {"layers.0.*q_proj": 3}}),
    ("llava", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": ["dense", "query"]}),
    ("t5", {"target_modules": None}),
    ("llama", {"target_modules": None}),
    ("gpt2", {"target_modules": None}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "values"), REAL, ids=str)
def test_the_same_linears_and_values_as_peft(family: str, values: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_text.build(family)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **values)
    attachment = pk.attach(model, config)
    model.double()
    other = peft.get_peft_model(tiny_text.build(family), config).double()
    theirs = {n: p for n, p in other.named_parameters() if p.requires_grad}
    rename = {".down": ".lora_A.default.weight", ".up": ".lora_B.default.weight"}
    ours: dict[str, Any] = {}
    for name, parameter in attachment.named_parameters():
        path, _, kind = name.rpartition(".")
        ours[f"base_model.model.{path}{rename['.' + kind]}"] = parameter
    assert sorted(ours) == sorted(theirs)
    with torch.no_grad():
        for name, parameter in theirs.items():
            ours[name].copy_(parameter)
    batch = tiny_text.batch(family)
    losses = [m(**batch).loss for m in (model, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad)
