"""What lies in a weight, what is frozen meanwhile, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from tests.hf import tiny, tiny_text


def _lora(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = tiny_text.build(family, dtype).eval()
    attachment = pk.attach(model, pk.RoutingConfig(r=3))
    tiny.randomise(attachment.adapter)
    return model, attachment


def _first(model: Any) -> nn.Module:
    base: nn.Module = model.model.layers[0].self_attn.q_proj.base
    return base


def test_a_merged_weight_that_was_written_is_not_thrown_away() -> None:
    """The kind: a checkpoint loaded into a merged model, lost by unmerge."""
    model, attachment = _lora()
    attachment.merge()
    model.load_state_dict(model.state_dict(), strict=False)  # without the adapter's keys
    with pytest.raises(RuntimeError, match=r"layers\.0\..*q_proj was written since merge"):
        attachment.unmerge()
    model, attachment = _lora()
    attachment.merge()
    _first(model).weight = nn.Parameter(torch.zeros(32, 32))
    with torch.no_grad():
        _first(model).weight.add_(1.0)
    with pytest.raises(RuntimeError, match="was written since merge"):
        attachment.unmerge()
    with pytest.raises(RuntimeError, match="was written since merge"):
        attachment.detach()


def test_merge_freezes_what_is_folded_whole() -> None:
    """The kind: a parameter whose gradient misses what lies in a weight, and one that is frozen
    although a module still runs with it."""
    _, attachment = _lora()
    trained = [name for name, _ in attachment.named_parameters()]
    attachment.merge()
    assert list(attachment.named_parameters()) == []
    attachment.unmerge()
    assert [name for name, _ in attachment.named_parameters()] == trained

    model: Any = tiny.blip2()
    attention = model.qformer.encoder.layer[1].attention.attention
    attention.key.register_forward_hook(lambda module, args, output: None)
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    report = attachment.merge()
    path = "qformer.encoder.layer.1.attention.attention"
    assert [report.kept[f"{path}.{name}"] for name in ("query", "key", "value")] != []
    names = [name for name, _ in attachment.named_parameters()]
    assert any(name.startswith("branches.text.") for name in names)
    assert not any(name.startswith("branches.image.") for name in names)


def test_a_merged_model_may_be_converted() -> None:
    model, attachment = _lora()
    original, ids = _first(model).weight, torch.arange(5, 11)[None]
    attachment.merge()
    model.to(torch.float64)
    with torch.no_grad():
        merged = model(ids).logits
    attachment.unmerge()
    assert _first(model).weight is original
    assert _first(model).weight.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, merged, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_a_merged_model_has_no_adapter_to_apply_twice() -> None:
    model, attachment = _lora()
    own = list(attachment.state_dict())
    names = list(model.state_dict())
    assert f"petal.{own[0]}" in names
    attachment.merge()
    assert list(model.state_dict()) == [n for n in names if not n.startswith("petal.")]
    assert list(attachment.state_dict()) == own
    attachment.unmerge()
    assert list(model.state_dict()) == names

    model = tiny.blip2()  # whose residuals no weight holds
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    names = list(model.state_dict())
    attachment.merge()
    assert list(model.state_dict()) == names
