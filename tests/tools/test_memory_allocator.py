"""Saved bytes of small models beside what torch's allocator says that a forward leaves allocated.

The allocator is read through torch.profiler, which knows no hook, no graph and no module: what a
forward keeps by a way that the memory profiler does not see is there all the same.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from petal_kernels import memory
from petal_kernels.memory.reasons import HELD

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
GENERATOR = 5056  # bytes of the CPU generator's state, which a checkpointed region keeps
WIDTH = 32

Step = tuple[nn.Module | Callable[..., Any], tuple[Any, ...]]


def left_allocated(step: Callable[[], Any]) -> int:
    """Bytes allocated by a forward and not freed while its output is there. Nothing older may be
    freed meanwhile: torch's profiler takes for its size that of an earlier block at its address.
    """
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        output = step()
    events = profiler.profiler.kineto_results.events()
    del output
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def rows(count: int = 6) -> Tensor:
    return torch.randn(count, WIDTH)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Loss(nn.Module):
    """Blocks one after the other, and a scalar."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x.square().mean()


class Checkpointed(Loss):
    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__(*blocks)
        self.options = options

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, **self.options)


def blocks(count: int = 2) -> list[nn.Module]:
    return [Mlp() for _ in range(count)]


def eager() -> Step:
    return Loss(*blocks()), (rows(),)


def a_trained_input() -> Step:
    return Loss(*blocks()), (rows().requires_grad_(),)


def several_outputs() -> Step:
    first, second = blocks()
    return lambda x: (first(x), {"second": second(x)[:2]}), (rows(),)


def checkpointed(reentrant: bool) -> Step:
    return Checkpointed(*blocks(3), use_reentrant=reentrant), (rows().requires_grad_(),)


def selective() -> Step:
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return Checkpointed(*blocks(3), use_reentrant=False, context_fn=keep), (rows(),)


def nested_checkpoints() -> Step:
    inner = Checkpointed(*blocks(2), use_reentrant=False)
    first = nn.Linear(WIDTH, WIDTH)
    return lambda x: checkpoint(inner, first(x), use_reentrant=False), (rows(),)


def checkpointed_with_arguments() -> Step:
    """A tensor made in the step that a region has as a keyword argument."""
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        scale = x.exp()
        return checkpoint(
            lambda t, *, scale: (block(t) * scale).sum(), x, use_reentrant=False, scale=scale
        )

    return step, (rows(),)


def autocast() -> Step:
    model = Loss(*blocks())

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    return step, (rows(),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.block = Mlp()
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.block(self.words(ids))), ids)


def tied() -> Step:
    return Tied(), (torch.arange(12) % 50,)


class Experts(nn.Module):
    """Two experts of four for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == i)
            if len(row):
                out = out.index_add(0, row, expert(x[row]) * weights[row, slot, None])
        return out


def mixture_of_experts() -> Step:
    return Loss(Experts()), (rows(12),)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(
            WIDTH, 4, 1, 1, dim_feedforward=48, dropout=0.1, batch_first=True
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.model(source, target).mean()


def encoder_decoder() -> Step:
    return EncoderDecoder(), (torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH))


class Attributes(torch.autograd.Function):
    """Keeps tensors as attributes of its ctx, in a list and a dict too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = x.exp()
        ctx.more = [x.sin(), {"last": x.cos()}]
        return x * ctx.factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.factor * ctx.more[0] * ctx.more[1]["last"]


def attributes_of_ctx() -> Step:
    block = Mlp()
    return lambda x: Attributes.apply(block(x)).sum(), (rows(),)


def hooks_of_saved_tensors() -> Step:
    """Kept in half the bytes, as other hooks than the profiler's make of it."""
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.bfloat16() if t.is_floating_point() else t.clone(),
            lambda t: t.float() if t.is_floating_point() else t,
        ):
            return block(x).sum()

    return step, (rows(),)


def saved_on_cpu() -> Step:
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return block(x).sum()

    return step, (rows(),)


def closures_of_hooks() -> Step:
    block = Mlp()

    def step(x: Tensor) -> Tensor:
        y = block(x)
        factor = y.detach().exp()
        y.register_hook(lambda dy: dy * factor)
        return y.sum()

    return step, (rows(),)


class Cached(nn.Module):
    """Holds a tensor that no gradient needs, as a cache of keys does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp()
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        self.cache[:] = [y.detach() + 1]
        return y.sum()


def held_by_python() -> Step:
    return Cached(), (rows(),)


class Unknown:
    """An output of a class that nobody knows, as a cache of keys is."""

    def __init__(self, loss: Tensor, keys: Tensor) -> None:
        self.loss = loss
        self.keys = keys


def held_by_the_output() -> Step:
    block = Mlp()

    def step(x: Tensor) -> Unknown:
        y = block(x)
        return Unknown(y.sum(), y.detach() + 1)

    return step, (rows(),)


def convolutions() -> Step:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return Loss(model), (torch.randn(2, 3, 9, 9),)


def recurrent() -> Step:
    lstm = nn.LSTM(WIDTH, 8, batch_first=True)
    return lambda x: lstm(x)[0].sum(), (torch.randn(2, 5, WIDTH),)


def derivatives_inside() -> Step:
    """Of torch.func, which runs under no hooks of saved tensors."""
    block = Mlp()
    region = Checkpointed(Mlp(), use_reentrant=False)

    def step(x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda t: block(t).square().sum())(region(x) * x)
        return slope.square().sum()

    return step, (rows().requires_grad_(),)


def compiled() -> Step:
    return torch.compile(Loss(*blocks()), backend="aot_eager"), (rows(),)


def compiled_in_place() -> Step:
    model = Loss(*blocks())
    model.compile(backend="aot_eager")
    return model, (rows(),)


def compiled_parts() -> Step:
    first, second, third = blocks(3)
    second.compile(backend="aot_eager")
    return Loss(first, second, torch.compile(third, backend="aot_eager")), (rows(),)  # type: ignore[arg-type]


def compiled_function() -> Step:
    block = Mlp()
    function = torch.compile(lambda t: (t * torch.sigmoid(t)).exp(), backend="aot_eager")
    return lambda x: function(block(x)).sum(), (rows(),)


def compiled_and_checkpointed() -> Step:
    block: Any = torch.compile(Mlp(), backend="aot_eager")
    return Checkpointed(Mlp(), block, use_reentrant=False), (rows(),)


# A step, and how many generator states its checkpointed regions hold at most.
STEPS: dict[str, tuple[Callable[[], Step], int]] = {
    "eager": (eager, 0),
    "a trained input": (a_trained_input, 0),
    "several outputs": (several_outputs, 0),
    "checkpointed": (lambda: checkpointed(False), 3),
    "checkpointed, reentrant": (lambda: checkpointed(True), 3),
    "selective checkpoints": (selective, 3),
    "nested checkpoints": (nested_checkpoints, 3),
    "a checkpoint's arguments": (checkpointed_with_arguments, 1),
    "autocast": (autocast, 0),
    "tied weights": (tied, 0),
    "mixture of experts": (mixture_of_experts, 0),
    "encoder-decoder": (encoder_decoder, 0),
    "attributes of a ctx": (attributes_of_ctx, 0),
    "hooks of saved tensors": (hooks_of_saved_tensors, 0),
    "saved on the CPU": (saved_on_cpu, 0),
    "closures of hooks": (closures_of_hooks, 0),
    "held by Python": (held_by_python, 0),
    "held by the output": (held_by_the_output, 0),
    "convolutions": (convolutions, 0),
    "recurrent": (recurrent, 0),
    "derivatives inside, checkpointed": (derivatives_inside, 1),
    "compiled": (compiled, 0),
    "compiled in place": (compiled_in_place, 0),
    "compiled parts": (compiled_parts, 0),
    "compiled function": (compiled_function, 0),
    "compiled and checkpointed": (compiled_and_checkpointed, 2),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_a_forward_keeps_is_what_the_allocator_says(name: str) -> None:
    """To the byte but for generator states, whichever way the forward keeps it."""
    make, states = STEPS[name]
    with seeded():
        model, batch = make()
        if isinstance(model, nn.Module):
            model.train()
        for _ in range(2):  # what a first call sets up is no part of it
            model(*batch)
        getattr(model, "cache", []).clear()
        delta = left_allocated(lambda: model(*batch))
        found = [memory.profile(model, batch, backward=backward) for backward in (True, False)]
    for profile in found:
        # A scalar to derive is the profiler's own where the step returns none.
        assert profile.kept_bytes - (delta - states * GENERATOR) in (0, 4)
        assert profile.sizes.elsewhere == (rows().nbytes if name == "held by Python" else 0)
        assert profile.compiled == ("compiled" in name)
        assert profile.checkpointed == ("checkpoint" in name)
        assert len(profile.notes) == profile.compiled
    assert found[0].saved_bytes == found[1].saved_bytes


def test_an_output_that_the_graph_holds_too_is_kept() -> None:
    """Dropping the results would free nothing."""
    block, x = Mlp(), rows()

    def step(t: Tensor) -> tuple[Tensor, Tensor]:
        y = block(t)
        factor = y.detach().exp()
        y.register_hook(lambda dy: dy * factor)
        return y, factor

    found = memory.profile(step, x)
    (record,) = [r for r in found.saved if r.operation == HELD]
    assert (record.bytes, record.shape) == (x.nbytes, tuple(x.shape))
    assert found.sizes.outputs == x.nbytes + 4  # y, and the sum
    assert "closure" in record.why


def test_what_python_holds_until_a_recomputation_replaces_it_is_not_kept() -> None:
    """A layer's own attribute goes in the backward, as what the graph held does."""

    class Remembers(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x.detach() + 1  # early: a recomputation stops at its last kept tensor
            return super().forward(x)

    x = rows().requires_grad_()
    found = memory.profile(Checkpointed(Remembers(), use_reentrant=False), x)
    assert found.sizes.elsewhere == x.nbytes
    assert found.saved_bytes == 2 * x.nbytes  # the region's input, and the square's


def keepers(profile: memory.Profile) -> set[tuple[str, str]]:
    return {(r.operation, r.argument) for r in profile.saved}


def test_what_is_kept_past_the_profilers_hook_is_named_by_its_operation() -> None:
    """Attributes of a ctx, of the batch and of a trained input too, and what other hooks made."""

    class KeepsInput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.x = x
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 2

    x = rows().requires_grad_()
    (record,) = memory.profile(KeepsInput.apply, x).saved
    assert (record.operation, record.argument) == ("KeepsInputBackward", "ctx.x")
    assert (record.bytes, record.of_batch) == (x.nbytes, True)
    assert "not save_for_backward" in record.why
    named = keepers(memory.profile(lambda t: Attributes.apply(t * 2), x))
    assert named == {("AttributesBackward", f"ctx.{a}") for a in ("factor", "more")}
    model, batch = saved_on_cpu()
    other = keepers(memory.profile(model, batch))
    assert ("AddmmBackward0", "mat1") in other
    assert HELD not in {operation for operation, _ in other}


def test_graphs_that_the_loss_does_not_reach_are_kept_while_results_are() -> None:
    x = rows()
    first, second = Mlp(), Mlp()

    def step(t: Tensor) -> dict[str, Tensor]:
        return {"loss": first(t).sum(), "beside": Attributes.apply(second(t))}

    both = memory.profile(step, x)
    alone = [memory.profile(block, x).saved_bytes for block in (first, second)]
    # Once exp, sin and cos of the second's result.
    assert both.saved_bytes == sum(alone) + 3 * x.nbytes
