"""The weighted sum of LoRA adapters as one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from tests.hf import methods, tiny_text

_all = partial(pk.LoraConfig, target_modules="all-linear")
_MEMBERS = {
    "one": _all(r=4, lora_alpha=6),
    "two": _all(r=3, use_rslora=True, lora_dropout=0.1),
    "some": pk.LoraConfig(r=5, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "ranks": _all(r=2, rank_pattern={"q_proj": 4, "layers.0.mlp.up_proj": 1}),
    "pissa": _all(r=3, init_lora_weights="pissa"),
    "narrow": _all(r=2, adapter_dtype="bfloat16"),
}


def _built(family: str = "llama", members: Any = _MEMBERS) -> tuple[Any, Any]:
    model: Any = tiny_text.build(family, torch.float32).eval()
    return model, methods.several(model, members)


def _deltas(attachment: Any, name: str) -> dict[str, Tensor]:
    attachment.switch(name)
    return {path: wrapper.delta(torch.float64) for path, wrapper in attachment.wrappers()}


def _sum(attachment: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in _deltas(attachment, name).items():
            found[path] = found.get(path, torch.zeros_like(delta)) + weight * delta
    return found


@pytest.mark.parametrize(
    "weights",
    [
        {"one": 1.0},
        {"one": 0.3, "two": 0.7},
        {"two": -1.5, "some": 2},
        {"ranks": 0.5, "pissa": 0.25, "narrow": 1.0},
        dict.fromkeys(_MEMBERS, 1 / 6),
    ],
    ids="+".join,
)
def test_the_update_is_the_weighted_sum(weights: dict[str, float]) -> None:
    """The kind: a weight or a scale left out, factors of another linear, a rank too small."""
    model, attachment = _built()
    want = _sum(attachment, weights)
    attachment.combine("both", weights)
    assert attachment.active == list(weights)[-1]
    got = _deltas(attachment, "both")
    assert got.keys() == want.keys()
    for path, delta in want.items():
        torch.testing.assert_close(got[path], delta, rtol=1e-5, atol=1e-6)
    ranks = {path: len(t) for path, t in attachment.state_dict().items() if path.endswith("down")}
    assert max(ranks.values()) == attachment.config.r
    batch = tiny_text.batch("llama")
    with torch.no_grad():
        logits = model(**batch).logits
        attachment.merge()
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-4, atol=1e-4)


def test_of_fused_projections_too(tmp_path: Any) -> None:
    """Conv1D weights lie the other way; and the sum's file is one as any other."""
    members = {
        "x": pk.LoraConfig(r=2, target_modules=["c_attn"]),
        "y": pk.LoraConfig(r=3, target_modules=["c_fc", "c_attn"]),
    }
    _, attachment = _built("gpt2", members)
    weights = {"x": 2.0, "y": -0.5}
    want = _sum(attachment, weights)
    attachment.combine("both", weights)
    attachment.save(tmp_path, name="both")
    other: Any = pk.attach(tiny_text.build("gpt2", torch.float32), tmp_path)
    for path, wrapper in other.wrappers():
        torch.testing.assert_close(wrapper.delta(torch.float64), want[path], rtol=1e-5, atol=1e-6)
    assert len(want) == len(other.wrappers())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (_all(r=2, use_dora=True), "magnitudes"),
        (_all(r=2, bias="all"), "biases"),
        (_all(r=2, modules_to_save=["norm"]), "modules whole"),
        (_all(r=2, trainable_token_indices=[1, 2]), "rows of tokens"),
        (pk.RoutingConfig(r=2), "its method is 'routing'"),
        (pk.RoutingConfig(r=2, kind="adapter"), "its method is 'routing'"),
        (pk.ExpertConfig(r=2, experts=2), "its method is 'experts'"),
    ],
    ids=["dora", "bias", "whole", "tokens", "routing", "adapter", "experts"],
)
def test_what_is_no_sum_of_updates_is_refused(config: Any, why: str) -> None:
    _, attachment = _built(members={"one": _MEMBERS["one"], "other": config})
    with pytest.raises(ValueError, match=f"got 'other': .*{why}"):
        attachment.combine("both", {"one": 1.0, "other": 1.0})
    assert attachment.names == ["one", "other"]


@pytest.mark.parametrize(
    ("name", "weights", "error", "match"),
    [
        ("one", {"one": 1.0}, ValueError, "name: want a new one"),
        ("x", {"three": 1.0}, ValueError, "weights: want one of"),
        ("x", {}, TypeError, "weights: want a dict"),
        ("x", ["one"], TypeError, "weights: want a dict"),
        ("x", {"one": "1"}, TypeError, r"weights\['one'\]: want a float"),
        ("x", {"one": float("nan")}, ValueError, r"weights\['one'\]: want a finite"),
    ],
)
def test_bad_arguments(name: str, weights: Any, error: Any, match: str) -> None:
    _, attachment = _built(members={"one": _MEMBERS["one"]})
    with pytest.raises(error, match=match):
        attachment.combine(name, weights)
    assert attachment.names == ["one"]
