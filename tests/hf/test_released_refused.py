"""The authors' checkpoints that are refused, by name, and leave the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from tests.hf import tiny_text
from tests.hf.released import CASES, R
from tests.hf.test_files_fuzz import look, values_of

ALL = pytest.mark.parametrize("name", list(CASES))
Tensors = dict[str, Tensor]


def refused(name: str, folder: Path, change: Callable[[Tensors], object], *parts: str) -> None:
    """Both ways of loading refuse it and change nothing."""
    case = CASES[name]
    tensors = case.tensors()
    change(tensors)
    torch.save(tensors, folder / "c.pth")
    model = case.model()
    before = look(model)
    pattern = "(?s)" + ".*".join(re.escape(part) for part in ("c.pth", *parts))
    with pytest.raises(ValueError, match=pattern):
        pk.attach(model, case.config(), checkpoint=folder / "c.pth")
    assert look(model) == before
    made = pk.attach(model, case.config())
    values = values_of(made)
    with pytest.raises(ValueError, match=pattern):
        made.load_checkpoint(folder / "c.pth")
    assert values_of(made) == values


def first_of(tensors: Tensors, word: str) -> str:
    return next(name for name in tensors if word in name)


WORDS = {
    "petal": "k_CP",
    "aurora-vqa": "mlp_CP",
    "vlpet-small-t5": "multihead_up",
    "vlpet-large-bart": "multihead_down.2.weight",
    "vladapter-t5": "enc_attn_adapter",
    "routing-gpt2": "lora_B",
}


@pytest.mark.parametrize("name", list(WORDS))
def test_a_missing_tensor_is_refused(name: str, tmp_path: Path) -> None:
    word = WORDS[name]

    def without(tensors: Tensors) -> None:
        gone = first_of(tensors, word)
        for each in (gone, gone.replace(".vqa.", ".gqa.")):
            tensors.pop(each, None)

    # Without a head the other three are another rank.
    says = {"multihead_down.2.weight": "[8, 32], got [6, 32]", "enc_attn_adapter": "TASK"}.get(
        word, word
    )
    refused(name, tmp_path, without, "want ", says)


@pytest.mark.parametrize("name", list(WORDS))
def test_a_tensor_of_another_shape_is_refused(name: str, tmp_path: Path) -> None:
    def longer(tensors: Tensors) -> None:
        key = first_of(tensors, WORDS[name])
        wide = torch.cat([tensors[key], tensors[key]], -1)
        for each in (key, key.replace(".vqa.", ".gqa.")):
            if each in tensors:
                tensors[each] = wide

    refused(name, tmp_path, longer, "want ")


@ALL
def test_what_looks_like_an_adapter_s_and_has_no_place_is_refused(
    name: str, tmp_path: Path
) -> None:
    word = {"petal": "x_CP", "aurora": "x_CP"}.get(name.split("-")[0], "new_adapter.weight")
    key = {"petal": "Qformer.bert.", "aurora": "text_encoder."}.get(name.split("-")[0], "encoder.")
    refused(
        name, tmp_path, lambda t: t.update({key + word: torch.ones(2)}), key + word, "want names"
    )


@ALL
def test_a_name_of_no_model_of_theirs_is_refused(name: str, tmp_path: Path) -> None:
    refused(name, tmp_path, lambda t: t.update({"gpt4.weight": torch.ones(2)}), "gpt4.weight")


def test_a_name_with_a_front_and_without_is_refused(tmp_path: Path) -> None:
    name = "roberta.encoder.layer.0.attention.self.query.lora_A"
    refused(
        "routing-roberta",
        tmp_path,
        lambda t: t.update({f"module.{name}": t[name]}),
        name,
        "want each name once",
    )


def test_a_config_without_what_was_trained_is_refused(tmp_path: Path) -> None:
    """Experts without a place, and heads that the checkpoint trained whole."""
    case = CASES["petal"]
    torch.save(case.tensors(), tmp_path / "c.pth")
    config = pk.PetalConfig(r=R, variant="release")
    with pytest.raises(ValueError, match=r"ExpertA.0.weight: want names that this config has"):
        pk.attach(case.model(), config, checkpoint=tmp_path / "c.pth")
    case = CASES["aurora-retrieval"]
    torch.save(case.tensors(), tmp_path / "c.pth")
    aurora = pk.AuroraConfig(r=R, variant="release")
    with pytest.raises(ValueError, match=r"vision_proj.weight: want the values of .* modules_to_s"):
        pk.attach(case.model(), aurora, checkpoint=tmp_path / "c.pth")
    some = pk.AuroraConfig(
        r=R,
        variant="release",
        target_modules=["vision.qkv", "cross.key", "self.key"],
        modules_to_save=["vision_proj", "itm_head"],
    )
    with pytest.raises(ValueError, match=r"CP_attention: want \[R, 3\], a column for each"):
        pk.attach(case.model(), some, checkpoint=tmp_path / "c.pth")


def test_another_base_is_refused_and_the_same_is_not(tmp_path: Path) -> None:
    case = CASES["routing-roberta"]
    model = case.model()
    name = "roberta.encoder.layer.0.output.dense.weight"
    own = {name: model.get_parameter(name).detach().clone()}
    torch.save(case.tensors() | own, tmp_path / "c.pth")
    pk.attach(model, case.config(), checkpoint=tmp_path / "c.pth")
    half = case.model().to(torch.bfloat16)
    pk.attach(half, case.config(), checkpoint=tmp_path / "c.pth")
    refused("routing-roberta", tmp_path, lambda t: t.update({name: own[name] + 1}), name, "base")


def test_adapters_of_each_task_are_refused(tmp_path: Path) -> None:
    def differ(tensors: Tensors) -> None:
        key = first_of(tensors, ".gqa.")
        tensors[key] = tensors[key] + 1

    for name in ("vladapter-bart", "vlpet-large-bart"):
        refused(name, tmp_path, differ, "one adapter that all tasks share")


def test_the_config_must_be_of_a_method_with_published_code_in_their_variant(
    tmp_path: Path,
) -> None:
    model = tiny_text.build("llama", torch.float32)
    before = look(model)
    cases: list[tuple[Any, str]] = [
        (pk.RoutingConfig(), "want a config with variant='release'"),
        (pk.LoraConfig(), "want a config of .* whose authors published code"),
        (pk.ExpertConfig(variant="release"), "want a config of .* whose authors published code"),
        (tmp_path, "want None beside a saved adapter"),
    ]
    for config, says in cases:
        with pytest.raises(ValueError, match=f"checkpoint: {says}"):
            pk.attach(model, config, checkpoint=tmp_path / "c.pth")
    assert look(model) == before


class Danger:
    def __reduce__(self) -> Any:
        return (print, ("code of a pickle ran",))


@pytest.mark.parametrize("kind", ["pickle", "truncated", "empty", "list", "no tensors", "noise"])
def test_a_file_that_is_no_state_dict_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, path = CASES["routing-roberta"], tmp_path / "c.pth"
    content: Any = {
        "pickle": {"model": case.tensors(), "args": Danger()},
        "list": [torch.ones(2)],
        "no tensors": {"model": {"a": 1}},
        "empty": {},
    }.get(kind, case.tensors())
    torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if kind == "noise":
        path.write_bytes(b"\x00\x01" * 50)
    model = case.model()
    before = look(model)
    with pytest.raises(ValueError, match=r"c\.pth: want a (state dict|dict of tensors)"):
        pk.attach(model, case.config(), checkpoint=path)
    assert look(model) == before
    assert "ran" not in capsys.readouterr().out


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    case = CASES["routing-roberta"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        pk.attach(case.model(), case.config(), checkpoint=tmp_path / "gone.pth")
    with pytest.raises(TypeError, match="checkpoint: want a path, got a int"):
        pk.attach(case.model(), case.config(), checkpoint=3)  # type: ignore[arg-type]


def test_the_variant_is_asked_for_by_a_load_too(tmp_path: Path) -> None:
    case = CASES["routing-roberta"]
    torch.save(case.tensors(), tmp_path / "c.pth")
    made = pk.attach(case.model(), pk.RoutingConfig(r=8, function="mul"))
    with pytest.raises(ValueError, match="checkpoint: want a config with variant='release'"):
        made.load_checkpoint(tmp_path / "c.pth")
