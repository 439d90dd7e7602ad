"""What one step launches and holds: dispatched operators or kernels, bytes saved, peak bytes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petal_kernels import memory


def saved_bytes(forward: Callable[[], Any], parameters: Sequence[Tensor]) -> int:
    """Bytes of distinct storages kept for backward, the parameters' own excluded."""
    return memory.profile(forward, parameters=parameters, backward=False).saved_bytes


class _Operators(TorchDispatchMode):
    """Counts what is dispatched, views excepted: they launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], object], device: torch.device) -> int:
    """On CUDA the kernels and copies of one run by the profiler, elsewhere the operators that torch
    dispatches."""
    if device.type != "cuda":
        with _Operators() as counter:
            run()
        return int(counter.count)
    from torch._C._autograd import DeviceType

    events = _profiled(run, memory=False)
    return sum(e.device_type() == DeviceType.CUDA for e in events)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of torch's allocator alive at once in one run, above those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    found = [e for e in _profiled(run, memory=True) if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(found, key=lambda e: int(e.start_ns())):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard error of C++ to nowhere: the profiler warns of blocks older than itself."""
    sys.stderr.flush()
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _profiled(run: Callable[[], object], memory: bool) -> list[Any]:
    from torch.profiler import ProfilerActivity, profile

    # Kineto tells stderr of every start and stop; this is read when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU if memory else ProfilerActivity.CUDA]
    with _quiet(), profile(activities=activities, profile_memory=memory) as profiler:
        run()
        if not memory:
            torch.cuda.synchronize()
    return list(profiler.profiler.kineto_results.events())
