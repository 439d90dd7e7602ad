"""Calls that pass by checks and the dispatcher: only where their like was checked, and where nobody
would have seen them pass; with the same bits as by the whole way."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import petal_kernels as pk
from petal_kernels import _build_info
from petal_kernels._runtime import device, front, rows
from petal_kernels.ops.lowrank_linear import op as lowrank
from tests.ops import discovery
from tests.ops.discovery import OPERATORS, SMALL
from tests.ops.record_backends import record_backends

MODULE = front.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(_build_info.reason("front")))


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


X = torch.ones(3, 4)

# Calls that differ in one thing each: no two have one signature.
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "rows": (X, torch.ones(2, 4)),
    "width": (X, torch.ones(3, 5)),
    "dimensions": (X, torch.ones(3, 4, 1)),
    "sizes of one product": (torch.ones(2, 6), torch.ones(3, 4).view(2, 6).t()),
    "strides": (torch.ones(4, 4), torch.ones(4, 4).t()),
    "a broadcast row": (X, torch.ones(4).expand(3, 4)),
    "dtype": (X, X.double()),
    "dtype of one size": (X.half(), X.bfloat16()),
    "trained": (X, torch.ones(3, 4, requires_grad=True)),
    "none": (X, None),
    "a list": ([X], X),
    "a longer list": ([X], [X, X]),
    "where a list ends": ([[X], X], [[X, X]]),
    "an entry of a list": ([X, None], [None, X]),
    "number": (1.0, 2.0),
    "an int and a float": (1, 1.0),
    "a bool and an int": (True, 1),
    "bools": (True, False),
    "ints": (1, 2),
    "zeros": (0.0, -0.0),
    "words": ("auto", "torch"),
    "where a word ends": (("ab", "c"), ("a", "bc")),
    "a dtype": (torch.float32, torch.float16),
    "a tuple and a list": ((X,), [X]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_have_different_signatures(name: str) -> None:
    one, other = (front.signature((each,)) for each in DIFFERENT[name])
    assert one is not None
    assert other is not None
    assert one != other


def test_values_and_addresses_are_not_looked_at() -> None:
    once = front.signature((torch.ones(3, 4), [torch.zeros(2)], 1.0, "auto"))
    assert once == front.signature((torch.zeros(3, 4), [torch.ones(2)], 1.0, "auto"))


def _grad_off() -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("inside", [_grad_off, torch.inference_mode, _deterministic])
def test_modes_that_only_decide_are_in_the_signature(
    inside: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    outside = front.signature((X,))
    with inside():
        within = front.signature((X,))
    assert within is not None
    assert within != outside


def test_a_tensor_of_inference_mode_is_another() -> None:
    with torch.inference_mode():
        of_inference = torch.ones(3, 4)
    assert front.signature((of_inference,)) not in (None, front.signature((X,)))


class Own(Tensor):
    """A class of its own, which sees every operation."""


class Seeing(TorchDispatchMode):
    """Lists the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Another kind of mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


WATCHING: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "dispatch mode": Seeing,
    "function mode": Calls,
    "device": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": lambda: torch.profiler.profile(),
    "below autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_watched_call_has_no_signature(name: str) -> None:
    with WATCHING[name]():
        assert front.signature((X,)) is None
    assert front.signature((X,)) is not None


UNKNOWN: dict[str, Any] = {
    "a class of its own": torch.ones(2).as_subclass(Own),
    "no values": torch.ones(2, device="meta"),
    "sparse": torch.eye(2).to_sparse(),
    "complex, to be conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
    "a number beyond 64 bits": 1 << 64,
    "a word that is no text": "\ud800",
    "a set": {1},
    "a function": len,
    "a class of numbers": type("Kind", (float,), {})(1.0),
    "a list's own class": type("Kind", (list,), {})([1]),
    "more than a signature holds": ["word"] * 2000,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_by_value_has_no_signature(name: str) -> None:
    assert front.signature((UNKNOWN[name],)) is None
    assert front.signature(([UNKNOWN[name]],)) is None


def test_tensors_of_transforms_have_no_signature() -> None:
    found: list[Any] = []

    def look(t: Tensor) -> Tensor:
        found.append(front.signature((t,)))
        found.append(front.signature((X,)))
        return t.sum()

    torch.func.vmap(look)(X)
    torch.func.grad(look)(X)
    torch.func.jvp(look, (X,), (X,))
    with forward_ad.dual_level():
        found.append(front.signature((forward_ad.make_dual(X, X),)))
    assert found == [None] * 7


def test_traced_calls_have_no_signature() -> None:
    found: list[Any] = []

    def look(t: Tensor) -> Tensor:
        found.append(front.signature((t,)))
        return t + 1

    torch.jit.trace(look, X, check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(look)(X)
    assert found == [None] * 2


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_MOST", 3)
    known: front.Known[int] = front.Known()
    assert known.keep(None, 7) == 7
    assert not known
    for i in range(10):
        assert known.keep(bytes([i]), i) == i
        assert 0 < len(known) <= 3
        assert known[bytes([i])] == i


# -- the same calls, both ways --------------------------------------------------------------------


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
        keywords = {"dropout": 0.5, "dropout_at": "input"} | options
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
    assert plans[0] == plans[2]


def test_scalars_of_a_known_call_are_its_own() -> None:
    call = Shapes()
    plain = call(dropout=0.0)
    for scale, p in [(1.0, 0.5), (3.0, 0.5), (3.0, 0.25), (1.0, 0.0), (3.0, 0.0)]:
        got = [call(scale=scale, dropout=p) for _ in range(3)]
        want = call(scale=scale, dropout=p, backend="torch")
        assert torch.equal(got[0], got[2])
        torch.testing.assert_close(got[1], want)
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


# -- what the module calls ------------------------------------------------------------------------


def _op(name: str) -> Any:
    assert MODULE is not None
    device.load_cpu_library()
    return MODULE.Op(name)


def test_an_operator_takes_what_its_schema_says() -> None:
    run = _op("petal_native::gated_mlp_act_fwd")
    g, p = torch.randn(2, 8), torch.empty(2, 8)
    assert run(g, None, 0, p) is None
    other = torch.empty(2, 8)
    torch.ops.petal_native.gated_mlp_act_fwd(g, None, 0, other)
    assert torch.equal(p, other)
    with pytest.raises(TypeError, match="want 4 arguments by position, got 3"):
        run(g, None, 0)
    with pytest.raises(TypeError, match="want 4 arguments by position"):
        run(g, None, 0, p=p)
    with pytest.raises(TypeError, match="want a Tensor, got list"):
        run([g], None, 0, p)
    with pytest.raises(TypeError):
        run(g, None, "silu", p)
    with pytest.raises(RuntimeError, match="want a matrix"):
        run(g[0], None, 0, p[0])


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        ({9: [1.0, None]}, "must be real number"),
        ({1: None}, "want a list"),
        ({1: [None]}, "want a Tensor, got NoneType"),
        ({5: [1.0]}, "want a Tensor, got float"),
        ({11: 1.5}, "cannot be interpreted as an integer"),
    ],
)
def test_an_argument_of_another_kind_is_refused(spoilt: dict[int, Any], why: str) -> None:
    x, a, b, y, h = (torch.ones(s) for s in ((2, 4), (1, 4), (3, 1), (2, 3), (2, 1)))
    given = [x, [a], None, [b], [], [None], [], None, None, [1.0], 0.0, 0, [y], h]
    run = _op("petal_native::lowrank_linear_fwd")
    run(*given)
    assert torch.equal(y, torch.full((2, 3), 4.0))
    for at, value in spoilt.items():
        given[at] = value
    with pytest.raises(TypeError, match=why):
        run(*given)


def test_operators_that_it_cannot_call_are_told() -> None:
    with pytest.raises(RuntimeError, match="no argument of type str can be passed"):
        _op("petal_native::cpu_isa")
    with pytest.raises(RuntimeError, match="Could not find schema"):
        _op("petal_native::nothing")


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


def test_another_torch_does_not_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _build_info.front(torch.__version__) is MODULE
    assert _build_info.front("2.11.0") is None

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_build_info, "import_module", missing)
    assert _build_info.front(torch.__version__) is None


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
