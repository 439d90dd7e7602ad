"""The demo's other methods at tiny sizes: each runs end to end, and fused is published."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import petal_kernels as pk
from petal_kernels.tools import cli
from petal_kernels.tools.demo import (
    backbones,
    compare,
    methods,
    methods_report,
    methods_run,
    tasks,
    train,
)
from petal_kernels.tools.demo import model as small

SIZES: dict[str, Any] = {"steps": 3, "batch": 8, "pictures": 48, "held_out": 24}
TINY = replace(methods.METHODS["lora"].settings, **SIZES)
NAMES = ("vlpet", "vladapter", "routing-lora", "routing-adapter", "lora")


@pytest.fixture(scope="module")
def raw() -> tuple[train.Cached, train.Cached]:
    return train.cache(small.load(), TINY)


@pytest.fixture(scope="module")
def cached(raw: tuple[train.Cached, train.Cached]) -> tuple[train.Cached, train.Cached]:
    return methods.columns_of(raw[0]), methods.columns_of(raw[1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tick(done: int, total: int) -> None:
    assert 0 < done <= total


def compared(method: methods.Method, cached: train.Cached, steps: int) -> Any:
    settings = replace(method.settings, **SIZES)
    trainer_of = functools.partial(
        methods.attached, method, train.Batches(cached, settings), settings
    )
    return compare.compare(trainer_of, methods.bare_form(method), steps, 1, tick)


def test_the_table_of_methods() -> None:
    assert tuple(methods.METHODS) == NAMES
    assert methods_run.chosen("lora") == (methods.METHODS["lora"],)
    assert [method.name for method in methods_run.chosen("all")] == list(NAMES)


@pytest.mark.parametrize("kind", backbones.KINDS)
def test_committed_backbone_answers_old_questions_and_does_not_know_the_new_word(kind: str) -> None:
    assert backbones.weights(kind).stat().st_size <= 4_000_000
    backbone = backbones.load(kind)
    assert 0.9e6 < sum(p.numel() for p in backbone.parameters()) < 2e6
    held = train.cache(small.load(), replace(TINY, held_out=200, pictures=1))[1]
    held = methods.columns_of(held)
    visual = backbone.visual_tokens(held.features)
    for instruction in (*tasks.OLD, tasks.NEW):
        ids = tasks.question_ids((instruction,)).expand(len(held), -1)
        wanted = instruction.answer(held.pairs.left, held.pairs.right)
        share = (backbone(visual, ids).argmax(-1) == wanted).float().mean().item()
        assert share < 0.5 if instruction is tasks.NEW else share > 0.95, instruction.text


def test_a_column_is_the_mean_of_its_patches() -> None:
    features = torch.randn(2, 1 + small.GRID**2, small.WIDTH)
    got = backbones.columns(features)
    for column in range(small.GRID):
        patches = [1 + row * small.GRID + column for row in range(small.GRID)]
        torch.testing.assert_close(got[:, column], features[:, patches].mean(1))


def test_weights_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="kind: want one of"):
        backbones.build("t5")
    with pytest.raises(FileNotFoundError, match=r"demo\.pretrain_backbones bart"):
        backbones.load("bart", tmp_path / "none.safetensors")
    tensors = load_file(backbones.weights("gpt2"))
    del tensors["projection.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"missing \['projection.weight'\]"):
        backbones.load("gpt2", tmp_path / "short.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_published_walk_one_curve(
    name: str, cached: tuple[train.Cached, train.Cached]
) -> None:
    found = compared(methods.METHODS[name], cached[0], steps=4)
    assert found.agrees
    assert len(found.fused_losses) == 4
    assert found.published_losses[0] != found.published_losses[-1]
    assert 0.0 < found.bound < 1e-3
    assert 0.0 < found.trainable_percent < 10.0
    assert found.saved_bytes["frozen"] < found.saved_bytes["published"]
    assert all(found.milliseconds[form] > 0.0 for form in ("frozen", "published", "fused"))


def test_a_wrong_scale_of_a_percent_breaks_the_bound(
    cached: tuple[train.Cached, train.Cached], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = pk.attach

    def faulty(model: torch.nn.Module, config: Any, *, implementation: str) -> object:
        if implementation == "fused":
            config = replace(config, alpha=1.01 * config.r)
        return attach(model, config, implementation=implementation)

    monkeypatch.setattr(pk, "attach", faulty)
    assert not compared(methods.METHODS["lora"], cached[0], steps=6).agrees


def test_a_routed_adapter_reads_the_picture_and_a_disabled_one_does_not(
    cached: tuple[train.Cached, train.Cached],
) -> None:
    method = methods.METHODS["routing-lora"]
    trainer = methods.attached(method, train.Batches(cached[0], TINY), TINY)
    list(trainer.run(1))
    backbone: Any = trainer.model
    attachment: Any = trainer.attachment
    visual = backbone.visual_tokens(cached[1].features)
    ids = tasks.question_ids((tasks.NEW,)).expand(len(cached[1]), -1)
    with torch.no_grad():
        with attachment.vision(visual):
            seen = backbone(visual, ids)
        with attachment.vision(visual.flip(0)):
            other = backbone(visual, ids)
        with attachment.disabled():
            bare = backbone(visual, ids)
        # torch rounds otherwise where a weight asks for a gradient, even under no_grad.
        plain = backbones.load("gpt2").requires_grad_(False)(visual, ids)
    assert not torch.equal(seen, other)
    assert torch.equal(bare, plain)
    with pytest.raises(ValueError, match="vision: want features"):
        backbone(visual, ids)


def test_all_methods_run_end_to_end(
    raw: tuple[train.Cached, train.Cached],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(methods_run, "cache", lambda model, settings: raw)
    changes = {**SIZES, "steps": 2}
    options = methods_run.MethodOptions(tmp_path, changes, compare_steps=1, timed_steps=1)
    assert methods_run.run("all", options) == 0
    printed = capsys.readouterr().out
    for word in ("coincide", "always the left digit", "VL-PET", "VL-Adapter", "All methods"):
        assert word in printed, word
    everything = json.loads((tmp_path / "methods.json").read_text())
    assert tuple(everything) == NAMES
    for name, figures in everything.items():
        assert json.loads((tmp_path / name / "report.json").read_text()) == figures
        assert (tmp_path / name / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert figures["detached_answers_as_before"] is True
        assert figures["comparison"]["agrees"] is True
        assert figures["before"].keys() == {entry.text for entry in (*tasks.OLD, tasks.NEW)}
        assert len(figures["training"]["losses"]) == 2
        backbone = backbones.load(figures["backbone"])
        loaded = pk.attach(backbone, str(tmp_path / name / "adapter"))
        assert loaded.config.to_dict() == figures["config"]
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert methods_report.table_of(list(everything.values())).count("coincide") == len(NAMES)


def test_curves_that_differ_end_in_exit_code_one(
    raw: tuple[train.Cached, train.Cached],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(methods_run, "cache", lambda model, settings: raw)
    monkeypatch.setattr(compare, "curve_bound", lambda published, controls: -1.0)
    options = methods_run.MethodOptions(tmp_path, {**SIZES, "steps": 1}, 1, 1)
    assert methods_run.run("lora", options) == 1
    assert "DO NOT COINCIDE" in capsys.readouterr().out
    assert not (tmp_path / "methods.json").exists()


def test_bad_options_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (["--method", "bitfit"], "--method: invalid choice: 'bitfit'"),
        (["--method", "lora", "--steps", "0"], "--steps: want a number >= 1, got 0"),
        (["--method", "all", "--resume"], "got --method all, which always runs from its beginning"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["demo", "--out", str(tmp_path), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_new_instruction_is_learned(name: str, tmp_path: Path) -> None:
    assert cli.main(["demo", "--method", name, "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / name / "report.json").read_text())
    assert figures["after"][tasks.NEW.text] > max(figures["baselines"].values()) + 0.2
    assert methods.old_accuracy(figures["after"]) > 0.9
    # Not met by training that is so unstable that its own disturbance hides a fault.
    assert figures["comparison"]["bound"] < 1e-2
