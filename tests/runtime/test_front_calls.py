"""Calls that pass by checks and the dispatcher: only where their like was checked, and where nobody
would have seen them pass; with the same bits as by the whole way."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petal_kernels as pk
from petal_kernels import _build_info
from petal_kernels._runtime import device, front, rows
from petal_kernels.ops.lowrank_linear import op as lowrank
from tests.ops import discovery
from tests.ops.discovery import OPERATORS, SMALL
from tests.ops.record_backends import record_backends
from tests.runtime.test_front import Seeing

pytestmark = pytest.mark.skipif(front.load() is None, reason=str(_build_info.reason("front")))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on every call runs the whole way."""

    def leave_out() -> None:
        front.native.cache_clear()
        monkeypatch.setattr(front, "load", lambda: None)

    return leave_out


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    front.native.cache_clear()


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_both_ways_give_the_same_bits(name: str, case: Any, without: Callable[[], None]) -> None:
    op = OPERATORS[name]
    names = discovery.trainable(op, case)
    inputs = op.workload.make_inputs(case, torch.float32)

    def run(chosen: tuple[str, ...]) -> tuple[Any, Any]:
        torch.manual_seed(3)
        return discovery.run(op.public, inputs, chosen, **discovery.options(op, case))

    ways = [(names, run(names)), (names, run(names)), ((), run(())), ((), run(()))]
    without()
    for chosen, (outs, grads) in ways:
        want_outs, want_grads = run(chosen)
        for a, b in zip(want_outs, outs, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        for (label, a), (_, b) in zip(want_grads, grads, strict=True):
            assert torch.equal(a, b), label


class Shapes:
    """Calls of one adapted linear that differ in what decides."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.w = torch.randn(4, 64), torch.randn(32, 64)
        self.down, self.up = torch.randn(8, 64), torch.randn(32, 8)

    def __call__(self, x: Tensor | None = None, **options: Any) -> Tensor:
        given = self.x if x is None else x
        keywords: dict[str, Any] = {"dropout": 0.5, "dropout_at": "input"} | options
        torch.manual_seed(1)
        y: Tensor
        (y,) = pk.lowrank_linear(given, self.down, [self.up], [self.w], **keywords)
        return y


def test_the_backend_in_force_decides_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was chosen before is none that a call must take."""
    call = Shapes()
    with record_backends() as used:
        for _ in range(2):
            call()
            with pk.use_backend("torch"):
                call()
            monkeypatch.setenv("PETAL_BACKEND", "torch")
            call()
            monkeypatch.delenv("PETAL_BACKEND")
            call(backend="torch")
    assert [each.backend for each in used] == ["native", "torch", "torch", "torch"] * 2


def test_a_call_for_inference_is_another_than_one_that_keeps() -> None:
    """`merge` is only ever a plan of the first."""
    call = Shapes()
    x = torch.randn(4096, 64)
    with record_backends() as used:
        for _ in range(2):
            call(x, dropout=0.0)
            call(x.requires_grad_(), dropout=0.0)
            with torch.no_grad():
                call(x, dropout=0.0)
            x = x.detach()
    plans = [each.plan for each in used]
    assert plans[:3] == plans[3:]
    assert plans[0] == plans[2] == "merge"
    assert plans[1] != "merge"


def test_scalars_of_a_known_call_are_its_own() -> None:
    call = Shapes()
    plain = call(dropout=0.0)
    for scale, p in [(1.0, 0.5), (3.0, 0.5), (3.0, 0.25), (1.0, 0.0), (3.0, 0.0)]:
        got = [call(scale=scale, dropout=p) for _ in range(3)]
        want = call(scale=scale, dropout=p, backend="torch")
        assert torch.equal(got[0], got[2])
        torch.testing.assert_close(got[1], want, rtol=1e-4, atol=1e-4)  # values up to 10
        assert (scale == 1.0 and p == 0.0) == torch.equal(got[0], plain)


def test_a_wrong_call_after_a_right_one_is_refused() -> None:
    call = Shapes()
    for _ in range(2):
        call()
    with pytest.raises(ValueError, match=r"^down: want shape"):
        call(torch.randn(4, 63))
    with pytest.raises(TypeError, match=r"^weights\[0\]: want dtype"):
        call(call.x.half())
    with pytest.raises(TypeError, match=r"^training: want a bool"):
        call(training=1)
    call.w.requires_grad_()
    with pytest.raises(ValueError, match=r"^weights\[0\]: want a frozen weight"):
        call()
    with torch.no_grad():
        call()
    with pytest.raises(ValueError, match=r"^weights\[0\]: want a frozen weight"):
        call()


def test_what_watches_sees_a_known_call() -> None:
    call = Shapes()
    x = call.x.clone().requires_grad_()
    for _ in range(2):
        call(x).sum().backward()
    with Seeing() as mode:
        call(x).sum().backward()
    assert "petal.lowrank_linear_fwd.default" in mode.seen
    assert "petal.lowrank_linear_bwd.default" in mode.seen
    with torch.profiler.profile() as profile:
        call(x).sum().backward()
    events = {event.key for event in profile.key_averages()}
    assert {"petal::lowrank_linear_fwd", "petal::lowrank_linear_bwd"} <= events


def test_a_mode_that_opens_before_backward_sees_it() -> None:
    call = Shapes()
    x = call.x.clone().requires_grad_()
    for _ in range(2):
        call(x).sum().backward()
    loss = call(x).sum()
    with Seeing() as mode:
        loss.backward()
    assert "petal.lowrank_linear_bwd.default" in mode.seen


def test_second_derivatives_of_a_known_call_are_refused() -> None:
    call = Shapes()
    x = call.x.clone().requires_grad_()
    for _ in range(2):
        call(x).sum().backward()
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda t: call(t))(x.detach().expand(2, 4, 64))
    with pytest.raises(NotImplementedError, match="batch of gradients"):
        torch.autograd.grad(call(x), x, torch.ones(2, 4, 32), is_grads_batched=True)


def test_a_saved_tensor_that_was_written_to_is_refused() -> None:
    call = Shapes()
    call.up.requires_grad_()
    call.down.requires_grad_()
    for _ in range(3):
        y = call()
        with torch.no_grad():
            call.down.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_what_is_known_holds_no_tensor() -> None:
    for op, case in discovery.cases():
        if case is not discovery.small(op)[0]:
            continue
        inputs = op.workload.make_inputs(case, torch.float32)
        discovery.run(op.public, inputs, discovery.trainable(op, case))
        held = [weakref.ref(t) for _, t in discovery.leaves(inputs, tuple(inputs))]
        del inputs
        gc.collect()
        assert not [reference for reference in held if reference() is not None], op.name


def test_threads_share_what_is_known() -> None:
    lowrank._KNOWN.clear()
    call = Shapes()
    want = {n: call(torch.ones(n, 64), dropout=0.0) for n in range(1, 9)}
    lowrank._KNOWN.clear()
    wrong: list[int] = []

    def work() -> None:
        for n in [*want] * 20:
            (y,) = pk.lowrank_linear(torch.ones(n, 64), call.down, [call.up], [call.w])
            if not torch.equal(y, want[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_code_goes_the_whole_way() -> None:
    call = Shapes()
    want = call(dropout=0.0)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def run(x: Tensor) -> Tensor:
        (y,) = pk.lowrank_linear(x, call.down, [call.up], [call.w])
        return y

    got = torch.compile(run, backend=backend, fullgraph=True)(call.x)
    assert torch.equal(got, want)
    assert "petal.lowrank_linear_fwd.default" in seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 5, 20000])
def test_products_are_the_librarys(n: int, dtype: torch.dtype, without: Callable[[], None]) -> None:
    """In memory of any size, of matrices in any order."""
    weights = [torch.randn(64, 16, dtype=dtype), torch.randn(16, 96, dtype=dtype).t()]
    x = torch.randn(n, 16, dtype=dtype)
    ys = rows.linears(x, weights)
    dx = rows.sum_of_products(ys, weights)
    without()
    device.load_cpu_library()
    for got, want in zip(ys, rows.linears(x, weights), strict=True):
        assert torch.equal(got, want)
        assert got.is_contiguous()
    assert torch.equal(dx, rows.sum_of_products(ys, weights))


def test_a_module_without_it_computes_the_same(without: Callable[[], None]) -> None:
    layer = pk.nn.LoRALinear(nn.Linear(64, 32).requires_grad_(False), 4, init=False, dropout=0.3)

    def run() -> list[Tensor]:
        layer.zero_grad()
        torch.manual_seed(5)
        y = layer(torch.ones(3, 64))
        y.square().sum().backward()
        return [y, *(p.grad for p in layer.parameters() if p.grad is not None)]

    ways = [run(), run()]
    without()
    want = run()
    for got in ways:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
