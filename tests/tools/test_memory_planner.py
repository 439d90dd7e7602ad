"""`petal-kernels memory --gpu`: what is told when, how a change is made, how many runs it takes."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import transformers

import petal_kernels as pk
from petal_kernels.memory.optimizer import Settings
from petal_kernels.tools.memory import arguments, budget, fit, gpus, planner, presets, whatif
from petal_kernels.tools.memory.options import Options
from tests.tools.test_memory_fit import GIB, LORA, Line, planned


def test_the_verdict_is_told_before_a_change_is_asked_and_each_change_as_it_is_found() -> None:
    """Kind: minutes of work before the first word of what was asked."""
    heard: list[str] = []
    need = Line(10.0, 0.5, {"checkpointing=True": 3.0})
    planner_ = planned(need, 9.5)
    planner_.tell = lambda text: heard.append(f"{len(need.asked)}: {text}")
    found = planner_.verdict(LORA)
    assert heard[0] == "1: does not fit x (9.5 GiB): 2560.0 MiB too much"
    assert heard[1] == (
        '2: with frozen norms fused: 12.00 GiB, does not fit; LoraConfig(frozen_norms="fused")'
    )
    ours = [tried for tried in found.changes if tried.how]
    assert [text.partition(":")[0] for text in heard] == [str(n) for n in range(1, len(ours) + 2)]
    assert "gradient checkpointing: 9216.0 MiB, fits; model.gradient_check" in heard[len(ours) - 1]
    heard.clear()
    planned(need, 13.0).verdict(LORA)
    planner_.gpu = gpus.Gpu("x", 13 * GIB)
    planner_.verdict(LORA)
    assert heard[0].endswith("fits x (13.0 GiB), 1024.0 MiB to spare")
    assert len(heard) == 1


def test_another_optimizer_needs_no_run_of_the_step_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kind: the same step run again, since others ran between."""
    built: list[Options] = []

    class Built:
        def build(self, options: Options) -> Any:
            built.append(options)
            return presets.Step(lambda: None, {})

    monkeypatch.setattr(whatif, "run", lambda step: step)
    needs = planner.Needs(Built(), 0)  # type: ignore[arg-type]
    others = [dataclasses.replace(LORA, batch=batch) for batch in (5, 6)]
    for options in (LORA, *others, LORA, others[1]):
        needs.run(options)
    assert built == [LORA, *others]


def test_every_change_says_how_it_is_made() -> None:
    """The option is one of the command's, and the code one that sets the same."""
    known = arguments.parser()
    for change in fit.CHANGES:
        words = change.option.split()
        assert change.code, change.label
        given = vars(known.parse_args(words))
        wanted: dict[str, Any] = {**change.fields}
        if change.optimizer:
            assert given["optimizer"].kind == change.optimizer
        assert {name: given[name] for name in wanted} == wanted
        config = re.fullmatch(r"LoraConfig\((\w+)=(.*)\)", change.code)
        if config is not None:
            value = ast.literal_eval(config[2])
            assert getattr(pk.LoraConfig(**{config[1]: value}), config[1]) == wanted[config[1]]
        call = re.fullmatch(r"model\.(\w+)\(\)", change.code)
        assert call is None or hasattr(transformers.PreTrainedModel, call[1])


def grown(base: float, slope: float) -> tuple[list[int], Any]:
    """A need whose parts say what grows, and the batches that were asked."""
    asked: list[int] = []

    def need(options: Options, _: Settings) -> budget.Budget:
        asked.append(options.batch)
        kept = int(slope * options.batch * GIB)
        return budget.Budget({budget.FROZEN: int(base * GIB), budget.KEPT: kept}, "")

    return asked, need


@pytest.mark.parametrize("start", [1, 4, 39, 40, 41, 100, 1000])
@pytest.mark.parametrize(("size", "largest"), [(9.9, 0), (10.4, 0), (10.5, 1), (30.0, 40)])
def test_parts_that_do_not_grow_save_runs(start: int, size: float, largest: int) -> None:
    """Kind: runs that ask what the first one knows. Two are needed, what fits and one more."""
    asked, need = grown(10.0, 0.5)
    options = dataclasses.replace(LORA, batch=start)
    assert planned(need, size).largest_batch(options) == largest
    assert len(asked) == len(set(asked)) <= 3


@pytest.mark.parametrize("size", [25.5, 26.5, 27.5, 28.5, 29.5])
def test_several_changes_are_found_in_few_runs(size: float) -> None:
    """Every change saves one: with those that save more than is missing, one run fewer is no
    answer."""
    less = {"frozen_norms=fused": 1.0, "frozen_norms=folded": 1.0, "adapter_dtype=bfloat16": 1.0,
            "optimizer=adamw8bit": 1.0, "recompute_mlp=True": 1.0, "checkpointing=True": 1.0,
            "base=nf4": 1.0}  # fmt: skip
    need = Line(30.0, 0.0, less)
    single = planned(need, size)
    single._engines = lambda *_: []  # type: ignore[method-assign]
    tried, answer = single.changes(LORA)
    assert answer is not None
    assert answer.fits
    if answer in tried:
        return
    runs = len(need.asked)
    shorter = planned(need, size)._try(
        [c for c in fit.CHANGES if c.label in answer.label.split(", ")[:-1]], LORA
    )
    assert not shorter.fits
    assert runs <= 1 + len(tried) + 3
