"""Modules that are trained whole: a copy runs in their place, wherever its parameters are used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import tiny, tiny_blip, tiny_text

IDS = torch.arange(5, 11)[None]


def _attached(family: str, names: list[str], **more: Any) -> tuple[Any, Any]:
    """With trained values in the copies, and updates that are still zero."""
    model: Any = tiny_text.build(family).eval()
    attachment = pk.attach(model, pk.RoutingConfig(r=2, modules_to_save=names, **more))
    with torch.no_grad():
        for name, parameter in attachment.named_parameters():
            if name.startswith("modules_to_save."):
                parameter.mul_(1.5)
    return model, attachment


def test_others_read_the_trained_values() -> None:
    """The kind: a loss, or a layer beside it, that multiplies by the base's weight."""
    model, attachment = _attached("llama", ["lm_head"])
    base = model.state_dict()["lm_head.weight"]
    for own in (model, copy.deepcopy(model)):
        with torch.no_grad():
            hidden = own.model(IDS).last_hidden_state
            want = own(IDS).logits
        torch.testing.assert_close(F.linear(hidden, own.lm_head.weight), want)
        assert torch.equal(own.lm_head.weight, 1.5 * base)
        with pk.attachment(own).disabled():
            assert torch.equal(own.lm_head.weight, base)
    assert pk.attachment(model) is attachment


def test_a_trained_matching_head_gains_the_context() -> None:
    """The kind: two parts of one module, one of which leaves the other out."""
    config = tiny_blip.config_of(context="batch", modules_to_save=["itm_head"])
    model, attachment = tiny_blip.attached("retrieval", config)
    inputs: Any = tiny_blip.batch("retrieval")
    features = torch.randn(3, tiny_blip.WIDTH, dtype=torch.float64)
    with torch.no_grad():
        outside: Any = model(**inputs)
        with attachment.context(features):
            inside: Any = model(**inputs)
    head: Any = model.itm_head
    assert not torch.equal(head.weight, model.state_dict()["itm_head.weight"])
    first = outside.question_embeds[:, 0] + 0.1 * features.mean(0)
    torch.testing.assert_close(inside.itm_score, F.linear(first, head.weight, head.bias))


def test_what_is_tied_is_trained_once_and_everywhere() -> None:
    base: Any = tiny_text.build("gpt2").eval()
    assert base.lm_head.weight is base.transformer.wte.weight
    model, attachment = _attached("gpt2", ["lm_head"])
    shapes = [tuple(p.shape) for p in attachment.parameters()]
    assert shapes.count(tuple(base.lm_head.weight.shape)) == 1
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        base.lm_head.weight.mul_(1.5)
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)


def test_half_precision_is_trained_in_full() -> None:
    """The kind: trained parameters that a GradScaler refuses, outputs that change the dtype."""
    model: Any = tiny_text.build("llama", torch.float16)
    names = ["model.norm", "lm_head"]
    attachment = pk.attach(model, pk.RoutingConfig(r=2, modules_to_save=names))
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    logits = model(IDS).logits
    assert logits.dtype == torch.float16
    hidden = torch.zeros(1, 2, tiny_text.WIDTH, dtype=torch.float16)
    assert model.model.norm(hidden).dtype == torch.float16
    assert model.state_dict()["lm_head.weight"].dtype == torch.float16
    logits.float().square().sum().backward()
    grads = {n: p.grad for n, p in attachment.named_parameters() if "lm_head" in n}
    assert [g is not None and g.dtype == torch.float32 for g in grads.values()] == [True]


class _Scaled(nn.Linear):
    """Computes otherwise in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (3.0 if self.training else 1.0)


def test_a_trained_module_follows_the_models_mode() -> None:
    model: Any = tiny_text.build("llama", torch.float32).eval()
    model.lm_head = _Scaled(tiny_text.WIDTH, tiny_text.VOCABULARY, bias=False)
    pk.attach(model, pk.RoutingConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        evaluated, trained, again = (model.train(mode)(IDS).logits for mode in (False, True, False))
    torch.testing.assert_close(trained, 3.0 * evaluated)
    assert torch.equal(again, evaluated)


class _Counting(nn.Linear):
    """Keeps a statistic that each forward replaces."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return super().forward(x)


def test_statistics_that_a_forward_replaces_are_the_copys() -> None:
    model: Any = tiny_text.build("llama", torch.float32)
    head = model.lm_head = _Counting(model.lm_head)
    attachment = pk.attach(model, pk.RoutingConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for _ in range(3):
            model(IDS)
        assert head.seen == 3
        assert model.state_dict()["lm_head.seen"] == 0
        assert attachment.state_dict()["modules_to_save.lm_head.seen"] == 3
        with attachment.disabled():
            model(IDS)
            assert head.seen == 1
    detached: Any = attachment.detach()
    assert detached.lm_head.seen == 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_recompute_runs_the_copy_that_its_forward_ran(checkpointed: bool) -> None:
    """In a layer where nothing but the copy is adapted; the backward is inside `disabled()`."""
    path = "model.layers.0.mlp.down_proj"
    more = {"target_modules": r".*layers\.1\..*q_proj"}
    model, attachment = _attached("llama", [path], **more)
    model.train()
    want = torch.autograd.grad(model(IDS).logits.square().sum(), model.get_submodule(path).weight)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(IDS).logits.square().sum()
    with attachment.disabled():
        loss.backward()
    (trained,) = (p for n, p in attachment.named_parameters() if "down_proj" in n)
    torch.testing.assert_close(trained.grad, want[0])
    tiny.randomise(attachment.adapter)


@pytest.mark.parametrize(("first", "then"), [("float16", "bfloat16"), ("float32", "bfloat16")])
def test_a_copy_follows_a_model_that_is_converted_later(first: str, then: str) -> None:
    """Whether a copy runs under autocast depends on what the base is now."""
    model: Any = tiny_text.build("llama", getattr(torch, first))
    attachment = pk.attach(model, pk.RoutingConfig(r=3, modules_to_save=["lm_head", "norm"]))
    model.to(getattr(torch, then))
    ids = tiny_text.batch("llama")["input_ids"]
    out = model(ids).logits
    assert out.dtype == getattr(torch, then)
    with attachment.disabled():
        assert torch.equal(model(ids).logits, out)
    out.float().sum().backward()
    whole = [p for name, p in attachment.named_parameters() if "modules_to_save" in name]
    assert all(p.grad is not None for p in whole)
