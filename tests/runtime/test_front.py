"""What decides about a call, and who watches it; operators called without torch's own parsing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from petal_kernels import _build_info
from petal_kernels._runtime import device, front

MODULE = front.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(_build_info.reason("front")))


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
    "where a word ends": (("asb", "c"), ("a", "bsc")),
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
    for i in range(10):
        assert known.keep(bytes([i]), i) == i
        assert 0 < len(known) <= 3
        assert known[bytes([i])] == i


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


def test_another_torch_does_not_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _build_info.front(torch.__version__) is MODULE
    assert _build_info.front("2.11.0") is None

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_build_info, "import_module", missing)
    assert _build_info.front(torch.__version__) is None
