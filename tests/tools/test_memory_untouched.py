"""A profile leaves everything as it was, also where the step raises, and other threads alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from petal_kernels import memory
from petal_kernels.memory import leaves, recording
from petal_kernels.memory.modules import ModuleStack
from petal_kernels.memory.timeline import Timeline


class Moving(nn.Module):
    """Statistics, a counter, a buffer that is replaced, dropout, a checkpointed region."""

    steps: Tensor
    seen: Tensor | None
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", None)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.seen = x.detach().clone()
        self.mean = x.detach().mean(0)
        y = self.drop(self.norm(self.first(x)))
        return checkpoint(self.last, y, use_reentrant=False)


class Broken(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError("broken backward")


class Raises(Moving):
    """Like it, and raises at the end of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("broken forward")


class RaisesLater(Moving):
    """Like it, and raises in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return Broken.apply(super().forward(x))


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        (name, dict(value))
        for module in [model, *model.modules()]
        for name, value in vars(module).items()
        if "hook" in name and value is not None and hasattr(value, "items")
    ]


@pytest.mark.parametrize("kind", [Moving, Raises, RaisesLater])
def test_a_profile_leaves_everything_as_it_was(kind: type[Moving]) -> None:
    """Gradients of parameters, batch and other leaves, buffers, generators, hooks, modes."""
    model = kind().train()
    handle = model.first.register_forward_hook(lambda *_: None)
    model.first.weight.grad = torch.ones(8, 8)
    x, scale = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    scale.grad = torch.full_like(scale, 3.0)
    grads = model.first.weight.grad, model.last.weight.grad, x.grad, scale.grad
    tensors = model.state_dict(keep_vars=True)
    values = {name: t.detach().clone() for name, t in tensors.items()}
    hooks, save_inputs = hooks_of(model), checkpoints._CheckpointFrame.save_inputs
    state = torch.get_rng_state()

    def profile() -> memory.Profile:
        return memory.profile(lambda t: model(t) * scale, x, module=model)

    if kind is Moving:
        assert profile().notes == []
    else:
        with pytest.raises(RuntimeError, match="broken"):
            profile()
    now = model.first.weight.grad, model.last.weight.grad, x.grad, scale.grad
    assert all(a is b for a, b in zip(grads, now, strict=True))
    assert torch.equal(now[0], torch.ones(8, 8))
    assert torch.equal(now[3], torch.full_like(scale, 3.0))
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    for name, t in after.items():
        assert t is tensors[name], name
        assert torch.equal(t, values[name]), name
    assert model.seen is None
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks_of(model) == hooks
    assert checkpoints._CheckpointFrame.save_inputs is save_inputs
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    handle.remove()


def test_the_callers_graph_is_neither_counted_nor_used_up() -> None:
    """A batch that another module computed, and a tensor of it that the step closes over."""
    before, model = Small(), Small()
    x = before(torch.randn(4, 8)).exp()
    kept = memory.profile(model, x.detach().requires_grad_()).saved_bytes
    for batch in ((x,), {"x": x}):
        assert memory.profile(model, batch).saved_bytes == kept
    step = lambda: model(x)  # noqa: E731
    with pytest.raises(ValueError, match=r"graph made before it \(ExpBackward0\)"):
        memory.profile(step, ())
    assert memory.profile(step, (), backward=False).saved_bytes == kept
    assert all(p.grad is None for p in before.parameters())
    x.sum().backward()
    assert all(p.grad is not None for p in before.parameters())


def test_the_generators_of_every_gpu_that_holds_a_part_are_put_back() -> None:
    """With stand-ins for tensors on GPUs: there are none here."""
    on = [mock.Mock(is_cuda=i >= 0, get_device=lambda i=i: i) for i in (3, -1, 0, 3)]
    assert recording._devices(on) == [0, 3]


def test_a_buffer_too_large_to_be_copied_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "LARGEST_BUFFER", 8 * 4 - 1)
    model = nn.Sequential(nn.BatchNorm1d(8)).train()
    model.register_buffer("count", torch.zeros(8))

    def count(module: Any, _: Any) -> None:
        module.count.add_(1)

    model.register_forward_pre_hook(count)
    found = memory.profile(lambda t: model(t), torch.randn(4, 8), module=model)
    (note,) = found.notes
    assert "count" in note


def test_parameters_that_a_hook_moves_are_named() -> None:
    """As an optimizer in the backward does: the profile cannot take its step back."""
    model = nn.Linear(4, 4)

    def step(parameter: Any) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    model.weight.register_post_accumulate_grad_hook(step)
    (note,) = memory.profile(model, torch.randn(2, 4)).notes
    assert "weight" in note
    assert "bias" not in note


def test_no_hook_is_on_modules_while_a_step_runs() -> None:
    """Hooks would run in other threads' forwards too, and have compiled code compiled again."""
    model = Moving()
    before = hooks_of(model)
    during: list[Any] = []

    def step(t: Tensor) -> Tensor:
        every = (of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks)
        during.append((hooks_of(model), [len(each) for each in every]))
        return model(t)

    memory.profile(step, torch.randn(4, 8))
    assert during == [(before, [0, 0])]


def in_another_thread(work: Callable[[], Any]) -> tuple[Callable[[], list[str]], Callable[[], int]]:
    """Runs `work` over and over; functions that stop it, with what it raised, and that count."""
    errors: list[str] = []
    stop = threading.Event()
    rounds = [0]

    def run() -> None:
        while not stop.is_set():
            try:
                work()
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            rounds[0] += 1

    thread = threading.Thread(target=run)
    thread.start()

    def finish() -> list[str]:
        stop.set()
        thread.join()
        return errors

    return finish, lambda: rounds[0]


@pytest.mark.parametrize("rules", [False, True])
def test_other_threads_run_models_meanwhile(rules: bool) -> None:
    """Other models and the profiled one, plain and checkpointed: none raises, and the figures are
    those of the profiled step alone."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    other = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    x = torch.randn(8, 64)

    def work() -> None:
        model(x)
        checkpoint(other, torch.randn(2, 8), use_reentrant=False).sum().backward()

    finish, rounds = in_another_thread(work)
    found = [memory.profile(model, x, cuda_rules=rules) for _ in range(10)]
    before = rounds()
    while rounds() < before + 2:
        pass
    assert finish() == []
    assert {p.saved_bytes for p in found} == {2 * x.nbytes}
    assert {p.peak_bytes for p in found} == {found[0].peak_bytes}
    assert {r.module for p in found for r in p.saved} == {"0", "1"}


def test_profiles_at_once_take_turns() -> None:
    """Torch counts modes for the whole process: entered in turns, left in others, they stay on."""
    model = Moving().train()
    x = torch.randn(4, 8)
    alone = memory.profile(model, x).saved_bytes
    save_inputs = checkpoints._CheckpointFrame.save_inputs
    running, most, kept = [0], [0], list[int]()

    def step(t: Tensor) -> Tensor:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1
        return model(t)

    def profile() -> None:
        kept.append(memory.profile(step, x, module=model).saved_bytes)

    finish, rounds = in_another_thread(profile)
    while rounds() < 1:
        profile()
    for _ in range(3):
        profile()
    assert finish() == []
    assert set(kept) == {alone}
    assert most == [1]
    assert checkpoints._CheckpointFrame.save_inputs is save_inputs


class Counting:
    """A backend of torch.compile that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("first", ["model", "profile"])
def test_a_compiled_model_stays_compiled(first: str) -> None:
    """Whoever runs it first: nothing is compiled again, nothing runs eagerly ever after."""
    backend = Counting()
    model = torch.compile(Small(), backend=backend)
    x = torch.randn(4, 8)
    if first == "model":
        model(x).sum().backward()
    profiles = [memory.profile(model, x) for _ in range(3)]
    assert type(model(x).grad_fn).__name__ == "CompiledFunctionBackward"
    assert backend.graphs == 1
    assert all(p.compiled and "at least" in p.notes[0] for p in profiles)
    # x, and tanh's result: in the profile and in the graph.
    assert {p.saved_bytes for p in profiles} == {2 * x.nbytes}
    with torch.compiler.set_stance("force_eager"):
        eager = memory.profile(model, x)
    assert (eager.compiled, eager.notes) == (False, [])
    assert type(model(x).grad_fn).__name__ == "CompiledFunctionBackward"
    assert backend.graphs == 1


def test_a_compiled_model_of_another_thread_stays_compiled() -> None:
    backend = Counting()
    model = torch.compile(Small(), backend=backend)
    x = torch.randn(4, 8)
    model(x)
    names: set[str] = set()
    finish, rounds = in_another_thread(lambda: names.add(type(model(x).grad_fn).__name__))
    memory.profile(Small(), x)
    memory.profile(*memory.fake_tensors(Small(), x))
    before = rounds()
    while rounds() < before + 2:
        pass
    assert finish() == []
    assert names == {"CompiledFunctionBackward"}
    assert backend.graphs == 1


@pytest.mark.parametrize("way", ["module", "in place", "part", "function"])
def test_compiled_code_under_cudas_rules_is_refused_and_stays_as_it_is(way: str) -> None:
    """It would be compiled once more, for the rules' function mode."""
    backend = Counting()
    x = torch.randn(4, 8)
    plain = Small()
    function = torch.compile(lambda t: t.sigmoid() * t, backend=backend)
    part: Any = torch.compile(plain, backend=backend)
    steps: dict[str, Callable[..., Any]] = {
        "module": torch.compile(plain, backend=backend),
        "in place": plain,
        "part": nn.Sequential(nn.Linear(8, 8), part),
        "function": lambda t: function(plain(t)),
    }
    if way == "in place":
        plain.compile(backend=backend)
    model = steps[way]
    model(x)
    graphs = backend.graphs
    with pytest.raises(ValueError, match=r"^model: .*compiled.*force_eager"):
        memory.profile(model, x, cuda_rules=True)
    model(x)
    assert backend.graphs == graphs == 1
    with torch.compiler.set_stance("force_eager"):
        assert not memory.profile(model, x, cuda_rules=True).compiled


def test_a_leaf_is_asked_after_it_became_a_result() -> None:
    """A view of fake tensors is a leaf until autograd has heard of it; held, it would live as long
    as the step."""
    model, x = memory.fake_tensors(nn.Linear(8, 8), torch.randn(2, 4, 8))
    timeline = Timeline(ModuleStack(model))
    seen = leaves.Leaves(model, set(), timeline)
    with x.fake_mode, seen:
        y = model(x)
        z = model(y[:, 0]).sum() + y.sum()
    assert {id(t) for t in seen.trained([])} == {id(model.weight), id(model.bias)}
    assert z.requires_grad
