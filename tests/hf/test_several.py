"""Several adapters on one model, by name: each is what it would be alone, for every method."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from tests.hf import methods, tiny_text
from tests.hf.methods import ROWS, Row, attached, differences, every, fresh, output, own, step

_LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}


def _beside(row: Row) -> Row:
    """Another row of the family, of another method where there is one."""
    others = [each for each in ROWS if each.family == row.family and each is not row]
    kind = type(row.config())
    other = [each for each in others if type(each.config()) is not kind]
    return (other or others or [row])[0]


def _two(row: Row, other: Row) -> tuple[nn.Module, Any]:
    """A model with both adapters, as separate attaches would have made them."""
    model, attachment = attached(row)
    torch.manual_seed(2)
    attachment.add("other", other.config())
    attachment.switch("other")
    methods.train(attachment)
    model.to(torch.float64)
    return model, attachment


# -- every method ---------------------------------------------------------------------------------


@every("several", quick=own)
def test_each_of_two_is_what_it_would_be_alone(row: Row) -> None:
    """The kind: something of the one that stays while the other is active, or is lost meanwhile."""
    other = _beside(row)
    model, attachment = _two(row, other)
    wanted = {each: step(each, *attached(each), each.given()) for each in (row, other)}
    for name, each in (("other", other), ("default", row), ("other", other), ("default", row)):
        attachment.switch(name)
        assert differences(step(each, model, attachment, each.given()), wanted[each], 0.0) == []
        with attachment.disabled():
            assert torch.equal(output(each, model), methods.plain(each))
    base, was = attachment.detach(), fresh(row)
    assert [type(m) for m in base.modules()] == [type(m) for m in was.modules()]
    assert base.state_dict().keys() == was.state_dict().keys()
    assert torch.equal(output(row, base), methods.plain(row))


@every("several", quick=methods.first)
def test_files_of_each(row: Row, tmp_path: Path) -> None:
    other = _beside(row)
    model, attachment = _two(row, other)
    model.float()
    want = output(other, model, attachment)
    attachment.switch("default")
    model.float()
    own = output(row, model, attachment)
    attachment.save_all(tmp_path)
    attachment.save(tmp_path / "again", name="other")
    assert attachment.active == "default"
    assert torch.equal(output(row, model, attachment), own)
    for folder in ("other", "again"):
        model, loaded = attached(row)
        loaded.add("b", tmp_path / folder)
        loaded.switch("b")
        assert torch.equal(output(other, model.float(), loaded), want)


# -- life -----------------------------------------------------------------------------------------


def _llama(dtype: torch.dtype = torch.float32) -> Any:
    model: Any = tiny_text.build("llama", dtype)
    return model


def _three() -> tuple[Any, Any]:
    model = _llama()
    configs = {
        "a": pk.LoraConfig(**_LORA),
        "b": pk.LoraConfig(r=3, target_modules=["q_proj"]),
        "c": pk.RoutingConfig(r=2, kind="adapter"),
    }
    return model, methods.several(model, configs)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(**tiny_text.batch("llama")).logits
    return logits


def _all(model: Any, attachment: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in attachment.names:
        attachment.switch(name)
        found[name] = _logits(model)
    attachment.switch("a")
    return found


def test_the_active_one_is_the_models() -> None:
    """The kind: parameters, states and reports that mean another adapter than runs."""
    model, attachment = _three()
    assert attachment.names == ["a", "b", "c"]
    for name in ("b", "c", "a"):
        attachment.switch(name)
        assert attachment.active == name
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in attachment.parameters()}
        assert attachment.state_dict().keys() == {
            key.removeprefix("petal.") for key in model.state_dict() if key.startswith("petal.")
        }
        others = [each for each in "abc" if each != name]
        assert f"active adapter: {name}; waiting: {', '.join(others)}" in str(attachment.report())
        assert pk.attachment(model) is attachment
    single = pk.attach(_llama(), pk.LoraConfig(**_LORA))
    assert "waiting" not in str(single.report())


def test_training_one_leaves_the_others() -> None:
    model, attachment = _three()
    before = _all(model, attachment)
    attachment.switch("b")
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=0.1)
    model.train()(**tiny_text.batch("llama")).loss.backward()
    optimizer.step()
    after = _all(model, attachment)
    assert [torch.equal(before[name], after[name]) for name in "abc"] == [True, False, True]
    attachment.switch("a")
    assert all(parameter.grad is None for parameter in attachment.parameters())


def test_a_mode_and_a_device_of_the_model_reach_who_waited() -> None:
    """The kind: a wrapper that came back drops in evaluation."""
    model = _llama()
    attachment = pk.attach(model, pk.LoraConfig(**_LORA, lora_dropout=0.5))
    attachment.add("b", pk.LoraConfig(**_LORA, lora_dropout=0.5))
    for mode in (False, True):
        model.train(mode)
        for name in ("b", "default"):
            attachment.switch(name)
            assert {module.training for module in model.modules()} == {mode}
    model.to("meta")
    attachment.switch("b")
    assert {p.device.type for p in attachment.parameters()} == {"meta"}


def test_copies_and_pickles_have_their_own() -> None:
    model, attachment = _three()
    want = _all(model, attachment)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        other = pk.attachment(twin)
        assert other.names == ["a", "b", "c"]
        other.switch("c")
        assert torch.equal(_logits(twin), want["c"])
        methods.train(other, 9)
        assert not torch.equal(_logits(twin), want["c"])
        assert attachment.active == "a"
        assert torch.equal(_all(model, attachment)["c"], want["c"])


def test_forwards_of_others_run_under_every_adapter() -> None:
    """The kind: a forward on the instance that runs the part twice, or is lost."""
    seen = []

    def patch(layer: Any) -> None:
        inner = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.append(attachment.active)
            return inner(*args, **kwargs)

        layer.forward = forward

    model = _llama()
    patch(model.model.layers[0])
    attachment = pk.attach(model, pk.LoraConfig(**_LORA), name="a")
    attachment.add("b", pk.RoutingConfig(r=2, kind="adapter"))
    with attachment.disabled():
        plain = _logits(model)
    for name in ("b", "a", "b"):
        attachment.switch(name)
        alone = _llama()
        alone.load_state_dict({k: v for k, v in model.state_dict().items() if "petal" not in k})
        single = pk.attach(alone, attachment.config)
        single.load_state_dict(attachment.state_dict())
        methods.train(attachment)
        methods.train(single)
        got = _logits(model)
        assert torch.equal(got, _logits(alone))
        assert not torch.allclose(got, plain)
    assert seen == ["a", "b", "a", "b"]
    patch(model.model.layers[1])
    with pytest.raises(RuntimeError, match="switch: the forward of a LlamaDecoderLayer was"):
        attachment.switch("a")


def test_fp32_adapters_on_a_bf16_base() -> None:
    configs = {"default": pk.LoraConfig(**_LORA), "b": pk.RoutingConfig(r=2, kind="adapter")}
    model, want = _llama(torch.bfloat16), {}
    attachment = None
    for name, config in configs.items():
        alone = _llama(torch.bfloat16)
        torch.manual_seed(1)
        single = pk.attach(alone, config)
        methods.train(single)
        want[name] = _logits(alone)
        torch.manual_seed(1)
        if attachment is None:
            attachment = pk.attach(model, config)
        else:
            attachment.add(name, config)
        attachment.switch(name)
        methods.train(attachment)
        assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    assert attachment is not None
    for name, logits in want.items():
        attachment.switch(name)
        assert torch.equal(_logits(model), logits)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda a: a.add("a", pk.LoraConfig()), ValueError, "name: want a new one, got 'a'"),
        (lambda a: a.add("x/y", pk.LoraConfig()), ValueError, "name: want letters"),
        (lambda a: a.add(3, pk.LoraConfig()), TypeError, "name: want a string, got a int"),
        (lambda a: a.add("x", "no-such-folder/x/y"), (ValueError, OSError), "no-such-folder"),
        (lambda a: a.add("x", 3), TypeError, "config: want"),
        (lambda a: a.add("x", pk.PetalConfig()), ValueError, "model: want"),
        (lambda a: a.add("x", pk.LoraConfig(), implementation="x"), ValueError, "implementation"),
        (
            lambda a: a.add("x", pk.LoraConfig(modules_to_save=["no_such"])),
            ValueError,
            "modules_to_save",
        ),
        (lambda a: a.switch("x"), ValueError, r"name: want one of \['a', 'b', 'c'\], got 'x'"),
        (lambda a: a.remove("a"), ValueError, "name: want one that is not active, got 'a'"),
        (lambda a: a.remove(None), ValueError, "name: want one of"),
        (lambda a: a.save("x", name="x"), ValueError, "name: want one of"),
        (lambda a: pk.attach(_llama(), pk.LoraConfig(), name=""), ValueError, "name: want letters"),
    ],
)
def test_a_refused_call_changes_nothing(call: Any, error: Any, match: str) -> None:
    model, attachment = _three()
    before, modules = _all(model, attachment), [type(m) for m in model.modules()]
    with pytest.raises(error, match=match):
        call(attachment)
    assert (attachment.active, attachment.names) == ("a", ["a", "b", "c"])
    assert [type(m) for m in model.modules()] == modules
    after = _all(model, attachment)
    assert all(torch.equal(before[name], after[name]) for name in "abc")


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """The kind: an adapter that is half there since its tensors were refused."""
    model, attachment = _three()
    attachment.save(tmp_path)
    tensors = tmp_path / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    before = _all(model, attachment)
    with pytest.raises(ValueError, match="want"):
        attachment.add("x", tmp_path)
    assert attachment.names == ["a", "b", "c"]
    assert all(torch.equal(before[name], after) for name, after in _all(model, attachment).items())


def test_a_merged_model_is_not_switched() -> None:
    model, attachment = _three()
    want = _all(model, attachment)
    attachment.merge()
    for call in (
        lambda: attachment.switch("b"),
        lambda: attachment.add("x", pk.LoraConfig()),
        lambda: attachment.save_all("x"),
        lambda: attachment.combine("x", {"a": 1.0}),
    ):
        with pytest.raises(RuntimeError, match="merged; call unmerge"):
            call()
    attachment.unmerge()
    assert all(torch.equal(want[name], got) for name, got in _all(model, attachment).items())


def test_a_model_that_changed_meanwhile_is_refused_and_stays() -> None:
    model, attachment = _three()
    attachment.switch("c")
    want, head = _logits(model), model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(RuntimeError, match="switch: 1 modules"):
        attachment.switch("b")
    model.model.layers[0].self_attn.q_proj = head
    assert attachment.active == "c"
    assert torch.equal(_logits(model), want)
    attachment.switch("b")


def test_one_is_removed() -> None:
    model, attachment = _three()
    want = _all(model, attachment)
    attachment.remove("b")
    assert attachment.names == ["a", "c"]
    with pytest.raises(ValueError, match="want one of"):
        attachment.switch("b")
    attachment.add("b", pk.LoraConfig(**_LORA))
    found = _all(model, attachment)
    assert torch.equal(found["a"], want["a"])
    assert torch.equal(found["c"], want["c"])


def test_a_detached_one_is_done() -> None:
    model, attachment = _three()
    attachment.switch("c")
    attachment.detach()
    assert torch.equal(_logits(model), _logits(_llama()))
    for call in (lambda: attachment.switch("b"), lambda: attachment.remove("b")):
        with pytest.raises(RuntimeError, match="detached"):
            call()


def test_a_forward_that_came_under_another_adapter_is_refused() -> None:
    """The kind: a forward that a joined call leaves out, since it was read before."""
    model = _llama()
    attachment = pk.attach(model, pk.LoraConfig(**_LORA), name="a")
    attachment.add("head", pk.LoraConfig(r=2, target_modules=["lm_head"]))
    for name in ("a", "head"):
        attachment.switch(name)
        methods.train(attachment)
    mlp = model.model.layers[0].mlp
    mlp.forward = own = lambda x: 2 * x
    plain = _logits(model)
    with pytest.raises(RuntimeError, match=r"switch: 1 modules .*first: a LlamaMLP"):
        attachment.switch("a")
    assert attachment.active == "head"
    assert mlp.__dict__["forward"] is own
    assert torch.equal(_logits(model), plain)
    del mlp.forward
    attachment.switch("a")
