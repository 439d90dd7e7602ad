"""Timing that survives a noisy machine: cold cache, providers interleaved sample by sample, medians
with spread.

Each round times every provider once, in an order that rotates, with the cache evicted before each.
The rounds are split in two halves; the largest relative difference between the halves' medians is
the drift of the run, and differences below it are equal.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

LEAST_ROUNDS = 4
LONGEST = 180.0  # seconds of one table, beyond which rounds are left out


@dataclass(frozen=True)
class Step:
    """What is timed: `run` on what `prepare` gave, which the clock does not see. `calls`: how many
    of the computation one run holds."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    calls: int = 1

    def __call__(self) -> None:
        self.run(self.prepare())


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider: median, 20th and 80th percentile, and the two halves' relative
    difference."""

    median: float
    p20: float
    p80: float
    drift: float
    samples: int

    def as_dict(self) -> dict[str, float]:
        """For a result file."""
        return {k: round(v, 5) for k, v in asdict(self).items()}


class Clock:
    """Seconds of one call of a step, cache evicted first; CUDA work is waited for.

    `wall`: host time until a CUDA device is idle again, launches and all, instead of the device's.
    """

    def __init__(self, device: torch.device, wall: bool = False) -> None:
        self.cuda, self.wall = device.type == "cuda", wall
        size = 256 << 20 if self.cuda else 96 << 20
        self.buffer = torch.empty(size // 4, dtype=torch.float32, device=device)

    def __call__(self, step: Step) -> float:
        given = step.prepare()
        if self.cuda:
            self.buffer.sum()  # by reading: dirty lines would be written back at the step's cost
        else:
            self.buffer.add_(1.0)
        if self.cuda and not self.wall:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            step.run(given)
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / step.calls
        if self.cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step.run(given)
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / step.calls


def _quantile(values: list[float], q: float) -> float:
    """Between the two samples that lie around it: p20 and p80 cut off as many."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def rounds_for(wanted: int, seconds: float) -> int:
    """How many rounds of `seconds` each: fewer than wanted, but at least four, where they are
    long."""
    return max(LEAST_ROUNDS, min(wanted, int(LONGEST / max(seconds, 1e-9))))


def warm_up(step: Step, device: torch.device, times: int = 3) -> float:
    """Run a step until it is warm; the seconds of its last run."""
    seconds = 0.0
    for _ in range(times):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if seconds > 2.0:
            break
    return seconds


def compare(
    steps: Mapping[str, Step],
    device: torch.device,
    rounds: int = 20,
    warmup: int = 3,
    progress: Callable[[int, int], None] | None = None,
    wall: bool = False,
) -> dict[str, Timing]:
    """Time every step at most ``rounds`` times, interleaved; at least four rounds."""
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds: want at least {LEAST_ROUNDS}, got {rounds}")
    clock = Clock(device, wall)
    names = list(steps)
    rounds = rounds_for(rounds, sum(warm_up(steps[name], device, warmup) for name in names))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            samples[name].append(clock(steps[name]) * 1e3)
        if progress is not None:
            progress(i + 1, rounds)
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Timing:
    """Median, spread and drift of samples in the order in which they were taken."""
    half = len(values) // 2
    first, second = statistics.median(values[:half]), statistics.median(values[half:])
    return Timing(
        median=statistics.median(values),
        p20=_quantile(values, 0.2),
        p80=_quantile(values, 0.8),
        drift=abs(first - second) / min(first, second),
        samples=len(values),
    )


def drift(timings: Mapping[str, Timing]) -> float:
    """The run's drift: the largest half-to-half difference of any provider."""
    return max(t.drift for t in timings.values())
