"""Aurora's layers against the formulas written out; counts, initial values, context, bad input."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels.nn import ModeApproximation
from tests.hf import tiny
from tests.hf.tiny_blip import (
    TASKS,
    WIDTH,
    attached,
    batch,
    build,
    close,
    config_of,
    forward,
    gradients,
    step,
)


def matrices(shared: ModeApproximation, modes: range) -> list[Tensor]:
    if shared.core_kind == "cp":
        return [torch.diag(shared.core * shared.modes[m]) for m in modes]
    return [torch.einsum("abc,c->ab", shared.core, shared.modes[m]) for m in modes]


def delta(shared: ModeApproximation, m: Tensor) -> Tensor:
    return shared.scale * shared.up @ m.t() @ shared.down


def modes_of(attachment: Any, layer: str) -> dict[str, range]:
    """By the projection's own name."""
    sites = [site for site in attachment.found.places if layer in site.path]
    return {site.path.rpartition(".")[2]: attachment.method.modes[site.path] for site in sites}


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_vision_layer_is_auroras(variant: str) -> None:
    """Pre-LN; dW of every block of qkv, of the projection, of fc1's rows and of fc2's columns."""
    model, attachment = attached("retrieval", config_of(variant=variant, layout="blocks"))
    layer: Any = model.vision_model.encoder.layers[1]  # type: ignore[union-attr, index]
    shared = attachment.adapter.shared
    modes = modes_of(attachment, "vision_model.encoder.layers.1.")
    assert {name: len(own) for name, own in modes.items()} == {
        "qkv": 3,
        "projection": 1,
        "fc1": 4,
        "fc2": 4,
    }
    parts = {name: [delta(shared, m) for m in matrices(shared, modes[name])] for name in modes}
    rows = {name: torch.cat(parts[name]) for name in ("qkv", "fc1")}
    columns = {name: torch.cat(parts[name], dim=1) for name in ("projection", "fc2")}
    dw = rows | columns

    def linear(base: Any, name: str, x: Tensor) -> Tensor:
        return F.linear(x, base.weight + dw[name], base.bias)

    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    attention, mlp = layer.self_attn, layer.mlp
    heads = linear(attention.qkv, "qkv", layer.layer_norm1(x)).view(2, 5, 3, 4, WIDTH // 4)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    context = torch.softmax(q @ k.mT / math.sqrt(WIDTH // 4), -1) @ v
    context = context.transpose(1, 2).reshape(2, 5, WIDTH)
    a = x + linear(attention.projection, "projection", context)
    inner = F.gelu(linear(mlp.fc1, "fc1", layer.layer_norm2(a)))
    torch.testing.assert_close(layer(x), a + linear(mlp.fc2, "fc2", inner))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("with_image", [True, False])
def test_text_layer_is_auroras(variant: str, with_image: bool) -> None:
    """Post-LN; image keys and values through the same U; residuals only with image features."""
    model, attachment = attached("retrieval", config_of(variant=variant))
    layer: Any = model.text_encoder.encoder.layer[1]  # type: ignore[union-attr, index]
    shared, pairs = attachment.adapter.shared, attachment.adapter.layers["1"]
    first = attachment.method.modes[attachment.found.stacks[1].places[0].path].start + 6
    dw = [delta(shared, m) for m in matrices(shared, range(first, first + 6))]

    def attend(block: Any, x: Tensor, source: Tensor, updates: list[Tensor]) -> Tensor:
        own = block.self
        q, k, v = (
            F.linear(t, base.weight + update, base.bias).view(2, -1, 4, WIDTH // 4).transpose(1, 2)
            for t, base, update in zip(
                (x, source, source), (own.query, own.key, own.value), updates, strict=True
            )
        )
        context = torch.softmax(q @ k.mT / math.sqrt(WIDTH // 4), -1) @ v
        return block.output(context.transpose(1, 2).reshape(x.shape), x)

    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    image = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    a = attend(layer.attention, x, x, dw[:3])
    c = attend(layer.crossattention, a, image, dw[3:]) if with_image else a
    want = layer.output(layer.intermediate(c), c)
    if with_image:
        for name, t in (("self", a), ("cross", c)):
            want = want + 0.1 * (t * pairs[name].scale + pairs[name].shift)
    torch.testing.assert_close(layer(x, image if with_image else None), want)


def test_dropout_of_the_image_encoder_is_after_the_core() -> None:
    """One mask per block of outputs; one on the sum over the blocks of inputs."""
    model, attachment = attached("retrieval", config_of(core="tucker", dropout=0.5))
    shared = attachment.adapter.shared
    modes = modes_of(attachment, "vision_model.encoder.layers.0.")
    mlp = model.vision_model.encoder.layers[0].mlp.train()  # type: ignore[union-attr, index]
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    wide = torch.randn(9, 4 * WIDTH, dtype=torch.float64)
    rng = torch.tensor([3, 5])
    keep = philox.scaled_masks(rng, 0.5, 4, 9, 5, torch.float64)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(philox, "draw", lambda device: rng)
        got, got_wide = mlp.fc1(x), mlp.fc2(wide)
    z = x @ shared.down.t()
    pieces = [
        (mask * (z @ m)) @ shared.up.t()
        for mask, m in zip(keep, matrices(shared, modes["fc1"]), strict=True)
    ]
    want = F.linear(x, mlp.fc1.weight, mlp.fc1.bias) + 0.8 * torch.cat(pieces, -1)
    torch.testing.assert_close(got, want)
    blocks = wide.split(WIDTH, -1)
    total = sum(
        b @ shared.down.t() @ m for b, m in zip(blocks, matrices(shared, modes["fc2"]), strict=True)
    )
    want = F.linear(wide, mlp.fc2.weight, mlp.fc2.bias) + 0.8 * (keep[0] * total) @ shared.up.t()
    torch.testing.assert_close(got_wide, want)


@torch.no_grad()
def test_released_layout_mixes_the_modes() -> None:
    """Of the feed-forward: [R, R, 4] read as [R, 4 R], mode fastest, and used with the mode
    slowest; attention's modes are each one block's."""
    model, attachment = attached("retrieval", config_of(variant="release"))
    shared, modes = (
        attachment.adapter.shared,
        modes_of(attachment, "vision_model.encoder.layers.0."),
    )
    layer: Any = model.vision_model.encoder.layers[0]  # type: ignore[union-attr, index]
    mlp, qkv = layer.mlp, layer.self_attn.qkv

    def table(name: str) -> Tensor:
        return torch.stack(matrices(shared, modes[name]), dim=2).reshape(5, 20)

    x = torch.randn(3, WIDTH, dtype=torch.float64)
    w = (x @ shared.down.t() @ table("fc1")).view(3, 4, 5)
    update = 0.8 * (w @ shared.up.t()).reshape(3, 4 * WIDTH)
    torch.testing.assert_close(mlp.fc1(x), F.linear(x, mlp.fc1.weight, mlp.fc1.bias) + update)
    dw = torch.cat([delta(shared, m) for m in matrices(shared, modes["qkv"])])
    torch.testing.assert_close(qkv(x), F.linear(x, qkv.weight + dw, qkv.bias))
    x = torch.randn(3, 4 * WIDTH, dtype=torch.float64)
    z = (x.view(3, 4, WIDTH) @ shared.down.t()).reshape(3, 20)
    update = 0.8 * z @ table("fc2").t() @ shared.up.t()
    torch.testing.assert_close(mlp.fc2(x), F.linear(x, mlp.fc2.weight, mlp.fc2.bias) + update)


def test_context_reaches_the_matching_head() -> None:
    model, attachment = attached("retrieval", config_of(context="batch"))
    inputs = batch("retrieval")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = model.text_encoder(**text).last_hidden_state  # type: ignore[operator]
        outside = model(**inputs)
        head = model.itm_head
        for given in (features, features[:, 0]):
            with attachment.context(given):
                inside = model(**inputs)
            first = outside.question_embeds[:, 0] + 0.1 * features[:, 0].mean(0)
            torch.testing.assert_close(inside.itm_score, F.linear(first, head.weight, head.bias))  # type: ignore[union-attr, arg-type]
        with attachment.context(features), attachment.disabled():
            plain = model(**inputs).itm_score
        assert torch.equal(plain, forward(build("retrieval"), "retrieval")[0])
        assert torch.equal(model(**inputs).itm_score, outside.itm_score)
    with pytest.raises(ValueError, match=r"features: want shape \[B, T, 16\] or \[B, 16\]"):
        attachment.context(features[..., :4]).__enter__()
    with pytest.raises(TypeError, match="features: want a Tensor, got list"):
        attachment.context([1.0]).__enter__()
    attachment.detach()
    with pytest.raises(RuntimeError, match="context: this attachment was detached"):
        attachment.context(features).__enter__()
    with torch.no_grad():
        assert torch.equal(model(**inputs).itm_score, plain)


COUNTS = [
    ("retrieval", "release", 32, 125_696),
    ("retrieval", "release", 64, 411_136),
    ("vqa", "release", 32, 164_864),
    ("vqa", "release", 64, 452_608),
    ("caption", "release", 32, 125_696),
    ("retrieval", "paper", 32, 92_960),
]


@pytest.mark.parametrize(("task", "variant", "r", "count"), COUNTS)
def test_parameters_at_full_size(task: str, variant: str, r: int, count: int) -> None:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, TASKS[task])(transformers.BlipConfig())
    heads = ["vision_proj", "itm_head"] if task == "retrieval" else None
    config = pk.AuroraConfig(r=r, variant=variant, modules_to_save=heads)
    attachment: Any = pk.attach(model, config)
    adapter, texts = attachment.adapter, 2 if task == "vqa" else 1
    whole = 198_402 if heads else 0  # copies of the heads lie in the adapter
    assert sum(p.numel() for p in adapter.parameters()) == count + whole
    shared = adapter.shared
    core = r if variant == "paper" else r**3
    assert shared.core.numel() == core
    assert shared.down.numel() + shared.up.numel() == 2 * 768 * r
    assert shared.modes.shape == (12 * 12 + 12 * 6 * texts, r)
    assert sum(p.numel() for p in adapter.layers.parameters()) == 36_864 * texts
    report = attachment.report()
    assert report.trainable == count + whole
    assert sum(row.trainable for row in report.rows) == report.trainable
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.trainable
    assert "vision_model.encoder.layers.11.mlp.fc2" in str(report)


@torch.no_grad()
def test_initial_values_are_the_published_ones() -> None:
    model = build("retrieval")
    attachment: Any = pk.attach(model, pk.AuroraConfig(r=8, variant="release"))
    shared = attachment.adapter.double().shared
    assert not shared.up.any()
    modes = attachment.method.modes
    for site in attachment.found.places:
        vision = site.layer.row.name == "vision"
        columns = (4 if site.row.attention else 8) if vision else 1
        own = modes[site.path]
        largest = float(shared.modes[own.start : own.stop].abs().max())
        assert largest <= math.sqrt(6 / (8 + columns))
    mlp = [m for s in attachment.found.places if not s.row.attention for m in modes[s.path]]
    assert float(shared.modes[mlp].abs().max()) > 0.9 * math.sqrt(6 / (8 + 8))
    for p in attachment.adapter.layers.parameters():
        assert 0 < float(p.abs().max()) < 0.002
        p.zero_()  # with V at zero, the residuals are all that acts at step 0
    before = forward(build("retrieval"), "retrieval")[0]
    torch.testing.assert_close(forward(model, "retrieval")[0], before)


def test_text_without_image_features_leaves_the_residuals_out() -> None:
    model, attachment = attached("retrieval", config_of())
    out = model(**batch("retrieval"), use_itm_head=False).itm_score
    out.sum().backward()
    pairs = attachment.adapter.layers
    assert all(p.grad is None for p in pairs.parameters())
    assert all(p.grad is not None for p in attachment.adapter.shared.parameters())


def test_a_copied_model_uses_its_own_adapter() -> None:
    model, attachment = attached("vqa", config_of())
    with torch.no_grad():
        want = forward(model, "vqa")[0]
        twin = copy.deepcopy(model)
        for p in attachment.adapter.parameters():
            p.zero_()
        assert torch.equal(forward(twin, "vqa")[0], want)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_gradients_are_wide_in_16_bit(base: torch.dtype) -> None:
    """Under autocast, and over a 16-bit base; the outputs are close to those of fp32."""
    _, wide = attached("caption", config_of(dropout=0.1))
    want = wide.model(**batch("caption")).logits.detach().float()
    model = build("caption", base)
    attachment: Any = pk.attach(model, config_of(dropout=0.1))
    tiny.randomise(attachment.adapter)
    values = {k: v.to(base) if v.is_floating_point() else v for k, v in batch("caption").items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        got = model(**values).logits.detach().float()
        loss = model.train()(**values).loss
    assert float((got - want).norm()) <= 0.1 * float(want.norm())
    loss.backward()
    assert all(g.dtype == torch.float32 for g in gradients(attachment).values())


def test_text_without_cross_attention() -> None:
    model, attachment = attached("retrieval", config_of(), is_decoder=False)
    assert len(attachment.adapter.layers) == 0
    assert attachment.adapter.shared.modes.shape[0] == 2 * 12 + 2 * 3
    model(**batch("retrieval"), use_itm_head=False).itm_score.sum().backward()
    assert all(float(g.norm()) > 0 for g in gradients(attachment).values())


def test_a_base_that_is_not_plain_is_called() -> None:
    """A hooked base runs itself, in both forms of the image encoder's call and in text."""

    def run(hooked: bool, dropout: float) -> tuple[Tensor, dict[str, Tensor], Any]:
        model, attachment = attached("retrieval", config_of(dropout=dropout))
        for site in attachment.found.places[::2] if hooked else []:
            site.module.register_forward_hook(lambda *args: None)
        torch.manual_seed(3)
        return *step(model.train(), attachment, "retrieval"), attachment

    for dropout in (0.0, 0.3):
        want, got = run(False, dropout), run(True, dropout)
        if dropout == 0.0:  # else text projections served one by one draw other masks
            close(got[:2], want[:2])
        attachment = got[2]
        assert len(attachment.report().declined) == len(attachment.found.places[::2])
        report = attachment.merge()
        assert any("base has hooks" in why for why in report.kept.values())
        assert any(p.requires_grad for p in attachment.adapter.shared.parameters())


def refuses(message: str, task: str, config: pk.AuroraConfig, **changes: Any) -> None:
    model = build(task, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.attach(model, config)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "petal")


def test_bad_input() -> None:
    for values, message in (
        ({"core": "full"}, "core: want one of ('cp', 'tucker'), got 'full'"),
        ({"layout": "mixed"}, "layout: want one of ('blocks', 'aurora_release'), got 'mixed'"),
        ({"context": "mean"}, "context: want one of ('none', 'batch'), got 'mean'"),
        ({"dropout": 1.0}, "dropout: want a number with 0 <= dropout < 1, got 1.0"),
        ({"scale": float("inf")}, "scale: want a finite number, got inf"),
        ({"scale_shift": 1}, "scale_shift: want a bool, got 1"),
        ({"r": 0}, "r: want an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            pk.AuroraConfig(**values)
    nowhere = config_of(target_modules=["vision.fc3"])
    refuses("target_modules: ['vision.fc3'] match nothing", "vqa", nowhere)
    refuses("and none selected", "vqa", config_of(target_modules="nothing"))
    refuses("want one width in the image encoder", "vqa", config_of(), vision_width=32)
    refuses("multiples of the width 16", "vqa", config_of(), vision_inner=40)
    refuses("context: want 'none' for a BlipForQ", "vqa", config_of(context="batch"))
    saved = config_of(modules_to_save=["text_encoder"])
    refuses("modules_to_save: want modules without adapted", "vqa", saved)
    with pytest.raises(ValueError, match=r"config\.model_type is one of \['blip'\]"):
        pk.attach(nn.Linear(2, 2), config_of())
    _, attachment = attached("retrieval", config_of())
    with pytest.raises(ValueError, match="context: want an adapter attached with context='batch'"):
        attachment.context(torch.zeros(2, WIDTH)).__enter__()
    with pytest.raises(ValueError, match="already attached"):
        pk.attach(attachment.model, config_of())
