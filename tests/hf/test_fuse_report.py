"""Which of PEFT's layers fuse() leaves alone, and what its report says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from peft.tuners import lora

import petal_kernels as pk
from petal_kernels.hf import peft_layers
from petal_kernels.hf.peft_layers import FusedLora
from tests.hf import fused
from tests.hf.method_families import FAMILIES

_LINEAR: Any = lora.Linear


def _inner(model: Any) -> Any:
    return model.base_model.model


# -- layers that are declined as such -------------------------------------------------------------


class Custom(_LINEAR):  # type: ignore[misc]
    """A layer of somebody else's, with a forward of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs) * 2


class Inheriting(_LINEAR):  # type: ignore[misc]
    """One that changes nothing of the forward, as PEFT's for torchao."""


def test_a_class_with_a_forward_of_its_own_is_left() -> None:
    plain, x = fused.block(), fused.rows()
    _inner(plain).a.__class__ = Custom
    _inner(plain).b.__class__ = Inheriting
    model = copy.deepcopy(plain)
    report = pk.fuse(model)
    assert type(_inner(model).a) is Custom
    assert isinstance(_inner(model).b, FusedLora)
    row = next(row for row in report.rows if row.module.endswith(".a"))
    assert (row.backend, "whose forward is not known" in row.why) == ("peft", True)
    fused.same(fused.run(model, x), fused.run(plain, x))
    assert type(_inner(pk.unfuse(model)).b) is Inheriting


def test_a_layer_whose_forward_is_replaced_is_left() -> None:
    """As accelerate does it, which calls the forward that it found."""
    model, x = fused.block(), fused.rows()
    layer = _inner(model).a
    own = layer.forward
    layer.forward = lambda x: own(x) * 2
    want = fused.run(model, x)
    report = pk.fuse(model)
    row = next(row for row in report.rows if row.module.endswith(".a"))
    assert (row.backend, row.why) == ("peft", "its forward is replaced")
    fused.same(fused.run(model, x), want)


def test_a_layer_hooked_by_accelerate_afterwards() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (args[0] * 2,), kwargs

    plain, x = fused.block(), fused.rows()
    model = copy.deepcopy(plain)
    pk.fuse(model)
    for each in (plain, model):
        hooks.add_hook_to_module(_inner(each).a, Doubling())
        hooks.add_hook_to_module(_inner(each).c.base_layer, Doubling())
        hooks.add_hook_to_module(_inner(each).b.lora_B["default"], Doubling())
    want = fused.run(plain, x)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": 2}  # b is PEFT's


def test_an_older_peft_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused.block()
    monkeypatch.setattr(peft_layers, "_READ", ("base_layer", "lora_of_tomorrow"))
    with pytest.raises(ValueError, match="its PEFT has no lora_of_tomorrow"):
        pk.fuse(model)


def test_layers_of_other_kinds_are_left_and_told() -> None:
    """Of one model: an embedding and a convolution with LoRA, which are no linears."""
    plain = fused.family("llava", target_modules=["q_proj", "embed_tokens", "patch_embedding"])
    given = fused.batch("llava")
    model = copy.deepcopy(plain)
    report = pk.fuse(model)
    left = {row.module.rpartition(".")[2]: row for row in report.rows if row.backend == "peft"}
    assert sorted(left) == ["embed_tokens", "patch_embedding"]
    assert "a Embedding of peft.tuners.lora.layer" in left["embed_tokens"].why
    fused.same(fused.step(model, given), fused.step(plain, given))


def test_what_peft_says_of_its_layers_stays() -> None:
    model = fused.block()
    before = peft.get_layer_status(model), peft.get_model_status(model)
    pk.fuse(model)
    assert (peft.get_layer_status(model), peft.get_model_status(model)) == before


def test_an_attachment_to_what_is_fused_is_refused() -> None:
    """The module around joined layers is one call's already."""
    model: Any = FAMILIES["llama"].build()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    pk.fuse(model)
    attention = type(model.model.layers[0].self_attn)
    with pytest.raises(ValueError, match=r"pk\.unfuse"):
        pk.attach(model, pk.LoraConfig(target_modules=["k_proj", "o_proj"]))
    assert type(model.model.layers[0].self_attn) is attention
    pk.unfuse(model)


class TwoPairs(nn.Module):
    """Two linears of one tensor, and two of another."""

    a: nn.Linear
    b: nn.Linear
    c: nn.Linear
    d: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Linear(6, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x) * self.b(x)
        return self.c(y) + self.d(y)


def test_what_an_attachment_joins_stays_its_own() -> None:
    """PEFT's linears of the same module run one by one then."""
    torch.manual_seed(0)
    model, x = fused.adapted(TwoPairs(), target_modules=["c", "d"]), fused.rows()
    inner = _inner(model)
    attachment = pk.attach(inner, pk.LoraConfig(target_modules=["a", "b"], init_lora_weights=False))
    model.set_adapter("default")
    part, want = inner.__dict__["_petal"], fused.run(model, x)
    pk.fuse(model)
    assert inner.__dict__["_petal"] is part
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": 3}
    pk.unfuse(model)
    attachment.detach()


@pytest.mark.parametrize("name", "abcd")
def test_a_member_of_either_joined_call_that_is_replaced_ends_both(name: str) -> None:
    model = fused.adapted(TwoPairs(), target_modules=list("abcd"))
    pk.fuse(model)
    inner = _inner(model)
    with fused.operators() as calls:
        model(fused.rows())
    assert fused.forwards(calls) == {"lowrank_linear": 2}
    setattr(inner, name, nn.Linear(6, 6))
    assert type(inner) is TwoPairs


# -- the report -----------------------------------------------------------------------------------


def test_the_report_counts_and_names() -> None:
    model = fused.family("llava", target_modules=["q_proj", "up_proj", "linear_1"])
    report = pk.fuse(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    assert report.trainable == report.stored == trainable == sum(r.trainable for r in report.rows)
    assert report.base_parameters == everything - trainable
    assert {row.role for row in report.rows} == {
        *("vision.q_proj", "language.q_proj", "language.up_proj", "projector.linear_1")
    }
    row = next(row for row in report.rows if row.role == "language.q_proj")
    assert row.shape == "32 -> 32, r 4, scale 1.25"
    words = str(report)
    assert "self_attn.q_proj x 2" in words
    assert "one call: LlamaMLP (gate_proj, up_proj, down_proj) x 2" in words


def test_the_report_runs_nothing_and_says_what_runs() -> None:
    """No hook sees a tensor, no random number is drawn, and the backend is the real call's."""
    model = fused.block(lora_dropout=0.5)
    layer, seen = _inner(model).a, []
    for module in (layer, layer.base_layer, _inner(model)):
        module.register_forward_hook(lambda *_: seen.append(1))
    torch.manual_seed(4)
    before = torch.get_rng_state()
    with pk.use_backend("torch"):
        report = pk.fuse(model, tokens=(2, 3))
    assert not seen
    assert torch.equal(torch.get_rng_state(), before)
    assert {row.backend for row in report.rows} == {"torch"}
    assert report.tokens == (2, 3)
    assert report.declined == {"base_model.model.a": "base has hooks"}


def test_the_report_under_autocast_speaks_of_it() -> None:
    model = fused.block(torch.float32)
    assert not pk.fuse(model).declined
    with torch.autocast("cpu", torch.bfloat16):
        assert len(pk.fuse(model).declined) == 3
