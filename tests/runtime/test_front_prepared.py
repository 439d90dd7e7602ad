"""Calls whose forward and node are compiled: they compute, keep and draw what Python's own way
does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_kernels import _build_info
from petal_kernels._runtime import front, philox
from tests.runtime.prepared_calls import (
    CALLS,
    OPS,
    Call,
    D,
    F,
    call_of,
    linear,
    run,
    same,
    trained_sets,
)

MODULE = front.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(_build_info.reason("front")))


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    made: Call = CALLS[request.param]()
    return made


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    for module in OPS.values():
        module._KNOWN.clear()
    yield
    front.native.cache_clear()


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on every call runs Python's own way."""

    def leave_out() -> None:
        front.native.cache_clear()
        monkeypatch.setattr(front, "load", lambda: None)

    return leave_out


def test_whatever_is_trained_gets_pythons_bits(call: Call, python: Callable[[], None]) -> None:
    ways = []
    for names in trained_sets(call):
        run(call, names)  # known by now
        ways.append((names, run(call, names)))
        assert call.short(), names
    python()
    for names, got in ways:
        same(got, run(call, names))


def test_without_gradients_too(call: Call, python: Callable[[], None]) -> None:
    def infer() -> list[Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            return [*call(), torch.get_rng_state()]

    ways = [infer(), infer()]
    python()
    want = infer()
    for got in ways:
        same(got, want)
        assert not any(y.requires_grad for y in got)


def test_it_keeps_what_python_keeps(call: Call, python: Callable[[], None]) -> None:
    """The same tensors, in the same order: a checkpoint counts them."""

    def kept(names: Sequence[str]) -> list[tuple[Any, ...]]:
        call.train(names)
        known = {each.data_ptr(): name for name, each in call.named().items()}
        found: list[tuple[Any, ...]] = []

        def pack(t: Tensor) -> Tensor:
            found.append((known.get(t.data_ptr(), "made"), tuple(t.shape), t.dtype))
            return t

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call()
        return found

    sets = trained_sets(call)
    for names in sets:
        kept(names)
    ways = [kept(names) for names in sets]
    python()
    assert ways == [kept(names) for names in sets]


def test_strange_strides(call: Call, python: Callable[[], None]) -> None:
    """Of x, of the weights and of what arrives in backward."""
    names = tuple(call.named())
    x = call.tensors["x"]
    wide = torch.zeros(*x.shape[:-1], 2 * D, dtype=x.dtype)
    call.tensors["x"] = wide[..., ::2].copy_(x)
    if "weights" in call.tensors:
        call.tensors["weights"] = [w.t().contiguous().t() for w in call.tensors["weights"]]

    def go() -> list[Tensor | None]:
        call.train(names)
        torch.manual_seed(3)
        ys = call()
        dys = [torch.ones((), dtype=y.dtype).expand_as(y) for y in ys]
        return list(torch.autograd.grad(ys, list(call.named().values()), dys))

    go()
    got = go()
    assert call.short()
    python()
    same(got, go())


def test_an_output_that_nobody_used(python: Callable[[], None]) -> None:
    call = linear((F, 8, 8))
    names = tuple(call.named())

    def go() -> list[Tensor | None]:
        call.train(names)
        torch.manual_seed(3)
        loss = call()[1].sum()
        return list(torch.autograd.grad(loss, list(call.named().values()), allow_unused=True))

    go()
    got = go()
    python()
    want = go()
    assert [g is None for g in got] == [w is None for w in want]
    same([g for g in got if g is not None], [w for w in want if w is not None])


def test_a_state_that_is_given() -> None:
    for name in OPS:
        call = call_of(name)
        call.settings["rng"] = torch.tensor([7, 9])
        names = tuple(call.named())
        run(call, names)
        got = run(call, names)
        assert call.short()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(front, "load", lambda: None)
            front.native.cache_clear()
            same(got, run(call, names))
        front.native.cache_clear()


def test_the_generator_is_torchs() -> None:
    assert MODULE is not None
    for seed in range(20):
        torch.manual_seed(seed)
        want = [torch.randint(0, 1 << 62, (2,)) for _ in range(3)], torch.get_rng_state()
        torch.manual_seed(seed)
        got = [MODULE.draw() for _ in range(3)], torch.get_rng_state()
        same([*got[0], got[1]], [*want[0], want[1]])
    torch.manual_seed(1)
    drawn = philox.draw(torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(drawn, MODULE.draw())
