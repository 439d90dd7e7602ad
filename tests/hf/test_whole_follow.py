"""What others do to a module that is trained whole, after attach, counts for its copy as well."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from petal_kernels.hf import context
from tests.hf import tiny_text

IDS = torch.arange(5, 11)[None]


def _attached(model: Any, *names: str) -> pk.Attachment:
    attachment = pk.attach(model, pk.RoutingConfig(r=2, modules_to_save=list(names)))
    with torch.no_grad():
        for name, parameter in attachment.named_parameters():
            if name.startswith("modules_to_save."):
                parameter.mul_(1.5)
    return attachment


def test_tying_again_leaves_the_base_alone() -> None:
    """The kind: what is read back, the copy, written into the base as its own weight."""
    model: Any = tiny_text.build("gpt2").eval()
    want = model(IDS).logits
    attachment = _attached(model, "lm_head")
    model.tie_weights()
    with attachment.disabled():
        assert torch.equal(model(IDS).logits, want)
    assert torch.equal(attachment.detach()(IDS).logits, want)


def test_parameters_put_in_for_one_call_are_used() -> None:
    """The kind: a dictionary of parameters copied once, and read from then on."""
    model: Any = tiny_text.build("llama").eval()
    _attached(model, "lm_head")
    model(IDS)
    zero = {"petal.modules_to_save.lm_head.weight": torch.zeros_like(model.lm_head.weight)}
    assert not torch.func.functional_call(model, zero, (IDS,)).logits.any()


def test_a_forward_of_ones_own_still_runs() -> None:
    """The kind: a replaced forward left out while the copy runs."""
    model: Any = tiny_text.build("llama").eval()
    norm, plain = model.model.norm, model.model.norm.forward
    norm.forward = lambda x: 2 * plain(x)
    want = model(IDS).logits
    attachment = _attached(model, "model.norm")
    torch.testing.assert_close(model(IDS).logits, 1.5 * want)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for n, p in attachment.named_parameters() if "norm" in n)


def test_attributes_set_later_count() -> None:
    """The kind: an attribute as it was at the first call."""
    model: Any = tiny_text.build("llama").eval()
    _attached(model, "model.norm")
    before = model(IDS).logits
    model.model.norm.variance_epsilon = 1e8
    assert model(IDS).logits.abs().max() < 0.1 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_leaves_half_precision_leaves_it_whole(dtype: torch.dtype) -> None:
    """The kind: the dtype at attach, kept for good."""
    model: Any = tiny_text.build("llama").half().eval()
    _attached(model, "model.norm", "lm_head")
    assert model.to(dtype)(IDS).logits.dtype == dtype


def test_half_precision_statistics_run_beside_wide_parameters() -> None:
    """The kind: widened parameters beside narrow buffers, which no kernel takes."""
    model: Any = tiny_text.build("llama")
    model.add_module("more", nn.BatchNorm1d(8))
    attachment = _attached(model.half(), "more")
    out = model.train().more(torch.randn(4, 8).half())
    assert out.dtype == torch.float16
    assert attachment.state_dict()["modules_to_save.more.running_mean"].any()
    assert not model.state_dict()["more.running_mean"].any()


def test_a_block_that_ended_in_another_thread_is_forgotten() -> None:
    """The kind: ended blocks, and their tensors, that pile up."""
    attachment = _attached(tiny_text.build("llama"), "lm_head")

    def held() -> Iterator[None]:
        with attachment.disabled():
            yield

    blocks = held()
    next(blocks)
    thread = threading.Thread(target=blocks.close)  # type: ignore[attr-defined]
    thread.start()
    thread.join()
    with attachment.disabled():
        pass
    assert not context.THREAD.blocks
