"""torch.compile of adapted layers: no graph break, the same values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import petal_kernels as pk
from tests.hf import compare, methods, tiny, tiny_text


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_whole_stack_compiles_without_a_graph_break(variant: str) -> None:
    model = tiny.instructblip(layers=2)
    config = pk.PetalConfig(r=4, variant=variant, dropout=0.0)
    attachment = pk.attach(model, config)
    tiny.randomise(attachment.adapter)
    stack = attachment.found.stacks[0].module.train()
    hidden, image = torch.randn(2, 12, 32), torch.randn(2, 5, 40)
    kwargs = {"encoder_hidden_states": image, "query_length": 5}
    runs = []
    for run in (stack, torch.compile(stack, fullgraph=True, backend="aot_eager")):
        for parameter in attachment.parameters():
            parameter.grad = None
        out = run(hidden, **kwargs).last_hidden_state
        out.square().sum().backward()
        runs.append(compare.Run(out.detach(), compare.gradients(attachment)))
    compare.assert_close(runs[1], runs[0], 1e-5)


def test_a_compiled_adapted_layer_with_dropout() -> None:
    model = tiny.instructblip()
    attachment: Any = pk.attach(model, pk.PetalConfig(r=4, dropout=0.5))
    tiny.randomise(attachment.adapter)
    layer = attachment.found.layers[1].module.train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 12, 32)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(compiled(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    outs[0].sum().backward()
    assert attachment.adapter.branch("text").down.grad is not None


def test_a_stack_with_experts_compiles_and_keeps_its_routing() -> None:
    model = tiny_text.build("llama", torch.float32)
    attachment: Any = pk.attach(model, pk.ExpertConfig(r=3, experts=3, top_k=2))
    tiny.randomise(attachment.adapter)
    stack, batch = model.model.train(), tiny_text.batch("llama")  # type: ignore[union-attr]
    batch.pop("labels")
    runs = []
    for run in (stack, torch.compile(stack, fullgraph=True, backend="aot_eager")):
        for parameter in attachment.parameters():
            parameter.grad = None
        out = run(**batch, use_cache=False).last_hidden_state
        (out.square().sum() + attachment.auxiliary_loss()).backward()
        runs.append(compare.Run(out.detach(), compare.gradients(attachment)))
    compare.assert_close(runs[1], runs[0], 1e-5)


def _calls(values: Any) -> Any:
    """A layer's arguments, outside of what they were computed from and of the attachment's own."""
    if isinstance(values, torch.Tensor):
        return values.detach()
    if isinstance(values, (tuple, list)):
        return tuple(_calls(each) for each in values)
    if isinstance(values, dict):
        return {n: _calls(v) for n, v in values.items() if not n.startswith("petal_")}
    return values


@methods.every("layer", quick=lambda row: row.name in ("route-lora-qformer", "vlpet-bart-small"))
def test_a_layer_of_every_method_is_one_graph(row: methods.Row) -> None:
    """The kind: a step that a graph cannot hold, as a tensor that a function is given twice."""
    if row.around == "domains":
        pytest.skip("a layer alone does not know the sequence that domains are given for")
    model, attachment = methods.attached(row)
    given = row.given()
    calls: list[Any] = []
    layer = next(each.module for each in attachment.found.layers if each.places)
    hook = layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with methods.around(attachment, given):
        methods.read(model.train(), given.batch)
    hook.remove()
    args, kwargs = _calls(calls[0])
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        methods.clear(attachment)
        with methods.around(attachment, given):
            out = run(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        own = attachment.named_parameters()
        grads = {name: p.grad for name, p in own if p.grad is not None}
        found.append({"out": out.detach(), **grads})
    assert not methods.differences(found[1], found[0])
    assert len(found[0]) > 1


@pytest.mark.slow
def test_a_hook_on_the_embeddings_runs_in_a_compiled_model() -> None:
    """The kind: a graph that leaves out the hook of checkpointing, and somebody else's with it."""
    model: Any = tiny_text.build("llama").eval()
    pk.attach(model, pk.RoutingConfig(r=2))
    ids = tiny_text.batch("llama")["input_ids"]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: 2 * output)
        want = model(ids, use_cache=False).logits
        got = torch.compile(model, backend="aot_eager")(ids, use_cache=False).logits
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(got, want)
