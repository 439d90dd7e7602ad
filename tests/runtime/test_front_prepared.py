"""Calls whose forward and node are compiled: they compute, keep, draw and refuse what Python's own
way does, bit for bit, and hold nothing that it would not hold."""

from __future__ import annotations

import gc
import importlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import petal_kernels as pk
from petal_kernels import _build_info
from petal_kernels._runtime import front, philox
from petal_kernels.ops.frozen_norm import frozen_norm
from tests.runtime.test_front import Seeing

MODULE = front.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(_build_info.reason("front")))

# Every operator that has a compiled call: the module where its known calls lie.
OPS = {
    name: importlib.import_module(f"petal_kernels.ops.{name}.op")
    for name in ("gated_mlp", "lowrank_linear")
}

D, F, R = 24, 40, 5


class Call:
    """One call of an operator: its tensors by name, and what else it is given."""

    def __init__(self, op: str, tensors: dict[str, Any], **settings: Any) -> None:
        self.op, self.tensors, self.settings = op, tensors, settings

    def named(self) -> dict[str, Tensor]:
        """Every tensor that can be trained."""
        found: dict[str, Tensor] = {}
        for name, value in self.tensors.items():
            if name == "weights":
                continue
            for k, each in enumerate(value if isinstance(value, list) else [value]):
                if each is not None:
                    found[f"{name}[{k}]"] = each
        return found

    def __call__(self) -> tuple[Tensor, ...]:
        ys = getattr(pk, self.op)(**self.tensors, **self.settings)
        return ys if isinstance(ys, tuple) else (ys,)

    def train(self, names: Sequence[str]) -> None:
        for name, each in self.named().items():
            each.requires_grad_(name in names)

    def short(self) -> bool:
        """Whether the newest known call is a compiled one."""
        *_, found = OPS[self.op]._KNOWN.values()
        return found.short is not None


def _drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def linear(
    outs: Sequence[int] = (F,),
    *,
    own: bool = True,
    lead: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
    biases: bool = True,
    weights: bool = True,
    **settings: Any,
) -> Call:
    torch.manual_seed(1)
    ranks = [R + k if own else R for k in range(len(outs))]
    downs = [_drawn(r, D) for r in ranks]
    tensors: dict[str, Any] = {"x": _drawn(*lead, D, dtype=dtype)}
    tensors["down"] = downs if own else downs[0]
    tensors["ups"] = [_drawn(o, r) for o, r in zip(outs, ranks, strict=True)]
    if weights:
        tensors["weights"] = [_drawn(o, D, dtype=dtype) for o in outs]
        if biases:
            tensors["biases"] = [
                _drawn(o, dtype=dtype) if k != 1 else None for k, o in enumerate(outs)
            ]
    settings = {"dropout": 0.25, "dropout_at": "input"} | settings
    scale = [0.5 + k for k in range(len(outs))]
    return Call("lowrank_linear", tensors, scale=scale, **settings)


def mlp(
    linears: int = 3,
    *,
    lead: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Call:
    torch.manual_seed(2)
    sizes = [(D, F)] * (linears - 1) + [(F, D + 1)]
    tensors: dict[str, Any] = {
        "x": _drawn(*lead, D, dtype=dtype),
        "weights": [_drawn(o, i, dtype=dtype) / i**0.5 for i, o in sizes],
        "biases": [_drawn(o, dtype=dtype) if k != 1 else None for k, (_, o) in enumerate(sizes)],
        "downs": [_drawn(R + k, i) for k, (i, _) in enumerate(sizes)],
        "ups": [_drawn(o, R + k) for k, (_, o) in enumerate(sizes)],
    }
    scale = [0.5 + k for k in range(linears)]
    return Call("gated_mlp", tensors, scale=scale, **({"dropout": 0.25} | settings))


CALLS: dict[str, Callable[[], Call]] = {
    "linear": linear,
    "linear, no dropout": lambda: linear(dropout=0.0),
    "linear, evaluated": lambda: linear(training=False),
    "linear, bf16": lambda: linear(dtype=torch.bfloat16),
    "linear, fp16": lambda: linear(dtype=torch.float16),
    "linear, one row": lambda: linear(lead=()),
    "linear, a matrix": lambda: linear(lead=(7,)),
    "linear, no bias": lambda: linear(biases=False),
    "update alone": lambda: linear(weights=False),
    "linears, own downs": lambda: linear((F, 8, 8)),
    "linears, own downs, no dropout": lambda: linear((F, 8, 8), dropout=0.0),
    "linears, one down": lambda: linear((F, 8, 8), own=False, dropout_at="bottleneck"),
    "linears, one down, bf16": lambda: linear((F, 8), own=False, dtype=torch.bfloat16),
    "linears, extended": lambda: linear((F, 8), dropout=0.0, plan="extend"),
    "gated MLP": mlp,
    "gated MLP, no dropout": lambda: mlp(dropout=0.0),
    "gated MLP, bf16": lambda: mlp(dtype=torch.bfloat16, activation="gelu_tanh"),
    "MLP": lambda: mlp(2, activation="relu"),
    "MLP, a matrix": lambda: mlp(2, lead=(5,), activation="gelu"),
}


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


def trained_sets(call: Call) -> list[tuple[str, ...]]:
    """Everything, each tensor alone, and everything but x."""
    names = tuple(call.named())
    return [names, *((name,) for name in names), names[1:]]


def run(call: Call, names: Sequence[str], weight: float = 1.0) -> list[Tensor | None]:
    """Outputs, gradients and the state that the generator is left in."""
    call.train(names)
    torch.manual_seed(3)
    ys = call()
    inputs = [each for name, each in call.named().items() if name in names]
    torch.manual_seed(4)
    dys = [torch.randn(y.shape).to(y.dtype) * weight for y in ys]
    grads = torch.autograd.grad(ys, inputs, dys)
    return [*(y.detach() for y in ys), *grads, torch.get_rng_state()]


def same(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()


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


def test_a_state_that_is_given(python: Callable[[], None]) -> None:
    for make in (linear, mlp):
        call = make(rng=torch.tensor([7, 9]))
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


def _both(name: str) -> Call:
    return {"lowrank_linear": linear, "gated_mlp": mlp}[name]()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_masks(name: str, reentrant: bool) -> None:
    call = _both(name)
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
    call = _both(name)
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
        call = _both(name)
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
    call = _both(name)
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
    call = _both(name)
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


def test_what_can_be_formed_again_is_not_kept() -> None:
    """An x that its node offers to form again goes Python's way, which knows how."""
    call = linear()
    call.train(("down[0]", "ups[0]"))
    call()
    assert call.short()
    x = torch.randn(2, 3, D, requires_grad=True)
    call.tensors["x"] = frozen_norm(x, torch.ones(D), recompute=True)
    for _ in range(2):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t
        ):
            (y,) = call()
        assert call.tensors["x"].data_ptr() not in kept
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", OPS)
def test_it_holds_no_tensor_and_nothing_twice(name: str) -> None:
    call = _both(name)
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
    calls = [_both(name) for _ in range(4)]
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
    for call in (large, empty, stacked, based, with_core, recomputed, half, torchs, double):
        call.train(("x[0]",))
        call()[0].sum().backward()
        assert not call.short()


@pytest.mark.parametrize("name", OPS)
def test_a_prepared_call_takes_its_tensors_by_position(name: str) -> None:
    call = _both(name)
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
