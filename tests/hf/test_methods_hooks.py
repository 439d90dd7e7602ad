"""A user's hooks on what a method adapts: they see what they saw on the base, and what they change
counts as it does in the published form."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from tests.hf.methods import Row, Values, attached, differences, every, fresh, paths, read, step

Shapes = dict[str, list[tuple[int, ...]]]


def _hook(model: nn.Module, names: tuple[str, ...], *, change: bool = True) -> Shapes:
    """On every second module a pre-hook changes the input, on the others a hook the output; all
    shapes are kept by path."""
    shapes: Shapes = {}
    for number, path in enumerate(names):
        seen_in, seen_out = shapes.setdefault(f"{path} in", []), shapes.setdefault(f"{path} out", [])

        def before(
            module: nn.Module, args: Any, kwargs: Any, seen: Any = seen_in, odd: int = number % 2
        ) -> Any:
            x = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(x, Tensor):
                return None
            seen.append(tuple(x.shape))
            if odd or not change or not x.is_floating_point():
                return None
            changed = x * 1.1
            return (
                ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})
            )

        def after(
            module: nn.Module, args: Any, out: Any, seen: Any = seen_out, odd: int = number % 2
        ) -> Any:
            y = out[0] if isinstance(out, tuple) else out
            seen.append(tuple(y.shape))
            if not odd or not change:
                return None
            return (y * 0.8, *out[1:]) if isinstance(out, tuple) else y * 0.8

        module = model.get_submodule(path)
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    return shapes


def _hooked(
    row: Row, form: str, names: tuple[str, ...], *, first: bool, change: bool
) -> tuple[Values, Shapes]:
    model = fresh(row)
    shapes = _hook(model, names, change=change) if first else {}
    _, attachment = attached(row, form, model)
    if not first:
        shapes = _hook(model, names, change=change)
    return step(row, model, attachment, row.given(leaves="all")), shapes


def _on_the_base(row: Row, names: tuple[str, ...]) -> Shapes:
    model = fresh(row)
    shapes = _hook(model, names, change=False)
    read(model.train(), row.given(leaves="all").batch)
    return shapes


@every("hooks")
@pytest.mark.parametrize("first", [True, False], ids=["before_attach", "after_attach"])
@pytest.mark.parametrize("kind", ["places", "layers", "norms"])
def test_hooks_see_and_change_what_they_did(row: Row, kind: str, first: bool) -> None:
    names: tuple[str, ...] = getattr(paths(row), kind)
    base = _on_the_base(row, names)
    quiet, seen = _hooked(row, "fused", names, first=first, change=False)
    assert seen == base
    assert differences(quiet, step(row, *attached(row), row.given(leaves="all"))) == []
    got, seen = _hooked(row, "fused", names, first=first, change=True)
    want, _ = _hooked(row, "published", names, first=first, change=True)
    assert seen == base
    assert differences(got, want) == []
    assert differences(got, quiet, 1e-6) != []
