"""Any argument may be a view: strided, transposed, expanded, at any offset, each its own way. The
values count, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import petal_kernels as pk
from tests.ops import discovery
from tests.ops.discovery import CASES, OPERATORS, options

View = Callable[[Tensor], Tensor]


def junk(t: Tensor) -> Tensor:
    """What must not be read; an index or a flag, too, would be seen."""
    return torch.full_like(t, 3 if not t.is_floating_point() else 77.0)


def strided(t: Tensor) -> Tensor:
    """Every stride doubled."""
    return torch.stack((t, junk(t)), -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    """The dims in memory the other way round."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def offset(t: Tensor) -> Tensor:
    """Dense, one element past an aligned address."""
    return torch.cat((junk(t.reshape(-1)[:1]), t.reshape(-1)))[-t.numel() :].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """One row (one number, of a vector) for all: stride 0."""
    return t[:1].expand_as(t)


def expanded_columns(t: Tensor) -> Tensor:
    """Stride 0 in the last dim."""
    return t[..., :1].expand_as(t)


def dense(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


# Each argument another one, so that no test for a common layout is met by chance.
KINDS: dict[str, list[View]] = {
    "strided": [strided],
    "mixed": [strided, transposed, offset, transposed, expanded, dense],
    "mixed-otherwise": [offset, strided, dense, expanded_columns, transposed],
}


def view(inputs: dict[str, Any], views: list[View], rows: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every tensor, integers and flags too, as a view; ``views`` in turn. Constant ``rows`` would
    leave a norm nothing to divide by."""
    count = iter(range(10**6))

    def each(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel():
            chosen = views[next(count) % len(views)]
            return (strided if chosen is expanded_columns and name in rows else chosen)(value)
        if isinstance(value, (list, tuple)):
            return [each(name, v) for v in value]
        return value

    return {name: each(name, value) for name, value in inputs.items()}


INTERPRETED = (
    "qkv-dropout", "lora", "lora-own", "aurora-vit", "tucker", "cp", "large", "gram-tokens",
    "middleX", "topk-sorted", "pooled", "indices", "small-mask-odd",
    "llama-dropout",
)  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_view_gives_the_values_result(name: str, case: Any, kind: str) -> None:
    op = OPERATORS[name]
    lead = getattr(case, "lead", None)
    case = case if lead is None else replace(case, lead=tuple(min(n, 5) for n in lead))
    names = discovery.trainable(op, case)
    rows = getattr(op.workload, "ACTIVATIONS", ("x", "hidden", "base"))
    views = view(op.workload.make_inputs(case, torch.float32), KINDS[kind], rows)
    plain = view(views, [dense])
    backends = pk.explain(op.public, **views, **options(op, case)).rows
    for backend in [name for name, reasons in backends if not reasons]:
        if backend == "triton" and (kind == "strided" or case.name not in INTERPRETED):
            continue
        more = {**options(op, case), "backend": backend}
        want = discovery.run(op.public, plain, names, **more)
        got = discovery.run(op.public, views, names, **more)
        pairs = [*zip(want[0], got[0], strict=True)]
        pairs += [(w, g) for (_, w), (_, g) in zip(want[1], got[1], strict=True)]
        for i, (w, g) in enumerate(pairs):
            near = 1e-5 * max(1.0, w.abs().max().item() if w.numel() else 0.0)
            label = f"{backend} output {i}" if i < len(want[0]) else f"{backend} gradient {i}"
            torch.testing.assert_close(g, w, rtol=1e-4, atol=near, msg=discovery.labelled(label))


def test_a_generator_state_that_is_a_view_draws_its_masks() -> None:
    """Column of a table of states, or one number twice; bit for bit, on every backend."""
    table = torch.tensor([[11, 22], [7, 8]])
    ones, eye = torch.ones(16, 16), torch.eye(16)
    for rng in (table[:, 0], table[0, :1].expand(2), table.view(-1)[1:3]):
        for backend in ("torch", "native", "triton"):
            states = (rng, rng.clone(memory_format=torch.contiguous_format))
            a, b = (
                pk.gated_bottleneck(ones, eye, eye, dropout=0.5, rng=state, backend=backend)
                for state in states
            )
            assert torch.equal(a, b), backend
            a, b = (
                pk.lowrank_linear(ones, eye, [eye], dropout=0.5, rng=state, backend=backend)[0]
                for state in states
            )
            assert torch.equal(a, b), backend
