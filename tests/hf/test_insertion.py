"""VL-PET, VL-Adapter and routing on every family: fused against published, and the whole life."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.nn.routed_lora import RoutedLoRALinear
from tests.hf import tiny_experts, tiny_text
from tests.hf.inserted import (
    CASES,
    EVERY,
    SAME,
    SOME,
    attached,
    close,
    routed,
    routing,
    seeing,
    step,
    vlpet,
)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "config"), EVERY)
def test_fused_equals_published(family: str, config: AdapterConfig) -> None:
    fused = step(*attached(family, config), family, config)
    published = step(*attached(family, config, "published"), family, config)
    close(fused, published)
    assert all(float(g.norm()) > 0 for g in fused[1].values())
    plain = tiny_text.build(family)(**tiny_text.batch(family)).logits
    assert not torch.allclose(fused[0], plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize(
    ("family", "width"), [("instructblip", 32), ("blip2", 32), ("caption", 16)]
)
def test_routing_in_layers_of_which_some_cross(family: str, width: int, kind: str) -> None:
    runs = []
    for form in ("fused", "published"):
        config = routing(kind=kind, function="gram")
        model, attachment = tiny_experts.attached(family, config, form)
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(3, 4, width, generator=generator, dtype=torch.float64)
        with attachment.vision(features):
            out, loss = tiny_experts.read(family, model)
        loss.backward()
        runs.append((out.detach(), {n: p.grad for n, p in attachment.named_parameters()}))
        crossed = sum(".cross" in row.role for row in attachment.report().rows)
        # The Q-Former's values read image features of another width: no route there.
        assert crossed == (2 if kind == "adapter" or family != "caption" else 4)
        attachment.detach()
        if kind == "lora" and family != "caption":
            config.target_modules = ["value"]
            with pytest.raises(ValueError, match="target_modules: want places that read the la"):
                pk.attach(model, config)
        with torch.no_grad():
            plain = tiny_experts.read(family, tiny_experts.build(family))[0]
            assert torch.equal(tiny_experts.read(family, model)[0], plain)
            assert not torch.allclose(out, plain, atol=1e-3)
    close(*runs)


def test_a_part_of_a_model_can_be_adapted() -> None:
    model: Any = tiny_experts.build("instructblip")
    rows = pk.attach(model.language_model, routing()).report().rows
    assert {row.role for row in rows} == {"decoder.query", "decoder.value"}
    with pytest.raises(ValueError, match="got one at 'language_model', which would be frozen"):
        pk.attach(model, routing())
    both: Any = tiny_experts.build("instructblip")
    adapters = [pk.attach(both, tiny_experts.petal()), pk.attach(both.language_model, routing())]
    own = {id(p) for adapter in adapters for p in adapter.parameters()}
    assert own == {id(p) for p in both.parameters() if p.requires_grad}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("family", "config"), EVERY)
def test_life(family: str, config: AdapterConfig, tmp_path: Path) -> None:
    """attach, train, save, load, disable, merge, detach."""
    model, attachment = attached(family, config)
    with torch.no_grad():
        before = tiny_text.build(family)(**tiny_text.batch(family)).logits
    keys = {k for k in model.state_dict() if not k.startswith("petal.")}
    assert keys == set(tiny_text.build(family).state_dict())
    optimizer = torch.optim.SGD(list(attachment.parameters()), lr=0.05)
    step(model, attachment, family, config)
    optimizer.step()
    with torch.no_grad(), seeing(attachment, config):
        trained = model(**tiny_text.batch(family)).logits
    attachment.save(tmp_path / "adapter")
    with torch.no_grad(), attachment.disabled():
        assert torch.equal(model(**tiny_text.batch(family)).logits, before)

    other = tiny_text.build(family)
    loaded: Any = pk.attach(other, copy.deepcopy(config))
    other.to(torch.float64)
    loaded.load(tmp_path / "adapter")
    assert loaded.config == attachment.config
    with torch.no_grad(), seeing(loaded, config):
        again = other(**tiny_text.batch(family)).logits
    assert torch.equal(again, trained)

    if routed(config):
        with pytest.raises(ValueError, match=r"merge: route .* depends on the vision features"):
            attachment.merge()
    else:
        report = attachment.merge()
        with torch.no_grad():
            merged = model(**tiny_text.batch(family)).logits
        torch.testing.assert_close(merged, trained)
        assert report.folded or report.kept
        attachment.unmerge()
    assert attachment.detach() is model
    with torch.no_grad():
        assert torch.equal(model(**tiny_text.batch(family)).logits, before)
    assert set(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize(("family", "config"), SOME)
def test_checkpointing_and_two_forwards(
    family: str, config: AdapterConfig, reentrant: bool
) -> None:
    """Two forwards with other inputs and features before one backward, recomputed."""

    def run(checkpointing: bool) -> dict[str, Tensor]:
        model, attachment = attached(family, config)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        total = torch.zeros((), dtype=torch.float64)
        for seed in range(2):
            with seeing(attachment, config, tokens=2, seed=seed):
                total = total + model(**tiny_text.batch(family, seed=seed)).loss
        total.backward()
        return {n: p.grad.clone() for n, p in attachment.named_parameters()}

    want, got = run(False), run(True)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=SAME, atol=SAME, msg=name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_recompute_projects_an_encoding_passed_by_keyword() -> None:
    """Reentrant checkpointing detaches positional arguments only: what all layers share must not be
    differentiated once per layer."""

    def run(checkpointing: bool) -> dict[str, Tensor]:
        model, attachment = attached("bart", vlpet(target_modules=["decoder.cross.value"]))
        for layer in model.model.decoder.layers:  # type: ignore[union-attr]
            layer.__class__ = by_keyword(type(layer))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
        batch = tiny_text.batch("bart")
        with torch.no_grad():
            encoded = model.model.encoder(batch.pop("input_ids"), batch["attention_mask"])  # type: ignore[union-attr, operator]
        model(encoder_outputs=encoded, **batch).loss.backward()
        value = attachment.adapter.value
        return {n: p.grad.clone() for n, p in value.named_parameters()}

    def by_keyword(cls: Any) -> Any:
        def call(self: Any, hidden: Tensor, mask: Any, encoded: Tensor, **more: Any) -> Any:
            return cls.__call__(self, hidden, mask, encoder_hidden_states=encoded, **more)

        return type(cls.__name__, (cls,), {"__call__": call})

    want, got = run(False), run(True)
    assert all(gradient.any() for gradient in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=SAME, atol=SAME, msg=name)


def test_a_folded_update_lies_on_the_parts_that_it_adapts() -> None:
    lora = RoutedLoRALinear(nn.Linear(8, 12), 3, parts=3, targets=(0, 2), alpha=6.0).double()
    nn.init.normal_(lora.up)
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        want = lora(x) - lora.base(x)
        torch.testing.assert_close(x @ lora.delta(torch.float64).t(), want)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_reentrant_checkpointing_refuses_trained_features() -> None:
    model, attachment = attached("gpt2", routing(function="mul"))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    wanted = pytest.raises(RuntimeError, match="vision: features that require grad need")
    with attachment.vision(tiny_text.features().requires_grad_()), wanted:
        model(**tiny_text.batch("gpt2"))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param(*CASES[n], id=n)
        for n in ("bart-large", "bart-routing", "t5-small", "gpt2-lora-gram", "llava-adapter")
    ],
)
def test_generation_with_cache_and_beams(family: str, config: AdapterConfig, beams: int) -> None:
    def run(implementation: str, cache: bool) -> Tensor:
        model, attachment = attached(family, config, implementation)
        inputs = tiny_text.batch(family)
        inputs.pop("labels")
        more = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with torch.no_grad(), seeing(attachment, config, tokens=2):
            return model.generate(**inputs, **more, use_cache=cache)  # type: ignore[operator]

    want = run("published", False)
    assert torch.equal(run("fused", True), want)
    assert torch.equal(run("fused", False), want)
