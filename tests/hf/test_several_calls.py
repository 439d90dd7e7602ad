"""Switching beside backwards, checkpointing, threads, compilers and engines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import petal_kernels as pk
from tests.hf import methods, tiny_text

_LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
_BATCH = tiny_text.batch("llama")
_SWITCHED = "another adapter is active than in the forward"
_CONFIGS = {
    "a": pk.LoraConfig(**_LORA),
    "b": pk.LoraConfig(**_LORA),
    "adapter": pk.RoutingConfig(r=4, kind="adapter"),
    "head": pk.LoraConfig(r=2, target_modules=["lm_head"]),
}


def _built(dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A llama with every config, "a" active."""
    model: Any = tiny_text.build("llama", dtype)
    return model, methods.several(model, _CONFIGS)


def _loss(model: Any) -> Tensor:
    loss: Tensor = model.train()(**_BATCH, use_cache=False).loss
    return loss


def _grads(attachment: Any, name: str) -> dict[str, Tensor | None]:
    attachment.switch(name)
    return {
        key: None if p.grad is None else p.grad.clone() for key, p in attachment.named_parameters()
    }


def _checkpointed(model: Any, how: str) -> None:
    if how == "torch's":
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = checkpoint_wrapper(layer)
    else:
        options = {"use_reentrant": how == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("other", ["b", "adapter", "head"])
def test_a_backward_goes_to_the_adapter_that_ran(other: str) -> None:
    model, attachment = _built()
    _loss(model).backward()
    want = _grads(attachment, "a")
    attachment.switch("a")
    methods.clear(attachment)
    loss = _loss(model)
    attachment.switch(other)
    loss.backward()
    assert all(grad is None for grad in _grads(attachment, other).values())
    got = _grads(attachment, "a")
    assert all(torch.equal(got[key], value) for key, value in want.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["a", "adapter", "head"])
def test_checkpointing_after_a_switch_changes_no_gradient(name: str, how: str) -> None:
    model, attachment = _built()
    attachment.switch(name)
    _loss(model).backward()
    want = _grads(attachment, name)
    methods.clear(attachment)
    attachment.switch("b")
    _checkpointed(model, how)
    attachment.switch(name)
    _loss(model).backward()
    got = _grads(attachment, name)
    assert all(torch.allclose(got[k], v, rtol=1e-9) for k, v in want.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "torch's"])
@pytest.mark.parametrize(("first", "then"), [("a", "b"), ("a", "head"), ("adapter", "a")])
def test_a_recompute_under_another_adapter_is_refused(how: str, first: str, then: str) -> None:
    """The kind: a gradient of another adapter, of equal shapes, in silence."""
    model: Any = tiny_text.build("llama")
    attachment = pk.attach(model, _CONFIGS[first], name="first")
    attachment.add("then", _CONFIGS[then])
    _checkpointed(model, how)
    loss = _loss(model)
    attachment.switch("then")
    with pytest.raises(RuntimeError, match=_SWITCHED):
        loss.backward()
    attachment.switch("first")
    assert all(parameter.grad is None for parameter in attachment.parameters())


# -- threads --------------------------------------------------------------------------------------


def test_off_is_a_threads_own_and_the_adapter_the_models() -> None:
    model, attachment = _built()
    model.eval()
    with torch.no_grad():
        want = {}
        for name in attachment.names:
            attachment.switch(name)
            want[name] = model(**_BATCH).logits
        with attachment.disabled():
            plain = model(**_BATCH).logits
    found: dict[str, Tensor] = {}
    inside, switched = threading.Event(), threading.Event()

    @torch.no_grad()
    def other() -> None:
        with attachment.disabled():
            inside.set()
            switched.wait(20)
            found["off"] = model(**_BATCH).logits
        found["on"] = model(**_BATCH).logits

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(20)
    attachment.switch("adapter")
    with torch.no_grad():
        found["here"] = model(**_BATCH).logits
    switched.set()
    thread.join()
    assert torch.equal(found["off"], plain)
    assert torch.equal(found["on"], want["adapter"])
    assert torch.equal(found["here"], want["adapter"])
    assert not torch.equal(want["adapter"], plain)


def test_off_holds_for_who_becomes_active_inside() -> None:
    model, attachment = _built()
    model.eval()
    with torch.no_grad(), attachment.disabled():
        plain = model(**_BATCH).logits
        attachment.switch("adapter")
        assert torch.equal(model(**_BATCH).logits, plain)


# -- compilers ------------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def _compiled(model: Any, graphs: list[int]) -> Any:
    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return module.forward

    return torch.compile(model, backend=backend, fullgraph=True)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(**_BATCH, use_cache=False).logits
    return logits


@pytest.mark.slow
def test_switching_between_adapters_of_one_shape_compiles_once(graphs: list[int]) -> None:
    """The kind: a graph for each adapter, or one that runs another one's values."""
    model: Any = tiny_text.build("llama", torch.float32).eval()
    attachment = pk.attach(model, _CONFIGS["a"])
    compiled = _compiled(model, graphs)
    seen = [_logits(compiled)]
    attachment.add("b", _CONFIGS["b"])
    attachment.add("other", pk.LoraConfig(r=3, target_modules=["q_proj"]))
    for name in ("b", "default", "b"):
        attachment.switch(name)
        if len(seen) == 1:
            methods.train(attachment)
        seen.append(_logits(compiled))
        torch.testing.assert_close(seen[-1], _logits(model))
    assert len(graphs) == 1
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.allclose(seen[0], seen[1])
    attachment.switch("other")
    methods.train(attachment)
    torch.testing.assert_close(_logits(compiled), _logits(model))
    attachment.switch("b")
    assert torch.equal(_logits(compiled), seen[1])
    assert len(graphs) == 2


@pytest.mark.slow
def test_new_weights_from_a_file_compile_nothing(graphs: list[int], tmp_path: Path) -> None:
    model: Any = tiny_text.build("llama", torch.float32).eval()
    attachment = pk.attach(model, _CONFIGS["a"])
    compiled = _compiled(model, graphs)
    first, storages = _logits(compiled), [p.data_ptr() for p in attachment.parameters()]
    attachment.save(tmp_path / "first")
    methods.train(attachment)
    second = _logits(compiled)
    attachment.save(tmp_path / "second", format="peft")
    for folder, want in (("first", first), ("second", second), ("first", first)):
        attachment.load(tmp_path / folder)
        assert torch.equal(_logits(compiled), want)
    assert not torch.allclose(first, second)
    assert [p.data_ptr() for p in attachment.parameters()] == storages
    assert len(graphs) == 1


# -- engines --------------------------------------------------------------------------------------


def test_a_model_in_an_engine_is_not_switched(tmp_path: Path) -> None:
    """The kind: a reducer that waits for parameters that no longer run."""
    model, attachment = _built(torch.float32)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        attachment.switch("b")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            attachment.switch("a")
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            attachment.add("c", _CONFIGS["a"])
        assert attachment.active == "b"
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    attachment.switch("a")
