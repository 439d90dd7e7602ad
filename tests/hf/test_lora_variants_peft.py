"""DoRA, PiSSA, OLoRA and trained rows of tokens beside PEFT's own, where PEFT is installed: equal
parameters, values, gradients and merged weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from tests.hf import tiny_text

peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

ENDS = {
    "down": "lora_A.default.weight",
    "up": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
    "rows": "token_adapter.trainable_tokens_delta.default",
}
LINEAR: dict[str, Any] = {"target_modules": "all-linear"}
CONV1D: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {**LINEAR, "use_dora": True}),
    ("llama", {**LINEAR, "use_dora": True, "init_lora_weights": False, "use_rslora": True}),
    ("gpt2", {**CONV1D, "use_dora": True, "bias": "lora_only"}),
    ("bert", {"target_modules": ["query", "dense"], "use_dora": True, "bias": "all"}),
    ("llama", {**LINEAR, "init_lora_weights": "pissa"}),
    ("llama", {**LINEAR, "init_lora_weights": "pissa_niter_8"}),
    ("gpt2", {**CONV1D, "init_lora_weights": "pissa"}),
    ("llama", {**LINEAR, "init_lora_weights": "olora"}),
    ("llama", {**LINEAR, "init_lora_weights": "pissa", "use_dora": True}),
    *((family, {"trainable_token_indices": [7, 30, 3, 12, 0]})
      for family in ("llama", "gpt2", "t5", "bart", "gemma2", "bert")),
    ("llama", {"trainable_token_indices": {"embed_tokens": [7, 30], "lm_head": [4, 7]}}),
]  # fmt: skip


def _pair(family: str, values: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Our model and PEFT's with the same values, and what they train by PEFT's names."""
    config = peft.LoraConfig(r=3, lora_alpha=5, **values)
    model = tiny_text.build(family)
    other = peft.get_peft_model(tiny_text.build(family, torch.float32), config).double()
    attachment = pk.attach(model, config)
    model.double()
    _same_first(attachment, other)
    theirs = {name: p for name, p in other.named_parameters() if p.requires_grad}
    ours: dict[str, Any] = {}
    for name, parameter in attachment.named_parameters():
        path, _, kind = name.removeprefix("modules_to_save.").rpartition(".")
        if kind in ENDS:
            ours[f"base_model.model.{path}.{ENDS[kind]}"] = parameter
        else:
            ours[next(n for n in theirs if _plain(n) == f"{path}.{kind}")] = parameter
    assert sorted(ours) == sorted(theirs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.items():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
            ours[name].copy_(parameter)
    return attachment, other, ours, theirs


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _same_first(attachment: Any, other: Any) -> None:
    """Another run's decomposition may have other signs, a randomised one other values."""
    for name, module in attachment.adapter.named_modules():
        if isinstance(module, pk.nn.LoRALinear) and module.first_down is not None:
            layer = other.get_submodule(f"base_model.model.{name}")
            assert module.first_up is not None
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if attachment.config.init_lora_weights != "pissa_niter_8":
                taken = module.first_up @ module.first_down
                torch.testing.assert_close(taken, up @ down, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                module.first_down.copy_(down)
                module.first_up.copy_(up)


def _tolerance(values: dict[str, Any]) -> dict[str, Any]:
    """PEFT has rounded what is left of the weight to float32."""
    off = 3e-5 if "pissa" in str(values) or "olora" in str(values) else 1e-10
    return {"rtol": off, "atol": off}


@pytest.mark.parametrize(("family", "values"), CASES, ids=str)
def test_values_gradients_and_merged_weights_are_pefts(family: str, values: dict[str, Any]) -> None:
    attachment, other, ours, theirs = _pair(family, values)
    model, close = attachment.model, _tolerance(values)
    batch = tiny_text.batch(family)
    outs = [m.train()(**batch) for m in (model, other)]
    for out in outs:
        out.loss.backward()
    torch.testing.assert_close(outs[0].logits, outs[1].logits, **close)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name, **close)
    attachment.merge()
    other.merge_adapter()
    merged: list[Tensor] = [m.eval()(**batch).logits for m in (model, other)]
    torch.testing.assert_close(*merged, **close)
    torch.testing.assert_close(merged[0], outs[0].logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", [True, "olora"])
def test_dropout_of_a_magnitude_is_pefts(init: Any) -> None:
    """Mask for mask: both draw torch's own."""
    values = {**LINEAR, "use_dora": True, "lora_dropout": 0.5, "init_lora_weights": init}
    attachment, other, ours, theirs = _pair("llama", values)
    batch, losses = tiny_text.batch("llama"), []
    for model in (attachment.model, other):
        torch.manual_seed(1)
        losses.append(model.train()(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, **_tolerance(values))
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name, **_tolerance(values))
