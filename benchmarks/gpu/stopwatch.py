"""Milliseconds on the device alone: cold cache, steps interleaved, the queue filled beforehand so
that no launch gap is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]
_FLUSHED_BYTES = 256 << 20
_WAIT_CYCLES = 4_000_000  # about 2 ms: longer than the host needs to queue most steps
_MOST_CYCLES = 16 * _WAIT_CYCLES


class Stopwatch:
    """Times single calls on one device."""

    def __init__(self, device: str) -> None:
        self.cuda, self._cycles = device == "cuda", _WAIT_CYCLES
        self._cache = torch.zeros(_FLUSHED_BYTES // 4 if self.cuda else 1, device=device)

    def queue(self) -> None:
        """Evict the cache, then keep the device busy while the host prepares."""
        if self.cuda:
            self._cache.sum()  # by reading: the step is not to pay for writing dirty lines back
            torch.cuda._sleep(self._cycles)

    def call(self, step: Step) -> Callable[[], float]:
        """Run a step between two marks; the result is asked for its milliseconds later."""
        if not self.cuda:
            begin = time.perf_counter()
            step()
            seconds = time.perf_counter() - begin
            return lambda: 1e3 * seconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        if start.query():  # the device was here before the host was done: launch gaps are timed
            self._cycles = min(2 * self._cycles, _MOST_CYCLES)
        return lambda: float(start.elapsed_time(end))

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()


def race(steps: Mapping[str, Step], device: str, rounds: int) -> dict[str, float]:
    """The median milliseconds of each step."""
    watch = Stopwatch(device)
    for step in steps.values():
        step()
        step()
    watch.wait()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            watch.queue()
            taken = watch.call(steps[name])
            watch.wait()
            samples[name].append(taken())
    return {name: statistics.median(values) for name, values in samples.items()}
