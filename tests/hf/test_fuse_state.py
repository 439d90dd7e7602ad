"""What fuse() leaves as it was, what PEFT's own calls do afterwards, and what takes it back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from peft.tuners import lora

import petal_kernels as pk
from petal_kernels.hf.peft_layers import Around, FusedLora
from tests.hf import fused
from tests.hf.method_families import FAMILIES


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_everything_but_classes_stays() -> None:
    model = fused.family("llama")
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    mlp.register_forward_hook(lambda *_: None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    fused.step(model, fused.batch("llama"))
    optimizer.step()
    state, before = copy.deepcopy(optimizer.state_dict()), model.state_dict()
    words, classes = repr(model), _classes(model)
    held = {name: dict(module.__dict__) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    pk.fuse(model)
    assert list(model.state_dict()) == list(before)
    assert all(v.data_ptr() == before[n].data_ptr() for n, v in model.state_dict().items())
    assert repr(model) == words
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [c.__name__ for c in _classes(model)] == [c.__name__ for c in classes]
    assert [c.__module__ for c in _classes(model)] == [c.__module__ for c in classes]
    assert all(issubclass(new, old) for new, old in zip(_classes(model), classes, strict=True))
    assert _classes(model) != classes
    for name, module in model.named_modules():
        now = {k: v for k, v in module.__dict__.items() if k != "_petal"}
        assert now == held[name], name
        assert ("_petal" in module.__dict__) == isinstance(module, Around)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert pk.unfuse(model) is model
    assert _classes(model) == classes
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == held


def test_twice_is_once() -> None:
    model, x = fused.block(), fused.rows()
    first = pk.fuse(model)
    classes, want = _classes(model), fused.run(model, x)
    second = pk.fuse(model)
    assert (first.rows, first.notes) == (second.rows, second.notes)
    assert _classes(model) == classes
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": 2}
    pk.unfuse(model)
    assert not any(isinstance(m, (FusedLora, Around)) for m in model.modules())
    pk.unfuse(model)


def test_what_the_second_call_says_holds() -> None:
    model = fused.family("llama")
    pk.fuse(model)
    pk.fuse(model, recompute_mlp=True)
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    assert mlp._petal.recompute is True


def _deepcopied(model: Any) -> Any:
    return copy.deepcopy(model)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [_deepcopied, _pickled, _saved])
def test_copies_are_fused_and_their_own(copied: Callable[[Any], Any]) -> None:
    model, given = fused.family("llama"), fused.batch("llama")
    classes = _classes(model)
    pk.fuse(model)
    want = fused.step(model, given)
    other = copied(model)
    assert _classes(other) == _classes(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with fused.operators() as calls:
        fused.same(fused.step(other, given), want)
    assert fused.forwards(calls)["gated_mlp_act"] == 2
    assert _classes(pk.unfuse(other)) == classes


def test_files_are_pefts(tmp_path: Path) -> None:
    model, given = fused.family("llama"), fused.batch("llama")
    pk.fuse(model)
    want = fused.step(model, given)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, is_trainable=True)
    fused.same(fused.step(again, given), want)
    pk.fuse(again)
    fused.same(fused.step(again, given), want, 0.0)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    got = fused.step(model, given)
    fused.same({n.replace("second", "default"): v for n, v in got.items()}, want)


# -- PEFT's own calls -----------------------------------------------------------------------------


def _second(model: Any, **config: Any) -> None:
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["a", "b", "c"]}
    torch.manual_seed(9)
    model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, **settings | config))


def _switch(model: Any) -> None:
    _second(model)
    model.set_adapter("other")


def _delete(model: Any) -> None:
    _switch(model)
    model.delete_adapter("default")


def _again(model: Any) -> None:
    _delete(model)
    torch.manual_seed(11)
    config = peft.LoraConfig(r=5, target_modules=["a", "b"], init_lora_weights=False)
    model.add_adapter("default", config)
    model.set_adapter("default")


def _both(model: Any) -> None:
    _second(model)
    model.base_model.set_adapter(["default", "other"])


def _off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _on_again(model: Any) -> None:
    _off(model)
    model.base_model.enable_adapter_layers()


def _merge(model: Any) -> None:
    model.merge_adapter()


def _unmerge(model: Any) -> None:
    _merge(model)
    model.unmerge_adapter()


def _scaled(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, lora.LoraLayer):
            module.scale_layer(2.5)


def _dora(model: Any) -> None:
    _second(model, use_dora=True)
    model.set_adapter("other")


def _partial(model: Any) -> None:
    _second(model, target_modules=["b"])
    model.set_adapter("other")


def _frozen(model: Any) -> None:
    model.base_model.set_requires_grad("default", False)
    model.base_model.model.a.lora_A["default"].weight.requires_grad_(True)


# What is done, and the operator's forwards then.
CHANGES: list[tuple[Callable[[Any], None], int]] = [
    *((_switch, 2), (_delete, 2), (_again, 1), (_both, 0), (_off, 0), (_on_again, 2)),
    *((_merge, 0), (_unmerge, 2), (_scaled, 2), (_dora, 0), (_partial, 1), (_frozen, 2)),
]


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize(("change", "count"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_pefts_calls_afterwards(change: Callable[[Any], None], count: int) -> None:
    """The same as in a model that is not fused, and run by what can run it."""
    plain, x = fused.block(), fused.rows()
    model = copy.deepcopy(plain)
    pk.fuse(model)
    change(plain)
    change(model)
    want = fused.run(plain, x)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls).get("lowrank_linear", 0) == count


def test_disabled_for_a_block() -> None:
    model, x = fused.block(), fused.rows()
    with model.disable_adapter():
        want = model(x)
    pk.fuse(model)
    on = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), on)
    assert not torch.allclose(on, want)


def test_an_adapter_for_each_sample() -> None:
    plain = fused.block().eval()
    _second(plain)
    model = copy.deepcopy(plain)
    pk.fuse(model)
    x = fused.rows(torch.float64, 4, 3).detach()
    names = ["default", "other", "__base__", "default"]
    want = plain(x, adapter_names=names)
    with fused.operators() as calls:
        torch.testing.assert_close(model(x, adapter_names=names), want, rtol=0, atol=0)
    assert not calls
    with pytest.raises(ValueError, match="adapter_names"):
        model(x, adapter_names=names[:2])


def test_merged_and_unloaded_nothing_is_left() -> None:
    plain, given = fused.family("llama"), fused.batch("llama")
    model = copy.deepcopy(plain)
    want = plain.merge_and_unload()
    pk.fuse(model)
    got = model.merge_and_unload()
    assert _classes(got) == _classes(want)
    assert not any("_petal" in module.__dict__ for module in got.modules())
    torch.testing.assert_close(got(**given).logits, want(**given).logits, rtol=0, atol=0)


def test_unloaded_nothing_is_left() -> None:
    model = fused.family("llama")
    pk.fuse(model)
    assert _classes(model.unload()) == _classes(FAMILIES["llama"].build())


def test_a_member_that_is_put_there_again_stays_joined() -> None:
    model = fused.block()
    pk.fuse(model)
    inner = model.base_model.model
    inner.a = inner.a
    assert issubclass(type(inner), Around)
    inner.a = inner.b
    assert type(inner) is fused.Block


def test_a_member_that_is_replaced_behind_its_back() -> None:
    """Through the dictionary no attribute is set: the module still runs what stands there."""
    model, x = fused.block(), fused.rows()
    plain = copy.deepcopy(model)
    for each in (plain, model):
        if each is model:
            pk.fuse(model)
        inner = each.base_model.model
        inner._modules["a"] = nn.Linear(6, 5, dtype=torch.float64)
        nn.init.constant_(inner.a.weight, 0.5)
        nn.init.zeros_(inner.a.bias)
    fused.same(fused.run(model, x), fused.run(plain, x))


def test_layers_that_peft_adds_later_wait_for_the_next_call() -> None:
    model, x = fused.block(target_modules=["a"]), fused.rows()
    pk.fuse(model)
    _second(model)
    model.set_adapter("other")
    inner = model.base_model.model
    assert type(inner.b) is lora.Linear
    want = fused.run(model, x)
    pk.fuse(model)
    assert isinstance(inner.b, FusedLora)
    with fused.operators() as calls:
        fused.same(fused.run(model, x), want)
    assert fused.forwards(calls) == {"lowrank_linear": 2}


def test_adapters_of_transformers_own_call() -> None:
    """No PeftModel around it."""
    model: Any = FAMILIES["llama"].build().train()
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter(config)
    given = fused.batch("llama")
    want = fused.step(model, given)
    pk.fuse(model)
    with fused.operators() as calls:
        fused.same(fused.step(model, given), want)
    assert fused.forwards(calls)["lowrank_linear"] == 2


def test_one_layer_by_itself() -> None:
    layer, x = fused.block().base_model.model.a, fused.rows()
    want = fused.run(layer, x)
    report = pk.fuse(layer)
    assert len(report.rows) == 1
    fused.same(fused.run(layer, x), want)
    assert type(pk.unfuse(layer)) is lora.Linear


# -- refused --------------------------------------------------------------------------------------


def test_what_is_no_module_is_refused() -> None:
    for call in (pk.fuse, pk.unfuse):
        with pytest.raises(TypeError, match=r"model: want a torch.nn.Module, got a dict"):
            call({})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"recompute_mlp": 1}, TypeError, "recompute_mlp: want a bool"),
        ({"tokens": (8,)}, ValueError, "tokens: want"),
        ({"tokens": (8, -1)}, ValueError, "tokens: want"),
    ],
)
def test_other_arguments_are_refused(
    keywords: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = fused.block()
    classes = _classes(model)
    with pytest.raises(error, match=words):
        pk.fuse(model, **keywords)
    assert _classes(model) == classes


def test_a_model_without_lora_is_refused() -> None:
    with pytest.raises(ValueError, match="want a model with LoRA layers of PEFT's, got a Block"):
        pk.fuse(fused.Block())


def test_another_method_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(fused.Block(), peft.LoHaConfig(target_modules=["a"]))
    with pytest.raises(ValueError, match=r"base_model.model.a first: a Linear of peft.*loha"):
        pk.fuse(model)


def test_a_class_put_in_front_is_not_taken_away() -> None:
    """As `fully_shard` does it."""
    model = fused.block()
    pk.fuse(model)
    inner = model.base_model.model
    classes = _classes(model)
    own = type(inner.c)
    inner.c.__class__ = type("Sharded", (own,), {})
    changed = _classes(model)
    for call in (pk.unfuse, pk.fuse):
        with pytest.raises(RuntimeError, match="class of a module was changed since fuse"):
            call(model)
        assert _classes(model) == changed
    inner.c.__class__ = own
    assert _classes(model) == classes
    pk.unfuse(model)


def test_an_adapter_of_this_package_is_left_alone() -> None:
    """Attached to the same layers, it keeps its parts; PEFT's linears run one by one."""
    model, given = fused.family("llama", target_modules=["q_proj", "v_proj"]), fused.batch("llama")
    inner = model.base_model.model
    attachment = pk.attach(inner, pk.LoraConfig(target_modules=["k_proj", "o_proj"]))
    model.base_model.set_adapter("default")
    taken = {name: m.__dict__.get("_petal") for name, m in inner.named_modules()}
    want = fused.step(model, given)
    pk.fuse(model)
    assert {name: m.__dict__.get("_petal") for name, m in inner.named_modules()} == taken
    fused.same(fused.step(model, given), want)
    attachment.detach()
    pk.unfuse(model)
