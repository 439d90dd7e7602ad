"""LoRA on every linear of a model, compiled as one graph: with checkpointing and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from petal_kernels.hf.methods import lora_parts
from tests.hf import tiny_text


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _adapted(family: str, dropout: float, checkpointed: bool) -> tuple[Any, Any]:
    model: Any = tiny_text.build(family, torch.float32).train()
    torch.manual_seed(1)
    config = pk.LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False
    )
    attachment = pk.attach(model, config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, attachment


def _step(model: Any, attachment: Any, family: str) -> dict[str, Tensor]:
    torch.manual_seed(7)
    batch = tiny_text.batch(family)
    batch.pop("labels")  # GPT-2's loss warns, which no graph can
    logits = model(**batch, use_cache=False).logits
    logits.square().mean().backward()
    found = {name: p.grad for name, p in attachment.named_parameters()}
    return {"logits": logits.detach(), **found}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_model_is_one_graph(
    family: str, checkpointed: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no graph break; in eager mode a recompute draws its forward's masks again, and so does
    the compiled one."""
    # A compiled graph runs q, k and v one by one: other masks of the same seed.
    monkeypatch.setattr(lora_parts, "lora_linears", lambda *_: "one by one")
    want = _step(*_adapted(family, dropout, False), family)
    eager = _step(*_adapted(family, dropout, checkpointed), family)
    model, attachment = _adapted(family, dropout, checkpointed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = _step(compiled, attachment, family)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(eager[name], value)
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_inside_disabled_the_compiled_model_is_the_base(checkpointed: bool) -> None:
    plain: Any = tiny_text.build("llama", torch.float32).train()
    want = plain(**tiny_text.batch("llama"), use_cache=False).logits
    model, attachment = _adapted("llama", 0.5, checkpointed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        on = compiled(**tiny_text.batch("llama"), use_cache=False).logits
        with attachment.disabled():
            off = compiled(**tiny_text.batch("llama"), use_cache=False).logits
    torch.testing.assert_close(off, want)
    assert not torch.allclose(on, off, atol=1e-3)
