"""What attach finds, refuses and reports."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petal_kernels as pk
from petal_kernels.hf.models import FAMILIES
from petal_kernels.hf.parts import Adapted
from tests.hf import tiny, tiny_text

PAPER_TRAINABLE = 268_800
RELEASE_TRAINABLE, RELEASE_STORED = 783_744, 802_176
VICUNA_7B_PARAMETERS = 7_913_209_856


def _vicuna_7b() -> nn.Module:
    import transformers

    text = transformers.LlamaConfig(
        vocab_size=32_001,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    )
    config = transformers.InstructBlipConfig(
        vision_config={}, qformer_config={}, text_config=text.to_dict(), num_query_tokens=32
    )
    with torch.device("meta"):
        return transformers.InstructBlipForConditionalGeneration(config)


@pytest.fixture(scope="module")
def vicuna_7b() -> nn.Module:
    return _vicuna_7b()


@pytest.mark.parametrize(
    ("variant", "trainable", "stored"),
    [
        ("paper", PAPER_TRAINABLE, PAPER_TRAINABLE),
        ("release", RELEASE_TRAINABLE, RELEASE_STORED),
    ],
)
@pytest.mark.parametrize("implementation", ["fused", "published"])
def test_full_size_counts(
    vicuna_7b: nn.Module, variant: str, trainable: int, stored: int, implementation: str
) -> None:
    config = pk.PetalConfig(r=64, variant=variant)
    attachment = pk.attach(vicuna_7b, config, implementation=implementation)
    try:
        report = attachment.report()
        assert report.base_parameters == VICUNA_7B_PARAMETERS
        assert (report.trainable, report.stored) == (trainable, stored)
        assert sum(row.trainable for row in report.rows) == trainable
        assert sum(p.numel() for p in attachment.parameters()) == trainable
        assert sum(p.numel() for p in vicuna_7b.parameters() if p.requires_grad) == trainable
        assert len([row for row in report.rows if row.role.startswith("self.")]) == 36
        assert len([row for row in report.rows if row.role.startswith("cross.")]) == 18
        assert f"{trainable:,} trainable parameters" in str(report)
        assert f"{VICUNA_7B_PARAMETERS:,}" in str(report)
        with pytest.raises(ValueError, match="save: want tensors with values"):
            attachment.save("unused")
    finally:
        attachment.detach()
    assert sum(p.numel() for p in vicuna_7b.parameters()) == VICUNA_7B_PARAMETERS


@pytest.mark.parametrize(
    ("variant", "trainable", "stored"),
    [
        ("paper", 863_616 + 6 * 768, 863_616 + 6 * 768),
        ("release", 1_378_560, 1_396_992),
    ],
)
def test_full_size_counts_with_experts(
    vicuna_7b: nn.Module, variant: str, trainable: int, stored: int
) -> None:
    config = pk.PetalConfig(r=64, variant=variant, experts=6)
    attachment = pk.attach(vicuna_7b, config)
    try:
        report = attachment.report()
        assert (report.trainable, report.stored) == (trainable, stored)
        assert sum(row.trainable for row in report.rows) == trainable
        assert sum(p.numel() for p in vicuna_7b.parameters() if p.requires_grad) == trainable
        (row,) = (row for row in report.rows if row.role == "instruction experts")
        assert row.shape.startswith("768 -> 768, 6 x r 64")
        assert row.trainable in (594_816, 594_816 + 6 * 768)
        assert attachment.signature()["embeddings"] == {"width": 768}
    finally:
        attachment.detach()


def test_report_names_module_role_shape_backend_and_reason() -> None:
    model = tiny.instructblip()
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    text = str(attachment.report())
    assert "qformer.encoder.layer.2.crossattention.attention.key" in text
    assert "cross.key" in text
    assert "40 -> 32, r 4" in text
    row = attachment.report().rows[0]
    assert row.backend in ("torch", "native")
    assert "cuda:" in row.why
    assert re.search(r"trainable parameters \(.* stored\), \d+\.\d+ % of the model's", text)
    with pk.use_backend("torch"):
        assert attachment.report().rows[0].backend == "torch"
    with pk.use_backend("cuda"):
        row = attachment.report().rows[0]
        assert row.backend == "none"
        assert "backend 'cuda' cannot run here: needs tensors on cuda" in row.why


def test_report_says_which_base_is_called_and_why() -> None:
    model = tiny.instructblip()
    attention = model.qformer.encoder.layer[1].attention.attention  # type: ignore[union-attr, index]
    attention.key.register_forward_hook(lambda module, args, output: None)
    attachment = pk.attach(model, pk.PetalConfig(r=4))
    report = attachment.report()
    path = "qformer.encoder.layer.1.attention.attention.key"
    assert report.declined == {path: "base has hooks"}
    assert f"base called, not read: {path} (base has hooks)" in str(report)


def test_a_bare_qformer_is_adapted() -> None:
    model = tiny.instructblip().qformer
    attachment = pk.attach(model, pk.PetalConfig(r=4))  # type: ignore[arg-type]
    assert len(attachment.found.places) == 18
    whole = pk.attach(tiny.instructblip(), pk.PetalConfig(r=4)).found
    assert [p.path for p in whole.places] == [f"qformer.{p.path}" for p in attachment.found.places]


def test_a_model_inside_another_module_is_found() -> None:
    wrapper = nn.ModuleDict({"inner": tiny.blip2()})
    attachment = pk.attach(wrapper, pk.PetalConfig(r=4))
    assert attachment.found.stacks[0].path == "inner.qformer.encoder"
    assert "petal" in dict(wrapper.named_children())


def test_no_matching_module() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"want a module whose config.model_type is one of \['bl"):
        pk.attach(model, pk.PetalConfig(r=4))
    with pytest.raises(ValueError, match=r"got a BertModel with model types \['bert'\]"):
        pk.attach(model, pk.PetalConfig(r=4))
    assert flags == [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="got a Linear with model types"):
        pk.attach(nn.Linear(2, 2), pk.PetalConfig(r=4))


def test_a_known_model_without_its_stack() -> None:
    model = tiny.blip2()
    model.qformer = nn.Identity()
    message = r"want a module of class '\*QFormerEncoder' in a 'blip-2' model, got none"
    with pytest.raises(ValueError, match=message):
        pk.attach(model, pk.PetalConfig(r=4))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["gate_proj"], r"target_modules: \['gate_proj'\] match nothing; want names among the rol"),
        (["query", "q"], r"target_modules: \['q'\] match nothing"),
        (
            r"nothing\..*",
            r"want places that 'petal' adapts \(roles \['cross.key'.*got 18 candidates in 4 layer",
        ),
    ],
)
def test_target_modules_that_match_nothing(wanted: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.attach(tiny.blip2(), pk.PetalConfig(r=4, target_modules=wanted))  # type: ignore[arg-type]


def test_other_bad_arguments_leave_the_model_alone() -> None:
    model = tiny.blip2()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"implementation: want one of .*, got 'eager'"):
        pk.attach(model, pk.PetalConfig(r=4), implementation="eager")
    with pytest.raises(TypeError, match=r"model: want a torch.nn.Module, got a str"):
        pk.attach("model", pk.PetalConfig(r=4))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="config: want a PetalConfig, another method's config or a path, got a dict"
    ):
        pk.attach(model, {"r": 4})
    with pytest.raises(ValueError, match=r"modules_to_save: want names of modules.*'lm_tail'"):
        pk.attach(model, pk.PetalConfig(r=4, modules_to_save=["lm_tail"]))
    with pytest.raises(ValueError, match="modules_to_save: want modules without adapted proj"):
        pk.attach(model, pk.PetalConfig(r=4, modules_to_save=["qformer"]))
    assert names == [name for name, _ in model.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    pk.attach(model, pk.PetalConfig(r=4))
    with pytest.raises(ValueError, match="already attached"):
        pk.attach(model, pk.PetalConfig(r=4))


def test_projections_of_unequal_shapes_are_refused() -> None:
    model = tiny.blip2()
    model.qformer.encoder.layer[1].attention.attention.key = nn.Linear(32, 16)  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"want one \(in, out\) shape for all text projections"):
        pk.attach(model, pk.PetalConfig(r=4))


def test_a_projection_that_is_no_linear_is_named() -> None:
    model = tiny.blip2()
    model.qformer.encoder.layer[1].attention.attention.key = nn.Identity()  # type: ignore[union-attr, index]
    with pytest.raises(
        ValueError, match=r"layer\.1\.attention\.attention\.key: want a linear layer"
    ):
        pk.attach(model, pk.PetalConfig(r=4))


def test_the_table_covers_the_supported_families() -> None:
    import transformers

    for config in (
        transformers.InstructBlipConfig,
        transformers.InstructBlipQFormerConfig,
        transformers.Blip2Config,
        transformers.Blip2QFormerConfig,
    ):
        assert config.model_type in FAMILIES


def test_a_config_is_the_attachments_own(tmp_path: Path) -> None:
    """The kind: a config that its owner changes for the next run, and that is saved with this."""
    config = pk.RoutingConfig(r=3, target_modules=["q_proj"])
    attachment = pk.attach(tiny_text.build("llama"), config)
    config.r = 7
    config.target_modules.append("v_proj")  # type: ignore[union-attr]
    assert attachment.config == pk.RoutingConfig(r=3, target_modules=["q_proj"])
    attachment.save(tmp_path)
    assert pk.attach(tiny_text.build("llama"), tmp_path).config.r == 3


class DistributedDataParallel(nn.Module):
    """Found by its name, as the real one is, without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("which", ["the engine", "its model", "a part of its model", "a part"])
def test_an_engine_that_holds_the_model_is_refused(which: str) -> None:
    """The kind: parameters that an engine never reduces."""
    model: Any = tiny_text.build("llama")
    if which == "a part":
        model.lm_head = DistributedDataParallel(model.lm_head)
    held = [DistributedDataParallel(model)] if which != "a part" else []
    given = {"the engine": held[0] if held else model, "a part of its model": model.model}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="not wrapped yet, got one in a DistributedDataParallel"):
        pk.attach(given.get(which, model), pk.RoutingConfig(r=3))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_a_holder_that_stays_trainable_is_said() -> None:
    model: Any = tiny_text.build("llama")
    with pytest.warns(UserWarning, match=r"1 parameters of the Llama.*stay trainable, lm_head"):
        pk.attach(model.model, pk.RoutingConfig(r=3))
    model = tiny_text.build("llama").requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.attach(model.model, pk.RoutingConfig(r=3))


def test_an_attach_that_fails_on_its_way_gives_the_model_back() -> None:
    model: Any = tiny.blip2()
    model.qformer.encoder.layer[2].chunk_size_feed_forward = 2
    before = [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match="want chunk_size_feed_forward = 0"):
        pk.attach(model, pk.RoutingConfig(r=3, kind="adapter"))
    assert before == [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_left_as_it_is_is_said() -> None:
    """The kind: linears that a user named, and that nobody trains."""
    model = tiny_text.build("llama")
    with pytest.warns(UserWarning, match="attach: named by target_modules and not adapted"):
        attachment = pk.attach(model, pk.RoutingConfig(r=3, target_modules=r".*self_attn\..*_proj"))
    (note,) = attachment.report().notes
    assert "4 linears, model.layers.0.self_attn.k_proj first" in note
    assert note in str(attachment.report())
