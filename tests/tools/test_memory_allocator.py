"""Saved bytes of small models beside what torch's allocator says that a forward leaves allocated.

The allocator is read through torch.profiler, which knows no hook, no graph and no module: what a
forward keeps by a way that the memory profiler does not see is there all the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petal_kernels import memory
from petal_kernels.memory.reasons import HELD

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
from tests.tools.memory_steps import STEPS, Attributes, Checkpointed, Mlp, rows, saved_on_cpu

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
GENERATOR = 5056  # bytes of the CPU generator's state, which a checkpointed region keeps


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
