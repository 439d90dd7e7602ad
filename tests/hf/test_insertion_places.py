"""VL-PET, VL-Adapter and routing: what a place reads and adds to, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels._runtime import philox
from tests.hf import tiny, tiny_text
from tests.hf.inserted import (
    attached,
    close,
    routing,
    step,
    vlpet,
)


def test_bart_encoder_layer_is_vl_pets() -> None:
    """Against the layer written out: both insertions, X the input of its block, post-LN."""
    model, attachment = attached("bart", vlpet(gate="large"))
    layer: Any = model.model.encoder.layers[0]  # type: ignore[union-attr, index]
    places = attachment.adapter.layers["0"]
    x = torch.randn(2, 7, tiny_text.WIDTH, dtype=torch.float64)

    def insertion(name: str, h: Tensor, x: Tensor) -> Tensor:
        m = places[name]
        y = h + F.linear(
            F.gelu(F.linear(h, m.down, m.down_bias), approximate="tanh"), m.up, m.up_bias
        )
        g = F.gelu(F.linear(x, m.gate_down, m.gate_down_bias), approximate="tanh")
        return 0.7 * torch.sigmoid(F.linear(g, m.gate_up, m.gate_up_bias)) * y

    with torch.no_grad():
        got = layer(x, attention_mask=None)
        with attachment.disabled():
            h = layer.self_attn(x)[0]
        a = layer.self_attn_layer_norm(x + insertion("attention", h, x))
        h = F.linear(F.gelu(F.linear(a, layer.fc1.weight, layer.fc1.bias)), layer.fc2.weight)
        want = layer.final_layer_norm(a + insertion("ffn", h + layer.fc2.bias, a))
    torch.testing.assert_close(got, want)


def test_dropout_of_a_post_norm_layer_is_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own probability, on the gated sum, while the layer trains."""
    model, attachment = attached("bart", vlpet(gate="middleY", train_norms=False))
    layer = model.model.encoder.layers[1].train()  # type: ignore[union-attr, index]
    layer.dropout = 0.4
    rng = torch.tensor([7, 9])
    monkeypatch.setattr(philox, "draw", lambda device: rng)
    x = torch.randn(2, 7, tiny_text.WIDTH, dtype=torch.float64)
    keep = philox.scaled_masks(rng, 0.4, 1, 14, tiny_text.WIDTH, torch.float64)[0].view_as(x)
    places = attachment.adapter.layers["1"]
    with torch.no_grad():
        got = layer(x, attention_mask=None)
        with attachment.disabled():
            h = layer.self_attn(x)[0]
            a = layer.self_attn_layer_norm(x + keep * places["attention"](h))
            h = layer.fc2(F.gelu(layer.fc1(a)))
            want = layer.final_layer_norm(a + keep * places["ffn"](h))
            layer.eval()
        torch.testing.assert_close(got, want)
        assert not torch.allclose(layer(x, attention_mask=None), want)


def test_autocast_keeps_the_residual_stream_wide() -> None:
    """Under autocast the norm after the block stays the layer's own; gradients stay fp32."""
    model = tiny_text.build("bart", torch.float32)
    attachment = pk.attach(model, vlpet())
    tiny.randomise(attachment.adapter)
    batch = tiny_text.batch("bart")
    exact = model(**batch).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    torch.testing.assert_close(out.logits.float(), exact, rtol=0.1, atol=0.1 * float(exact.std()))
    out.loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in attachment.parameters()
    )


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_t5_gate_reads_the_module_input_or_the_raw_stream(variant: str) -> None:
    model, attachment = attached("t5", vlpet(gate="middleX", variant=variant))
    block = model.encoder.block[0].layer[1]  # type: ignore[union-attr, index]
    m = attachment.adapter.layers["0"]["ffn"]
    x = torch.randn(2, 7, tiny_text.WIDTH, dtype=torch.float64)
    with torch.no_grad():
        normed = block.layer_norm(x)
        with attachment.disabled():
            h = block.DenseReluDense(normed)
        y = h + F.linear(
            F.gelu(F.linear(h, m.down, m.down_bias), approximate="tanh"), m.up, m.up_bias
        )
        seen = x + y if variant == "release" else normed + h
        gate = torch.sigmoid(seen @ m.gate_weight.unsqueeze(1) + m.gate_bias)
        torch.testing.assert_close(block(x), x + 0.7 * gate * y)


def test_small_gate_leaves_padding_out() -> None:
    """With a padding mask the outputs of the real tokens do not depend on how much padding there
    is."""
    model, _ = attached("bart", vlpet(gate="small"))
    ids = torch.randint(3, 50, (1, 6))
    long = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), 1)
    mask = (long > 0).long()
    with torch.no_grad():
        short = model.model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids))[0]  # type: ignore[union-attr, operator]
        padded = model.model.encoder(input_ids=long, attention_mask=mask)[0]  # type: ignore[union-attr, operator]
    torch.testing.assert_close(padded[:, :6], short)


def test_report_lists_every_place() -> None:
    _, attachment = attached("bart", vlpet())
    report = attachment.report()
    assert [r.role for r in report.rows].count("encoder.ffn") == 2
    trainable = sum(p.numel() for p in attachment.parameters())
    assert report.trainable == trainable
    text = str(report)
    assert "model.encoder.layers.0.self_attn" in text
    assert "gate large" in text
    assert "decoder.cross.value" in text


@pytest.fixture
def model() -> nn.Module:
    return tiny_text.build("gpt2")


def test_bad_input(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"target_modules: .'nowhere'. match nothing"):
        pk.attach(model, routing(target_modules=["nowhere"]))
    with pytest.raises(ValueError, match="want places that 'vlpet' adapts"):
        pk.attach(model, vlpet())
    with pytest.raises(ValueError, match=r"config\.model_type is one of"):
        pk.attach(nn.Linear(2, 2), routing())
    with pytest.raises(ValueError, match="function: want one of"):
        routing(function="multiply")
    assert all(p.requires_grad for p in model.parameters())
    attachment: Any = pk.attach(model, routing(function="mul"))
    with pytest.raises(ValueError, match="vision: want features for the route of"):
        model(**tiny_text.batch("gpt2"))
    for wrong, message in (
        (torch.zeros(2, 1, 31), "want the width 32"),
        (torch.zeros(32), r"want shape \[B, V, d\] or \[B, d\]"),
    ):
        with pytest.raises(ValueError, match=message), attachment.vision(wrong):
            pass
    wanted = pytest.raises(ValueError, match="batch that divides the hidden states' 2, got 3")
    with attachment.vision(tiny_text.features(size=3)), wanted:
        model(**tiny_text.batch("gpt2"))
    attachment.detach()
    with pytest.raises(RuntimeError, match="detached"):
        attachment.report()


def test_an_adapter_of_another_method_is_refused(tmp_path: Path) -> None:
    model, attachment = attached("bart", vlpet())
    attachment.save(tmp_path / "a")
    attachment.detach()
    other: Any = pk.attach(model, pk.VLAdapterConfig(r=6))
    with pytest.raises(ValueError, match="method: want 'vladapter' as attached, got 'vlpet'"):
        other.load(tmp_path / "a")


def test_a_copied_model_uses_its_own_adapter() -> None:
    model, attachment = attached("bart", vlpet())
    with torch.no_grad():
        want = model(**tiny_text.batch("bart")).logits
        twin = copy.deepcopy(model)
        for p in attachment.adapter.parameters():
            p.zero_()
        assert torch.equal(twin(**tiny_text.batch("bart")).logits, want)


def test_values_of_other_states_than_the_encoders_are_projected_anew() -> None:
    def doubled(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"key_value_states": 2 * kwargs["key_value_states"]}

    runs = []
    for form in ("fused", "published"):
        model, attachment = attached("bart", vlpet(gate="small"), form)
        block = model.get_submodule("model.decoder.layers.1.encoder_attn")
        block.register_forward_pre_hook(doubled, with_kwargs=True)
        runs.append(step(model, attachment, "bart", attachment.config))
    close(*runs)


def test_placed_modules_are_as_their_config_says() -> None:
    """Kind: a field that both forms leave out, so that they agree."""
    config = pk.VLPetConfig(
        module="lora", r=6, value_r=4, alpha=9.0, dropout=0.25, train_norms=False
    )
    model: Any
    model, attachment = attached("bart", config)
    layers = attachment.adapter.layers
    every = {f"{n}.{name}": m for n, places in layers.items() for name, m in places.items()}
    ranks = {name.partition(".")[2]: m.r for name, m in every.items()}
    assert ranks == {"encoder_attention": 6, "encoder_ffn": 6, "decoder_cross_value": 4}
    assert len(every) == 6
    assert all((m.scale, m.dropout) == (9.0 / m.r, 0.25) for m in every.values())
    fc2, update = model.model.encoder.layers[0].fc2, every["0.encoder_ffn"]
    before = fc2.base.weight.clone()
    assert not attachment.merge().kept
    want = before + 9.0 / 6 * update.up[0] @ update.down
    torch.testing.assert_close(fc2.base.weight, want)
    config = pk.VLPetConfig(
        module="compacter", r=8, value_r=4, division=4, factor_r=2, share_rule=True,
        value_scale=0.3, gate="small",
    )  # fmt: skip
    _, attachment = attached("bart", config)
    value, place = attachment.adapter.value, attachment.adapter.place(0, "ffn")
    assert (value.r, value.scale, value.division, value.factor_r) == (4, 0.3, 4, 2)
    assert (place.r, place.gate, place.division, place.factor_r) == (8, "small", 4, 2)
    rule = attachment.adapter.rule
    assert all(m.phm_up.rules() is rule.weight for m in (value, place))
