"""attach -> train -> save -> load -> merge -> detach."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.context import THREAD, Call
from petal_kernels.hf.parts import Adapted
from petal_kernels.nn import FrozenLinear
from tests.hf import compare, tiny, tiny_text

FAMILIES = tuple(tiny.FAMILIES)
FORMS = ("fused", "published")


def _snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that detach must give back."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "hooks": [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        ],
        "attributes": [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        "training": [(name, module.training) for name, module in model.named_modules()],
    }


def _train(model: nn.Module, attachment: pk.Attachment, family: str, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**tiny.batch(family)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_way(family: str, variant: str, tmp_path: Path) -> None:
    model = tiny.FAMILIES[family]()
    batch = tiny.batch(family)
    before, state = _snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        untouched = model(**batch).logits
    config = pk.PetalConfig(r=6, variant=variant, dropout=0.1)
    attachment = pk.attach(model, config)
    losses = _train(model, attachment, family, steps=8)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(**batch).logits
    assert compare.relative(trained, untouched) > 1e-3

    attachment.save(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter.safetensors",
        "petal_config.json",
    ]
    fresh = tiny.FAMILIES[family]()
    loaded = pk.attach(fresh, tmp_path / "adapter")
    assert loaded.config == config
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, trained)

    report = attachment.merge()
    with torch.no_grad():
        merged = model(**batch).logits
    assert compare.relative(merged, trained) <= 1e-5
    assert not torch.equal(merged, untouched)
    assert len(report.folded) == len(attachment.found.places)
    assert any("scale/shift" in name for name in report.kept)
    assert any("batch context" in name for name in report.kept) == (variant == "release")
    attachment.unmerge()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, trained)
    attachment.merge()
    assert attachment.detach() is model
    assert _snapshot(model) == before
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], state[k]) for k in state)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, untouched)


@pytest.mark.parametrize("form", FORMS)
def test_detach_gives_back_the_very_objects(form: str) -> None:
    model = tiny.instructblip()
    model.language_projection.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = _snapshot(model)
    attachment = pk.attach(model, pk.PetalConfig(r=4), implementation=form)
    assert sum(isinstance(m, FrozenLinear) for m in model.modules()) == 18
    layers = [m for m in model.modules() if type(m).__name__.endswith("QFormerLayer")]
    assert [isinstance(m, Adapted) for m in layers] == [True] * 4
    attachment.detach()
    assert _snapshot(model) == before
    with pytest.raises(RuntimeError, match="detach: this attachment was detached"):
        attachment.detach()
    again = pk.attach(model, pk.PetalConfig(r=4), implementation=form)
    again.detach()
    assert _snapshot(model) == before


@pytest.mark.parametrize("mode", [False, True])
def test_an_adapter_begins_in_its_models_mode(mode: bool) -> None:
    attachment = pk.attach(tiny.instructblip().train(mode), pk.PetalConfig(r=4))
    assert {module.training for module in attachment.adapter.modules()} == {mode}


def test_a_forward_of_the_instance_is_given_back() -> None:
    """As accelerate puts one on a module: it runs inside the layer's part."""
    calls: list[int] = []
    outs = []
    for patched in (False, True):
        model, batch = tiny.instructblip(), tiny.batch("instructblip")
        layer: Any = model.qformer.encoder.layer[0]  # type: ignore[union-attr, index]
        own = layer.forward

        def forward(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            calls.append(len(args))
            return own(*args, **kwargs)

        if patched:
            layer.forward = forward
        torch.manual_seed(0)
        attachment = pk.attach(model, pk.PetalConfig(r=4))
        tiny.randomise(attachment.adapter)
        with torch.no_grad():
            outs.append(model(**batch).logits)
    assert torch.equal(*outs)
    assert len(calls) == 1
    attachment.detach()
    assert layer.__dict__["forward"] is forward


def test_modules_replaced_since_attach_are_named(tmp_path: Path) -> None:
    """The kind: an adapter that trains and is saved while nothing runs it."""
    model = tiny.instructblip()
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    attention = model.qformer.encoder.layer[1].attention.attention  # type: ignore[union-attr, index]
    attention.query = new = nn.Linear(32, 32)
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: attachment.save(tmp_path),
        "report": attachment.report,
        "merge": attachment.merge,
        "named_parameters": lambda: list(attachment.parameters()),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"{name}: 1 .*\(first: qformer.*1\..*query\)"):
            call()
    attachment.detach()
    assert attention.query is new
    assert type(attention.key) is nn.Linear


def test_embeddings_may_be_replaced() -> None:
    """Nothing of an adapter is lost with frozen embeddings."""
    model: Any = tiny_text.build("llama")
    attachment = pk.attach(model, pk.RoutingConfig(r=3))
    new = nn.Embedding(tiny_text.VOCABULARY + 3, tiny_text.WIDTH)
    model.set_input_embeddings(new)
    assert attachment.report().trainable == sum(p.numel() for p in attachment.parameters())
    attachment.detach()
    assert model.get_input_embeddings() is new


def test_training_mode_follows_through_detach() -> None:
    model = tiny.instructblip()
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    model.train()
    attachment.detach()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_keeps_its_keys_and_its_storages(form: str) -> None:
    model = tiny.instructblip()
    before = model.state_dict()
    attachment = pk.attach(model, pk.PetalConfig(r=4), implementation=form)
    after = model.state_dict()
    own = [name for name in after if name.startswith("petal.")]
    assert [name for name in after if name not in own] == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert own == [f"petal.{name}" for name in attachment.state_dict()]
    values = {name: torch.randn_like(value) for name, value in after.items()}
    model.load_state_dict(values)
    assert all(torch.equal(model.state_dict()[name], values[name]) for name in values)


@pytest.mark.parametrize("form", FORMS)
def test_disabled_is_the_model_that_came_in(form: str) -> None:
    model, batch = tiny.instructblip(), tiny.batch("instructblip")
    with torch.no_grad():
        want = model(**batch).logits
        config = pk.PetalConfig(r=4, variant="release", modules_to_save=["language_projection"])
        attachment = pk.attach(model, config, implementation=form)
        tiny.randomise(attachment.adapter)
        model.language_projection.weight.add_(0.1)  # type: ignore[union-attr, operator]
        adapted = model(**batch).logits
        for merged in (False, True):
            with attachment.disabled():
                assert torch.equal(model(**batch).logits, want)
            if merged:
                assert compare.relative(model(**batch).logits, adapted) < 1e-5
            else:
                assert torch.equal(model(**batch).logits, adapted)
                attachment.merge()
        with pytest.raises(KeyError), attachment.disabled():
            raise KeyError
        assert compare.relative(model(**batch).logits, adapted) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_training_after_merge_raises(form: str) -> None:
    model, batch = tiny.blip2(), tiny.batch("blip2")
    attachment: Any = pk.attach(model, pk.PetalConfig(r=4), implementation=form)
    attachment.merge()
    with pytest.raises(RuntimeError, match="merge: already merged"):
        attachment.merge()
    model.train()
    with pytest.raises(RuntimeError, match="merged into the base weights and cannot be trained"):
        model(**batch)
    attachment.unmerge()
    model(**batch).loss.backward()
    assert attachment.adapter.branch("text").up.grad is not None
    with pytest.raises(RuntimeError, match="unmerge: not merged"):
        attachment.unmerge()


def test_merge_reports_the_rounding_of_a_narrow_base() -> None:
    model, batch = tiny.instructblip().bfloat16(), tiny.batch("instructblip")
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    tiny.randomise(attachment.adapter)
    original = {n: p for n, p in model.named_parameters() if not n.startswith("petal")}
    report = attachment.merge()
    assert report.dtype == torch.bfloat16
    assert 1e-4 < report.worst_rounding < 1e-1
    assert "bfloat16" in str(report)
    assert "kept as a module" in str(report)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    attachment.detach()
    assert all(p is original[n] for n, p in model.named_parameters())


def test_modules_to_save_are_trained_saved_and_given_back(tmp_path: Path) -> None:
    config = pk.PetalConfig(r=4, modules_to_save=["language_projection"])
    model = tiny.instructblip()
    original = model.language_projection.weight.clone()  # type: ignore[union-attr, operator]
    attachment = pk.attach(model, config)
    names = [name for name, _ in attachment.named_parameters()]
    assert "modules_to_save.language_projection.weight" in names
    _train(model, attachment, "instructblip")
    assert not torch.equal(model.language_projection.weight, original)  # type: ignore[union-attr, arg-type]
    attachment.save(tmp_path)
    other = tiny.instructblip()
    pk.attach(other, tmp_path)
    assert torch.equal(other.language_projection.weight, model.language_projection.weight)  # type: ignore[union-attr, arg-type]
    attachment.detach()
    assert torch.equal(model.language_projection.weight, original)  # type: ignore[union-attr, arg-type]


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copied_model_uses_its_own_adapter(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    batch = tiny.batch("instructblip")
    model = tiny.instructblip()
    attachment = pk.attach(model, pk.PetalConfig(r=4, variant="release"))
    tiny.randomise(attachment.adapter)
    other = copy_of(model)
    with torch.no_grad():
        want = model(**batch).logits
        assert torch.equal(other(**batch).logits, want)
        for parameter in other.petal.parameters():  # type: ignore[union-attr]
            parameter.zero_()
        assert torch.equal(model(**batch).logits, want)
        assert not torch.equal(other(**batch).logits, want)


def test_nothing_of_a_forward_is_kept() -> None:
    model, batch = tiny.instructblip(), tiny.batch("instructblip")
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    seen: list[weakref.ref[torch.Tensor]] = []
    block = attachment.found.layers[0].child("attention")
    handle = block.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    assert seen
    assert all(ref() is None for ref in seen)


def test_nothing_of_a_failed_forward_is_kept() -> None:
    def fail(module: nn.Module, args: object, output: object) -> None:
        raise KeyError("in the middle of a layer")

    model, batch = tiny.instructblip(), tiny.batch("instructblip")
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    handle = attachment.found.layers[2].child("attention").register_forward_hook(fail)
    with pytest.raises(KeyError, match="in the middle of a layer"):
        model(**batch)
    handle.remove()
    assert THREAD.running is None
    assert THREAD.frame is None


def test_a_group_is_computed_once_and_each_result_is_handed_out_once() -> None:
    from petal_kernels.hf.context import Given
    from petal_kernels.hf.methods.modes import ModeGroup, ModesFrame

    model = tiny.instructblip()
    pk.attach(model, pk.PetalConfig(r=4))
    layer: Any = model.qformer.encoder.layer[0]  # type: ignore[union-attr, index]
    attention, part = layer.attention.attention, layer._petal
    computed: list[int] = []
    compute = ModeGroup._compute

    def counting(group: ModeGroup, *args: object) -> object:
        computed.append(len(args[2]))  # type: ignore[arg-type]
        return compute(group, *args)  # type: ignore[arg-type]

    x = torch.randn(2, 3, 32)
    ModeGroup._compute = counting  # type: ignore[method-assign, assignment]
    try:
        want = [attention.query(x), attention.key(x), attention.value(x)]
        assert computed == [1, 1, 1]  # outside the layer nobody would fetch the others
        THREAD.frame = ModesFrame(part, Call(Given()), None, None, None)
        got = [attention.query(x), attention.key(x), attention.value(x)]
        assert computed == [1, 1, 1, 3]
        attention.key(x)  # its result was handed out: computed anew
        attention.query(x.clone())  # another tensor
        assert computed == [1, 1, 1, 3, 3, 3]
        attention.query(x)
        x.add_(1.0)  # the same tensor with other values
        torch.testing.assert_close(attention.value(x), attention.value.base(x))  # V is still zero
        assert computed == [1, 1, 1, 3, 3, 3, 3, 3]
        with torch.no_grad():
            attention.query(x)
        attention.key(x)  # the same tensor, with a graph
        assert computed == [1, 1, 1, 3, 3, 3, 3, 3, 3, 3]
    finally:
        ModeGroup._compute = compute  # type: ignore[method-assign]
        THREAD.frame = None
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_data_parallel_is_refused() -> None:
    model = tiny.instructblip()
    pk.attach(model, pk.PetalConfig(r=4))
    layer = model.qformer.encoder.layer[0]._replicate_for_data_parallel()  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        layer(torch.randn(1, 3, 32))


def test_use_after_detach_names_the_call() -> None:
    attachment = pk.attach(tiny.blip2(), pk.PetalConfig(r=4))
    attachment.detach()
    for name in ("save", "report", "merge"):
        with pytest.raises(RuntimeError, match=f"{name}: this attachment was detached"):
            getattr(attachment, name)(*(["x"] if name == "save" else []))


def test_a_layer_whose_forward_is_called_by_itself_is_adapted_whole() -> None:
    """Engines that cut a model into stages call `forward`: the residuals are part of it."""
    model = tiny.instructblip()
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    tiny.randomise(attachment.adapter)
    layer: Any = model.qformer.encoder.layer[0]  # type: ignore[union-attr, index]
    x, image = torch.randn(2, 9, 32), torch.randn(2, 5, 40)
    with torch.no_grad():
        want = layer(x, None, image, query_length=5)
        assert torch.equal(layer.forward(x, None, image, query_length=5), want)
