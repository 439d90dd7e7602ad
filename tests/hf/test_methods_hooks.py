"""A user's hooks on what a method adapts: they see what they saw on the base, and what they change
counts as it does in the published form."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from tests.hf import tiny_text
from tests.hf.methods import (
    Row,
    Values,
    attached,
    differences,
    every,
    fresh,
    own,
    paths,
    read,
    step,
)

Shapes = dict[str, list[tuple[int, ...]]]


def _hook(model: nn.Module, names: tuple[str, ...], *, change: bool = True) -> Shapes:
    """On every second module a pre-hook changes the input, on the others a hook the output; all
    shapes are kept by path."""
    shapes: Shapes = {}
    for number, path in enumerate(names):
        pre, post = f"{path} in", f"{path} out"
        shapes[pre], shapes[post] = [], []

        def before(
            module: nn.Module,
            args: Any,
            kwargs: Any,
            seen: list[Any] = shapes[pre],
            changes: bool = change and number % 2 == 0,
        ) -> Any:
            x = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(x, Tensor):
                return None
            seen.append(tuple(x.shape))
            if not changes or not x.is_floating_point():
                return None
            if args:
                return (x * 1.1, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": x * 1.1}

        def after(
            module: nn.Module,
            args: Any,
            out: Any,
            seen: list[Any] = shapes[post],
            changes: bool = change and number % 2 == 1,
        ) -> Any:
            y = out[0] if isinstance(out, tuple) else out
            seen.append(tuple(y.shape))
            if not changes:
                return None
            return (y * 0.8, *out[1:]) if isinstance(out, tuple) else y * 0.8

        module = model.get_submodule(path)
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    return shapes


def _hooked(row: Row, form: str, names: tuple[str, ...], *, first: bool) -> tuple[Values, Shapes]:
    model = fresh(row)
    if first:
        shapes = _hook(model, names)
    _, attachment = attached(row, form, model)
    if not first:
        shapes = _hook(model, names)
    return step(row, model, attachment, row.given(leaves="all")), shapes


@functools.cache
def _on_the_base(row: Row) -> Shapes:
    model, found = fresh(row), paths(row)
    names = dict.fromkeys((*found.places, *found.layers, *found.norms))
    shapes = _hook(model, tuple(names), change=False)
    read(model.train(), row.given(leaves="all").batch)
    return shapes


@functools.cache
def _unhooked(row: Row) -> Values:
    return step(row, *attached(row), row.given(leaves="all"))


@pytest.mark.one_in(4)
@every("hooks", quick=own)
@pytest.mark.parametrize("first", [True, False], ids=["before_attach", "after_attach"])
@pytest.mark.parametrize("kind", ["places", "layers", "norms"])
def test_hooks_see_and_change_what_they_did(row: Row, kind: str, first: bool) -> None:
    names: tuple[str, ...] = getattr(paths(row), kind)
    got, seen = _hooked(row, "fused", names, first=first)
    assert seen == {name: _on_the_base(row)[name] for name in seen}
    want, _ = _hooked(row, "published", names, first=first)
    assert differences(got, want) == []
    assert differences(got, _unhooked(row), 1e-6) != []


@every("hooks", quick=own)
def test_hooks_that_only_look_change_nothing(row: Row) -> None:
    found = paths(row)
    model, attachment = attached(row)
    names = dict.fromkeys((*found.places, *found.layers, *found.norms))
    seen = _hook(model, tuple(names), change=False)
    assert differences(step(row, model, attachment, row.given(leaves="all")), _unhooked(row)) == []
    assert seen == _on_the_base(row)


def test_hooks_of_frozen_embeddings_run() -> None:
    """The kind: what is left out of a compiled graph, left out elsewhere too."""
    model: Any = tiny_text.build("llama")
    pk.attach(model, pk.RoutingConfig(r=2))
    ids = torch.arange(5, 9)[None]
    assert not model.get_input_embeddings()(ids).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(ids).requires_grad
