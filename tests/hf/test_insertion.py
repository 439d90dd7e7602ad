"""VL-PET, VL-Adapter and routing on every family: fused against published, and the whole life."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.nn.routed_lora import RoutedLoRALinear
from tests.hf import tiny, tiny_experts, tiny_text

SAME = 1e-9  # relative, in fp64
VLMS = ("llava", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl")


def vlpet(**more: Any) -> pk.VLPetConfig:
    return pk.VLPetConfig(r=6, value_r=4, scale=0.7, **more)


def routing(**more: Any) -> pk.RoutingConfig:
    return pk.RoutingConfig(r=6, **more)


CASES: dict[str, tuple[str, AdapterConfig]] = {
    **{f"bart-{g}": ("bart", vlpet(gate=g)) for g in ("large", "middleX", "middleY", "small")},
    "bart-release": ("bart", vlpet(gate="middleX", variant="release")),
    "bart-vladapter": ("bart", pk.VLAdapterConfig(r=6)),
    "bart-routing": ("bart", routing(kind="adapter", function="gram")),
    "bart-lora": ("bart", routing(function="mul")),
    **{f"t5-{g}": ("t5", vlpet(gate=g)) for g in ("large", "small")},
    "t5-release": ("t5", vlpet(gate="large", variant="release", init="zero")),
    "t5-vladapter": ("t5", pk.VLAdapterConfig(r=6)),
    **{f"gpt2-lora-{f}": ("gpt2", routing(function=f)) for f in ("none", "add", "expand", "gram")},
    "gpt2-merged": ("gpt2", routing(function="gram", groups="merged", train_bias=True)),
    "gpt2-adapter": ("gpt2", routing(kind="adapter", function="mul", share=True)),
    "roberta-lora": ("roberta", routing(function="mul", alpha=12.0)),
    "roberta-adapter": ("roberta", routing(kind="adapter", function="expand", residual=False)),
    **{f"{f}-lora": (f, routing(function="gram")) for f in VLMS},
    "llava-adapter": ("llava", routing(kind="adapter", function="add")),
}
EVERY = [pytest.param(*case, id=name) for name, case in CASES.items()]
SOME = [
    pytest.param(*CASES[name], id=name)
    for name in ("bart-large", "bart-small", "t5-large", "gpt2-merged", "llava-adapter")
]


def routed(config: AdapterConfig) -> bool:
    return getattr(config, "function", "none") != "none"


def attached(
    family: str, config: AdapterConfig, implementation: str = "fused"
) -> tuple[nn.Module, Any]:
    model = tiny_text.build(family)
    attachment = pk.attach(model, copy.deepcopy(config), implementation=implementation)
    tiny.randomise(attachment.adapter)
    model.to(torch.float64)
    return model, attachment


def seeing(
    attachment: Any, config: AdapterConfig, **kind: Any
) -> contextlib.AbstractContextManager[Any]:
    if not routed(config):
        return contextlib.nullcontext()
    return attachment.vision(tiny_text.features(**kind))


def step(
    model: nn.Module, attachment: Any, family: str, config: AdapterConfig, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    for p in attachment.parameters():
        p.grad = None
    with seeing(attachment, config, tokens=3, seed=seed + 3):
        out = model(**tiny_text.batch(family, seed=seed))
    out.loss.backward()
    grads = {}
    for name, p in attachment.named_parameters():
        assert p.grad is not None, name
        grads[name] = p.grad.clone()
    return out.logits.detach(), grads


def close(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=SAME, atol=SAME)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = float((got[1][name] - gradient).norm())
        assert error <= SAME * max(float(gradient.norm()), 1.0), name


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
