"""Nodes of compiled calls in autograd's graph: what they refuse and hold, and who sees them."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from petal_kernels import _build_info
from petal_kernels._runtime import front
from petal_kernels.ops.frozen_norm import frozen_norm
from tests.runtime.prepared_calls import OPS, Call, D, F, R, call_of, linear, mlp, run, same
from tests.runtime.test_front import Seeing

MODULE = front.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(_build_info.reason("front")))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    for module in OPS.values():
        module._KNOWN.clear()
    yield
    front.native.cache_clear()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_masks(name: str, reentrant: bool) -> None:
    call = call_of(name)
    names = tuple(call.named())
    want = run(call, names)
    call.train(names)
    torch.manual_seed(3)
    x = call.tensors["x"]

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        call.tensors["x"] = x
        return call()

    ys = checkpoint(forward, x, use_reentrant=reentrant)
    call.tensors["x"] = x
    torch.manual_seed(4)
    torch.autograd.backward(ys, [torch.randn(y.shape) for y in ys])
    same([*ys, *(each.grad for each in call.named().values())], want[:-1])


@pytest.mark.parametrize("name", OPS)
def test_backward_runs_once_unless_it_is_retained(name: str) -> None:
    call = call_of(name)
    call.train(tuple(call.named()))
    for _ in range(2):
        (y,) = call()
    first, second = (
        torch.autograd.grad(y.sum(), call.tensors["x"], retain_graph=again)[0]
        for again in (True, False)
    )
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), call.tensors["x"])


@pytest.mark.parametrize("name", OPS)
def test_what_was_written_since_is_refused(name: str) -> None:
    for which in ("x", "ups"):
        call = call_of(name)
        call.train(tuple(call.named()))
        for _ in range(2):
            (y,) = call()
        t = call.tensors[which]
        with torch.no_grad():
            (t[0] if isinstance(t, list) else t).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_other_derivatives_are_refused_by_name(name: str) -> None:
    call = call_of(name)
    call.train(tuple(call.named()))
    for _ in range(2):
        (y,) = call()
    x = call.tensors["x"]
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: .*second derivative"):
        first.sum().backward()
    (y,) = call()
    with pytest.raises(NotImplementedError, match=f"{name}: .*batch of gradients"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("name", OPS)
def test_who_watches_a_backward_sees_it_and_the_same_values(name: str) -> None:
    call = call_of(name)
    names = tuple(call.named())
    run(call, names)
    want = run(call, names)
    torch.manual_seed(3)
    ys = call()
    torch.manual_seed(4)
    dys = [torch.randn(y.shape) for y in ys]
    with Seeing() as mode:
        got = torch.autograd.grad(ys, list(call.named().values()), dys, retain_graph=True)
    assert any(f"{name}" in seen and "_bwd" in seen for seen in mode.seen)
    with torch.profiler.profile() as profile:
        again = torch.autograd.grad(ys, list(call.named().values()), dys)
    events = {event.key for event in profile.key_averages()}
    assert any("lowrank_linear_bwd" in event for event in events)
    same(got, want[len(ys) : -1])
    same(again, want[len(ys) : -1])


def _noted(kept: list[int], t: Tensor) -> Tensor:
    kept.append(t.data_ptr())
    return t


def test_what_can_be_formed_again_is_not_kept() -> None:
    """An x that its node offers to form again goes Python's way, which knows how."""
    call = linear()
    call.train(("down[0]", "ups[0]"))
    call()
    assert call.short()
    x = torch.randn(2, 3, D, requires_grad=True)
    call.tensors["x"] = frozen_norm(x, torch.ones(D), recompute=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _noted(kept, t), lambda t: t):
        for _ in range(2):
            (y,) = call()
    assert call.tensors["x"].data_ptr() not in kept
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", OPS)
def test_it_holds_no_tensor_and_nothing_twice(name: str) -> None:
    call = call_of(name)
    call.train(tuple(call.named()))
    for _ in range(2):
        ys = call()
    node = ys[0].grad_fn
    assert node is not None
    OPS[name]._KNOWN.clear()  # the graph holds what it needs
    sum(y.sum() for y in ys).backward()  # type: ignore[union-attr]
    held = [weakref.ref(t) for t in (*call.named().values(), *ys)]
    del ys, node, call
    gc.collect()
    assert not [reference for reference in held if reference() is not None]


@pytest.mark.parametrize("name", OPS)
def test_threads(name: str) -> None:
    """Four train at once, each on its own tensors, on one known call; a library's product may be
    rounded otherwise in another thread."""
    calls = [call_of(name) for _ in range(4)]
    names = tuple(calls[0].named())
    wrong: list[str] = []

    def train(call: Call) -> list[Tensor]:
        call.train(names)
        ys = call()
        inputs = list(call.named().values())
        return [*ys, *torch.autograd.grad(ys, inputs, [torch.ones_like(y) for y in ys])]

    def work(call: Call) -> None:
        for _ in range(30):
            for a, b in zip(train(call), want, strict=True):
                if (a - b).abs().max() > 1e-5 * b.abs().max():
                    wrong.append(f"{list(b.shape)}: {(a - b).abs().max()}")

    for call in calls:
        call.settings |= {"rng": torch.tensor([5, 6])}
    want = train(calls[0])
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_calls_that_it_does_not_know_go_the_whole_way() -> None:
    large = linear(lead=(30000,))
    empty = linear(lead=(0,))
    stacked = linear((F, F), own=False)
    stacked.tensors["ups"] = torch.stack(stacked.tensors["ups"])
    based = linear(weights=False)
    based.tensors["base"] = [torch.randn(2, 3, F)]
    with_core = linear((F, F), own=False, dropout_at="mode")
    with_core.tensors["core"] = torch.randn(2, R, R)
    hidden = linear()
    hidden.tensors |= {"down": None, "hidden": torch.randn(2, 3, R)}
    hidden.settings |= {"dropout_at": "bottleneck"}
    recomputed = mlp(recompute=True)
    half = mlp()
    half.tensors["downs"][1] = half.tensors["ups"][1] = None
    torchs = linear(backend="torch")
    double = linear()
    for name, value in double.tensors.items():
        double.tensors[name] = (
            [v if v is None else v.double() for v in value]
            if isinstance(value, list)
            else value.double()
        )
    for call in (large, empty, stacked, based, with_core, hidden, recomputed, half, torchs, double):
        call.train(("x[0]",))
        call()[0].sum().backward()
        assert not call.short()


@pytest.mark.parametrize("name", OPS)
def test_a_prepared_call_takes_its_tensors_by_position(name: str) -> None:
    call = call_of(name)
    call()
    (found,) = OPS[name]._KNOWN.values()
    with pytest.raises(TypeError, match=f"{name}: want 6 arguments by position, got 1"):
        found.short(call.tensors["x"])
    with pytest.raises(TypeError, match="by position"):
        found.short(*[None] * 5, rng=None)
    with pytest.raises(TypeError, match="want a Tensor, got"):
        found.short(*[None] * 6)
    with pytest.raises(TypeError):
        type(found.short)()
    assert MODULE is not None
    with pytest.raises(TypeError, match="want"):
        getattr(MODULE, name)()
    with pytest.raises(TypeError, match="want six settings"):
        getattr(MODULE, name)(*itertools.repeat((), {"lowrank_linear": 6, "gated_mlp": 5}[name]))
