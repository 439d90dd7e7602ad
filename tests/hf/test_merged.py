"""What a merge leaves: a model without an adapter, its checkpoint, and weights that are written or
converted before they are given back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from tests.hf import tiny, tiny_text
from tests.hf.methods import train

LORA = pk.RoutingConfig(r=3, alpha=5.0)
WEIGHT = "model.layers.1.self_attn.q_proj.weight"


def built(family: str, config: AdapterConfig = LORA) -> tuple[Any, Any]:
    model = tiny_text.build(family, torch.float32)
    attachment = pk.attach(model, config)
    train(attachment)
    return model, attachment


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=tiny_text.batch("llama")["input_ids"]).logits


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_merge_and_unload_leaves_the_updated_model(family: str, merged: bool) -> None:
    base = tiny_text.build(family, torch.float32)
    model, attachment = built(family)
    adapted = logits(model)
    assert not torch.allclose(adapted, logits(base), atol=1e-2)
    if merged:
        attachment.merge()
    got = attachment.merge_and_unload()
    assert got is model
    torch.testing.assert_close(logits(model), adapted, atol=2e-4, rtol=2e-4)
    assert classes(model) == classes(base)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    base.load_state_dict(model.state_dict())
    assert torch.equal(logits(base), logits(model))
    with pytest.raises(RuntimeError, match="merge: this attachment was detached"):
        attachment.merge_and_unload()
    pk.attach(model, LORA)  # as any other model


@pytest.mark.parametrize(
    ("build", "config", "stays"),
    [
        (
            lambda: tiny_text.build("bart", torch.float32),
            pk.VLPetConfig(r=4, value_r=3),
            "an activation",
        ),
        (tiny.blip2, pk.PetalConfig(r=4, scale_shift=True), "scale/shift"),
        (tiny.instructblip, pk.PetalConfig(r=4, experts=2, expert_r=3), "scale/shift"),
    ],
    ids=["vlpet", "petal", "petal-experts"],
)
@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
def test_what_no_weight_can_hold_is_refused(
    build: Callable[[], nn.Module], config: AdapterConfig, stays: str, merged: bool
) -> None:
    model = build()
    attachment = pk.attach(model, config)
    if merged:
        attachment.merge()
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError,
        match=r"merge_and_unload: want a method whose updates all fold into weights, got \d+ parts "
        r"that stay \(first: .*\)",
    ) as caught:
        attachment.merge_and_unload()
    assert stays in str(caught.value)
    assert pk.attachment(model) is attachment
    assert before == {name: (id(p), p._version) for name, p in model.named_parameters()}
    assert (attachment._merged is not None) is merged


def test_a_merged_checkpoint_is_that_of_the_merged_weights() -> None:
    base = tiny_text.build("llama", torch.float32)
    model, attachment = built("llama")
    kept = {name: value.clone() for name, value in attachment.state_dict().items()}
    keys = set(base.state_dict())
    assert {k for k in model.state_dict() if k.startswith("petal.")} == {f"petal.{k}" for k in kept}
    attachment.merge()
    assert set(model.state_dict()) == keys
    base.load_state_dict(model.state_dict())
    assert torch.equal(logits(base), logits(model))
    assert attachment.state_dict().keys() == kept.keys()  # its own is all there
    attachment.unmerge()
    assert set(model.state_dict()) == keys | {f"petal.{name}" for name in kept}


@pytest.mark.parametrize("assign", [False, True])
def test_a_merged_model_loads_its_own_checkpoint(assign: bool) -> None:
    model, attachment = built("llama")
    attachment.merge()
    kept = {name: value.clone() for name, value in attachment.state_dict().items()}
    parameters = [id(parameter) for parameter in attachment.adapter.parameters()]
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    want = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(want, assign=assign)
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in attachment.state_dict().items())
    assert parameters == [id(parameter) for parameter in attachment.adapter.parameters()]
    other, _ = built("llama")
    with pytest.raises(RuntimeError, match=r"Missing key.*petal.layers.0.decoder_query.down"):
        other.load_state_dict(want)  # the update would be there twice


def test_unmerge_of_a_converted_model_gives_the_converted_original() -> None:
    base = tiny_text.build("llama", torch.float32)
    model, attachment = built("llama")
    attachment.merge()
    model.to(torch.bfloat16)
    attachment.unmerge()
    weight = model.get_submodule(WEIGHT.removesuffix(".weight")).weight
    assert torch.equal(weight, base.state_dict()[WEIGHT].to(torch.bfloat16))
    attachment.detach()
    base.to(torch.bfloat16)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("how", ["copied", "assigned", "in place", "parameter"])
def test_unmerge_refuses_where_the_merged_weights_were_written(how: str) -> None:
    model, attachment = built("llama")
    attachment.merge()
    state = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    owner = model.get_submodule(WEIGHT.removesuffix(".weight"))
    if how in ("copied", "assigned"):
        model.load_state_dict(state, assign=how == "assigned")
    elif how == "in place":
        with torch.no_grad():
            owner.weight.mul_(0.5)
    else:
        parent = model.model.layers[1].self_attn.q_proj.base
        parent.weight = nn.Parameter(state[WEIGHT], requires_grad=False)
    now = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (attachment.unmerge, attachment.detach):
        with pytest.raises(
            RuntimeError, match=r"unmerge: the merged weight of \S+ was written since merge"
        ):
            call()
    assert all(torch.equal(value, now[name]) for name, value in model.state_dict().items())


def test_unmerge_of_a_copy_gives_the_copy_its_originals() -> None:
    model, attachment = built("llama")
    want = logits(model)
    attachment.merge()
    twin = copy.deepcopy(model)
    pk.attachment(twin).unmerge()
    assert torch.equal(logits(twin), want)
    assert not torch.equal(logits(model), want)
    attachment.unmerge()
    assert torch.equal(logits(model), want)


def test_a_checkpoint_of_a_partly_merged_model_applies_nothing_twice() -> None:
    """What stays beside the merged weights goes with the unmerged ones into a checkpoint."""
    config = pk.RoutingConfig(r=3, modules_to_save=["lm_head"])
    model, attachment = built("llama", config)
    ids = tiny_text.batch("llama")["input_ids"]
    with torch.no_grad():
        want = model(ids).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        attachment.merge()
        held = model.state_dict()
        assert all(torch.equal(held[name], value) for name, value in before.items())
        other, _ = built("llama", config)
        other.load_state_dict(held)
        assert torch.equal(other(ids).logits, want)
        with pytest.raises(RuntimeError, match=r"want an unmerged model"):
            model.load_state_dict(held)
        attachment.unmerge()
        model.load_state_dict(held)
        assert torch.equal(model(ids).logits, want)


def test_merge_freezes_what_is_folded_whole() -> None:
    """The kind: a parameter whose gradient misses what lies in a weight, and one that is frozen
    although a module still runs with it."""
    model: Any = tiny_text.build("llama").eval()
    attachment = pk.attach(model, pk.RoutingConfig(r=3))
    trained = [name for name, _ in attachment.named_parameters()]
    attachment.merge()
    assert list(attachment.named_parameters()) == []
    attachment.unmerge()
    assert [name for name, _ in attachment.named_parameters()] == trained

    model = tiny.blip2()
    attention = model.qformer.encoder.layer[1].attention.attention
    attention.key.register_forward_hook(lambda module, args, output: None)
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    report = attachment.merge()
    path = "qformer.encoder.layer.1.attention.attention"
    assert [report.kept[f"{path}.{name}"] for name in ("query", "key", "value")] != []
    names = [name for name, _ in attachment.named_parameters()]
    assert any(name.startswith("branches.text.") for name in names)
    assert not any(name.startswith("branches.image.") for name in names)


def test_a_trained_bias_stands_in_the_bases_place_where_the_update_lies_in_the_weight() -> None:
    model: Any = tiny_text.build("gpt2").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_attn.bias"):
                parameter.normal_()
    attachment = pk.attach(model, pk.RoutingConfig(r=3, train_bias=True))
    tiny.randomise(attachment.adapter)
    ids = tiny_text.batch("gpt2")["input_ids"]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        attachment.merge()
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)
