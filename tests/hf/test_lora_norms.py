"""Frozen norms in front of LoRA's linears: a model that runs them by the operator gives what it
gives with its own modules."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.hf import tiny_text
from tests.hf.tiny_norms import FAMILIES, MODES, attached, built, parts_of, same, step

pytestmark = pytest.mark.filterwarnings(
    "ignore:attach. left as they are", "ignore:None of the inputs have requires_grad"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_what_it_gives_with_its_own_modules(family: str, runs: list[str]) -> None:
    want = None
    for mode in ("module", *MODES):
        runs.clear()
        model = built(family)
        attachment = attached(model, mode, **parts_of(family))
        got = step(model, attachment, family)
        assert len(got) > 8
        if want is None:
            assert runs == []
            want = got
            continue
        same(got, want)
        kinds = dict.fromkeys(("gemma2", "paligemma"), "rms_plus_one")
        kinds |= dict.fromkeys(("bart", "gpt2", "bert", "roberta"), "layer")
        assert set(runs) == {kinds.get(family, "rms")}


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
def test_a_tower_gives_what_it_gives_with_its_own_modules(family: str, runs: list[str]) -> None:
    found = []
    for mode in ("module", *MODES):
        whole = built(family).model
        tower = whole.vision_model if family != "llava" else whole.vision_tower
        attachment = attached(tower, mode)
        torch.manual_seed(3)
        size = tower.config.image_size
        out = tower(torch.randn(2, 3, size, size)).last_hidden_state
        grads = torch.autograd.grad(out.square().sum(), list(attachment.parameters()))
        found.append({"out": out.detach(), **{str(k): g for k, g in enumerate(grads)}})
    assert set(runs) == {"layer"}
    same(found[1], found[0])
    same(found[2], found[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_checkpointing_changes_nothing(family: str, reentrant: bool, mode: str) -> None:
    model = built(family)
    attachment = attached(model, mode, recompute_mlp=True)
    want = step(model, attachment, family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    # T5's layers share a bias, whose gradient is then summed in another order.
    same(step(model, attachment, family), want, share=1e-5 if family == "t5" else 0.0)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_evaluation_and_generation(family: str, runs: list[str]) -> None:
    found = list[tuple[Tensor, Tensor]]()
    for mode in ("module", "folded"):
        runs.clear()
        model = built(family).eval()
        attached(model, mode)
        batch = tiny_text.batch(family)
        with torch.no_grad():
            logits = model(**batch).logits
        ids = batch["input_ids"][:, :5]
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        found.append((logits, tokens))
    assert runs
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-4, atol=2e-4)
    assert torch.equal(found[0][1], found[1][1])


def test_threads_do_not_meet() -> None:
    model = built("llama")
    attachment = attached(model, "folded")
    batches = [tiny_text.batch("llama", seed=seed) for seed in range(3)]
    parameters = list(attachment.parameters())

    def gradients(k: int) -> list[Tensor]:
        model_loss = model(**batches[k]).loss
        return list(torch.autograd.grad(model_loss, parameters))

    model.eval()
    want = [gradients(k) for k in range(3)]
    got: dict[int, list[list[Tensor]]] = {}

    def work(k: int) -> None:
        got[k] = [gradients(k) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, each in got.items():
        assert len(each) == 4
        for found in each:
            for a, b in zip(found, want[k], strict=True):
                torch.testing.assert_close(a, b)


def test_gradients_of_a_hidden_state_are_whole() -> None:
    """Of a post-norm model a norm's output is what a layer gives, and others read it too."""
    found = []
    for mode in ("module", "folded"):
        model = built("bert")
        attached(model, mode, lora_dropout=0.0)
        batch = tiny_text.batch("bert")
        out = model(**batch, output_hidden_states=True)
        found.append(torch.autograd.grad(out.loss, out.hidden_states[1:]))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_hooks_of_a_norm_see_and_change_what_it_gives() -> None:
    found = []
    for mode in ("module", *MODES):
        model, seen = built("llama"), list[Any]()
        attachment = attached(model, mode)
        first, second = (layer.input_layernorm for layer in model.model.layers)
        first.register_forward_hook(lambda _m, _a, y: y * 1.5)
        first.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5,))
        second.register_forward_hook(lambda _m, _a, y, seen=seen: seen.append(y))
        second.register_forward_hook(lambda _m, _a, y: y.register_hook(lambda g: 2 * g) and None)
        found.append(step(model, attachment, "llama"))
        assert len(seen) == 1
    same(found[1], found[0])
    same(found[2], found[0])
