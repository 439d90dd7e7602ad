"""`petal-kernels memory --gpu` and `--compare METHODS`: what a step needs, whether it fits, what to
change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from petal_kernels.memory.optimizer import Settings, settings_of
from petal_kernels.tools.memory import (
    app,
    budget,
    fit,
    fit_text,
    gpus,
    planner,
    presets,
    towers,
    whatif,
)
from petal_kernels.tools.memory.options import Options
from tests.hf import tiny_vlms
from tests.tools.test_memory_budget import small_step
from tests.tools.test_memory_config import tiny_config

GIB = 2**30
ADAMW = settings_of("adamw")


# The search -------------------------------------------------------------------------------------


class Line:
    """A need of `base` and `slope` for each sample, less with each change; and what was asked."""

    def __init__(self, base: float, slope: float, less: dict[str, float] | None = None) -> None:
        self.base, self.slope, self.less = base, slope, less or {}
        self.asked: list[tuple[Options, Settings]] = []

    def __call__(self, options: Options, optimizer: Settings) -> budget.Budget:
        self.asked.append((options, optimizer))
        size = self.base + self.slope * options.batch
        for name, saved in self.less.items():
            field, _, value = name.partition("=")
            got = optimizer.kind if field == "optimizer" else getattr(options, field)
            size -= saved if str(got) == value else 0
        parts = dict.fromkeys(budget.PARTS, 0) | {budget.FROZEN: int(size * GIB)}
        return budget.Budget(parts, "backward", unit=int(0.5 * GIB))


LORA = Options(method="lora", batch=4)
HEEDED = presets.HEEDED["lora"]


def planned(need: Any, size: float) -> fit.Planner:
    return fit.Planner(need, gpus.Gpu("x", int(size * GIB)), ADAMW, HEEDED)


@pytest.mark.parametrize("start", [1, 4, 100])
@pytest.mark.parametrize(
    ("size", "largest"), [(9.9, 0), (10.5, 1), (12.0, 4), (12.49, 4), (12.5, 5), (30.0, 40)]
)
def test_the_largest_batch_is_found_on_a_line(start: int, size: float, largest: int) -> None:
    need = Line(10.0, 0.5)
    assert planned(need, size).largest_batch(dataclasses.replace(LORA, batch=start)) == largest
    assert len(need.asked) <= 8


@pytest.mark.parametrize("power", [0.3, 0.7, 1.5, 3.0])
def test_the_largest_batch_is_found_on_a_curve(power: float) -> None:
    asked = []

    def need(options: Options, _: Settings) -> budget.Budget:
        asked.append(options.batch)
        return budget.Budget({budget.FROZEN: int(GIB * options.batch**power)}, "")

    assert planned(need, 20.0).largest_batch(LORA) == min(int(20.0 ** (1 / power)), 4096)
    assert len(asked) == len(set(asked)) <= 24


def test_a_step_that_fits_is_asked_for_no_change() -> None:
    found = planned(Line(10.0, 0.5), 13.0).verdict(LORA)
    assert found.fits
    assert (found.spare, found.largest_batch, found.changes) == (GIB, 6, [])


def test_changes_come_in_the_order_of_their_cost_and_the_first_that_fits_is_the_answer() -> None:
    need = Line(10.0, 0.5, {"checkpointing=True": 3.0, "recompute_mlp=True": 1.0, "base=nf4": 9.0})
    found = planned(need, 9.5).verdict(LORA)
    assert not found.fits
    assert [c.label for c in found.changes] == [
        "frozen norms fused", "bfloat16 adapters", "AdamW in 8 bits", "norms folded",
        "MLPs recomputed", "gradient checkpointing", "base in nf4", "ZeRO-2 on 64 GPUs",
        "ZeRO-3 / FSDP on 2 GPUs",
    ]  # fmt: skip
    assert [c.fits for c in found.changes] == [False] * 5 + [True, True, False, True]
    assert found.answer is found.changes[5]
    assert found.answer.budget.need == 9 * GIB


def test_where_no_change_is_enough_those_before_it_are_made_too() -> None:
    less = {"recompute_mlp=True": 1.0, "optimizer=adamw8bit": 1.0, "checkpointing=True": 4.0}
    need = Line(10.0, 0.5, less)
    need.base, need.slope = 30.0, 0.0
    found = planned(need, 28.2).verdict(LORA)
    assert not any(c.fits for c in found.changes[:5])
    two = planned(Line(30.0, 0.0, {k: v for k, v in less.items() if "check" not in k}), 28.0)
    several = two.changes(dataclasses.replace(LORA, base="nf4", checkpointing=True))[1]
    assert several is not None
    assert several.label.endswith("ZeRO-3 / FSDP on 2 GPUs")
    assert planned(Line(1e6, 0.0), 1.0).verdict(LORA).answer is None


def test_several_changes_together_are_an_answer() -> None:
    need = Line(300.0, 0.0, {"recompute_mlp=True": 100.0, "optimizer=adamw8bit": 100.0})
    single = planned(need, 100.2)
    single._engines = lambda *_: []  # type: ignore[method-assign]
    tried, answer = single.changes(LORA)
    assert answer is not None
    assert not any(t.fits for t in tried)
    assert answer.label.split(", ")[-1] == "MLPs recomputed"
    assert answer.budget.need == 100 * GIB


@pytest.mark.parametrize(
    ("method", "labels"),
    [
        ("full", ["AdamW in 8 bits", "gradient checkpointing"]),
        ("peft-lora", ["fused layers (method lora)", "bfloat16 adapters", "AdamW in 8 bits",
                       "gradient checkpointing", "base in nf4"]),
    ],
)  # fmt: skip
def test_a_change_is_asked_where_the_method_has_it(method: str, labels: list[str]) -> None:
    options = Options(method=method)
    asked = [c for c in fit.CHANGES if c.applies(options, ADAMW, presets.HEEDED[method])]
    assert [c.label for c in asked] == labels
    costs = [c.cost_of(options) for c in asked if c.label == "gradient checkpointing"]
    assert ("33 %" if method == "full" else "50 %") in costs[0]


# GPUs, texts, the command -----------------------------------------------------------------------


def test_a_gpu_is_a_name_or_a_size() -> None:
    assert gpus.gpu("H100").total == int(79.1 * GIB)
    assert gpus.gpu("24").total == gpus.gpu("24GiB").total == 24 * GIB
    assert str(gpus.gpu("t4")) == "T4 (14.5 GiB)"


@pytest.mark.parametrize("text", ["", "h", "0", "-1", "nan", "inf", "1e9"])
def test_what_is_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(Exception, match="want one of h200, h100"):
        gpus.gpu(text)


def run(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, Any]:
    given = ["--config", str(folder), "--length", "8", "-r", "4", "--dtype", "float32"]
    code = app.main([*given, *words, "--json", "-"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_command_says_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("llava-qwen2", tmp_path)
    code, found = run(capsys, tmp_path, "--gpu", "0.0625", "--reserve", "0.03", "--batch", "16")
    (method,) = found["methods"]
    assert code == 0
    assert method["fits"]
    assert method["largest_batch"] >= 16
    assert method["spare"] == method["gpu"]["total"] - method["budget"]["need"]
    assert method["budget"]["parts"][budget.CONTEXT] == int(0.03 * GIB)
    most = method["largest_batch"]
    for batch, fits in ((most, True), (most + 1, False)):
        words = ["--gpu", "0.0625", "--reserve", "0.03", "--batch", str(batch)]
        code, found = run(capsys, tmp_path, *words)
        assert found["methods"][0]["fits"] == fits
        assert code == (0 if fits else 1)
    assert found["methods"][0]["changes"][0]["label"] == "frozen norms fused"


def test_methods_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    tiny_config("llava-qwen2", tmp_path)
    _, found = run(capsys, tmp_path, "--compare", "full,peft-lora,lora,petal")
    by = {m["method"]: m for m in found["methods"]}
    assert list(by) == ["full", "peft-lora", "lora", "petal"]
    assert by["petal"]["budget"] is None
    assert by["petal"]["why_not"]
    trained = {name: by[name]["budget"]["parts"][budget.TRAINED] for name in ("peft-lora", "lora")}
    assert trained["peft-lora"] == trained["lora"] > 0
    assert by["full"]["budget"]["parts"][budget.FROZEN] == 0
    assert by["lora"]["budget"]["saved"] < by["peft-lora"]["budget"]["saved"]


def test_the_report_is_a_table_a_sentence_and_the_changes() -> None:
    """Of two methods, one of which cannot be attached; as text, as plain data and as a page."""
    found = planned(Line(10.0, 0.5, {"checkpointing=True": 3.0}), 9.5).verdict(LORA)
    tower = towers.Tower("eye", 3 * GIB, 0)
    whole = planner.Column("lora", "a title", LORA, found.budget, found, tower, ["a picture"])
    columns = [whole, planner.Column("petal", "", LORA, why_not="no Q-Former")]
    shown = fit_text.report(columns, ADAMW)
    said = ["a title", "a picture", "GiB at the peak", "12.00", "not one sample does",
            "petal: not here: no Q-Former", "The frozen tower eye has 3072.0 MiB of weights",
            "lora: Batch 4 does not fit x (9.5 GiB): 2560.0 MiB too much",
            "The cheapest way: gradient checkpointing (9216.0 MiB): "
            "model.gradient_checkpointing_enable().", "How to make them", "--frozen-norms fused",
            "Changes by their cost in time", "+ 50 % of its products"]  # fmt: skip
    assert [text for text in said if text not in shown] == []
    lines = shown.splitlines()
    change = next(line for line in lines if line.split()[:2] == ["gradient", "checkpointing"])
    assert change.split()[2:5] == ["9.00", "-3.00", "yes"]
    data = fit_text.document(columns, ADAMW, "c", {})
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(data, default=str))
    assert data["methods"][0]["answer"]["need"] == 9 * GIB
    assert data["methods"][0]["answer"]["how"] == [
        {"option": "--checkpointing", "code": "model.gradient_checkpointing_enable()"}
    ]
    assert data["methods"][1]["why_not"] == "no Q-Former"
    pytest.importorskip("matplotlib")
    page = fit_text.page_of(columns, ADAMW, "the command", {"torch": "x"})
    assert [t for t in (*said[3:7], *said[10:], "the command") if t not in page] == []


def verdict_of(need: float, size: float, answer: fit.Tried | None = None) -> str:
    whole = budget.Budget({budget.FROZEN: int(need * GIB)}, "")
    found = fit.Verdict(gpus.Gpu("X", int(size * GIB)), whole, 3, [], answer)
    return fit_text.verdict(found, 8)


def test_a_verdict_is_a_sentence() -> None:
    assert verdict_of(10, 24) == (
        "Batch 8 fits X (24.0 GiB) with 14.00 GiB to spare; the largest batch is 3."
    )
    tried = fit.Tried("more", "time", budget.Budget({budget.FROZEN: 20 * GIB}, ""), True)
    assert verdict_of(40, 24, tried).endswith("The cheapest way: more (20.00 GiB).")


SCRIPT = """
import torch
from torch import nn

def build(width=64):
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1)), torch.zeros(3, width)

def broken():
    return int("seven")
"""


def test_a_script_without_a_batch_is_asked_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    words = ["--script", f"{tmp_path}/mine.py", "--gpu", "1", "--json", "-"]
    assert app.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["methods"]
    assert found["fits"]
    assert found["largest_batch"] is None
    assert found["verdict"].startswith("The step fits a GPU (1.0 GiB)")
    assert "largest batch" not in found["verdict"]
    assert found["method"] == "the step"
    with pytest.raises(ValueError, match="seven"):
        app.main(["--script", f"{tmp_path}/mine.py:broken", "--gpu", "1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reserve", "1"], "--reserve: want it with --gpu"),
        (["--compare", "full,lora"], "want --config or a --model that has several methods"),
        (["--compare", "full,nothing"], "want some of petal"),
        (["--compare", "lora-layer", "--gpu", "24"], "has a model of its own and no --gpu"),
        (["--model", "bart-base", "--gpu", "24", "--what-if", "batch"], "--gpu: has no --what-if"),
        (["--model", "bart-base", "--compare", "full,lora", "--method", "lora"], "no --method"),
        (["--model", "bart-base", "--compare", "full,experts", "--parts", "vision"],
         "--compare full,experts: has no --parts"),
        (["--gpu", "gtx"], "want one of h200"),
        (["--gpu", "24", "--reserve", "-1"], "want a number of GiB >= 0"),
        (["--gpu", "4091"], "or a number of GiB, at most 1024, got 4091"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        app.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_what_takes_long_says_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: minutes of silence where there is no terminal."""
    (tmp_path / "mine.py").write_text(SCRIPT)
    words = ["--script", f"{tmp_path}/mine.py", "--gpu", "1"]
    assert app.main(words) == 0
    assert "the step: as it is ..." in capsys.readouterr().err.splitlines()
    assert app.main([*words, "--json", "-"]) == 0
    assert "as it is" not in capsys.readouterr().err


# Towers -----------------------------------------------------------------------------------------


def test_a_frozen_tower_keeps_nothing_unless_inputs_ask_for_gradients(tmp_path: Path) -> None:
    plain, step = small_step(tmp_path)
    found = towers.tower(plain, planner.model_of(step))
    assert found is not None
    assert found.path == tiny_vlms.VLMS["llava-qwen2"].tower.rstrip(".")
    assert found.keeps == 0
    assert "keeps nothing" in str(found)
    asked, step = small_step(tmp_path, input_grads=True)
    kept = towers.tower(asked, planner.model_of(step))
    assert kept is not None
    assert kept.keeps > 0
    assert kept.weights == found.weights > 0
    assert "no_grad" in str(kept)
    trained, step = small_step(tmp_path, parts=("vision",))
    assert towers.tower(trained, planner.model_of(step)) is None


# Pinned -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "need"),
    [
        ("bart-base", {"batch": 2, "length": 32}, 362_807_296),
        pytest.param(
            "llama-7b", {"batch": 1, "length": 512}, 16_347_299_840, marks=pytest.mark.slow
        ),
    ],
)
def test_what_a_preset_needs(name: str, options: dict[str, Any], need: int) -> None:
    preset = presets.PRESETS[name]
    given = {"method": preset.methods[0], **preset.defaults, **options}
    step = presets.prepare(name, Options(**given))
    profile = whatif.run(step)
    assert budget.budget(profile, ADAMW, 0, planner.model_of(step)).need == need
