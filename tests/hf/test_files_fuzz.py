"""Damaged adapter files: what loads is the adapter that was saved, bit for bit; everything else is
refused by name and leaves the model as it was.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels.hf import pair
from petal_kernels.hf.config import METHODS, AdapterConfig
from tests.hf import file_mutations, tiny, tiny_blip, tiny_text

F32 = torch.float32
METHOD: dict[str, tuple[Callable[[], nn.Module], Callable[[], AdapterConfig]]] = {
    "petal": (
        tiny.instructblip,
        lambda: pk.PetalConfig(
            r=3, experts=2, expert_r=2, modules_to_save=["language_projection"], scale=0.5
        ),
    ),
    "aurora": (lambda: tiny_blip.build("retrieval", F32), lambda: pk.AuroraConfig(r=3)),
    "vlpet": (lambda: tiny_text.build("bart", F32), lambda: pk.VLPetConfig(r=3, value_r=2)),
    "vladapter": (lambda: tiny_text.build("bart", F32), lambda: pk.VLAdapterConfig(r=3)),
    "compacter": (
        lambda: tiny_text.build("bart", F32),
        lambda: pk.CompacterConfig(r=4, factor_r=1, share_rule=True),
    ),
    "routing": (
        lambda: tiny_text.build("llama", F32),
        lambda: pk.RoutingConfig(r=3, alpha=6.0, target_modules=["q_proj", "v_proj"]),
    ),
    "experts": (lambda: tiny_text.build("llama", F32), lambda: pk.ExpertConfig(r=2, experts=3)),
    "lora": (
        lambda: tiny_text.build("llama", F32),
        lambda: pk.LoraConfig(
            r=3, target_modules="all-linear", rank_pattern={"o_proj": 2}, bias="lora_only"
        ),
    ),
}
LEAST = 400  # mutations of each method's files


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().view(torch.uint8).numpy().tobytes()


def values_of(attachment: Any) -> dict[str, bytes]:
    return {name: bits(t) for name, t in attachment.state_dict().items()}


def fill(attachment: Any, seed: int) -> None:
    """Any values, among them those that a comparison or a conversion would lose."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.normal_(generator=generator)
        odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
        first = next(attachment.parameters())
        first.view(-1)[: len(odd)] = odd[: first.numel()]


def look(model: nn.Module) -> list[Any]:
    """Everything of a model that a failed attach could have changed."""
    found: list[Any] = [bits(t) for t in model.state_dict().values()]
    for path, module in model.named_modules():
        hooks = [len(h) for h in (module._forward_hooks, module._forward_pre_hooks)]
        found.append((path, id(module), type(module), module.training, hooks, sorted(vars(module))))
        found += [
            (name, id(p), p.requires_grad)
            for name, p in module._parameters.items()
            if p is not None
        ]
    return found


class Damaged:
    """A saved adapter, a model to load it into, and copies of its folder to damage."""

    def __init__(self, method: str, folder: Path) -> None:
        build, config = METHOD[method]
        attachment = pk.attach(build(), config())
        fill(attachment, 1)
        self.saved, self.work = folder / "saved", folder / "work"
        attachment.save(self.saved)
        self.want, self.config = values_of(attachment), attachment.config
        self.model = build()
        self.model.get_submodule("").train()
        next(self.model.parameters()).requires_grad_(False)
        self.before = look(self.model)

    def outcome(self, mutation: file_mutations.Mutation) -> str:
        """ "exact", "refused", or what is wrong."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.saved, self.work)
        if mutation.seal == "none":
            file_mutations.unseal(self.work)
        mutation.apply(self.work)
        if mutation.seal == "fresh":
            file_mutations.reseal(self.work)
        try:
            attachment = pk.attach(self.model, self.work)
        except (ValueError, FileNotFoundError) as error:
            if str(self.work) not in str(error):
                return f"a refusal that names no file: {str(error)[:120]}"
            return "refused" if look(self.model) == self.before else "refused, the model is another"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:120]}"
        got, config = values_of(attachment), attachment.config
        attachment.detach()
        if look(self.model) != self.before:
            return "loaded, and detach gave another model"
        if got != self.want:
            return "another adapter"
        # Without a digest of its own a config can be edited into another that is as good.
        if mutation.seal == "kept" and config != self.config:
            return f"another config: {config}"
        return "exact"


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str], Damaged]:
    return lambda method: Damaged(method, tmp_path)


def _run(damaged: Damaged, flips: int, seed: int, edits: int | None = None) -> dict[str, list[str]]:
    """What came of every mutation; of the edits of the json so many, chosen by the seed."""
    outcomes: dict[str, list[str]] = {}
    mutations = file_mutations.all_of(damaged.saved, flips, seed)
    jsons = [mutation for mutation in mutations if mutation.name.startswith("json (")]
    left_out = set(random.Random(seed).sample(jsons, max(0, len(jsons) - (edits or len(jsons)))))
    for mutation in (each for each in mutations if each not in left_out):
        outcomes.setdefault(damaged.outcome(mutation), []).append(mutation.name)
    return outcomes


QUICK = ("lora", "petal")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in sorted(METHODS)
    ],
)
def test_a_damaged_file_is_refused_or_loads_exactly(
    method: str, damaged: Callable[[str], Damaged]
) -> None:
    outcomes = _run(damaged(method), 12, 0, 200)
    bad = {what: names for what, names in outcomes.items() if what not in ("exact", "refused")}
    assert not bad, "\n".join(f"{what}: {len(names)}, {names[:5]}" for what, names in bad.items())
    assert sum(map(len, outcomes.values())) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_many_damaged_files(method: str, damaged: Callable[[str], Damaged]) -> None:
    outcomes = _run(damaged(method), 1500, 1)
    assert set(outcomes) <= {"exact", "refused"}, {w: n[:5] for w, n in outcomes.items()}


def test_what_today_is_not_in_a_file_is_still_loaded(tmp_path: Path) -> None:
    """A json without a digest of its own, as files were written before."""
    attachment = pk.attach(METHOD["routing"][0](), METHOD["routing"][1]())
    fill(attachment, 2)
    attachment.save(tmp_path / "adapter, ünïcode λ")
    file_mutations.unseal(tmp_path / "adapter, ünïcode λ")
    again = pk.attach(METHOD["routing"][0](), tmp_path / "adapter, ünïcode λ")
    assert values_of(again) == values_of(attachment)


def test_a_layout_of_the_json_is_no_damage(tmp_path: Path) -> None:
    attachment = pk.attach(METHOD["routing"][0](), METHOD["routing"][1]())
    attachment.save(tmp_path)
    path = tmp_path / pair.CONFIG
    path.write_text(" ".join(path.read_text().split()))
    attachment.load(tmp_path)


@pytest.mark.parametrize("method", ["petal", "routing"])
@pytest.mark.parametrize("other", ["another width", "another family"])
def test_the_file_of_another_model_leaves_this_one(method: str, other: str, tmp_path: Path) -> None:
    attachment = pk.attach(METHOD[method][0](), METHOD[method][1]())
    attachment.save(tmp_path)
    if other == "another family":
        model = tiny_text.build("bart", F32)
    elif method == "petal":
        model = tiny.instructblip(layers=2)
    else:
        import transformers

        sizes = {**tiny_text._llama_like(), "hidden_size": 16}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    before = look(model)
    with pytest.raises(ValueError, match=pair.CONFIG):
        pk.attach(model, tmp_path)
    assert look(model) == before


def test_an_attach_that_fails_half_way_leaves_the_model() -> None:
    """The kind: a config that only the modules can refuse, after the model was frozen."""
    model = tiny_text.build("bart", F32)
    before = look(model)
    for scale in (0.5, 0.0):
        config = pk.VLPetConfig(r=3, init="identity", gate="large", scale=scale)
        with pytest.raises(ValueError, match="init: 'identity' cannot be reached"):
            pk.attach(model, config)
        assert look(model) == before


def test_a_config_changed_after_it_was_made_is_checked_again_and_copied(tmp_path: Path) -> None:
    config = pk.RoutingConfig(r=3, alpha=6.0)
    attachment = pk.attach(tiny_text.build("llama", F32), config)
    config.alpha = 64.0
    attachment.save(tmp_path)
    loaded: Any = pk.attach(tiny_text.build("llama", F32), tmp_path).config
    assert loaded.alpha == 6.0
    config.r = 0
    model = tiny_text.build("llama", F32)
    before = look(model)
    with pytest.raises(ValueError, match="r: want an integer >= 1, got 0"):
        pk.attach(model, config)
    assert look(model) == before
