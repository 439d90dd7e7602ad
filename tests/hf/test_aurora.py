"""Aurora on BLIP: fused against published, checkpointing, generation and the whole life."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels._runtime import philox
from petal_kernels.hf.context import THREAD
from petal_kernels.hf.methods import modes as layers
from petal_kernels.hf.methods import square_blocks as blocks
from petal_kernels.hf.methods.aurora import BlockLinear
from petal_kernels.hf.methods.modes import ModeGroup
from petal_kernels.nn import frozen_linear, mode_approximation
from tests.hf.tiny_blip import (
    SAME,
    TASKS,
    attached,
    batch,
    build,
    close,
    config_of,
    forward,
    gradients,
    step,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"variant": "paper"},
    "release": {"variant": "release"},
    "release-blocks": {"variant": "release", "layout": "blocks"},
    "paper-layout": {"layout": "aurora_release"},
    "some": {"target_modules": ["vision.fc2", "vision.qkv", "cross.key"], "scale_shift": False},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", TASKS)
def test_fused_equals_published(task: str, variant: str) -> None:
    config = config_of(**VARIANTS[variant])
    fused = step(*attached(task, config), task)
    published = step(*attached(task, config, "published"), task)
    close(fused, published)
    assert all(float(g.norm()) > 0 for g in fused[1].values())
    plain = forward(build(task), task)[0]
    assert not torch.allclose(fused[0], plain, atol=1e-3)


class FixedMask(nn.Module):
    """Dropout with masks that a fused call drew: the given streams, side by side."""

    def __init__(self, rng: Tensor, first: int, count: int, p: float) -> None:
        super().__init__()
        self.rng, self.first, self.count, self.p = rng, first, count, p

    def forward(self, z: Tensor) -> Tensor:
        rows, cols = z.shape[:-1].numel(), z.shape[-1] // self.count
        masks = philox.scaled_masks(self.rng, self.p, self.first + self.count, rows, cols, z.dtype)
        return z * torch.cat(list(masks[self.first :]), dim=-1).reshape(z.shape)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", ["paper", "release", "release-blocks"])
@pytest.mark.parametrize("task", TASKS)
def test_fused_equals_published_with_dropout(
    task: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks: after the core in the image encoder, before it in text."""
    dry = step(*attached(task, config_of(**VARIANTS[variant])), task)[0]
    p = 0.4
    states: dict[int, Tensor] = {}
    current: list[Tensor] = []

    def recording(cls: type, name: str, key_of: Any) -> None:
        run = getattr(cls, name)

        def wrapper(self: Any, *args: Any) -> Any:
            key = key_of(self)
            assert key not in states, "a call ran twice in one forward"
            states[key] = torch.tensor([1234 + 77 * len(states), len(states)])
            current[:] = [states[key]]
            return run(self, *args)

        monkeypatch.setattr(cls, name, wrapper)

    recording(BlockLinear, "adapted", lambda linear: id(linear.base))
    recording(ModeGroup, "_compute", lambda group: id(group.members[0].base))
    monkeypatch.setattr(philox, "draw", lambda device: current[0])
    config = config_of(dropout=p, **VARIANTS[variant])
    model, attachment = attached(task, config)
    got = step(model.train(), attachment, task)
    groups = {
        id(member.base): (states[id(wrapper.unit().members[0].base)], member.position)
        for _, _, _, wrapper in attachment.installed.wrapped
        if not isinstance(wrapper, BlockLinear)
        for member in wrapper.unit().members
    }
    keys = [id(wrapper.base) for _, _, _, wrapper in attachment.installed.wrapped]

    model, attachment = attached(task, config, "published")
    for key, (_, _, _, wrapper) in zip(keys, attachment.installed.wrapped, strict=True):
        if isinstance(wrapper, BlockLinear):
            count = len(wrapper.blocks.modes) if wrapper.blocks.form == "outputs" else 1
            mask = FixedMask(states[key], 0, count, p)
        else:
            mask = FixedMask(*groups[key], 1, p)
        wrapper.__dict__["drop"] = mask
    close(got, step(model.train(), attachment, task))
    assert not torch.allclose(dry, got[0], atol=1e-3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("variant", ["paper", "release", "release-blocks"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("implementation", ["fused", "published"])
def test_life(task: str, variant: str, implementation: str, tmp_path: Path) -> None:
    """attach, train, save, load, disable, merge, unmerge, detach."""
    config = config_of(**VARIANTS[variant])
    model, attachment = attached(task, config, implementation)
    bare = build(task)
    with torch.no_grad():
        before = forward(bare, task)[0]
    keys = {k for k in model.state_dict() if not k.startswith("petal.")}
    assert keys == set(bare.state_dict())
    optimizer = torch.optim.SGD(list(attachment.parameters()), lr=0.05)
    step(model, attachment, task)
    optimizer.step()
    with torch.no_grad():
        trained = forward(model, task)[0]
    attachment.save(tmp_path / "adapter")
    with torch.no_grad(), attachment.disabled():
        assert torch.equal(forward(model, task)[0], before)

    other = build(task)
    loaded: Any = pk.attach(other, copy.deepcopy(config), implementation=implementation)
    other.to(torch.float64)
    loaded.load(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(forward(other, task)[0], trained)

    report = attachment.merge()
    assert len(report.folded) == len(attachment.found.places)
    assert all("scale/shift" in name for name in report.kept)
    with torch.no_grad():
        merged = forward(model, task)[0]
        torch.testing.assert_close(merged, trained)
        with attachment.disabled():
            assert torch.equal(forward(model, task)[0], before)
        assert torch.equal(forward(model, task)[0], merged)
        with pytest.raises(RuntimeError, match="merged into the base weights"):
            forward(model.train(), task)
        model.eval()
        attachment.unmerge()
        assert torch.equal(forward(model, task)[0], trained)
    attachment.merge()
    assert attachment.detach() is model
    with torch.no_grad():
        assert torch.equal(forward(model, task)[0], before)
    assert set(model.state_dict()) == keys
    for name, tensor in bare.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_a_saved_adapter_is_attached_from_its_directory(tmp_path: Path) -> None:
    model, attachment = attached("vqa", config_of(variant="release", dropout=0.1))
    with torch.no_grad():
        want = forward(model, "vqa")[0]
    attachment.adapter.float()
    attachment.save(tmp_path / "a")
    other = build("vqa")
    loaded = pk.attach(other, tmp_path / "a")
    assert loaded.config == attachment.config
    other.to(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(forward(other, "vqa")[0], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"base\.stack 2.*this model has no such entry"):
        pk.attach(build("retrieval"), tmp_path / "a")


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize(
    ("task", "variant", "form"),
    [
        ("retrieval", "release", "fused"),
        ("vqa", "paper", "fused"),
        ("vqa", "release-blocks", "fused"),
        ("caption", "release", "published"),
    ],
)
def test_checkpointing_and_two_forwards(
    task: str, variant: str, form: str, reentrant: bool
) -> None:
    """Two forwards with other inputs before one backward, dropout on, recomputed."""

    def run(checkpointing: bool) -> dict[str, Tensor]:
        model, attachment = attached(task, config_of(dropout=0.4, **VARIANTS[variant]), form)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        total = torch.zeros((), dtype=torch.float64)
        torch.manual_seed(7)
        for seed in range(2):
            total = total + forward(model, task, seed)[1]
        total.backward()
        return gradients(attachment)

    want, got = run(False), run(True)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=SAME, atol=SAME, msg=name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_what_layers_share_is_made_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hoisted: list[bool] = []
    contract, operator = pk.mode_contract, pk.lowrank_linear

    def counting(core: Tensor, modes: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(modes))
        return contract(core, modes, *args, **kwargs)

    def watching(*args: Any, **kwargs: Any) -> Any:
        hoisted.append(kwargs["hidden"] is not None)
        return operator(*args, **kwargs)

    monkeypatch.setattr(blocks, "mode_contract", counting)
    monkeypatch.setattr(mode_approximation, "mode_contract", counting)
    monkeypatch.setattr(frozen_linear, "lowrank_linear", watching)
    model, _ = attached("vqa", config_of(core="tucker"))
    forward(model, "vqa")
    # Two layers: 3 + 4 modes of outputs, 1 + 4 of inputs, 6 of a text layer; encoder and decoder.
    whole = [2 * 5, 2 * 7, 2 * 6, 2 * 6]
    assert sorted(calls) == sorted(whole)
    assert hoisted.count(True) == 4  # the image keys and values of every text layer
    for reentrant in (False, True):
        calls.clear()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        forward(model.train(), "vqa")[1].backward()
        again = 2 * [3, 1, 4, 4] + 4 * [4, 2] if reentrant else []
        assert sorted(calls) == sorted(whole + again)


def test_what_layers_share_ends_with_its_forward() -> None:
    model, _ = attached("retrieval", config_of())
    inputs = batch("retrieval")
    seen: list[bool] = []
    model.vision_model.post_layernorm.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda *args: seen.append(THREAD.running is None)
    )
    model(**inputs)
    with pytest.raises(RuntimeError):  # image features of another batch
        model.text_encoder(
            inputs["input_ids"], encoder_hidden_states=torch.zeros(2, 5, 16, dtype=torch.float64)
        )  # type: ignore[operator]
    assert seen
    assert all(seen)
    assert THREAD.running is None


def test_linears_may_be_in_another_mode_than_their_stack() -> None:
    """Some parts frozen with `eval()`: dropout follows the linear, not the stack."""
    model, attachment = attached("retrieval", config_of(variant="release", dropout=0.5))
    vision = model.vision_model
    pixels = batch("retrieval")["pixel_values"]

    def run(stack: bool, linears: bool) -> Tensor:
        vision.encoder.training = stack  # type: ignore[union-attr]
        for _, _, _, wrapper in attachment.installed.wrapped:
            wrapper.train(linears)
        torch.manual_seed(0)
        return vision(pixels).last_hidden_state.detach()  # type: ignore[operator]

    torch.testing.assert_close(run(True, False), run(False, False))
    torch.testing.assert_close(run(False, True), run(True, True))
    assert not torch.allclose(run(True, True), run(False, False))


def test_image_features_are_projected_once_in_a_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Tensor] = []
    project = layers.shrink

    def counting(x: Tensor, down: Tensor) -> Tensor:
        calls.append(x)
        return project(x, down)

    monkeypatch.setattr(layers, "shrink", counting)
    model, _ = attached("caption", config_of())
    pixels = batch("caption")["pixel_values"]
    model.generate(pixel_values=pixels, max_new_tokens=5, min_new_tokens=5)  # type: ignore[operator]
    assert len(calls) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_stacks_compile_without_a_graph_break(dropout: float) -> None:
    _, attachment = attached("retrieval", config_of(variant="release", dropout=dropout))
    vision, text = (stack.module.train() for stack in attachment.found.stacks)
    torch.manual_seed(1)
    patches, words = (torch.randn(2, n, 16, dtype=torch.float64) for n in (5, 7))

    def run(vision: Any, text: Any) -> tuple[Tensor, dict[str, Tensor]]:
        for p in attachment.parameters():
            p.grad = None
        torch.manual_seed(0)
        image = vision(inputs_embeds=patches).last_hidden_state
        out = text(words, encoder_hidden_states=image).last_hidden_state
        out.square().sum().backward()
        return out.detach(), gradients(attachment)

    want = run(vision, text)
    torch._dynamo.reset()
    kind: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
    close(run(torch.compile(vision, **kind), torch.compile(text, **kind)), want)
    torch._dynamo.reset()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_generation_with_cache_and_beams(task: str, beams: int) -> None:
    def run(implementation: str, cache: bool, merged: bool = False) -> Tensor:
        model, attachment = attached(task, config_of(variant="release"), implementation)
        if merged:
            attachment.merge()
        inputs = batch(task)
        inputs.pop("labels")
        if task == "caption":
            inputs.pop("attention_mask")
        more = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        return model.generate(**inputs, **more, use_cache=cache)  # type: ignore[operator]

    want = run("published", False)
    assert len(set(want.flatten().tolist())) > 3
    assert torch.equal(run("fused", True), want)
    assert torch.equal(run("fused", False), want)
    assert torch.equal(run("fused", True, merged=True), want)
