"""The demo at tiny sizes: what it splits, compares, saves and resumes is what it says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import petal_kernels as pk
from petal_kernels.tools import cli
from petal_kernels.tools.demo import app, compare, data, report, tasks, train
from petal_kernels.tools.demo import model as small

TINY = train.Settings(steps=6, batch=8, rank=4, pictures=48, held_out=24)


def options(out: Path, **changes: Any) -> app.Options:
    base = app.Options(out, TINY, compare_steps=2, timed_steps=1)
    return replace(base, **changes)


@pytest.fixture(scope="module")
def cached() -> tuple[train.Cached, train.Cached]:
    return train.cache(small.load(), TINY)


@pytest.fixture(autouse=True)
def cache_once(cached: tuple[train.Cached, train.Cached], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures for every run of the demo here: reading the digits takes seconds."""
    monkeypatch.setattr(app, "cache", lambda model, settings: cached)


@dataclass(frozen=True)
class Run:
    """One whole run of the demo: its exit code, folder, report and printed text."""

    code: int
    out: Path
    figures: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def whole(
    cached: tuple[train.Cached, train.Cached], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    out = tmp_path_factory.mktemp("demo") / "whole"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(app, "cache", lambda model, settings: cached)
        code = app.run(options(out))
    figures = json.loads((out / "report.json").read_text())
    return Run(code, out, figures, printed.getvalue())


@pytest.fixture
def trainer(cached: tuple[train.Cached, train.Cached]) -> Callable[[], train.Trainer]:
    def make() -> train.Trainer:
        return train.attached(small.load(), train.Batches(cached[0], TINY), TINY)

    return make


def test_no_digit_image_is_in_both_splits(cached: tuple[train.Cached, train.Cached]) -> None:
    training, held = data.load_digits()
    assert training.labels.numel() == 4000
    assert held.labels.numel() == 1000
    assert torch.bincount(held.labels).tolist() == [100] * 10
    assert not set(training.source.tolist()) & set(held.source.tolist())
    assert set(cached[0].pairs.source.flatten().tolist()) <= set(training.source.tolist())
    assert set(cached[1].pairs.source.flatten().tolist()) <= set(held.source.tolist())


def test_pictures_show_the_labelled_digits_and_repeat_from_a_seed() -> None:
    images = torch.zeros(2, data.DIGIT, data.DIGIT, dtype=torch.uint8)
    images[1, 8:20, 8:20] = 255
    digits = data.Digits(images, torch.tensor([0, 1]), torch.tensor([0, 1]))
    pairs = data.draw_pairs(digits, 40, seed=3, augment=True)
    again = data.draw_pairs(digits, 40, seed=3, augment=True)
    assert torch.equal(pairs.pictures, again.pictures)
    assert torch.equal(pairs.left, again.left)
    assert pairs.pictures.shape == (40, 1, data.IMAGE_SIZE, data.IMAGE_SIZE)
    empty = pairs.pictures.min()
    lit_left = (pairs.pictures[..., : data.HALF] > empty).flatten(1).any(1)
    lit_right = (pairs.pictures[..., data.HALF :] > empty).flatten(1).any(1)
    assert torch.equal(lit_left, pairs.left == 1)
    assert torch.equal(lit_right, pairs.right == 1)


def test_answers_follow_the_instructions_and_the_new_word_is_never_in_an_old_one() -> None:
    left, right = torch.tensor([3]), torch.tensor([8])
    said = {
        entry.text: tasks.WORDS[int(entry.answer(left, right))] for entry in (*tasks.OLD, tasks.NEW)
    }
    assert said == {
        "left digit ?": "3",
        "right digit ?": "8",
        "smaller digit ?": "3",
        "left even ?": "no",
        "right even ?": "yes",
        "larger digit ?": "8",
    }
    assert all("larger" not in entry.text for entry in tasks.OLD)


def test_cached_features_give_the_models_own_logits_and_generate_says_the_same(
    cached: tuple[train.Cached, train.Cached],
) -> None:
    model, held = small.load(), cached[1]
    ids = tasks.question_ids((tasks.OLD[0],)).expand(len(held), -1)
    logits = small.answer_logits(model, held.features, ids)
    prompt = torch.tensor([[tasks.IMAGE] * small.QUERIES + [tasks.BOS]] * len(held))
    whole = model(
        pixel_values=held.pairs.pictures.expand(-1, 3, -1, -1),
        qformer_input_ids=ids,
        input_ids=prompt,
    ).logits[:, small.QUERIES :]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    words = [tasks.WORDS[i] for i in logits[:, 0].argmax(-1).tolist()]
    assert app._generate(model, held, tasks.OLD[0]) == words[: app._SHOWN]


def test_committed_model_reads_held_out_digits_and_does_not_know_the_new_word() -> None:
    assert small.WEIGHTS.stat().st_size <= 8_000_000
    model = small.load()
    settings = replace(TINY, held_out=300, pictures=1)
    shares = train.all_accuracies(train.form_of(model), train.cache(model, settings)[1])
    assert shares["left digit ?"] >= 0.9
    assert shares["right digit ?"] >= 0.9
    assert shares["larger digit ?"] < 0.7


def test_weights_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match=r"demo\.pretrain"):
        small.load(tmp_path / "none.safetensors")
    tensors = load_file(small.WEIGHTS)
    del tensors["query_tokens"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"missing \['query_tokens'\]"):
        small.load(tmp_path / "short.safetensors")


def compared(cached: train.Cached, steps: int, timed: int) -> compare.Comparison:
    batches = train.Batches(cached, TINY)
    return compare.compare(
        lambda implementation: train.attached(small.load(), batches, TINY, implementation),
        train.bare_form(),
        steps,
        timed,
        tick=lambda done, total: None,
    )


def test_both_forms_walk_one_curve_and_the_fused_one_keeps_less(
    cached: tuple[train.Cached, train.Cached],
) -> None:
    found = compared(cached[0], steps=4, timed=1)
    assert found.agrees
    assert len(found.fused_losses) == 4
    assert 0.0 < found.bound < 1e-3
    assert found.saved_bytes["frozen"] < found.saved_bytes["fused"] < found.saved_bytes["published"]
    assert compare.Comparison.from_dict(found.as_dict()) == found


def test_a_wrong_scale_of_a_tenth_of_a_percent_breaks_the_bound(
    cached: tuple[train.Cached, train.Cached], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = pk.attach

    def faulty(model: torch.nn.Module, config: pk.PetalConfig, *, implementation: str) -> object:
        if implementation == "fused":
            config = replace(config, scale=1.001)
        return attach(model, config, implementation=implementation)

    monkeypatch.setattr(pk, "attach", faulty)
    assert not compared(cached[0], steps=6, timed=0).agrees
    assert compare.largest_difference([1.0, float("nan")], [1.0, 1.0]) == float("inf")


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    linear = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4)

    def logits(features: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        return linear(features) + linear(features[:4]).sum()

    class Sum(train.Form):
        def loss(self, batch: train.Batch) -> torch.Tensor:
            return self.logits(batch.features, batch.questions).sum()

    batch = train.Batch(x, x, x)
    assert compare.saved_bytes(Sum(linear, logits), batch) == x.untyped_storage().nbytes()


def test_the_rate_warms_up_and_falls_to_zero(trainer: Callable[[], train.Trainer]) -> None:
    running = trainer()
    running.settings = replace(TINY, steps=20, warm_up=0.1)
    rates = []
    for _ in running.run(20):
        rates.append(running.optimizer.param_groups[0]["lr"] / TINY.learning_rate)
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.0 < rates[-1] < 0.01


def test_a_resumed_run_walks_the_same_curve_bit_for_bit(
    trainer: Callable[[], train.Trainer], tmp_path: Path
) -> None:
    whole = trainer()
    torch.manual_seed(5)
    wanted = list(whole.run(6))
    first = trainer()
    torch.manual_seed(5)
    list(first.run(3))
    checkpoint = first.save(tmp_path, {"any": 1})
    second = trainer()
    torch.manual_seed(99)
    second.restore(checkpoint)
    list(second.run(6))
    assert second.curve.losses == wanted
    for name, value in whole.attachment.state_dict().items():
        assert torch.equal(value, second.attachment.state_dict()[name]), name


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(
    trainer: Callable[[], train.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = trainer()
    list(running.run(1))
    first = running.save(tmp_path, {})
    list(running.run(2))

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space"):
            running.save(tmp_path, {})
    assert train.checkpoints(tmp_path) == [first]
    last = running.save(tmp_path, {})
    assert train.checkpoints(tmp_path) == [last]
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_leaves_a_checkpoint_and_resume_ends_where_an_unbroken_run_ends(
    whole: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = train.Trainer.step

    def interrupted(self: train.Trainer) -> float:
        loss = step(self)
        # The comparison uses trainers too; it runs in evaluation mode.
        if self.model.training and self.step_number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", interrupted)
        assert app.run(options(tmp_path)) == 130
    assert [path.name for path in train.checkpoints(tmp_path)] == ["checkpoint-000003"]
    assert not (tmp_path / "report.json").exists()
    assert f"petal-kernels demo --resume --out {tmp_path}" in capsys.readouterr().out
    assert app.run(options(tmp_path, resume=True)) == 0
    resumed = json.loads((tmp_path / "report.json").read_text())
    for key in ("training", "after", "answers", "before", "baselines"):
        assert whole.figures[key] == resumed[key], key


def test_report_holds_what_was_shown(whole: Run) -> None:
    assert whole.code == 0
    figures = whole.figures
    assert figures["question"] == "larger digit ?"
    assert figures["before"].keys() == {entry.text for entry in (*tasks.OLD, tasks.NEW)}
    assert figures["after"].keys() == figures["before"].keys()
    assert len(figures["training"]["losses"]) == TINY.steps
    assert figures["training"]["accuracy_steps"] == [1, 3, 6]
    assert figures["settings"] == asdict(TINY)
    assert figures["environment"]["torch"] == torch.__version__
    assert figures["environment"]["threads"] == torch.get_num_threads()
    assert figures["comparison"]["agrees"] is True
    assert figures["detached_answers_as_before"] is True
    assert {"commit", "matplotlib"} <= set(figures["environment"])
    assert figures["seconds"] > 0
    for name in ("curves.png", "answers.png"):
        assert (whole.out / name).read_bytes().startswith(b"\x89PNG"), name
    chart = (whole.out / "chart.svg").read_text()
    for values, unit in (("milliseconds", 1.0), ("saved_bytes", 1e-6)):
        for value in figures["comparison"][values].values():
            assert f"{value * unit:.1f}<" in chart, values
    for word in ("larger digit ?", "always the left digit", "coincide", "s left", "trained"):
        assert word in whole.printed, word
    attachment = pk.attach(small.load(), str(whole.out / "adapter"))
    assert attachment.config.r == TINY.rank


def test_curves_that_differ_end_in_exit_code_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "curve_bound", lambda published, controls: -1.0)
    assert app.run(options(tmp_path)) == 1
    assert "DO NOT COINCIDE" in capsys.readouterr().out


def test_bad_options_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: Callable[[], train.Trainer]
) -> None:
    cases = [
        (["--resume", "--out", str(tmp_path)], "--resume: want a checkpoint in"),
        (["--steps", "0"], "--steps: want a number >= 1, got 0"),
        (["--compare-steps", "0"], "--compare-steps: want a number >= 1, got 0"),
    ]
    running = trainer()
    list(running.run(1))
    running.save(tmp_path / "run", {})
    other = ["--resume", "--out", str(tmp_path / "run"), "--steps", "7"]
    cases.append((other, "--steps: want 6, as in"))
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["demo", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_command_line_lists_commands_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"petal-kernels {pk.__version__}"
    with pytest.raises(SystemExit):
        cli.main(["paint"])
    assert "paint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--help"])
    assert stopped.value.code == 0
    assert "--resume" in capsys.readouterr().out


def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(cli.COMMANDS["demo"], needs=("torch", "no_such_package"))
    monkeypatch.setitem(cli.COMMANDS, "demo", absent)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo"])
    assert stopped.value.code == 2
    assert (
        "demo needs no_such_package: pip install 'petal-kernels[demo]'" in capsys.readouterr().err
    )


def test_report_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **kwargs: object) -> object:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert report.machine()["commit"] == "unknown"
