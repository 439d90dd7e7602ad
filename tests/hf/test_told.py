"""What a user is told of a model: which name was meant, what was left out, and what to do about an
adapter that is there already."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import petal_kernels as pk
from tests.hf import tiny, tiny_text

ALL = ("language", "projector", "vision")


def llava() -> Any:
    return tiny_text.build("llava", torch.float32)


# Names ------------------------------------------------------------------------------------------


def refusal(model: nn.Module, config: Any) -> str:
    with pytest.raises(ValueError, match="^(target_modules|modules_to_save): ") as refused:
        pk.attach(model, config)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "parts", "said"),
    [
        ("q_porj", ALL[:1], "; did you mean 'q_proj'?"),
        ("self_attn.vproj", ALL[:1], "; did you mean 'self_attn.v_proj'?"),
        ("f_c1", ALL[:1], "; 'fc1' is in the part 'vision': want it in parts, as in "
         "parts=('language', 'vision')"),
        ("linear1", ALL[:1], "; 'linear_1' is in the part 'projector': want it in parts, as in "
         "parts=('language', 'projector')"),
        ("f_c1", ALL, "; did you mean 'fc1'?"),
        ("quux", ALL, "]"),
    ],
)  # fmt: skip
def test_a_typo_means_a_linear_inside_of_parts(
    name: str, parts: tuple[str, ...], said: str
) -> None:
    """Kind: a suggestion that the same config would refuse."""
    text = refusal(llava(), pk.LoraConfig(target_modules=[name], parts=parts))
    assert text.endswith(said)
    some = re.search(r"such as \['([^']*)'", text)
    assert some is not None
    assert "language_model" in some[1] or parts == ALL
    assert (f"in parts={parts}" in text) == (parts != ALL)


def test_what_is_suggested_is_adapted() -> None:
    """In every model's own names: a suggestion that is followed is no error."""
    for family, wrong in (("llama", "qproj"), ("gpt2", "c_atn"), ("llava", "gate_prj")):
        model = tiny_text.build(family, torch.float32)
        text = refusal(model, pk.LoraConfig(target_modules=[wrong]))
        meant = re.search(r"did you mean '(.*)'\?$", text)
        assert meant is not None, text
        assert pk.attach(model, pk.LoraConfig(target_modules=[meant[1]])).wrappers()


def test_a_name_outside_of_parts_names_the_option() -> None:
    text = refusal(llava(), pk.LoraConfig(target_modules=["fc2"]))
    assert "as in parts=('language', 'vision'), got ('language',)" in text
    assert pk.attach(llava(), pk.LoraConfig(target_modules=["fc2"], parts=("language", "vision")))


def test_a_typo_in_the_names_of_other_options_and_methods() -> None:
    model = llava()
    config = pk.LoraConfig(target_modules="all-linear", modules_to_save=["lmhead"])
    assert refusal(model, config).endswith("got 'lmhead'; did you mean 'lm_head'?")
    text = refusal(tiny.blip2(), pk.PetalConfig(r=4, target_modules=["qeury"]))
    assert text.endswith("; did you mean 'query'?")


# Parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "left"),
    [
        (ALL[:1], [("model.vision_tower", 6, 1), ("model.multi_modal_projector", 2, 0)]),
        (ALL[1:2], [("model.vision_tower", 6, 1), ("model.language_model", 14, 2)]),
        (ALL[2:], [("model.multi_modal_projector", 2, 0), ("model.language_model", 14, 2)]),
        (ALL, []),
    ],
)
def test_the_report_says_what_parts_leave_out(
    parts: tuple[str, ...], left: list[tuple[str, int, int]], recwarn: pytest.WarningsRecorder
) -> None:
    """Kind: a tower that is not adapted, and a report in which it does not stand. It is the default
    and no surprise: nothing warns."""
    config = pk.LoraConfig(r=2, target_modules="all-linear", parts=parts)
    shown = str(pk.attach(llava(), config).report())
    lines = [line for line in shown.splitlines() if "left out" in line]
    layers = {0: "", 1: " in 1 layer", 2: " in 2 layers"}
    assert lines == [
        f"{path}: left out by parts={parts}, {count} linears{layers[held]}"
        for path, count, held in left
    ]
    assert [str(w.message) for w in recwarn if "left out" in str(w.message)] == []
    assert [line in str(pk.plan(llava(), config)) for line in lines] == [True] * len(lines)
