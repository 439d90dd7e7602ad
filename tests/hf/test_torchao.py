"""Bases that torchao has quantised: their weight is a tensor subclass in a plain nn.Linear, which
is called and never read. The reference is the model with the dequantised weights, which is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")
pytest.importorskip("peft")

import petal_kernels as pk
from tests.hf import fused, tiny, tiny_text

SAID = "base weight is a Int8Tensor"


def _quantised(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _dequantised(model: Any) -> Any:
    """The model with the values that its quantised weights stand for."""
    model = copy.deepcopy(model)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Int8Tensor":
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model


def _llama() -> Any:
    model: Any = tiny_text.build("llama", torch.float32)
    return _quantised(model)


CONFIGS = {
    "lora": pk.LoraConfig(r=3, target_modules="all-linear"),
    "mlp": pk.LoraConfig(
        r=3, target_modules="all-linear", recompute_mlp=True, frozen_norms="folded"
    ),
    "dora": pk.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True),
    "pissa": pk.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"),
    "routing": pk.RoutingConfig(r=3),
    "experts": pk.ExpertConfig(r=2, experts=3),
    "published": pk.LoraConfig(r=3, target_modules="all-linear"),
}


def _step(model: Any, attachment: Any) -> fused.Values:
    given = fused.batch("llama", torch.float32)
    found = fused.step(model, given)
    names = [name for name, _ in attachment.named_parameters()]
    assert len(found) == len(names) + 1  # each has a gradient
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_attach_computes_what_the_dequantised_model_computes(kind: str) -> None:
    quantised = _llama()
    models = [quantised, _dequantised(quantised)]
    found = []
    for model in models:
        torch.manual_seed(7)
        how = "published" if kind == "published" and model is quantised else "fused"
        attachment = pk.attach(model, CONFIGS[kind], implementation=how)
        if kind != "pissa":  # which begins with the weight's own directions
            tiny.randomise(attachment.adapter)
        found.append(_step(model, attachment))
        declined = attachment.report().declined
        assert [path for path, why in declined.items() if why != SAID] == []
        assert bool(declined) == (model is quantised)
    fused.same(found[0], found[1], 1e-4)


def test_what_it_was_is_kept_merged_and_given_back(tmp_path: Path) -> None:
    """Nothing is folded into a weight that only torchao can write; a file serves both bases."""
    model = _llama()
    plain = _dequantised(model)
    weights = {name: (id(p), p) for name, p in model.named_parameters()}
    attachment = pk.attach(model, CONFIGS["lora"])
    tiny.randomise(attachment.adapter)
    want = _step(model, attachment)
    merged = attachment.merge()
    assert merged.folded == []
    assert set(merged.kept.values()) == {SAID}
    with pytest.raises(ValueError, match=r"merge_and_unload: .* updates all fold into weights"):
        attachment.merge_and_unload()
    attachment.unmerge()
    attachment.save(tmp_path)
    fused.same(_step(plain, pk.attach(plain, tmp_path)), want, 1e-4)
    attachment.detach()
    assert {name: (id(p), p) for name, p in model.named_parameters()} == weights


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("autocast", [False, True])
def test_fuse_calls_the_base_and_fuses_the_update(autocast: bool) -> None:
    torch.manual_seed(0)
    block = _quantised(fused.Block(64).float())
    model = fused.adapted(block, target_modules=["a", "b", "c"])
    x = fused.rows(torch.float32, width=64)
    assert type(model.base_model.model.a).__name__ == "TorchaoLoraLinear"

    def ran() -> fused.Values:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fused.run(model, x)

    want = ran()
    report = pk.fuse(model)
    with fused.operators() as calls:
        got = ran()
    assert fused.forwards(calls) == {"lowrank_linear": 3}
    fused.same(got, want, 2e-2 if autocast else 1e-5)
    assert set(report.declined.values()) == {SAID}
    assert not [row for row in report.rows if row.backend == "peft"]
