"""VL-PET and VL-Adapter on a post-LN layer: one call in the norm's place, and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels.hf.config import AdapterConfig
from petal_kernels.hf.methods.insertion import AfterBlock
from tests.hf import tiny, tiny_text

CONFIGS = {
    "large": pk.VLPetConfig(r=6, value_r=4, scale=0.7),
    "small": pk.VLPetConfig(r=6, value_r=4, gate="small"),
    "vladapter": pk.VLAdapterConfig(r=6),  # decoder too, cross-attention included
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
P = 0.4


def attached(config: AdapterConfig) -> tuple[Any, Any]:
    """A training model whose adapted layers drop, with an adapter that is not the identity."""
    model: Any = tiny_text.build("bart", torch.float32)
    attachment = pk.attach(model, config)
    tiny.randomise(attachment.adapter)
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.dropout = P if blocks(layer) else 0.0
    return model.train(), attachment


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose output is adapted."""
    return [m for m in model.modules() if isinstance(m.__dict__.get("_petal"), AfterBlock)]


def step(model: Any, attachment: Any, batches: int = 1) -> list[Tensor]:
    """Logits and gradients of forwards before one backward."""
    for p in attachment.parameters():
        p.grad = None
    torch.manual_seed(5)
    outs = [model(**tiny_text.batch("bart", seed=seed)) for seed in range(batches)]
    torch.stack([out.loss for out in outs]).sum().backward()
    return [*(out.logits.detach() for out in outs), *(p.grad for p in attachment.parameters())]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Wide(TorchDispatchMode):
    """Names of the operators that write values as wide as the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, (tuple, list)) else [out]
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        wide = any(isinstance(t, Tensor) and t.numel() >= 14 * tiny_text.WIDTH for t in found)
        if wide and not views:
            self.names.append(func._schema.name)
        return out


def test_a_layer_neither_drops_nor_adds_by_itself() -> None:
    """Two calls of ours, and nothing of H's size for a dropout, a sum or a norm."""
    model, _ = attached(CONFIGS["large"])
    layer = model.model.encoder.layers[0]
    x = torch.randn(2, 7, tiny_text.WIDTH, requires_grad=True)
    with Wide() as wide:
        layer(x, attention_mask=None)
    assert wide.names.count("petal::gated_bottleneck_fwd") == 2
    waste = ("dropout", "bernoulli", "aten::mul", "aten::div", "aten::add.", "layer_norm")
    names = [n + "." for n in wide.names]
    assert not [n for n in names if any(w in n for w in waste)], names


@EVERY
def test_the_bits_of_the_layer_that_drops_and_adds(
    config: AdapterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others hook a block they see its H, and the layer's own dropout and sum run in vain."""
    monkeypatch.setattr(philox, "draw", lambda device: torch.tensor([7, 9]))
    model, attachment = attached(config)
    want = step(model, attachment)
    seen: list[tuple[int, ...]] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        seen.append(tuple(h.shape))

    handles = [block.register_forward_hook(watch) for block in blocks(model)]
    assert same(step(model, attachment), want)
    assert len(seen) == len(handles)
    assert set(seen) <= {(2, 9, tiny_text.WIDTH), (2, 5, tiny_text.WIDTH)}
    for handle in handles:
        handle.remove()
    model.eval()
    assert not torch.equal(step(model, attachment)[0], want[0])


def test_the_default_generator_draws_seeds_alone() -> None:
    """One draw for every insertion; the layer's vain dropout would have moved the generator."""
    model, attachment = attached(CONFIGS["vladapter"])
    step(model, attachment)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for _ in blocks(model):
        philox.draw(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@EVERY
def test_checkpointing_and_two_forwards(config: AdapterConfig, reentrant: bool) -> None:
    """Two forwards before one backward, recomputed with their own masks."""
    want = step(*attached(config), batches=2)
    model, attachment = attached(config)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = step(model, attachment, batches=2)
    assert same(got[:2], want[:2])
    for a, b in zip(got, want, strict=True):  # the reentrant form sums gradients in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@EVERY
def test_a_forward_that_fails_leaves_nothing(
    config: AdapterConfig, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a block and its norm: neither the next run nor a disabled one sees anything of it."""
    model, attachment = attached(config)
    model.train(training)
    want = step(model, attachment)
    with attachment.disabled(), torch.no_grad():
        torch.manual_seed(5)
        plain = model(**tiny_text.batch("bart")).logits
    dropout = F.dropout

    def fail(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.numel() == 0:
            raise MemoryError
        return dropout(x, *args, **kwargs)

    for _ in range(2):
        monkeypatch.setattr(F, "dropout", fail)
        with pytest.raises(MemoryError):
            step(model, attachment)
        monkeypatch.setattr(F, "dropout", dropout)
        with attachment.disabled(), torch.no_grad():
            torch.manual_seed(5)
            assert torch.equal(model(**tiny_text.batch("bart")).logits, plain)
        assert same(step(model, attachment), want)
    assert all(layer.dropout == P for layer in model.model.encoder.layers)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@EVERY
def test_a_compiled_layer(config: AdapterConfig) -> None:
    """The empty tensor is part of the graph: no break, the same values and gradients."""
    model, attachment = attached(config)
    layer = model.model.encoder.layers[0]
    x = torch.randn(2, 7, tiny_text.WIDTH)
    runs = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        for p in attachment.parameters():
            p.grad = None
        torch.manual_seed(5)
        out = run(x, attention_mask=None)
        out.square().sum().backward()
        grads = [p.grad for p in attachment.parameters() if p.grad is not None]
        runs.append([out.detach(), *grads])
    assert len(runs[0]) > 8
    for got, want in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("watch", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_norm_that_somebody_watches_is_given_what_the_layer_gives_it(watch: str) -> None:
    """The kind: one of two kinds of hooks that nobody looked for."""
    model, _ = attached(CONFIGS["large"])
    norm, seen = model.model.encoder.layers[1].final_layer_norm, []
    getattr(norm, watch)(lambda module, args, *out: seen.append(tuple(args[0].shape)))
    ids = tiny_text.batch("bart")["input_ids"]
    with torch.no_grad():
        model(**tiny_text.batch("bart"))
    assert seen == [(*ids.shape, tiny_text.WIDTH)]
