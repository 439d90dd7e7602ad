"""CUDA steps without launch gaps: captured once, replayed over inputs that are cold in L2.

A captured step runs the computation on one copy of its inputs after the other, so many copies that
the first has left the cache when its turn comes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from petal_kernels.tools.bench.fresh import Fresh
from petal_kernels.tools.bench.scenarios import Inputs, Provider
from petal_kernels.tools.bench.timing import Step

LEAST_CALLS = 8  # in one replay, so that the gap between replays is no part of the time
COLD = 3  # times the size of L2 between two uses of one copy


def copies(nbytes: int, cache: int) -> int:
    """How many copies of inputs of `nbytes` together are at least three times the cache."""
    return max(1, math.ceil(COLD * cache / max(nbytes, 1)))


def rounds(count: int) -> list[int]:
    """Which copy each call of one replay reads: round robin, every copy equally often."""
    return list(range(count)) * math.ceil(LEAST_CALLS / count)


def _calls(provider: Provider, mode: str, inputs: list[Inputs]) -> list[Callable[[], Any]]:
    """One function per copy. In "backward" the graphs of the forwards stand before the capture."""

    def forward(given: Inputs) -> object:
        with torch.no_grad():
            return provider.outputs(given)

    if mode == "forward":
        return [lambda i=i: forward(i) for i in inputs]  # type: ignore[misc]
    if mode == "train":
        return [lambda i=i: provider.outputs(i) for i in inputs]  # type: ignore[misc]
    if mode == "full":
        return [lambda i=i: provider.gradients(provider.outputs(i), i) for i in inputs]  # type: ignore[misc]
    outs = [provider.outputs(i) for i in inputs]
    return [
        lambda i=i, o=o: provider.gradients(o, i, retain=True)  # type: ignore[misc]
        for i, o in zip(inputs, outs, strict=True)
    ]


def capture(provider: Provider, mode: str, inputs: Inputs) -> tuple[Step, Fresh]:
    """The step as a replay of one captured graph, and the inputs of its last call, whose answer is
    the step's: what was captured must compute it anew.

    Raises RuntimeError where the computation cannot be captured (it synchronises, for one).
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = copies(inputs.nbytes(), cache)
    own = [inputs.map(torch.Tensor.clone) for _ in range(count)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # A backward runs on its forward's stream, so both are on the one that is captured; allocations
    # and lazy set-up happen before.
    with torch.cuda.stream(stream):
        calls = _calls(provider, mode, own)
        for _ in range(3):
            calls[0]()
        # Found inside a capture, a sync leaves torch's generator capturing: later dropouts raise.
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    order = rounds(count)
    with torch.cuda.graph(graph, stream=stream):
        for i in order[:-1]:
            calls[i]()
        answer = calls[order[-1]]()

    def replay(_: object) -> Any:
        graph.replay()
        return answer

    last = own[order[-1]]
    # The inputs are held with the step: the graph reads them where they lie.
    return Step(replay, lambda: own, len(order)), Fresh([*last.leaves(), *last.douts])
