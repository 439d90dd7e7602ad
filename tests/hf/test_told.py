"""What a user is told of a model: which name was meant, what was left out, and what to do about an
adapter that is there already."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
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
    with pytest.raises(ValueError, match=r"^(target_modules|modules_to_save): ") as refused:
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


# What is there already --------------------------------------------------------------------------

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}


def llama() -> Any:
    return tiny_text.build("llama", torch.float32).train()


IDS = torch.arange(6)[None]


def told(model: nn.Module, **more: Any) -> list[str]:
    """What a training forward warns of a frozen adapter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(input_ids=IDS, **more)
    return [str(w.message) for w in caught if "requires_grad=False since" in str(w.message)]


@pytest.mark.parametrize(
    "config",
    [pk.LoraConfig(**LORA), pk.RoutingConfig(r=2, kind="adapter"), pk.ExpertConfig(r=2)],
    ids=lambda config: config.method,
)
def test_an_adapter_that_peft_froze_is_told_of_once(config: Any) -> None:
    """Kind: an adapter that is not trained, and a loss that goes down all the same."""
    peft = pytest.importorskip("peft")
    model = llama()
    att = pk.attach(model, config)
    assert told(model) == []
    trained = list(att.parameters())
    outer = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))
    model.eval()
    assert told(outer) == []
    model.train()
    with torch.no_grad():
        assert told(outer) == []
    with att.disabled():
        assert told(outer) == []
    (said,) = told(outer)
    assert told(outer) == []
    # The way out that it names.
    assert "trained = list(att.parameters())" in said
    for parameter in trained:
        parameter.requires_grad_(True)
    outer(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_an_adapter_that_a_user_froze_is_told_of_wherever_the_model_runs() -> None:
    model = llama()
    pk.attach(model, pk.LoraConfig(**LORA))
    model.requires_grad_(False)
    twin = copy.deepcopy(model)
    again: Any = pickle.loads(pickle.dumps(model))
    twin.gradient_checkpointing_enable()
    assert [len(told(each, use_cache=False)) for each in (model, again, twin, twin)] == [1, 1, 1, 0]


def test_every_adapter_of_several_is_watched() -> None:
    model = llama()
    att = pk.attach(model, pk.LoraConfig(**LORA))
    att.add("other", pk.LoraConfig(r=2, target_modules=["v_proj"]))
    model.requires_grad_(False)  # of the active one alone
    assert len(told(model)) == 1
    att.switch("other")
    assert told(model) == []
    model.requires_grad_(False)
    assert len(told(model)) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_attach_says_that_it_freezes_what_peft_trained(fused: bool) -> None:
    """Kind: the same the other way round."""
    peft = pytest.importorskip("peft")
    outer = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    if fused:
        pk.fuse(outer)
    message = r"attach: 2 layers of PEFT's were trained and are frozen now, .*layers.0.self_attn.q_"
    with pytest.warns(UserWarning, match=message) as caught:
        att = pk.attach(outer, pk.LoraConfig(r=2, target_modules=["v_proj"]))
    assert caught[-1].filename == __file__
    att.detach()
    outer.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pk.attach(outer, pk.LoraConfig(r=2, target_modules=["v_proj"]))


def test_what_cannot_be_put_on_an_adapted_model_names_the_way_out() -> None:
    """Kind: a refusal without one."""
    model = llama()
    att = pk.attach(model, pk.LoraConfig(**LORA))
    config = pk.LoraConfig(r=2, target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"with none; pk\.attach has adapted it, .*leave fuse out"):
        pk.fuse(model)
    ways = r"pk\.attachment\(model\)\.detach\(\); .*pk\.attachment\(model\)\.add\(name, config\)"
    for again in (pk.attach, pk.plan):
        with pytest.raises(ValueError, match=ways):
            again(model, config)
    with pytest.raises(ValueError, match=r"detach that first \(pk\.attachment\(model\) of the mod"):
        pk.attach(model.model, pk.LoraConfig(**LORA))
    pk.attachment(model).add("second", config)
    assert att.names == ["default", "second"]
    assert pk.attachment(model).detach() is model
    with pytest.raises(ValueError, match=r"with none$"):
        pk.fuse(model)


def test_an_attachment_says_what_it_is() -> None:
    """Kind: an object's address where a user prints it."""
    model = llama()
    att = pk.attach(model, pk.LoraConfig(**LORA))
    count = sum(p.numel() for p in att.parameters())
    assert repr(att) == (
        f"Attachment(lora on a LlamaForCausalLM: 2 places, {count} trained parameters; adapters: "
        "default (active))"
    )
    att.add("b", pk.RoutingConfig(r=2, kind="adapter"))
    att.switch("b")
    assert "Attachment(routing on a LlamaForCausalLM: 4 places" in str(att)
    assert str(att).endswith("adapters: default, b (active))")
    model.requires_grad_(False)
    assert " 0 trained parameters" in repr(att)
    att.switch("default")
    att.merge()
    assert "parameters, merged; adapters" in repr(att)
    att.detach()
    assert repr(att) == "Attachment(detached)"
    assert repr(pk.Attachment.__new__(pk.Attachment)) == "Attachment(detached)"


# The first hour ---------------------------------------------------------------------------------


def test_a_string_that_is_meant_as_names_is_told_so() -> None:
    """Kind: a name in a place for an expression."""
    for given, meant in (("q_proj", ["q_proj"]), ("q_proj, v_proj", ["q_proj", "v_proj"])):
        text = refusal(llama(), pk.LoraConfig(target_modules=given))
        assert text.endswith(f"a string is one expression for whole paths: want a list, {meant}")
    for given in (".*nope", "q_proj, nope"):
        assert "want a list" not in refusal(llama(), pk.LoraConfig(target_modules=given))


def test_a_pattern_that_asks_for_nothing_is_told_of() -> None:
    """Kind: an option that changes nothing and says nothing."""
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 4, "q_porj": 3}}
    config = pk.LoraConfig(target_modules=["q_proj"], **patterns, alpha_pattern={"v_proj": 1})
    with pytest.warns(UserWarning, match="matches no linear that is adapted") as caught:
        pk.attach(llama(), config)
    assert [str(w.message) for w in caught if "adapted" in str(w.message)] == [
        "attach: rank_pattern: 'q_porj' matches no linear that is adapted",
        "attach: alpha_pattern: 'v_proj' matches no linear that is adapted",
    ]


def test_a_method_that_does_not_know_the_model_names_those_that_need_no_table() -> None:
    for config in (pk.PetalConfig(r=4), pk.AuroraConfig(r=4)):
        with pytest.raises(ValueError, match=r"; LoraConfig, RoutingConfig and ExpertConfig need"):
            pk.attach(llava(), config)
    for other in (pk.LoraConfig(r=2), pk.RoutingConfig(r=2), pk.ExpertConfig(r=2)):
        pk.attach(llava(), other)


def test_a_handle_that_is_taken_for_the_model_says_where_that_is() -> None:
    att = pk.attach(llama(), pk.LoraConfig(**LORA))
    with pytest.raises(AttributeError, match=r"it is the handle, the model has it: att.model.tra"):
        att.train()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"print\(att.report\(\)\) says it"):
        att.print_trainable_parameters()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'quux'$"):
        att.quux  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(pk.Attachment.__new__(pk.Attachment), "model")
    assert pk.attachment(copy.deepcopy(att.model)).names == ["default"]


def test_a_misspelt_name_of_the_package() -> None:
    for name, meant in (("LoRAConfig", "LoraConfig"), ("attached", "attach")):
        with pytest.raises(AttributeError, match=f"'{name}'; did you mean '{meant}'"):
            getattr(pk, name)
    with pytest.raises(AttributeError, match=r"no attribute 'quux'$"):
        pk.quux  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute '__wrapped__'$"):
        pk.__wrapped__  # noqa: B018
