"""Malformed calls: each is a TypeError or ValueError that names the argument, says what is wanted
and what came, before anything runs."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels._runtime import checks
from petal_kernels.hf.attachment import Attachment
from petal_kernels.hf.method import Hand
from tests.malformed import model_layer, modules, operators
from tests.malformed.corruptions import Case, malformed
from tests.malformed.refusal import failures
from tests.ops import folders

CASES = [*operators.cases(), *modules.cases(), *model_layer.cases()]

# Results, which nobody makes by hand, and what is the base's own to judge.
RESULTS = (pk.memory.Profile, pk.memory.Saved)
FREE = {(pk.nn.FrozenLinear.forward, "x")}


def quick(case: Case) -> bool:
    """`explain` makes an operator's own checks: of each, one form."""
    first = ("contract", "linear", "gated", "experts")
    return not case.name.startswith("explain-") or case.name.split("-")[-1] in first


def public() -> Iterator[Any]:
    """Every function, constructor and method that a user calls with arguments."""
    modules_ = [getattr(pk.nn, name) for name in pk.nn.__all__]
    for value in [*(getattr(pk, name) for name in pk.__all__), *modules_]:
        if callable(value) and value is not Attachment:
            yield inspect.unwrap(value)
    for value in (getattr(pk.memory, name) for name in pk.memory.__all__):
        if value not in RESULTS:
            yield value
    attachments = (Attachment, pk.memory.Profile)
    for cls in [*(c for c in modules_ if isinstance(c, type)), *attachments]:
        for name in dir(cls):
            method = getattr(cls, name)
            inherited = name != "forward" and hasattr(nn.Module, name)
            ours = cls is Attachment and hasattr(Hand, name)  # a method calls it, no user
            if not name.startswith("_") and callable(method) and not inherited and not ours:
                yield getattr(method, "__wrapped__", method)


@pytest.mark.parametrize("case", [case for case in CASES if quick(case)], ids=str)
def test_every_malformed_call_is_refused_by_name(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _all_refused(case, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("method", "block"),
    [
        (method, block)
        for method, own in (("routing", "vision"), ("aurora", "context"), ("experts", "domains"))
        for block in ("vision", "context", "domains")
        if block != own
    ],
)
def test_a_block_that_a_method_does_not_read_is_refused_by_name(method: str, block: str) -> None:
    attachment = model_layer.attached(method)
    message = f"{block}: want a method that reads it, got {attachment.config.method!r}, which has "
    with pytest.raises(ValueError, match=re.escape(message + "the blocks ['disabled'")):
        getattr(attachment, block)(torch.ones(2, 9))
    with pytest.raises(TypeError, match="disabled"):
        attachment.disabled(True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not quick(case)], ids=str)
def test_and_when_it_is_explained(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _all_refused(case, tmp_path, monkeypatch)


def _all_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # "nonsense" names a folder to save into
    case.call(**case.valid())
    found, count = failures(case)
    assert count >= 10
    assert not found, "\n".join([f"{case.name}:", *found])


def test_every_argument_of_every_public_callable_is_spoilt() -> None:
    """What is public is found, not listed: a new function, module, method, config or argument
    without a call here turns this red."""
    covered = {(case.target, name) for case in CASES for name in case.parameters}
    wanted = {
        (function, name)
        for function in public()
        for name in Case(name="", call=function, valid=dict).parameters
        if (function, name) not in FREE
    }
    assert len(wanted) >= 300
    missing = sorted(f"{f.__qualname__}({name})" for f, name in wanted - covered)
    assert not missing


def test_there_are_many_and_each_once() -> None:
    calls = {
        (case.name, argument, each.label)
        for case in CASES
        if quick(case)
        for argument, each, _ in malformed(case)
        if not case.matches(case.legal, argument, each)
    }
    by_callable = Counter(name.split("-")[0] for name, _, _ in calls)
    assert len(calls) >= 8_000
    for operator in folders.names():
        assert by_callable[operator] >= 200, by_callable
    assert min(by_callable.values()) >= 10, by_callable


def test_reading_the_signature_finds_a_new_argument() -> None:
    def operator(x: Tensor, *, factor: float = 1.0) -> None:
        checks.check_floating("x", x)

    case = Case(name="operator", call=operator, valid=lambda: {"x": torch.ones(2)})
    found, _ = failures(case)
    assert {line.split(":")[0] for line in found} >= {"factor"}
