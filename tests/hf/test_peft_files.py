"""LoRA in PEFT's files: what is written, what is read, what is refused on saving. PEFT's own word
on both stands in test_peft_itself.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf import pair
from petal_kernels.hf.peft_files import TENSORS
from tests.hf import tiny_text
from tests.hf.peft_folders import CONFIG, F32, attached, change_tensors, edit, refused
from tests.hf.test_files_fuzz import fill, values_of

# -- what is written ------------------------------------------------------------------------------


def test_names_and_config_are_as_peft_has_them(tmp_path: Path) -> None:
    config = {
        "lora_alpha": 5,
        "lora_dropout": 0.25,
        "use_rslora": True,
        "rank_pattern": {"c_fc": 2},
    }
    made = attached(
        "gpt2",
        target_modules=["c_attn", "c_fc"],
        bias="lora_only",
        modules_to_save=["ln_f"],
        alpha_pattern={"h.0.*": 7},
        **config,
    )
    made.save(tmp_path, format="peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([TENSORS, CONFIG])
    state = made.state_dict()
    want: dict[str, Tensor] = {}
    for layer in "01":
        for name in ("attn.c_attn", "mlp.c_fc"):
            ours = f"transformer.h.{layer}.{name}"
            theirs = f"base_model.model.{ours}"
            want[f"{theirs}.lora_A.weight"] = state[f"{ours}.down"]
            want[f"{theirs}.lora_B.weight"] = state[f"{ours}.up"]
            want[f"{theirs}.base_layer.bias"] = state[f"modules_to_save.{ours}.bias"]
    for name in ("weight", "bias"):
        want[f"base_model.model.transformer.ln_f.{name}"] = state[
            f"modules_to_save.transformer.ln_f.{name}"
        ]
    got = load_file(tmp_path / TENSORS)
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[n].view(torch.uint8), want[n].view(torch.uint8)) for n in want)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert {key: values[key] for key in config} == config
    assert values["peft_type"] == "LORA"
    assert values["inference_mode"] is True
    assert values["fan_in_fan_out"] is True
    assert values["bias"] == "lora_only"
    assert values["alpha_pattern"] == {"h.0.*": 7}
    assert values["target_modules"] == ["c_attn", "c_fc"]
    assert values["modules_to_save"] == ["transformer.ln_f"]
    assert values["auto_mapping"]["base_model_class"] == "GPT2LMHeadModel"


TARGETS: list[tuple[str, dict[str, Any], Callable[[Any], bool]]] = [
    # The last words, where they mean no other module.
    ("llama", {"target_modules": "all-linear"}, lambda t: len(t) == 7 and "q_proj" in t),
    # Paths: the tower has a q_proj too.
    ("llava", {"target_modules": ["q_proj"]}, lambda t: len(t) == 2 and "language" in t[0]),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}, lambda t: len(t) == 1),
    ("llama", {"target_modules": r".*q_proj", "exclude_modules": r".*0.*"}, lambda t: len(t) == 1),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config", "fits"), TARGETS)
def test_targets_are_just_what_is_adapted(
    family: str, config: dict[str, Any], fits: Callable[[Any], bool], tmp_path: Path
) -> None:
    made = attached(family, **config)
    made.save(tmp_path, format="peft")
    values = json.loads((tmp_path / CONFIG).read_text())
    assert fits(values["target_modules"])
    assert not {"exclude_modules", "layers_to_transform"} & {*values}
    again = pk.attach(tiny_text.build(family, F32), tmp_path)
    assert values_of(again) == values_of(made)


def test_targets_that_are_the_end_of_another_path_become_an_expression(tmp_path: Path) -> None:
    def inner() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(4, 4)})

    # "a.q" is the end of "b.a.q" too, and without its dot meant "aXq".
    model = nn.ModuleDict(
        {"a": inner(), "aXq": nn.Linear(4, 4), "b": nn.ModuleDict({"a": inner()})}
    )
    made = pk.attach(model, pk.LoraConfig(r=2, target_modules=r"a\.q"))
    made.save(tmp_path, format="peft")
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == r"a\.q"
    made.detach()
    assert [place.path for place in pk.attach(model, tmp_path).found.places] == ["a.q"]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear", "bias": "all", "rank_pattern": {"up_proj": 2}}),
    ("llama", {"modules_to_save": ["model.norm"], "init_lora_weights": False}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only", "lora_alpha": 2.5}),
    ("gpt2", {"bias": "all", "modules_to_save": ["ln_f"], "use_rslora": True}),
    ("bert", {"target_modules": ["query", "intermediate.dense"], "bias": "all"}),
    ("llava", {"target_modules": ["q_proj", "fc1"], "parts": ("language", "vision")}),
    ("t5", {"alpha_pattern": {"q": 3}}),
    ("llama", {"target_modules": "all-linear", "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
]


@pytest.mark.parametrize(("family", "config"), CASES, ids=str)
def test_what_was_saved_loads_bit_for_bit(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    made = attached(family, **config)
    made.save(tmp_path / "a", format="peft")
    again = pk.attach(tiny_text.build(family, F32), tmp_path / "a")
    assert values_of(again) == values_of(made)
    again.save(tmp_path / "b", format="peft")
    for name in (TENSORS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    fill(made, 2)
    made.load(tmp_path / "a")
    assert values_of(again) == values_of(made)
    report = pk.plan(tiny_text.build(family, F32), tmp_path / "a")
    assert [row.shape for row in report.rows] == [row.shape for row in made.report().rows]


def test_what_lies_in_another_is_named_once(tmp_path: Path) -> None:
    """PEFT would wrap it twice."""
    made = attached("bert", modules_to_save=["cls.predictions.transform"])
    made.save(tmp_path, format="peft")
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == [
        "cls.predictions.transform"
    ]
    names = ["cls.predictions.transform", "cls.predictions.transform.dense"]
    twice = attached("bert", modules_to_save=names)
    twice.save(tmp_path / "b", format="peft")
    assert (tmp_path / "b" / CONFIG).read_bytes() == (tmp_path / CONFIG).read_bytes()


# -- what is refused on saving --------------------------------------------------------------------


def _refused_to_save(made: pk.Attachment, folder: Path, *parts: str) -> None:
    """Nothing is written, not even the folder."""
    there = folder.exists()
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if there else {}
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts))):
        made.save(folder, format="peft")
    assert folder.exists() == there
    assert not there or {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_format_that_is_none_is_refused(tmp_path: Path) -> None:
    made = attached()
    for wrong in ("PEFT", "", None, 1):
        with pytest.raises((TypeError, ValueError), match="format: want"):
            made.save(tmp_path / "a", format=wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_another_method_is_refused(tmp_path: Path) -> None:
    made = pk.attach(tiny_text.build("llama", F32), pk.RoutingConfig(r=3))
    _refused_to_save(made, tmp_path / "a", "format", "'petal'", "'routing'")


def test_tied_parameters_that_are_trained_whole_are_refused(tmp_path: Path) -> None:
    made = attached("gpt2", modules_to_save=["lm_head"])
    _refused_to_save(made, tmp_path / "a", "modules_to_save", "share no parameter", "wte")
    made = attached("bert", modules_to_save=["cls"])
    _refused_to_save(made, tmp_path / "a", "modules_to_save", "share no parameter")


def test_a_name_that_means_more_to_peft_is_refused(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm, self.prenorm = nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)

    config = pk.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"])
    made = pk.attach(Model(), config)
    _refused_to_save(made, tmp_path / "a", "modules_to_save", "'norm'", "'prenorm'")


def test_a_linear_that_is_used_twice_is_refused(tmp_path: Path) -> None:
    first = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": first, "b": first, "c": nn.Linear(4, 4)})
    made = pk.attach(model, pk.LoraConfig(r=2, target_modules=["a"]))
    _refused_to_save(made, tmp_path / "a", "one place", "got a in several")


@pytest.mark.parametrize("name", [pair.CONFIG, pair.OLD_CONFIG])
def test_a_folder_with_our_own_adapter_is_refused(name: str, tmp_path: Path) -> None:
    made = attached()
    made.save(tmp_path)
    (tmp_path / pair.CONFIG).rename(tmp_path / name)
    _refused_to_save(made, tmp_path, "without an adapter", "own format")


def test_a_file_s_name_is_refused(tmp_path: Path) -> None:
    _refused_to_save(attached(), tmp_path / "adapter.bin", "want a directory")


# -- a save that is interrupted -------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupted_save_never_pairs_a_json_with_other_tensors(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = attached(lora_alpha=3), attached(lora_alpha=9)
    fill(new, 2)
    old.save(tmp_path, format="peft")
    done: list[int] = []

    def replace(source: Path, target: Path) -> None:
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(1)
        Path(source).rename(target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path, format="peft")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [TENSORS]
    refused(tmp_path, "missing", CONFIG)
    new.save(tmp_path, format="peft")
    assert values_of(pk.attach(tiny_text.build("llama", F32), tmp_path)) == values_of(new)


def test_an_interrupted_save_of_the_same_config_leaves_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = attached()
    made.save(tmp_path, format="peft")
    want = values_of(made)
    fill(made, 2)

    def replace(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        made.save(tmp_path, format="peft")
    monkeypatch.undo()
    assert values_of(pk.attach(tiny_text.build("llama", F32), tmp_path)) == want
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([TENSORS, CONFIG])


# -- PEFT's names of what is trained whole --------------------------------------------------------


def test_a_reader_meets_a_save_and_pairs_no_json_with_other_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = attached(lora_alpha=3), attached(lora_alpha=9)
    fill(new, 2)
    old.save(tmp_path, format="peft")
    read_bytes = Path.read_bytes
    met: list[Path] = []

    def meanwhile(path: Path) -> bytes:
        if path.name == TENSORS and not met:
            met.append(path)
            new.save(tmp_path, format="peft")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", meanwhile)
    made = pk.attach(tiny_text.build("llama", F32), tmp_path)
    assert met
    assert values_of(made) == values_of(new)
    assert made.config.lora_alpha == 9  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    attached(target_modules=["q_proj", "v_proj"]).save(tmp_path, format="peft")
    return tmp_path


def test_a_name_of_peft_s_is_the_end_of_a_path_with_or_without_a_dot(folder: Path) -> None:
    """ "norm" is the end of model.norm, and of every post_attention_layernorm."""
    edit(folder, modules_to_save=["norm"])
    norms = ["model.norm.weight"]
    for layer in "01":
        for name in ("input", "post_attention"):
            norms.append(f"model.layers.{layer}.{name}_layernorm.weight")
    whole = {f"base_model.model.{name}": torch.full((32,), 2.0) for name in norms}
    change_tensors(folder, lambda tensors: tensors.update(whole))
    made = pk.attach(tiny_text.build("llama", F32), folder)
    assert sorted(made.named_whole()) == sorted(n.removesuffix(".weight") for n in norms)


def test_a_task_s_heads_that_the_model_has_not_are_left_out(folder: Path) -> None:
    """PEFT names them all, whichever model it is."""
    edit(folder, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    made = pk.attach(tiny_text.build("llama", F32), folder)
    assert made.config.modules_to_save is None
    edit(folder, task_type="CAUSAL_LM")
    refused(folder, CONFIG, "modules_to_save", "'classifier'")


def test_a_tied_bias_may_stand_there_twice(tmp_path: Path) -> None:
    """bias="all" of PEFT keeps one parameter under each of its names."""
    made = attached("bert", bias="all")
    made.save(tmp_path, format="peft")
    first, again = "cls.predictions.bias", "cls.predictions.decoder.bias"
    tensors = load_file(tmp_path / TENSORS)
    (name,) = {f"base_model.model.{first}", f"base_model.model.{again}"} & set(tensors)
    other = {first: again, again: first}[name.removeprefix("base_model.model.")]
    key = f"base_model.model.{other}"
    change_tensors(tmp_path, lambda t: t.update({key: t[name].clone()}))
    loaded = pk.attach(tiny_text.build("bert", F32), tmp_path)
    assert values_of(loaded) == values_of(made)
    change_tensors(tmp_path, lambda t: t.update({key: t[name] + 1}))
    refused(tmp_path, TENSORS, "unexpected keys", other, family="bert")
