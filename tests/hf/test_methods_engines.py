"""Every method under what trains models: checkpointing, compilers and data parallelism."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.hf import ranks
from tests.hf.methods import (
    ROWS,
    Given,
    Row,
    Values,
    around,
    attached,
    clear,
    differences,
    every,
    first,
    fresh,
    own,
    paths,
    read,
    step,
    values,
)

EXACT = 1e-12  # relative, in fp64: the same operations again
MEANWHILE = ("nothing", "disabled", "around another", "another forward", "a reference")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Frozen parts below the adapter are checkpointed as well.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable")
        yield


# -- checkpointing --------------------------------------------------------------------------------


def _between(
    row: Row, model: nn.Module, attachment: Any, meanwhile: str, leaves: str
) -> tuple[Given, list[Tensor]]:
    """A forward's losses, with what happens before their backward."""
    given = row.given(leaves=leaves)
    with around(attachment, given):
        out, loss = read(model.train(), given.batch)
    losses = [loss + out.square().sum()]
    if meanwhile == "another forward":
        other = row.given(3)
        with around(attachment, other):
            losses.append(read(model, other.batch)[1])
    if meanwhile == "a reference":
        with torch.no_grad(), attachment.disabled():
            read(model, row.given(3).batch)
    return given, losses


def _gradients(row: Row, model: nn.Module, attachment: Any, meanwhile: str, leaves: str) -> Values:
    clear(attachment)
    given, losses = _between(row, model, attachment, meanwhile, leaves)
    block: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if meanwhile == "disabled":
        block = attachment.disabled()
    if meanwhile == "around another":
        block = around(attachment, row.given(2))
    with block:
        for loss in losses:
            loss.backward()
    return values(attachment, given, losses[0], losses[-1])


@functools.cache
def _wanted(row: Row, several: bool, leaves: str) -> Values:
    meanwhile = "another forward" if several else "nothing"
    return _gradients(row, *attached(row), meanwhile, leaves)


def _checkpointed(row: Row, reentrant: bool) -> tuple[nn.Module, Any]:
    model, attachment = attached(row)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    return model, attachment


@every("checkpointing", quick=own)
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_gradients_are_those_without_checkpointing(row: Row, reentrant: bool) -> None:
    """Whatever happens between the forward and its backward."""
    leaves = "inputs" if reentrant else "all"
    wrong: dict[str, Any] = {}
    model, attachment = _checkpointed(row, reentrant)
    for meanwhile in MEANWHILE:
        want = _wanted(row, meanwhile == "another forward", leaves)
        try:
            found = _gradients(row, model, attachment, meanwhile, leaves)
            faults = differences(found, want, EXACT)
        except (RuntimeError, ValueError, AttributeError) as error:
            faults = [f"{type(error).__name__}: {str(error)[:120]}"]
        if faults:
            wrong[meanwhile] = faults[:3]
            model, attachment = _checkpointed(row, reentrant)
    assert wrong == {}, wrong


@every("checkpointing", quick=own)
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_a_disabled_forward_is_recomputed_disabled(row: Row, reentrant: bool) -> None:
    given = row.given(leaves="inputs")
    read(fresh(row).train(), given.batch)[1].backward()
    want = {name: leaf.grad for name, leaf in given.leaves().items()}
    model, attachment = _checkpointed(row, reentrant)
    given = row.given(leaves="inputs")
    with attachment.disabled():
        _, loss = read(model.train(), given.batch)
    loss.backward()
    faults = differences({n: leaf.grad for n, leaf in given.leaves().items()}, want, EXACT)
    assert faults == [], faults
    moved = [n for n, p in attachment.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved == []


# -- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def _dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile(model: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        model.get_submodule(name).compile(fullgraph=True, backend="aot_eager")


@every("compile", quick=first)
@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_layer(row: Row) -> None:
    want = step(row, *attached(row), row.given(leaves="all"))
    model, attachment = attached(row)
    _compile(model, paths(row).layers[:1])
    assert differences(step(row, model, attachment, row.given(leaves="all")), want) == []


@every("compile")
@pytest.mark.slow
@pytest.mark.usefixtures("_dynamo")
def test_compiled_stacks(row: Row) -> None:
    want = step(row, *attached(row), row.given(leaves="all"))
    model, attachment = attached(row)
    _compile(model, paths(row).stacks)
    assert differences(step(row, model, attachment, row.given(leaves="all")), want) == []


PLAIN = [row for row in ROWS if row.plain and row.name.endswith("llama")]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.name)
@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_plain_stack_is_checkpointed(row: Row) -> None:
    want = step(row, *attached(row), row.given(leaves="all"))
    model, attachment = _checkpointed(row, False)
    _compile(model, paths(row).stacks)
    assert differences(step(row, model, attachment, row.given(leaves="all")), want) == []


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[] if first(row) else [pytest.mark.slow])
        for row in PLAIN
    ],
)
@pytest.mark.usefixtures("_dynamo")
def test_a_plain_layer_has_no_graph_for_each_length(row: Row) -> None:
    counts = []
    for adapted in (False, True):
        model = fresh(row)
        if adapted:
            attached(row, model=model)
        counter = CompileCounter()
        for name in paths(row).layers[:1]:
            model.get_submodule(name).compile(fullgraph=True, backend=counter)
        for length in (6, 7, 8, 9):
            read(model.train(), row.given(length=length).batch)
        counts.append(counter.frame_count)
        torch._dynamo.reset()
    assert counts[1] <= counts[0], "graphs of the base, and of the adapted model"


# -- data parallelism -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parallel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """What went wrong in two processes, by row; of the rows that are asked for."""
    names = [
        item.callspec.params["row"].name  # type: ignore[attr-defined]
        for item in request.session.items
        if item.path == request.path and "parallel" in getattr(item, "fixturenames", ())
    ]
    found = ranks.run("tests.hf.methods_parallel", tmp_path_factory.mktemp("parallel"), names)
    return {name: [fault for each in found for fault in each[name]] for name in names}


@every("parallel", quick=own)
def test_gradients_are_averaged_over_processes(row: Row, parallel: dict[str, list[str]]) -> None:
    assert parallel[row.name] == []
