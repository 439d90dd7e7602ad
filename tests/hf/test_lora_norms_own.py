"""What makes a norm in front of LoRA's linears run as it stands, and the life of an attachment."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaRMSNorm

import petal_kernels as pk
from tests.hf import tiny_text
from tests.hf.tiny_norms import MODES, attached, built, step

pytestmark = pytest.mark.filterwarnings(
    "ignore:attach. left as they are", "ignore:None of the inputs have requires_grad"
)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def _off(model: Any, attachment: Any) -> Any:
    with attachment.disabled():
        return model(**tiny_text.batch("llama")).logits


def _merged(model: Any, attachment: Any) -> Any:
    model.eval()
    attachment.merge()
    return model(**tiny_text.batch("llama")).logits


def _autocast(model: Any, attachment: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**tiny_text.batch("llama")).logits


def _double(model: Any, attachment: Any) -> Any:
    return model.double()(**tiny_text.batch("llama")).logits


def _trained(model: Any, attachment: Any) -> Any:
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(True)
        layer.post_attention_layernorm.weight.requires_grad_(True)
    out = model(**tiny_text.batch("llama"))
    out.loss.backward()
    assert model.model.layers[0].input_layernorm.weight.grad is not None
    return out.logits


def _wide_norms(model: Any, attachment: Any) -> Any:
    """Norms kept in float32 in a bfloat16 model, whose output is float32."""
    model.bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.float(), layer.post_attention_layernorm.float()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _m, _a, y: y.bfloat16())
    return model(**tiny_text.batch("llama")).logits


def _replaced(model: Any, attachment: Any) -> Any:
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = nn.Identity().forward
    return model(**tiny_text.batch("llama")).logits


@pytest.mark.parametrize(
    "way", [_off, _merged, _autocast, _double, _trained, _wide_norms, _replaced]
)
def test_a_norm_runs_as_it_stands(way: Callable[[Any, Any], Tensor], runs: list[str]) -> None:
    """The very bits of a model without the option."""
    found = []
    for mode in ("module", "folded"):
        model = built("llama")
        attachment = attached(model, mode, lora_dropout=0.0)
        found.append(way(model, attachment))
    assert runs == []
    assert torch.equal(found[0], found[1])


class Marked(torch.Tensor):
    """A tensor of somebody's own class, which may hold others, as a sharded one does."""


def test_a_tensor_of_another_class_meets_the_norms_own_forward(runs: list[str]) -> None:
    model = built("llama")
    attached(model, "folded")
    norm, x = model.model.layers[0].input_layernorm, torch.randn(2, tiny_text.WIDTH)
    with torch.no_grad():
        want = norm.eval()(x)
        assert runs == ["rms"]
        got = norm(x.as_subclass(Marked))
    assert runs == ["rms"]
    assert isinstance(got, Marked)
    torch.testing.assert_close(got.as_subclass(Tensor), want)


def test_unmerged_it_runs_again(runs: list[str]) -> None:
    model = built("llama").eval()
    attachment = attached(model, "folded")
    model(**tiny_text.batch("llama"))
    assert len(runs) == 4
    attachment.merge()
    model(**tiny_text.batch("llama"))
    attachment.unmerge()
    assert len(runs) == 4
    model(**tiny_text.batch("llama"))
    assert len(runs) == 8


def test_a_norm_that_is_trained_is_left_alone(runs: list[str]) -> None:
    model = built("llama")
    attachment = attached(model, "folded", modules_to_save=["input_layernorm"])
    step(model, attachment, "llama")
    assert len(runs) == 2  # the other norm of two layers
    runs.clear()
    other = built("bert")
    attachment = attached(other, "folded", bias="all")
    got = step(other, attachment, "bert")
    assert runs == []
    assert any("LayerNorm.bias" in name for name in got)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_runs_its_own_norms(mode: str, runs: list[str]) -> None:
    model = built("llama")
    attached(model, mode, lora_dropout=0.0)
    batch = tiny_text.batch("llama")
    want = model(**batch).logits
    runs.clear()
    torch._dynamo.reset()
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    got = model(**batch).logits
    assert len(runs) == 2  # of the other layer
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


# -- the life of an attachment --------------------------------------------------------------------


def test_detach_gives_back_the_very_objects() -> None:
    model = built("llama")
    before = [(name, module, type(module)) for name, module in model.named_modules()]
    weights = [(name, id(p)) for name, p in model.named_parameters()]
    attachment = attached(model, "folded")
    norm = model.model.layers[0].input_layernorm
    assert type(norm).__name__ == "LlamaRMSNorm"
    assert isinstance(norm, LlamaRMSNorm)
    attachment.detach()
    after = [(name, module, type(module)) for name, module in model.named_modules()]
    assert [(n, id(m), id(c)) for n, m, c in after] == [(n, id(m), id(c)) for n, m, c in before]
    assert [(name, id(p)) for name, p in model.named_parameters()] == weights
    assert not any(n.startswith("_petal") for _, m, _ in after for n in m.__dict__)


def test_a_report_has_a_row_for_each_norm() -> None:
    model = built("gemma2")
    planned = pk.plan(model, pk.LoraConfig(target_modules="all-linear", frozen_norms="folded"))
    report = attached(model, "folded").report()
    for rows in (planned.rows, report.rows):
        mine = {row.module: row for row in rows if row.role == "norm"}
        assert len(mine) == 8
        row = mine["model.layers.1.pre_feedforward_layernorm"]
        assert row.shape == f"rms_plus_one {tiny_text.WIDTH}, folded"
        assert row.trainable == 0
        assert row.backend in ("native", "torch")
    assert "model.layers.*.input_layernorm x 2" in str(report)
    other = built("llama")
    rows = attached(other, "module").report().rows
    assert not [row for row in rows if row.role == "norm"]


def test_only_norms_of_layers_with_adapted_linears_are_taken() -> None:
    model = built("llava")
    attachment = attached(model, "fused", target_modules=["q_proj"], layers_to_transform=[1])
    names = [row.module for row in attachment.report().rows if row.role == "norm"]
    layer = "model.language_model.layers.1."
    assert names == [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
    both = built("llava")
    attachment = attached(both, "fused", target_modules="all-linear", parts=["projector"])
    assert not [row for row in attachment.report().rows if row.role == "norm"]


def test_a_norm_may_be_replaced_later() -> None:
    """Nothing of the adapter is lost with it."""
    model = built("llama")
    attachment = attached(model, "folded")
    model.model.layers[0].input_layernorm = nn.Identity()
    assert attachment.report().rows
    attachment.detach()
    assert isinstance(model.model.layers[0].input_layernorm, nn.Identity)


def test_files_do_not_depend_on_it(tmp_path: Any) -> None:
    model = built("llama")
    attachment = attached(model, "folded", lora_dropout=0.0)
    want = model(**tiny_text.batch("llama")).logits
    attachment.save(tmp_path)
    other = built("llama")
    second = attached(other, "module", lora_dropout=0.0, recompute_mlp=True)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load(tmp_path)
    got = other(**tiny_text.batch("llama")).logits
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    third = built("llama")
    config: Any = pk.attach(third, tmp_path).config
    assert config.frozen_norms == "folded"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own(way: Callable[[Any], Any], runs: list[str]) -> None:
    model = built("llama")
    attached(model, "folded", lora_dropout=0.0)
    other = way(model)
    want = model(**tiny_text.batch("llama")).logits
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    runs.clear()
    assert torch.equal(other(**tiny_text.batch("llama")).logits, want)
    assert len(runs) == 4


@pytest.mark.parametrize("value", ["Folded", "", None, True, 1])
def test_another_word_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^frozen_norms: want"):
        pk.LoraConfig(target_modules="all-linear", frozen_norms=value)


def test_the_published_form_is_left_as_it_is(runs: list[str]) -> None:
    model = built("llama")
    config = pk.LoraConfig(target_modules="all-linear", frozen_norms="folded")
    attachment = pk.attach(model, config, implementation="published")
    assert not [row for row in attachment.report().rows if row.role == "norm"]
    model(**tiny_text.batch("llama"))
    assert runs == []
