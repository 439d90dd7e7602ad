"""Answers that were not computed: a form is timed on inputs that it has not seen, and looked at
after the clock.

Kind: an operator that replays an answer once it is being timed, and is as fast as nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from petal_kernels.tools.bench import app, ceilings, layer, measure, model, op, timing
from petal_kernels.tools.bench.ceilings import Ceilings
from petal_kernels.tools.bench.fresh import Fresh, replays
from petal_kernels.tools.bench.request import Request
from petal_kernels.tools.bench.scenarios import Inputs, Provider, Scenario, step
from petal_kernels.tools.bench.timing import Step

MODES = ("forward", "train", "backward", "full")
FAR = Ceilings(1e6, 1e9)
Forward = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def threads() -> object:
    """One here; the command sets torch's thread count for good."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Replay:
    """Squares honestly `honest` times, and then gives its last answer for what `key` says is
    known."""

    def __init__(self, key: Callable[[Tensor], Any], honest: int = 6) -> None:
        self.key, self.honest, self.computed = key, honest, 0
        self.known: dict[Any, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        known = self.known.get(self.key(x))
        if known is not None and self.computed >= self.honest:
            return known if known.requires_grad == torch.is_grad_enabled() else known.detach()
        self.computed += 1
        out = x.square()
        self.known[self.key(x)] = out
        return out


def scenario(forward: Forward) -> Scenario:
    g = torch.Generator().manual_seed(0)
    x, dout = torch.randn(101, 4, generator=g).requires_grad_(), torch.randn(101, 4, generator=g)
    inputs = Inputs({"x": x}, ("x",), [dout])
    fresh = Fresh([x, dout])
    oracle = op.Oracle(
        lambda: op.run(torch.square, inputs.map(Tensor.double)),
        lambda: op.run(torch.square, inputs),
        fresh=fresh,
    )

    def check(f: Forward) -> Any:
        return oracle(lambda g: op.run(f, inputs, gradients=g))

    providers = {
        label: Provider(f, check=check(f), ours=ours)
        for label, f, ours in (("published", torch.square, False), ("petal", forward, True))
    }
    return Scenario("s", inputs, providers, ["op", "x", "--shape", "s"], fresh=fresh)


def _table(forward: Forward, mode: str) -> Any:
    request = Request(modes=(mode,), rounds=4)
    (table,) = measure.measure(scenario(forward), request, FAR, lambda *_: None)
    return table


@pytest.mark.parametrize("mode", MODES)
def test_an_honest_form_passes(mode: str) -> None:
    table = _table(lambda x: x.square(), mode)
    assert not any(row.red for row in table.rows.values())
    assert table.notes == []


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize(
    "key",
    [lambda x: x.shape, lambda x: x.data_ptr(), id, lambda x: 0],
    ids=["shape", "address", "object", "first"],
)
def test_a_form_that_replays_is_found(key: Any, mode: str) -> None:
    table = _table(Replay(key), mode)
    row = table.rows["petal"]
    assert row.verdict == "WRONG"
    assert row.speedup is None
    assert row.failed
    assert not table.rows["published"].red


def test_a_form_that_replays_its_gradient_is_found() -> None:
    known: list[Tensor] = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            known.append(2 * dy * ctx.saved_tensors[0])
            return known[0]

    for mode in ("backward", "full"):
        known.clear()
        row = _table(Square.apply, mode).rows["petal"]
        assert row.verdict == "WRONG", mode
        assert row.errors.outputs <= 2.0 or row.errors.outputs == float("inf")


@pytest.mark.parametrize(
    "key",
    [lambda x: (x.data_ptr(), x._version), lambda x: float(x.detach().double().sum()),
     lambda x: tuple(x.detach().flatten().tolist())],
    ids=["version", "sum", "contents"],
)  # fmt: skip
def test_what_keeps_answers_by_their_contents_computes_in_the_clock(
    key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it knows: no timed call repeats an input, so that nothing can be looked up (or, by
    the sum, the wrong answer is)."""
    form = Replay(key, honest=0)
    clock = timing.Clock
    computed: list[int] = []

    class Watching(clock):  # type: ignore[valid-type, misc]
        def __call__(self, step: Step) -> float:
            before = form.computed
            seconds = super().__call__(step)
            computed.append(form.computed - before)
            return float(seconds)

    monkeypatch.setattr(timing, "Clock", Watching)
    row = _table(form, "forward").rows["petal"]
    if row.verdict != "WRONG":
        assert sum(computed) == 4  # as many as rounds


@pytest.mark.parametrize(
    "form", [lambda x: x * 0 + 1, lambda x: x.clone(), lambda x: x.square() * 1.01]
)
def test_another_function_is_found_as_before(form: Forward) -> None:
    assert _table(form, "full").rows["petal"].verdict == "WRONG"


def test_values_come_back() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(5, 3, generator=g),
        torch.randn(2, 3, 4, generator=g).requires_grad_(),
        torch.randn(7, generator=g),
        torch.randn(1, 6, generator=g),
        torch.randn(6, 5, generator=g).t(),
        torch.randint(0, 9, (3, 4), generator=g),
    ]
    tensors[5][:] = torch.arange(12).view(3, 4)
    before = [t.detach().clone() for t in tensors]
    fresh = Fresh(tensors)
    for turn in (1, 2, 5):
        fresh.go_to(turn)
        assert fresh.turn == turn
        for t, b in zip(tensors, before, strict=True):
            if turn < 3:
                assert not torch.equal(t, b)
            assert torch.equal(t.detach().flatten().sort()[0], b.flatten().sort()[0])
    rows = {tuple(row) for row in before[0].tolist()}
    assert {tuple(row) for row in tensors[0].tolist()} == rows  # a row stays whole
    fresh.go_to(0)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_an_answer_is_looked_at_twice() -> None:
    x = torch.arange(4.0)
    fresh = Fresh([x])
    assert not replays(Step(lambda _: [x.square(), None]), fresh)
    assert not replays(Step(lambda _: x.square()), fresh)
    assert replays(Step(lambda _: [torch.ones(3)]), fresh)
    assert not replays(Step(lambda _: [torch.ones(3), x + 1]), fresh)
    assert not replays(Step(lambda _: None), fresh)  # nothing to look at


@pytest.mark.parametrize(
    "make",
    [
        lambda r: op.scenarios(op.names(), r),
        lambda r: layer.scenarios(layer.names(), r),
        pytest.param(lambda r: model.scenarios(model.names(), r), marks=pytest.mark.slow),
    ],
    ids=["op", "layer", "model"],
)
def test_every_scenario_has_inputs_that_change_its_answers(make: Any) -> None:
    """Of every operator, layer and model: no honest form is taken for one that replays."""
    request = Request(quick=True, against=("eager", "base"))
    seen = set()
    for build in make(request):
        made = build()
        if made.name.split()[0] in seen:
            continue
        seen.add(made.name.split()[0])
        for label, provider in made.providers.items():
            for mode in ("forward", "full"):
                timed = step(provider, mode, made.inputs)
                assert not replays(timed, made.fresh), (made.name, label, mode)
            if provider.check is not None:
                assert not provider.check().wrong, (made.name, label)


def test_the_command_refuses_a_replay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from petal_kernels.ops.mode_contract import native_impl, torch_impl

    for module in (native_impl, torch_impl):
        forward = module.forward
        answers: list[Any] = []

        def replay(*args: Any, forward: Any = forward, answers: list[Any] = answers) -> Any:
            if len(answers) < 8:
                answers.append(forward(*args))
                return answers[-1]
            return answers[0]

        monkeypatch.setattr(module, "forward", replay)
    monkeypatch.setattr(ceilings, "measure", lambda *_: FAR)
    words = ["op", "mode_contract", "--quick", "--no-gate", "--rounds", "4", "--threads", "1"]
    words += ["--mode", "forward", "--shape", "image tucker", "--against", "published"]
    assert app.main(words) == 2
    said = capsys.readouterr()
    ours = [line for line in said.out.splitlines() if line.startswith("  petal")]
    assert ours
    assert all("WRONG" in line for line in ours)


class Turns:
    """Computes `first` a few times and then, when it is being timed, `then`."""

    def __init__(self, first: Forward, then: Forward, honest: int = 6) -> None:
        self.first, self.then, self.left = first, then, honest

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        return (self.first if self.left >= 0 else self.then)(x)


class HalfGradient(torch.autograd.Function):
    """x^2 with x for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy * ctx.saved_tensors[0]


def test_a_form_that_computes_something_else_once_it_is_timed_is_found() -> None:
    """Its answers differ, so that only their values tell."""
    square = torch.square
    for mode in MODES:
        row = _table(Turns(square, lambda x: 1.01 * x.square()), mode).rows["petal"]
        assert row.verdict == "WRONG", mode
    for mode in ("train", "backward", "full"):
        row = _table(Turns(square, HalfGradient.apply), mode).rows["petal"]
        assert row.verdict == "WRONG", mode
        assert row.errors.gradients > 30.0


def test_a_first_answer_with_a_little_noise_is_found() -> None:
    """No two answers are equal bit for bit, and each is right for the first inputs."""
    known: list[Tensor] = []

    def form(x: Tensor) -> Tensor:
        out = x.square()
        known.append(out.detach())
        if len(known) <= 6:
            return out
        again = known[0].clone()
        at = len(known) % again.shape[0]
        again[at, 0] = torch.nextafter(again[at, 0], again.new_tensor(9.0))
        return out + (again - out).detach()

    assert _table(form, "forward").rows["petal"].verdict == "WRONG"


def test_what_is_timed_may_be_another_call_than_what_is_checked() -> None:
    """Dropout is off where the answer is compared: what is timed is looked at as it is timed."""
    made = scenario(lambda x: x.square())
    answer = torch.ones(101, 4, requires_grad=True)
    honest = made.providers["petal"]
    made.providers["petal"] = Provider(lambda x: answer, check=honest.check, ours=True)
    made.providers["base"] = Provider(lambda x: answer, floor=True)
    request = Request(modes=("forward",), rounds=4)
    (table,) = measure.measure(made, request, FAR, lambda *_: None)
    assert table.rows["petal"].verdict == "WRONG"
    assert table.rows["base"].red  # a floor that does nothing is no floor
    assert table.notes == [f"{k} gives one answer for two inputs" for k in ("petal", "base")]


@pytest.mark.parametrize(
    "make",
    [
        lambda r: op.scenarios(["gated_bottleneck"], r),
        lambda r: layer.scenarios(["gated_adapter"], r),
    ],
    ids=["op", "layer"],
)
def test_a_wrong_gradient_is_found_before_the_clock(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from petal_kernels.ops.gated_bottleneck import native_impl, torch_impl

    made = next(iter(make(Request(quick=True, against=("published",)))))()
    ours = [p for label, p in made.providers.items() if label.startswith("petal")]
    good = [p.check() for p in ours]
    assert all(0.0 < found.gradients <= 3.0 for found in good)
    for module in (native_impl, torch_impl):
        backward = module.backward

        def scaled(*args: Any, backward: Any = backward) -> Any:
            return tree_map(lambda t: 1.5 * t if isinstance(t, Tensor) else t, backward(*args))

        monkeypatch.setattr(module, "backward", scaled)
    for provider, before in zip(ours, good, strict=True):
        found = provider.check()
        assert found.outputs == before.outputs
        assert found.wrong
